"""The choices of one beam search, step by step, as transformers' `GenerationMixin._beam_search` makes them (5.23).

k rows decode in lockstep, and a pool keeps the best k sequences that have ended. Each step takes the processed
log-probabilities of the rows and answers which parent each new row goes on from and which token it appends. The model
never sees the search, and the search never sees the model. Every number comes from the same torch operations on the
same shapes as in transformers, so that ties fall the same way.

Notation: k beams, V tokens, P prompt length, C = max(2, 1 + number of ends) * k candidates per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from octavo.step import BeamHypothesis, Int32s
from octavo.types import EarlyStopping, FinishReason

UNREACHABLE: Final = -1.0e9
"""Added to a score to take it out of a top-k, where others would use -inf."""

Race = Callable[[int], Tensor]
"""float32 [1, k * V] Exp(1) numbers of a step, which counts the tokens chosen before."""

StopFinder = Callable[[Int32s, int], bool]
"""Whether a history (int32 [L], prompt included) with this token after it has just hit a stop string."""


@dataclass(frozen=True, slots=True)
class BeamParams:
    """Resolved parameters of a search."""

    num_beams: int
    num_return_sequences: int
    prompt_len: int
    max_total_tokens: int
    """Prompt plus output."""
    eos_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]
    length_penalty: float
    early_stopping: EarlyStopping
    do_sample: bool

    @property
    def min_keep(self) -> int:
        """Tokens of a row that every warper leaves: enough for one that goes on beside all ends."""
        return max(2, 1 + len(self.eos_token_ids) + len(self.stop_token_ids))

    @property
    def num_candidates(self) -> int:
        """C: enough for k rows that go on even if every row's best tokens are ends."""
        return self.min_keep * self.num_beams


@dataclass(frozen=True, slots=True)
class _PoolEntry:
    score: float
    token_ids: Int32s | None
    """Without the prompt; None in an empty place."""
    finish: FinishReason = FinishReason.LENGTH


@dataclass(frozen=True, slots=True)
class Selection:
    """The next rows: row i is old row parents[i] with token_ids[i] appended."""

    parents: Int32s
    token_ids: Int32s
    found: list[BeamHypothesis] | None
    """The sequences asked for, best first, when the search is over."""


