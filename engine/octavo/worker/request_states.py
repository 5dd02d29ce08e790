"""State of the running requests, indexed by slot: what the host sends once, at admission, and each step reads.

A structure of arrays in host memory with one row per slot; on the CPU path torch sees the same memory. The last slot is
a padding slot that no request owns. Nothing here is per step but the few entries that a step changes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from octavo.step import Bools, Int32s, LogprobSpec, NewRequest, SchedulerOutput, UInt8s
from octavo.types import FinishReason, GenerationParams
from octavo.worker.constraints import Constraints
from octavo.worker.features import FILTERS, PROCESSORS, WATERMARK, Feature, features_of
from octavo.worker.row_lists import RowLists, lists_of

Int64s = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]

FAILED = 255
"""In `finished`: the request failed and is muted like one that ended."""
TOP_H_CANDIDATES = 100
"""TopHLogitsWarper looks at this many of the largest only."""
WINDOWS = (64, 256, 1024)
"""Widths in tokens of the sampler's fast path: the narrowest that holds top_k and one more is used."""
NO_FILTER = -1
WHOLE_VOCABULARY = 0
"""In `window`, for rows that drop nothing, and for those whose filters have to look at every token."""


class SamplingParamArrays:
    """Scalars of the sampler by slot. Constants that transformers computes in double are rounded here, once."""

    def __init__(self, num_slots: int) -> None:
        self.features = np.zeros(num_slots, np.uint32)
        """Bits of `Feature`."""
        self.window = np.full(num_slots, NO_FILTER, np.int32)
        self.temperature = np.ones(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int32)
        self.top_p_tail = np.zeros(num_slots, np.float32)
        """1 - top_p, subtracted in double."""
        self.min_p = np.zeros(num_slots, np.float32)
        self.typical_p = np.ones(num_slots, np.float32)
        self.top_h = np.ones(num_slots, np.float32)
        self.epsilon_cutoff = np.zeros(num_slots, np.float32)
        self.eta_cutoff = np.zeros(num_slots, np.float32)
        self.repetition_penalty = np.ones(num_slots, np.float32)
        self.encoder_repetition_penalty = np.ones(num_slots, np.float32)
        """1 / the parameter, divided in double: the divisor of positive scores."""
        self.frequency_penalty = np.zeros(num_slots, np.float32)
        self.presence_penalty = np.zeros(num_slots, np.float32)
        self.guidance_scale = np.ones(num_slots, np.float32)
        self.min_total_tokens = np.zeros(num_slots, np.int32)
        """EOS and stop ids are banned while the sequence is shorter than this."""

    def set(self, request: NewRequest, vocab_size: int) -> None:
        slot, params = request.slot, request.params
        uses = features_of(request)
        self.features[slot] = int(uses)
        self.window[slot] = _window(uses, params.top_k or 0, vocab_size)
        self.temperature[slot] = _or(params.temperature, 1.0)
        self.top_k[slot] = min(_or(params.top_k, 0), vocab_size)
        self.top_p_tail[slot] = 1.0 - _or(params.top_p, 1.0)
        self.min_p[slot] = _or(params.min_p, 0.0)
        self.typical_p[slot] = _or(params.typical_p, 1.0)
        self.top_h[slot] = _or(params.top_h, 1.0)
        self.epsilon_cutoff[slot] = _or(params.epsilon_cutoff, 0.0)
        self.eta_cutoff[slot] = _or(params.eta_cutoff, 0.0)
        self.repetition_penalty[slot] = _or(params.repetition_penalty, 1.0)
        self.encoder_repetition_penalty[slot] = 1.0 / _or(params.encoder_repetition_penalty, 1.0)
        self.frequency_penalty[slot] = _or(params.frequency_penalty, 0.0)
        self.presence_penalty[slot] = _or(params.presence_penalty, 0.0)
        self.guidance_scale[slot] = _or(params.guidance_scale, 1.0)
        if params.min_new_tokens is not None:  # as in transformers, it overrides min_length
            self.min_total_tokens[slot] = request.prompt_len + params.min_new_tokens
        else:
            self.min_total_tokens[slot] = params.min_length or 0


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _window(uses: Feature, top_k: int, vocab_size: int) -> int:
    if not uses & FILTERS:
        return NO_FILTER
    if uses & Feature.TOP_K and not uses & WATERMARK:
        least = max(top_k + 1, TOP_H_CANDIDATES if uses & Feature.TOP_H else 0)
        for window in WINDOWS:
            if least <= window <= vocab_size:
                return window
    return WHOLE_VOCABULARY


