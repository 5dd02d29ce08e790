"""The host's side of the request state on the device: turns what the scheduler decided into words to write there.

`octavo_kernels.state.SlotState` says what the words mean. The host writes at admission and when a block table grows;
everything else the kernels advance by themselves.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from octavo_kernels import state as device
from octavo_kernels.state import NUM_PARAMS, Bitmap, Feature, Param, SlotState
from torch import Tensor

from octavo.step import Bools, Int32s, NewRequest, SchedulerOutput
from octavo.types import LogprobKind
from octavo.worker.features import features_of
from octavo.worker.logits import begin_length
from octavo.worker.row_lists import RowLists, lists_of

Int64s = npt.NDArray[np.int64]

NOTHING: Final = np.empty(0, np.int64)
UNSIGNED_32: Final = 0xFFFFFFFF
LONGEST: Final = 1 << 20
"""No n-gram of this length fits a context."""
LOGPROB_KINDS: Final = {
    LogprobKind.RAW_LOGPROB: device.LogprobKind.RAW_LOGPROB,
    LogprobKind.RAW_LOGIT: device.LogprobKind.RAW_LOGIT,
    LogprobKind.PROCESSED_LOGPROB: device.LogprobKind.PROCESSED_LOGPROB,
    LogprobKind.PROCESSED_LOGIT: device.LogprobKind.PROCESSED_SCORE,
}


class DeviceStates:
    """Owns the SlotState. Writes are collected by `stage` and handed over by `take`."""

    def __init__(self, num_slots: int, n_positions: int, block_size: int, vocab_size: int, where: torch.device) -> None:
        self.state = SlotState.allocate(num_slots, n_positions, block_size, vocab_size, where)
        self._base = {name: _first_word(self.state, name) for name in _PARTS}
        self._width = {name: getattr(self.state, name)[0].numel() for name in _PARTS}
        self._set_words: dict[tuple[int, Bitmap], Int64s] = {}
        """Words of a slot's sparse bitmap that are not zero on the device."""
        self._offsets: list[Int64s] = []
        self._values: list[Int32s] = []

    def stage(self, step: SchedulerOutput, on_host: Bools) -> None:
        """Collects what a step changes, in its order. on_host: [S + 1] slots whose tokens the host chooses: the device
        knows of their parameters nothing."""
        for request in step.new_requests:
            self._admit(request)
            if not on_host[request.slot]:
                self._write_sampling(request)
        if len(step.block_slots):
            table = self._base["block_table"] + step.block_slots.astype(np.int64) * self._width["block_table"]
            self._offsets.append(table + step.block_columns)
            self._values.append(step.block_ids.astype(np.int32))

    def stage_tokens(self, slot: int, start: int, token_ids: Int32s) -> None:
        """The slot's history is these tokens from `start` on."""
        self._write("hist", slot, token_ids, start)
        self._write("length", slot, [start + len(token_ids)])

    def stage_table(self, slot: int, block_ids: Int32s) -> None:
        """int32 [B]"""
        self._write("block_table", slot, block_ids)

    def stage_num_computed(self, slots: Int32s, counts: Int32s) -> None:
        self._put(self._base["num_computed"] + slots.astype(np.int64), counts)

    def stage_running(self, slots: Int32s) -> None:
        """The slots have not finished."""
        self._put(self._base["finished"] + slots.astype(np.int64), np.zeros(len(slots), np.int32))

    def take(self) -> tuple[Int32s, Int32s]:
        """(offsets, values) of the words to write, no word twice; nothing stays collected."""
        if not self._offsets:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        offsets, values = np.concatenate(self._offsets), np.concatenate(self._values)
        self._offsets.clear()
        self._values.clear()
        last = len(offsets) - 1 - np.unique(offsets[::-1], return_index=True)[1]  # a table may grow when it is admitted
        return offsets[last].astype(np.int32), values[last]

    def _admit(self, request: NewRequest) -> None:
        slot = request.slot
        self._write("length", slot, [len(request.token_ids)])
        self._write("num_computed", slot, [request.num_computed_tokens])
        self._write("finished", slot, [0])
        table = np.zeros(self._width["block_table"], np.int32)
        table[: len(request.block_ids)] = request.block_ids
        self._write("block_table", slot, table)
        self._write("hist", slot, request.token_ids)

    def _write_sampling(self, request: NewRequest) -> None:
        """What the fused sampler needs of a request."""
        slot, uses, lists = request.slot, features_of(request), lists_of(request)
        self._write("params", slot, self._params(request, uses, lists))
        self._write_bitmaps(request, uses, lists)
        if uses & Feature.OUTPUT_PENALTY:
            self._write_counts(request)
        self._write_lists(slot, lists)
        if request.logprobs is not None:
            self._write("requested_ids", slot, request.logprobs.token_ids)

    def _params(self, request: NewRequest, uses: Feature, lists: RowLists) -> Int32s:
        """[NUM_PARAMS]; unset ones are neutral or not looked at."""
        params, forced_bos = request.params, request.params.forced_bos_token_id
        words = np.zeros(NUM_PARAMS, np.int32)
        floats = words.view(np.float32)
        unsigned = words.view(np.uint32)
        unsigned[Param.FEATURES] = int(uses)
        unsigned[Param.SEED_LOW] = request.seed & UNSIGNED_32
        unsigned[Param.SEED_HIGH] = request.seed >> 32 & UNSIGNED_32
        words[Param.ROW] = request.row
        words[Param.NUM_ROWS] = request.num_rows
        words[Param.PROMPT_LEN] = request.prompt_len
        words[Param.MAX_TOTAL] = request.max_total_tokens
        if params.min_new_tokens is not None:  # as in transformers, it overrides min_length
            words[Param.MIN_TOTAL] = request.prompt_len + params.min_new_tokens
        else:
            words[Param.MIN_TOTAL] = params.min_length or 0
        words[Param.TOP_K] = min(params.top_k or 0, self.state.vocab_size)
        words[Param.MIN_KEEP] = 1
        floats[Param.TEMPERATURE] = _or(params.temperature, 1.0)
        floats[Param.TOP_P_TAIL] = 1.0 - _or(params.top_p, 1.0)  # subtracted in double
        floats[Param.MIN_P] = _or(params.min_p, 0.0)
        floats[Param.TYPICAL_P] = _or(params.typical_p, 1.0)
        floats[Param.REPETITION_PENALTY] = _or(params.repetition_penalty, 1.0)
        floats[Param.FREQUENCY_PENALTY] = _or(params.frequency_penalty, 0.0)
        floats[Param.PRESENCE_PENALTY] = _or(params.presence_penalty, 0.0)
        floats[Param.TOP_H] = _or(params.top_h, 1.0)
        floats[Param.EPSILON_CUTOFF] = _or(params.epsilon_cutoff, 0.0)
        floats[Param.ETA_CUTOFF] = _or(params.eta_cutoff, 0.0)
        floats[Param.ENCODER_REPETITION_PENALTY] = 1.0 / _or(params.encoder_repetition_penalty, 1.0)
        words[Param.MAX_LENGTH] = request.max_total_tokens
        words[Param.NO_REPEAT_NGRAM_SIZE] = min(params.no_repeat_ngram_size or 0, LONGEST)
        words[Param.ENCODER_NO_REPEAT_NGRAM_SIZE] = min(params.encoder_no_repeat_ngram_size or 0, LONGEST)
        words[Param.FORCED_BOS] = -1 if forced_bos is None else forced_bos
        words[Param.BEGIN_LENGTH] = begin_length(request.prompt_len, forced_bos)
        if (decay := params.exponential_decay_length_penalty) is not None:
            words[Param.DECAY_START] = decay.start_index
            words[[Param.DECAY_FACTOR, Param.DECAY_FACTOR_HIGH]] = np.array([decay.factor], "<f8").view(np.int32)
        words[Param.NUM_BIASES] = len(lists.bias_ids)
        words[Param.NUM_BIAS_SEQUENCES] = len(lists.bias_sequences)
        words[Param.NUM_BAD_WORDS] = len(lists.bad_words)
        if request.logprobs is not None:
            words[Param.LOGPROB_KIND] = LOGPROB_KINDS[request.logprobs.kind]
            words[Param.NUM_TOP] = request.logprobs.num_top
            words[Param.NUM_REQUESTED] = len(request.logprobs.token_ids)
        return words

    def _write_bitmaps(self, request: NewRequest, uses: Feature, lists: RowLists) -> None:
        slot = request.slot
        for bitmap, ids in (
            (Bitmap.EOS, lists.eos),
            (Bitmap.END, lists.end),
            (Bitmap.BAN, lists.bans),
            (Bitmap.FORCED_EOS, lists.forced_eos),
            (Bitmap.SUPPRESS, lists.suppress),
            (Bitmap.BEGIN_SUPPRESS, lists.begin_suppress),
            (Bitmap.ALLOWED, NOTHING if lists.allowed is None else lists.allowed),
        ):
            self._write_sparse(slot, bitmap, ids)
        if uses & Feature.REPETITION_PENALTY:
            self._write_dense(slot, Bitmap.SEEN, request.token_ids)
        if uses & Feature.ENCODER_REPETITION_PENALTY:
            self._write_dense(slot, Bitmap.PROMPT_SEEN, request.token_ids[: request.prompt_len])

    def _write_lists(self, slot: int, lists: RowLists) -> None:
        if len(lists.bias_ids):
            self._write("bias_ids", slot, lists.bias_ids)
            self._write("bias_values", slot, lists.bias_values.view(np.int32))
        words: list[int] = []
        for sequence in lists.bias_sequences:
            words += [len(sequence.prefix) + 1, sequence.last, _bits(sequence.bias), *sequence.prefix.tolist()]
        if words:
            self._write("bias_sequences", slot, words)
        words = []
        for word in lists.bad_words:
            words += [len(word.prefix) + 1, word.last, 0, *word.prefix.tolist()]
        if words:
            self._write("bad_words", slot, words)

    def _write_sparse(self, slot: int, bitmap: Bitmap, ids: Int64s) -> None:
        """A bitmap of few tokens, which no kernel changes: only words that differ from zero, now or before."""
        before = self._set_words.pop((slot, bitmap), None)
        if len(ids) == 0 and before is None:
            return
        words = np.unique(ids // 32)
        touched = words if before is None else np.union1d(words, before)
        values = np.zeros(len(touched), np.uint32)
        np.bitwise_or.at(values, np.searchsorted(touched, ids // 32), np.uint32(1) << (ids % 32).astype(np.uint32))
        if len(words):
            self._set_words[slot, bitmap] = words
        self._put(self._row_of(slot, bitmap) + touched, values.view(np.int32))

    def _write_dense(self, slot: int, bitmap: Bitmap, token_ids: Int32s) -> None:
        bits = np.zeros(self.state.bitmaps.shape[2], np.uint32)
        np.bitwise_or.at(bits, token_ids // 32, np.uint32(1) << (token_ids % 32).astype(np.uint32))
        self._put(self._row_of(slot, bitmap) + np.arange(len(bits)), bits.view(np.int32))

    def _write_counts(self, request: NewRequest) -> None:
        """Distinct output tokens in order of their first appearance."""
        output = request.token_ids[request.prompt_len :]
        ids, first, counts = np.unique(output, return_index=True, return_counts=True)
        order = np.argsort(first)
        self._write("num_counts", request.slot, [len(ids)])
        self._write("count_ids", request.slot, ids[order])
        self._write("counts", request.slot, counts[order])

    def _row_of(self, slot: int, bitmap: Bitmap) -> int:
        words: int = self._base["bitmaps"] + slot * self._width["bitmaps"] + bitmap * int(self.state.bitmaps.shape[2])
        return words

    def _write(self, part: str, slot: int, values: npt.ArrayLike, first: int = 0) -> None:
        """Words from `first` on of a slot's row of a part of the state."""
        words = np.asarray(values, np.int32)
        end = first + len(words)
        assert end <= self._width[part], f"{part}: {end} words, room for {self._width[part]}"
        start = self._base[part] + slot * self._width[part] + first
        self._put(np.arange(start, start + len(words)), words)

    def _put(self, offsets: Int64s, values: Int32s) -> None:
        self._offsets.append(offsets)
        self._values.append(values)


_PARTS: Final = (
    "length",
    "num_computed",
    "finished",
    "params",
    "block_table",
    "hist",
    "bitmaps",
    "num_counts",
    "count_ids",
    "counts",
    "bias_ids",
    "bias_values",
    "bias_sequences",
    "bad_words",
    "requested_ids",
)


def _first_word(state: SlotState, part: str) -> int:
    tensor: Tensor = getattr(state, part)
    return int(tensor.storage_offset() - state.arena.storage_offset())


def _bits(value: float) -> int:
    words: Int32s = np.array([value], np.float32).view(np.int32)
    return int(words[0])


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
