"""Causal attention of prompt chunks over the paged cache, their own keys and values included.

A program takes 64 queries of a row and one head. Key tiles that all of them see run without masks, then those on the
diagonal with.

Log
  Device: none yet. Compiler's output for sm_90 (Triton 3.7.1), heads of 64, block 32 unless said; nothing is measured.
    queries x keys, warps, stages, type   registers  spills  shared  MMA
    64x64, 4, 2, bf16 or fp16             128        0       40 KB   16 wgmma     in use (block 64: 142)
    64x64, 4, 3                           132        0       41 KB   16 wgmma     tried
    64x64, 4, 2, block 16                 130        0       40 KB   16 wgmma     tried: spills on sm_80
    64x32, 4, 2, block 16                 86         0       24 KB   12 wgmma     in use
    64x32, 4, 2                           106        0       24 KB   12 wgmma     tried
    128x64, 8, 2                          120        0       48 KB   16 wgmma     tried: more waste in short chunks
    128x64, 4, 2                          248        0       48 KB   32 wgmma     tried: 2 programs per SM
    64x64, 4, 2, fp8 in hardware          104        0       32 KB   16 wgmma     in use (integers: 110)
    64x32, 8, 2, fp32                     92         0       40 KB   none (ieee)  in use, as parity runs need
    64x32, 4, 2, fp32                     255        701     40 KB   none (ieee)  tried
    64x64, 4, 2, heads of 128             193        0       80 KB   24 wgmma     tried: spills on sm_80
    64x32, 4, 2, heads of 128             172        0       48 KB   20 wgmma     in use, for 80 and 96 too
  sm_80 111-187 registers, sm_100 85-140 (tcgen05), without spills.
  two loops, the first without masks: the causal comparison is paid on the diagonal only.
  a tile that spans blocks takes each block by a scalar load and selects: no gathered table read.
  the longest tiles start first: predicted to shorten the tail of a chunk, whose last tile does up to 16 times the work
    of its first at 1024 tokens.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.attention_arguments import (
    check_attention,
    common_arguments,
    head_constants,
    needs_upcast,
    require_ints,
)
from octavo_kernels.attention_tiles import attend_tile, no_keys, read_queries, tokens_of_tile
from octavo_kernels.attention_variants import cache_kinds
from octavo_kernels.checks import row_stride
from octavo_kernels.dependent_launch import follow, launch_options
from octavo_kernels.products import product_form
from octavo_kernels.variant import Variant

Int32s = npt.NDArray[np.int32]
PREFILL_TILE: Final = 64
"""Queries of a tile."""


@triton.jit(do_not_specialize=["num_blocks", "max_blocks", "num_rows", "num_tokens"])
def prefill_kernel(
    qkv_ptr,  # [T, 3 * E] rows
    cache_ptr,  # [2, N, H, S, D], the last three dimensions contiguous
    table_ptr,  # int32 [R, B] rows
    loc_ptr,  # int32 [R + 1]
    lens_ptr,  # int32 [R]
    tile_rows_ptr,  # int32 [tiles]
    tile_starts_ptr,  # int32 [tiles]
    out_ptr,  # [T, E] rows
    stride_qkv, stride_half, stride_block, stride_table, stride_out,
    num_blocks,
    max_blocks,  # B
    num_rows,  # R
    num_tokens,  # T
    scale,  # base-2 scores are query * key * scale: the cache's scale is in it
    v_scale,
    D: tl.constexpr,
    TILE_D: tl.constexpr,  # power of 2, at least D
    BLOCK: tl.constexpr,  # S
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, FP8_FORM: tl.constexpr,
    UPCAST: tl.constexpr,  # queries and keys are multiplied in fp32, else in qkv's type
    FORM: tl.constexpr, STAGES: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr,
):  # fmt: skip
    """Grid (H, tiles); the last tiles, which of a row's see the most keys, start first."""
    if DEPENDENT_LAUNCH:
        follow()
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    row = tl.load(tile_rows_ptr + tile).to(tl.int64)
    if (row < 0) | (row >= num_rows):
        return
    first_query = tl.load(tile_starts_ptr + tile)
    first_token = tl.load(loc_ptr + row)
    chunk = tl.load(loc_ptr + row + 1) - first_token
    past = tl.load(lens_ptr + row) - chunk  # position of the chunk's first token
    index = tl.arange(0, TILE_M)
    dims = tl.arange(0, TILE_D)
    token, live = tokens_of_tile(first_token, first_query, chunk, num_tokens, TILE_M)
    mask = live[:, None] & (dims < D)[None, :]
    VALUE: tl.constexpr = qkv_ptr.dtype.element_ty
    q = read_queries(qkv_ptr, token, mask, head, stride_qkv, D, TILE_D, UPCAST)
    peak, total, acc = no_keys(TILE_M, TILE_D)
    last = past + first_query + index
    end = tl.minimum(past + tl.minimum(first_query + TILE_M, chunk), max_blocks * BLOCK)
    seen_by_all = tl.minimum(tl.maximum(past + first_query + 1, 0), tl.maximum(end, 0)) // TILE_N * TILE_N
    table_ptr += row * stride_table
    cache_ptr += head * (BLOCK * D)
    for start in tl.range(0, seen_by_all, TILE_N, num_stages=STAGES):
        peak, total, acc = attend_tile(
            q, peak, total, acc, start, end, last, cache_ptr, stride_half, stride_block, table_ptr, num_blocks,
            max_blocks, scale, VALUE, D, TILE_D, BLOCK, TILE_N, FP8_FORM, FORM, False,
        )  # fmt: skip
    for start in tl.range(seen_by_all, end, TILE_N, num_stages=STAGES):
        peak, total, acc = attend_tile(
            q, peak, total, acc, start, end, last, cache_ptr, stride_half, stride_block, table_ptr, num_blocks,
            max_blocks, scale, VALUE, D, TILE_D, BLOCK, TILE_N, FP8_FORM, FORM, True,
        )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # of a muted row: zeros
    result = acc * (v_scale / total)[:, None]
    tl.store(out_ptr + token[:, None] * stride_out + (head * D + dims)[None, :], result.to(VALUE), mask=mask)


