"""Random numbers of CUDA on the host equal the reference, for fills of one launch and of several."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from octavo.worker.philox_noise import PhiloxNoise
from reference.philox import cuda_offset_step, cuda_words, exponential, race_noise, uniform


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "num_sms"),
    [(1, 97, 132), (5, 97, 132), (3, 5000, 1), (2, 9000, 1)],
    ids=["one row", "one launch", "several turns", "several calls"],
)
def test_numbers_equal_the_layout_of_a_cuda_fill(num_rows: int, vocab_size: int, num_sms: int):
    noise, seed, step = PhiloxNoise(vocab_size, num_sms * 2048), 2**63 + 12345, 3
    noise.open(7, seed, num_rows)
    size = num_rows * vocab_size
    offset = step * cuda_offset_step(size, num_sms)
    expected = exponential(uniform(cuda_words(seed, size, offset, num_sms))).reshape(num_rows, vocab_size)
    for row in range(num_rows):
        assert np.array_equal(noise.exponentials(7, row, step).numpy(), expected[row])
        some = torch.tensor([5, 96, 0])
        assert np.array_equal(noise.exponentials(7, row, step, some).numpy(), expected[row, some.numpy()])


def test_a_fill_of_one_launch_has_the_closed_form():
    noise = PhiloxNoise(50257, 132 * 2048)
    noise.open(0, 42, 4)
    assert np.array_equal(noise.exponentials(0, 3, 9).numpy(), race_noise(42, 9, 3, 50257))
