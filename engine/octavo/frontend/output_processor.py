"""From the core's outputs to the state of each request: tokens, stop strings, finish reasons, logprobs, times.

Synchronous and free of I/O, so that the server and `octavo.LLM` share it.
"""

from __future__ import annotations

import logging

import numpy as np

from octavo.errors import Reason, RequestError
from octavo.frontend.detokenizer import StopMatch
from octavo.frontend.failures import failure
from octavo.frontend.request_state import PromptState, RequestState, SequenceState
from octavo.frontend.requests import ProcessedRequest
from octavo.ipc import (
    BeamSequence,
    EngineCoreOutputs,
    LogprobColumns,
    PromptLogprobColumns,
    PromptStarted,
    SequenceLogprobColumns,
)
from octavo.tokenizer import Tokenizer
from octavo.types import FinishInfo, FinishReason, Logprobs

_log = logging.getLogger(__name__)


class OutputProcessor:
    """Keeps the state of every sequence in flight, by key."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._sequences: dict[int, SequenceState] = {}
        self._prompts: dict[int, PromptState] = {}
        """By the key of the prompt's first sequence, until the request ends."""
        self.num_waiting_tokens = 0
        """Of prompts whose computation has not finished."""

    @property
    def num_sequences(self) -> int:
        """In flight."""
        return len(self._sequences)

    def add(self, request: ProcessedRequest) -> RequestState:
        """Before the request goes to the core."""
        state = RequestState(request, self._tokenizer)
        for prompt in state.prompts:
            self._prompts[prompt.processed.core_request.key] = prompt
            for sequence in prompt.sequences:
                self._sequences[sequence.key] = sequence
        self.num_waiting_tokens += request.num_prompt_tokens
        return state

    def process(self, outputs: EngineCoreOutputs, now: float) -> tuple[list[RequestState], list[int]]:
        """Takes in one message. Returns the requests that changed, and keys to abort in the core (STOP_STRING).

        Outputs of sequences that have ended here are dropped. An exception while a request's tokens are handled
        fails that request alone, with INTERNAL.
        """
        changed: dict[int, RequestState] = {}
        aborts: list[int] = []
        for columns in outputs.prompt_logprobs:
            self._add_prompt_logprobs(columns)
        for started in outputs.started:
            self._start(started)
        for key, times in outputs.preempted:
            if (ending := self._sequences.get(key)) is not None:
                ending.prompt.request.preemptions += times
        self._process_tokens(outputs, now, changed, aborts)
        for found in outputs.beams:
            self._take_found(found, now, changed, aborts)
        for failed in outputs.failed:
            if (sequence := self._sequences.get(failed.key)) is not None:
                state = sequence.prompt.request
                del self._sequences[failed.key]
                aborts += self.fail(state, failure(failed.reason))
                changed[id(state)] = state
        return list(changed.values()), aborts

    def fail(self, state: RequestState, error: RequestError, *, aborted: bool = False) -> list[int]:
        """Ends a request. Returns the keys that still run and are to be aborted in the core.

        `aborted` gives the sequences that still run the finish reason ABORTED. Nothing happens to a request that has
        ended already.
        """
        if state.ended:
            return []
        running = []
        for prompt in state.prompts:
            for sequence in prompt.sequences:
                if sequence.finish is None and self._sequences.pop(sequence.key, None) is not None:
                    running.append(sequence.key)
                    if aborted:
                        sequence.finish = FinishInfo(FinishReason.ABORTED, sequence.num_tokens)
                        state.queue(sequence)
        state.fail(error)
        self._forget(state)
        return running

    def _process_tokens(
        self, outputs: EngineCoreOutputs, now: float, changed: dict[int, RequestState], aborts: list[int]
    ) -> None:
        sequences = self._sequences
        keys: list[int] = np.frombuffer(outputs.keys, "<i8").tolist()
        token_ids: list[int] = np.frombuffer(outputs.token_ids, "<i4").tolist()
        rows = _LogprobRows(outputs.logprobs) if outputs.logprobs is not None else None
        for entry, (key, token_id, reason) in enumerate(zip(keys, token_ids, outputs.finish, strict=True)):
            sequence = sequences.get(key)
            if sequence is None:
                continue
            state = sequence.prompt.request
            changed[id(state)] = state
            try:
                match = self._add_token(sequence, state, token_id, now) if token_id >= 0 else None
                if rows is not None and token_id >= 0:
                    rows.add_to(sequence, entry)
                if reason or match is not None:
                    del sequences[key]
                    if not reason:
                        aborts.append(key)
                    self._end(sequence, FinishReason(reason), match, token_id)
            except Exception:
                _log.exception("request %s failed while its output was processed", state.request.request_id)
                aborts += self.fail(state, failure(Reason.INTERNAL))

    def _take_found(self, found: BeamSequence, now: float, changed: dict[int, RequestState], aborts: list[int]) -> None:
        """A whole sequence of a beam search."""
        sequence = self._sequences.pop(found.key, None)
        if sequence is None:
            return
        state = sequence.prompt.request
        try:
            match, token_id = None, -1
            for token_id in _ints(found.token_ids):
                match = self._add_token(sequence, state, token_id, now)
            state.last_token = now
            sequence.score = found.score
            sequence.logprobs = None if found.logprobs is None else _logprobs(found.logprobs)
            by_string = found.finish == FinishReason.STOP_STRING
            assert match is not None or not by_string, "the core saw a stop string that is not there"
            reason, match = (FinishReason.NONE, match) if by_string else (found.finish, None)
            self._end(sequence, reason, match, token_id)
        except Exception:
            _log.exception("request %s failed while its output was processed", state.request.request_id)
            aborts += self.fail(state, failure(Reason.INTERNAL))
        changed[id(state)] = state

    def _add_token(self, sequence: SequenceState, state: RequestState, token_id: int, now: float) -> StopMatch | None:
        if not sequence.pending:
            sequence.pending_since = now
            if not sequence.queued:
                state.queue(sequence)
        sequence.pending.append(token_id)
        sequence.num_tokens += 1
        state.last_token = now
        if sequence.num_tokens == 1:
            state.first_token = min(state.first_token, now)
        if sequence.matcher is None:
            return None
        return sequence.matcher.push(self._tokenizer.token_bytes[token_id])

    def _end(self, sequence: SequenceState, reason: FinishReason, match: StopMatch | None, token_id: int) -> None:
        """Several reasons may hold at one token: the smallest wins."""
        state = sequence.prompt.request
        if match is not None and (not reason or reason > FinishReason.STOP_STRING):
            stop_string = state.request.params.stop_strings[match.index]
            sequence.finish = FinishInfo(FinishReason.STOP_STRING, sequence.num_tokens, stop_string=stop_string)
            if sequence.detokenizer is not None:
                sequence.detokenizer.stop_at(match)
        else:
            if reason == FinishReason.LENGTH and sequence.prompt.processed.core_request.length_is_context:
                reason = FinishReason.CONTEXT
            ended_by_token = reason in (FinishReason.EOS, FinishReason.STOP_TOKEN)
            sequence.finish = FinishInfo(reason, sequence.num_tokens, token_id=token_id if ended_by_token else None)
        state.queue(sequence)
        state.end_sequence()
        if state.ended:
            self._forget(state)

    def _start(self, started: PromptStarted) -> None:
        prompt = self._prompts.get(started.key)
        if prompt is None or prompt.started:
            return
        prompt.started = True
        prompt.cached_tokens = started.cached_tokens
        prompt.request.first_scheduled = min(prompt.request.first_scheduled, started.scheduled_time)
        self.num_waiting_tokens -= len(prompt.processed.token_ids)

    def _add_prompt_logprobs(self, columns: PromptLogprobColumns) -> None:
        prompt = self._prompts.get(columns.key)
        if prompt is None:
            return
        chunk = _logprobs(columns)
        if prompt.logprobs is None:
            prompt.logprobs = chunk
        elif columns.start == len(prompt.logprobs.chosen) + 1:  # else: recomputed after a preemption
            prompt.logprobs.extend(chunk)

    def _forget(self, state: RequestState) -> None:
        """The request has ended; its reader may still hold the state."""
        for prompt in state.prompts:
            self._prompts.pop(prompt.processed.core_request.key, None)
            if not prompt.started:
                self.num_waiting_tokens -= len(prompt.processed.token_ids)