def prefill_attention(
    qkv: Tensor,
    layer_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    tile_rows: Tensor,
    tile_starts: Tensor,
    out: Tensor,
    *,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    upcast: bool = False,
    dependent_launch: bool = False,
) -> Tensor:
    """Causal attention of chunks whose keys and values are in the cache already (`kv_write`).

    qkv: bf16, fp16 or fp32 [T, 3 * E], rows contiguous; only the queries are read. layer_cache, block_tables [R, B],
    k_scale, v_scale: as for `decode_attention`. query_start_loc: int32 [R + 1]; row r has the tokens
    query_start_loc[r] .. query_start_loc[r + 1] - 1, the last of which is at position seq_lens[r] - 1. seq_lens: int32
    [R]; 0: a muted row, whose out is zeros. tile_rows, tile_starts: int32 [tiles] from `prefill_tiles`; a tile whose
    row is outside [0, R) is skipped, and so are tokens outside [0, T). All of these contiguous, on the device. out: [T,
    E] of qkv's type, rows contiguous; only the tiles' tokens are written. upcast: queries and keys are multiplied in
    fp32 where the cache's type is wider than qkv's; products of narrower types are exact in fp32 anyway.
    dependent_launch: see `octavo_kernels.dependent_launch`. Returns out. Raises ValueError naming the argument.
    """
    check_attention(qkv, layer_cache, block_tables, seq_lens, out, scale, k_scale, v_scale)
    require_ints("query_start_loc", query_start_loc, (seq_lens.shape[0] + 1,), qkv)
    require_ints("tile_rows", tile_rows, (tile_rows.numel(),), qkv)
    require_ints("tile_starts", tile_starts, tuple(tile_rows.shape), qkv)
    if tile_rows.shape[0] == 0:
        return out
    _, _, num_heads, block_size, head_size = layer_cache.shape
    wide = needs_upcast(upcast, qkv, layer_cache)
    constants, options = _constants(head_size, block_size, 4 if wide else qkv.itemsize)
    prefill_kernel[(num_heads, tile_rows.shape[0])](
        **common_arguments(qkv, layer_cache, block_tables, seq_lens, scale, k_scale, v_scale),
        loc_ptr=query_start_loc,
        tile_rows_ptr=tile_rows,
        tile_starts_ptr=tile_starts,
        out_ptr=out,
        stride_out=row_stride(out),
        num_rows=seq_lens.shape[0],
        num_tokens=qkv.shape[0],
        **constants,
        UPCAST=wide,
        FORM=product_form(qkv, fixed_order=False),
        **options,
        **launch_options(dependent_launch),
    )
    return out


def prefill_tiles(query_start_loc: Int32s, first_row: int, tile: int = PREFILL_TILE) -> tuple[Int32s, Int32s]:
    """Tiles of the rows from first_row on, row by row: the row, and the first of its queries counted from its chunk's
    start, of each. query_start_loc: [R + 1] on the host."""
    lengths = np.diff(query_start_loc)[first_row:]
    counts = -(-lengths // tile)
    rows = np.repeat(np.arange(first_row, first_row + len(lengths), dtype=np.int32), counts)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    return rows, ((np.arange(len(rows)) - before) * tile).astype(np.int32)


def _constants(head_size: int, block_size: int, itemsize: int) -> tuple[dict[str, Any], dict[str, int]]:
    """constexprs of `prefill_kernel`, and launch options. itemsize: bytes of what is multiplied."""
    constants = head_constants(head_size, block_size)
    wide_tiles = itemsize == 2 and constants["TILE_D"] < 128 and block_size > 16
    constants |= {"TILE_M": PREFILL_TILE, "TILE_N": 64 if wide_tiles else 32, "STAGES": 2}
    return constants, {"num_warps": 4 if itemsize == 2 else 8, "num_stages": 2}


def compile_variants() -> list[Variant]:
    """What the engine launches for prompts, by cache."""
    variants = []
    for kind in cache_kinds():
        constants, options = _constants(kind.head_size, kind.block_size, 4 if kind.dtype == "fp32" else 2)
        constants |= {"FP8_FORM": kind.fp8, "UPCAST": False, "FORM": "dot"}
        mma = None if kind.dtype == "fp32" else "wgmma"
        variants.append(kind.variant("prefill", prefill_kernel, constants, mma=mma, **options))
    return variants
