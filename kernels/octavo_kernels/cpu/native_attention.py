"""Attention over the paged cache by the C kernels of `native`: single queries read keys and values where they are.

Measured by bench/cpu_kernels.py, ms per step of gpt2-small (12 layers, blocks of 32, 2 threads, AVX-512), rows x
context, beside `attention.PagedAttention`, which gathers and widens first:

                                 1x64   16x64   64x43   64x64   64x300
    gathered, flash; bf16        0.74     4.7    18.2    18.0     90.1
    this file, bf16              0.14     1.4     4.9     5.5     27.3
    this file, fp8               0.18     1.7     4.9     6.6     30.2

Chunks of more than MOST_QUERIES tokens are computed in bf16 products where there are such (`native/chunks.c`), else by
torch's flash attention: 512 tokens after none and after 512 others take 21 and 57 ms so, 72 and 154 by torch. A single
query's result has the same bits in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from octavo_kernels.checks import FP8
from octavo_kernels.cpu import native
from octavo_kernels.cpu.attention import Int32s, Int64s, PagedAttention, PrefillRow

MOST_QUERIES: Final = 16
"""Of a chunk whose tokens attend one by one."""
LANES: Final = 16
TILE: Final = 64
"""Tokens, or dimensions, of a tile of a chunk's products."""


def supports(cache_dtype: torch.dtype, head_size: int) -> bool:
    """Whether this machine has the kernels, and they have this case."""
    return cache_dtype in native.TYPES and head_size <= 256 and native.library() is not None


@dataclass(frozen=True, slots=True)
class NativePlan:
    """One step's indices, the same for every layer."""

    num_blocks: int
    """Of the cache, the null block included."""
    slot_mapping: Int64s
    """[T]"""
    tokens: Int32s
    """[Q] flat index of each query that attends alone."""
    rows: Int32s
    """[Q] its row of `tables`."""
    lengths: Int32s
    """[Q] tokens it sees."""
    tables: Int32s
    """[R, B] block ids."""
    scores: Tensor
    """fp32 [threads, H, at least the greatest length], for the kernel."""
    prefill_rows: list[PrefillRow]
    """Chunks that are left to flash attention."""
    chunks: Int32s
    """[4, C] others: first token and end in the batch, tokens of the sequence with the chunk, row of `tables`."""
    scratch: Tensor
    """uint8 [threads, bytes] for the kernel."""
    num_threads: int
    """For which there is room."""
    slots_for_c: tuple[int, int]
    """slot_mapping as octavo_write takes it: where it is, how many."""
    queries_for_c: tuple[int, ...]
    """tokens, rows, lengths, how many, tables, their width: as octavo_attend takes them."""
    chunks_for_c: tuple[int, ...]
    """chunks, how many, tables, their width, scratch, the width that it is for: as octavo_attend_chunks takes them."""


