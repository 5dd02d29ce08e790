"""Chooses tokens on the host: of ordinary requests, guided sequences and beam searches, from their rows' logits.

The CPU's runner has all rows chosen here, the kernels' runner those that its fused sampler does not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from octavo.step import Bools, Int32s, ModelRunnerOutput, NewRequest, SchedulerOutput
from octavo.worker.beams import Beams, is_beam_search
from octavo.worker.guidance import guide
from octavo.worker.logprobs import join_logprob_rows
from octavo.worker.noise import RandomNumbers
from octavo.worker.request_states import Int64s, RequestStates
from octavo.worker.sampler import Sampler


class HostSampler:
    """Owns the random numbers and the beam searches of the requests whose tokens it chooses."""

    def __init__(self, states: RequestStates, noise: RandomNumbers, checkpoint: Path) -> None:
        """`checkpoint`: the folder, for the bytes of its tokens."""
        self._states = states
        self._noise = noise
        self._beams = Beams(states, noise, checkpoint)
        self._sampler = Sampler(states, noise)

    def apply(self, step: SchedulerOutput, requests: Iterable[NewRequest]) -> None:
        """Brings what is kept by group up to the step's beginning. `requests`: the new ones to choose tokens for."""
        for group_id in step.released_groups:
            self.release(group_id)
        for group_id, row in step.ended_rows:
            self._noise.row_ended(group_id, row)
        for request in requests:
            if request.params.do_sample:
                self._noise.open(request.group_id, request.seed, request.num_rows)
            if is_beam_search(request.params):
                self._beams.open(request)

    def release(self, group_id: int) -> None:
        self._noise.close(group_id)
        self._beams.close(group_id)

    def of_searches(self, slots: Int32s) -> Bools:
        """[S] which of these slots are rows of a beam search."""
        return self._beams.of_searches(slots)

    def choose(self, logits: Tensor, step: SchedulerOutput, rows: Int64s, output: ModelRunnerOutput) -> None:
        """Chooses for rows of a step and brings their request states up to it.

        Args:
            logits: [S, V] in the model's dtype; not changed.
            rows: [S] the step's rows they are of: with one row of a guided sequence or a search, all.
            output: gets what was chosen, beside what is there of other rows.
        """
        if self._beams:
            logits, rows = self._advance_beams(logits, step, rows, output)
        if len(rows):
            self._choose(logits, step.slots, rows, output)

    def _advance_beams(
        self, logits: Tensor, step: SchedulerOutput, rows: Int64s, output: ModelRunnerOutput
    ) -> tuple[Tensor, Int64s]:
        """Takes the step of every beam search; the logits and rows of the others."""
        of_searches = self._beams.of_searches(step.slots[rows])
        mask = torch.from_numpy(of_searches).to(logits.device)
        own = rows[of_searches]
        self._beams.choose(logits[mask], step.slots[own], own, step.expired_groups, output)
        return logits[~mask], rows[~of_searches]

    def _choose(self, logits: Tensor, slots: Int32s, rows: Int64s, output: ModelRunnerOutput) -> None:
        """Samples the rows [S] of a step and appends the tokens to their requests."""
        states, guided = self._states, None
        if states.is_negative[slots[rows]].any():
            kept, guided = guide(logits, slots[rows], states)
            logits, rows = logits[torch.from_numpy(kept).to(logits.device)], rows[kept]
        chosen = self._sampler.sample(logits, slots[rows], guided)
        if chosen.failed:
            failed = [(int(rows[i]), reason) for i, reason in chosen.failed]
            states.fail(slots[[row for row, _ in failed]])
            output.failed += failed
        if chosen.logprobs is not None:
            chosen.logprobs.rows = rows[chosen.logprobs.rows].astype(np.int32)
            others = [] if output.logprobs is None else [output.logprobs]
            output.logprobs = join_logprob_rows([*others, chosen.logprobs])
        output.token_ids[rows] = chosen.token_ids
        alive = rows[chosen.token_ids >= 0] if chosen.failed else rows
        output.finish[alive] = states.append(slots[alive], output.token_ids[alive])
