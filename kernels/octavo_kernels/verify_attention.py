"""Attention of a few queries per row over the paged cache, split over the context: drafts under verification, decode
rows on tensor cores, and the batch-invariant mode.

A program takes up to 16 queries of a row, one head and one split of 256 tokens. Splits and key tiles begin at fixed
positions and are merged in index order, and keys that a query does not see add exact zeros: what a token's attention
is does not depend on the chunk in which it comes.

Log
  Device: none yet. Compiler's output for sm_90 (Triton 3.7.1), heads of 64, block 32 unless said; nothing is measured.
    queries x keys, warps, type   registers  spills  shared  MMA
    16x64, 4, bf16 or fp16        80         0       20 KB   16 mma.sync   in use (decode rows: 72)
    16x32, 4                      62         0       11 KB   8 mma.sync    tried
    16x128, 4                     112        0       38 KB   32 mma.sync   tried
    16x64, 2                      126        0       20 KB   32 mma.sync   tried
    16x64, 4, fp8 in hardware     106        0       12 KB   16 mma.sync   in use (integers: 113)
    16x32, 4, fp32                168        0       22 KB   none (ieee)   in use, as parity runs need
    16x16, 4, fp32                64         0       13 KB   none (ieee)   tried
    16x64, 4, heads of 128        128        0       38 KB   32 mma.sync   in use (80 and 96 alike)
  the new token of a decode row is written to the cache, then read with the others: one order of sums for decode rows
    and drafts, hence the same bits; predicted cost a barrier and a trip to L2 in one split per row.
  splits merged one after another: the sums do not depend on how many there are beyond a token's own.
"""

from __future__ import annotations

from typing import Any, Final

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
from octavo_kernels.attention_tiles import (
    LOWEST,
    attend_tile,
    no_keys,
    read_queries,
    tokens_of_tile,
    write_token,
)
from octavo_kernels.attention_variants import cache_kinds
from octavo_kernels.attention_workspace import AttentionWorkspace
from octavo_kernels.checks import row_stride
from octavo_kernels.dependent_launch import follow, launch_options
from octavo_kernels.prefill_attention import Int32s, prefill_tiles
from octavo_kernels.products import product_form
from octavo_kernels.variant import Variant

VERIFY_TILE: Final = 16
"""Queries of a tile: the rows of an MMA."""


@triton.jit
def _tile(tile, tile_rows_ptr, tile_starts_ptr):
    """(row int64, the first of its queries) of a tile."""
    row = tile
    first_query = 0
    if tile_rows_ptr is not None:
        row = tl.load(tile_rows_ptr + tile).to(tl.int64)
        first_query = tl.load(tile_starts_ptr + tile)
    return row, first_query


@triton.jit
def _chunk(row, loc_ptr):
    """(first token int64, number of tokens) of a row."""
    first_token = row
    chunk = 1
    if loc_ptr is not None:
        first_token = tl.load(loc_ptr + row).to(tl.int64)
        chunk = (tl.load(loc_ptr + row + 1) - first_token).to(tl.int32)
    return first_token, chunk


