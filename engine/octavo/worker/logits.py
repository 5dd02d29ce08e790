"""Logits processors: the steps of generate() that act on every row, greedy or sampling, in transformers' order.

Each works on the rows that use it and touches only the tokens it concerns; rows without it pay nothing. A new
processor is a bit in `Feature`, a function here and a line in `PROCESSORS`; the order there is that of
`GenerationMixin._get_logits_processor` (huggingface/transformers, src/transformers/generation/utils.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.step import Int32s
from octavo.worker.features import Feature
from octavo.worker.request_states import Float32s, Int64s, RequestStates
from octavo.worker.row_lists import RowLists

Processor = Callable[[Tensor, Int64s, Int32s, RequestStates], None]
"""(scores float32 [S, V] contiguous, changed in place; rows [F] that use it; slots [F] of those rows; states)."""


def process_logits(
    scores: Tensor, slots: Int32s, features: npt.NDArray[np.uint32], used: int, states: RequestStates
) -> None:
    """Runs all processors in order on scores [S, V], in place. `used` is the union of features [S]."""
    for feature, processor in PROCESSORS:
        if used & feature:
            rows = np.flatnonzero(features & feature)
            processor(scores, rows, slots[rows], states)


def divide(x: Tensor, divisor: Tensor) -> Tensor:
    """`x / divisor` as PyTorch computes it for a Python number.

    A CPU divides; CUDA multiplies by the fp32 reciprocal (pytorch/pytorch
    aten/src/ATen/native/cuda/BinaryDivTrueKernel.cu), which differs in the last bit now and then.
    """
    return x * divisor.reciprocal() if x.is_cuda else x / divisor


def _add_bias(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """SequenceBiasLogitsProcessor: each token's sum of biases, added once."""
    lists = [states.lists[slot] for slot in slots.tolist()]
    sums = [
        _bias_sums(row_lists, _history(states, slot)) for row_lists, slot in zip(lists, slots.tolist(), strict=True)
    ]
    index = _flat_index(scores, rows, [row_lists.bias_ids for row_lists in lists])
    scores.view(-1)[index] += _tensor(np.concatenate(sums), scores)


def _bias_sums(lists: RowLists, history: Int32s) -> Float32s:
    """float32 [K] what the tokens `lists.bias_ids` get after this history."""
    sums = lists.bias_values.copy()
    for sequence in lists.bias_sequences:
        if _ends_with(history, sequence.prefix):
            sums[sequence.last] += np.float32(sequence.bias)
    return sums


