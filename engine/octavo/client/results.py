"""What a call returns: plain frozen values, made from the wire's messages."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from octavo_proto.v1 import generation_pb2, types_pb2


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    EOS = "eos"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    CONTEXT = "context"
    """The context was full before the default number of tokens was generated."""
    TIME = "time"
    ABORTED = "aborted"
    UNKNOWN = "unknown"
    """One that this version of the client does not know."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV blocks came from the prefix cache."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds since the request's arrival at the server."""

    queue: float
    time_to_first_token: float
    total: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Values of a run of T tokens, in columns."""

    chosen: list[float]
    """Value of each token. T entries."""
    ranks: list[int]
    """1 is the largest value of the row. T entries."""
    top_token_ids: list[list[int]]
    """Candidates of each position, largest value first. T rows."""
    top_values: list[list[float]]
    requested: list[list[float]]
    """Values of logprob_token_ids. T rows."""


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """What the server knows about one prompt."""

    prompt_index: int
    prompt_tokens: int
    cached_tokens: int
    seed: int | None
    """The seed in use; None when nothing is sampled."""
    token_ids: list[int]
    """Only with return_prompt_token_ids."""
    logprobs: Logprobs | None
    """Only with prompt_logprobs: prompt_tokens - 1 rows."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in one sequence of a stream."""

    prompt_index: int
    output_index: int
    text: str
    token_ids: list[int]
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    """Last delta of the sequence only, like the next three."""
    matched: int | str | None
    """The token or the stop string that ended it."""
    completion_tokens: int | None
    sequence_score: float | None


