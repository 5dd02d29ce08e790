"""Where the rows and tokens of a step lie on the device: padded to a shape that repeats, in one buffer of words.

Rows that bring one token come first, padded to `decode_rows`; then the others, padded to `prefill_rows`, whose tokens
are padded to `prefill_tokens`; then those with a draft. A row of padding has the padding slot, so that every kernel
skips it. What the launches of a shape read lies at places that follow from the shape alone: that is what a CUDA graph
needs.

Tokens are chosen in rounds. The first has every row; each further one has a place for every row with a draft, which
takes it if what it chose before is what its draft said. A row of the logits, of the results and of the sampler's
workspace belongs to each place, those of a round side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from octavo_kernels.paged_attention import prefill_tiles
from octavo_kernels.prefill_attention import PREFILL_TILE
from octavo_kernels.shared_attention import SHARED_TILE
from octavo_kernels.verify_attention import VERIFY_TILE
from torch import Tensor

from octavo.step import Bools, Int32s
from octavo.worker.shared_prefixes import SharedPrefixes

ROWS_PER_SHARED_TILE = 8
"""Of decode rows, for each tile that a shape has room for. Where groups are smaller, those that save most are kept."""
MAX_DRAFT = VERIFY_TILE - 1
"""Tokens: with the one before them a row fills a tile of attention."""
MAX_DRAFT_ROWS = 16
ROUND_MULTIPLE = 4
"""Places of a round are a multiple of this, so that the sampler's rows begin at multiples of 16 bytes in all rounds:
Triton compiles another kernel for pointers that do not."""
NO_DRAFT = -1


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
    draft_rows: int = 0
    """A multiple of ROUND_MULTIPLE."""
    draft_tokens: int = 0
    """Of these rows: drafts, and the tokens before them."""
    draft_rounds: int = 0
    """Rounds behind the first: tokens of the longest draft, at most MAX_DRAFT."""

    @property
    def num_rows(self) -> int:
        return self.decode_rows + self.prefill_rows + self.draft_rows

    @property
    def num_tokens(self) -> int:
        return self.decode_rows + self.prefill_tokens + self.draft_tokens

    @property
    def num_places(self) -> int:
        """At which tokens are chosen, of all rounds."""
        return self.first_places + self.draft_rounds * self.draft_rows

    @property
    def first_places(self) -> int:
        """Of the first round: the rows."""
        return multiple_of(ROUND_MULTIPLE, self.num_rows) if self.draft_rows else self.num_rows

    def round_places(self, number: int) -> slice:
        """Of a round behind the first, counted from 0."""
        begin = self.first_places + number * self.draft_rows
        return slice(begin, begin + self.draft_rows)

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
            and (self.draft_rows > 0) == (other.draft_rows > 0)  # a step without pays for no rounds
            and self.draft_rows >= other.draft_rows
            and self.draft_tokens >= other.draft_tokens
            and self.draft_rounds >= other.draft_rounds
        )


def multiple_of(factor: int, number: int) -> int:
    """The least that is not below number."""
    return -(-number // factor) * factor


def max_shared_tiles(decode_rows: int) -> int:
    return max(1, decode_rows // ROWS_PER_SHARED_TILE)


Words = TypeVar("Words", Int32s, Tensor)


@dataclass(frozen=True, slots=True)
class StepWords(Generic[Words]):
    """The parts of the buffer for R rows, P places and N tiles: int32 on the host or on the device.

    What D decode rows share comes first, so that its address is a multiple of 16; there is none in other shapes.
    """

    shared_tiles: Words
    """[num_shared_tiles, SHARED_TILE], flat; -1: no row."""
    shared_splits: Words
    """[D]"""
    row_slots: Words
    """[R] the slot whose tokens a row computes; the padding slot: none."""
    sample_slots: Words
    """[P] the slot for which a token is chosen; the padding slot: none is."""
    logits_indices: Words
    """[P] index of the token behind which it is chosen: in the first round the row's last, or that before its draft."""
    query_start_loc: Words
    """[R + 1]"""
    tile_rows: Words
    """[N] -1: no tile."""
    tile_starts: Words
    """[N]"""
    draft_ids: Words
    """[prefill_tokens + draft_tokens] token ids of drafts; NO_DRAFT: the token is one of its row's sequence. None in
    shapes without drafts."""
    drafted: Words
    """[draft_rounds * draft_rows] what a row has to have chosen in the round before, to take part in this one."""


def num_words(shape: StepShape) -> int:
    return sum(_sizes(shape))


def most_words(max_rows: int, max_tokens: int) -> int:
    """Of the shapes with at most so many rows and tokens of prompts."""
    plain = num_words(StepShape(0, max_rows, max_tokens)) + num_words(StepShape(max_rows, shared=True))
    return plain + max_tokens + num_words(largest_drafts(max_rows))


def largest_drafts(max_rows: int) -> StepShape:
    """What drafts add to a step at most."""
    rows = min(MAX_DRAFT_ROWS, multiple_of(ROUND_MULTIPLE, max_rows))
    return StepShape(0, draft_rows=rows, draft_tokens=rows * VERIFY_TILE, draft_rounds=MAX_DRAFT)


