"""Logits processors: the steps of generate() that act on every row, greedy or sampling, in transformers' order.

Each works on the rows that use it, all at once, and touches only the tokens it concerns. A new processor is a bit in
`Feature`, a function here and a line in `PROCESSORS`; the order there is that of
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


def _add_logit_bias(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """Adds each request's biases to its tokens; as SequenceBiasLogitsProcessor with sequences of one token."""
    biases = [states.logit_bias[slot] for slot in slots.tolist()]
    index = _flat_index(scores, rows, [ids for ids, _ in biases])
    scores.view(-1)[index] += _tensor(np.concatenate([values for _, values in biases]), scores)


def _penalize_repetition(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """RepetitionPenaltyLogitsProcessor: each distinct token of prompt and output, once.

    A token that occurs twice is written twice, with the same value.
    """
    length = states.length[slots][:, None]
    width = int(length.max())
    token_ids = states.hist[slots, :width].astype(np.int64)
    token_ids = np.where(np.arange(width) < length, token_ids, token_ids[:, :1])
    index = _tensor(token_ids + rows[:, None] * scores.shape[1], scores)
    penalty = _tensor(states.sampling.repetition_penalty[slots][:, None], scores)
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


def _ban_end_before_minimum(scores: Tensor, rows: Int64s, slots: Int32s, states: RequestStates) -> None:
    """MinLengthLogitsProcessor and MinNewTokensLengthLogitsProcessor: no EOS or stop id while too short."""
    short = states.length[slots] < states.sampling.min_total_tokens[slots]
    if short.any():
        ids = [states.end_ids[slot] for slot in slots[short].tolist()]
        scores.view(-1)[_flat_index(scores, rows[short], ids)] = -math.inf


def _flat_index(scores: Tensor, rows: Int64s, ids: list[Int64s]) -> Tensor:
    """int64 indices into the flattened scores of the tokens ids[i] of rows[i]."""
    offsets = np.repeat(rows * scores.shape[1], [len(row_ids) for row_ids in ids])
    return _tensor(np.concatenate(ids) + offsets, scores)


def _tensor(array: Int64s | Float32s, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)


PROCESSORS: Final[tuple[tuple[Feature, Processor], ...]] = (
    (Feature.BIAS, _add_logit_bias),
    (Feature.REPETITION_PENALTY, _penalize_repetition),
    (Feature.OUTPUT_PENALTY, _penalize_output),
    (Feature.MIN_LENGTH, _ban_end_before_minimum),
)
