"""The noise of the race against the reference: words bit for bit, numbers too where the logarithm is NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from octavo_kernels.philox import exponentials, random_words
from reference.philox import cuda_words, exponential, race_noise, uniform

NUM_THREADS = 2048


@triton.jit
def _noise(
    words_ptr, numbers_ptr, seed, step, first, num_elements, num_threads, NATIVE: tl.constexpr, TILE: tl.constexpr
):
    index = tl.arange(0, TILE)
    words = random_words(seed.to(tl.uint64), step, first + index, num_elements, num_threads)
    tl.store(words_ptr + index, words.to(tl.int32, bitcast=True))
    tl.store(numbers_ptr + index, exponentials(words, NATIVE))


def noise(
    device: torch.device, seed: int, step: int, first: int, num_elements: int, num_threads: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    words = torch.zeros(count, dtype=torch.int32, device=device)
    numbers = torch.zeros(count, device=device)
    signed = seed - 2**64 if seed >= 2**63 else seed
    native = device.type == "cuda"
    _noise[(1,)](words, numbers, signed, step, first, num_elements, num_threads, NATIVE=native, TILE=count)
    return words.cpu().numpy().view(np.uint32), numbers.cpu().numpy()


@pytest.mark.parametrize("seed", [1, 42, 2**32 + 5, 2**63 + 11, 2**64 - 5])
@pytest.mark.parametrize("step", [0, 7, 1000])
def test_narrow_fills_have_the_closed_form(device: torch.device, seed: int, step: int):
    vocab_size, row = 512, 2
    words, numbers = noise(device, seed, step, row * vocab_size, 3 * vocab_size, NUM_THREADS, vocab_size)
    assert np.array_equal(words, cuda_words(seed, 3 * vocab_size, 4 * step)[row * vocab_size :])
    expected = race_noise(seed, step, row, vocab_size)
    if device.type == "cpu":
        assert np.array_equal(numbers, expected)
    else:
        assert np.abs(numbers - expected).max() < 2.0**-20


@pytest.mark.parametrize("num_elements", [NUM_THREADS, NUM_THREADS + 1, 4 * NUM_THREADS, 4 * NUM_THREADS + 1, 20000])
@pytest.mark.parametrize("step", [0, 3])
def test_wide_fills_take_the_words_that_their_threads_would(device: torch.device, num_elements: int, step: int):
    """One multiprocessor of 2048 threads: beyond them a thread serves several elements, with several calls."""
    calls = -(-num_elements // (4 * NUM_THREADS))
    expected = cuda_words(9, num_elements, 4 * calls * step, num_sms=1)
    for first in range(0, num_elements - 1024, 1024 * 7):
        words, numbers = noise(device, 9, step, first, num_elements, NUM_THREADS, 1024)
        assert np.array_equal(words, expected[first : first + 1024])
        if device.type == "cpu":
            assert np.array_equal(numbers, exponential(uniform(words)))


def test_numbers_are_never_zero(device: torch.device):
    _, numbers = noise(device, 3, 0, 0, 1 << 16, 1 << 16, 1 << 16)
    assert numbers.min() >= 2.0**-24 and numbers.max() < 22.9
