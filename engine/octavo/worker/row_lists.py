"""Token lists of a request's parameters, prepared once, at admission, for both the CPU's sampler and the kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from octavo.step import Int32s, NewRequest
from octavo.types import GenerationParams
from octavo.worker.features import bad_words_of

Int64s = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BiasSequence:
    """A sequence of two or more tokens whose last one gets a bias when the others end the history."""

    prefix: Int32s
    last: int
    """Index of the last token in `RowLists.bias_ids`."""
    bias: float


@dataclass(frozen=True, slots=True)
class BadWord:
    """A sequence of two or more tokens whose last one is banned when the others end the history."""

    prefix: Int32s
    last: int
    """Token id."""


@dataclass(frozen=True, slots=True)
class RowLists:
    bias_ids: Int64s
    """Distinct tokens that a bias may act on."""
    bias_values: Float32s
    """Of each, its bias as a sequence of its own, else 0."""
    bias_sequences: tuple[BiasSequence, ...]
    """In the order in which transformers adds them: by length, lengths in order of first appearance."""
    bans: Int64s
    """Bad words of one token."""
    bad_words: tuple[BadWord, ...]
    allowed: Int64s | None
    forced_eos: Int64s
    suppress: Int64s
    begin_suppress: Int64s
    eos: Int64s
    end: Int64s
    """EOS and stop ids."""


def lists_of(request: NewRequest) -> RowLists:
    params = request.params
    ids, values, sequences = _biases(params)
    words = bad_words_of(request)
    return RowLists(
        bias_ids=ids,
        bias_values=values,
        bias_sequences=sequences,
        bans=_distinct(word[0] for word in words if len(word) == 1),
        bad_words=tuple(BadWord(np.array(word[:-1], np.int32), word[-1]) for word in words if len(word) > 1),
        allowed=None if params.allowed_token_ids is None else _distinct(params.allowed_token_ids),
        forced_eos=_distinct(params.forced_eos_token_id or ()),
        suppress=_distinct(params.suppress_tokens or ()),
        begin_suppress=_distinct(params.begin_suppress_tokens or ()),
        eos=_distinct(request.eos_token_ids),
        end=_distinct((*request.eos_token_ids, *request.stop_token_ids)),
    )


def _biases(params: GenerationParams) -> tuple[Int64s, Float32s, tuple[BiasSequence, ...]]:
    """Biases of single tokens, with `logit_bias` added, then the longer sequences. Of a sequence that is given twice
    the last bias counts, as in SequenceBiasLogitsProcessor."""
    biases = {tuple(entry.token_ids): entry.bias for entry in params.sequence_bias}
    single = {sequence[0]: bias for sequence, bias in biases.items() if len(sequence) == 1}
    for token, bias in params.logit_bias.items():
        single[token] = single.get(token, 0.0) + bias
    index = {token: i for i, token in enumerate(single)}
    by_length: dict[int, list[BiasSequence]] = {}
    for (*prefix, last), bias in biases.items():
        if prefix:
            sequence = BiasSequence(np.array(prefix, np.int32), index.setdefault(last, len(index)), bias)
            by_length.setdefault(len(prefix), []).append(sequence)
    values = np.zeros(len(index), np.float32)
    values[: len(single)] = list(single.values())
    return np.array(list(index), np.int64), values, tuple(itertools.chain.from_iterable(by_length.values()))


def _distinct(ids: Iterable[int]) -> Int64s:
    return np.unique(np.fromiter(ids, np.int64))
