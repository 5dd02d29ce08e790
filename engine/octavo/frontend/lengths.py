"""How long a prompt and its sequences may be: truncation, the default of 20 new tokens, the context's end."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.errors import FieldViolation, Reason, RequestError
from octavo.frontend.defaults import DEFAULT_NEW_TOKENS
from octavo.types import GenerationParams, PromptOptions


@dataclass(frozen=True, slots=True)
class Context:
    """What a model can hold."""

    n_positions: int
    max_model_len: int
    """Longest total; n_positions + 1 at most, as the last token is never fed back."""

    @property
    def default_total(self) -> int:
        """Where the default of 20 new tokens is cut: transformers leaves out the last token here."""
        return min(self.n_positions, self.max_model_len)

    @property
    def max_prompt(self) -> int:
        return min(self.n_positions, self.max_model_len - 1)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of one prompt's sequences, in tokens."""

    total: int
    """Prompt plus output."""
    is_context: bool
    """The default was cut by the context."""


class LengthProblems:
    """Collects violations of several prompts; the first one decides the reason."""

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []
        self._reason = Reason.CONTEXT_LENGTH_EXCEEDED
        self._metadata: dict[str, str] = {}

    def exceeded(self, field: str, description: str, *, limit: int, got: int, prompt_index: int) -> None:
        if not self._violations:
            self._metadata = {"max": str(limit), "got": str(got), "prompt_index": str(prompt_index)}
        self._violations.append(FieldViolation(field, description))

    def invalid(self, field: str, description: str) -> None:
        if not self._violations:
            self._reason = Reason.INVALID_FIELD
        self._violations.append(FieldViolation(field, description))

    def raise_if_any(self) -> None:
        if not self._violations:
            return
        first = self._violations[0]
        more = f" (and {len(self._violations) - 1} more)" if len(self._violations) > 1 else ""
        raise RequestError(
            self._reason,
            f"{first.field}: {first.description}{more}",
            violations=self._violations,
            metadata=self._metadata,
        )


def truncate(token_ids: list[int], params: GenerationParams, options: PromptOptions, context: Context) -> list[int]:
    """Drops tokens from the left if the request asked for it; the pipeline's "hole" for truncate_to_fit."""
    if options.truncate_to_last is not None:
        return token_ids[-options.truncate_to_last :]
    if not options.truncate_to_fit:
        return token_ids
    if params.max_length is not None:
        new_tokens = max(params.max_length - len(token_ids), 0)
    else:
        new_tokens = params.max_new_tokens or DEFAULT_NEW_TOKENS
    keep = context.default_total - new_tokens
    return token_ids[-keep:] if 0 < keep < len(token_ids) else token_ids


def resolve_lengths(
    problems: LengthProblems, index: int, path: str, prompt_len: int, params: GenerationParams, context: Context
) -> Lengths:
    """Of prompt `index`, found at `path`. What is returned after a problem means nothing."""
    if prompt_len > context.max_prompt:
        problems.exceeded(
            path,
            f"has {prompt_len} tokens, the limit is {context.max_prompt}",
            limit=context.max_prompt,
            got=prompt_len,
            prompt_index=index,
        )
        return Lengths(prompt_len, False)
    lengths = _total(problems, index, path, prompt_len, params, context)
    shortest = (
        prompt_len + params.min_new_tokens if params.min_new_tokens is not None else params.min_length or prompt_len
    )
    if shortest > lengths.total > prompt_len:
        field = "params.min_new_tokens" if params.min_new_tokens is not None else "params.min_length"
        problems.invalid(
            field, f"asks for {shortest} tokens in all, but prompt {index} ends at {lengths.total} at the latest"
        )
    return lengths


def _total(
    problems: LengthProblems, index: int, path: str, prompt_len: int, params: GenerationParams, context: Context
) -> Lengths:
    if params.max_length is not None:
        field, total = "params.max_length", params.max_length
        if total <= prompt_len:
            problems.invalid(field, f"must be longer than prompt {index}, which has {prompt_len} tokens, not {total}")
            return Lengths(total, False)
    elif params.max_new_tokens is not None:
        field, total = "params.max_new_tokens", prompt_len + params.max_new_tokens
    else:
        total = min(prompt_len + DEFAULT_NEW_TOKENS, context.default_total)
        if total <= prompt_len:
            problems.exceeded(
                path,
                f"has {prompt_len} tokens, which leaves no room to generate unless max_new_tokens is set",
                limit=context.default_total,
                got=prompt_len + 1,
                prompt_index=index,
            )
        return Lengths(total, total < prompt_len + DEFAULT_NEW_TOKENS)
    if total > context.max_model_len:
        problems.exceeded(
            field,
            f"makes {total} tokens with the {prompt_len} of prompt {index}, the limit is {context.max_model_len}",
            limit=context.max_model_len,
            got=total,
            prompt_index=index,
        )
    return Lengths(total, False)
