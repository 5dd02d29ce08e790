"""Attention over the paged cache against the specification: decode, prefill and few-query forms."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from octavo_kernels import reference
from octavo_kernels.attention_tiles import decode_e4m3, fp8_form
from octavo_kernels.checks import FP8
from octavo_kernels.paged_attention import (
    PREFILL_TILE,
    VERIFY_TILE,
    AttentionWorkspace,
    decode_attention,
    prefill_attention,
    prefill_tiles,
    verify_attention,
    verify_tiles,
)
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SCALE = 0.2


@dataclass
class Step:
    """R rows of chunks over a cache in which all but their contexts is NaN."""

    qkv: Tensor
    cache: Tensor
    tables: Tensor
    seq_lens: Tensor
    query_start_loc: np.ndarray
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def device(self) -> torch.device:
        return self.qkv.device

    @property
    def starts(self) -> Tensor:
        return torch.from_numpy(self.query_start_loc).to(self.device)

    @property
    def numbers(self) -> Tensor:
        """The cache as fp32 [2, N, H, S, D], its scales multiplied out."""
        scales = torch.tensor([self.k_scale, self.v_scale], device=self.device)
        return self.cache.float() * scales[:, None, None, None, None]

    def out(self) -> Tensor:
        return self.qkv.new_full((self.qkv.shape[0], self.qkv.shape[1] // 3), math.nan)

    def workspace(self, rows: int, num_queries: int = 1) -> AttentionWorkspace:
        _, _, heads, block_size, head_size = self.cache.shape
        context = self.tables.shape[1] * block_size
        workspace = AttentionWorkspace.allocate(rows, heads, head_size, context, self.device, num_queries)
        workspace.partial.fill_(math.nan)
        workspace.lse.fill_(math.nan)
        return workspace

    def scales(self) -> dict[str, float]:
        return {"scale": SCALE, "k_scale": self.k_scale, "v_scale": self.v_scale}

    def rows(self, first: int, end: int) -> Step:
        """Those rows alone, over a copy of the cache."""
        loc = self.query_start_loc
        return Step(
            self.qkv[loc[first] : loc[end]].clone(),
            self.cache.clone(),
            self.tables[first:end].clone(),
            self.seq_lens[first:end].clone(),
            loc[first : end + 1] - loc[first],
            self.k_scale,
            self.v_scale,
        )

    def write(self) -> None:
        """Puts all chunks' keys and values into the cache."""
        block_size = self.cache.shape[3]
        scales = (self.k_scale, self.v_scale)
        for r, seq_len in enumerate(self.seq_lens.tolist()):
            tokens = self.qkv[self.query_start_loc[r] : self.query_start_loc[r + 1]]
            tokens = tokens.view(len(tokens), 3, self.cache.shape[2], -1)
            positions = torch.arange(seq_len - len(tokens), seq_len, device=self.device)
            if seq_len:
                blocks = self.tables[r, positions // block_size].long()
                for half in (0, 1):
                    as_cached = stored(tokens[:, 1 + half], self.cache.dtype, scales[half])
                    self.cache[half][blocks, :, positions % block_size] = as_cached

    def expected(self) -> Tensor:
        """fp32, once the keys and values are written; zeros for muted rows."""
        numbers = self.numbers
        out = torch.zeros(self.qkv.shape[0], self.qkv.shape[1] // 3, device=self.device)
        for r, seq_len in enumerate(self.seq_lens.tolist()):
            begin, end = self.query_start_loc[r], self.query_start_loc[r + 1]
            if seq_len and end > begin:
                positions = torch.arange(seq_len - (end - begin), seq_len, device=self.device)
                arguments = (self.qkv[begin:end].float(), numbers, self.tables[r : r + 1], positions)
                out[begin:end] = reference.paged_attention(*arguments, [0, end - begin], [seq_len], 0, scale=SCALE)
        return out


def stored(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    return (x.float() / scale).clamp(-448, 448).to(dtype) if dtype == FP8 else x.to(dtype)


def make_step(
    device: torch.device,
    dtype: torch.dtype,
    chunks: list[tuple[int, int]],
    *,
    heads: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    cache_dtype: torch.dtype | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Step:
    """chunks: (queries, length with them) of each row; length 0 mutes it. Blocks are shuffled; what of a table a row
    does not need points to poisoned blocks."""
    rng = np.random.default_rng(len(chunks))
    torch.manual_seed(len(chunks))
    cache_dtype = cache_dtype or dtype
    width = max(1, *(-(-length // block_size) for _, length in chunks))
    counts = [-(-length // block_size) for _, length in chunks]
    num_blocks = 1 + sum(counts) + 3
    free = rng.permutation(np.arange(1, num_blocks)).astype(np.int32)
    tables = np.full((len(chunks), width), free[-1], np.int32)
    cache = torch.full((2, num_blocks, heads, block_size, head_size), math.nan)
    for r, (queries, length) in enumerate(chunks):
        tables[r, : counts[r]], free = free[: counts[r]], free[counts[r] :]
        for i in range(counts[r]):
            filled = max(0, min(block_size, length - queries - i * block_size))
            cache[:, tables[r, i], :, :filled] = torch.randn(2, heads, filled, head_size)
    for half, factor in ((0, k_scale), (1, v_scale)):
        cache[half] = stored(cache[half], cache_dtype, factor).float()
    loc = np.concatenate([[0], np.cumsum([queries for queries, _ in chunks])]).astype(np.int32)
    return Step(
        torch.randn(int(loc[-1]), 3 * heads * head_size).to(device, dtype),
        cache.to(device).to(cache_dtype),
        torch.from_numpy(tables).to(device),
        torch.tensor([length for _, length in chunks], dtype=torch.int32, device=device),
        loc,
        k_scale,
        v_scale,
    )


def one_token_rows(lengths: list[int]) -> list[tuple[int, int]]:
    return [(1, length) for length in lengths]


def decode(step: Step, form: str = "fma", workspace: AttentionWorkspace | None = None, **options: Any) -> Tensor:
    workspace = workspace or step.workspace(len(step.seq_lens))
    arguments = (step.qkv, step.cache, step.tables, step.seq_lens, step.out(), workspace)
    return decode_attention(*arguments, **step.scales(), form=form, **options)


def prefill(step: Step, **options: Any) -> Tensor:
    tiles = (torch.from_numpy(part).to(step.device) for part in prefill_tiles(step.query_start_loc, 0))
    arguments = (step.qkv, step.cache, step.tables, step.starts, step.seq_lens, *tiles, step.out())
    return prefill_attention(*arguments, **step.scales(), **options)


def verify(step: Step, tiled: bool = False, **options: Any) -> Tensor:
    count = len(step.seq_lens)
    if tiled:
        rows, starts = (torch.from_numpy(part).to(step.device) for part in verify_tiles(step.query_start_loc, 0))
        options, count = options | {"tile_rows": rows, "tile_starts": starts}, len(rows)
    workspace = step.workspace(count, VERIFY_TILE)
    arguments = (step.qkv, step.cache, step.tables, step.starts, step.seq_lens, step.out(), workspace)
    return verify_attention(*arguments, **step.scales(), **options)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """In 16 bits weights are rounded once and the result once, in units of numbers up to about 4; in fp32 what counts
    is the scores' rounding, in units of numbers up to about 30."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.float(), expected, atol=(64 if found.dtype == F32 else 4) * eps, rtol=eps)


def assert_same_bits(cache: Tensor, expected: Tensor) -> None:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.itemsize]
    assert torch.equal(cache.view(whole), expected.view(whole))


DECODES: list[tuple[list[int], torch.dtype, dict[str, Any]]] = [
    ([1, 16, 257, 1024], F32, {"heads": 1, "block_size": 16}),
    ([31, 32, 33], BF16, {"heads": 4, "block_size": 32}),
    ([65], F16, {"heads": 20, "block_size": 64}),
    ([34], BF16, {"heads": 25, "block_size": 32}),
    ([15, 17, 255, 256, 513], BF16, {"heads": 1, "block_size": 16}),
    ([63, 64, 257], F16, {"heads": 1, "block_size": 64}),
    ([2, 260], F32, {"heads": 1, "head_size": 32, "block_size": 64}),
    ([2, 90], F16, {"head_size": 80, "block_size": 32}),
    ([1, 70], F32, {"head_size": 96, "block_size": 16}),
    ([17, 70], BF16, {"head_size": 128, "block_size": 32}),
    ([3, 40], F32, {"head_size": 20, "block_size": 16}),
    ([1, 33, 258], BF16, {"heads": 1, "cache_dtype": FP8, "block_size": 32, "k_scale": 0.25, "v_scale": 0.5}),
    ([1, 17, 40], F32, {"cache_dtype": FP8, "block_size": 16, "k_scale": 0.02, "v_scale": 3.0}),
    ([40], F16, {"cache_dtype": FP8, "block_size": 64, "heads": 1, "head_size": 80}),
    ([1, 50], F32, {"cache_dtype": F16}),
    ([1, 50], BF16, {"cache_dtype": F32}),
]


@pytest.mark.parametrize("form", ["fma", "dot"])
@pytest.mark.parametrize(("lengths", "dtype", "options"), DECODES, ids=str)
def test_decode_equals_the_reference_and_writes_the_new_keys_and_values(
    lengths: list[int], dtype: torch.dtype, options: dict[str, Any], form: str, device: torch.device
) -> None:
    step = make_step(device, dtype, one_token_rows(lengths), **options)
    after = step.rows(0, len(lengths))
    after.write()
    found = decode(step, form)
    assert_same_bits(step.cache, after.cache)
    assert_near(found, after.expected())


PREFILLS: list[tuple[list[tuple[int, int]], torch.dtype, dict[str, Any]]] = [
    ([(1, 1), (17, 17), (63, 64), (65, 65), (2, 257)], F32, {"heads": 1, "block_size": 16}),
    ([(64, 192), (128, 128), (1, 256), (70, 300)], F16, {"heads": 1, "block_size": 32}),
    ([(33, 70)], F16, {"heads": 20, "block_size": 64}),
    ([(40, 1024)], BF16, {"heads": 1, "block_size": 16}),
    ([(5, 60)], BF16, {"heads": 25, "block_size": 32}),
    ([(70, 70)], F32, {"head_size": 32, "block_size": 64}),
    ([(20, 90)], F16, {"head_size": 80, "block_size": 32}),
    ([(66, 66)], F32, {"head_size": 96}),
    ([(20, 130)], BF16, {"head_size": 128, "block_size": 32}),
    ([(40, 45)], F32, {"head_size": 20}),
    ([(20, 90), (3, 3)], BF16, {"cache_dtype": FP8, "block_size": 32, "k_scale": 0.25, "v_scale": 0.5}),
    ([(20, 90)], F32, {"cache_dtype": FP8, "block_size": 16, "k_scale": 0.02, "v_scale": 3.0}),
    ([(20, 90)], F32, {"cache_dtype": F16}),
]


@pytest.mark.parametrize(("chunks", "dtype", "options"), PREFILLS, ids=str)
def test_prefill_equals_the_reference(
    chunks: list[tuple[int, int]], dtype: torch.dtype, options: dict[str, Any], device: torch.device
) -> None:
    step = make_step(device, dtype, chunks, **options)
    step.write()
    assert_near(prefill(step), step.expected())


@pytest.mark.parametrize(
    ("chunks", "dtype", "options"),
    [
        ([(2, 2), (8, 16), (3, 257), (16, 300), (1, 1024)], F32, {"heads": 1, "block_size": 16}),
        ([(4, 33), (5, 260)], F16, {"heads": 4, "block_size": 32}),
        ([(8, 60)], BF16, {"heads": 20, "block_size": 64}),
        ([(3, 40)], F16, {"head_size": 80, "block_size": 32}),
        ([(3, 40), (2, 258)], BF16, {"cache_dtype": FP8, "block_size": 32, "k_scale": 0.25, "v_scale": 0.5}),
    ],
    ids=str,
)
def test_few_queries_equal_the_reference(
    chunks: list[tuple[int, int]], dtype: torch.dtype, options: dict[str, Any], device: torch.device
) -> None:
    step = make_step(device, dtype, chunks, **options)
    step.write()
    assert_near(verify(step), step.expected())


@pytest.mark.parametrize("kernel", [decode, prefill, verify])
def test_upcast_multiplies_keys_wider_than_queries_unrounded(kernel: Any, device: torch.device) -> None:
    step = make_step(device, BF16, [(1, 40)], cache_dtype=F32)
    step.write()
    step.cache[0] *= 60  # a key rounded to bf16 would then change weights by some percent
    step.qkv.view(3, -1)[1] = (step.qkv.view(3, -1)[1].float() * 60).to(BF16)
    last = step.tables[0, 2], 39 % 16
    step.cache[0, last[0], :, last[1]] = step.qkv.view(3, 2, 64)[1].float()
    assert_near(kernel(step, upcast=True), step.expected())


@pytest.mark.parametrize("form", ["fma", "dot"])
def test_a_decode_row_alone_has_the_bits_that_it_has_in_a_batch(form: str, device: torch.device) -> None:
    lengths = [260, 1, 0, 17, 256]
    step = make_step(device, F16, one_token_rows(lengths), heads=1, block_size=32)
    alone = [step.rows(r, r + 1) for r in range(len(lengths))]
    together = decode(step, form)
    for r, row in enumerate(alone):
        assert torch.equal(decode(row, form)[0], together[r])


def test_a_chunk_alone_has_the_bits_that_it_has_in_a_batch(device: torch.device) -> None:
    step = make_step(device, F16, [(5, 5), (70, 130), (1, 65), (64, 64)], heads=1, block_size=32)
    step.write()
    together = prefill(step)
    for r in range(4):
        assert torch.equal(
            prefill(step.rows(r, r + 1)), together[step.query_start_loc[r] : step.query_start_loc[r + 1]]
        )


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_a_token_has_the_same_bits_in_every_chunk_of_the_few_query_form(
    dtype: torch.dtype, device: torch.device
) -> None:
    """As a chunk of 40, in chunks of 3 and 9, as one draft, and as a decode row."""
    length, queries = 275, 40
    whole = make_step(device, dtype, [(7, 20), (queries, length)], heads=1, block_size=32)
    whole.write()
    expected = verify(whole, tiled=True)[7:]
    assert_near(expected, whole.expected()[7:])
    row = whole.rows(1, 2)
    for begin, end in ((0, 3), (3, 12), (18, 34), (39, 40)):
        part = row.rows(0, 1)
        part.qkv, part.query_start_loc = row.qkv[begin:end], np.array([0, end - begin], np.int32)
        part.seq_lens = torch.tensor([length - queries + end], dtype=torch.int32, device=device)
        assert torch.equal(verify(part), expected[begin:end])
        if end - begin == 1:
            assert torch.equal(decode(part, "dot"), expected[begin:end])


@pytest.mark.parametrize("form", ["fma", "dot"])
def test_padding_rows_get_zeros_and_write_nothing(form: str, device: torch.device) -> None:
    step = make_step(device, F32, one_token_rows([0, 20, 0]), heads=1)
    step.tables[0], step.tables[2] = 0, -1
    step.seq_lens[2] = -5
    after = step.rows(1, 2)
    after.write()
    out = decode(step, form)
    assert_same_bits(step.cache, after.cache)
    assert out[0].eq(0).all()
    assert out[2].eq(0).all()
    assert_near(out[1:2], after.expected())


@pytest.mark.parametrize("kernel", [prefill, verify])
def test_muted_rows_of_several_tokens_get_zeros(kernel: Any, device: torch.device) -> None:
    step = make_step(device, F32, [(4, 0), (3, 20)], heads=1)
    step.write()
    assert_near(kernel(step), step.expected())


@pytest.mark.parametrize("form", ["fma", "dot"])
def test_a_workspace_serves_launch_after_launch(form: str, device: torch.device) -> None:
    step = make_step(device, F16, one_token_rows([300, 5]), heads=1, block_size=64)
    workspace = step.workspace(5)
    first = decode(step, form, workspace)
    assert not workspace.tickets.any()
    assert torch.equal(decode(step, form, workspace), first)


def inside_poison(cache: Tensor) -> tuple[Tensor, Tensor]:
    """(memory, the cache in the middle of it): blocks before and after it are NaN."""
    _, num_blocks, *rest = cache.shape
    memory = cache.new_full((2, 3 * num_blocks, *rest), math.nan)
    memory[:, num_blocks : 2 * num_blocks] = cache
    return memory, memory[:, num_blocks : 2 * num_blocks]


@pytest.mark.parametrize("bad", [-1, -(2**31), "N", 2**31 - 1])
@pytest.mark.parametrize("kernel", [decode, lambda step: decode(step, "dot"), prefill, verify])
def test_a_block_id_out_of_range_is_read_as_the_null_block(kernel: Any, bad: int | str, device: torch.device) -> None:
    step = make_step(device, F32, [(1, 40)], heads=1)
    step.cache[:, 0] = torch.randn(step.cache[:, 0].shape)
    step.write()
    expected = step.rows(0, 1)
    expected.tables[0, 1] = 0
    _, step.cache = inside_poison(step.cache)
    step.tables[0, 1] = step.cache.shape[1] if bad == "N" else bad
    assert_near(kernel(step), expected.expected())


@pytest.mark.parametrize("bad", [-1, -(2**31), "N", 2**31 - 1])
@pytest.mark.parametrize("form", ["fma", "dot"])
def test_a_new_token_without_a_block_is_not_written(form: str, bad: int | str, device: torch.device) -> None:
    step = make_step(device, F32, [(1, 20)], heads=1)
    step.cache[:, 0] = 1.0
    memory, step.cache = inside_poison(step.cache)
    step.tables[0, 1] = step.cache.shape[1] if bad == "N" else bad
    before = memory.clone()
    out = decode(step, form)
    assert_same_bits(memory, before)
    assert out.isfinite().all()


@pytest.mark.parametrize("length", [49, 300, 2**31 - 1])
@pytest.mark.parametrize("kernel", [decode, lambda step: decode(step, "dot"), prefill, verify])
def test_a_length_beyond_the_table_ends_with_the_table(kernel: Any, length: int, device: torch.device) -> None:
    step = make_step(device, F32, [(1, 48), (1, 48), (1, 48)], heads=1)
    step.write()
    expected = step.rows(1, 2).expected()
    memory, step.cache = inside_poison(step.cache)
    before = memory.clone()
    step.tables[0] = step.tables[2] = step.cache.shape[1] + 1
    step.seq_lens = torch.tensor([0, length, 0], dtype=torch.int32, device=device)
    assert_near(kernel(step)[1:2], expected)
    assert_same_bits(memory, before)


@pytest.mark.parametrize("kernel", [prefill_attention, verify_attention])
def test_tiles_and_tokens_out_of_range_are_left_alone(kernel: Any, device: torch.device) -> None:
    step = make_step(device, F32, [(4, 20), (3, 20)], heads=1)
    step.write()

    def launch(tile_rows: list[int], tile_starts: list[int], starts: Tensor) -> Tensor:
        rows, offsets = (torch.tensor(x, dtype=torch.int32, device=device) for x in (tile_rows, tile_starts))
        arguments = (step.qkv, step.cache, step.tables, starts, step.seq_lens)
        if kernel is prefill_attention:
            return kernel(*arguments, rows, offsets, step.out(), scale=SCALE)
        workspace = step.workspace(len(tile_rows), VERIFY_TILE)
        return kernel(*arguments, step.out(), workspace, scale=SCALE, tile_rows=rows, tile_starts=offsets)

    found = launch([-1, 1, 2, 2**31 - 1, -(2**31)], [0] * 5, step.starts)
    assert found[:4].isnan().all()
    assert_near(found[4:], step.expected()[4:])
    assert launch([0, 1], [2**30, 64], step.starts).isnan().all()
    outside = torch.tensor([-(2**30), -(2**30) + 4, 2**30], dtype=torch.int32, device=device)
    assert launch([0], [0], outside).isnan().all()
    outside = torch.tensor([5, 9, 9], dtype=torch.int32, device=device)  # the last two of four are past the end
    found = launch([0], [0], outside)
    assert found[:5].isnan().all()
    assert found[5:].isfinite().all()


@pytest.mark.parametrize("kernel", [decode, lambda step: decode(step, "dot"), prefill, verify])
def test_offsets_beyond_31_bits_reach_their_block(kernel: Any, device: torch.device) -> None:
    """Blocks 2**31 numbers apart: memory that is reserved but, except where written, never touched."""
    stride_block, stride_half, num_bytes = 2**31, 2**31 + 4096, 2**32 + 65536
    if device.type == "cuda":
        memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        memory = torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=torch.uint8)
    far = memory.view(FP8).as_strided((2, 2, 1, 16, 64), (stride_half, stride_block, 1024, 64, 1))
    step = make_step(device, F32, [(1, 14)], heads=1, cache_dtype=FP8)
    step.write()
    expected = step.expected()
    far[:, 1] = step.cache[:, step.tables[0, 0]]
    if kernel not in (prefill, verify):
        far[:, 1, :, 13] = torch.zeros(64, device=device).to(FP8)  # decode writes it again
    step.cache, step.tables = far, torch.ones_like(step.tables)
    assert_near(kernel(step), expected)


def test_strided_rows_of_all_arguments(device: torch.device) -> None:
    step = make_step(device, F32, one_token_rows([20, 40, 7]), heads=1)
    expected = step.rows(0, 3)
    expected.write()
    wide = torch.zeros(3, step.qkv.shape[1] + 16, device=device)
    wide[:, 16:] = step.qkv
    tables = torch.zeros(3, 7, dtype=torch.int32, device=device)
    tables[:, :3] = step.tables
    out = torch.full((6, 64), math.nan, device=device)
    workspace = step.workspace(3)
    decode_attention(wide[:, 16:], step.cache, tables[:, :3], step.seq_lens, out[::2], workspace, scale=SCALE)
    assert_near(out[::2], expected.expected())
    assert out[1::2].isnan().all()


@triton.jit
def decode_e4m3_kernel(out_ptr, HARDWARE: tl.constexpr):
    index = tl.arange(0, 256)
    tl.store(out_ptr + index, decode_e4m3(index.to(tl.uint8), HARDWARE))


def test_every_fp8_number_is_read_exactly(device: torch.device) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(FP8).float().to(device)
    hardware = fp8_form(torch.zeros(1, device=device).to(FP8)) == "hardware"
    for form in {False, hardware}:
        out = torch.zeros(256, device=device)
        decode_e4m3_kernel[(1,)](out, form)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_to_do_is_no_launch(device: torch.device) -> None:
    step = make_step(device, F32, one_token_rows([20]), heads=1)
    empty = step.rows(0, 0)
    for kernel in (decode, prefill, verify):
        workspace = {"workspace": step.workspace(1)} if kernel is decode else {}
        if kernel is verify:
            continue  # needs a workspace of no rows
        assert kernel(empty, **workspace).shape == (0, 128 // 2)


def test_tiles_cover_each_row_from_the_first_one_on() -> None:
    loc = np.array([0, 1, 1 + PREFILL_TILE, 2 + 3 * PREFILL_TILE, 2 + 3 * PREFILL_TILE], np.int32)
    rows, starts = prefill_tiles(loc, 1)
    assert rows.tolist() == [1, 2, 2, 2]
    assert starts.tolist() == [0, 0, PREFILL_TILE, 2 * PREFILL_TILE]
    assert (rows.dtype, starts.dtype) == (np.int32, np.int32)
    assert [len(part) for part in prefill_tiles(loc, 4)] == [0, 0]
    assert verify_tiles(np.array([0, 17], np.int32), 0)[1].tolist() == [0, VERIFY_TILE]


BAD: list[tuple[str, Any]] = [
    ("qkv", torch.zeros(2, 383)),
    ("qkv", torch.zeros(384, 2).t()),
    ("qkv", torch.zeros(2, 384, dtype=torch.float64)),
    ("layer_cache", torch.zeros(2, 3, 2, 24, 64)),
    ("layer_cache", torch.zeros(3, 3, 2, 16, 64)),
    ("layer_cache", torch.zeros(2, 0, 2, 16, 64)),
    ("layer_cache", torch.zeros(2, 3, 16, 2, 64).transpose(2, 3)),
    ("layer_cache", torch.zeros(2, 3, 2, 16, 64, device="meta")),
    ("block_tables", torch.zeros(2, 2, dtype=torch.int64)),
    ("block_tables", torch.zeros(3, 2, dtype=torch.int32)),
    ("block_tables", torch.zeros(2, 0, dtype=torch.int32)),
    ("block_tables", torch.zeros(2, 2, dtype=torch.int32).t()),
    ("block_tables", torch.zeros(2, 17, dtype=torch.int32)),
    ("seq_lens", torch.zeros(2, dtype=torch.int64)),
    ("seq_lens", torch.zeros(4, dtype=torch.int32)[::2]),
    ("out", torch.zeros(2, 127)),
    ("out", torch.zeros(2, 128, dtype=F16)),
    ("out", torch.zeros(128, 2).t()),
    ("scale", math.inf),
    ("k_scale", 2.0),
    ("v_scale", 0.0),
]
BAD_DECODE: list[tuple[str, Any]] = [
    ("seq_lens", torch.zeros(3, dtype=torch.int32)),
    ("form", "wide"),
    ("workspace", AttentionWorkspace.allocate(1, 2, 64, 32, torch.device("cpu"))),
    ("workspace", AttentionWorkspace.allocate(2, 2, 32, 32, torch.device("cpu"))),
    ("workspace", AttentionWorkspace.allocate(2, 3, 64, 32, torch.device("cpu"))),
    ("workspace", AttentionWorkspace.allocate(2, 2, 64, 32, torch.device("meta"))),
]
BAD_PREFILL: list[tuple[str, Any]] = [
    ("query_start_loc", torch.zeros(2, dtype=torch.int32)),
    ("query_start_loc", torch.zeros(3, dtype=torch.int64)),
    ("tile_rows", torch.zeros(2, dtype=torch.int64)),
    ("tile_starts", torch.zeros(3, dtype=torch.int32)),
]


def good_arguments() -> dict[str, Any]:
    ints = {"block_tables": torch.zeros(2, 2, dtype=torch.int32), "seq_lens": torch.zeros(2, dtype=torch.int32)}
    return {"qkv": torch.zeros(2, 384), "layer_cache": torch.zeros(2, 3, 2, 16, 64), "out": torch.zeros(2, 128)} | ints


@pytest.mark.parametrize(("name", "value"), BAD + BAD_DECODE)
def test_a_bad_argument_of_decode_is_named(name: str, value: object) -> None:
    workspace = AttentionWorkspace.allocate(2, 2, 64, 256, torch.device("cpu"))
    named = "workspace" if name == "block_tables" and getattr(value, "shape", ())[1:] == (17,) else name
    if named == "seq_lens" and getattr(value, "shape", ()) == (3,):
        named = "seq_lens|block_tables"
    arguments = good_arguments() | {"workspace": workspace, "scale": 1.0, name: value}
    with pytest.raises(ValueError, match=f"^({named}): "):
        decode_attention(**arguments)


@pytest.mark.parametrize(("name", "value"), [bad for bad in BAD if bad[0] != "block_tables"] + BAD_PREFILL)
@pytest.mark.parametrize("kernel", [prefill_attention, verify_attention])
def test_a_bad_argument_of_prefill_and_verify_is_named(kernel: Any, name: str, value: object) -> None:
    tiles = {key: torch.zeros(2, dtype=torch.int32) for key in ("tile_rows", "tile_starts")}
    arguments = good_arguments() | tiles | {"query_start_loc": torch.zeros(3, dtype=torch.int32), "scale": 1.0}
    if kernel is verify_attention:
        arguments["workspace"] = AttentionWorkspace.allocate(2, 2, 64, 256, torch.device("cpu"), VERIFY_TILE)
    with pytest.raises(ValueError, match=f"^{name}: "):
        kernel(**(arguments | {name: value}))


def test_a_workspace_for_one_query_is_refused_by_the_few_query_form() -> None:
    workspace = AttentionWorkspace.allocate(2, 2, 64, 256, torch.device("cpu"))
    starts = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^workspace: "):
        verify_attention(**good_arguments(), query_start_loc=starts, workspace=workspace, scale=1.0)
    with pytest.raises(ValueError, match=r"^tile_starts: "):
        verify_attention(**good_arguments(), query_start_loc=starts, workspace=workspace, scale=1.0, tile_rows=starts)
    with pytest.raises(ValueError, match=r"^max_context: "):
        AttentionWorkspace.allocate(2, 2, 64, 0, torch.device("cpu"))
