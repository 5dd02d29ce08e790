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
    assert (parts.last_tokens == np.maximum(parts.query_start_loc[1:] - 1, 0)).all()
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
    for shape in graph_shapes(64, 2048, shared=True):
        assert num_words(shape) <= most_words(64 + 64, 2048 + 64)


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


def test_shapes_with_shares_come_last():
    plain, shared = list(graph_shapes(64, 2048)), list(graph_shapes(64, 2048, shared=True))
    assert shared[: len(plain)] == plain
    assert all(shape.shared and shape.decode_rows >= 4 and not shape.history for shape in shared[len(plain) :])