class RequestStates:
    """Owned by the ModelRunner, which applies each step's diff; the sampler appends the tokens it chose."""

    def __init__(
        self,
        num_slots: int,
        n_positions: int,
        block_size: int,
        vocab_size: int,
        constraints: Constraints | None = None,
    ) -> None:
        """`constraints` follows structured outputs; without it no request may ask for one."""
        rows = num_slots + 1
        self.num_slots = num_slots
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.hist = np.zeros((rows, n_positions + 1), np.int32)
        """[S + 1, n_positions + 1] prompt, then output. Entries past `length` are zero."""
        self.length = np.zeros(rows, np.int32)
        self.num_computed = np.zeros(rows, np.int32)
        self.prompt_len = np.zeros(rows, np.int32)
        self.block_table = np.zeros((rows, -(-n_positions // block_size)), np.int32)
        """[S + 1, max_blocks] block ids, 0 (the null block) past the end."""
        self.max_total_tokens = np.zeros(rows, np.int32)
        self.finished = np.zeros(rows, np.uint8)
        """FinishReason or FAILED of a request that ended and whose slot is not yet freed: its rows are muted."""
        self.group_id = np.full(rows, -1, np.int64)
        self.group_row = np.zeros(rows, np.int32)
        self.negative_slot = np.full(rows, -1, np.int32)
        """Of a guided sequence, the slot of its negative branch."""
        self.is_negative = np.zeros(rows, np.bool_)
        self.sampling = SamplingParamArrays(rows)
        self.eos_ids = np.full((rows, 1), -1, np.int32)
        """[S + 1, E] EOS ids, padded with -1; like `stop_ids` it widens as requests need."""
        self.stop_ids = np.full((rows, 1), -1, np.int32)
        # Lists, for the rows that have any
        self.lists: dict[int, RowLists] = {}
        self.params: dict[int, GenerationParams] = {}
        """Lists of the slots that use a processor, parameters of those that use a processor or a watermark."""
        self.constraints = constraints
        self.logprobs: dict[int, LogprobSpec] = {}
        self.prompt_logprobs: dict[int, int] = {}
        """Number of top tokens by slot, for the slots that asked."""

    def apply(self, step: SchedulerOutput) -> None:
        """Brings the state up to the step's beginning, in the order that SchedulerOutput prescribes."""
        for slot in step.freed_slots:
            self.free(slot)
        for request in step.new_requests:
            self._add(request)
        if len(step.block_slots):
            self.block_table[step.block_slots, step.block_columns] = step.block_ids

    def free(self, slot: int) -> None:
        """Old tokens and blocks stay where they are: a row reads only what its request has written."""
        self.length[slot] = 0
        self.finished[slot] = 0
        self.group_id[slot] = -1
        self.negative_slot[slot] = -1
        self.is_negative[slot] = False
        self.sampling.features[slot] = 0
        for table in (self.lists, self.params, self.logprobs, self.prompt_logprobs):
            table.pop(slot, None)
        if self.constraints is not None:
            self.constraints.remove(slot)

    def _add(self, request: NewRequest) -> None:
        slot, length = request.slot, len(request.token_ids)
        self.free(slot)
        self.hist[slot, :length] = request.token_ids
        self.hist[slot, length:] = 0
        self.length[slot] = length
        self.num_computed[slot] = request.num_computed_tokens
        self.prompt_len[slot] = request.prompt_len
        self.block_table[slot] = 0
        self.block_table[slot, : len(request.block_ids)] = request.block_ids
        self.max_total_tokens[slot] = request.max_total_tokens
        self.group_id[slot] = request.group_id
        self.group_row[slot] = request.row
        if request.guides >= 0:
            self.is_negative[slot] = True
            self.negative_slot[request.guides] = slot
        self.sampling.set(request, self.vocab_size)
        self.eos_ids = _set_padded(self.eos_ids, slot, request.eos_token_ids)
        self.stop_ids = _set_padded(self.stop_ids, slot, request.stop_token_ids)
        self._add_lists(request)

    def _add_lists(self, request: NewRequest) -> None:
        slot, uses = request.slot, self.sampling.features[request.slot]
        if uses & PROCESSORS:
            self.lists[slot] = lists_of(request)
        if uses & (PROCESSORS | WATERMARK):
            self.params[slot] = request.params
        if request.params.structured_output is not None:
            assert self.constraints is not None
            self.constraints.add(slot, request.params.structured_output)
        if request.logprobs is not None:
            self.logprobs[slot] = request.logprobs
        if request.prompt_logprobs is not None:
            self.prompt_logprobs[slot] = request.prompt_logprobs

    def allowed_ids(self, slot: int) -> Int64s:
        """The tokens that a request restricted by allowed_token_ids or structured_output may choose next.

        Raises ConstraintError."""
        lists = self.lists[slot]
        if self.constraints is None or self.params[slot].structured_output is None:
            assert lists.allowed is not None
            return lists.allowed
        output = self.hist[slot, self.prompt_len[slot] : self.length[slot]]
        allowed = self.constraints.allowed(slot, output.tolist(), lists.eos)
        return allowed if lists.allowed is None else np.intersect1d(allowed, lists.allowed)

    def append(self, slots: Int32s, token_ids: Int32s) -> UInt8s:
        """Appends one token to each of the slots (all different).

        Returns:
            uint8 [S] why the sequence ends with it, or 0: EOS before STOP_TOKEN before LENGTH.
        """
        length = self.length[slots]
        self.hist[slots, length] = token_ids
        self.length[slots] = length + 1
        finish = np.where(length + 1 >= self.max_total_tokens[slots], np.uint8(FinishReason.LENGTH), np.uint8(0))
        finish[_contains(self.stop_ids[slots], token_ids)] = FinishReason.STOP_TOKEN
        finish[_contains(self.eos_ids[slots], token_ids)] = FinishReason.EOS
        self.finished[slots] = finish
        followers = self.negative_slot[slots]
        if (followers >= 0).any():
            self._follow(followers[followers >= 0], token_ids[followers >= 0])
        return finish

    def _follow(self, slots: Int32s, token_ids: Int32s) -> None:
        """Negative branches get the tokens of their sequences."""
        self.hist[slots, self.length[slots]] = token_ids
        self.length[slots] += 1

    def advance_beams(self, slots: Int32s, parents: Int32s, token_ids: Int32s, *, ended: bool) -> None:
        """Rows of a beam search: each takes over what its parent (an index into `slots`) has, with one more token."""
        length = int(self.length[slots[0]])
        self.hist[slots, :length] = self.hist[slots[parents], :length]
        self.hist[slots, length] = token_ids
        self.length[slots] = length + 1
        self.block_table[slots] = self.block_table[slots[parents]]
        if ended:
            self.finished[slots] = FinishReason.LENGTH

    def fail(self, slots: Int32s) -> None:
        """Mutes the rows of these slots until they are freed."""
        self.finished[slots] = FAILED


def _contains(ids: Int32s, token_ids: Int32s) -> Bools:
    """[S] whether token s is among ids[s] ([S, E])."""
    found: Bools = (ids == token_ids[:, None]).any(axis=1)
    return found


def _set_padded(table: Int32s, slot: int, ids: tuple[int, ...]) -> Int32s:
    """Writes ids into a row of a table padded with -1; returns the table, a wider copy if it had to grow."""
    if len(ids) > table.shape[1]:
        wider = np.full((table.shape[0], max(len(ids), 2 * table.shape[1])), -1, np.int32)
        wider[:, : table.shape[1]] = table
        table = wider
    table[slot] = -1
    table[slot, : len(ids)] = ids
    return table
