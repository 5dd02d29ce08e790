"""Steps padded to shapes: every row keeps its tokens, and padding is skipped by every kernel's rules."""

from __future__ import annotations

import random

import numpy as np
import pytest
from octavo.worker.step_graphs import MIXED_CHUNKS, decode_buckets, graph_shapes
from octavo.worker.step_layout import StepShape, exact_shape, lay_out, num_words, parts_of

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
