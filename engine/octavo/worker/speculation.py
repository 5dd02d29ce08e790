"""Checks the drafts of a step: rows choose on behind their drafts, token by token, as long as the drafts were right.

Each token is chosen as in a step of its own: by the same sampler, with the history up to it and the random numbers of
its place in the output. A draft counts iff it is that token, so the tokens are those of steps without drafts, sampled
ones too (transformers' own speculation draws other numbers).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.step import FurtherTokens, Int32s, LogprobRows, ModelRunnerOutput, SchedulerOutput, UInt8s
from octavo.worker.logprobs import join_logprob_rows
from octavo.worker.request_states import Int64s, RequestStates
from octavo.worker.sampler import Sampler


def draft_indices(step: SchedulerOutput, rows: Int64s, query_start_loc: Int32s) -> Int64s:
    """[T] flat index of every draft token of those of the sampling rows [S] that have a draft, row after row."""
    first = step.num_rows - len(step.drafts)
    ends = query_start_loc[1:]
    parts = [np.arange(ends[row] - len(step.drafts[row - first]), ends[row]) for row in rows[rows >= first].tolist()]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


@dataclass(slots=True)
class _Round:
    """Rows that have chosen a token at one place behind their drafts."""

    rows: Int32s
    token_ids: Int32s
    finish: UInt8s
    logprobs: LogprobRows | None
    """Its rows are indices into `rows`."""


class DraftChecker:
    """Owned by the runner, whose sampler and states it uses."""

    def __init__(self, states: RequestStates, sampler: Sampler) -> None:
        self._states = states
        self._sampler = sampler

    def check(self, logits: Tensor, step: SchedulerOutput, rows: Int64s, output: ModelRunnerOutput) -> None:
        """After the first tokens of the step are chosen: adds further tokens to the output.

        Args:
            logits: [T, V] behind the draft tokens, at `draft_indices` of the same rows.
            rows: int64 [S] of the step, ascending; those without a draft do not matter.
        """
        first = step.num_rows - len(step.drafts)
        rows = rows[rows >= first]
        drafts = [step.drafts[row - first] for row in rows.tolist()]
        begins = np.cumsum([0, *map(len, drafts)])[:-1]
        alive = _followed(drafts, 0, np.arange(len(rows)), output.token_ids[rows])
        rounds: list[_Round] = []
        position = 0
        while len(alive):
            index = torch.from_numpy(begins[alive] + position).to(logits.device)
            chosen, kept = self._choose(logits[index], step.slots[rows[alive]])
            alive = alive[kept]
            chosen.rows = rows[alive].astype(np.int32)
            rounds.append(chosen)
            position += 1
            going = chosen.finish == 0
            alive = _followed(drafts, position, alive[going], chosen.token_ids[going])
        slots = step.slots[rows]
        self._states.num_computed[slots] = self._states.length[slots] - 1
        _add(output, rounds)

    def _choose(self, logits: Tensor, slots: Int32s) -> tuple[_Round, Int64s]:
        """The next tokens of these slots [K], and which of them chose one. A row that fails is left as it is: it fails
        in its next step, as it would have without a draft."""
        chosen = self._sampler.sample(logits, slots)
        kept = np.flatnonzero(chosen.token_ids >= 0)
        if chosen.logprobs is not None:
            chosen.logprobs.rows = np.searchsorted(kept, chosen.logprobs.rows).astype(np.int32)
        token_ids = chosen.token_ids[kept]
        return _Round(slots[kept], token_ids, self._states.append(slots[kept], token_ids), chosen.logprobs), kept


def _followed(drafts: list[Int32s], position: int, alive: Int64s, token_ids: Int32s) -> Int64s:
    """Those of the rows `alive` [A] (indices into `drafts`) whose draft goes on as they do, with token_ids [A]."""
    going = [
        row
        for row, token_id in zip(alive.tolist(), token_ids.tolist(), strict=True)
        if position < len(drafts[row]) and drafts[row][position] == token_id
    ]
    return np.array(going, np.int64)


def _add(output: ModelRunnerOutput, rounds: list[_Round]) -> None:
    if not rounds:
        return
    output.further = FurtherTokens(
        np.concatenate([part.rows for part in rounds]),
        np.concatenate([part.token_ids for part in rounds]),
        np.concatenate([part.finish for part in rounds]),
    )
    values = [] if output.logprobs is None else [output.logprobs]
    entry = len(output.token_ids)
    for part in rounds:
        if part.logprobs is not None:
            part.logprobs.rows += entry
            values.append(part.logprobs)
        entry += len(part.rows)
    output.logprobs = join_logprob_rows(values) if values else None
