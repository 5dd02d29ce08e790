"""Paged attention and cache writes on the CPU.

What was tried, ms per step of gpt2-small (12 layers, fp32 cache, blocks of 32, 1 thread, AVX2), rows x mean context:

                                                     1x43   16x43   64x43   16x300   64x300
    gather all rows, padded, bmm + softmax + bmm      1.6    19.5     112      146     1750
    gather all rows, padded, flash attention          0.8     8.7      64       98     1559
    bmm over the pool in place, scores moved          2.5    14.9      60       81      310
    flash per block in place, merged by log-sum-exp   1.3    10.1      38       50      210
    gather a few rows at a time, padded, flash        1.0     9.8      38       45      186   <- this file

What counts is that gathered keys and values are still in the processor's cache when they are read: the workspace has
room for about a thousand tokens and is used over and over. Gathering from a bf16 cache, widened on the way, costs the
same time and half the memory; from an fp8 cache, see `fp8.py`. A few rows at a time also needs no dense pool and no
unshared blocks.

A plan is made once per step and used by every layer. Slots past the end of a sequence are masked in the scores; their
values must be finite, since 0 * NaN is NaN: `write` zeroes the rest of each block it enters.

A chunk's own keys and values are not read from the cache. They are rounded as there if it is fp8, whose three bits are
too few for a token to depend on how its prompt was cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo_kernels.checks import FP8
from octavo_kernels.cpu.fp8 import widen
from octavo_kernels.reference import to_fp8

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""(output, log-sum-exp) of what F.scaled_dot_product_attention runs; fp32: 13 times bmm + softmax at 64 x 300."""

WORKSPACE_BYTES: Final = 6 << 20
"""Gathered keys and values of one group in fp32. Twice this, or half, is slower."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """G decode rows whose contexts are gathered together, padded to B blocks."""

    num_rows: int
    """G"""
    rows: Tensor | None
    """int64 [G] which tokens of the batch; None: all of the decode rows, in order."""
    cache_index: Tensor
    """int64 [2 * G * H * B] pieces of [S, D] of a layer's cache in the order keys/values, row, head, block."""
    mask: Tensor | None
    """fp32 [G, 1, 1, B * S]: 0, or -inf past the row's end; None: nothing is past an end."""


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """One chunk of a sequence."""

    start: int
    end: int
    """Its tokens in the flat batch."""
    num_context: int
    """Tokens of the sequence in the cache before the chunk."""
    cache_index: Tensor | None
    """int64 [2 * H * B] pieces that hold the context; None: there is none."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's indices, the same for every layer."""

    write_index: Tensor
    """int64 [T * 2 * H] lines of [D] of a layer's cache, in the order token, keys/values, head."""
    entered_blocks: Tensor | None
    """int64: blocks whose first slot is written in this step and whose last is not; None: there are none."""
    decode_groups: list[DecodeGroup]
    prefill_rows: list[PrefillRow]


