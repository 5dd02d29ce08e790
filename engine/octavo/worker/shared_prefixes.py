"""Which decode rows of a step begin with the same blocks, so that attention reads these once for several of them.

Prefix-cache hits, the sequences of one prompt and the beams of a search have blocks in common. What counts is whole
splits of the context (`octavo_kernels.shared_attention`) that lie in the prompts: these never change while a request
has its slot, so that a layout with shares serves all the steps in which the same rows decode. Blocks are compared, not
tokens: two rows that computed the same prompt side by side share nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from octavo_kernels.attention_workspace import SPLIT
from octavo_kernels.shared_attention import SHARED_TILE

from octavo.step import Bools, Int32s, SchedulerOutput
from octavo.worker.request_states import Int64s, RequestStates

LEAST_SAVED: Final = 8
"""Splits that need not be read again, from which on shares are worth another launch per layer (1 to 2 us, predicted:
2048 tokens of gpt2-large come from a GPU's L2 cache in that time)."""
IDS_PER_SLOT: Final = 16
"""Prefixes that are remembered, for each slot, before all are forgotten."""


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """What N decode rows share."""

    splits: Int32s
    """[N] from the first on; 0: nothing."""
    tiles: Int32s
    """[T, SHARED_TILE] the rows that share something, in tiles; -1: none. The best come first."""


class PrefixFinder:
    """Knows a prompt's prefixes from the first step on in which its request decodes."""

    def __init__(self, states: RequestStates) -> None:
        self._states = states
        num_splits = states.block_table.shape[1] * states.block_size // SPLIT
        self._ids = np.zeros((states.num_slots + 1, num_splits), np.int64)
        """[S + 1, P] of the prompt's first p + 1 splits: equal where all blocks are. 0: the prompt is shorter."""
        self._is_known = np.zeros(states.num_slots + 1, np.bool_)
        self._id_of: dict[bytes, int] = {}

    def apply(self, step: SchedulerOutput) -> None:
        """Requests that enter get slots that others had."""
        if step.new_requests:
            self._is_known[[request.slot for request in step.new_requests]] = False
        if len(self._id_of) > IDS_PER_SLOT * len(self._ids):
            self._id_of.clear()
            self._is_known[:] = False

    def find(self, slots: Int32s, num_computed: Int32s, max_tiles: int) -> SharedPrefixes | None:
        """What the rows in these slots share, in at most max_tiles tiles; None if that is too little.

        num_computed: [N] tokens of each row whose keys and values are in the cache.
        """
        known: Bools = self._is_known[slots]
        if not known.all():
            self._learn(slots[~known], num_computed[~known])
        if not self._id_of:
            return None
        ids = self._ids[slots]
        if not _some_repeat(ids[:, 0]):
            return None
        order = np.lexsort(ids.T[::-1])  # by the first split, then the next: equal prefixes are together
        ids = _repeated(ids[order])
        tile, begins = _tiles(ids[:, 0])
        common = np.maximum.reduceat(ids, begins)[tile]  # one prefix that several of the tile's rows have
        shared = np.logical_and.accumulate((ids == common) & (ids > 0), axis=1).sum(1)
        saved = np.add.reduceat(shared, begins) - np.maximum.reduceat(shared, begins)
        best = np.argsort(-saved, kind="stable")[:max_tiles]
        best = best[saved[best] > 0]
        if saved[best].sum() < LEAST_SAVED:
            return None
        return _placed(order, tile, begins, shared, best)

    def _learn(self, slots: Int32s, num_computed: Int32s) -> None:
        """Gives ids to the prefixes of prompts that are computed but for the last token."""
        states = self._states
        width = SPLIT // states.block_size
        for slot, computed in zip(slots.tolist(), num_computed.tolist(), strict=True):
            before = int(states.prompt_len[slot]) - 1
            self._ids[slot] = 0
            if computed < before:
                continue
            self._is_known[slot] = True
            for split in range(before // SPLIT):
                blocks = states.block_table[slot, : (split + 1) * width].tobytes()
                self._ids[slot, split] = self._id_of.setdefault(blocks, len(self._id_of) + 1)


def _some_repeat(ids: Int64s) -> bool:
    ordered = np.sort(ids)
    return bool(((ordered[1:] == ordered[:-1]) & (ordered[1:] > 0)).any())


def _repeated(ids: Int64s) -> Int64s:
    """[N, P] in order; 0 where neither row beside has the same."""
    same = ids[1:] == ids[:-1]
    repeated = np.zeros(ids.shape, np.bool_)
    repeated[1:] = same
    repeated[:-1] |= same
    return np.where(repeated, ids, 0)


def _tiles(groups: Int64s) -> tuple[Int64s, Int64s]:
    """[N] the tile of each of N rows in ascending order of their groups, [T] the first row of each tile. Tiles of a
    group are about equally full."""
    is_first = _differs_from_last(groups)
    begins = is_first.nonzero()[0]
    group = is_first.cumsum() - 1
    sizes = np.append(begins[1:], len(groups)) - begins
    numbers = (sizes + SHARED_TILE - 1) // SHARED_TILE
    within = np.arange(len(groups)) - begins[group]
    tile: Int64s = (numbers.cumsum() - numbers)[group] + within * numbers[group] // sizes[group]
    return tile, _differs_from_last(tile).nonzero()[0]


def _differs_from_last(values: Int64s) -> Bools:
    """Of each value; the first one does."""
    differs = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=differs[1:])
    return differs


def _placed(order: Int64s, tile: Int64s, begins: Int64s, shared: Int64s, best: Int64s) -> SharedPrefixes:
    """order, tile, shared: [N] rows, their tiles, what they share. begins: where tiles begin. best: tiles to keep."""
    places = np.full(len(begins), -1)
    places[best] = np.arange(len(best))
    place = places[tile]
    kept = place >= 0
    splits = np.zeros(len(order), np.int32)
    splits[order[kept]] = shared[kept]
    tiles = np.full((len(best), SHARED_TILE), -1, np.int32)
    tiles[place[kept], (np.arange(len(order)) - begins[tile])[kept]] = order[kept]
    return SharedPrefixes(splits, tiles)
