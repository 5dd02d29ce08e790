"""Each field of GenerationParams on its own, whether a request or generation_config.json sets it.

Rules that look at several fields stand at the end; those that need the prompt's length are in `lengths.py`.
"""

from __future__ import annotations

from typing import Any

from octavo.config import Limits
from octavo.frontend.validation import (
    FACTOR,
    FINITE,
    LOGIT_BIAS,
    Range,
    Violations,
    check_ranges,
    check_strings,
    check_token_ids,
    param_ranges,
    show,
)
from octavo.frontend.watermarks import check_watermark
from octavo.types import EarlyStopping, ExponentialDecay, GenerationParams, SequenceBias, StopStringOutput

_BOOLS = (
    "do_sample",
    "ignore_eos",
    "stop_strings_ignore_prompt",
    "remove_invalid_values",
    "renormalize_logits",
    "token_healing",
)


class ParamChecker:
    """Rules of one model under one set of limits."""

    def __init__(self, limits: Limits, vocab_size: int, n_positions: int) -> None:
        self._limits = limits
        self._vocab_size = vocab_size
        self._ranges = param_ranges(limits, vocab_size)
        self._decay_start = Range(0, n_positions, integer=True)

    def check(self, violations: Violations, params: GenerationParams) -> set[str]:
        """Returns the names of the numbers and booleans that are wrong."""
        wrong = check_ranges(violations, "params", params, self._ranges)
        wrong |= check_bools(violations, "params", params, _BOOLS)
        self._check_ends(violations, params)
        self._check_lists(violations, params)
        self._check_sequences(violations, params)
        self._check_decay(violations, params.exponential_decay_length_penalty)
        if not isinstance(params.early_stopping, EarlyStopping | None):
            violations.add("params.early_stopping", f"has no value {show(params.early_stopping)}")
        if params.watermarking_config is not None:
            check_watermark(violations, "params.watermarking_config", params.watermarking_config)
        return wrong

    def _check_ends(self, violations: Violations, params: GenerationParams) -> None:
        limits = self._limits
        if params.eos_token_id is not None:
            if not params.eos_token_id:
                violations.add(
                    "params.eos_token_id", "must not be empty; use ignore_eos to go on after end-of-sequence"
                )
            self._check_ids(violations, "eos_token_id", params.eos_token_id, limits.max_stop_token_ids)
        self._check_ids(violations, "stop_token_ids", params.stop_token_ids, limits.max_stop_token_ids)
        self._check_ids(violations, "forced_eos_token_id", params.forced_eos_token_id or [], limits.max_stop_token_ids)
        check_strings(
            violations,
            "params.stop_strings",
            params.stop_strings,
            limits.max_stop_strings,
            limits.max_stop_string_bytes,
        )
        if not isinstance(params.stop_string_output, StopStringOutput | None):
            violations.add("params.stop_string_output", f"has no value {show(params.stop_string_output)}")

    def _check_lists(self, violations: Violations, params: GenerationParams) -> None:
        limit = self._limits.max_token_list
        self._check_ids(violations, "suppress_tokens", params.suppress_tokens or [], limit)
        self._check_ids(violations, "begin_suppress_tokens", params.begin_suppress_tokens or [], limit)
        if params.allowed_token_ids is not None:
            if not params.allowed_token_ids:
                violations.add("params.allowed_token_ids", "must not be empty; leave it unset to allow every token")
            self._check_ids(violations, "allowed_token_ids", params.allowed_token_ids, limit)
        self._check_logit_bias(violations, params.logit_bias)

    def _check_logit_bias(self, violations: Violations, biases: dict[int, float]) -> None:
        if not biases or not self._check_ids(violations, "logit_bias", list(biases), self._limits.max_token_list):
            return
        for token_id, bias in biases.items():
            if (problem := LOGIT_BIAS.problem(bias)) is not None:
                violations.add(f"params.logit_bias[{token_id}]", problem)
                return

    def _check_sequences(self, violations: Violations, params: GenerationParams) -> None:
        limits = self._limits
        check_strings(
            violations,
            "params.bad_words",
            params.bad_words,
            limits.max_token_sequences // 2,
            limits.max_stop_string_bytes,
        )
        words = len(params.bad_words_ids)
        together = words + 2 * len(params.bad_words)
        if words > limits.max_token_sequences:
            violations.add("params.bad_words_ids", f"has {words} entries, the limit is {limits.max_token_sequences}")
        elif together > limits.max_token_sequences and len(params.bad_words) <= limits.max_token_sequences // 2:
            violations.add(
                "params.bad_words",
                f"makes {together} sequences, two of each word and those of bad_words_ids, "
                f"the limit is {limits.max_token_sequences}",
            )
        else:
            self._check_each_sequence(violations, "params.bad_words_ids", "", params.bad_words_ids)
        self._check_sequence_bias(violations, params.sequence_bias)

    def _check_sequence_bias(self, violations: Violations, biases: list[SequenceBias]) -> None:
        path, limits = "params.sequence_bias", self._limits
        if len(biases) > limits.max_token_list:
            violations.add(path, f"has {len(biases)} entries, the limit is {limits.max_token_list}")
            return
        long = sum(len(entry.token_ids) > 1 for entry in biases)
        if long > limits.max_token_sequences:
            violations.add(path, f"has {long} entries longer than one token, the limit is {limits.max_token_sequences}")
            return
        self._check_each_sequence(violations, path, ".token_ids", [entry.token_ids for entry in biases])
        for i, entry in enumerate(biases):
            if (problem := FINITE.problem(entry.bias)) is not None:
                violations.add(f"{path}[{i}].bias", problem)
                return

    def _check_each_sequence(self, violations: Violations, path: str, suffix: str, sequences: list[list[int]]) -> None:
        """Up to the first that is wrong."""
        for i, token_ids in enumerate(sequences):
            name = f"{path}[{i}]{suffix}"
            if not token_ids:
                violations.add(name, "must not be empty")
                return
            if not check_token_ids(
                violations, name, token_ids, self._vocab_size, self._limits.max_token_sequence_length
            ):
                return

    def _check_decay(self, violations: Violations, decay: ExponentialDecay | None) -> None:
        if decay is None:
            return
        path = "params.exponential_decay_length_penalty"
        if (problem := self._decay_start.problem(decay.start_index)) is not None:
            violations.add(f"{path}.start_index", problem)
        if (problem := FACTOR.problem(decay.factor)) is not None:
            violations.add(f"{path}.factor", problem)

    def _check_ids(self, violations: Violations, name: str, token_ids: list[int], limit: int) -> bool:
        return check_token_ids(violations, f"params.{name}", token_ids, self._vocab_size, limit)


