"""The state of a request in the front-end: what came from the core, and what its reader has not taken yet.

Each sequence has one pending slot. Steps add to it, `take` empties it, so that a slow reader gets fewer and larger
updates and memory is bounded by the size of the answer.
"""

from __future__ import annotations

from math import inf

from octavo.errors import RequestError
from octavo.frontend.detokenizer import Detokenizer, StopMatcher
from octavo.frontend.requests import ProcessedPrompt, ProcessedRequest, bytes_per_token
from octavo.tokenizer import Tokenizer
from octavo.types import (
    FinishInfo,
    FinishReason,
    GenerateUpdate,
    Logprobs,
    OutputDelta,
    OutputOptions,
    PromptInfo,
    StopStringOutput,
    Timing,
    Usage,
)


class SequenceState:
    """One sequence until it ends. Written by the OutputProcessor."""

    __slots__ = (
        "delivered",
        "detokenizer",
        "finish",
        "key",
        "logprobs",
        "matcher",
        "num_tokens",
        "output_index",
        "pending",
        "pending_since",
        "prompt",
        "queued",
        "score",
    )

    def __init__(self, prompt: PromptState, key: int, output_index: int, detokenizer: Detokenizer | None) -> None:
        self.prompt = prompt
        self.key = key
        self.output_index = output_index
        self.detokenizer = detokenizer
        """None without return_text."""
        self.matcher: StopMatcher | None = None
        self.num_tokens = 0
        """Generated so far."""
        self.pending: list[int] = []
        """Tokens not taken yet."""
        self.pending_since = 0.0
        self.logprobs: Logprobs | None = None
        """Of the pending tokens."""
        self.finish: FinishInfo | None = None
        self.score: float | None = None
        """Of a sequence that a beam search found."""
        self.delivered = False
        """Something was taken."""
        self.queued = False
        """In the request's list of sequences that have something to take."""

    def take(self, output: OutputOptions) -> OutputDelta | None:
        """Empties the slot; None if that leaves nothing to tell."""
        token_ids, self.pending = self.pending, []
        logprobs, self.logprobs = self.logprobs, None
        text = ""
        if self.detokenizer is not None:
            # Where the sequence was cut off, the rest could still have become part of a character or a stop string.
            final = self.finish is not None and self.finish.reason != FinishReason.ABORTED
            text = self.detokenizer.take(token_ids, final=final)
            if not self.delivered and self.prompt.processed.text is not None:
                text = self.prompt.processed.text + text
        self.delivered = True
        token_ids = token_ids if output.return_token_ids else []
        if not text and not token_ids and self.finish is None:
            return None
        return OutputDelta(
            prompt_index=self.prompt.processed.index,
            output_index=self.output_index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish=self.finish,
            sequence_score=self.score,
        )


class PromptState:
    """One prompt of a request."""

    __slots__ = ("cached_tokens", "info_taken", "logprobs", "processed", "request", "sequences", "started")

    def __init__(self, request: RequestState, processed: ProcessedPrompt) -> None:
        self.request = request
        self.processed = processed
        self.sequences: list[SequenceState] = []
        self.started = False
        self.cached_tokens = 0
        self.logprobs: Logprobs | None = None
        self.info_taken = False

    def take_info(self, output: OutputOptions, last: bool) -> PromptInfo | None:
        """Once, when the prompt's computation has finished; at the `last` chance in any case."""
        if self.info_taken or not (self.started or last):
            return None
        self.info_taken = True
        if self.logprobs is None and output.prompt_logprobs is not None:  # a prompt of one token has no rows
            self.logprobs = Logprobs(num_top=output.prompt_logprobs)
        return PromptInfo(
            prompt_index=self.processed.index,
            prompt_tokens=len(self.processed.token_ids),
            cached_tokens=self.cached_tokens,
            seed=self.processed.seed,
            token_ids=self.processed.token_ids if output.return_prompt_token_ids else [],
            logprobs=self.logprobs,
        )


