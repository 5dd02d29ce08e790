"""Writing keys and values against the specification."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from octavo_kernels import reference
from octavo_kernels.checks import FP8
from octavo_kernels.kv_write import kv_write
from torch import Tensor

NUM_BLOCKS = 5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tokens(num_tokens: int, num_heads: int, head_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(num_tokens, 3 * num_heads * head_size).to(device, dtype)


def poisoned_cache(num_heads: int, block_size: int, head_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((2, NUM_BLOCKS, num_heads, block_size, head_size), torch.nan, device=device).to(dtype)


def assert_same_bits(cache: Tensor, expected: Tensor) -> None:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.itemsize]
    assert torch.equal(cache.view(whole), expected.view(whole))


@pytest.mark.parametrize(
    ("num_heads", "block_size", "head_size", "dtype", "cache_dtype"),
    [
        (1, 16, 64, torch.float32, torch.float32),
        (4, 32, 64, torch.float16, torch.float16),
        (20, 64, 64, torch.bfloat16, torch.bfloat16),
        (25, 16, 64, torch.bfloat16, torch.bfloat16),
        (4, 32, 32, torch.float32, torch.float32),
        (3, 64, 80, torch.float16, torch.float16),
        (2, 16, 96, torch.float32, torch.float32),
        (4, 16, 128, torch.bfloat16, torch.bfloat16),
        (4, 16, 64, torch.float32, torch.float16),
        (4, 16, 64, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_cache_after_a_write_is_the_references(
    num_heads: int,
    block_size: int,
    head_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
) -> None:
    qkv = tokens(6, num_heads, head_size, dtype, device)
    last = NUM_BLOCKS * block_size - 1
    slots = torch.tensor([last, 0, block_size - 1, block_size, 2 * block_size + 3, 1], device=device)
    cache = poisoned_cache(num_heads, block_size, head_size, cache_dtype, device)
    expected = cache.clone()
    kv_write(qkv, cache, slots)
    reference.kv_write(qkv, expected, slots)
    assert_same_bits(cache, expected)


def test_tokens_without_a_slot_are_skipped(device: torch.device) -> None:
    qkv = tokens(6, 2, 64, torch.float32, device)
    around = torch.full((2, 3 * NUM_BLOCKS, 2, 16, 64), torch.nan, device=device)
    cache = around[:, NUM_BLOCKS : 2 * NUM_BLOCKS]  # what lies past the ends is seen too
    too_large = NUM_BLOCKS * 16
    slots = torch.tensor([-1, too_large, 17, -(2**62), 2**62, too_large + 1], device=device)
    kv_write(qkv, cache, slots)
    written = ~around.isnan()
    assert written.sum() == 2 * 2 * 64
    assert torch.equal(cache[0, 1, :, 1], qkv[2, 128:256].view(2, 64))
    assert torch.equal(cache[1, 1, :, 1], qkv[2, 256:].view(2, 64))


def test_every_fp8_number_and_every_tie_between_two_is_rounded_to_even(device: torch.device) -> None:
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    x = torch.cat([numbers, ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity)])
    beyond = torch.tensor([449.0, 464.0, 465.0, 1e9, torch.inf, torch.nan, 1e-10])
    x = torch.nn.functional.pad(torch.cat([x, beyond]), (0, 1024 - len(x) - len(beyond)))
    qkv = torch.cat([torch.full((1, 1024), torch.nan), x[None], -x[None]], 1).to(device)
    cache = torch.zeros(2, 1, 16, 16, 64, device=device).to(FP8)
    kv_write(qkv, cache, torch.tensor([3], device=device))
    assert_same_bits(cache[:, 0, :, 3].reshape(2, -1), torch.stack([x, -x]).clamp(-448, 448).to(FP8).to(device))


@pytest.mark.parametrize(
    ("dtype", "block_size"), [(torch.float32, 16), (torch.float16, 32), (torch.bfloat16, 64)], ids=str
)
def test_an_fp8_cache_holds_value_over_scale(dtype: torch.dtype, block_size: int, device: torch.device) -> None:
    qkv = tokens(3, 4, 64, dtype, device)
    cache = torch.zeros(2, NUM_BLOCKS, 4, block_size, 64, device=device).to(FP8)
    kv_write(qkv, cache, torch.tensor([2, -1, block_size + 5], device=device), k_scale=0.5, v_scale=0.0625)
    parts = qkv.view(3, 3, 4, 64).float()
    for token, block, slot in ((0, 0, 2), (2, 1, 5)):
        assert_same_bits(cache[0, block, :, slot], (parts[token, 1] / 0.5).to(FP8))
        assert_same_bits(cache[1, block, :, slot], (parts[token, 2] / 0.0625).to(FP8))
    assert cache.float().ne(0).any(-1).sum() == 2 * 2 * 4


def test_offsets_beyond_31_bits_reach_their_block(device: torch.device) -> None:
    """Blocks 2**30 numbers apart, so that the fourth begins beyond what 32 bits count: memory that is reserved but,
    except where written, never touched."""
    stride_block = 2**30
    stride_half = 2**31 + 4096
    num_bytes = 3 * stride_block + stride_half + 4096
    if device.type == "cuda":
        memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        memory = torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=torch.uint8)
    cache = memory.view(FP8).as_strided((2, 4, 1, 16, 64), (stride_half, stride_block, 1024, 64, 1))
    qkv = tokens(1, 1, 64, torch.float32, device)
    kv_write(qkv, cache, torch.tensor([3 * 16 + 9], device=device))
    for half in (0, 1):
        at = half * stride_half + 3 * stride_block + 9 * 64
        assert_same_bits(memory[at : at + 64].view(FP8), qkv[0, (1 + half) * 64 :][:64].to(FP8))


def test_strided_tokens_and_no_tokens(device: torch.device) -> None:
    qkv = tokens(4, 2, 64, torch.float32, device)
    cache, expected = (torch.zeros(2, NUM_BLOCKS, 2, 16, 64, device=device) for _ in range(2))
    slots = torch.tensor([4, 40], device=device)
    kv_write(qkv[::2], cache, slots)
    reference.kv_write(qkv[::2].contiguous(), expected, slots)
    assert torch.equal(cache, expected)
    kv_write(qkv[:0], cache, slots[:0])
    assert torch.equal(cache, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qkv", torch.zeros(2, 383)),
        ("qkv", torch.zeros(384, 2).t()),
        ("qkv", torch.zeros(2, 384, dtype=torch.int32)),
        ("layer_cache", torch.zeros(2, 3, 2, 24, 64)),
        ("layer_cache", torch.zeros(3, 3, 2, 16, 64)),
        ("layer_cache", torch.zeros(2, 3, 16, 2, 64).transpose(2, 3)),
        ("layer_cache", torch.zeros(2, 3, 2, 16, 64, dtype=torch.float64)),
        ("layer_cache", torch.zeros(2, 3, 2, 16, 64, device="meta")),
        ("slot_mapping", torch.zeros(2, dtype=torch.int32)),
        ("slot_mapping", torch.zeros(3, dtype=torch.int64)),
        ("slot_mapping", torch.zeros(4, dtype=torch.int64)[::2]),
        ("k_scale", 2.0),
        ("v_scale", 0.0),
        ("v_scale", float("nan")),
    ],
)
def test_a_bad_argument_is_named(name: str, value: object) -> None:
    arguments: dict[str, Any] = {"qkv": torch.zeros(2, 384), "layer_cache": torch.zeros(2, 3, 2, 16, 64)}
    arguments |= {"slot_mapping": torch.zeros(2, dtype=torch.int64), name: value}
    with pytest.raises(ValueError, match=f"^{name}: "):
        kv_write(**arguments)