class BeamSearch:
    """State of one search: scores of the rows, and the pool. Survives a preemption."""

    def __init__(self, params: BeamParams, race: Race | None = None, find_stop: StopFinder | None = None) -> None:
        """`race`: for a search that samples."""
        k = params.num_beams
        self.params = params
        self._running = torch.tensor([0.0] + [UNREACHABLE] * (k - 1))  # [k] fp32; at first only row 0 counts
        self._pool = [_PoolEntry(UNREACHABLE, None)] * k  # best first
        self._race = race
        self._find_stop = find_stop

    def accumulated(self, scores: Tensor) -> Tensor:
        """[1, k * V] what each candidate would have, from the rows' [k, V] processed log-probabilities."""
        return (scores + self._running[:, None]).reshape(1, -1)

    def select(self, flat: Tensor, histories: Int32s, *, out_of_time: bool = False) -> Selection:
        """Advances the search by one token.

        Args:
            flat: from `accumulated`.
            histories: [k, L] the rows' tokens, prompt included.
            out_of_time: every candidate ends here.
        """
        vocab_size = flat.shape[1] // self.params.num_beams
        scores, index = self._candidates(flat, histories.shape[1] - self.params.prompt_len)
        parents, tokens = np.divmod(index.numpy().astype(np.int32), np.int32(vocab_size))
        finish = [
            self._finish_of(histories[parent], token, out_of_time)
            for parent, token in zip(parents.tolist(), tokens.tolist(), strict=True)
        ]
        ended = torch.tensor([reason is not FinishReason.NONE for reason in finish])
        # Scores of ended candidates sink but stay in the list, so that fewer than k others are filled up from it.
        continuing = scores + ended.float() * UNREACHABLE
        chosen = torch.topk(continuing, self.params.num_beams).indices
        output_len = histories.shape[1] + 1 - self.params.prompt_len
        outputs = histories[:, self.params.prompt_len :]
        self._add_to_pool(scores, ended, finish, outputs, parents, tokens, output_len)
        self._running = continuing[chosen]
        order = chosen.numpy()
        done = self._is_over(output_len, all_ended=bool(ended.all()))
        return Selection(parents[order], tokens[order], self._found() if done else None)

    def _candidates(self, flat: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """C of the k * V continuations, [C] each; sampled ones stay in the order in which they were drawn."""
        if not self.params.do_sample:
            best = torch.topk(flat, self.params.num_candidates)
            return best.values[0], best.indices[0]
        assert self._race is not None
        # torch.multinomial without replacement is this (pytorch/pytorch aten/src/ATen/native/Distributions.cpp).
        index = torch.topk(flat.softmax(-1) / self._race(step), self.params.num_candidates).indices
        return flat.gather(1, index)[0], index[0]

    def _finish_of(self, history: Int32s, token: int, out_of_time: bool) -> FinishReason:
        """Why a candidate ends; the smallest reason wins."""
        params = self.params
        if token in params.eos_token_ids:
            return FinishReason.EOS
        if token in params.stop_token_ids:
            return FinishReason.STOP_TOKEN
        if self._find_stop is not None and self._find_stop(history, token):
            return FinishReason.STOP_STRING
        if len(history) + 1 >= params.max_total_tokens:
            return FinishReason.LENGTH
        return FinishReason.TIME if out_of_time else FinishReason.NONE

    def _add_to_pool(
        self,
        scores: Tensor,
        ended: Tensor,
        finish: list[FinishReason],
        outputs: Int32s,
        parents: Int32s,
        tokens: Int32s,
        output_len: int,
    ) -> None:
        """Merges candidates of rank < k that have ended into the pool, by score over output length ** penalty."""
        k = self.params.num_beams
        normalised = scores / _power(output_len, self.params.length_penalty)
        accepted = ended & (torch.arange(len(scores)) < k)
        normalised = normalised + (~accepted).float() * UNREACHABLE
        merged = torch.cat([torch.tensor([entry.score for entry in self._pool]), normalised])
        pool = []
        for place in torch.topk(merged, k).indices.tolist():
            i = place - k
            if i < 0:
                pool.append(self._pool[place])
            elif not accepted[i]:
                pool.append(_PoolEntry(float(normalised[i]), None))
            else:
                token_ids = np.append(outputs[parents[i]], tokens[i]).astype(np.int32)
                pool.append(_PoolEntry(float(normalised[i]), token_ids, finish[i]))
        self._pool = pool

    def _is_over(self, output_len: int, *, all_ended: bool) -> bool:
        """Nothing left to run, a full pool under early_stopping, or no running row that could enter the pool."""
        params = self.params
        full = all(entry.token_ids is not None for entry in self._pool)
        if all_ended or (params.early_stopping is EarlyStopping.TRUE and full):
            return True
        optimistic = params.early_stopping is EarlyStopping.NEVER and params.length_penalty > 0.0
        best_len = params.max_total_tokens - params.prompt_len if optimistic else output_len
        best = float(self._running[0] / _power(best_len, params.length_penalty))
        worst = min(entry.score for entry in self._pool)
        return not any(best > (UNREACHABLE if entry.token_ids is None else worst) for entry in self._pool)

    def _found(self) -> list[BeamHypothesis]:
        nothing = np.empty(0, np.int32)
        return [
            BeamHypothesis(nothing if entry.token_ids is None else entry.token_ids, entry.finish, entry.score)
            for entry in self._pool[: self.params.num_return_sequences]
        ]


def _power(length: int, penalty: float) -> float:
    """length ** penalty; infinite where Python, and transformers with it, raises OverflowError."""
    try:
        return float(length**penalty)
    except OverflowError:
        return math.inf


def contains_stop(tail: bytes, data: bytes, stops: list[bytes]) -> bool:
    """Whether a stop string ends inside `data`, which follows `tail`; it may begin there and go on beyond the match."""
    window = tail + data
    return any(window.find(stop, max(0, len(tail) - len(stop) + 1)) >= 0 for stop in stops)