class PagedAttention:
    """Attention of one model's layers over a cache of [2, N, H, S, D] per layer. Owns the workspace."""

    def __init__(self, num_heads: int, head_size: int, block_size: int, cache_dtype: torch.dtype) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.block_size = block_size
        self.cache_dtype = cache_dtype
        token_bytes = 2 * num_heads * head_size * 4
        self.blocks_per_group = max(1, WORKSPACE_BYTES // (token_bytes * block_size))
        self._fp8 = cache_dtype == FP8
        self._bits = torch.int8 if self._fp8 else cache_dtype
        """The cache's type, as far as copying goes: torch copies few fp8 numbers, and slowly."""
        self._gathered = torch.empty(0, block_size * head_size, dtype=self._bits)
        self._scratch = torch.empty(0, block_size * head_size, dtype=torch.int16)
        self._widened = torch.empty(0, block_size * head_size)

    def plan(
        self,
        num_blocks: int,
        slot_mapping: Int64s,
        query_start_loc: Int32s,
        seq_lens: Int32s,
        block_tables: Int32s,
        num_decode_rows: int,
    ) -> AttentionPlan:
        """num_blocks: N of the cache; slot_mapping: [T]; the rest as in `reference.paged_attention`."""
        return AttentionPlan(
            write_index=self._write_index(num_blocks, slot_mapping),
            entered_blocks=self._entered_blocks(query_start_loc, seq_lens, block_tables),
            decode_groups=self._decode_groups(num_blocks, seq_lens[:num_decode_rows], block_tables),
            prefill_rows=[
                self.prefill_row(
                    num_blocks, int(query_start_loc[r]), int(query_start_loc[r + 1]), int(seq_lens[r]), block_tables[r]
                )
                for r in range(num_decode_rows, len(seq_lens))
            ],
        )

    def _write_index(self, num_blocks: int, slot_mapping: Int64s) -> Tensor:
        block, slot = np.divmod(slot_mapping, self.block_size)
        head = np.arange(self.num_heads)
        keys = (block[:, None] * self.num_heads + head) * self.block_size + slot[:, None]  # [T, H]
        values = keys + num_blocks * self.num_heads * self.block_size
        return torch.from_numpy(np.stack([keys, values], 1).reshape(-1))

    def _entered_blocks(self, query_start_loc: Int32s, seq_lens: Int32s, block_tables: Int32s) -> Tensor | None:
        """Only a row's last block can be entered without being filled."""
        last = (seq_lens - 1) // self.block_size
        entered = last * self.block_size >= seq_lens - np.diff(query_start_loc)
        rows = np.nonzero(entered & (seq_lens % self.block_size != 0))[0]
        if not len(rows):
            return None
        return torch.from_numpy(block_tables[rows, last[rows]].astype(np.int64))

    def _decode_groups(self, num_blocks: int, seq_lens: Int32s, block_tables: Int32s) -> list[DecodeGroup]:
        """Groups of rows in order of length. With an fp32 cache only rows of as many blocks share a group: then a row
        gives the same bits in any batch."""
        counts = -(-seq_lens // self.block_size)
        order = np.argsort(counts, kind="stable")
        groups: list[DecodeGroup] = []
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and self._fits(counts[order[start]], counts[order[end]], end + 1 - start):
                end += 1
            rows = np.sort(order[start:end])
            groups.append(self._group(num_blocks, rows, seq_lens[rows], block_tables, len(order)))
            start = end
        return groups

    def _fits(self, fewest: int, most: int, num_rows: int) -> bool:
        if self.cache_dtype == torch.float32 and fewest != most:
            return False
        return bool(most * num_rows <= self.blocks_per_group)

    def _group(
        self, num_blocks: int, rows: Int64s, seq_lens: Int32s, block_tables: Int32s, num_decode_rows: int
    ) -> DecodeGroup:
        counts = -(-seq_lens // self.block_size)
        most = int(counts.max())
        tables = block_tables[rows, :most]
        padding = np.arange(most) >= counts[:, None]
        tables = np.where(padding, tables[:, :1], tables)  # a block of the row itself: finite, unless the row is not
        mask = None
        if (seq_lens != most * self.block_size).any():
            mask = torch.zeros(len(rows), 1, 1, most * self.block_size)
            past_end = np.arange(most * self.block_size) >= seq_lens[:, None]
            mask.masked_fill_(torch.from_numpy(past_end)[:, None, None], -math.inf)
        everyone = len(rows) == num_decode_rows
        index = self._cache_index(num_blocks, tables)
        return DecodeGroup(len(rows), None if everyone else torch.from_numpy(rows), index, mask)

    def prefill_row(self, num_blocks: int, start: int, end: int, seq_len: int, block_table: Int32s) -> PrefillRow:
        num_context = seq_len - (end - start)
        if num_context == 0:
            return PrefillRow(start, end, 0, None)
        table = block_table[None, : -(-num_context // self.block_size)]
        return PrefillRow(start, end, num_context, self._cache_index(num_blocks, table))

    def _cache_index(self, num_blocks: int, tables: Int32s) -> Tensor:
        """tables: [G, B] block ids. Returns int64 [2 * G * H * B]."""
        head = np.arange(self.num_heads)[:, None]
        keys = tables[:, None, :].astype(np.int64) * self.num_heads + head  # [G, H, B]
        return torch.from_numpy(np.stack([keys, keys + num_blocks * self.num_heads]).reshape(-1))

    def write(
        self, plan: AttentionPlan, qkv: Tensor, layer_cache: Tensor, *, k_scale: float = 1.0, v_scale: float = 1.0
    ) -> None:
        """`reference.kv_write`, which also zeroes the rest of a block that it enters. qkv: [T, 3 * E] contiguous."""
        layer_cache = layer_cache.view(self._bits)
        if plan.entered_blocks is not None:
            layer_cache.index_fill_(1, plan.entered_blocks, 0)
        lines = self._stored(qkv, k_scale, v_scale).reshape(-1, self.head_size)
        layer_cache.view(-1, self.head_size).index_copy_(0, plan.write_index, lines)

    def _stored(self, qkv: Tensor, k_scale: float, v_scale: float) -> Tensor:
        """Keys and values as the cache has them: [T, 2 * E], as `_bits`."""
        width = self.num_heads * self.head_size
        if not self._fp8:
            return qkv[:, width:].to(self.cache_dtype)
        keys, values = qkv[:, width:].split(width, 1)
        return torch.cat([to_fp8(keys, k_scale), to_fp8(values, v_scale)], 1).view(self._bits)

    def attend(
        self,
        plan: AttentionPlan,
        qkv: Tensor,
        layer_cache: Tensor,
        scale: float,
        *,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> Tensor:
        """`reference.paged_attention`, after `write`. Any float type; everything inside is fp32."""
        output = qkv.new_empty(len(qkv), self.num_heads * self.head_size)
        scale *= k_scale  # keys and values stay as stored
        for group in plan.decode_groups:
            self._decode(group, qkv, layer_cache, scale, output)
        for row in plan.prefill_rows:
            lines = self.as_stored(qkv[row.start : row.end], k_scale, v_scale)
            self.prefill(row, lines, layer_cache, scale, output[row.start : row.end])
        return output if v_scale == 1 else output.mul_(v_scale)

    def as_stored(self, qkv: Tensor, k_scale: float, v_scale: float) -> Tensor:
        """fp32 [T, 3 * E] with keys and values as the cache has them, still divided by their scales."""
        if not self._fp8:
            return qkv.float()
        width = self.num_heads * self.head_size
        stored = self._stored(qkv, k_scale, v_scale)
        rounded = widen(stored, torch.empty_like(stored, dtype=torch.int16), torch.empty(stored.shape))
        return torch.cat([qkv[:, :width].float(), rounded], 1)

    def _decode(self, group: DecodeGroup, qkv: Tensor, layer_cache: Tensor, scale: float, output: Tensor) -> None:
        keys, values = self._gather(layer_cache, group.cache_index, group.num_rows)
        query = qkv[:, : output.shape[1]]
        query = query[: group.num_rows] if group.rows is None else query.index_select(0, group.rows)
        query = query.float().view(-1, self.num_heads, 1, self.head_size)
        attended = flash_attention(query, keys, values, 0.0, False, attn_mask=group.mask, scale=scale)[0]
        attended = attended.reshape(group.num_rows, -1)
        if group.rows is None:
            output[: group.num_rows] = attended
        else:
            output.index_copy_(0, group.rows, attended.to(output.dtype))

    def prefill(self, row: PrefillRow, lines: Tensor, layer_cache: Tensor, scale: float, output: Tensor) -> None:
        """Attention within the chunk and over the context before it, merged by the logs of their sums. lines: the
        chunk's [T, 3 * E] of `as_stored`; output: [T, E]."""
        lines = lines.view(-1, 3, self.num_heads, self.head_size)
        query, key, value = lines.permute(1, 2, 0, 3).unsqueeze(1)  # [1, H, T, D] each
        attended, log_sum = flash_attention(query, key, value, 0.0, True, scale=scale)
        if row.cache_index is not None:
            keys, values = self._gather(layer_cache, row.cache_index, 1)[:, :, :, : row.num_context]
            before, log_sum_before = flash_attention(query, keys, values, 0.0, False, scale=scale)
            attended = torch.lerp(attended, before, torch.sigmoid(log_sum_before - log_sum).unsqueeze(3))
        output.copy_(attended.squeeze(0).transpose(0, 1).flatten(1))

    def _gather(self, layer_cache: Tensor, cache_index: Tensor, num_rows: int) -> Tensor:
        """Keys and values in the workspace, fp32 [2, num_rows, H, B * S, D]; valid until the next call."""
        size = len(cache_index)
        if size > len(self._gathered):
            self._gathered = self._gathered.new_empty(size, self.block_size * self.head_size)
        pieces = layer_cache.view(self._bits).view(-1, self.block_size * self.head_size)
        gathered = torch.index_select(pieces, 0, cache_index, out=self._gathered[:size])
        if self.cache_dtype != torch.float32:
            gathered = self._widen(gathered, size)
        return gathered.view(2, num_rows, self.num_heads, -1, self.head_size)

    def _widen(self, gathered: Tensor, size: int) -> Tensor:
        """Pieces in fp32, in the workspace."""
        if size > len(self._widened):
            self._widened = self._widened.new_empty(size, self.block_size * self.head_size)
        if not self._fp8:
            return self._widened[:size].copy_(gathered)
        if size > len(self._scratch):
            self._scratch = self._scratch.new_empty(size, self.block_size * self.head_size)
        return widen(gathered, self._scratch[:size], self._widened[:size])
