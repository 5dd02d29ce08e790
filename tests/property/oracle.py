"""What the fake model answers, computed from the prompt alone: the oracle of the property tests.

The fake model keeps one 64-bit tag per position instead of keys and values. A tag depends on its token, its position
and all tags before it, so whatever goes wrong in the cache changes every later token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from octavo.types import FinishReason

VOCAB_SIZE = 97
MASK = (1 << 64) - 1
MAX_POSITIONS = 2048
WEIGHTS: npt.NDArray[np.uint64] = np.arange(MAX_POSITIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
"""Odd weight per position: tags in the wrong order give another sum."""


def mix(value: int) -> int:
    """splitmix64's finalizer."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def make_tag(domain: int, token_id: int, position: int, weighted_sum: int) -> int:
    """Tag of a position, given the weighted sum of all tags before it."""
    return mix(domain ^ mix(token_id * 0x1F123BB5 + position) ^ mix(weighted_sum))


def next_token(tag: int, seed: int, row: int) -> int:
    """The token that follows a position with this tag, in sequence `row` of the prompt with this seed."""
    return mix(tag ^ mix(seed * 1021 + row)) % VOCAB_SIZE


class TagChain:
    """The tags of a token sequence, one after the other, without any cache."""

    def __init__(self, domain: int) -> None:
        self.domain = domain
        self.tags: list[int] = []
        self._sum = 0

    def append(self, token_id: int) -> int:
        position = len(self.tags)
        tag = make_tag(self.domain, token_id, position, self._sum)
        self._sum = (self._sum + tag * (2 * position + 1)) & MASK
        self.tags.append(tag)
        return tag


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    finish: FinishReason


def finish_of(token_id: int, total: int, max_total: int, eos: tuple[int, ...], stop: tuple[int, ...]) -> FinishReason:
    """Whether a sequence of `total` tokens ends with its last one; the smallest reason wins."""
    if token_id in eos:
        return FinishReason.EOS
    if token_id in stop:
        return FinishReason.STOP_TOKEN
    return FinishReason.LENGTH if total >= max_total else FinishReason.NONE


def answer(
    prompt: list[int],
    *,
    domain: int,
    seed: int,
    row: int,
    max_total_tokens: int,
    eos: tuple[int, ...] = (),
    stop: tuple[int, ...] = (),
) -> Answer:
    """All tokens that sequence `row` of the prompt must get, whatever else happens around it."""
    chain = TagChain(domain)
    for token_id in prompt:
        chain.append(token_id)
    output: list[int] = []
    while True:
        token_id = next_token(chain.tags[-1], seed, row)
        output.append(token_id)
        finish = finish_of(token_id, len(prompt) + len(output), max_total_tokens, eos, stop)
        if finish:
            return Answer(output, finish)
        chain.append(token_id)
