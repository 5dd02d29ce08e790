"""The part of decode attention that rows have in common: whole splits whose blocks stand in several rows' tables.

A program takes up to 32 rows, one head and one split of 256 tokens, reads the split's keys and values once, and leaves
for each row what `decode_attention` would have left in the workspace: the split's own result and the logarithm of its
sum. `decode_attention` with the same `shared_splits` then leaves these splits out and merges them with the rest.

Log
  Device: none yet. Compiler's output for sm_90 (Triton 3.7.1), heads of 64, block 32 unless said; nothing is measured.
    rows x keys, warps, type      registers  spills  shared  MMA
    32x64, 4, bf16                84         0       24 KB   32 mma.sync   in use (block 16: 104)
    32x64, 4, fp8 in hardware     104        0       16 KB   32 mma.sync   in use
    32x32, 4, fp32                92         0       28 KB   none (ieee)   in use, as parity runs need
    16x64, 4, bf16                64         0       20 KB   16 mma.sync   tried: keys are read twice as often
    64x64, 4, bf16                126        0       41 KB   8 wgmma       tried: fp32 (64x32) 255, 90 spills
  a launch of its own, before the rows' own splits: one in common with them would need a kernel of one warp. Predicted
    cost 1 to 2 us per layer, so that the engine asks for it only where it saves some splits (`shared_prefixes`).
  rows that share find their keys in L2 as they are: 256 rows of 512 common tokens read 671 MB per layer through it,
    with tiles of 32 rows 21 MB. Predicted for an H100: 120 us become 6.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.attention_arguments import (
    check_attention,
    common_arguments,
    needs_upcast,
    require_ints,
    split_constants,
)
from octavo_kernels.attention_tiles import attend_tile, no_keys, read_queries, shared_count
from octavo_kernels.attention_variants import CacheKind
from octavo_kernels.attention_workspace import SPLIT, AttentionWorkspace
from octavo_kernels.dependent_launch import follow, launch_options
from octavo_kernels.products import product_form
from octavo_kernels.variant import Variant

SHARED_TILE: Final = 32
"""Rows of a tile."""


@triton.jit(do_not_specialize=["num_blocks", "max_blocks", "max_splits", "num_rows"])
def shared_kernel(
    qkv_ptr,  # [R, 3 * E] rows
    cache_ptr,  # [2, N, H, S, D], the last three dimensions contiguous
    table_ptr,  # int32 [R, B] rows
    lens_ptr,  # int32 [R]
    tile_rows_ptr,  # int32 [tiles, TILE_M]
    shared_ptr,  # int32 [R]
    partial_ptr,  # fp32 [R, H, splits, QUERIES, D], the first of QUERIES is used
    lse_ptr,  # fp32 [R, H, splits, QUERIES]
    stride_qkv, stride_half, stride_block, stride_table,
    num_blocks,
    max_blocks,  # B
    max_splits,
    num_rows,  # R
    scale,  # base-2 scores are query * key * scale: the cache's scale is in it
    v_scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE_D: tl.constexpr,  # H, D, S, a power of 2 from D on
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, SPLIT_LEN: tl.constexpr, QUERIES: tl.constexpr,
    FP8_FORM: tl.constexpr, UPCAST: tl.constexpr, FORM: tl.constexpr, STAGES: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):  # fmt: skip
    """Grid (H, tiles, splits)."""
    if DEPENDENT_LAUNCH:
        follow()
    head = tl.program_id(0)
    split = tl.program_id(2)
    index = tl.arange(0, TILE_M)
    dims = tl.arange(0, TILE_D)
    row = tl.load(tile_rows_ptr + tl.program_id(1) * TILE_M + index).to(tl.int64)
    known = (row >= 0) & (row < num_rows)
    length = tl.minimum(tl.load(lens_ptr + row, mask=known, other=0), max_blocks * BLOCK)
    shared = tl.load(shared_ptr + row, mask=known, other=0)
    live = known & (split < shared_count(shared, length, SPLIT_LEN))
    leader = tl.max(tl.where(live, row, -1), 0)  # any of them: a row that has finished has lost its table
    if leader < 0:
        return
    table_ptr += leader * stride_table
    cache_ptr += head * (BLOCK * D)
    mask = live[:, None] & (dims < D)[None, :]
    VALUE: tl.constexpr = qkv_ptr.dtype.element_ty
    q = read_queries(qkv_ptr, row, mask, head, stride_qkv, D, TILE_D, UPCAST)
    peak, total, acc = no_keys(TILE_M, TILE_D)
    begin = split * SPLIT_LEN
    end = begin + SPLIT_LEN
    for start in tl.range(begin, end, TILE_N, num_stages=STAGES):
        peak, total, acc = attend_tile(
            q, peak, total, acc, start, end, length - 1, cache_ptr, stride_half, stride_block, table_ptr, num_blocks,
            max_blocks, scale, VALUE, D, TILE_D, BLOCK, TILE_N, FP8_FORM, FORM, False,
        )  # fmt: skip
    place = ((row * HEADS + head) * max_splits + split) * QUERIES
    tl.store(partial_ptr + place[:, None] * D + dims[None, :], acc * (v_scale / total)[:, None], mask=mask)
    tl.store(lse_ptr + place, peak + tl.log2(total), mask=live)


def shared_attention(
    qkv: Tensor,
    layer_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    tile_rows: Tensor,
    shared_splits: Tensor,
    workspace: AttentionWorkspace,
    *,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    upcast: bool = False,
    dependent_launch: bool = False,
) -> None:
    """Attention of rows over the splits that they share, into the workspace: for `decode_attention` to be merged.

    Arguments as for `decode_attention`, which comes next, with the same shared_splits: int32 [R] contiguous, how many
    splits from the first on a row leaves to this call. Never the split of the row's new token or one behind it,
    whatever shared_splits says: of a muted row none. tile_rows: int32 [T, SHARED_TILE] contiguous, the rows of each
    tile, those outside [0, R) are none; every row with shared splits is in one tile, and rows of a tile that share a
    split have the same blocks there. Raises ValueError naming the argument.
    """
    check_attention(qkv, layer_cache, block_tables, seq_lens, None, scale, k_scale, v_scale)
    num_rows = qkv.shape[0]
    if seq_lens.shape[0] != num_rows:
        raise ValueError(f"seq_lens: {seq_lens.shape[0]} rows, {num_rows} in qkv")
    num_tiles = tile_rows.shape[0] if tile_rows.dim() else 0
    require_ints("tile_rows", tile_rows, (num_tiles, SHARED_TILE), qkv)
    require_ints("shared_splits", shared_splits, (num_rows,), qkv)
    _, _, num_heads, block_size, head_size = layer_cache.shape
    context = block_tables.shape[1] * block_size
    workspace.check(num_rows, num_heads, head_size, context, 1, qkv)
    splits = (context - 1) // SPLIT  # the last position is no row's to share
    if not num_tiles or not num_rows or not splits:
        return
    wide = needs_upcast(upcast, qkv, layer_cache)
    itemsize = 4 if wide else qkv.itemsize
    constants, options = split_constants(num_heads, head_size, block_size, itemsize, SHARED_TILE)
    shared_kernel[(num_heads, num_tiles, splits)](
        **common_arguments(qkv, layer_cache, block_tables, seq_lens, scale, k_scale, v_scale),
        **workspace.arguments(),
        tile_rows_ptr=tile_rows,
        shared_ptr=shared_splits,
        num_rows=num_rows,
        **constants,
        UPCAST=wide,
        FORM=product_form(qkv, fixed_order=False),
        **options,
        **launch_options(dependent_launch),
    )


def compile_variants() -> list[Variant]:
    """What the engine launches for gpt2-large, by type."""
    kinds = [
        CacheKind("bf16", "bf16", 20, 64, 32),
        CacheKind("fp32", "fp32", 20, 64, 32),
        CacheKind("bf16", "u8", 20, 64, 32, "hardware"),
    ]
    variants = []
    for kind in kinds:
        itemsize = 4 if kind.dtype == "fp32" else 2
        constants, options = split_constants(kind.heads, kind.head_size, kind.block_size, itemsize, SHARED_TILE)
        constants |= {"QUERIES": 1, "FP8_FORM": kind.fp8, "UPCAST": False, "FORM": "dot"}
        mma = None if kind.dtype == "fp32" else "mma"
        variants.append(kind.variant("shared", shared_kernel, constants, mma=mma, **options))
    return variants