class RequestState:
    """One request until its last update is taken. Owned by the OutputProcessor; readers call `due` and `take`."""

    def __init__(self, request: ProcessedRequest, tokenizer: Tokenizer) -> None:
        self.request = request
        self.error: RequestError | None = None
        """Why the request failed; what was generated before can still be taken."""
        self.ended = False
        """No more will come: every sequence has ended, or the request failed."""
        self.prompts = [PromptState(self, processed) for processed in request.prompts]
        self.num_running = request.num_sequences
        self.first_scheduled = inf
        self.first_token = inf
        self.last_token = request.arrival_time
        self.preemptions = 0
        self._queued: list[SequenceState] = []
        self._infos_left = len(self.prompts)
        self._complete = False
        self._bytes_per_token = bytes_per_token(request.output)
        tokens = sum(prompt.core_request.max_total_tokens - len(prompt.token_ids) for prompt in request.prompts)
        self.max_bytes = self._bytes_per_token * tokens * request.core_requests[0].num_sequences
        """What `num_pending_bytes` can be at most."""
        self.holds_back = (request.output.stream_min_tokens or 1) > 1
        """What is pending may have to wait; if not, it is due at once."""
        has_logprobs = request.core_requests[0].logprobs is not None
        self._can_be_plain = not self.holds_back and request.num_sequences == 1 and not has_logprobs
        self._plain: SequenceState | None = None
        """The one sequence of a request that can be plain, once all that only the first update has was taken."""
        for prompt in self.prompts:
            for i, key in enumerate(prompt.processed.keys):
                prompt.sequences.append(_sequence(prompt, key, i, tokenizer))

    @property
    def taken(self) -> bool:
        """The reader has everything but the error."""
        return self.ended and not self._queued and (self._complete or self.error is not None)

    @property
    def num_pending_bytes(self) -> int:
        """Estimated size of what waits for the reader."""
        return self._bytes_per_token * sum(len(sequence.pending) for sequence in self._queued)

    def fail(self, error: RequestError) -> None:
        """Ends it with an error."""
        self.error, self.ended = error, True

    def end_sequence(self) -> None:
        """One of the running sequences has ended."""
        self.num_running -= 1
        if self.num_running == 0:
            self.ended = True

    def queue(self, sequence: SequenceState) -> None:
        """The sequence has something to take."""
        if not sequence.queued:
            sequence.queued = True
            self._queued.append(sequence)

    def due(self, now: float) -> float:
        """Seconds until `take` has something to give: 0 at once, infinity if nothing is pending."""
        if self.ended:
            return inf if self.taken else 0.0
        if not self.holds_back:
            return 0.0 if self._queued else inf
        return min((self._due(sequence, now) for sequence in self._queued), default=inf)

    def take_plain(self) -> tuple[str, list[int]] | None:
        """`take` without its structs, where a request of one sequence goes on and has only text and ids to tell: most
        updates by far. None, and nothing is taken, where there is more to tell or nothing at all."""
        sequence = self._plain
        if sequence is None or self.ended or not sequence.pending:
            return None
        self._queued.clear()
        sequence.queued = False
        token_ids, sequence.pending = sequence.pending, []
        text = "" if sequence.detokenizer is None else sequence.detokenizer.take(token_ids, final=False)
        return text, token_ids if self.request.output.return_token_ids else []

    def take(self, now: float) -> GenerateUpdate | None:
        """What is due since the last call, merged; None if nothing. After the end everything is due.

        The update that completes a successful request has `usage` and `timing`.
        """
        output, ended = self.request.output, self.ended
        queued, self._queued = self._queued, []
        update = GenerateUpdate(prompts=self._take_infos(output) if self._infos_left else [])
        for sequence in queued:
            if self.holds_back and not ended and self._due(sequence, now) > 0:
                self._queued.append(sequence)
                continue
            sequence.queued = False
            delta = sequence.take(output)
            if delta is not None:
                update.deltas.append(delta)
        if len(update.deltas) > 1:
            update.deltas.sort(key=lambda delta: (delta.prompt_index, delta.output_index))
        if self.num_running == 0 and self.error is None and not self._complete:
            self._complete = True
            update.usage, update.timing = self._usage(), self._timing()
        if not update.prompts and not update.deltas and update.usage is None:
            return None
        if self._can_be_plain and update.deltas and not self._infos_left:
            self._plain = self.prompts[0].sequences[0]
        return update

    def _due(self, sequence: SequenceState, now: float) -> float:
        output = self.request.output
        if sequence.finish is not None or not sequence.delivered:
            return 0.0
        if len(sequence.pending) >= (output.stream_min_tokens or 1):
            return 0.0
        return max(0.0, sequence.pending_since + (output.stream_max_delay or 0.0) - now)

    def _take_infos(self, output: OutputOptions) -> list[PromptInfo]:
        last = self.num_running == 0
        infos = [info for prompt in self.prompts if (info := prompt.take_info(output, last)) is not None]
        self._infos_left -= len(infos)
        return infos

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.request.num_prompt_tokens,
            completion_tokens=sum(sequence.num_tokens for prompt in self.prompts for sequence in prompt.sequences),
            cached_tokens=sum(prompt.cached_tokens for prompt in self.prompts),
        )

    def _timing(self) -> Timing:
        arrival = self.request.arrival_time
        return Timing(
            queue=max(0.0, min(self.first_scheduled, self.last_token) - arrival),
            time_to_first_token=max(0.0, min(self.first_token, self.last_token) - arrival),
            total=max(0.0, self.last_token - arrival),
            preemptions=self.preemptions,
        )


def _sequence(prompt: PromptState, key: int, index: int, tokenizer: Tokenizer) -> SequenceState:
    params, output = prompt.request.request.params, prompt.request.request.output
    matcher = None
    if params.stop_strings:
        tail = b""
        if not params.stop_strings_ignore_prompt:
            tail = StopMatcher.tail_of_prompt(tokenizer, prompt.processed.token_ids, params.stop_strings)
        matcher = StopMatcher(params.stop_strings, tail)
    detokenizer = None
    if output.return_text:
        detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=bool(output.skip_special_tokens),
            matcher=matcher,
            output=params.stop_string_output or StopStringOutput.TOKENS,
        )
    sequence = SequenceState(prompt, key, index, detokenizer)
    sequence.matcher = matcher
    return sequence