@triton.jit
def _attend_split(
    begin,
    length,
    last,  # [TILE_M] position of the last key that a query sees
    token,  # int64 [TILE_M]
    mask,  # of queries
    row, head, qkv_ptr, cache_ptr, table_ptr, stride_qkv, stride_half, stride_block, stride_table,
    num_blocks, max_blocks, scale, k_scale, v_scale, VALUE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE_D: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, SPLIT_LEN: tl.constexpr, WRITE: tl.constexpr,
    FP8_FORM: tl.constexpr, UPCAST: tl.constexpr, FORM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A split's attention alone: (result [TILE_M, TILE_D], lse [TILE_M] base-2 logarithm of the sum)."""
    end = tl.minimum(begin + SPLIT_LEN, length)
    table_ptr += row * stride_table
    cache_ptr += head * (BLOCK * D)
    if WRITE:  # noqa: SIM102 -- one is a constant
        if begin + SPLIT_LEN >= length:
            write_token(
                qkv_ptr + row * stride_qkv + head * D, cache_ptr, table_ptr, length - 1, stride_half, stride_block,
                num_blocks, k_scale, v_scale, HEADS * D, D, TILE_D, BLOCK, FP8_FORM,
            )  # fmt: skip
            tl.debug_barrier()  # the loop below reads what other lanes wrote
    q = read_queries(qkv_ptr, token, mask, head, stride_qkv, D, TILE_D, UPCAST)
    peak, total, acc = no_keys(TILE_M, TILE_D)
    for start in tl.range(begin, end, TILE_N, num_stages=STAGES):
        peak, total, acc = attend_tile(
            q, peak, total, acc, start, end, last, cache_ptr, stride_half, stride_block, table_ptr, num_blocks,
            max_blocks, scale, VALUE, D, TILE_D, BLOCK, TILE_N, FP8_FORM, FORM, True,
        )  # fmt: skip
    seen = total != 0.0  # a query before this split sees none of it
    total = tl.where(seen, total, 1.0)
    lse = tl.where(seen, peak + tl.log2(total), -float("inf"))
    return acc * (v_scale / total)[:, None], lse


@triton.jit
def _leave_split(
    result, lse, split, active, where_out, live,
    out_ptr,
    partial_ptr, lse_ptr, ticket_ptr,  # of the tile and the head
    D: tl.constexpr, TILE_D: tl.constexpr, TILE_M: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Leaves a split's results in the workspace; the last of the `active` splits to arrive merges them."""
    index = tl.arange(0, TILE_M)
    dims = tl.arange(0, TILE_D)
    kept = live & (index < QUERIES)
    where = index[:, None] * D + dims[None, :]
    mask = kept[:, None] & (dims < D)[None, :]
    tl.store(partial_ptr + split * (QUERIES * D) + where, result, mask=mask)
    tl.store(lse_ptr + split * QUERIES + index, lse, mask=kept)
    tl.debug_barrier()  # all lanes' stores come before the ticket
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == active - 1:
        tl.store(ticket_ptr, 0)  # graphs replay without the host
        top = tl.full([TILE_M], LOWEST, tl.float32)
        for i in tl.range(0, active):
            lse = tl.load(lse_ptr + i * QUERIES + index, mask=kept, other=0.0, cache_modifier=".cg")
            top = tl.maximum(top, lse)
        total = tl.zeros([TILE_M], tl.float32)
        merged = tl.zeros([TILE_M, TILE_D], tl.float32)
        for i in tl.range(0, active):
            lse = tl.load(lse_ptr + i * QUERIES + index, mask=kept, other=0.0, cache_modifier=".cg")
            part = tl.load(partial_ptr + i * (QUERIES * D) + where, mask=mask, other=0.0, cache_modifier=".cg")
            weight = tl.exp2(lse - top)
            total += weight
            merged += part * weight[:, None]
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(out_ptr + where_out, (merged / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_blocks", "max_blocks", "max_splits", "num_rows", "num_tokens"])
def verify_kernel(
    qkv_ptr,  # [T, 3 * E] rows
    cache_ptr,  # [2, N, H, S, D], the last three dimensions contiguous
    table_ptr,  # int32 [R, B] rows
    loc_ptr,  # int32 [R + 1]; None: row r has token r alone
    lens_ptr,  # int32 [R]
    tile_rows_ptr,  # int32 [tiles]; None: tile r is row r from its first query on
    tile_starts_ptr,  # int32 [tiles]
    out_ptr,  # [T, E] rows
    partial_ptr,  # fp32 [tiles, H, splits, QUERIES, D]
    lse_ptr,  # fp32 [tiles, H, splits, QUERIES]
    ticket_ptr,  # int32 [tiles, H]
    stride_qkv, stride_half, stride_block, stride_table, stride_out,
    num_blocks, max_blocks, max_splits, num_rows, num_tokens,  # N, B, splits, R, T
    scale, k_scale, v_scale,  # base-2 scores are query * key * scale: the cache's scale is in it
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE_D: tl.constexpr,  # H, D, S, a power of 2 from D on
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, SPLIT_LEN: tl.constexpr,
    QUERIES: tl.constexpr,  # that the workspace has room for: 1, or TILE_M at least
    WRITE: tl.constexpr,  # the last token's key and value are written to the cache first; with one query per row
    FP8_FORM: tl.constexpr, UPCAST: tl.constexpr, FORM: tl.constexpr, STAGES: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):  # fmt: skip
    """Grid (H, tiles, splits)."""
    if DEPENDENT_LAUNCH:
        follow()
    head = tl.program_id(0)
    tile = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    row, first_query = _tile(tile, tile_rows_ptr, tile_starts_ptr)
    if (row < 0) | (row >= num_rows):
        return
    first_token, chunk = _chunk(row, loc_ptr)
    past = tl.load(lens_ptr + row) - chunk  # position of the chunk's first token
    index = tl.arange(0, TILE_M)
    dims = tl.arange(0, TILE_D)
    token, live = tokens_of_tile(first_token, first_query, chunk, num_tokens, TILE_M)
    mask = live[:, None] & (dims < D)[None, :]
    VALUE: tl.constexpr = qkv_ptr.dtype.element_ty
    where_out = token[:, None] * stride_out + (head * D + dims)[None, :]
    last = past + first_query + index
    length = tl.minimum(past + tl.minimum(first_query + TILE_M, chunk), max_blocks * BLOCK)
    begin = split * SPLIT_LEN
    if begin >= length:
        if (split == 0) & (length <= 0):
            tl.store(out_ptr + where_out, tl.zeros([TILE_M, TILE_D], VALUE), mask=mask)
        return
    result, lse = _attend_split(
        begin, length, last, token, mask, row, head, qkv_ptr, cache_ptr, table_ptr, stride_qkv, stride_half,
        stride_block, stride_table, num_blocks, max_blocks, scale, k_scale, v_scale, VALUE, HEADS, D, BLOCK, TILE_D,
        TILE_M, TILE_N, SPLIT_LEN, WRITE, FP8_FORM, UPCAST, FORM, STAGES,
    )  # fmt: skip
    active = tl.cdiv(length, SPLIT_LEN)
    if active == 1:
        tl.store(out_ptr + where_out, result.to(VALUE), mask=mask)
    else:
        place = (tile * HEADS + head) * max_splits
        _leave_split(
            result, lse, split, active, where_out, live, out_ptr, partial_ptr + place * (QUERIES * D),
            lse_ptr + place * QUERIES, ticket_ptr + (tile * HEADS + head), D, TILE_D, TILE_M, QUERIES,
        )  # fmt: skip


def verify_attention(
    qkv: Tensor,
    layer_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    workspace: AttentionWorkspace,
    *,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    upcast: bool = False,
    tile_rows: Tensor | None = None,
    tile_starts: Tensor | None = None,
    dependent_launch: bool = False,
) -> Tensor:
    """As `prefill_attention`, for rows of 1 to 16 queries, or of any number with tiles from `verify_tiles`.

    A token's result has the same bits whatever chunk it comes in and whatever else is in the batch. Without tiles only
    a row's first 16 queries are computed. workspace: for as many rows as there are tiles (rows without tiles) of
    VERIFY_TILE queries, and B * S tokens. Returns out. Raises ValueError naming the argument.
    """
    check_attention(qkv, layer_cache, block_tables, seq_lens, out, scale, k_scale, v_scale)
    require_ints("query_start_loc", query_start_loc, (seq_lens.shape[0] + 1,), qkv)
    if (tile_rows is None) != (tile_starts is None):
        raise ValueError("tile_starts: with tile_rows or not at all")
    num_tiles = seq_lens.shape[0]
    if tile_rows is not None and tile_starts is not None:
        num_tiles = tile_rows.numel()
        require_ints("tile_rows", tile_rows, (num_tiles,), qkv)
        require_ints("tile_starts", tile_starts, (num_tiles,), qkv)
    _, _, num_heads, block_size, head_size = layer_cache.shape
    context = block_tables.shape[1] * block_size
    splits = workspace.check(num_tiles, num_heads, head_size, context, VERIFY_TILE, qkv)
    if num_tiles:
        arguments = common_arguments(qkv, layer_cache, block_tables, seq_lens, scale, k_scale, v_scale)
        arguments |= {"loc_ptr": query_start_loc, "tile_rows_ptr": tile_rows, "tile_starts_ptr": tile_starts}
        arguments |= {"k_scale": float(k_scale), "num_rows": seq_lens.shape[0], "WRITE": False}
        arguments |= launch_options(dependent_launch)
        _launch((num_heads, num_tiles, splits), qkv, layer_cache, out, workspace, upcast, arguments)
    return out


def verify_tiles(query_start_loc: Int32s, first_row: int) -> tuple[Int32s, Int32s]:
    """As `prefill_tiles`, with VERIFY_TILE queries to a tile."""
    return prefill_tiles(query_start_loc, first_row, VERIFY_TILE)


def decode_dot(
    qkv: Tensor,
    layer_cache: Tensor,
    out: Tensor,
    workspace: AttentionWorkspace,
    splits: int,
    upcast: bool,
    arguments: dict[str, Any],
) -> None:
    """`decode_attention` on tensor cores, which has checked the arguments: rows of one token, which is written to the
    cache. arguments: of the launch by name, `common_arguments` and k_scale among them."""
    alone = {"loc_ptr": None, "tile_rows_ptr": None, "tile_starts_ptr": None, "num_rows": qkv.shape[0], "WRITE": True}
    grid = (layer_cache.shape[2], qkv.shape[0], splits)
    _launch(grid, qkv, layer_cache, out, workspace, upcast, arguments | alone)


def _launch(
    grid: tuple[int, int, int],
    qkv: Tensor,
    layer_cache: Tensor,
    out: Tensor,
    workspace: AttentionWorkspace,
    upcast: bool,
    arguments: dict[str, Any],
) -> None:
    """arguments: those of `verify_kernel` that do not follow from the others."""
    _, _, num_heads, block_size, head_size = layer_cache.shape
    wide = needs_upcast(upcast, qkv, layer_cache)
    itemsize = 4 if wide else qkv.itemsize
    constants, options = split_constants(num_heads, head_size, block_size, itemsize, VERIFY_TILE)
    verify_kernel[grid](
        **arguments,
        **workspace.arguments(),
        ticket_ptr=workspace.tickets,
        out_ptr=out,
        stride_out=row_stride(out),
        num_tokens=qkv.shape[0],
        **constants,
        UPCAST=wide,
        FORM=product_form(qkv, fixed_order=True),
        **options,
    )


def compile_variants() -> list[Variant]:
    """What the engine launches for drafts and in batch-invariant mode, and decode rows on tensor cores, by cache."""
    variants = []
    for kind in cache_kinds():
        itemsize = 4 if kind.dtype == "fp32" else 2
        constants, options = split_constants(kind.heads, kind.head_size, kind.block_size, itemsize, VERIFY_TILE)
        constants |= {"FP8_FORM": kind.fp8, "UPCAST": False, "FORM": "dot"}
        mma = None if kind.dtype == "fp32" else "mma"
        verify = constants | {"QUERIES": VERIFY_TILE, "WRITE": False}
        decode = constants | {"QUERIES": 1, "WRITE": True}
        decode |= {"loc_ptr": None, "tile_rows_ptr": None, "tile_starts_ptr": None}
        variants.append(kind.variant("verify", verify_kernel, verify, mma=mma, **options))
        variants.append(kind.variant("decode dot", verify_kernel, decode, mma=mma, **options))
    return variants