class _LogprobRows:
    """The columns of one message as lists, found by entry."""

    def __init__(self, columns: LogprobColumns) -> None:
        self._row_of_entry = {entry: row for row, entry in enumerate(_ints(columns.entries))}
        self._chosen = _floats(columns.chosen)
        self._ranks = _ints(columns.ranks)
        self._top_offsets = _ints(columns.top_offsets)
        self._top_token_ids = _ints(columns.top_token_ids)
        self._top_values = _floats(columns.top_values)
        self._requested_offsets = _ints(columns.requested_offsets)
        self._requested = _floats(columns.requested)

    def add_to(self, sequence: SequenceState, entry: int) -> None:
        """Appends the entry's values, if it has any, to those that wait for the reader."""
        row = self._row_of_entry.get(entry)
        if row is None:
            return
        top = slice(self._top_offsets[row], self._top_offsets[row + 1])
        requested = slice(self._requested_offsets[row], self._requested_offsets[row + 1])
        values = sequence.logprobs
        if values is None:
            values = Logprobs(num_top=top.stop - top.start)
            sequence.logprobs = values
        values.chosen.append(self._chosen[row])
        values.ranks.append(self._ranks[row])
        values.top_token_ids += self._top_token_ids[top]
        values.top_values += self._top_values[top]
        values.requested += self._requested[requested]


def _logprobs(columns: PromptLogprobColumns | SequenceLogprobColumns) -> Logprobs:
    return Logprobs(
        num_top=columns.num_top,
        chosen=_floats(columns.chosen),
        ranks=_ints(columns.ranks),
        top_token_ids=_ints(columns.top_token_ids),
        top_values=_floats(columns.top_values),
        requested=_floats(columns.requested) if isinstance(columns, SequenceLogprobColumns) else [],
    )


def _ints(data: bytes) -> list[int]:
    values: list[int] = np.frombuffer(data, "<i4").tolist()
    return values


def _floats(data: bytes) -> list[float]:
    values: list[float] = np.frombuffer(data, "<f4").tolist()
    return values
