"""Rows that begin with the same blocks are found, whatever the order, and nothing that may change is shared."""

from __future__ import annotations

import random

import numpy as np
import pytest
from octavo.config import ModelConfig, shares_prefixes
from octavo.worker.request_states import RequestStates
from octavo.worker.shared_prefixes import IDS_PER_SLOT, LEAST_SAVED, PrefixFinder, SharedPrefixes
from octavo_kernels.attention_workspace import SPLIT
from octavo_kernels.shared_attention import SHARED_TILE
from worker.sampling import Row, step_with

WIDTH = SPLIT // 32
"""Blocks of a split."""


def make_states(prompt_lens: list[int]) -> RequestStates:
    """Slots 0, 1, ... with prompts of these lengths, each in blocks of its own."""
    states = RequestStates(len(prompt_lens), 1024, 32, 97)
    blocks = np.arange(1, 1 + len(prompt_lens) * 32, dtype=np.int32)
    states.block_table[:-1] = blocks.reshape(len(prompt_lens), 32)
    states.prompt_len[:-1] = prompt_lens
    return states


def share(states: RequestStates, slots: list[int], splits: int) -> None:
    states.block_table[slots, : splits * WIDTH] = states.block_table[slots[0], : splits * WIDTH]


def find(states: RequestStates, slots: list[int], max_tiles: int = 99) -> SharedPrefixes | None:
    rows = np.array(slots, np.int32)
    return PrefixFinder(states).find(rows, states.prompt_len[rows] - 1, max_tiles)


def tiles_of(found: SharedPrefixes | None) -> list[list[int]]:
    assert found is not None
    return [[row for row in tile if row >= 0] for tile in found.tiles.tolist()]


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_a_tile_have_the_same_blocks_where_they_share(seed: int):
    """Prompts that branch like a tree; every row of a group of one prompt gets all that it could."""
    rng = random.Random(seed)
    count = rng.randint(9, 80)
    states = make_states([rng.choice([100, 256, 257, 600, 1000]) for _ in range(count)])
    for splits in (1, 2, 3):
        for _ in range(rng.randint(1, 4)):
            share(states, rng.sample(range(count), rng.randint(2, count)), splits)
    slots = rng.sample(range(count), count)
    found = find(states, slots)
    if found is None:
        return
    tables, placed = states.block_table[slots], [row for tile in tiles_of(found) for row in tile]
    assert sorted(placed) == sorted(set(placed)) and set(np.flatnonzero(found.splits)) <= set(placed)
    assert (found.splits <= (states.prompt_len[slots] - 1) // SPLIT).all()
    for tile in tiles_of(found):
        for split in range(max(found.splits[tile])):
            rows = [row for row in tile if found.splits[row] > split]
            assert len(rows) > 1 or count > SHARED_TILE
            blocks = tables[rows, split * WIDTH : (split + 1) * WIDTH]
            assert (blocks == blocks[0]).all()


def test_groups_are_cut_into_tiles_about_equally_full_and_the_best_are_kept():
    states = make_states([600] * 60)
    share(states, list(range(40)), 1)
    share(states, list(range(40, 52)), 2)
    found = find(states, list(range(60)))
    assert sorted(map(len, tiles_of(found))) == [12, 20, 20]
    assert found is not None and found.splits.tolist() == [1] * 40 + [2] * 12 + [0] * 8
    assert tiles_of(find(states, list(range(60)), max_tiles=1)) == [list(range(40, 52))]
    assert found.tiles.shape == (3, SHARED_TILE)


def test_the_last_token_of_a_prompt_and_what_is_not_computed_are_not_shared():
    states = make_states([513] * 9 + [512, 600])
    share(states, list(range(11)), 2)
    rows, computed = np.arange(11, dtype=np.int32), np.full(11, 512, np.int32)
    found = PrefixFinder(states).find(rows, computed, 9)
    assert found is not None and found.splits.tolist() == [2] * 9 + [1, 0]


def test_shares_that_save_too_little_are_none():
    states = make_states([300] * (LEAST_SAVED + 2))
    share(states, list(range(LEAST_SAVED + 1)), 1)
    assert find(states, list(range(LEAST_SAVED + 1))) is not None
    assert find(states, list(range(1, LEAST_SAVED + 2))) is None
    assert find(states, []) is None
    assert find(make_states([200] * 20), list(range(20))) is None


def test_a_slot_with_another_request_and_a_full_memory_are_looked_at_anew():
    states = make_states([300] * 10)
    share(states, list(range(9)), 1)
    finder, rows = PrefixFinder(states), np.arange(10, dtype=np.int32)
    first = finder.find(rows, rows + 299, 9)
    assert first is not None and first.splits.tolist() == [1] * 9 + [0]
    states.block_table[8:10] = states.block_table[[9, 8]]
    finder.apply(step_with(new_requests=[Row(np.zeros(97), [1], 1).request(slot) for slot in (8, 9)]))
    second = finder.find(rows, rows + 299, 9)
    assert second is not None and second.splits.tolist() == [1] * 8 + [0, 1]
    finder._id_of = {bytes([i]): i for i in range(1 + 11 * IDS_PER_SLOT)}
    finder.apply(step_with())
    assert len(finder._id_of) == 0
    assert finder.find(rows, rows + 299, 9).splits.tolist() == second.splits.tolist()


@pytest.mark.parametrize("off", [{"shared_prefix_attention": False}, {"batch_invariant": True}], ids=str)
def test_nothing_is_shared_where_that_is_off(off: dict[str, bool]):
    assert shares_prefixes(ModelConfig(path="", name=""))
    assert not shares_prefixes(ModelConfig(path="", name="", **off))
