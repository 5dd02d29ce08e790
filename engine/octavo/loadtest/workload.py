"""What the requests are: a function of the seed and of a request's index, so that every process can make its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

FIXED = "fixed"
SHAREGPT_LIKE = "sharegpt-like"
SHAREGPT_MEANS = (161, 338)
"""Mean tokens of ShareGPT's prompts and answers (Kwon et al., SOSP 2023)."""
SIGMAS = (1.2, 0.8)
"""Our choice of the spread of their logarithms: answers vary less than prompts."""
_LENGTHS, _PREFIX, _PROMPT = 2, 3, 4
"""Tell the uses of the seed apart."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a dataset file. What is missing comes from the workload."""

    prompt: str | None = None
    input_len: int | None = None
    output_len: int | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """The same for every point of load, except that random prompts differ: no prefix cache finds the last point's."""

    dataset: str
    """FIXED, SHAREGPT_LIKE or the name of the file that `entries` are from."""
    input_len: int
    """Tokens of a prompt, without the shared prefix; the mean where lengths are drawn."""
    output_len: int
    context: int
    """Positions of the model."""
    vocab_size: int
    """0: not known."""
    seed: int = 0
    prefix_len: int = 0
    """Tokens that all prompts begin with, in addition to input_len."""
    sigmas: tuple[float, float] = SIGMAS
    """Standard deviation of the logarithm of drawn input and output lengths."""
    entries: tuple[Entry, ...] = ()
    """Used in order, and again from the beginning."""

    def check(self) -> None:
        """Raises ValueError for lengths that the model cannot have."""
        room = self.context - self.prefix_len
        if room < 2:
            raise ValueError(f"--prefix-len: leaves no room in a context of {self.context}, got {self.prefix_len}")
        if self.prefix_len and any(entry.prompt is not None for entry in self.entries):
            raise ValueError("--prefix-len: random tokens cannot be put before the texts of a dataset")
        if not self.vocab_size and not (self.entries and all(entry.prompt is not None for entry in self.entries)):
            raise ValueError("--dataset: the server does not say its vocabulary's size, so prompts have to be texts")
        if self.dataset != SHAREGPT_LIKE:
            for entry in self.entries or (Entry(),):
                self._check_sum(entry, room)

    def _check_sum(self, entry: Entry, room: int) -> None:
        given = 1 if entry.prompt is not None else entry.input_len or self.input_len
        wanted = entry.output_len or self.output_len
        if given + wanted > room:
            of = f" less a prefix of {self.prefix_len}" if self.prefix_len else ""
            raise ValueError(
                f"lengths: {given} in and {wanted} out do not fit into the context of {self.context}{of}; "
                "see --input-len and --output-len"
            )

    def lengths(self, index: int) -> tuple[int, int]:
        """Input and output tokens of a request; the input's are without prefix, and 0 for a text."""
        if self.dataset == SHAREGPT_LIKE:
            return self._drawn(index)
        if not self.entries:
            return self.input_len, self.output_len
        entry = self.entries[index % len(self.entries)]
        given = 0 if entry.prompt is not None else entry.input_len or self.input_len
        return given, entry.output_len or self.output_len

    def _drawn(self, index: int) -> tuple[int, int]:
        """Log-normal with the given means, before the cut: a prompt gets at most three quarters of the context, the
        output at most what is then left."""
        room = self.context - self.prefix_len
        normal = np.random.default_rng([self.seed, _LENGTHS, index]).standard_normal(2)
        drawn = [
            math.exp(math.log(mean) - sigma**2 / 2 + sigma * value)
            for mean, sigma, value in zip((self.input_len, self.output_len), self.sigmas, normal, strict=True)
        ]
        given = min(max(1, round(drawn[0])), max(1, room * 3 // 4))
        return given, min(max(1, round(drawn[1])), room - given)

    def prompt(self, point: int, index: int) -> str | list[int]:
        """Text of a dataset, or the prefix and random token ids."""
        entry = self.entries[index % len(self.entries)] if self.entries else Entry()
        if entry.prompt is not None:
            return entry.prompt
        prefix = np.random.default_rng([self.seed, _PREFIX]).integers(self.vocab_size, size=self.prefix_len)
        own = np.random.default_rng([self.seed, _PROMPT, point, index])
        return [*prefix.tolist(), *own.integers(self.vocab_size, size=self.lengths(index)[0]).tolist()]


def read_entries(lines: Iterable[str], name: str) -> tuple[Entry, ...]:
    """The lines of a dataset: JSON objects with `prompt` (text) or `input_len`, and `output_len` (also, as vLLM's
    custom datasets have it, `output_tokens`). Raises ValueError that names the line."""
    entries = [_entry(line, f"{name}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not entries:
        raise ValueError(f"{name}: has no lines")
    return tuple(entries)


def _entry(line: str, where: str) -> Entry:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is no JSON: {error}") from None
    known = {"prompt", "input_len", "output_len", "output_tokens"}
    if not isinstance(fields, dict) or not fields or set(fields) - known:
        raise ValueError(f"{where}: has to be an object with some of {', '.join(sorted(known))}")
    prompt = fields.get("prompt")
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise ValueError(f"{where}: prompt has to be a text that is not empty")
    if prompt is not None and "input_len" in fields:
        raise ValueError(f"{where}: prompt and input_len exclude each other")
    for name in ("input_len", "output_len", "output_tokens"):
        value = fields.get(name, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"{where}: {name} has to be a whole number of at least 1, got {value!r}")
    return Entry(prompt, fields.get("input_len"), fields.get("output_len", fields.get("output_tokens")))