@dataclass(frozen=True, slots=True)
class Output:
    """One finished sequence."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    """Of this sequence and its prompt."""
    prompt_index: int = 0
    output_index: int = 0
    matched: int | str | None = None
    """The token or the stop string that ended it."""
    logprobs: Logprobs | None = None
    sequence_score: float | None = None
    prompt: PromptInfo | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Response:
    """The whole answer to one request."""

    request_id: str
    model: str
    outputs: list[list[Output]]
    """outputs[i][j]: sequence j of prompt i."""
    prompts: list[PromptInfo]
    usage: Usage
    timing: Timing | None
    resolved: generation_pb2.ResolvedOptions | None
    """Only with return_resolved_options: the options in force."""


def shaped(response: Response, single: bool) -> Any:
    """What `generate()` returns: a list for a list of prompts; in it, a list where a prompt has several outputs."""
    per_prompt = [outputs[0] if len(outputs) == 1 else outputs for outputs in response.outputs]
    return per_prompt[0] if single else per_prompt


@dataclass(slots=True)
class Collector:
    """Adds the messages of a stream up. State: its owner is the stream."""

    request_id: str
    model: str = ""
    prompts: dict[int, PromptInfo] = field(default_factory=dict)
    usage: Usage | None = None
    timing: Timing | None = None
    resolved: generation_pb2.ResolvedOptions | None = None
    runs: dict[tuple[int, int], list[Delta]] = field(default_factory=dict)
    """(prompt_index, output_index) -> its deltas."""

    def add(self, message: generation_pb2.StreamGenerateResponse | generation_pb2.GenerateResponse) -> list[Delta]:
        """Takes one message of a stream, or a whole unary answer; returns its deltas."""
        self.request_id = message.request_id or self.request_id
        self.model = message.model or self.model
        self.prompts.update((entry.prompt_index, _prompt_info(entry)) for entry in message.prompts)
        if message.HasField("usage"):
            self.usage = _usage(message.usage)
        if message.HasField("timing"):
            self.timing = _timing(message.timing)
        if message.HasField("resolved"):
            self.resolved = message.resolved
        entries: Iterable[Any] = (
            message.completions if isinstance(message, generation_pb2.GenerateResponse) else message.deltas
        )
        deltas = [_delta(entry) for entry in entries]
        for delta in deltas:
            self.runs.setdefault((delta.prompt_index, delta.output_index), []).append(delta)
        return deltas

    def response(self) -> Response:
        """The whole answer, once the stream has ended."""
        outputs: list[list[Output]] = [[] for _ in range(1 + max((index for index, _ in self.runs), default=-1))]
        for (prompt_index, _), run in sorted(self.runs.items()):
            outputs[prompt_index].append(self._output(run))
        prompts = [info for _, info in sorted(self.prompts.items())]
        usage = self.usage or Usage(0, 0, 0)
        return Response(self.request_id, self.model, outputs, prompts, usage, self.timing, self.resolved)

    def _output(self, run: list[Delta]) -> Output:
        last = run[-1]
        info = self.prompts.get(last.prompt_index)
        token_ids = [token for delta in run for token in delta.token_ids]
        count = len(token_ids) if last.completion_tokens is None else last.completion_tokens
        return Output(
            text="".join(delta.text for delta in run),
            token_ids=token_ids,
            finish_reason=last.finish_reason or FinishReason.ABORTED,
            usage=Usage(info.prompt_tokens if info else 0, count, info.cached_tokens if info else 0),
            prompt_index=last.prompt_index,
            output_index=last.output_index,
            matched=last.matched,
            logprobs=_joined(delta.logprobs for delta in run),
            sequence_score=last.sequence_score,
            prompt=info,
            request_id=self.request_id,
        )


def _delta(entry: generation_pb2.OutputDelta | generation_pb2.Completion) -> Delta:
    finish = entry.finish if entry.HasField("finish") else None
    match = finish.WhichOneof("match") if finish else None
    return Delta(
        prompt_index=entry.prompt_index,
        output_index=entry.output_index,
        text=entry.text,
        token_ids=list(entry.token_ids),
        logprobs=_logprobs(entry.logprobs) if entry.HasField("logprobs") else None,
        finish_reason=_reason(finish.reason) if finish else None,
        matched=getattr(finish, match) if match else None,
        completion_tokens=finish.completion_tokens if finish else None,
        sequence_score=entry.sequence_score if entry.HasField("sequence_score") else None,
    )


def _reason(number: int) -> FinishReason:
    found = types_pb2.FinishReason.DESCRIPTOR.values_by_number.get(number)
    name = found.name.removeprefix("FINISH_REASON_").lower() if found else ""
    return FinishReason(name) if name in set(FinishReason) else FinishReason.UNKNOWN


def _logprobs(message: types_pb2.Logprobs) -> Logprobs:
    rows = len(message.chosen)
    return Logprobs(
        chosen=list(message.chosen),
        ranks=list(message.ranks),
        top_token_ids=_rows(message.top_token_ids, rows),
        top_values=_rows(message.top_values, rows),
        requested=_rows(message.requested, rows),
    )


def _rows(flat: Any, rows: int) -> list[list[Any]]:
    """A column of rows * n entries as `rows` lists."""
    width = len(flat) // rows if rows else 0
    return [list(flat[row * width : (row + 1) * width]) for row in range(rows)]


def _joined(runs: Iterable[Logprobs | None]) -> Logprobs | None:
    present = [run for run in runs if run is not None]
    if not present:
        return None
    columns = ("chosen", "ranks", "top_token_ids", "top_values", "requested")
    return Logprobs(**{name: [entry for run in present for entry in getattr(run, name)] for name in columns})


def _prompt_info(message: types_pb2.PromptInfo) -> PromptInfo:
    return PromptInfo(
        prompt_index=message.prompt_index,
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        seed=message.seed if message.HasField("seed") else None,
        token_ids=list(message.token_ids),
        logprobs=_logprobs(message.logprobs) if message.HasField("logprobs") else None,
    )


def _usage(message: types_pb2.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def _timing(message: types_pb2.Timing) -> Timing:
    fields = (message.queue, message.time_to_first_token, message.total)
    queue, first, total = (field.seconds + field.nanos / 1e9 for field in fields)
    return Timing(queue, first, total, message.preemptions)
