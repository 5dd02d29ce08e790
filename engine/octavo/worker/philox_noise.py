"""Random numbers of CUDA's generator on the host: what the fused sampler draws from, for rows that the host chooses.

The numbers of `octavo_kernels.philox`, with which a row draws the same token wherever it is chosen. They are those of
the kernels in the interpreter; a GPU takes the logarithm with an intrinsic (`__logf`) that differs in the last bits.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.step import Float32s

UInt64s = npt.NDArray[np.uint64]

NUM_ROUNDS: Final = 10
MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)
LOW_WORD: Final = np.uint64(0xFFFFFFFF)
WORD_BITS: Final = np.uint64(32)
WORDS_PER_CALL: Final = 4
TWO_POW_MINUS_32: Final = np.float32(2.0**-32)
SMALLEST: Final = np.float32(2.0**-24)


class PhiloxNoise:
    """As `noise.Noise`. Holds a seed per group: a number is a function of that, step, row and token."""

    def __init__(self, vocab_size: int, num_threads: int) -> None:
        """`num_threads`: what the card runs at once, see `octavo_kernels.philox.random_words`."""
        self._vocab_size = vocab_size
        self._num_threads = num_threads
        self._seeds: dict[int, tuple[int, int]] = {}
        """Seed and number of rows."""

    def open(self, group_id: int, seed: int, num_rows: int) -> None:
        self._seeds[group_id] = seed, num_rows

    def close(self, group_id: int) -> None:
        self._seeds.pop(group_id, None)

    def row_ended(self, group_id: int, row: int) -> None:
        """Nothing is kept for a row."""

    def exponentials(self, group_id: int, row: int, step: int, token_ids: Tensor | None = None) -> Tensor:
        seed, num_rows = self._seeds[group_id]
        tokens = np.arange(self._vocab_size) if token_ids is None else token_ids.numpy()
        elements = tokens.astype(np.uint64) + np.uint64(row * self._vocab_size)
        words = random_words(seed, step, elements, num_rows * self._vocab_size, self._num_threads)
        return torch.from_numpy(exponentials(words))


def random_words(seed: int, step: int, elements: UInt64s, num_elements: int, num_threads: int) -> UInt64s:
    """The 32-bit words behind elements of fill number `step` of a tensor of `num_elements` numbers."""
    if num_elements <= num_threads:
        return _philox(np.array([step], np.uint64), elements, seed)[0]
    turns, threads = np.divmod(elements, np.uint64(num_threads))
    calls = (num_elements - 1) // (num_threads * WORDS_PER_CALL) + 1
    call, place = np.divmod(turns, np.uint64(WORDS_PER_CALL))
    words = _philox((np.uint64(step * calls) + call) & LOW_WORD, threads, seed)
    picked: UInt64s = np.choose(place.astype(np.int64), words)
    return picked


def exponentials(words: UInt64s) -> Float32s:
    """Exp(1) numbers, never 0."""
    uniform = words.astype(np.float32) * TWO_POW_MINUS_32 + TWO_POW_MINUS_32 / np.float32(2)  # in (0, 1]
    numbers: Float32s = np.where(uniform >= np.float32(1) - SMALLEST, SMALLEST, -np.log(uniform))
    return numbers


def _philox(counter: UInt64s, thread: UInt64s, seed: int) -> tuple[UInt64s, UInt64s, UInt64s, UInt64s]:
    """Philox4x32-10 of the counters (counter, 0, thread, 0); Salmon et al. 2011."""
    key_a, key_b = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    first, third = counter, thread
    second = fourth = np.zeros(1, np.uint64)
    for _ in range(NUM_ROUNDS):
        product_a, product_b = MULTIPLIERS[0] * first, MULTIPLIERS[1] * third
        first, second = (product_b >> WORD_BITS) ^ second ^ np.uint64(key_a), product_b & LOW_WORD
        third, fourth = (product_a >> WORD_BITS) ^ fourth ^ np.uint64(key_b), product_a & LOW_WORD
        key_a, key_b = (key_a + KEY_STEPS[0]) & 0xFFFFFFFF, (key_b + KEY_STEPS[1]) & 0xFFFFFFFF
    return first, second, third, fourth