def end_token_ids(params: GenerationParams) -> list[int]:
    """What ends a sequence, of resolved parameters: stop ids act like end-of-sequence."""
    return [*([] if params.ignore_eos else params.eos_token_id or []), *params.stop_token_ids]


def check_token_rules(violations: Violations, own: GenerationParams, resolved: GenerationParams) -> None:
    """What transformers refuses, or drops silently, of tokens that several fields name. `own`: as it was set."""
    ends = set(end_token_ids(resolved))
    for i, word in enumerate(own.bad_words_ids):
        if len(word) == 1 and word[0] in ends:
            violations.add(f"params.bad_words_ids[{i}]", END_AS_BAD_WORD)
    if own.exponential_decay_length_penalty is not None and not ends:
        violations.add("params.exponential_decay_length_penalty", "needs an end-of-sequence token, and there is none")
    suppressed = set(resolved.suppress_tokens or ())
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        value = getattr(resolved, name)
        forced = {value} if isinstance(value, int) else set(value or ())
        if forced and forced <= suppressed:
            violations.add(f"params.{name}", "forces only tokens that are in suppress_tokens")
    allowed = set(resolved.allowed_token_ids or ())
    if allowed and allowed <= suppressed and not resolved.forced_eos_token_id:
        violations.add("params.allowed_token_ids", "allows only tokens that are in suppress_tokens")


END_AS_BAD_WORD = "is an end-of-sequence token; use min_new_tokens or suppress_tokens to ban it"


def check_bools(violations: Violations, path: str, struct: Any, names: tuple[str, ...]) -> set[str]:
    wrong = {name for name in names if not isinstance(getattr(struct, name), bool | None)}
    for name in names:
        if name in wrong:
            violations.add(f"{path}.{name}", f"must be true or false, not {show(getattr(struct, name))}")
    return wrong
