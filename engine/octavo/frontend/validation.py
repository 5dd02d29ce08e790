"""The rules that a request's fields obey on their own, as tables: one line per field.

Ranges are checked in the positive form, so that NaN and infinities fail them. Rules that need several fields, the
prompt's length or the engine are in `input_processor.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, Final

import numpy as np

from octavo.config import Limits
from octavo.errors import FieldViolation, Reason, RequestError

NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9._:\-]{0,128}\Z")
"""Of request ids and cache salts."""


class Violations:
    """Collects what is wrong with a request, to tell all of it at once."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, field: str, description: str) -> None:
        self._found.append(FieldViolation(field, description))

    def raise_if_any(self) -> None:
        """Raises RequestError (INVALID_FIELD)."""
        if not self._found:
            return
        first = self._found[0]
        more = f" (and {len(self._found) - 1} more)" if len(self._found) > 1 else ""
        raise RequestError(Reason.INVALID_FIELD, f"{first.field}: {first.description}{more}", violations=self._found)


@dataclass(frozen=True, slots=True)
class Range:
    """Of a number. `integer` also rejects floats; a bool is no number."""

    low: float
    high: float = inf
    low_open: bool = False
    high_open: bool = False
    integer: bool = False

    def problem(self, value: Any) -> str | None:
        """None if the value is in the range, else the rule and the value."""
        if self._accepts(value):
            return None
        return f"must be {self}, not {show(value)}"

    def _accepts(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.integer else (int, float)):
            return False
        if isinstance(value, float) and not isfinite(value):
            return False
        if not (value > self.low if self.low_open else value >= self.low):
            return False
        return value < self.high if self.high_open else value <= self.high

    def __str__(self) -> str:
        noun = "an integer" if self.integer else "a finite number"
        if self.low == -inf:
            return noun
        above = f"above {self.low:g}" if self.low_open else f"at least {self.low:g}"
        if self.high == inf:
            return f"{noun} {above}"
        high = f"{self.high:.0f}" if self.integer else f"{self.high:g}"
        return f"{noun} {above} and {'below' if self.high_open else 'at most'} {high}"


def param_ranges(limits: Limits, vocab_size: int) -> dict[str, Range]:
    """Of the numbers in GenerationParams."""
    return {
        "max_new_tokens": Range(1, integer=True),
        "max_length": Range(1, integer=True),
        "min_new_tokens": Range(0, integer=True),
        "min_length": Range(0, integer=True),
        "max_time": Range(0, 86_400),
        "temperature": Range(0),
        "top_k": Range(0, integer=True),
        "top_p": Range(0, 1),
        "min_p": Range(0, 1),
        "typical_p": Range(0, 1, low_open=True),
        "top_h": Range(0, 1, low_open=True),
        "epsilon_cutoff": Range(0, 1, high_open=True),
        "eta_cutoff": Range(0, 1, high_open=True),
        "seed": Range(0, 2**64 - 1, integer=True),
        "num_return_sequences": Range(1, limits.max_num_return_sequences, integer=True),
        "num_beams": Range(1, limits.max_num_beams, integer=True),
        "length_penalty": FINITE,
        "guidance_scale": FINITE,
        "repetition_penalty": Range(0, low_open=True),
        "encoder_repetition_penalty": Range(0, low_open=True),
        "no_repeat_ngram_size": Range(0, integer=True),
        "encoder_no_repeat_ngram_size": Range(0, integer=True),
        "forced_bos_token_id": Range(0, vocab_size - 1, integer=True),
        "frequency_penalty": Range(-2, 2),
        "presence_penalty": Range(-2, 2),
        "bos_token_id": Range(0, vocab_size - 1, integer=True),
        "prompt_lookup_num_tokens": Range(0, 32, integer=True),
        "max_matching_ngram_size": Range(1, 16, integer=True),
    }


def output_ranges(limits: Limits, vocab_size: int) -> dict[str, Range]:
    """Of the numbers in OutputOptions."""
    return {
        "logprobs": Range(0, min(limits.max_logprobs, vocab_size), integer=True),
        "prompt_logprobs": Range(0, min(limits.max_logprobs, vocab_size), integer=True),
        "stream_min_tokens": Range(1, 256, integer=True),
        "stream_max_delay": Range(0, 10),
    }


LOGIT_BIAS: Final = Range(-100, 100)
FINITE: Final = Range(-inf)
FACTOR: Final = Range(0, low_open=True)
PRIORITY: Final = Range(-100, 100, integer=True)
SAMPLING_NEUTRAL: Final[dict[str, Any]] = {
    "temperature": 1,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "typical_p": 1,
    "top_h": None,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
}
"""Fields that act only when sampling, and the values at which they do nothing (None: there is none)."""


def check_ranges(violations: Violations, path: str, struct: Any, ranges: dict[str, Range]) -> set[str]:
    """Checks the numbers of `struct` that are set. Returns the names of those that are wrong."""
    wrong = set()
    for name, allowed in ranges.items():
        value = getattr(struct, name)
        if value is not None and (problem := allowed.problem(value)) is not None:
            violations.add(f"{path}.{name}", problem)
            wrong.add(name)
    return wrong


def check_token_ids(
    violations: Violations, path: str, token_ids: Sequence[int], vocab_size: int, limit: int | None = None
) -> bool:
    """Count and range of ids. At most one violation per list; the count is looked at first."""
    if limit is not None and len(token_ids) > limit:
        violations.add(path, f"has {len(token_ids)} ids, the limit is {limit}")
        return False
    bad = first_bad_id(token_ids, vocab_size)
    if bad is not None:
        violations.add(
            f"{path}[{bad}]", f"must be a token id below vocab_size {vocab_size}, not {show(token_ids[bad])}"
        )
        return False
    return True


def first_bad_id(token_ids: Sequence[int], vocab_size: int) -> int | None:
    """Position of the first entry that is no id of the vocabulary."""
    if not token_ids:
        return None
    try:
        ids = np.asarray(token_ids)
    except (ValueError, TypeError, OverflowError):
        ids = np.empty(0)
    if ids.dtype.kind in "iu" and ids.ndim == 1 and ids.min() >= 0 and ids.max() < vocab_size:
        return None
    allowed = Range(0, vocab_size - 1, integer=True)
    for i, token_id in enumerate(token_ids):
        if allowed.problem(token_id) is not None:
            return i
    return None


def check_strings(violations: Violations, path: str, strings: Iterable[str], max_count: int, max_bytes: int) -> None:
    """Count, then each one's length in UTF-8."""
    strings = list(strings)
    if len(strings) > max_count:
        violations.add(path, f"has {len(strings)} strings, the limit is {max_count}")
        return
    for i, string in enumerate(strings):
        size = utf8_length(string, max_bytes)
        if size is None:
            violations.add(f"{path}[{i}]", "is not valid Unicode")
        elif size == 0:
            violations.add(f"{path}[{i}]", "must not be empty")
        elif size > max_bytes:
            violations.add(f"{path}[{i}]", f"has {size} bytes, the limit is {max_bytes}")


def utf8_length(text: str, limit: int) -> int | None:
    """Bytes of `text` (its characters, if these alone pass the limit); None if it holds a lone surrogate."""
    if len(text) > limit:
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None


def show(value: Any) -> str:
    """A parameter's value in an error text, cut short."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
