"""Request states and the batch made from them, against a plain loop over rows."""

from __future__ import annotations

import random

import numpy as np
import torch
from octavo.step import SchedulerOutput
from octavo.worker.input_batch import InputBatchBuilder
from octavo.worker.request_states import RequestStates
from worker.sampling import Row, step_with

BLOCK_SIZE = 16
CPU = torch.device("cpu")


def states_with(lengths: list[int], rng: random.Random) -> RequestStates:
    states = RequestStates(len(lengths), 128, BLOCK_SIZE, 97)
    requests = [
        Row(torch.zeros(97), [rng.randrange(97) for _ in range(length)], length).request(slot)
        for slot, length in enumerate(lengths)
    ]
    states.apply(step_with(new_requests=requests))
    return states


def a_step(slots: list[int], computed: list[int], scheduled: list[int], decodes: int) -> SchedulerOutput:
    columns = (np.array(column, np.int32) for column in (slots, computed, scheduled))
    return SchedulerOutput(1, *columns, samples=np.ones(len(slots), bool), num_decode_rows=decodes)


def test_batch_equals_a_loop_over_rows():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(2, 100) for _ in range(8)]
        states = states_with(lengths, rng)
        for slot in range(8):
            blocks = -(-lengths[slot] // BLOCK_SIZE)
            states.block_table[slot, :blocks] = rng.sample(range(1, 200), blocks)
        slots = rng.sample(range(8), rng.randint(1, 8))
        decodes = rng.randint(0, len(slots))
        computed = [lengths[s] - 1 if i < decodes else rng.randrange(lengths[s]) for i, s in enumerate(slots)]
        scheduled = [1 if i < decodes else rng.randint(1, lengths[s] - computed[i]) for i, s in enumerate(slots)]
        step = a_step(slots, computed, scheduled, decodes)
        sampling = np.flatnonzero([computed[i] + scheduled[i] == lengths[s] for i, s in enumerate(slots)])
        batch = InputBatchBuilder(states, CPU).build(step, sampling)
        ids, positions, mapping, last = [], [], [], []
        for i, slot in enumerate(slots):
            for position in range(computed[i], computed[i] + scheduled[i]):
                ids.append(states.hist[slot, position])
                positions.append(position)
                block = states.block_table[slot, position // BLOCK_SIZE]
                mapping.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            if i in sampling:
                last.append(len(ids) - 1)
        assert batch.input_ids.tolist() == ids
        assert batch.positions.tolist() == positions
        assert batch.slot_mapping.tolist() == mapping
        assert batch.logits_indices.tolist() == last
        assert batch.query_start_loc.tolist() == [0, *np.cumsum(scheduled)]
        assert batch.num_tokens == len(ids)
        assert batch.seq_lens.tolist() == [c + n for c, n in zip(computed, scheduled, strict=True)]
        for i, slot in enumerate(slots):
            blocks = -(-batch.seq_lens_np[i] // BLOCK_SIZE)
            assert batch.block_tables[i, :blocks].tolist() == states.block_table[slot, :blocks].tolist()
            assert not batch.block_tables[i, blocks:].any()


def test_muted_rows_touch_the_null_block_only():
    states = states_with([20, 20, 20], random.Random(0))
    states.block_table[:3, :2] = [[1, 2], [3, 4], [5, 6]]
    states.fail(np.array([1], np.int32))
    batch = InputBatchBuilder(states, CPU).build(a_step([0, 1, 2], [19] * 3, [1] * 3, 3), np.array([0, 2]))
    assert batch.slot_mapping.tolist() == [2 * 16 + 3, 0, 6 * 16 + 3]
    assert batch.block_tables.tolist() == [[1, 2], [0, 0], [5, 6]]
    assert batch.seq_lens.tolist() == [20, 1, 20]
    assert batch.logits_indices.tolist() == [0, 2]


def test_diffs_apply_in_order():
    states = states_with([20, 5], random.Random(0))
    new = Row(torch.zeros(97), [7, 8], 2).request(0)
    columns = {"block_slots": [0, 1], "block_columns": [0, 1], "block_ids": [9, 11]}
    states.apply(
        step_with(freed_slots=[0], new_requests=[new], **{k: np.array(v, np.int32) for k, v in columns.items()})
    )
    assert states.hist[0, :4].tolist() == [7, 8, 0, 0]
    assert states.block_table[:2, :2].tolist() == [[9, 0], [0, 11]]
    assert states.length[:2].tolist() == [2, 5]
