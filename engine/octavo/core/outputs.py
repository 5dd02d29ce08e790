"""What a step tells each front-end, gathered row by row or by column, and sent as one message each."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from octavo.core.request import Request
from octavo.core.running_batch import Slots
from octavo.errors import Reason
from octavo.ipc import (
    BeamSequence,
    EngineCoreOutputs,
    LogprobColumns,
    PromptLogprobColumns,
    PromptStarted,
    SequenceFailed,
    SequenceLogprobColumns,
)
from octavo.step import BeamHypothesis, Int32s, LogprobRows, PromptLogprobs, SequenceLogprobs, UInt8s
from octavo.types import FinishReason

_NO_TOKENS = np.empty(0, np.int32)
_NO_KEYS = np.empty(0, np.int64)
_NO_FINISH = np.empty(0, np.uint8)


@dataclass(slots=True)
class FrontendEvents:
    """The events of one front-end that are not columns of the step."""

    started: list[PromptStarted] = field(default_factory=list)
    failed: list[SequenceFailed] = field(default_factory=list)
    preempted: list[tuple[int, int]] = field(default_factory=list)
    ended_waiting: list[tuple[int, FinishReason]] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobColumns] = field(default_factory=list)
    beams: list[BeamSequence] = field(default_factory=list)


@dataclass(slots=True)
class StepTokens:
    """The columns of a step: entry i is a token of the step's row `rows[i]`; those of a sequence are in order."""

    rows: Int32s
    """Ascending; R + i is the i-th of the further tokens of the step's R rows."""
    slots: Slots
    frontends: Int32s
    keys: npt.NDArray[np.int64]
    token_ids: Int32s
    finish: UInt8s
    logprobs: LogprobRows | None


class Events:
    """Collects events per front-end until they are taken."""

    def __init__(self) -> None:
        self._by_frontend: dict[int, FrontendEvents] = {}

    def of(self, frontend: int) -> FrontendEvents:
        events = self._by_frontend.get(frontend)
        if events is None:
            events = self._by_frontend[frontend] = FrontendEvents()
        return events

    def fail(self, frontend: int, key: int, reason: Reason) -> None:
        self.of(frontend).failed.append(SequenceFailed(key, reason))

    def found(self, request: Request, hypotheses: list[BeamHypothesis]) -> None:
        """A beam search has ended with these."""
        beams = self.of(request.frontend).beams
        for key, hypothesis in zip(request.keys, hypotheses, strict=True):
            reason = hypothesis.finish
            if reason is FinishReason.LENGTH and request.spec.length_is_context:
                reason = FinishReason.CONTEXT
            logprobs = None if hypothesis.logprobs is None else _sequence_logprob_columns(hypothesis.logprobs)
            beams.append(BeamSequence(key, hypothesis.token_ids.tobytes(), reason, hypothesis.score, logprobs))

    @property
    def pending(self) -> bool:
        return bool(self._by_frontend)

    def drop(self, frontend: int) -> None:
        self._by_frontend.pop(frontend, None)

    def take(self, step_id: int, tokens: StepTokens | None) -> dict[int, EngineCoreOutputs]:
        """One message per front-end that something happened to."""
        events, self._by_frontend = self._by_frontend, {}
        frontends = set(events)
        if tokens is not None and len(tokens.rows):
            first = int(tokens.frontends[0])
            frontends.add(first)
            if np.count_nonzero(tokens.frontends != first):
                frontends.update(tokens.frontends.tolist())
        outputs = {}
        for frontend in sorted(frontends):
            own = tokens if tokens is None or len(frontends) == 1 else _select(tokens, tokens.frontends == frontend)
            outputs[frontend] = _message(step_id, own, events.get(frontend))
        return outputs


def _select(tokens: StepTokens, mask: npt.NDArray[np.bool_]) -> StepTokens:
    return StepTokens(
        tokens.rows[mask],
        tokens.slots[mask],
        tokens.frontends[mask],
        tokens.keys[mask],
        tokens.token_ids[mask],
        tokens.finish[mask],
        tokens.logprobs,
    )


