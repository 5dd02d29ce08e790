"""The CPU's attention and cache writes against their specification, kernels/octavo_kernels/reference.py."""

import math

import numpy as np
import pytest
import torch
from octavo.checkpoint import ModelSpec
from octavo.config import CacheConfig, SchedulerConfig
from octavo.errors import StartupError
from octavo.worker.kv_cache import CPU_MEMORY, PADDING_ROWS, KVCache, num_blocks_that_fit, step_memory
from octavo_kernels import reference
from octavo_kernels.checks import FP8
from octavo_kernels.cpu import native_attention
from octavo_kernels.cpu.attention import PagedAttention
from octavo_kernels.cpu.fp8 import widen
from octavo_kernels.cpu.native_attention import NativeAttention
from octavo_kernels.state import SlotState

HEADS, SIZE = 3, 32
WIDTH = HEADS * SIZE
CPU = torch.device("cpu")


KERNELS = [PagedAttention]
if native_attention.supports(torch.float32, SIZE):
    KERNELS.append(NativeAttention)
each_kernel = pytest.mark.parametrize("kind", KERNELS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_step(rng, num_rows, num_decode_rows, block_size, longest):
    """Lengths, chunk sizes and shuffled tables of a step: (query_start_loc, seq_lens, tables, slots, num_blocks)."""
    seq_lens = rng.integers(1, longest + 1, num_rows).astype(np.int32)
    sizes = np.array([1 if r < num_decode_rows else rng.integers(1, n + 1) for r, n in enumerate(seq_lens)])
    query_start_loc = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    counts = -(-seq_lens // block_size)
    num_blocks = int(counts.sum()) + 4  # the null block and three of nobody
    free = rng.permutation(np.arange(1, num_blocks)).astype(np.int32)
    tables = np.zeros((num_rows, counts.max()), np.int32)
    slots = []
    for r, count in enumerate(counts):
        tables[r, :count], free = free[:count], free[count:]
        position = np.arange(seq_lens[r] - sizes[r], seq_lens[r])
        slots.append(tables[r, position // block_size].astype(np.int64) * block_size + position % block_size)
    return query_start_loc, seq_lens, tables, np.concatenate(slots), num_blocks


def context_written_before(rng, cache, query_start_loc, seq_lens, tables, block_size):
    """What earlier steps left: numbers up to each row's chunk, zeros in the rest of the block they ended in."""
    for r, seq_len in enumerate(seq_lens):
        context = int(seq_len) - int(query_start_loc[r + 1] - query_start_loc[r])
        for i in range(-(-context // block_size)):
            cache[:, tables[r, i]] = 0
            filled = min(block_size, context - i * block_size)
            numbers = rng.standard_normal((2, HEADS, filled, SIZE)).astype(np.float32)
            cache[:, tables[r, i], :, :filled] = torch.from_numpy(numbers).to(cache.dtype)


def positions_of(query_start_loc, seq_lens):
    rows = zip(np.diff(query_start_loc), seq_lens, strict=True)
    return torch.from_numpy(np.concatenate([np.arange(seq_len - size, seq_len) for size, seq_len in rows]))


@each_kernel
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (FP8, {"k_scale": 0.5, "v_scale": 0.004}),  # values beyond 448 are limited
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize(("num_rows", "num_decode_rows"), [(1, 1), (1, 0), (40, 40), (5, 0), (23, 17)])
def test_write_and_attend_equal_the_reference(num_rows, num_decode_rows, block_size, dtype, scales, kind):
    rng = np.random.default_rng(num_rows)
    kernel = kind(HEADS, SIZE, block_size, dtype)
    if kind is PagedAttention:
        kernel.blocks_per_group = 6  # several groups, padded ones among them
    for longest in (block_size // 2, 5 * block_size):
        loc, seq_lens, tables, slots, num_blocks = random_step(rng, num_rows, num_decode_rows, block_size, longest)
        expected_cache = torch.full((2, num_blocks, HEADS, block_size, SIZE), math.nan, dtype=dtype)
        context_written_before(rng, expected_cache, loc, seq_lens, tables, block_size)
        cache = expected_cache.clone()
        qkv = torch.from_numpy(rng.standard_normal((len(slots), 3 * WIDTH)).astype(np.float32))
        plan = kernel.plan(num_blocks, slots, loc, seq_lens, tables, num_decode_rows)
        kernel.write(plan, qkv, cache, **scales)
        found = kernel.attend(plan, qkv, cache, 0.2, **scales)
        reference.kv_write(qkv, expected_cache, torch.from_numpy(slots), **scales)
        written = ~expected_cache.isnan()
        assert torch.equal(cache.float()[written], expected_cache.float()[written])
        table = torch.from_numpy(tables)
        expected = reference.paged_attention(
            qkv,
            expected_cache,
            table,
            positions_of(loc, seq_lens),
            loc.tolist(),
            seq_lens.tolist(),
            num_decode_rows,
            scale=0.2,
            **scales,
        )
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03 if dtype is torch.bfloat16 else 2e-6)


def test_every_fp8_number_is_widened_exactly_and_the_nearest_is_taken():
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(FP8).float()
    for part in (codes, codes[~expected.isnan()]):  # NaN has a way of its own
        found = widen(part.view(torch.int8), torch.empty(len(part), dtype=torch.int16), torch.empty(len(part)))
        assert torch.equal(found.nan_to_num(1e9), part.view(FP8).float().nan_to_num(1e9))
    numbers = torch.tensor([1e9, -1e9, 449.0, math.inf, 1.0625, 1.1875, math.nan])
    assert str(reference.to_fp8(numbers * 4, 4.0).tolist()) == "[448.0, -448.0, 448.0, 448.0, 1.0, 1.25, nan]"


def test_entering_a_block_zeroes_what_its_last_owner_left():
    kernel = PagedAttention(HEADS, SIZE, 16, torch.float32)
    cache = torch.full((2, 4, HEADS, 16, SIZE), math.nan)
    tables, slots = np.array([[2, 3]], np.int32), np.concatenate([np.arange(32, 48), np.arange(48, 53)])
    plan = kernel.plan(4, slots, np.array([0, 21], np.int32), np.array([21], np.int32), tables, 0)
    kernel.write(plan, torch.ones(21, 3 * WIDTH), cache)
    assert torch.equal(cache[:, 2], torch.ones_like(cache[:, 2]))
    assert bool((cache[:, 3, :, :5] == 1).all())
    assert bool((cache[:, 3, :, 5:] == 0).all())
    assert bool(cache[:, :2].isnan().all())


@each_kernel
def test_a_row_that_is_not_finite_stays_alone(kind):
    kernel = kind(HEADS, SIZE, 16, torch.bfloat16)
    cache = torch.zeros(2, 4, HEADS, 16, SIZE, dtype=torch.bfloat16)
    qkv = torch.ones(2, 3 * WIDTH)
    qkv[0] = math.nan
    loc, tables = np.array([0, 1, 2], np.int32), np.array([[1, 0], [2, 3]], np.int32)
    plan = kernel.plan(4, np.array([16, 48]), loc, np.array([1, 17], np.int32), tables, 2)
    kernel.write(plan, qkv, cache)
    found = kernel.attend(plan, qkv, cache, 1.0)
    assert bool(found[0].isnan().all())
    assert bool(torch.isfinite(found[1]).all())


@each_kernel
def test_rows_may_share_blocks(kind):
    rng = np.random.default_rng(0)
    kernel = kind(HEADS, SIZE, 16, torch.float32)
    cache = torch.from_numpy(rng.standard_normal((2, 5, HEADS, 16, SIZE)).astype(np.float32))
    tables, lens = np.array([[1, 2], [1, 3], [1, 4]], np.int32), np.array([20, 20, 31], np.int32)
    loc, slots = np.arange(4, dtype=np.int32), np.array([35, 51, 78])
    qkv = torch.from_numpy(rng.standard_normal((3, 3 * WIDTH)).astype(np.float32))
    plan = kernel.plan(5, slots, loc, lens, tables, 3)
    kernel.write(plan, qkv, cache)
    table, positions = torch.from_numpy(tables), torch.from_numpy(lens - 1)
    expected = reference.paged_attention(qkv, cache, table, positions, [0, 1, 2, 3], lens.tolist(), 3, scale=1)
    torch.testing.assert_close(kernel.attend(plan, qkv, cache, 1.0), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("num_decode_rows", [0, 1])
def test_large_queries_and_keys_stay_in_the_range_of_fp16(num_decode_rows):
    """64 * 40 * 40 is beyond 65504; what softmax sees is not."""
    cache = torch.zeros(2, 2, 1, 16, 64, dtype=torch.float16)
    qkv = torch.full((1, 3 * 64), 40, dtype=torch.float16)
    reference.kv_write(qkv, cache, torch.tensor([16]))
    table, position = torch.tensor([[1]]), torch.tensor([0])
    found = reference.paged_attention(qkv, cache, table, position, [0, 1], [1], num_decode_rows, scale=0.125)
    assert found.tolist() == [[40] * 64]


def test_decode_rows_in_groups_give_what_all_rows_together_give():
    rng = np.random.default_rng(1)
    loc, seq_lens, tables, slots, num_blocks = random_step(rng, 23, 20, 16, 90)
    cache = torch.full((2, num_blocks, HEADS, 16, SIZE), math.nan)
    context_written_before(rng, cache, loc, seq_lens, tables, 16)
    qkv = torch.from_numpy(rng.standard_normal((len(slots), 3 * WIDTH)).astype(np.float32))
    reference.kv_write(qkv, cache, torch.from_numpy(slots))
    arguments = qkv, cache, torch.from_numpy(tables), positions_of(loc, seq_lens), loc.tolist(), seq_lens.tolist(), 20
    together = reference.paged_attention(*arguments, scale=0.2)
    per_row = reference.attention_bytes(HEADS, SIZE, 1, tables.shape[1] * 16, 4)
    for workspace in (1, 3 * per_row, 19 * per_row + 1):
        found = reference.paged_attention(*arguments, scale=0.2, workspace=workspace)
        torch.testing.assert_close(found, together, rtol=0, atol=2e-6)


SPEC = ModelSpec(vocab_size=11, n_positions=64, n_embd=8, n_layer=3, n_head=2)


def test_block_copies_reach_every_layer_and_read_before_any_is_written():
    cache = KVCache(SPEC, 4, 16, dtype=torch.float32, device=CPU)
    assert cache.data.shape == (3, 2, 5, 2, 16, 4)
    cache.data.copy_(torch.arange(5.0)[None, None, :, None, None, None].expand_as(cache.data))
    cache.copy_blocks([(1, 2), (2, 1), (1, 3)])
    cache.copy_blocks([])
    assert cache.data[:, :, :, 0, 0, 0].tolist() == [[[0, 2, 1, 1, 4]] * 2] * 3


def fitting(spec=SPEC, max_num_requests=4, max_model_len=65, cache_dtype=torch.float32, **cache) -> int:
    return num_blocks_that_fit(
        spec,
        CacheConfig(block_size=16, **cache),
        SchedulerConfig(max_num_requests=max_num_requests),
        max_model_len=max_model_len,
        dtype=torch.float32,
        cache_dtype=cache_dtype,
        device=CPU,
    )


def test_the_cache_is_as_large_as_asked_and_never_larger_than_useful():
    per_block = KVCache.bytes_per_block(SPEC, 16, torch.float32)
    assert per_block == 3 * 2 * 8 * 16 * 4
    assert fitting(num_blocks=3) == 3
    assert fitting(memory=11 * per_block) == 10  # the null block counts
    assert fitting(memory=11 * per_block, cache_dtype=FP8, max_num_requests=64) == 43
    assert fitting() == 2 * 4 * 4
    gpt2 = ModelSpec()
    large = fitting(gpt2, max_num_requests=256, max_model_len=1025)
    assert (large + 1) * KVCache.bytes_per_block(gpt2, 16, torch.float32) <= CPU_MEMORY


def test_a_gpu_keeps_memory_for_the_largest_step_and_for_the_state_of_all_requests():
    large = ModelSpec(n_embd=1280, n_layer=36, n_head=20)
    state = SlotState.bytes_per_slot(1024, 32, 50257)
    per_place = 50257 * 8 + 4 * 1280 * 4 + (32 << 10)
    per_request, drafts = per_place + state, 256 * per_place
    scheduler = SchedulerConfig(max_num_requests=256, max_num_batched_tokens=2048)
    per_token = (7 * 1280 + 2 * 5120) * 2
    rows, padding = 256 + PADDING_ROWS, PADDING_ROWS
    graphs = 2  # they keep activations of their own
    found = step_memory(large, scheduler, 32, torch.bfloat16)
    assert found == graphs * (2048 + rows) * per_token + rows * per_request + drafts
    short = SchedulerConfig(max_num_requests=2, max_num_batched_tokens=64)
    rows = 2 + padding
    expected = graphs * (64 + rows) * per_token + rows * per_request + drafts
    assert step_memory(large, short, 32, torch.bfloat16) == expected


def test_a_cache_too_small_for_one_sequence_is_refused_with_the_size_it_needs():
    with pytest.raises(StartupError, match="one sequence of 1025 tokens needs 64"):
        fitting(ModelSpec(), max_model_len=1025, memory=1 << 20)
