"""Rules of beam search: what num_beams goes with, and what an engine must have to hold a search."""

from __future__ import annotations

from octavo.errors import Reason, RequestError
from octavo.frontend.guidance import is_guided
from octavo.frontend.validation import Violations
from octavo.types import EarlyStopping, EngineInfo, GenerationParams, OutputOptions

NEEDS_BEAMS = "has no effect without num_beams above 1"


def num_rows(params: GenerationParams) -> int:
    """Rows that a prompt decodes at once, of resolved parameters."""
    return max(params.num_return_sequences or 1, params.num_beams or 1) * (2 if is_guided(params) else 1)


def is_beam_search(params: GenerationParams) -> bool:
    return (params.num_beams or 1) > 1


def check_beams(
    violations: Violations, own: GenerationParams, resolved: GenerationParams, output: OutputOptions
) -> None:
    """Beam fields without beams, and what a search cannot do. `own`: as it was set."""
    if not is_beam_search(resolved):
        if own.length_penalty not in (None, 1):
            violations.add("params.length_penalty", NEEDS_BEAMS)
        if own.early_stopping not in (None, EarlyStopping.FALSE):
            violations.add("params.early_stopping", NEEDS_BEAMS)
        return
    sequences, beams = resolved.num_return_sequences or 1, resolved.num_beams
    if sequences > (beams or 1):
        violations.add("params.num_return_sequences", f"must be at most num_beams {beams}, not {sequences}")
    if is_guided(resolved):
        violations.add("params.guidance_scale", "excludes num_beams above 1")
    if resolved.prompt_lookup_num_tokens:
        violations.add("params.prompt_lookup_num_tokens", "excludes num_beams above 1")
    if resolved.watermarking_config is not None and resolved.watermarking_config.synth_id is not None:
        violations.add(
            "params.watermarking_config.synth_id",
            "excludes num_beams above 1: transformers' state of it does not follow the beams",
        )
    if output.logprobs is not None:
        violations.add_unsupported("output.logprobs", "not implemented yet with num_beams above 1")


def check_engine_can_search(params: GenerationParams, lengths: list[tuple[int, int]], info: EngineInfo) -> None:
    """`lengths`: prompt and total of each prompt. Raises RequestError: REQUEST_TOO_LARGE."""
    beams = params.num_beams or 1
    if beams > info.max_num_requests:
        raise RequestError(
            Reason.REQUEST_TOO_LARGE,
            f"num_beams is {beams}, the engine runs {info.max_num_requests} sequences at once",
            metadata={"max": str(info.max_num_requests), "got": str(beams)},
        )
    size = info.block_size
    for prompt_len, total in lengths:
        shared = (prompt_len - 1) // size  # blocks that all beams have in common
        needed = shared + beams * (-(-(total - 1) // size) - shared)
        if needed > info.num_blocks:
            raise RequestError(
                Reason.REQUEST_TOO_LARGE,
                f"{beams} beams of {total - 1} tokens may take {needed} blocks, the KV-cache holds {info.num_blocks}",
                metadata={"max": str(info.num_blocks), "got": str(needed)},
            )
