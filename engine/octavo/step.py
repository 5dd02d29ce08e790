"""Where `core` and `worker` meet: what one step computes, and what came out. Plain data, numpy only.

A step is one forward pass over a flat batch of tokens. Row r belongs to the request in `slots[r]`, starts at position
`num_computed[r]` and has `num_scheduled[r]` tokens; decode rows come before prefill rows, rows with a draft come last.
The worker keeps a request's tokens, block table and parameters by slot: what is here is only what changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from octavo.errors import Reason
from octavo.types import FinishReason, GenerationParams, LogprobKind

Int32s = npt.NDArray[np.int32]
UInt8s = npt.NDArray[np.uint8]
Float32s = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


class LogprobSpec(msgspec.Struct, frozen=True):
    """Which values a request wants for each of its generated tokens."""

    num_top: int
    kind: LogprobKind
    token_ids: list[int]


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that enters the batch: for the first time, forked from a sibling, or again after a preemption.

    The rows of a beam search (params.num_beams > 1) enter together, each with its own tokens. At first only row 0 is
    scheduled; the others get block tables, and tokens computed, from it. No row samples before all do, in one step.
    """

    slot: int
    group_id: int
    """Shared by the sequences of one prompt; never reused."""
    row: int
    """Which of the prompt's `num_rows` sequences this is: the row of the random numbers."""
    num_rows: int
    token_ids: Int32s
    """[L] prompt, then the output so far."""
    prompt_len: int
    num_computed_tokens: int
    """Leading tokens whose keys and values are in the cache already."""
    block_ids: Int32s
    """Its block table so far."""
    params: GenerationParams
    """Resolved."""
    max_total_tokens: int
    """Prompt plus output; the sequence ends with LENGTH there."""
    eos_token_ids: tuple[int, ...]
    """Empty with ignore_eos."""
    stop_token_ids: tuple[int, ...]
    seed: int
    """Unsigned 64 bit; drawn by the front-end when the client gave none."""
    logprobs: LogprobSpec | None = None
    prompt_logprobs: int | None = None
    guides: int = -1
    """Slot of a guided sequence whose negative branch this is; that comes before this one. Both sample in the same
    steps, and the tokens of the sequence are also those of its branch, which chooses none. -1: not a branch."""


@dataclass(slots=True)
class SchedulerOutput:
    """One step. Apply in this order: freed_slots, new_requests, block_*, block_copies, then the rows."""

    step_id: int
    slots: Int32s
    """[R]"""
    num_computed: Int32s
    """[R] position of the row's first token."""
    num_scheduled: Int32s
    """[R]"""
    samples: Bools
    """[R] whether the row ends at its request's last token, so that a next one is chosen. Of a row with a draft true:
    it has the last token, and the draft behind it."""
    num_decode_rows: int
    """Rows before this one have exactly one token and sample."""
    freed_slots: list[int] = field(default_factory=list)
    released_groups: list[int] = field(default_factory=list)
    """No sequence of these groups is alive any more: random state can go."""
    ended_rows: list[tuple[int, int]] = field(default_factory=list)
    """(group, row) of sequences that draw no more, while siblings may."""
    new_requests: list[NewRequest] = field(default_factory=list)
    block_slots: Int32s = field(default_factory=lambda: np.empty(0, np.int32))
    """[K] block tables that grew: block_table[block_slots, block_columns] = block_ids."""
    block_columns: Int32s = field(default_factory=lambda: np.empty(0, np.int32))
    block_ids: Int32s = field(default_factory=lambda: np.empty(0, np.int32))
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, destination) blocks to copy in all layers before the forward pass: copy on write."""
    expired_groups: list[int] = field(default_factory=list)
    """Beam searches that end with this step, since their max_time is over."""
    drafts: list[Int32s] = field(default_factory=list)
    """Of the last rows, one each, never empty: tokens that may follow. As long as they are what the row chooses, it
    chooses on behind them; it never does behind one that ends the sequence."""

    @property
    def num_rows(self) -> int:
        return len(self.slots)


@dataclass(slots=True)
class LogprobRows:
    """Values for the rows that asked, in columns. Rows may ask for different numbers, hence the offsets."""

    rows: Int32s
    """[Q] indices into the step's R rows; R + i is the i-th of its further tokens."""
    chosen: Float32s
    """[Q]"""
    ranks: Int32s
    """[Q], 1 is the largest."""
    top_offsets: Int32s
    """[Q + 1] into the next two."""
    top_token_ids: Int32s
    top_values: Float32s
    requested_offsets: Int32s
    """[Q + 1] into `requested`."""
    requested: Float32s


@dataclass(slots=True)
class PromptLogprobs:
    """Raw logprobs of a chunk of one prompt: entry i is prompt token `start + i`, start >= 1."""

    row: int
    start: int
    num_top: int
    chosen: Float32s
    """[T]"""
    ranks: Int32s
    """[T]"""
    top_token_ids: Int32s
    """[T, num_top]"""
    top_values: Float32s
    """[T, num_top]"""


@dataclass(frozen=True, slots=True)
class SequenceLogprobs:
    """Values of the T tokens of a whole sequence, of the N most likely ones beside each, and of M requested ones."""

    num_top: int
    """N"""
    chosen: Float32s
    """[T]"""
    ranks: Int32s
    """[T], 1 is the largest."""
    top_token_ids: Int32s
    """[T, N]"""
    top_values: Float32s
    """[T, N]"""
    requested: Float32s
    """[T, M]"""


@dataclass(frozen=True, slots=True)
class BeamHypothesis:
    """A sequence that a beam search found."""

    token_ids: Int32s
    """Without the prompt. Empty if fewer were found than asked for."""
    finish: FinishReason
    score: float
    """Length-normalised."""
    logprobs: SequenceLogprobs | None = None
    """If the request wants any."""


@dataclass(frozen=True, slots=True)
class BeamChoice:
    """What a beam search chose in a step. Rows, tokens and tables of the k beams are then those of their parents."""

    slot: int
    """Of beam 0."""
    parents: Int32s
    """[k] the beam that each beam goes on from."""
    token_ids: Int32s
    """[k] the token that it appends."""
    found: list[BeamHypothesis] | None = None
    """Best first, as many as the request wants; None while the search goes on."""


@dataclass(slots=True)
class FurtherTokens:
    """What rows with a draft chose after their first tokens, of each row in order."""

    rows: Int32s
    """[E] indices into the step's rows."""
    token_ids: Int32s
    """[E]"""
    finish: UInt8s
    """[E]"""


@dataclass(slots=True)
class ModelRunnerOutput:
    token_ids: Int32s
    """[R], -1 where the row chose none, as those of beam searches."""
    finish: UInt8s
    """[R] FinishReason or 0: EOS, STOP_TOKEN or LENGTH."""
    further: FurtherTokens | None = None
    logprobs: LogprobRows | None = None
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    beams: list[BeamChoice] = field(default_factory=list)
    failed: list[tuple[int, Reason]] = field(default_factory=list)
    """Rows whose request failed alone: NON_FINITE_LOGITS, NON_FINITE_SCORES, CONSTRAINT_TOO_COMPLEX, INTERNAL."""
