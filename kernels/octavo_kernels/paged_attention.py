"""Decode attention over the paged cache: one new token per row, split over the context; writes its key and value.

Splits are 256 tokens long, counted from position 0, and merged in index order by the last of them to arrive, so the
order of a row's sums depends on its length alone. Splits that rows have in common may come from `shared_attention`.
That and the other forms, `prefill_attention` and `verify_attention`, are in the files of their names; their public
names are here too.

Log
  Device: none yet. Compiler's output for sm_90 (Triton 3.7.1), 20 heads of 64 unless said; nothing is measured.
  One warp per (head, row, split); a lane reads 16 bytes of a key, so 4 keys (bf16) lie side by side in a warp.
    variant, bf16 cache                              registers  spills
    tile 32, block 32                                91         0       in use
    tile 32, block 64                                96         0       in use
    tile 32, block 16: the tile spans two blocks     79         0       in use; two scalar table loads and a select,
                                                                        no gather and no barrier in the loop
    tile 16, block 16 or 32                          64         0       tried: half the bytes in flight per warp
    tile 64, block 64                                128        0       tried: 32 loads in flight, 16 warps per SM
    tile 32, block 32, one softmax for all lanes     100        0       tried
  each group of lanes has a softmax of its own, merged after the loop: 24 shuffles in the loop for 32 keys, where one
    softmax for the warp and sums across lanes need 44 (performance.md 5.1). No barrier, no shared memory in the loop.
  16 loads of 16 bytes in flight per lane (8 KB per warp). At 91 registers 22 warps fit an SM: 176 KB, against ~16 KB
    that hide the latency: predicted bound by bandwidth from 8k cached tokens (80-88 % of it).
  fp16 92 registers; fp32 (tile 16) 102; heads of 32: 64; of 80 and 96 (padded to 128, tile 16): 72; of 128: 100.
  with shared splits left out 83: their number is loaded again for the merge. Kept from the start on: 94, tried; with
    Triton 3.6, which needs 128 for either kernel, 164.
  fp8, tile 32: 85 registers with the hardware's conversion (block 16: 84), 96 with integers, 8 shuffles in the loop;
    tile 64 96 registers, tried. Predicted: integers would bound it by arithmetic, so only sm_80 uses them.
  merge by ticket, 4 splits at once: no second launch; 128 bytes of shared memory. Predicted 2 us saved per layer.
  dot form (16 query rows, 15 wasted): see verify_attention.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.attention_arguments import check_attention, common_arguments, head_constants, require_ints
from octavo_kernels.attention_tiles import LOWEST, decode_e4m3, read, shared_count, tile_offsets, write_token
from octavo_kernels.attention_variants import SHARING, cache_kinds
from octavo_kernels.attention_workspace import SPLIT, AttentionWorkspace
from octavo_kernels.checks import row_stride
from octavo_kernels.dependent_launch import follow, launch_options
from octavo_kernels.prefill_attention import PREFILL_TILE, prefill_attention, prefill_tiles
from octavo_kernels.prefill_attention import compile_variants as prefill_attention_variants
from octavo_kernels.shared_attention import SHARED_TILE, shared_attention
from octavo_kernels.shared_attention import compile_variants as shared_attention_variants
from octavo_kernels.variant import Variant
from octavo_kernels.verify_attention import VERIFY_TILE, decode_dot, verify_attention, verify_tiles
from octavo_kernels.verify_attention import compile_variants as verify_attention_variants

__all__ = [
    "PREFILL_TILE",
    "SHARED_TILE",
    "SPLIT",
    "VERIFY_TILE",
    "AttentionWorkspace",
    "decode_attention",
    "prefill_attention",
    "prefill_tiles",
    "shared_attention",
    "verify_attention",
    "verify_tiles",
]

_TILE_BYTES: Final = 4096
"""Of keys, and as many of values, that a warp reads at once: 8 loads of 16 bytes per lane for each."""
_MERGED: Final = 4
"""Splits that are merged at once."""
FORMS: Final = ("fma", "dot")


@triton.jit
def _attend_cached(
    q, begin, last, cache_ptr, table_ptr, stride_half, stride_block, num_blocks, max_blocks,
    D: tl.constexpr, TILE_D: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, REPEATS: tl.constexpr, SPLIT_LEN: tl.constexpr, FP8_FORM: tl.constexpr,
):  # fmt: skip
    """The softmax of the split's keys that are in the cache, those before position `last`: (peak, total, acc).

    Each of GROUPS lanes-groups has a softmax of its own, so that a tile's sums cross no lanes.
    """
    TILE_N: tl.constexpr = GROUPS * REPEATS
    dims = tl.arange(0, TILE_D)
    live_d = dims < D
    group = tl.arange(0, GROUPS)
    within = tl.arange(0, REPEATS)[:, None] * GROUPS + group[None, :]  # [REPEATS, GROUPS]
    peak = tl.full([GROUPS], LOWEST, tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    acc = tl.zeros([GROUPS, TILE_D], tl.float32)
    end = tl.minimum(begin + SPLIT_LEN, last)
    for start in tl.range(begin, end, TILE_N):
        live = start + within < end
        base, rows = tile_offsets(table_ptr, start, within, num_blocks, max_blocks, stride_block, D, BLOCK, TILE_N)
        mask = live[:, :, None]
        if TILE_D != D:
            mask = mask & live_d[None, None, :]
        where = rows[:, :, None] + dims[None, None, :]
        k = read(cache_ptr + base + where, mask, tl.float32, FP8_FORM)
        v = read(cache_ptr + base + stride_half + where, mask, tl.float32, FP8_FORM)
        scores = tl.where(live, tl.sum(k * q[None, None, :], 2), -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 0))
        p = tl.exp2(scores - new_peak[None, :])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(p, 0)
        acc = acc * decay[:, None] + tl.sum(p[:, :, None] * v, 0)
        peak = new_peak
    return peak, total, acc


@triton.jit
def _attend_new(
    q, peak, total, acc, qkv_ptr, cache_ptr, table_ptr, last, stride_half, stride_block, num_blocks, k_scale, v_scale,
    HEADS: tl.constexpr, D: tl.constexpr, TILE_D: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, FP8_FORM: tl.constexpr,
):  # fmt: skip
    """Writes the new token's key and value to the cache and takes them, as read from it, into the first softmax."""
    key, value = write_token(
        qkv_ptr, cache_ptr, table_ptr, last, stride_half, stride_block, num_blocks, k_scale, v_scale, HEADS * D,
        D, TILE_D, BLOCK, FP8_FORM,
    )  # fmt: skip
    if FP8_FORM != "none":
        key = decode_e4m3(key, FP8_FORM == "hardware")
        value = decode_e4m3(value, FP8_FORM == "hardware")
    key, value = key.to(tl.float32), value.to(tl.float32)
    first = tl.arange(0, GROUPS) == 0
    score = tl.where(first, tl.sum(key * q, 0), -float("inf"))
    new_peak = tl.maximum(peak, score)
    p = tl.exp2(score - new_peak)
    decay = tl.exp2(peak - new_peak)
    total = total * decay + p
    acc = acc * decay[:, None] + p[:, None] * value[None, :]
    return new_peak, total, acc