def _message(step_id: int, tokens: StepTokens | None, events: FrontendEvents | None) -> EngineCoreOutputs:
    keys, token_ids, finish, logprobs = _NO_KEYS, _NO_TOKENS, _NO_FINISH, None
    if tokens is not None:
        keys, token_ids, finish = tokens.keys, tokens.token_ids, tokens.finish
        if tokens.logprobs is not None:
            logprobs = _logprob_columns(tokens.rows, tokens.logprobs)
    if events is None:
        return EngineCoreOutputs(step_id, keys.tobytes(), token_ids.tobytes(), finish.tobytes(), logprobs=logprobs)
    if events.ended_waiting:
        keys = np.concatenate([keys, np.array([key for key, _ in events.ended_waiting], np.int64)])
        token_ids = np.concatenate([token_ids, np.full(len(events.ended_waiting), -1, np.int32)])
        finish = np.concatenate([finish, np.array([reason for _, reason in events.ended_waiting], np.uint8)])
    return EngineCoreOutputs(
        step_id,
        keys.tobytes(),
        token_ids.tobytes(),
        finish.tobytes(),
        started=events.started,
        failed=events.failed,
        preempted=events.preempted,
        logprobs=logprobs,
        prompt_logprobs=events.prompt_logprobs,
        beams=events.beams,
    )


def _logprob_columns(rows: Int32s, values: LogprobRows) -> LogprobColumns | None:
    """The values of those of `rows` (ascending) that asked; entries number the positions in `rows`."""
    positions = np.searchsorted(rows, values.rows)
    positions[positions == len(rows)] = 0
    wanted = np.flatnonzero(rows[positions] == values.rows) if len(rows) else np.empty(0, np.int64)
    if not len(wanted):
        return None
    top_offsets, top = _gather(values.top_offsets, wanted)
    requested_offsets, requested = _gather(values.requested_offsets, wanted)
    return LogprobColumns(
        entries=positions[wanted].astype(np.int32).tobytes(),
        chosen=values.chosen[wanted].tobytes(),
        ranks=values.ranks[wanted].tobytes(),
        top_offsets=top_offsets.tobytes(),
        top_token_ids=values.top_token_ids[top].tobytes(),
        top_values=values.top_values[top].tobytes(),
        requested_offsets=requested_offsets.tobytes(),
        requested=values.requested[requested].tobytes(),
    )


def _sequence_logprob_columns(values: SequenceLogprobs) -> SequenceLogprobColumns:
    return SequenceLogprobColumns(
        num_top=values.num_top,
        chosen=values.chosen.tobytes(),
        ranks=values.ranks.tobytes(),
        top_token_ids=values.top_token_ids.tobytes(),
        top_values=values.top_values.tobytes(),
        requested=values.requested.tobytes(),
    )


def _gather(offsets: Int32s, wanted: npt.NDArray[np.intp]) -> tuple[Int32s, npt.NDArray[np.intp]]:
    """New offsets, and the indices of the elements, of the wanted ranges."""
    starts, lengths = offsets[wanted], np.diff(offsets)[wanted]
    new_offsets = np.zeros(len(wanted) + 1, np.int32)
    np.cumsum(lengths, out=new_offsets[1:])
    index = np.arange(new_offsets[-1]) + np.repeat(starts - new_offsets[:-1], lengths)
    return new_offsets, index


def prompt_logprob_columns(key: int, values: PromptLogprobs, skip: int) -> PromptLogprobColumns:
    """The chunk without its first `skip` entries, which were sent before a preemption."""
    return PromptLogprobColumns(
        key=key,
        start=values.start + skip,
        num_top=values.num_top,
        chosen=values.chosen[skip:].tobytes(),
        ranks=values.ranks[skip:].tobytes(),
        top_token_ids=values.top_token_ids[skip:].tobytes(),
        top_values=values.top_values[skip:].tobytes(),
    )
