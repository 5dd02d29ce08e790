"""Attention over the paged cache: decode, prompt chunks, rows of a few queries. Peers read the same keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import kernel_peers
import numpy as np
import torch
import torch.nn.functional as F
from gpu_timing import Work, copies_for
from kernel_case import Case, Setting, Target
from octavo_kernels.paged_attention import (
    SHARED_TILE,
    SPLIT,
    VERIFY_TILE,
    AttentionWorkspace,
    decode_attention,
    prefill_attention,
    prefill_tiles,
    shared_attention,
    verify_attention,
    verify_tiles,
)
from torch import Tensor

HEADS, HEAD_SIZE = 20, 64
BLOCK = 32
DECODE = ((256, 512), (64, 256), (256, 64), (32, 256), (128, 512), (256, 256), (8, 1000), (1, 1000), (8, 256), (1, 64))
"""Rows and context; the cases of the target first."""
ANCHORS = ((256, 512), (64, 256), (1, 1000))
"""Also measured with other block sizes and an fp8 cache."""
SLOW_TO_START = ((256, 512), (8, 0, 512))
"""Also measured with flex_attention, which compiles for each; with --sweep all are."""
PREFILL = ((1, 0, 1000), (8, 0, 512), (32, 0, 128), (4, 768, 256))
"""Rows, tokens before the chunk, tokens of the chunk."""
SHARED = ((256, 640, 512), (64, 576, 512), (16, 1000, 768), (256, 320, 256))
"""Rows, context, tokens that all rows begin with in the same blocks."""
FEW = ((8, 508, 4), (64, 252, 4))
LARGE = 8192
"""From so many cached tokens on the target of decode holds."""


@dataclass
class Paged:
    """Rows in copies of a paged cache, blocks in random order; the rows' new tokens are the last of their context."""

    setting: Setting
    contexts: Sequence[int]
    """Tokens of each row, the new ones included."""
    chunks: Sequence[int]
    """New tokens of each row."""
    block: int = BLOCK
    cache_dtype: torch.dtype | None = None
    heads: int = HEADS
    shared: int = 0
    """Tokens that all rows begin with, in the same blocks: whole splits."""

    def __post_init__(self) -> None:
        device, dtype = self.setting.device, self.setting.dtype
        if self.setting.tiny:
            self.heads = 2
        stored = self.cache_dtype or dtype
        read = sum(self.contexts) - (len(self.contexts) - 1) * self.shared
        self.kv_bytes = 2 * read * self.heads * HEAD_SIZE * stored.itemsize
        self.copies = copies_for(self.kv_bytes, self.setting.l2_bytes)
        self.width = -(-max(self.contexts) // self.block)
        rows = len(self.contexts)
        num_blocks = self.copies * rows * self.width + 1
        shape = (2, num_blocks, self.heads, self.block, HEAD_SIZE)
        self.cache = torch.randn(shape, device=device, dtype=dtype).to(stored)
        order = torch.randperm(num_blocks - 1, device=device).to(torch.int32) + 1
        self.tables = order.view(self.copies, rows, self.width)
        self.tables[:, :, : self.shared // self.block] = self.tables[:, :1, : self.shared // self.block].clone()
        self.seq_lens = torch.tensor(self.contexts, dtype=torch.int32, device=device)
        self.starts_np = np.cumsum([0, *self.chunks]).astype(np.int32)
        self.starts = torch.from_numpy(self.starts_np).to(device)
        num_tokens = int(self.starts_np[-1])
        self.qkv = torch.randn(num_tokens, 3 * self.heads * HEAD_SIZE, device=device, dtype=dtype)
        self.scale = HEAD_SIZE**-0.5
        self._dense: list[tuple[Tensor, Tensor]] = []
        self._put_new_tokens()

    def _put_new_tokens(self) -> None:
        """The last tokens' keys and values, as decode attention writes them: all contenders see the same cache."""
        split = self.qkv.view(-1, 3, self.heads, HEAD_SIZE)
        for row, (context, chunk) in enumerate(zip(self.contexts, self.chunks, strict=True)):
            new = split[self.starts_np[row] : self.starts_np[row + 1]].to(self.cache.dtype)
            position = torch.arange(context - chunk, context, device=self.cache.device)
            for copy in range(self.copies):
                blocks = self.tables[copy, row].long()[position // self.block]
                self.cache[0, blocks, :, position % self.block] = new[:, 1]
                self.cache[1, blocks, :, position % self.block] = new[:, 2]

    @property
    def num_tokens(self) -> int:
        return int(self.starts_np[-1])

    @property
    def bytes(self) -> float:
        """Keys and values once, shared ones too, queries, and what is written."""
        return self.kv_bytes + 2 * self.num_tokens * self.heads * HEAD_SIZE * self.qkv.itemsize

    @property
    def flops(self) -> float:
        seen = sum(
            chunk * (2 * context - chunk + 1) / 2 for context, chunk in zip(self.contexts, self.chunks, strict=True)
        )
        return 4.0 * HEAD_SIZE * self.heads * seen

    @property
    def queries(self) -> Tensor:
        """[T, H, D], a view of qkv."""
        return self.qkv.view(-1, 3, self.heads, HEAD_SIZE)[:, 0]

    def dense(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [R, H, longest context, D] of each copy; what is past a row's end does not count."""
        if not self._dense:
            for copy in range(self.copies):
                halves = [half[self.tables[copy].long()].to(self.setting.dtype) for half in self.cache]
                keys, values = (half.permute(0, 2, 1, 3, 4).flatten(2, 3) for half in halves)  # of [R, width, H, S, D]
                longest = max(self.contexts)
                self._dense.append((keys[:, :, :longest].contiguous(), values[:, :, :longest].contiguous()))
        return self._dense

    def out(self) -> Tensor:
        return torch.full((self.num_tokens, self.heads * HEAD_SIZE), math.nan, device=self.setting.device).to(
            self.setting.dtype
        )


def decode_cases(setting: Setting) -> Iterator[Case]:
    for rows, context in ((1, 17), (2, 33)) if setting.tiny else DECODE:
        size = (rows, context)
        more = setting.sweep or size in ANCHORS or size == (2, 33)
        flex = setting.sweep or size in SLOW_TO_START or size == (2, 33)
        yield decode_case(setting, f"{rows} x {context}", [context] * rows, more, flex)
    if not setting.tiny:
        source = np.random.default_rng(0)
        lengths = np.clip(np.exp(source.normal(5.6, 0.8, 128)), 16, 1000).astype(int).tolist()
        yield decode_case(setting, "128 x log-normal", lengths, more=False, flex=False)


def decode_case(setting: Setting, name: str, contexts: list[int], more: bool, flex: bool) -> Case:
    """more: with other block sizes and an fp8 cache; flex: with flex_attention."""
    rows = len(contexts)
    paged = Paged(setting, contexts, [1] * rows)
    contenders: dict[str, Callable[[], Work]] = {
        "torch SDPA, dense cache": partial(dense_work, paged),
        "octavo": partial(decode_work, paged),
        "octavo dot": partial(decode_work, paged, "dot"),
    }
    own_bytes: dict[str, float] = {}
    if more:
        for block in (16, 64):
            contenders[f"octavo block {block}"] = partial(other_decode_work, setting, contexts, block=block)
        eighth = partial(other_decode_work, setting, contexts, cache_dtype=torch.float8_e4m3fn)
        contenders["octavo fp8 cache"] = eighth
        own_bytes["octavo fp8 cache"] = paged.bytes - paged.kv_bytes / 2
    if flex:
        contenders["flex_attention, dense cache"] = partial(flex_work, paged)
    contenders["FlashInfer"] = partial(kernel_peers.flashinfer_decode, paged)
    contenders["vLLM Triton unified"] = partial(kernel_peers.vllm_unified, paged)
    large = sum(contexts) >= LARGE
    return Case(
        bench="decode",
        name=name,
        facts={"rows": rows, "tokens": sum(contexts), "longest": max(contexts), "block": BLOCK, "heads": paged.heads},
        bytes=paged.bytes,
        flops=paged.flops,
        copies=paged.copies,
        contenders=contenders,
        target=Target("octavo", fraction=0.8, ahead=True) if large else None,
        tolerance=0.06,  # the fp8 cache rounds to 3 bits of mantissa; others are well below
        own_bytes=own_bytes,
    )


def decode_work(paged: Paged, form: str = "fma") -> Work:
    queries = VERIFY_TILE if form == "dot" else 1
    workspace = AttentionWorkspace.allocate(
        len(paged.contexts), paged.heads, HEAD_SIZE, paged.width * paged.block, paged.setting.device, queries
    )
    out = paged.out()

    def run(copy: int) -> None:
        decode_attention(
            paged.qkv, paged.cache, paged.tables[copy], paged.seq_lens, out, workspace, scale=paged.scale, form=form
        )

    return Work(run, lambda: out)


def shared_cases(setting: Setting) -> Iterator[Case]:
    """Decode rows that begin with the same blocks: read once for several rows, and for each anew."""
    for rows, context, shared in ((3, 290, 256),) if setting.tiny else SHARED:
        paged = Paged(setting, [context] * rows, [1] * rows, shared=shared)
        yield Case(
            bench="shared",
            name=f"{rows} x {context}, {shared} shared",
            facts={"rows": rows, "longest": context, "shared": shared, "block": BLOCK, "heads": paged.heads},
            bytes=paged.bytes,
            flops=paged.flops,
            copies=paged.copies,
            contenders={
                "torch SDPA, dense cache": partial(dense_work, paged),
                "octavo": partial(shared_work, paged),
                "octavo, each row": partial(decode_work, paged),
                "vLLM Triton unified": partial(kernel_peers.vllm_unified, paged),
            },
        )


def shared_work(paged: Paged) -> Work:
    rows, device = len(paged.contexts), paged.setting.device
    tiles = torch.full((-(-rows // SHARED_TILE), SHARED_TILE), -1, dtype=torch.int32, device=device)
    tiles.view(-1)[:rows] = torch.arange(rows)
    splits = torch.full((rows,), paged.shared // SPLIT, dtype=torch.int32, device=device)
    workspace = AttentionWorkspace.allocate(rows, paged.heads, HEAD_SIZE, paged.width * paged.block, device)
    out = paged.out()

    def run(copy: int) -> None:
        arguments = (paged.qkv, paged.cache, paged.tables[copy], paged.seq_lens)
        shared_attention(*arguments, tiles, splits, workspace, scale=paged.scale)
        decode_attention(*arguments, out, workspace, scale=paged.scale, shared_splits=splits)

    return Work(run, lambda: out)


def other_decode_work(setting: Setting, contexts: list[int], **changes: Any) -> Work:
    """Over a cache of its own, with random numbers of its own: timed, not compared."""
    work = decode_work(Paged(setting, contexts, [1] * len(contexts), **changes))
    return Work(work.run)


def dense_work(paged: Paged) -> Work:
    """PyTorch on keys and values that somebody has gathered for it. Rows shorter than the longest are masked."""
    caches = paged.dense()[:4] if sum(paged.contexts) > 20000 else paged.dense()
    query = paged.queries[:, :, None].contiguous()  # [R, H, 1, D]
    equal = len(set(paged.contexts)) == 1
    index = torch.arange(max(paged.contexts), device=paged.setting.device)
    mask = None if equal else (index[None] < paged.seq_lens[:, None])[:, None, None]
    results: list[Tensor] = [query]

    def run(copy: int) -> None:
        keys, values = caches[copy]
        results[0] = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    def result() -> Tensor:
        run(0)
        return results[0][:, :, 0].flatten(1)

    return Work(run, result)


def flex_work(paged: Paged) -> Work:
    """flex_attention, compiled, of one chunk per row, all of one length; causal where a chunk has several tokens."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    chunk, context = paged.chunks[0], paged.contexts[0]
    before = context - chunk
    caches = paged.dense()
    query = paged.queries.view(-1, chunk, paged.heads, HEAD_SIZE).transpose(1, 2).contiguous()
    mask = None
    if chunk > 1:
        mask = create_block_mask(
            lambda batch, head, q, k: q + before >= k, None, None, chunk, context, device=str(paged.setting.device)
        )
    attend = flex_attention if paged.setting.tiny else torch.compile(flex_attention, dynamic=False)
    results: list[Tensor] = [query]

    def run(copy: int) -> None:
        results[0] = attend(query, *caches[copy], block_mask=mask, scale=paged.scale)

    def result() -> Tensor:
        run(0)
        return results[0].transpose(1, 2).reshape(paged.num_tokens, -1)

    return Work(run, result)


def prefill_cases(setting: Setting) -> Iterator[Case]:
    for rows, before, chunk in ((2, 0, 20), (1, 17, 18)) if setting.tiny else PREFILL:
        yield prefill_case(setting, "chunks", rows, before, chunk)
    for rows, before, chunk in ((2, 14, 3),) if setting.tiny else FEW:
        yield prefill_case(setting, "few queries", rows, before, chunk)


def prefill_case(setting: Setting, kind: str, rows: int, before: int, chunk: int) -> Case:
    paged = Paged(setting, [before + chunk] * rows, [chunk] * rows)
    contenders: dict[str, Callable[[], Work]] = {
        "torch SDPA, dense cache": partial(dense_chunks_work, paged),
        "octavo": partial(tiles_work, paged, few=kind == "few queries"),
        "octavo batch-invariant" if kind == "chunks" else "octavo as chunks": partial(
            tiles_work, paged, few=kind == "chunks"
        ),
    }
    if setting.sweep or setting.tiny or (rows, before, chunk) in SLOW_TO_START:
        contenders["flex_attention, dense cache"] = partial(flex_work, paged)
    contenders["FlashInfer"] = partial(kernel_peers.flashinfer_prefill, paged)
    contenders["vLLM Triton unified"] = partial(kernel_peers.vllm_unified, paged)
    return Case(
        bench="prefill",
        name=f"{kind} {rows} x {before}+{chunk}",
        facts={"rows": rows, "before": before, "chunk": chunk, "block": BLOCK, "heads": paged.heads},
        bytes=paged.bytes,
        flops=paged.flops,
        copies=paged.copies,
        contenders=contenders,
    )


def tiles_work(paged: Paged, few: bool) -> Work:
    """Tiles of 64 queries, or of 16 with splits: `verify_attention`."""
    device = paged.setting.device
    tiles = (verify_tiles if few else prefill_tiles)(paged.starts_np, 0)
    tile_rows, tile_starts = (torch.from_numpy(array).to(device) for array in tiles)
    workspace = AttentionWorkspace.allocate(
        len(tiles[0]) if few else 1, paged.heads, HEAD_SIZE, paged.width * paged.block, device, VERIFY_TILE
    )
    out = paged.out()

    def run(copy: int) -> None:
        arguments = (paged.qkv, paged.cache, paged.tables[copy], paged.starts, paged.seq_lens)
        if few:
            places = {"tile_rows": tile_rows, "tile_starts": tile_starts}
            verify_attention(*arguments, out, workspace, scale=paged.scale, **places)
        else:
            prefill_attention(*arguments, tile_rows, tile_starts, out, scale=paged.scale)

    return Work(run, lambda: out)


def dense_chunks_work(paged: Paged) -> Work:
    """PyTorch's causal attention of chunks of one length; after a context with a mask, which its flash kernel lacks."""
    chunk, context = paged.chunks[0], paged.contexts[0]
    caches = paged.dense()
    query = paged.queries.view(-1, chunk, paged.heads, HEAD_SIZE).transpose(1, 2).contiguous()
    mask = None
    if context > chunk:
        index = torch.arange(context, device=paged.setting.device)
        mask = index[None] <= index[context - chunk :, None]
    results: list[Tensor] = [query]

    def run(copy: int) -> None:
        keys, values = caches[copy]
        results[0] = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=mask is None)

    def result() -> Tensor:
        run(0)
        return results[0].transpose(1, 2).reshape(paged.num_tokens, -1)

    return Work(run, result)
