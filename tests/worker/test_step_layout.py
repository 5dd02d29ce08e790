"""Steps padded to shapes: every row keeps its tokens, and padding is skipped by every kernel's rules."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from octavo.worker.shared_prefixes import SharedPrefixes
from octavo.worker.step_graphs import MIXED_CHUNKS, StepGraphs, decode_buckets, graph_shapes
from octavo.worker.step_layout import StepShape, exact_shape, lay_out, most_words, num_words, parts_of
from octavo_kernels.shared_attention import SHARED_TILE

PADDING = 99


def random_step(rng: random.Random) -> tuple[np.ndarray, np.ndarray, int]:
    """Slots, tokens of each row, and how many rows of one token come first."""
    decodes, prefills = rng.randint(0, 9), rng.randint(0, 4)
    lengths = [1] * decodes + [rng.choice([2, 3, 64, 65, 200]) for _ in range(prefills)]
    slots = rng.sample(range(PADDING), len(lengths))
    return np.array(slots, np.int32), np.array(lengths, np.int32), decodes


@pytest.mark.parametrize("seed", range(30))
def test_rows_keep_their_tokens_in_any_shape_that_holds_them(seed: int):
    rng = random.Random(seed)
    slots, lengths, decodes = random_step(rng)
    exact = exact_shape(lengths, decodes, history=False)
    more = [rng.choice([0, 1, 7]), rng.choice([0, 1, 3]), rng.choice([0, 1, 64, 130])]
    shape = StepShape(decodes + more[0], exact.prefill_rows + more[1], exact.prefill_tokens + more[2])
    assert shape.holds(exact)
    samples = np.array([rng.random() < 0.7 for _ in slots], bool)
    layout = lay_out(shape, slots, lengths, decodes, samples, PADDING)
    parts = parts_of(layout.words, shape)
    assert len(layout.words) == num_words(shape)
    assert parts.row_slots[layout.places].tolist() == slots.tolist()
    assert np.delete(parts.row_slots, layout.places).tolist() == [PADDING] * (shape.num_rows - len(slots))
    assert np.diff(parts.query_start_loc)[layout.places].tolist() == lengths.tolist()
    assert (np.diff(parts.query_start_loc)[: shape.decode_rows] == 1).all()
    assert parts.query_start_loc[-1] <= shape.num_tokens
    chosen = parts.sample_slots != PADDING
    assert parts.sample_slots[chosen].tolist() == slots[samples].tolist()
    assert (parts.logits_indices == np.maximum(parts.query_start_loc[1:] - 1, 0)).all()
    covered = [
        (row, start + i)
        for row, start in zip(parts.tile_rows, parts.tile_starts, strict=True)
        if row >= 0
        for i in range(min(64, int(np.diff(parts.query_start_loc)[row]) - start))
    ]
    rows = layout.places[decodes:]
    assert covered == [(row, i) for row, length in zip(rows, lengths[decodes:], strict=True) for i in range(length)]


@pytest.mark.parametrize("max_rows", [1, 3, 8, 250, 512, 700])
def test_buckets_waste_little_and_reach_every_batch(max_rows: int):
    buckets = decode_buckets(max_rows)
    assert buckets == sorted(set(buckets)) and buckets[-1] == max_rows
    for rows in range(1, max_rows + 1):
        bucket = next(b for b in buckets if b >= rows)
        assert bucket - rows < max(1, rows) and bucket - rows <= 31


def test_shapes_are_captured_decode_first_and_each_group_largest_first():
    shapes = list(graph_shapes(64, 2048))
    assert len(set(shapes)) == len(shapes)
    assert shapes[0] == StepShape(64) and shapes[len(decode_buckets(64)) - 1] == StepShape(1)
    assert {(s.prefill_rows, s.prefill_tokens) for s in shapes if s.prefill_rows} == set(MIXED_CHUNKS)
    assert not [s for s in graph_shapes(4, 100) if s.prefill_rows > 4 or s.prefill_tokens > 100]


def test_what_rows_share_has_a_place_in_shapes_for_it_only():
    tiles = np.full((2, SHARED_TILE), -1, np.int32)
    tiles[0, :3], tiles[1, :2] = [4, 0, 2], [1, 5]
    prefixes = SharedPrefixes(np.array([1, 2, 1, 0, 1, 2], np.int32), tiles)
    rows = (np.arange(6, dtype=np.int32), np.ones(6, np.int32), 6, np.ones(6, bool), PADDING)
    shape = StepShape(24, shared=True)
    parts = parts_of(lay_out(shape, *rows, prefixes).words, shape)
    assert parts.shared_tiles.reshape(-1, SHARED_TILE).tolist() == [*tiles.tolist(), [-1] * SHARED_TILE]
    assert parts.shared_splits.tolist() == [1, 2, 1, 0, 1, 2] + [0] * 18
    plain = StepShape(24)
    assert np.array_equal(lay_out(plain, *rows, prefixes).words, lay_out(plain, *rows).words)
    padding = parts_of(lay_out(shape, *rows).words, shape)
    assert not padding.shared_splits.any() and (padding.shared_tiles == -1).all()
    for shape in [*graph_shapes(64, 2048, shared=True), *graph_shapes(2, 8)]:
        assert num_words(shape) <= most_words(64 + 64, 2048 + 64)


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (8, 4, 64, 11)], ids=["exact", "padded"])
def test_rows_with_drafts_have_a_place_behind_each_of_their_tokens(padding: tuple[int, int, int, int]):
    """Two rows that decode, one with part of a prompt, and three with drafts, the second of which chooses nothing."""
    slots, lengths = np.arange(10, 16, dtype=np.int32), np.array([1, 1, 5, 4, 2, 3], np.int32)
    drafts = [np.array(ids, np.int32) for ids in ([7, 0, 9], [5], [3, 4])]
    samples = np.array([True, True, False, True, False, True])
    exact = exact_shape(lengths, 2, history=False, drafts=drafts)
    assert exact == StepShape(2, 1, 5, draft_rows=4, draft_tokens=9, draft_rounds=3)
    decodes, rows, tokens, rounds = (a + b for a, b in zip((2, 4, 9, 3), padding, strict=True))
    shape = StepShape(decodes, 1, 5, draft_rows=rows, draft_tokens=tokens, draft_rounds=rounds)
    assert shape.holds(exact) and not shape.holds(StepShape(2, 1, 5)) and not StepShape(8, 4, 64).holds(exact)
    layout = lay_out(shape, slots, lengths, 2, samples, PADDING, drafts=drafts)
    parts = parts_of(layout.words, shape)
    assert layout.places.tolist() == [0, 1, *range(decodes, decodes + 4)]
    assert parts.row_slots[layout.places].tolist() == slots.tolist()
    starts = parts.query_start_loc[layout.places]
    assert np.diff(parts.query_start_loc)[layout.places].tolist() == lengths.tolist()
    assert parts.logits_indices[layout.places].tolist() == [0, 1, starts[2] + 4, *starts[3:]]
    ids = np.full(shape.num_tokens, -1)
    for start, draft in zip(starts[3:], drafts, strict=True):
        ids[start + 1 : start + 1 + len(draft)] = draft
    assert parts.draft_ids.tolist() == ids[decodes:].tolist()
    chosen = parts.sample_slots != PADDING
    assert parts.sample_slots[chosen].tolist() == [10, 11, 13, 15, 13, 15, 13, 15, 13]
    assert parts.tile_rows.tolist() == [decodes], "drafts have tiles of their own"
    for number, (slot_ids, drafted, indices) in enumerate(
        [([13, 15], [7, 3], [1, 1]), ([13, 15], [0, 4], [2, 2]), ([13], [9], [3])]
    ):
        places = np.arange(shape.num_places)[shape.round_places(number)]
        assert places[0] % 4 == 0
        of_round = chosen[places]
        assert parts.sample_slots[places][of_round].tolist() == slot_ids
        assert parts.drafted.reshape(-1, rows)[number][of_round].tolist() == drafted
        begins = starts[[3, 5][: len(indices)]]
        assert parts.logits_indices[places][of_round].tolist() == [b + i for b, i in zip(begins, indices, strict=True)]


class Program:
    """As much of a StepProgram as the choice of a shape needs."""

    device, padding_slot = torch.device("cpu"), PADDING

    def write(self, layout: object) -> None:
        pass


def test_shares_are_given_up_rather_than_a_graph():
    graphs = StepGraphs(Program())
    assert graphs.shape_for(StepShape(5, shared=True)) == StepShape(5, shared=True)
    graphs.capture(graph_shapes(64, 2048, shared=True), 60.0)
    assert graphs.shape_for(StepShape(5)) == StepShape(8)
    assert graphs.shape_for(StepShape(5, shared=True)) == StepShape(8, shared=True)
    assert graphs.shape_for(StepShape(5, 3, 50, shared=True)) == StepShape(16, 4, 64, shared=True)
    assert graphs.shape_for(StepShape(5, history=True, shared=True)) == StepShape(8, history=True)
    assert graphs.shape_for(StepShape(65, shared=True)) == StepShape(65, shared=True)
    exact = StepShape(5, shared=True, draft_rows=4, draft_tokens=17, draft_rounds=5)
    assert graphs.shape_for(exact) == StepShape(16, draft_rows=4, draft_tokens=64, draft_rounds=15)


def test_shapes_with_shares_come_last():
    plain, shared = list(graph_shapes(64, 2048)), list(graph_shapes(64, 2048, shared=True))
    assert shared[: len(plain)] == plain
    assert all(shape.shared and shape.decode_rows >= 4 and not shape.history for shape in shared[len(plain) :])