def parts_of(words: Words, shape: StepShape) -> StepWords[Words]:
    """Views of the first `num_words` words."""
    sizes = _sizes(shape)
    ends = np.cumsum(sizes).tolist()
    assert len(sizes) == len(fields(StepWords))
    return StepWords(*(words[end - size : end] for size, end in zip(sizes, ends, strict=True)))


def _sizes(shape: StepShape) -> tuple[int, ...]:
    rows, tiles = shape.num_rows, shape.num_tiles
    shared_rows = shape.decode_rows if shape.shared else 0
    first, places = (shape.num_shared_tiles * SHARED_TILE, shared_rows), (shape.num_places, shape.num_places)
    later = shape.prefill_tokens + shape.draft_tokens if shape.draft_rows else 0
    return *first, rows, *places, rows + 1, tiles, tiles, later, shape.draft_rounds * shape.draft_rows


@dataclass(frozen=True, slots=True)
class StepLayout:
    """A step's rows [n] in a shape."""

    shape: StepShape
    places: npt.NDArray[np.int64]
    """[n] the row of the shape that a row of the step is."""
    words: Int32s
    """[num_words]"""


def exact_shape(
    num_scheduled: Int32s,
    num_decode_rows: int,
    *,
    history: bool,
    shared: bool = False,
    drafts: Sequence[Int32s] = (),
) -> StepShape:
    """Without padding but that of rounds. num_scheduled: [n] tokens of each row, those of one token first. drafts: of
    the last rows."""
    prompts = num_scheduled[num_decode_rows : len(num_scheduled) - len(drafts)]
    lengths = [len(draft) for draft in drafts]
    return StepShape(
        num_decode_rows,
        len(prompts),
        int(prompts.sum()),
        history,
        shared,
        draft_rows=multiple_of(ROUND_MULTIPLE, len(lengths)),
        draft_tokens=sum(lengths) + len(lengths),
        draft_rounds=max(lengths, default=0),
    )


def lay_out(
    shape: StepShape,
    slots: Int32s,
    num_scheduled: Int32s,
    num_decode_rows: int,
    samples: Bools,
    padding_slot: int,
    prefixes: SharedPrefixes | None = None,
    drafts: Sequence[Int32s] = (),
) -> StepLayout:
    """The words of a step whose exact shape this one holds. slots, num_scheduled, samples: [n]. prefixes: of the decode
    rows, which lose them if the shape has no place for any. drafts: of the last rows."""
    words = np.zeros(num_words(shape), np.int32)
    parts = parts_of(words, shape)
    places = np.arange(len(slots))
    first_draft, prompts = len(slots) - len(drafts), shape.decode_rows + shape.prefill_rows
    places[num_decode_rows:] += shape.decode_rows - num_decode_rows
    places[first_draft:] = prompts + np.arange(len(drafts))
    lengths = np.zeros(shape.num_rows, np.int32)
    lengths[: shape.decode_rows] = 1
    lengths[places] = num_scheduled
    starts = parts.query_start_loc
    np.cumsum(lengths, out=starts[1:])
    parts.row_slots[:] = padding_slot
    parts.row_slots[places] = slots
    parts.sample_slots[:] = padding_slot
    parts.sample_slots[places[samples]] = slots[samples]
    parts.logits_indices[: shape.num_rows] = np.maximum(starts[1:] - 1, 0)
    tile_rows, tile_starts = prefill_tiles(starts[: prompts + 1], shape.decode_rows)
    parts.tile_rows[:] = -1
    parts.tile_starts[:] = -1
    parts.tile_rows[: len(tile_rows)] = tile_rows
    parts.tile_starts[: len(tile_rows)] = tile_starts
    if shape.shared:
        _lay_out_shared(parts, prefixes)
    if shape.draft_rows:
        _lay_out_drafts(parts, shape, drafts, samples[first_draft:])
    return StepLayout(shape, places, words)


def _lay_out_drafts(parts: StepWords[Int32s], shape: StepShape, drafts: Sequence[Int32s], samples: Bools) -> None:
    """samples: of the rows with a draft."""
    parts.draft_ids[:] = NO_DRAFT
    parts.drafted[:] = NO_DRAFT
    first_row = shape.decode_rows + shape.prefill_rows
    drafted = parts.drafted.reshape(-1, shape.draft_rows)
    sample_slots = parts.sample_slots[shape.first_places :].reshape(-1, shape.draft_rows)
    logits_indices = parts.logits_indices[shape.first_places :].reshape(-1, shape.draft_rows)
    for i, (draft, wanted) in enumerate(zip(drafts, samples.tolist(), strict=True)):
        row, length = first_row + i, len(draft)
        begin = int(parts.query_start_loc[row])
        parts.logits_indices[row] = begin
        parts.draft_ids[begin + 1 - shape.decode_rows :][:length] = draft
        if wanted:
            drafted[:length, i] = draft
            sample_slots[:length, i] = parts.row_slots[row]
            logits_indices[:length, i] = begin + 1 + np.arange(length)


def _lay_out_shared(parts: StepWords[Int32s], prefixes: SharedPrefixes | None) -> None:
    parts.shared_tiles[:] = -1  # shared_splits are 0
    if prefixes is not None:
        parts.shared_tiles[: prefixes.tiles.size] = prefixes.tiles.ravel()
        parts.shared_splits[: len(prefixes.splits)] = prefixes.splits
