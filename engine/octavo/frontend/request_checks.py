"""Everything about a request that can be told without its tokens. Counts come first, so that size costs nothing."""

from __future__ import annotations

from typing import Any

from octavo.config import Limits
from octavo.errors import Reason, RequestError
from octavo.frontend.beams import check_beams, is_beam_search, num_rows
from octavo.frontend.defaults import DEFAULT_NEW_TOKENS, resolve_params
from octavo.frontend.guidance import check_guidance
from octavo.frontend.model import FrontendModel
from octavo.frontend.param_checks import ParamChecker, check_bools, check_token_rules
from octavo.frontend.structured import check_structured_output, check_with_structured_output
from octavo.frontend.validation import (
    NAME_PATTERN,
    PRIORITY,
    SAMPLING_NEUTRAL,
    Range,
    Violations,
    check_ranges,
    check_token_ids,
    output_ranges,
    show,
    utf8_length,
)
from octavo.types import (
    GenerateRequest,
    GenerationParams,
    LogprobKind,
    OutputOptions,
    Prompt,
    PromptOptions,
)


class RequestChecker:
    """Checks requests against one model and one set of limits."""

    def __init__(self, model: FrontendModel, limits: Limits) -> None:
        self._model = model
        self._limits = limits
        self._vocab_size = model.spec.vocab_size
        self._params = ParamChecker(limits, self._vocab_size, model.spec.n_positions)
        self._output_ranges = output_ranges(limits, model.spec.vocab_size)
        self._truncate_range = Range(1, model.spec.n_positions, integer=True)

    def check(self, request: GenerateRequest) -> GenerationParams:
        """Returns the resolved parameters. Raises RequestError with all that is wrong."""
        if request.model not in ("", self._model.name):
            raise RequestError(
                Reason.MODEL_NOT_FOUND, "no such model here; GetModel tells the name of the one that is served"
            )
        violations = Violations()
        self._check_names(violations, request)
        self._check_prompts(violations, request)
        num_before = len(violations)
        wrong = self._params.check(violations, request.params)
        sound = len(violations) == num_before
        self._check_output(violations, request.output)
        self._check_prompt_options(violations, request.prompt_options)
        params = resolve_params(request.params, self._model.checkpoint_params)
        _check_exclusions(violations, request.params)
        if params.structured_output is not None:
            check_structured_output(violations, params.structured_output, self._limits)
            check_with_structured_output(violations, params)
        if request.params.negative_prompt is not None:
            self._check_prompt(
                violations, "params.negative_prompt", request.params.negative_prompt, request.params, False
            )
        check_guidance(violations, params)
        if "num_beams" not in wrong:
            check_beams(violations, request.params, params)
        if not wrong:
            self._check_combinations(violations, request.params, params)
        if sound:
            check_token_rules(violations, request.params, params)
        violations.raise_if_any()
        self._check_num_sequences(len(request.prompts), num_rows(params))
        return params

    def check_texts(self, violations: Violations, path: str, texts: list[str]) -> None:
        """Size and encoding of texts to tokenize."""
        for i, text in enumerate(texts):
            self._check_text(violations, f"{path}[{i}]", text)

    def _check_names(self, violations: Violations, request: GenerateRequest) -> None:
        rule = "must be up to 128 characters of A-Z a-z 0-9 . _ : -"
        if not NAME_PATTERN.match(request.request_id):
            violations.add("request_id", rule)
        if not NAME_PATTERN.match(request.cache.cache_salt):
            violations.add("cache.cache_salt", rule)
        if (problem := PRIORITY.problem(request.priority)) is not None:
            violations.add("priority", problem)
        check_bools(violations, "cache", request.cache, ("bypass_prefix_cache",))

    def _check_prompts(self, violations: Violations, request: GenerateRequest) -> None:
        prompts = request.prompts
        if not prompts:
            violations.add("prompts", "must have at least one prompt")
        if len(prompts) > self._limits.max_prompts:
            violations.add("prompts", f"has {len(prompts)} prompts, the limit is {self._limits.max_prompts}")
            return
        may_be_longer = bool(request.prompt_options.truncate_to_fit or request.prompt_options.truncate_to_last)
        for i, prompt in enumerate(prompts):
            self._check_prompt(violations, f"prompts[{i}]", prompt, request.params, may_be_longer)

    def _check_prompt(
        self, violations: Violations, path: str, prompt: Prompt, params: GenerationParams, may_be_longer: bool
    ) -> None:
        if (prompt.text is None) == (prompt.token_ids is None):
            violations.add(path, "must have either text or token_ids")
        elif prompt.token_ids is not None:
            if not prompt.token_ids:
                violations.add(f"{path}.token_ids", "must not be empty")
            elif may_be_longer or len(prompt.token_ids) <= self._model.spec.n_positions:  # else: `finish` tells
                check_token_ids(violations, f"{path}.token_ids", prompt.token_ids, self._vocab_size)
        elif prompt.text:
            self._check_text(violations, f"{path}.text", prompt.text)
        elif params.bos_token_id is None and self._model.bos_token_id is None:
            violations.add(
                f"{path}.text", "is empty, and neither request nor checkpoint has a bos_token_id to start from"
            )

    def _check_text(self, violations: Violations, path: str, text: Any) -> None:
        limit = self._limits.max_prompt_bytes
        size = utf8_length(text, limit) if isinstance(text, str) else None
        if size is None:
            violations.add(path, "is not valid Unicode")
        elif size > limit:
            violations.add(path, f"has {'at least ' if len(text) > limit else ''}{size} bytes, the limit is {limit}")

    def _check_ids(self, violations: Violations, path: str, token_ids: list[int], limit: int) -> None:
        check_token_ids(violations, path, token_ids, self._vocab_size, limit)

    def _check_output(self, violations: Violations, output: OutputOptions) -> None:
        check_ranges(violations, "output", output, self._output_ranges)
        check_bools(
            violations,
            "output",
            output,
            (
                "include_prompt",
                "return_text",
                "return_token_ids",
                "return_prompt_token_ids",
                "skip_special_tokens",
                "return_resolved_options",
            ),
        )
        self._check_ids(
            violations, "output.logprob_token_ids", output.logprob_token_ids, self._limits.max_logprob_token_ids
        )
        if not isinstance(output.logprob_kind, LogprobKind | None):
            violations.add("output.logprob_kind", f"has no value {show(output.logprob_kind)}")
        if output.logprobs is not None and output.return_token_ids is False:
            violations.add("output.logprobs", "needs return_token_ids")
        if output.logprob_token_ids and output.logprobs is None:
            violations.add("output.logprob_token_ids", "needs logprobs")
        if output.include_prompt and output.return_text is False:
            violations.add("output.include_prompt", "needs return_text")

    def _check_prompt_options(self, violations: Violations, options: PromptOptions) -> None:
        check_ranges(violations, "prompt_options", options, {"truncate_to_last": self._truncate_range})
        check_bools(
            violations,
            "prompt_options",
            options,
            ("add_special_tokens", "split_special_tokens", "truncate_to_fit"),
        )
        if options.truncate_to_fit and options.truncate_to_last is not None:
            violations.add("prompt_options.truncate_to_fit", "excludes truncate_to_last")

    def _check_combinations(self, violations: Violations, own: GenerationParams, resolved: GenerationParams) -> None:
        if resolved.max_length is None and resolved.min_new_tokens is not None:
            longest = resolved.max_new_tokens or DEFAULT_NEW_TOKENS
            if resolved.min_new_tokens > longest:
                violations.add(
                    "params.min_new_tokens", f"must be at most max_new_tokens {longest}, not {resolved.min_new_tokens}"
                )
        if resolved.max_length is not None and (resolved.min_length or 0) > resolved.max_length:
            violations.add(
                "params.min_length", f"must be at most max_length {resolved.max_length}, not {resolved.min_length}"
            )
        if not resolved.do_sample:
            self._check_greedy(violations, own, resolved)

    def _check_greedy(self, violations: Violations, own: GenerationParams, resolved: GenerationParams) -> None:
        if (resolved.num_return_sequences or 1) > 1 and not is_beam_search(resolved):
            violations.add(
                "params.num_return_sequences",
                "above 1 needs num_beams, or do_sample and a temperature above 0: all would be equal",
            )
        if resolved.temperature == 0:
            return
        for name, neutral in SAMPLING_NEUTRAL.items():
            value = getattr(own, name)
            if value is not None and value not in (neutral, getattr(self._model.default_params, name)):
                violations.add(f"params.{name}", f"is {show(value)}, but without do_sample it has no effect")

    def _check_num_sequences(self, num_prompts: int, num_sequences: int) -> None:
        total = num_prompts * num_sequences
        if total > self._limits.max_sequences:
            raise RequestError(
                Reason.REQUEST_TOO_LARGE,
                f"prompts times num_return_sequences (or num_beams) is {total}, "
                f"the limit is {self._limits.max_sequences} sequences",
                metadata={"max": str(self._limits.max_sequences), "got": str(total)},
            )


def _check_exclusions(violations: Violations, own: GenerationParams) -> None:
    if own.max_new_tokens is not None and own.max_length is not None:
        violations.add("params.max_length", "excludes max_new_tokens")
    if own.min_new_tokens is not None and own.min_length is not None:
        violations.add("params.min_length", "excludes min_new_tokens")
    if own.ignore_eos and own.eos_token_id is not None:
        violations.add("params.ignore_eos", "excludes eos_token_id")