class NativeAttention:
    """What PagedAttention does, over the same cache of [2, N, H, S, D] per layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        block_size: int,
        cache_dtype: torch.dtype,
        qkv_dtype: torch.dtype = torch.float32,
    ) -> None:
        """qkv_dtype: bf16 queries are needed for chunks in bf16 products; any others take other ways."""
        assert block_size % LANES == 0  # scores of a block are written in whole vectors
        self.num_heads = num_heads
        self.head_size = head_size
        self.block_size = block_size
        self.cache_dtype = cache_dtype
        self._flash = PagedAttention(num_heads, head_size, block_size, cache_dtype)
        self._scores = torch.empty(0, num_heads, 0)
        self._scratch = torch.empty(0, 0, dtype=torch.uint8)
        has_products = bool(native.loaded().octavo_has_linear()) and head_size % TILE == 0
        self._takes_chunks = has_products and qkv_dtype == torch.bfloat16 and cache_dtype in (torch.bfloat16, FP8)

    def plan(
        self,
        num_blocks: int,
        slot_mapping: Int64s,
        query_start_loc: Int32s,
        seq_lens: Int32s,
        block_tables: Int32s,
        num_decode_rows: int,
    ) -> NativePlan:
        """As `PagedAttention.plan`. Raises IndexError for a slot or block outside of the cache, or a row longer than
        its table."""
        for what, found, end in (
            ("slot", slot_mapping, num_blocks * self.block_size),
            ("block", block_tables, num_blocks),
        ):
            if found.size and not 0 <= found.min() <= found.max() < end:
                raise IndexError(f"{what} {found.min()} or {found.max()} is not in the cache's 0 to {end - 1}")
        if seq_lens.max(initial=0) > block_tables.shape[1] * self.block_size:
            raise IndexError(f"{seq_lens.max()} tokens are not in tables of {block_tables.shape[1]} blocks")
        sizes = np.diff(query_start_loc)
        single = sizes <= MOST_QUERIES
        rows = np.repeat(np.flatnonzero(single), sizes[single]).astype(np.int32)
        tokens = np.flatnonzero(np.repeat(single, sizes)).astype(np.int32)
        lengths = (seq_lens[rows] - query_start_loc[rows + 1] + tokens + 1).astype(np.int32)
        slot_mapping = np.ascontiguousarray(slot_mapping, np.int64)
        tables = np.ascontiguousarray(block_tables, np.int32)
        places = [array.ctypes.data for array in (tokens, rows, lengths)]
        long = np.flatnonzero(~single)
        starts, ends, totals = query_start_loc[long], query_start_loc[long + 1], seq_lens[long]
        chunks = np.array([starts, ends, totals, long] if self._takes_chunks else np.empty((4, 0)), np.int32)
        width = -(-int(chunks[2].max(initial=0)) // TILE) * TILE
        scratch = self._room_for_chunks(width)
        return NativePlan(
            num_blocks,
            slot_mapping,
            tokens,
            rows,
            lengths,
            tables,
            self._room(int(lengths.max(initial=0))),
            [] if self._takes_chunks else self._flash_rows(num_blocks, long, query_start_loc, seq_lens, block_tables),
            chunks,
            scratch,
            torch.get_num_threads(),
            (slot_mapping.ctypes.data, len(slot_mapping)),
            (*places, len(tokens), tables.ctypes.data, tables.shape[1]),
            (
                *(line.ctypes.data for line in chunks),
                *(chunks.shape[1], tables.ctypes.data, tables.shape[1], scratch.data_ptr(), width),
            ),
        )

    def _flash_rows(
        self, num_blocks: int, rows: Int64s, query_start_loc: Int32s, seq_lens: Int32s, block_tables: Int32s
    ) -> list[PrefillRow]:
        starts, ends = query_start_loc[rows].tolist(), query_start_loc[rows + 1].tolist()
        return [
            self._flash.prefill_row(num_blocks, start, end, total, block_tables[row])
            for row, start, end, total in zip(rows.tolist(), starts, ends, seq_lens[rows].tolist(), strict=True)
        ]

    def _room_for_chunks(self, width: int) -> Tensor:
        threads, size = torch.get_num_threads(), native.loaded().octavo_scratch_bytes(width, self.head_size)
        if width and (self._scratch.shape[0] < threads or self._scratch.shape[1] < size):
            self._scratch = torch.empty(threads, size, dtype=torch.uint8)
        return self._scratch

    def _room(self, length: int) -> Tensor:
        threads, width = torch.get_num_threads(), -(-length // LANES) * LANES
        if self._scores.shape[0] < threads or self._scores.shape[2] < width:
            self._scores = torch.empty(threads, self.num_heads, max(2 * self._scores.shape[2], width))
        return self._scores

    def _check(self, plan: NativePlan, qkv: Tensor, layer_cache: Tensor) -> None:
        """C reads what it is told to read."""
        assert qkv.shape == (len(plan.slot_mapping), 3 * self.num_heads * self.head_size)
        assert layer_cache.shape == (2, plan.num_blocks, self.num_heads, self.block_size, self.head_size)
        assert qkv.is_contiguous() and layer_cache.is_contiguous() and layer_cache.dtype == self.cache_dtype

    def _described(self, plan: NativePlan, layer_cache: Tensor) -> tuple[int, ...]:
        """The cache, as the C functions take it."""
        place, kind = layer_cache.data_ptr(), native.TYPES[self.cache_dtype]
        return place, kind, plan.num_blocks, self.num_heads, self.block_size, self.head_size

    def write(
        self, plan: NativePlan, qkv: Tensor, layer_cache: Tensor, *, k_scale: float = 1.0, v_scale: float = 1.0
    ) -> None:
        """`reference.kv_write`. qkv: [T, 3 * E] contiguous."""
        self._check(plan, qkv, layer_cache)
        native.loaded().octavo_write(
            qkv.data_ptr(),
            native.TYPES[qkv.dtype],
            *self._described(plan, layer_cache),
            *plan.slots_for_c,
            k_scale,
            v_scale,
            torch.get_num_threads(),
        )

    def attend(
        self,
        plan: NativePlan,
        qkv: Tensor,
        layer_cache: Tensor,
        scale: float,
        *,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> Tensor:
        """`reference.paged_attention`, after `write`. Any float type; everything inside is fp32 but for chunks in bf16
        products."""
        self._check(plan, qkv, layer_cache)
        output = qkv.new_empty(qkv.shape[0], self.num_heads * self.head_size)
        if len(plan.tokens):
            self._attend_singly(plan, qkv, layer_cache, scale * k_scale, v_scale, output)
        if plan.chunks.size:
            self._attend_chunks(plan, qkv, layer_cache, scale * k_scale, v_scale, output)
        for row in plan.prefill_rows:
            lines = self._flash.as_stored(qkv[row.start : row.end], k_scale, v_scale)
            own = output[row.start : row.end]
            self._flash.prefill(row, lines, layer_cache, scale * k_scale, own)
            if v_scale != 1:
                own.mul_(v_scale)
        return output

    def _attend_singly(
        self, plan: NativePlan, qkv: Tensor, layer_cache: Tensor, scale: float, v_scale: float, output: Tensor
    ) -> None:
        native.loaded().octavo_attend(
            output.data_ptr(),
            qkv.data_ptr(),
            native.TYPES[qkv.dtype],
            *self._described(plan, layer_cache),
            *plan.queries_for_c,
            scale,
            v_scale,
            plan.scores.data_ptr(),
            plan.scores.shape[2],
            min(torch.get_num_threads(), plan.num_threads),
        )

    def _attend_chunks(
        self, plan: NativePlan, qkv: Tensor, layer_cache: Tensor, scale: float, v_scale: float, output: Tensor
    ) -> None:
        assert qkv.dtype == torch.bfloat16
        native.loaded().octavo_attend_chunks(
            output.data_ptr(),
            qkv.data_ptr(),
            *self._described(plan, layer_cache),
            *plan.chunks_for_c,
            scale,
            v_scale,
            min(torch.get_num_threads(), plan.num_threads),
        )
