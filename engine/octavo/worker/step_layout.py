"""Where the rows and tokens of a step lie on the device: padded to a shape that repeats, in one buffer of words.

Rows that bring one token come first, padded to `decode_rows`; then the others, padded to `prefill_rows`, whose tokens
are padded to `prefill_tokens`. A row of padding has the padding slot, so that every kernel skips it. What the launches
of a shape read lies at places that follow from the shape alone: that is what a CUDA graph needs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from octavo_kernels.paged_attention import prefill_tiles
from octavo_kernels.prefill_attention import PREFILL_TILE
from octavo_kernels.shared_attention import SHARED_TILE
from torch import Tensor

from octavo.step import Bools, Int32s
from octavo.worker.shared_prefixes import SharedPrefixes

ROWS_PER_SHARED_TILE = 8
"""Of decode rows, for each tile that a shape has room for. Where groups are smaller, those that save most are kept."""


@dataclass(frozen=True, slots=True, order=True)
class StepShape:
    """What the launches of a step depend on."""

    decode_rows: int
    prefill_rows: int = 0
    prefill_tokens: int = 0
    history: bool = False
    """Whether some row has n-gram bans, bad words, biases or output penalties."""
    shared: bool = False
    """Whether decode rows share splits of their context."""

    @property
    def num_rows(self) -> int:
        return self.decode_rows + self.prefill_rows

    @property
    def num_tokens(self) -> int:
        return self.decode_rows + self.prefill_tokens

    @property
    def num_tiles(self) -> int:
        """Of prefill attention: every row may have one that is not full."""
        return self.prefill_tokens // PREFILL_TILE + self.prefill_rows

    @property
    def num_shared_tiles(self) -> int:
        return max_shared_tiles(self.decode_rows) if self.shared else 0

    def holds(self, other: StepShape) -> bool:
        """Whether a step of the other shape can be padded to this one."""
        return (
            self.decode_rows >= other.decode_rows
            and self.prefill_rows >= other.prefill_rows
            and self.prefill_tokens >= other.prefill_tokens
            and self.history >= other.history
            and self.shared >= other.shared
        )


def max_shared_tiles(decode_rows: int) -> int:
    return max(1, decode_rows // ROWS_PER_SHARED_TILE)


Words = TypeVar("Words", Int32s, Tensor)


@dataclass(frozen=True, slots=True)
class StepWords(Generic[Words]):
    """The parts of the buffer for R rows and N tiles: int32 on the host or on the device.

    What D decode rows share comes first, so that its address is a multiple of 16; there is none in other shapes.
    """

    shared_tiles: Words
    """[num_shared_tiles, SHARED_TILE], flat; -1: no row."""
    shared_splits: Words
    """[D]"""
    row_slots: Words
    """[R] the slot whose tokens a row computes; the padding slot: none."""
    sample_slots: Words
    """[R] the slot for which a token is chosen; the padding slot: none is."""
    last_tokens: Words
    """[R] index of a row's last token."""
    query_start_loc: Words
    """[R + 1]"""
    tile_rows: Words
    """[N] -1: no tile."""
    tile_starts: Words
    """[N]"""


def num_words(shape: StepShape) -> int:
    return sum(_sizes(shape))


def most_words(max_rows: int, max_tokens: int) -> int:
    """Of the shapes with at most so many rows and tokens of prompts."""
    return num_words(StepShape(0, max_rows, max_tokens)) + num_words(StepShape(max_rows, shared=True))


def parts_of(words: Words, shape: StepShape) -> StepWords[Words]:
    """Views of the first `num_words` words."""
    sizes = _sizes(shape)
    ends = np.cumsum(sizes).tolist()
    assert len(sizes) == len(fields(StepWords))
    return StepWords(*(words[end - size : end] for size, end in zip(sizes, ends, strict=True)))


def _sizes(shape: StepShape) -> tuple[int, ...]:
    rows, tiles = shape.num_rows, shape.num_tiles
    shared_rows = shape.decode_rows if shape.shared else 0
    return shape.num_shared_tiles * SHARED_TILE, shared_rows, rows, rows, rows, rows + 1, tiles, tiles


@dataclass(frozen=True, slots=True)
class StepLayout:
    """A step's rows [n] in a shape."""

    shape: StepShape
    places: npt.NDArray[np.int64]
    """[n] the row of the shape that a row of the step is."""
    words: Int32s
    """[num_words]"""


def exact_shape(num_scheduled: Int32s, num_decode_rows: int, *, history: bool, shared: bool = False) -> StepShape:
    """Without padding. num_scheduled: [n] tokens of each row, those of one token first."""
    rest = num_scheduled[num_decode_rows:]
    return StepShape(num_decode_rows, len(rest), int(rest.sum()), history, shared)


def lay_out(
    shape: StepShape,
    slots: Int32s,
    num_scheduled: Int32s,
    num_decode_rows: int,
    samples: Bools,
    padding_slot: int,
    prefixes: SharedPrefixes | None = None,
) -> StepLayout:
    """The words of a step whose exact shape this one holds. slots, num_scheduled, samples: [n]. prefixes: of the decode
    rows, which lose them if the shape has no place for any."""
    words = np.zeros(num_words(shape), np.int32)
    parts = parts_of(words, shape)
    places = np.arange(len(slots))
    places[num_decode_rows:] += shape.decode_rows - num_decode_rows
    lengths = np.zeros(shape.num_rows, np.int32)
    lengths[: shape.decode_rows] = 1
    lengths[places] = num_scheduled
    starts = np.zeros(shape.num_rows + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    row_slots = np.full(shape.num_rows, padding_slot, np.int32)
    row_slots[places] = slots
    sample_slots = np.full(shape.num_rows, padding_slot, np.int32)
    sample_slots[places[samples]] = slots[samples]
    tile_rows, tile_starts = prefill_tiles(starts, shape.decode_rows)
    padding = np.full(shape.num_tiles - len(tile_rows), -1, np.int32)
    for part, values in (
        (parts.row_slots, row_slots),
        (parts.sample_slots, sample_slots),
        (parts.last_tokens, np.maximum(starts[1:] - 1, 0)),
        (parts.query_start_loc, starts),
        (parts.tile_rows, np.concatenate([tile_rows, padding])),
        (parts.tile_starts, np.concatenate([tile_starts, padding])),
    ):
        part[:] = values
    if shape.shared:
        _lay_out_shared(parts, prefixes)
    return StepLayout(shape, places, words)


def _lay_out_shared(parts: StepWords[Int32s], prefixes: SharedPrefixes | None) -> None:
    parts.shared_tiles[:] = -1  # shared_splits are 0
    if prefixes is not None:
        parts.shared_tiles[: prefixes.tiles.size] = prefixes.tiles.ravel()
        parts.shared_splits[: len(prefixes.splits)] = prefixes.splits
