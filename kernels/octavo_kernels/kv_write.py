"""Puts keys and values of tokens into their cache slots; one program per token and half (keys, values).

Log
  one program per (token, half), the E numbers in one tile, 4 warps: reads are whole rows; writes are D * itemsize
  bytes (128 at bf16 and D = 64) per head, one 32-byte sector aligned. Predicted bandwidth-bound from ~500 tokens.
  Decode rows do not come here: decode attention writes their keys and values itself.
  sm_90 (compiler), bf16, 20 heads of 64: 22 registers, 88 instructions, 2 loads and 2 stores of 16
  bytes (fp8: 32 registers, 352 instructions, 2 and 1), no spills on sm_80, sm_90, sm_100. Not measured.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.checks import (
    FLOATS,
    FP8,
    require_contiguous,
    require_dense_rows,
    require_device,
    require_floats,
    row_stride,
)
from octavo_kernels.dependent_launch import follow, launch_options
from octavo_kernels.fp8 import encode_e4m3
from octavo_kernels.variant import Variant

BLOCK_SIZES: Final = (16, 32, 64)


@triton.jit
def kv_write_kernel(
    qkv_ptr,  # [T, 3 * E] rows
    cache_ptr,  # [2, N, H, S, D], the last three dimensions contiguous
    slot_mapping_ptr,  # int64 [T]
    num_slots,  # N * S
    stride_qkv,
    stride_half,  # between keys and values
    stride_block,
    k_scale,
    v_scale,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # S
    TILE: tl.constexpr,  # power of 2, at least E
    SCALED: tl.constexpr,  # an fp8 cache, passed as bytes
    DEPENDENT_LAUNCH: tl.constexpr,
):
    if DEPENDENT_LAUNCH:
        follow()
    token = tl.program_id(0).to(tl.int64)
    half = tl.program_id(1)
    slot = tl.load(slot_mapping_ptr + token)
    if (slot < 0) | (slot >= num_slots):
        return
    WIDTH: tl.constexpr = HEADS * HEAD_SIZE
    cols = tl.arange(0, TILE)
    live = cols < WIDTH
    x = tl.load(qkv_ptr + token * stride_qkv + (1 + half) * WIDTH + cols, mask=live, other=0.0)
    if SCALED:
        x = encode_e4m3(x.to(tl.float32) / tl.where(half == 0, k_scale, v_scale))
    place = half.to(tl.int64) * stride_half + slot // BLOCK * stride_block + slot % BLOCK * HEAD_SIZE
    within = cols // HEAD_SIZE * (BLOCK * HEAD_SIZE) + cols % HEAD_SIZE
    tl.store(cache_ptr + place + within, x.to(cache_ptr.dtype.element_ty), mask=live)


def kv_write(
    qkv: Tensor,
    layer_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    dependent_launch: bool = False,
) -> None:
    """Puts the tokens' keys and values into their slots, converted to the cache's type.

    qkv: bf16, fp16 or fp32 [T, 3 * E], rows contiguous: queries, keys, values. layer_cache: [2, N, H, S, D] of a float
    type or fp8 e4m3, written in place; [H, S, D] contiguous, any strides before. S is 16, 32 or 64. slot_mapping: int64
    [T] contiguous, block * S + slot, no slot twice; a token whose slot is negative or not below N * S is skipped.
    An fp8 cache gets key / k_scale and value / v_scale, limited to +-448; other types take no scale.
    dependent_launch: see `octavo_kernels.dependent_launch`. Raises ValueError naming the argument.
    """
    _check(qkv, layer_cache, slot_mapping, k_scale, v_scale)
    num_tokens = qkv.shape[0]
    if num_tokens == 0:
        return
    _, num_blocks, num_heads, block_size, head_size = layer_cache.shape
    scaled = layer_cache.dtype == FP8
    kv_write_kernel[(num_tokens, 2)](
        qkv,
        layer_cache.view(torch.uint8) if scaled else layer_cache,
        slot_mapping,
        num_blocks * block_size,
        row_stride(qkv),
        layer_cache.stride(0),
        layer_cache.stride(1),
        float(k_scale),
        float(v_scale),
        HEADS=num_heads,
        HEAD_SIZE=head_size,
        BLOCK=block_size,
        TILE=triton.next_power_of_2(num_heads * head_size),
        SCALED=scaled,
        num_warps=4,
        enable_fp_fusion=False,
        **launch_options(dependent_launch),
    )


def _check(qkv: Tensor, layer_cache: Tensor, slot_mapping: Tensor, k_scale: float, v_scale: float) -> None:
    require_floats("qkv", qkv)
    require_floats("layer_cache", layer_cache, (*FLOATS, FP8))
    if layer_cache.dim() != 5 or layer_cache.shape[0] != 2:
        raise ValueError(f"layer_cache: shape {tuple(layer_cache.shape)} is not [2, blocks, heads, slots, size]")
    _, _, num_heads, block_size, head_size = layer_cache.shape
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"layer_cache: block size {block_size} is not one of {BLOCK_SIZES}")
    if layer_cache.stride()[2:] != (block_size * head_size, head_size, 1):
        raise ValueError(f"layer_cache: strides {layer_cache.stride()}: heads, slots and numbers are not contiguous")
    if qkv.dim() != 2 or qkv.shape[1] != 3 * num_heads * head_size:
        raise ValueError(f"qkv: shape {tuple(qkv.shape)} is not [tokens, 3 * {num_heads} * {head_size}]")
    require_dense_rows("qkv", qkv)
    require_device("layer_cache", layer_cache, qkv)
    require_floats("slot_mapping", slot_mapping, (torch.int64,))
    require_device("slot_mapping", slot_mapping, qkv)
    if slot_mapping.shape != (qkv.shape[0],):
        raise ValueError(f"slot_mapping: shape {tuple(slot_mapping.shape)} is not ({qkv.shape[0]},)")
    require_contiguous("slot_mapping", slot_mapping)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not 0 < scale < float("inf"):
            raise ValueError(f"{name}: {scale} is not positive and finite")
        if scale != 1 and layer_cache.dtype != FP8:
            raise ValueError(f"{name}: {scale} for a cache of {layer_cache.dtype}; only fp8 is scaled")


def compile_variants() -> list[Variant]:
    """What the engine launches for gpt2-large (20 heads of 64) and gpt2-xl (25), by cache type and block size."""
    pointers = ("qkv_ptr", "cache_ptr", "slot_mapping_ptr")
    numbers = ("num_slots", "stride_qkv", "stride_half", "stride_block")
    constants = ("HEADS", "HEAD_SIZE", "BLOCK", "TILE", "SCALED", "DEPENDENT_LAUNCH")
    variants = []
    for kind, cache, heads, block in (
        ("bf16", "bf16", 20, 16),
        ("bf16", "bf16", 20, 32),
        ("bf16", "bf16", 20, 64),
        ("fp16", "fp16", 20, 32),
        ("fp32", "fp32", 20, 32),
        ("bf16", "bf16", 25, 32),
        ("bf16", "u8", 20, 32),
    ):
        signature = dict(zip(pointers, (f"*{kind}", f"*{cache}", "*i64"), strict=True))
        signature |= dict.fromkeys(numbers, "i32") | {"k_scale": "fp32", "v_scale": "fp32"}
        values = (heads, 64, block, triton.next_power_of_2(heads * 64), cache == "u8", False)
        variants.append(
            Variant(
                name=f"kv_write {kind} to {cache.replace('u8', 'fp8')} heads{heads} block{block}",
                kernel=kv_write_kernel,
                signature=signature | dict.fromkeys(constants, "constexpr"),
                constexprs=dict(zip(constants, values, strict=True)),
                divisible=frozenset((*pointers, *numbers)),
                fp_fusion=False,
            )
        )
    return variants
