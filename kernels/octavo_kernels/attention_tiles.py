"""What the attention kernels share: where a row's keys lie in the cache, how they are read, one step of the softmax.

Keys and values are [half][block][head][slot][D]: a (block, head) is contiguous. Scores are kept in base 2, in fp32.
Everything that a row's block table or length says is taken with care: a block id outside [0, N) counts as block 0, the
null block, whose contents are no request's; positions end with the table; slots past a row's end are never read, as a
recycled block may hold NaN there, and 0 * NaN is NaN.

Log
  What each choice here gave is in the logs of the kernels: `paged_attention`, `prefill_attention`, `verify_attention`,
  `shared_attention`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.checks import FP8
from octavo_kernels.fp8 import encode_e4m3
from octavo_kernels.products import product

LOWEST = tl.constexpr(-3.4028234663852886e38)  # before the first score: finite, so that no difference is NaN
_E4M3_UNIT = tl.constexpr(2.0**120)  # e4m3's bits, shifted to fp32's exponent and mantissa, are numbers times 2**-120


@triton.jit
def decode_e4m3(bits, HARDWARE: tl.constexpr):
    """uint8 bits of e4m3 numbers, any shape -> fp32. sm_80 and the interpreter have no conversion."""
    if HARDWARE:
        return bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    code = bits.to(tl.int32)
    magnitude = code & 0x7F
    magnitude = tl.where(magnitude == 0x7F, 0x7FC00000, magnitude << 20)
    return (((code & 0x80) << 24) | magnitude).to(tl.float32, bitcast=True) * _E4M3_UNIT


@triton.jit
def read(ptr, mask, dtype: tl.constexpr, FP8_FORM: tl.constexpr):
    """Cache numbers as `dtype`, without their scale; 0 where masked."""
    if mask is None:
        x = tl.load(ptr)
    else:
        x = tl.load(ptr, mask=mask, other=0)
    if FP8_FORM == "none":
        return x.to(dtype)
    elif FP8_FORM == "hardware" and dtype != tl.float32:
        return x.to(tl.float8e4nv, bitcast=True).to(dtype)
    else:
        return decode_e4m3(x, FP8_FORM == "hardware").to(dtype)


@triton.jit
def block_offset(table_ptr, index, num_blocks, max_blocks, stride_block):
    """int64 offset of the block that the table has at an index."""
    block = tl.load(table_ptr + index, mask=index < max_blocks, other=0)
    known = (block >= 0) & (block < num_blocks)
    return tl.where(known, block, 0).to(tl.int64) * stride_block


@triton.jit
def tile_offsets(
    table_ptr,
    start,  # a multiple of TILE_N
    within,  # which of the tile's keys, 0 .. TILE_N - 1: any shape
    num_blocks,
    max_blocks,
    stride_block,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Offsets of a tile's keys: a scalar for the tile, and one for each key.

    A tile that spans blocks takes each of its blocks from the table by a scalar load and selects: no gather.
    """
    first = start // BLOCK
    if TILE_N <= BLOCK:
        base = block_offset(table_ptr, first, num_blocks, max_blocks, stride_block) + start % BLOCK * D
        rows = within * D
    else:
        base = tl.full([], 0, tl.int64)
        rows = block_offset(table_ptr, first, num_blocks, max_blocks, stride_block) + within % BLOCK * D
        for i in tl.static_range(1, TILE_N // BLOCK):
            other = block_offset(table_ptr, first + i, num_blocks, max_blocks, stride_block)
            rows = tl.where(within // BLOCK == i, other + within % BLOCK * D, rows)
    return base, rows


@triton.jit
def shared_count(shared, length, SPLIT_LEN: tl.constexpr):
    """How many of a row's splits `shared_attention` computes: what the host says, without the new token's split."""
    return tl.maximum(tl.minimum(shared, tl.maximum(length - 1, 0) // SPLIT_LEN), 0)


@triton.jit
def tokens_of_tile(first_token, first_query, chunk, num_tokens, TILE_M: tl.constexpr):
    """int64 [TILE_M] tokens from a chunk's query `first_query` on, and which of them are the chunk's."""
    index = tl.arange(0, TILE_M)
    token = first_token.to(tl.int64) + first_query + index
    live = (first_query + index < chunk) & (first_query + index >= 0) & (token >= 0) & (token < num_tokens)
    return token, live


@triton.jit
def read_queries(qkv_ptr, token, mask, head, stride_qkv, D: tl.constexpr, TILE_D: tl.constexpr, UPCAST: tl.constexpr):
    """[M, TILE_D] of one head, in fp32 where UPCAST."""
    dims = tl.arange(0, TILE_D)
    q = tl.load(qkv_ptr + token[:, None] * stride_qkv + (head * D + dims)[None, :], mask=mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    return q


@triton.jit
def no_keys(TILE_M: tl.constexpr, TILE_D: tl.constexpr):
    """peak, total, acc of `attend_tile` before the first key."""
    return tl.full([TILE_M], LOWEST, tl.float32), tl.zeros([TILE_M], tl.float32), tl.zeros([TILE_M, TILE_D], tl.float32)


@triton.jit
def attend_tile(
    q,  # [M, TILE_D]
    peak,  # fp32 [M] greatest score so far
    total,  # fp32 [M] sum of 2 ** (score - peak)
    acc,  # fp32 [M, TILE_D] the same sum of values
    start,
    end,  # of the row's keys
    last,  # [M] position of the last key that a query sees
    cache_ptr,  # of the head
    stride_half,
    stride_block,
    table_ptr,  # of the row
    num_blocks,
    max_blocks,
    scale,  # base-2 scores are product * scale
    VALUE: tl.constexpr,  # type in which weights and values are multiplied
    D: tl.constexpr,
    TILE_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
    FP8_FORM: tl.constexpr,
    FORM: tl.constexpr,
    MASKED: tl.constexpr,  # whether some query does not see all of the tile's keys
):
    """Takes TILE_N keys from position `start` on into the softmax of M queries. Returns peak, total, acc."""
    within = tl.arange(0, TILE_N)
    dims = tl.arange(0, TILE_D)
    position = start + within
    base, rows = tile_offsets(table_ptr, start, within, num_blocks, max_blocks, stride_block, D, BLOCK, TILE_N)
    cache_ptr += base
    live_k = (dims < D)[:, None] if TILE_D != D else None
    live_v = (dims < D)[None, :] if TILE_D != D else None
    if MASKED:
        live = position < end
        live_k = live[None, :] & live_k if TILE_D != D else live[None, :]
        live_v = live[:, None] & live_v if TILE_D != D else live[:, None]
    k = read(cache_ptr + (rows[None, :] + dims[:, None]), live_k, q.dtype, FP8_FORM)
    v = read(cache_ptr + stride_half + (rows[:, None] + dims[None, :]), live_v, VALUE, FP8_FORM)
    scores = product(q, k, tl.zeros([q.shape[0], TILE_N], tl.float32), FORM) * scale
    if MASKED:
        scores = tl.where((position[None, :] <= last[:, None]) & live[None, :], scores, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    p = tl.exp2(scores - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(p, 1)
    acc = product(p.to(VALUE), v, acc * decay[:, None], FORM)
    return new_peak, total, acc


@triton.jit
def write_token(
    qkv_ptr,  # at the token's query of the head
    cache_ptr,  # at the head
    table_ptr,  # of the row
    position,
    stride_half,
    stride_block,
    num_blocks,
    k_scale,
    v_scale,
    WIDTH: tl.constexpr,  # E
    D: tl.constexpr,
    TILE_D: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8_FORM: tl.constexpr,
):
    """Writes a token's key and value of one head to the cache, unless its block is outside. Returns them as written."""
    dims = tl.arange(0, TILE_D)
    live = dims < D
    key = tl.load(qkv_ptr + WIDTH + dims, mask=live, other=0.0)
    value = tl.load(qkv_ptr + 2 * WIDTH + dims, mask=live, other=0.0)
    if FP8_FORM == "none":
        key = key.to(cache_ptr.dtype.element_ty)
        value = value.to(cache_ptr.dtype.element_ty)
    else:
        key = encode_e4m3(key.to(tl.float32) / k_scale)
        value = encode_e4m3(value.to(tl.float32) / v_scale)
    block = tl.load(table_ptr + position // BLOCK)
    known = (block >= 0) & (block < num_blocks)
    cache_ptr += block.to(tl.int64) * stride_block + position % BLOCK * D
    tl.store(cache_ptr + dims, key, mask=live & known)
    tl.store(cache_ptr + stride_half + dims, value, mask=live & known)
    return key, value


def fp8_form(layer_cache: Tensor) -> str:
    """How a cache is decoded: "none" unless it is fp8, else by "hardware" (from sm_89 on) or by "integers"."""
    if layer_cache.dtype != FP8:
        return "none"
    return "hardware" if _converts_e4m3(layer_cache.device) else "integers"


@lru_cache(maxsize=16)
def _converts_e4m3(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