@triton.jit
def _attend_split(
    begin,
    last,  # position of the new token, which is not in the cache yet
    qkv_ptr, table_ptr, cache_ptr,  # of the row and the head
    stride_half, stride_block, num_blocks, max_blocks, scale, k_scale, v_scale,
    HEADS: tl.constexpr, D: tl.constexpr, TILE_D: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, REPEATS: tl.constexpr, SPLIT_LEN: tl.constexpr, FP8_FORM: tl.constexpr,
):  # fmt: skip
    """A split's attention alone: (result [TILE_D], its greatest score, its sum of 2 ** (score - greatest))."""
    dims = tl.arange(0, TILE_D)
    q = tl.load(qkv_ptr + dims, mask=dims < D, other=0.0).to(tl.float32) * scale
    peak, total, acc = _attend_cached(
        q, begin, last, cache_ptr, table_ptr, stride_half, stride_block, num_blocks, max_blocks, D, TILE_D, BLOCK,
        GROUPS, REPEATS, SPLIT_LEN, FP8_FORM,
    )  # fmt: skip
    if begin + SPLIT_LEN > last:
        peak, total, acc = _attend_new(
            q, peak, total, acc, qkv_ptr, cache_ptr, table_ptr, last, stride_half, stride_block, num_blocks, k_scale,
            v_scale, HEADS, D, TILE_D, BLOCK, GROUPS, FP8_FORM,
        )  # fmt: skip
    top = tl.max(peak, 0)
    weights = tl.exp2(peak - top)
    total_all = tl.sum(total * weights, 0)
    return tl.sum(acc * weights[:, None], 0) * (v_scale / total_all), top, total_all


