"""guidance_scale and negative_prompt: a sequence then has a second branch, which takes a row and blocks too."""

from __future__ import annotations

from octavo.errors import Reason, RequestError
from octavo.frontend.lengths import Context, LengthProblems, Lengths
from octavo.frontend.validation import Violations
from octavo.types import EngineInfo, GenerationParams


def is_guided(params: GenerationParams) -> bool:
    return params.guidance_scale not in (None, 1)


def check_guidance(violations: Violations, params: GenerationParams) -> None:
    """`params`: resolved."""
    if params.negative_prompt is not None and not is_guided(params):
        violations.add("params.negative_prompt", "has no effect without a guidance_scale other than 1")


def check_branches(
    prompts: list[list[int]], lengths: list[Lengths], negatives: list[list[int]], context: Context
) -> None:
    """Each negative prompt with what is generated has to fit too. Raises RequestError: CONTEXT_LENGTH_EXCEEDED."""
    problems = LengthProblems()
    for i, (ids, length, negative) in enumerate(zip(prompts, lengths, negatives, strict=True)):
        total = len(negative) + length.total - len(ids)
        if total > context.max_model_len:
            problems.exceeded(
                "params.negative_prompt",
                f"has {len(negative)} tokens, which makes {total} with those generated for prompt {i}, "
                f"the limit is {context.max_model_len}",
                limit=context.max_model_len,
                got=total,
                prompt_index=i,
            )
    problems.raise_if_any()


def check_engine_can_guide(
    prompts: list[list[int]], lengths: list[Lengths], negatives: list[list[int]], info: EngineInfo
) -> None:
    """Raises RequestError (REQUEST_TOO_LARGE) for what would not fit into an empty engine."""
    if info.max_num_requests < 2:
        raise RequestError(
            Reason.REQUEST_TOO_LARGE,
            "guidance_scale takes two rows, the engine runs one sequence at once",
            metadata={"max": "1", "got": "2"},
        )
    for ids, length, negative in zip(prompts, lengths, negatives, strict=True):
        totals = (length.total, len(negative) + length.total - len(ids))
        needed = sum(-(-(total - 1) // info.block_size) for total in totals)
        if needed > info.num_blocks:
            raise RequestError(
                Reason.REQUEST_TOO_LARGE,
                f"two branches of {totals[0] - 1} and {totals[1] - 1} tokens take {needed} blocks, "
                f"the KV-cache holds {info.num_blocks}",
                metadata={"max": str(info.num_blocks), "got": str(needed)},
            )