def _penalize_prompt(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """EncoderRepetitionPenaltyLogitsProcessor: for a decoder-only model the encoder's input is the prompt."""
    _penalize(scores, rows, slots, states, states.prompt_len[slots], states.sampling.encoder_repetition_penalty[slots])


def _penalize_repetition(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """RepetitionPenaltyLogitsProcessor: each distinct token of prompt and output, once."""
    _penalize(scores, rows, slots, states, states.length[slots], states.sampling.repetition_penalty[slots])


def _penalize(
    scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates, lengths: Int32s, penalties: Float32s
) -> None:
    """Scales the first `lengths` tokens of each history: negative scores are multiplied, the others divided.

    A token that occurs twice is written twice, with the same value.
    """
    length = lengths[:, None]
    width = int(length.max())
    token_ids = states.hist[slots, :width].astype(np.int64)
    token_ids = np.where(np.arange(width) < length, token_ids, token_ids[:, :1])
    index = _tensor(token_ids + rows[:, None] * scores.shape[1], scores)
    penalty = _tensor(penalties[:, None], scores)
    flat = scores.view(-1)
    seen = flat[index]
    flat[index] = torch.where(seen < 0, seen * penalty, divide(seen, penalty))


def _penalize_output(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """x -= frequency_penalty * count, then x -= presence_penalty * (count > 0), over output tokens.

    Not in transformers; as the parameters of these names of OpenAI's completions API.
    """
    ids: list[Int64s] = []
    counts: list[Float32s] = []
    for slot in slots.tolist():
        output = states.hist[slot, states.prompt_len[slot] : states.length[slot]]
        row_ids, row_counts = np.unique(output, return_counts=True)
        ids.append(row_ids.astype(np.int64))
        counts.append(row_counts.astype(np.float32))
    lengths = [len(row_ids) for row_ids in ids]
    frequency = np.repeat(states.sampling.frequency_penalty[slots], lengths) * np.concatenate(counts)
    presence = np.repeat(states.sampling.presence_penalty[slots], lengths)
    index = _flat_index(scores, rows, ids)
    flat = scores.view(-1)
    flat[index] = flat[index] - _tensor(frequency, scores) - _tensor(presence, scores)


def _ban_ngrams(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """NoRepeatNGramLogitsProcessor."""
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        history = _history(states, slot)
        _set(scores, row, _completions(history, history, states.params[slot].no_repeat_ngram_size or 0), -math.inf)


def _ban_prompt_ngrams(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """EncoderNoRepeatNGramLogitsProcessor: n-grams of the prompt."""
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        history, size = _history(states, slot), states.params[slot].encoder_no_repeat_ngram_size or 0
        _set(scores, row, _completions(history[: states.prompt_len[slot]], history, size), -math.inf)


def _completions(source: Int32s, history: Int32s, size: int) -> Int64s:
    """Tokens that would complete an n-gram of `source` whose first size - 1 tokens end the history."""
    if len(source) < size or len(history) < size - 1:
        return np.empty(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(source, size)
    matches = (windows[:, :-1] == history[len(history) - (size - 1) :]).all(axis=1)
    completions: Int64s = windows[matches, -1].astype(np.int64)
    return completions


def _add_bad_words(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """NoBadWordsLogitsProcessor: a bias of -inf, so that +inf becomes NaN."""
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        lists, history = states.lists[slot], _history(states, slot)
        matched = [word.last for word in lists.bad_words if _ends_with(history, word.prefix)]
        scores[row, np.unique(np.concatenate([lists.bans, np.array(matched, np.int64)]))] += -math.inf


def _ban_end_before_minimum(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """MinLengthLogitsProcessor and MinNewTokensLengthLogitsProcessor: no EOS or stop id while too short."""
    short = states.length[slots] < states.sampling.min_total_tokens[slots]
    if short.any():
        ids = [states.lists[slot].end for slot in slots[short].tolist()]
        scores.view(-1)[_flat_index(scores, rows[short], ids)] = -math.inf


def _keep_allowed(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """PrefixConstrainedLogitsProcessor: if all allowed tokens are -inf, they are 0."""
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        allowed = states.allowed_ids(slot)
        values = scores[row, allowed]
        _force(scores, row, allowed, torch.zeros_like(values) if bool((values == -math.inf).all()) else values)


def _force_bos(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """ForcedBOSTokenLogitsProcessor: the second token of a sequence that began with one."""
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        if states.length[slot] == 1:
            _force(scores, row, np.array([states.params[slot].forced_bos_token_id]), 0.0)


def _force_eos(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """ForcedEOSTokenLogitsProcessor: the last token that max_length allows."""
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        if states.length[slot] == states.max_total_tokens[slot] - 1:
            _force(scores, row, states.lists[slot].forced_eos, 0.0)


def _remove_invalid(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """InfNanRemoveLogitsProcessor."""
    limits = torch.finfo(scores.dtype)
    index = _tensor(rows, scores)
    scores[index] = torch.nan_to_num(scores[index], nan=0.0, posinf=limits.max, neginf=limits.min)


def _raise_end_with_length(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """ExponentialDecayLengthPenalty: after `start_index` output tokens EOS grows by its own size, ever faster."""
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        decay = states.params[slot].exponential_decay_length_penalty
        assert decay is not None
        steps = int(states.length[slot] - states.prompt_len[slot]) - decay.start_index
        if steps <= 0:
            continue
        ids = torch.from_numpy(states.lists[slot].end).to(scores.device)
        values = scores[row, ids]
        boosted = values + values.abs() * decay_growth(decay.factor, steps)
        scores[row, ids] = torch.where(values.isfinite(), boosted, values)


def decay_growth(factor: float, steps: int) -> float:
    """factor ** steps - 1, a Python double as in transformers; infinite where that raises OverflowError."""
    try:
        return float(factor**steps - 1)
    except OverflowError:
        return math.inf


def _suppress(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """SuppressTokensLogitsProcessor."""
    ids = [states.lists[slot].suppress for slot in slots.tolist()]
    scores.view(-1)[_flat_index(scores, rows, ids)] = -math.inf


def _suppress_at_begin(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """SuppressTokensAtBeginLogitsProcessor: at the first token, or the one after a forced BOS."""
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        prompt_len, forced = int(states.prompt_len[slot]), states.params[slot].forced_bos_token_id
        if states.length[slot] == begin_length(prompt_len, forced):
            _set(scores, row, states.lists[slot].begin_suppress, -math.inf)


def begin_length(prompt_len: int, forced_bos: int | None) -> int:
    """Tokens of the sequence when begin_suppress_tokens acts."""
    return prompt_len if prompt_len > 1 or forced_bos is None else prompt_len + 1


def _history(states: RequestStates, slot: int) -> Int32s:
    history: Int32s = states.hist[slot, : states.length[slot]]
    return history


def _ends_with(history: Int32s, suffix: Int32s) -> bool:
    return len(suffix) <= len(history) and bool((history[len(history) - len(suffix) :] == suffix).all())


def _set(scores: Tensor, row: int, ids: Int64s, value: float) -> None:
    scores[row, torch.from_numpy(ids).to(scores.device)] = value


def _force(scores: Tensor, row: int, ids: Int64s, values: Tensor | float) -> None:
    """These values for these tokens, -inf for all others."""
    scores[row] = -math.inf
    scores[row, torch.from_numpy(ids).to(scores.device)] = values  # type: ignore[assignment,unused-ignore]


def _flat_index(scores: Tensor, rows: Int64s, ids: list[Int64s]) -> Tensor:
    """int64 indices into the flattened scores of the tokens ids[i] of rows[i]."""
    offsets = np.repeat(rows * scores.shape[1], [len(row_ids) for row_ids in ids])
    return _tensor(np.concatenate(ids) + offsets, scores)


def _tensor(array: Int64s | Float32s, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)


PROCESSORS: Final[tuple[tuple[Feature, Processor], ...]] = (
    (Feature.BIAS, _add_bias),
    (Feature.ENCODER_REPETITION_PENALTY, _penalize_prompt),
    (Feature.REPETITION_PENALTY, _penalize_repetition),
    (Feature.OUTPUT_PENALTY, _penalize_output),
    (Feature.NO_REPEAT_NGRAM, _ban_ngrams),
    (Feature.ENCODER_NO_REPEAT_NGRAM, _ban_prompt_ngrams),
    (Feature.BAD_WORDS | Feature.BAN, _add_bad_words),
    (Feature.MIN_LENGTH, _ban_end_before_minimum),
    (Feature.ALLOWED, _keep_allowed),
    (Feature.FORCED_BOS, _force_bos),
    (Feature.FORCED_EOS, _force_eos),
    (Feature.REMOVE_INVALID, _remove_invalid),
    (Feature.DECAY, _raise_end_with_length),
    (Feature.SUPPRESS, _suppress),
    (Feature.BEGIN_SUPPRESS, _suppress_at_begin),
)