@triton.jit
def _merge_splits(
    out_ptr, partial_ptr, lse_ptr, active, D: tl.constexpr, TILE_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr, MERGED: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Writes a row's attention of one head over its `active` splits."""
    dims = tl.arange(0, TILE_D)
    index = tl.arange(0, MAX_SPLITS)
    lse = tl.load(lse_ptr + index * QUERIES, mask=index < active, other=-float("inf"), cache_modifier=".cg")
    top = tl.max(lse, 0)
    total = tl.sum(tl.exp2(lse - top), 0)
    merged = tl.zeros([TILE_D], tl.float32)
    for first in tl.range(0, active, MERGED):
        index = first + tl.arange(0, MERGED)
        lse = tl.load(lse_ptr + index * QUERIES, mask=index < active, other=-float("inf"), cache_modifier=".cg")
        mask = (index < active)[:, None] & (dims < D)[None, :]
        where = index[:, None] * (QUERIES * D) + dims[None, :]
        part = tl.load(partial_ptr + where, mask=mask, other=0.0, cache_modifier=".cg")
        merged += tl.sum(part * tl.exp2(lse - top)[:, None], 0)
    tl.store(out_ptr + dims, (merged / total).to(out_ptr.dtype.element_ty), mask=dims < D)


@triton.jit(do_not_specialize=["num_blocks", "max_blocks", "max_splits"])
def decode_kernel(
    qkv_ptr,  # [R, 3 * E] rows
    cache_ptr,  # [2, N, H, S, D], the last three dimensions contiguous
    table_ptr,  # int32 [R, B] rows
    lens_ptr,  # int32 [R]
    out_ptr,  # [R, E] rows
    partial_ptr,  # fp32 [R, H, splits, QUERIES, D], the first of QUERIES is used
    lse_ptr,  # fp32 [R, H, splits, QUERIES]
    ticket_ptr,  # int32 [R, H]
    shared_ptr,  # int32 [R]; None: there are no shared splits
    stride_qkv, stride_half, stride_block, stride_table, stride_out,
    num_blocks, max_blocks, max_splits,  # N, B, splits
    scale, k_scale, v_scale,  # base-2 scores are query * key * scale: the cache's scale is in it
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE_D: tl.constexpr,  # H, D, S, a power of 2 from D on
    GROUPS: tl.constexpr,  # keys that lie side by side in a warp
    REPEATS: tl.constexpr,  # keys of a tile that a lane holds
    MAX_SPLITS: tl.constexpr,  # power of 2, at least max_splits
    SPLIT_LEN: tl.constexpr, MERGED: tl.constexpr, QUERIES: tl.constexpr, FP8_FORM: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):  # fmt: skip
    """Grid (H, R, splits): the programs of a row's heads run together, as its blocks lie."""
    if DEPENDENT_LAUNCH:
        follow()
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.minimum(tl.load(lens_ptr + row), max_blocks * BLOCK)
    begin = split * SPLIT_LEN
    dims = tl.arange(0, TILE_D)
    live_d = dims < D
    out_ptr += row * stride_out + head * D
    elsewhere = 0  # splits that `shared_attention` has computed
    if shared_ptr is not None:
        elsewhere = shared_count(tl.load(shared_ptr + row), length, SPLIT_LEN)
    if (begin >= length) | (split < elsewhere):
        if (split == 0) & (length <= 0):
            tl.store(out_ptr + dims, tl.zeros([TILE_D], out_ptr.dtype.element_ty), mask=live_d)
        return
    result, top, total = _attend_split(
        begin, length - 1, qkv_ptr + (row * stride_qkv + head * D), table_ptr + row * stride_table,
        cache_ptr + head * (BLOCK * D), stride_half, stride_block, num_blocks, max_blocks, scale, k_scale, v_scale,
        HEADS, D, TILE_D, BLOCK, GROUPS, REPEATS, SPLIT_LEN, FP8_FORM,
    )  # fmt: skip
    active = tl.cdiv(length, SPLIT_LEN)
    if active == 1:
        tl.store(out_ptr + dims, result.to(out_ptr.dtype.element_ty), mask=live_d)
    else:
        place = (row * HEADS + head) * max_splits
        partial_ptr += place * (QUERIES * D)
        lse_ptr += place * QUERIES
        ticket_ptr += row * HEADS + head
        tl.store(partial_ptr + split * (QUERIES * D) + dims, result, mask=live_d)
        tl.store(lse_ptr + split * QUERIES, top + tl.log2(total))
        tl.debug_barrier()  # all lanes' stores come before the ticket
        arrivals = active
        if shared_ptr is not None:
            arrivals -= shared_count(tl.load(shared_ptr + row), length, SPLIT_LEN)
        if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == arrivals - 1:
            tl.store(ticket_ptr, 0)  # graphs replay without the host
            _merge_splits(out_ptr, partial_ptr, lse_ptr, active, D, TILE_D, MAX_SPLITS, MERGED, QUERIES)


def decode_attention(
    qkv: Tensor,
    layer_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    workspace: AttentionWorkspace,
    *,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    upcast: bool = False,
    form: str = "fma",
    dependent_launch: bool = False,
    shared_splits: Tensor | None = None,
) -> Tensor:
    """Attention of R rows of one token each over their context; their keys and values are written to the cache.

    qkv: bf16, fp16 or fp32 [R, 3 * E], rows contiguous: queries, keys, values. layer_cache: [2, N, H, S, D] of a float
    type or fp8 e4m3; [H, S, D] contiguous, any strides before; S is 16, 32 or 64. block_tables: int32 [R, B], rows
    contiguous; an id outside [0, N) is read as block 0 and never written. seq_lens: int32 [R] contiguous, the new token
    included: row r is at position seq_lens[r] - 1, and what is beyond B * S is left out; 0: a padding row, whose out is
    zeros and which writes nothing. No two rows' tables share the block of a last position. out: [R, E] of qkv's type,
    rows contiguous. workspace: for at least R rows and B * S tokens. An fp8 cache holds key / k_scale and
    value / v_scale; other types take no scale. upcast: queries and keys are multiplied in fp32 whatever the types; the
    fma form always does. form: "fma", on CUDA cores, or "dot", on tensor cores with the sums of `verify_attention`.
    dependent_launch: see `octavo_kernels.dependent_launch`. shared_splits: int32 [R] as `shared_attention` had it, just
    before and with the same workspace; the fma form only. Returns out. Raises ValueError naming the argument.
    """
    check_attention(qkv, layer_cache, block_tables, seq_lens, out, scale, k_scale, v_scale)
    if seq_lens.shape[0] != qkv.shape[0]:
        raise ValueError(f"seq_lens: {seq_lens.shape[0]} rows, {qkv.shape[0]} in qkv")
    if form not in FORMS:
        raise ValueError(f"form: {form!r} is not one of {', '.join(FORMS)}")
    if shared_splits is not None:
        require_ints("shared_splits", shared_splits, (qkv.shape[0],), qkv)
        if form != "fma":
            raise ValueError(f"shared_splits: form {form!r} computes all splits itself")
    num_rows, (_, _, num_heads, block_size, head_size) = qkv.shape[0], layer_cache.shape
    splits = workspace.check(num_rows, num_heads, head_size, block_tables.shape[1] * block_size, 1, qkv)
    if num_rows == 0:
        return out
    arguments = common_arguments(qkv, layer_cache, block_tables, seq_lens, scale, k_scale, v_scale)
    arguments |= {"k_scale": float(k_scale)} | launch_options(dependent_launch)
    if form == "dot":
        decode_dot(qkv, layer_cache, out, workspace, splits, upcast, arguments)
        return out
    decode_kernel[(num_heads, num_rows, splits)](
        **arguments,
        **workspace.arguments(),
        ticket_ptr=workspace.tickets,
        shared_ptr=shared_splits,
        out_ptr=out,
        stride_out=row_stride(out),
        **_constants(num_heads, head_size, block_size, layer_cache.itemsize),
        MAX_SPLITS=triton.next_power_of_2(workspace.max_splits),
        num_warps=1,
    )
    return out


def _constants(num_heads: int, head_size: int, block_size: int, itemsize: int) -> dict[str, int]:
    """constexprs of `decode_kernel` that follow from the cache. itemsize: bytes of a cached number."""
    constants = head_constants(head_size, block_size)
    tile_d = constants["TILE_D"]
    groups = max(1, min(32, 32 * 16 // (tile_d * itemsize)))  # a lane reads 16 bytes of a key
    return constants | {
        "HEADS": num_heads,
        "GROUPS": groups,
        "REPEATS": max(1, min(_TILE_BYTES // (tile_d * itemsize), 32) // groups),
        "SPLIT_LEN": SPLIT,
        "MERGED": _MERGED,
    }


def compile_variants() -> list[Variant]:
    """What the engine launches, of all forms of attention: see `cache_kinds`."""
    variants = []
    for kind in cache_kinds():
        constants = _constants(kind.heads, kind.head_size, kind.block_size, kind.itemsize)
        constants |= {"MAX_SPLITS": 4, "QUERIES": 1, "FP8_FORM": kind.fp8}
        alone = constants | {"shared_ptr": None}
        variants.append(kind.variant("decode fma", decode_kernel, alone, num_warps=1))
        if kind == SHARING:
            variants.append(kind.variant("decode fma, shared splits", decode_kernel, constants, num_warps=1))
    return variants + shared_attention_variants() + prefill_attention_variants() + verify_attention_variants()
