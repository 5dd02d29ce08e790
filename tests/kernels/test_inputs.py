"""What prepares a step: the state's diffs, the forward pass's inputs, copies of blocks."""

from __future__ import annotations

import dataclasses
import mmap

import numpy as np
import pytest
import torch
from octavo_kernels import inputs, reference
from octavo_kernels.inputs import MAX_PAIRS, StepInputs
from octavo_kernels.state import Finish, SlotState
from torch import Tensor

NUM_SLOTS, N_POSITIONS, VOCAB = 6, 1024, 97
NUM_BLOCKS = 200
POISON = -1234567
MAP_NORESERVE = 0x4000  # Linux; Python's mmap has it from 3.13 on


def ints(values, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def copy_of(state: SlotState) -> SlotState:
    """The same words in another arena."""
    arena = state.arena.clone()
    views = {
        field.name: torch.as_strided(
            arena,
            getattr(state, field.name).shape,
            getattr(state, field.name).stride(),
            getattr(state, field.name).storage_offset() - state.arena.storage_offset(),
        )
        for field in dataclasses.fields(SlotState)
        if field.name not in ("arena", "vocab_size")
    }
    return SlotState(arena=arena, vocab_size=state.vocab_size, **views)


def random_state(block_size: int, device: torch.device, seed: int = 0) -> SlotState:
    """Every slot with a full history and a full table; no request runs yet."""
    generator = torch.Generator().manual_seed(seed)
    state = SlotState.allocate(NUM_SLOTS, N_POSITIONS, block_size, VOCAB, device)
    state.hist.copy_(torch.randint(0, VOCAB, state.hist.shape, generator=generator))
    state.length.fill_(N_POSITIONS)
    state.block_table.copy_(torch.randint(1, NUM_BLOCKS, state.block_table.shape, generator=generator))
    return state


class Guarded:
    """StepInputs in the middle of larger tensors: nothing may be written around it."""

    def __init__(self, num_tokens: int, num_rows: int, num_table_blocks: int, device: torch.device) -> None:
        shapes = {
            "input_ids": (num_tokens,),
            "positions": (num_tokens,),
            "slot_mapping": (num_tokens,),
            "seq_lens": (num_rows,),
            "block_tables": (num_rows, num_table_blocks),
        }
        self.whole: dict[str, Tensor] = {}
        views = {}
        for name, shape in shapes.items():
            dtype = torch.int64 if name == "slot_mapping" else torch.int32
            size = torch.Size(shape).numel()
            self.whole[name] = torch.full((size + 128,), POISON, dtype=dtype, device=device)
            views[name] = self.whole[name][64 : 64 + size].view(shape)
        self.inputs = StepInputs(**views)

    def check(self) -> None:
        for name, tensor in self.whole.items():
            assert (tensor[:64] == POISON).all() and (tensor[-64:] == POISON).all(), f"{name}: written outside"


def check_prepare(
    state: SlotState, slots, starts, num_tokens: int, block_size: int, device: torch.device
) -> StepInputs:
    """Runs kernel and specification; all that they leave is equal."""
    width = state.block_table.shape[1]
    expected_state = copy_of(state)
    expected = StepInputs.allocate(num_tokens, len(slots), width, device)
    guarded = Guarded(num_tokens, len(slots), width, device)
    arguments = ints(slots, device), ints(starts, device)
    sizes = {"block_size": block_size, "num_blocks": NUM_BLOCKS}
    reference.prepare(expected_state, *arguments, expected, **sizes)
    inputs.prepare(state, *arguments, guarded.inputs, **sizes)
    guarded.check()
    for field in dataclasses.fields(StepInputs):
        actual, wanted = getattr(guarded.inputs, field.name), getattr(expected, field.name)
        assert torch.equal(actual, wanted), field.name
    assert torch.equal(state.arena, expected_state.arena)
    return guarded.inputs


# ---- apply_diffs


@pytest.mark.parametrize("capacity", [1, 511, 1300])
def test_diffs_reach_their_words_and_no_others(device: torch.device, capacity: int):
    state = random_state(16, device)
    expected = copy_of(state)
    generator = torch.Generator().manual_seed(capacity)
    offsets = torch.randperm(state.arena.numel(), generator=generator)[:capacity].int().to(device)
    values = torch.randint(-(2**31), 2**31, (capacity,), generator=generator).int().to(device)
    count = ints([capacity - capacity // 3], device)
    reference.apply_diffs(expected, offsets, values, count)
    inputs.apply_diffs(state, offsets, values, count)
    assert torch.equal(state.arena, expected.arena)


def test_diffs_outside_the_arena_and_beyond_the_count_are_skipped(device: torch.device):
    whole = torch.full((1 << 12,), POISON, dtype=torch.int32, device=device)
    state = dataclasses.replace(SlotState.allocate(1, 8, 4, 40, device), arena=whole[1024:2048])
    offsets = ints([-1, -(2**31), 1024, 2**31 - 1, 3, 5, 6, 7], device)
    inputs.apply_diffs(state, offsets, ints([1, 2, 3, 4, 5, 6, 7, 8], device), ints([6], device))
    assert whole[1024 + 3] == 5 and whole[1024 + 5] == 6
    assert (whole == POISON).sum() == whole.numel() - 2


@pytest.mark.parametrize(("count", "written"), [(-5, 0), (0, 0), (2**31 - 1, 4)])
def test_a_wrong_count_reads_no_more_than_there_is(device: torch.device, count: int, written: int):
    state = SlotState.allocate(1, 8, 4, 40, device)
    offsets, values = torch.arange(8, dtype=torch.int32, device=device), torch.ones(8, dtype=torch.int32, device=device)
    inputs.apply_diffs(state, offsets[:4], values[:4], ints([count], device))
    assert state.arena.sum() == written


# ---- prepare


@pytest.mark.parametrize("block_size", [1, 16, 32, 64])
def test_mixed_rows_get_the_inputs_that_the_specification_gives(device: torch.device, block_size: int):
    state = random_state(block_size, device, seed=block_size)
    computed = [255, block_size - 1, block_size, 0, 1023, 17]
    lengths = [1, 1, 2, 257, 1, 256]
    state.num_computed[:NUM_SLOTS] = ints(computed, device)
    order = [4, 0, 1, 5, 2, 3]
    starts = np.cumsum([0] + [lengths[slot] for slot in order]).tolist()
    result = check_prepare(state, order, starts, starts[-1], block_size, device)
    assert result.seq_lens.tolist() == [computed[slot] + lengths[slot] for slot in order]
    assert state.num_computed[:NUM_SLOTS].tolist() == [c + n for c, n in zip(computed, lengths, strict=True)]


def test_steps_follow_each_other_without_the_host(device: torch.device):
    state = random_state(16, device)
    state.num_computed[:2] = ints([1000, 15], device)
    slots, starts = [0, 1], [0, 1, 2]
    for step in range(3):
        result = check_prepare(state, slots, starts, 2, 16, device)
        assert result.positions.tolist() == [1000 + step, 15 + step]
        assert result.input_ids[0] == state.hist[0, 1000 + step]


def test_a_whole_context_is_one_row(device: torch.device):
    result = check_prepare(random_state(32, device), [2], [0, 1024], 1024, 32, device)
    assert result.seq_lens.tolist() == [1024] and (result.slot_mapping >= 0).all()


def test_padding_finished_and_empty_rows_are_muted(device: torch.device):
    state = random_state(16, device)
    state.finished[1] = Finish.EOS
    state.num_computed.fill_(7)
    slots = [0, NUM_SLOTS, 1, NUM_SLOTS, 2, -1, NUM_SLOTS + 1, 2**31 - 1]
    result = check_prepare(state, slots, [0, 1, 2, 5, 6, 6, 7, 8, 9], 20, 16, device)
    assert result.seq_lens.tolist() == [8] + [0] * 7
    assert (result.slot_mapping[1:] == -1).all() and (result.input_ids[1:] == 0).all()
    assert state.num_computed.tolist() == [8] + [7] * NUM_SLOTS


def test_rows_that_would_leave_the_context_are_muted(device: torch.device):
    state = random_state(16, device)
    state.num_computed[:4] = ints([1024, 1020, -1, 2**31 - 1], device)
    result = check_prepare(state, [0, 1, 2, 3], [0, 1, 6, 7, 8], 8, 16, device)
    assert result.seq_lens.tolist() == [0, 0, 0, 0]
    assert state.num_computed[:4].tolist() == [1024, 1020, -1, 2**31 - 1]


def test_wrong_blocks_tokens_and_lengths_are_masked(device: torch.device):
    state = random_state(16, device)
    state.block_table[0, :4] = ints([NUM_BLOCKS, -1, 0, 2**31 - 1], device)
    state.hist[0, :3] = ints([-1, VOCAB, VOCAB - 1], device)
    state.length[0] = 2**31 - 1
    state.length[1] = 3
    result = check_prepare(state, [0, 1], [0, 65, 70], 70, 16, device)
    assert (result.slot_mapping[:64] == -1).all() and result.slot_mapping[64] >= 0
    assert result.input_ids[:3].tolist() == [0, 0, VOCAB - 1]
    assert result.input_ids[68:70].tolist() == [0, 0]
    assert result.block_tables[0, :4].tolist() == [0, 0, 0, 0]


def test_wrong_starts_write_nothing_outside_the_step(device: torch.device):
    state = random_state(16, device)
    result = check_prepare(state, [0, 1, 2], [-5, 3, 2, 4000], 8, 16, device)
    assert result.seq_lens.tolist() == [3, 0, 6]


def test_large_block_ids_do_not_wrap(device: torch.device):
    state = random_state(64, device)
    state.block_table[0, 0] = 2**30
    out = StepInputs.allocate(1, 1, state.block_table.shape[1], device)
    inputs.prepare(state, ints([0], device), ints([0, 1], device), out, block_size=64, num_blocks=2**31 - 1)
    assert out.slot_mapping.tolist() == [2**30 * 64]


# ---- copy_blocks


@pytest.mark.parametrize(
    ("dtype", "heads", "block_size", "head_size"),
    [
        (torch.bfloat16, 4, 16, 64),
        (torch.float32, 3, 32, 20),
        (torch.float16, 1, 1, 5),
        (torch.float8_e4m3fn, 1, 1, 3),
    ],
)
@pytest.mark.parametrize("num_pairs", [1, 3, 19])
def test_chains_and_cycles_read_before_any_write(device: torch.device, dtype, heads, block_size, head_size, num_pairs):
    generator = torch.Generator().manual_seed(num_pairs)
    shape = (2, 2, 40, heads, block_size, head_size)
    raw = (
        torch.randint(0, 256, (*shape[:-1], head_size * dtype.itemsize), generator=generator).to(torch.uint8).to(device)
    )
    cache = raw.clone().view(dtype)
    destinations = torch.randperm(40, generator=generator)[:num_pairs]
    sources = destinations.roll(1)  # a cycle through all of them
    expected = raw.clone()
    expected[:, :, destinations] = raw[:, :, sources]
    inputs.copy_blocks(cache, sources.int().to(device), destinations.int().to(device))
    assert torch.equal(cache.view(torch.uint8), expected)


def test_pairs_out_of_range_copy_nothing(device: torch.device):
    whole = torch.randn(3, 2, 8, 2, 16, 32, device=device)
    before = whole.clone()
    sources, destinations = [-1, 8, 1, 1, 2**31 - 1, 2], [2, 3, -1, 8, 4, 5]
    inputs.copy_blocks(whole[1:2], ints(sources, device), ints(destinations, device))
    expected = before.clone()
    expected[1, :, 5] = before[1, :, 2]
    assert torch.equal(whole, expected)


def test_the_specification_of_copies_is_the_same(device: torch.device):
    cache = torch.randn(2, 2, 12, 2, 16, 32, device=device)
    expected = cache.clone()
    sources, destinations = ints([1, 2, 3, 9], device), ints([2, 3, 1, 4], device)
    reference.copy_blocks(expected, sources.long(), destinations.long())
    inputs.copy_blocks(cache, sources, destinations)
    assert torch.equal(cache, expected)


def test_keys_of_more_than_two_to_the_31_words(device: torch.device):
    shape = (1, 2, 8300, 16, 32, 512)  # 1 MiB a block, 2.2e9 words of keys and as many of values
    if device.type == "cpu":  # address space, of which only what is copied becomes memory
        size = torch.Size(shape).numel() * 4
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        cache = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.float32).view(shape)
    else:
        cache = torch.empty(shape, device=device)
    cache[:, :, 8299] = torch.arange(2, device=device).view(1, 2, 1, 1, 1) + 1.0
    cache[:, :, 1] = 0
    inputs.copy_blocks(cache, ints([8299, 1], device), ints([8201, 8200], device))
    assert (cache[0, 0, 8201] == 1).all() and (cache[0, 1, 8201] == 2).all()
    assert not cache[0, :, 8200].any()


# ---- wrong arguments


def test_wrong_arguments_are_named(device: torch.device):
    state = random_state(16, device)
    good, one = torch.zeros(4, dtype=torch.int32, device=device), ints([1], device)
    out = StepInputs.allocate(4, 4, state.block_table.shape[1], device)
    starts = ints([0, 1, 2, 3, 4], device)
    cache = torch.zeros(1, 2, 4, 1, 16, 64, device=device)
    sizes = {"block_size": 16, "num_blocks": 4}
    wrong = [
        ("offsets", lambda: inputs.apply_diffs(state, good.long(), good, one)),
        ("values", lambda: inputs.apply_diffs(state, good, good[:3], one)),
        ("count", lambda: inputs.apply_diffs(state, good, good, good)),
        ("row_slots", lambda: inputs.prepare(state, good.repeat(2)[::2], starts, out, **sizes)),
        ("query_start_loc", lambda: inputs.prepare(state, good, good, out, **sizes)),
        ("out.seq_lens", lambda: inputs.prepare(state, good, starts, out.narrow(4, 3), **sizes)),
        ("block_size", lambda: inputs.prepare(state, good, starts, out, block_size=32, num_blocks=4)),
        ("block_size", lambda: inputs.prepare(state, good, starts, out, block_size=0, num_blocks=4)),
        ("num_blocks", lambda: inputs.prepare(state, good, starts, out, block_size=16, num_blocks=0)),
        ("num_tokens", lambda: out.narrow(5, 1)),
        ("num_rows", lambda: out.narrow(1, 5)),
        ("cache", lambda: inputs.copy_blocks(cache[..., :32], good, good)),
        ("cache", lambda: inputs.copy_blocks(cache[0], good, good)),
        ("sources", lambda: inputs.copy_blocks(cache, good.long(), good)),
        ("destinations", lambda: inputs.copy_blocks(cache, good, good[:1])),
        ("sources", lambda: inputs.copy_blocks(cache, good.repeat(MAX_PAIRS), good.repeat(MAX_PAIRS))),
    ]
    for name, call in wrong:
        with pytest.raises(ValueError, match=f"^{name}:"):
            call()
