"""What the host writes into the device's state is what a request says, whatever the slot held before."""

from __future__ import annotations

import random

import numpy as np
import torch
from octavo.step import LogprobSpec
from octavo.types import LogprobKind
from octavo.worker.device_states import DeviceStates
from octavo.worker.features import features_of
from octavo.worker.row_lists import lists_of
from octavo_kernels.state import Bitmap, Feature, Param
from worker.sampling import Row, random_row, step_with

VOCAB_SIZE = 97
CPU = torch.device("cpu")
NONE = np.zeros(5, np.bool_)
"""No slot's tokens are chosen on the host."""


def apply(states: DeviceStates) -> None:
    offsets, values = states.take()
    assert len(np.unique(offsets)) == len(offsets)
    states.state.arena[torch.from_numpy(offsets.astype(np.int64))] = torch.from_numpy(values)


def tokens_of(states: DeviceStates, slot: int, bitmap: Bitmap) -> list[int]:
    words = states.state.bitmaps[slot, bitmap].numpy().view(np.uint32)
    return [t for t in range(VOCAB_SIZE) if words[t // 32] >> np.uint32(t % 32) & np.uint32(1)]


def test_a_slot_holds_what_its_last_request_says():
    rng = random.Random(0)
    states = DeviceStates(4, 128, 16, VOCAB_SIZE, CPU)
    for _ in range(60):
        slot, row = rng.randrange(4), random_row(rng, VOCAB_SIZE)
        row.logprobs = rng.choice([None, LogprobSpec(2, LogprobKind.PROCESSED_LOGIT, [3, 5])])
        request = row.request(slot)
        states.stage(step_with(new_requests=[request]), NONE)
        apply(states)
        state, lists = states.state, lists_of(request)
        uses, params = features_of(request), state.params[slot]
        assert int(params[Param.FEATURES]) & 0xFFFFFFFF == int(uses)
        assert int(state.length[slot]) == len(row.token_ids) and int(state.finished[slot]) == 0
        assert state.hist[slot, : len(row.token_ids)].tolist() == row.token_ids
        assert tokens_of(states, slot, Bitmap.EOS) == sorted(set(row.eos))
        assert tokens_of(states, slot, Bitmap.END) == sorted({*row.eos, *row.stop})
        assert tokens_of(states, slot, Bitmap.SUPPRESS) == row.params.get("suppress_tokens", [])
        assert tokens_of(states, slot, Bitmap.BAN) == lists.bans.tolist()
        assert tokens_of(states, slot, Bitmap.ALLOWED) == sorted(row.params.get("allowed_token_ids", []))
        if uses & Feature.REPETITION_PENALTY:
            assert tokens_of(states, slot, Bitmap.SEEN) == sorted(set(row.token_ids))
        if uses & Feature.ENCODER_REPETITION_PENALTY:
            assert tokens_of(states, slot, Bitmap.PROMPT_SEEN) == sorted(set(row.token_ids[: row.prompt_len]))
        count = int(params[Param.NUM_BIASES])
        assert state.bias_ids[slot, :count].tolist() == lists.bias_ids.tolist()
        assert np.array_equal(state.bias_values[slot, :count].numpy().view(np.float32), lists.bias_values)


def test_counts_name_the_distinct_output_tokens_in_order():
    states = DeviceStates(2, 128, 16, VOCAB_SIZE, CPU)
    row = Row(torch.zeros(VOCAB_SIZE), [3, 3, 9, 4, 9, 9, 3], 2, {"frequency_penalty": 0.5})
    states.stage(step_with(new_requests=[row.request(1)]), NONE)
    apply(states)
    assert int(states.state.num_counts[1]) == 3
    assert states.state.count_ids[1, :3].tolist() == [9, 4, 3]
    assert states.state.counts[1, :3].tolist() == [3, 1, 1]


def test_a_table_that_grows_in_the_step_of_its_admission_keeps_both():
    states = DeviceStates(2, 128, 16, VOCAB_SIZE, CPU)
    grown = {"block_slots": [0, 0], "block_columns": [0, 1], "block_ids": [7, 8]}
    arrays = {name: np.array(values, np.int32) for name, values in grown.items()}
    states.stage(step_with(new_requests=[Row(torch.zeros(VOCAB_SIZE), [1], 1).request(0)], **arrays), NONE)
    apply(states)
    assert states.state.block_table[0].tolist() == [7, 8, 0, 0, 0, 0, 0, 0]


def test_the_parts_of_the_state_do_not_overlap():
    state = DeviceStates(3, 100, 16, VOCAB_SIZE, CPU).state
    parts = [value for name in state.__slots__ if isinstance(value := getattr(state, name), torch.Tensor)]
    for number, part in enumerate(parts[1:], 1):
        part.fill_(number)
    for number, part in enumerate(parts[1:], 1):
        assert (part == number).all()


def test_of_a_slot_whose_tokens_the_host_chooses_the_device_knows_tokens_and_blocks_only():
    states = DeviceStates(2, 128, 16, VOCAB_SIZE, CPU)
    params = {"repetition_penalty": 1.3, "bad_words_ids": [[i, 3] for i in range(90)] * 2}
    states.stage(step_with(new_requests=[Row(torch.zeros(VOCAB_SIZE), [4, 5], 2, params).request(1)]), ~NONE)
    apply(states)
    state = states.state
    assert not state.params[1].any() and not state.bitmaps[1].any() and not state.bad_words[1].any()
    assert int(state.length[1]) == 2 and state.hist[1, :3].tolist() == [4, 5, 0]
    states.stage_tokens(1, 2, np.array([6], np.int32))
    states.stage_num_computed(np.array([1]), np.array([2], np.int32))
    apply(states)
    assert int(state.length[1]) == 3 and state.hist[1, :4].tolist() == [4, 5, 6, 0]
    assert int(state.num_computed[1]) == 2 and int(state.num_computed[0]) == 0
    states.stage_tokens(1, 0, np.array([7, 8, 9, 1], np.int32))
    states.stage_table(1, np.arange(8, dtype=np.int32))
    apply(states)
    assert int(state.length[1]) == 4 and state.hist[1, :4].tolist() == [7, 8, 9, 1]
    assert state.block_table[1].tolist() == list(range(8)) and not state.block_table[0].any()
