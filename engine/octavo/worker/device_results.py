"""What a step chose on the device, on its way to the host's mirror of the states and to the scheduler."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from octavo_kernels.state import Finish

from octavo.errors import Reason
from octavo.step import FurtherTokens, Int32s, ModelRunnerOutput, SchedulerOutput
from octavo.worker.device_logprobs import ReadLogprobs
from octavo.worker.device_states import DeviceStates
from octavo.worker.request_states import Int64s, RequestStates
from octavo.worker.step_layout import StepLayout

FAILURES = {Finish.NON_FINITE_LOGITS: Reason.NON_FINITE_LOGITS, Finish.NON_FINITE_SCORES: Reason.NON_FINITE_SCORES}
LEAST_FAILURE = int(min(FAILURES))


@dataclass(frozen=True, slots=True)
class Choices:
    """Where a step chooses: N places in all, those of the first round, then of each further one."""

    rows: Int64s
    """[N] of the step."""
    places: Int64s
    """[N] rows of the step's results."""
    rounds: list[slice]
    """Of the N."""

    @staticmethod
    def of(step: SchedulerOutput, layout: StepLayout, rows: Int64s) -> Choices:
        """rows: [S] of the step, ascending, that choose a token."""
        if not step.drafts:
            return Choices(rows, layout.places[rows], [slice(0, len(rows))])
        lengths = np.zeros(step.num_rows, np.int64)
        lengths[-len(step.drafts) :] = [len(draft) for draft in step.drafts]
        shape, first = layout.shape, layout.shape.num_rows - layout.shape.draft_rows
        all_rows, all_places = [rows], [layout.places[rows]]
        for number in range(int(lengths[rows].max(initial=0))):
            longer = rows[lengths[rows] > number]
            all_rows.append(longer)
            all_places.append(shape.round_places(number).start + layout.places[longer] - first)
        ends = np.cumsum([0, *map(len, all_rows)]).tolist()
        rounds = [slice(begin, end) for begin, end in itertools.pairwise(ends)]
        return Choices(np.concatenate(all_rows), np.concatenate(all_places), rounds)


class ResultReader:
    """Brings the mirror up to the device, which is a step ahead."""

    def __init__(self, states: RequestStates, device_states: DeviceStates) -> None:
        self._states = states
        self._device_states = device_states

    def read(
        self,
        step: SchedulerOutput,
        choices: Choices,
        record: Int32s,
        values: ReadLogprobs | None,
        output: ModelRunnerOutput,
    ) -> None:
        """Adds to the output what was chosen. record: [N, 4], see `octavo_kernels.sampling`; values: of the N."""
        token_ids, finish, rows = record[:, 0], record[:, 1], choices.rows
        first = choices.rounds[0]
        failed = np.flatnonzero(finish[first] >= LEAST_FAILURE)
        if len(failed):
            self._states.fail(step.slots[rows[failed]])
            output.failed += [(int(rows[i]), FAILURES[Finish(int(finish[i]))]) for i in failed]
        chosen = self._append(step, choices, token_ids, finish)
        output.token_ids[rows[first]] = token_ids[first]
        output.finish[rows[chosen[0]]] = finish[chosen[0]]
        numbers = rows[chosen[0]]
        if step.drafts:
            behind = np.concatenate(chosen[1:]) if chosen[1:] else chosen[0][:0]
            further = rows[behind].astype(np.int32)
            output.further = FurtherTokens(further, token_ids[behind], finish[behind].astype(np.uint8))
            numbers = np.concatenate([numbers, step.num_rows + np.arange(len(further))])
            self._forget_drafts(step, step.slots[rows[first.stop :][finish[first.stop :] >= LEAST_FAILURE]])
        if values is not None:
            places = np.concatenate(chosen)
            output.logprobs = values(places.tolist())
            if output.logprobs is not None:
                output.logprobs.rows = numbers[np.searchsorted(places, output.logprobs.rows)].astype(np.int32)

    def _append(self, step: SchedulerOutput, choices: Choices, token_ids: Int32s, finish: Int32s) -> list[Int64s]:
        """Which of the N places chose a token, round by round; the mirror has these tokens."""
        chosen = []
        for places in choices.rounds:
            alive = np.flatnonzero(token_ids[places] >= 0) + places.start
            found = self._states.append(step.slots[choices.rows[alive]], token_ids[alive])
            assert (found == finish[alive]).all(), "host and device disagree about who has finished"
            chosen.append(alive)
        return chosen

    def _forget_drafts(self, step: SchedulerOutput, failed: Int32s) -> None:
        """The device took the whole drafts for computed. failed: slots that did behind a draft: each will again in its
        next step, as it would have without one, when the tokens before are sent."""
        slots = step.slots[-len(step.drafts) :]
        kept = self._states.length[slots] - 1
        moved = np.flatnonzero(self._states.num_computed[slots] != kept)
        self._states.num_computed[slots] = kept
        self._device_states.stage_num_computed(slots[moved], kept[moved])
        self._device_states.stage_running(failed)
