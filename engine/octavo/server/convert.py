"""From our types to protobuf: the only place, with `fields` for the way in, that knows both.

Hot paths are written out by hand; options, which travel rarely, are filled by their descriptors.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from octavo_proto.v1 import control_pb2, generation_pb2, model_pb2, types_pb2

from octavo import types
from octavo.config import Limits

_WIRE_MESSAGE: dict[type[msgspec.Struct], type[Message]] = {
    types.GenerationParams: types_pb2.GenerationParams,
    types.OutputOptions: types_pb2.OutputOptions,
    types.PromptOptions: types_pb2.PromptOptions,
    types.CacheOptions: types_pb2.CacheOptions,
    types.Prompt: types_pb2.Prompt,
    types.SequenceBias: types_pb2.SequenceBias,
    types.ExponentialDecay: types_pb2.ExponentialDecay,
    types.Watermark: types_pb2.Watermark,
    types.GreenListWatermark: types_pb2.GreenListWatermark,
    types.SynthIdWatermark: types_pb2.SynthIdWatermark,
    types.StructuredOutput: types_pb2.StructuredOutput,
    types.Choice: types_pb2.StructuredOutput.Choice,
    Limits: model_pb2.Limits,
}


def duration(seconds: float) -> Duration:
    whole, nanos = _split(seconds)
    return Duration(seconds=whole, nanos=nanos)


def timestamp(seconds: float) -> Timestamp:
    whole, nanos = _split(seconds)
    return Timestamp(seconds=whole, nanos=nanos)


def _split(seconds: float) -> tuple[int, int]:
    whole = math.floor(seconds)
    nanos = round((seconds - whole) * 1e9)
    return (whole, nanos) if nanos < 1_000_000_000 else (whole + 1, 0)


# --- answers


def logprobs(value: types.Logprobs | None) -> types_pb2.Logprobs | None:
    if value is None:
        return None
    return types_pb2.Logprobs(
        chosen=value.chosen,
        ranks=value.ranks,
        num_top=value.num_top,
        top_token_ids=value.top_token_ids,
        top_values=value.top_values,
        requested=value.requested,
    )


def finish_info(value: types.FinishInfo | None) -> types_pb2.FinishInfo | None:
    if value is None:
        return None
    # A stop string wins where both are given: they are one oneof on the wire.
    return types_pb2.FinishInfo(
        reason=int(value.reason),  # type: ignore[arg-type]
        token_id=value.token_id if value.stop_string is None else None,
        stop_string=value.stop_string,
        completion_tokens=value.completion_tokens,
    )


def prompt_info(value: types.PromptInfo) -> types_pb2.PromptInfo:
    return types_pb2.PromptInfo(
        prompt_index=value.prompt_index,
        prompt_tokens=value.prompt_tokens,
        cached_tokens=value.cached_tokens,
        seed=value.seed,
        token_ids=value.token_ids,
        logprobs=logprobs(value.logprobs),
    )


def output_delta(value: types.OutputDelta) -> generation_pb2.OutputDelta:
    return generation_pb2.OutputDelta(
        prompt_index=value.prompt_index,
        output_index=value.output_index,
        text=value.text,
        token_ids=value.token_ids,
        logprobs=logprobs(value.logprobs),
        finish=finish_info(value.finish),
        sequence_score=value.sequence_score,
    )


def completion(value: types.OutputDelta) -> generation_pb2.Completion:
    return generation_pb2.Completion(
        prompt_index=value.prompt_index,
        output_index=value.output_index,
        text=value.text,
        token_ids=value.token_ids,
        logprobs=logprobs(value.logprobs),
        finish=finish_info(value.finish),
        sequence_score=value.sequence_score,
    )


def usage(value: types.Usage | None) -> types_pb2.Usage | None:
    if value is None:
        return None
    return types_pb2.Usage(
        prompt_tokens=value.prompt_tokens,
        completion_tokens=value.completion_tokens,
        cached_tokens=value.cached_tokens,
    )


def timing(value: types.Timing | None) -> types_pb2.Timing | None:
    if value is None:
        return None
    return types_pb2.Timing(
        queue=duration(value.queue),
        time_to_first_token=duration(value.time_to_first_token),
        total=duration(value.total),
        preemptions=value.preemptions,
    )


def resolved(value: types.ResolvedOptions | None) -> generation_pb2.ResolvedOptions | None:
    if value is None:
        return None
    message = generation_pb2.ResolvedOptions()
    for name in ("params", "output", "prompt_options", "cache"):
        part = getattr(message, name)
        part.SetInParent()
        fill(part, getattr(value, name))
    return message


def generate_response(
    update: types.GenerateUpdate, *, request_id: str, model: str, options: types.ResolvedOptions | None
) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(
        request_id=request_id,
        model=model,
        completions=[completion(delta) for delta in update.deltas],
        prompts=[prompt_info(prompt) for prompt in update.prompts],
        usage=usage(update.usage),
        timing=timing(update.timing),
        resolved=resolved(options),
    )


def stream_response(update: types.GenerateUpdate) -> generation_pb2.StreamGenerateResponse:
    """Without what only the first message of a stream has."""
    return generation_pb2.StreamGenerateResponse(
        prompts=[prompt_info(prompt) for prompt in update.prompts],
        deltas=[output_delta(delta) for delta in update.deltas],
        usage=usage(update.usage),
        timing=timing(update.timing),
    )


def name_first_response(
    response: generation_pb2.StreamGenerateResponse,
    *,
    request_id: str,
    model: str,
    options: types.ResolvedOptions | None,
) -> None:
    """Adds what only the first message of a stream has."""
    response.request_id = request_id
    response.model = model
    if options is not None:
        response.resolved.CopyFrom(resolved(options))  # type: ignore[arg-type]


def split_response(
    response: generation_pb2.StreamGenerateResponse, limit: int
) -> list[generation_pb2.StreamGenerateResponse]:
    """The same news in messages of at most `limit` bytes, where single entries are not larger than that."""
    parts: list[generation_pb2.StreamGenerateResponse] = []
    part = generation_pb2.StreamGenerateResponse(request_id=response.request_id, model=response.model)
    if response.HasField("resolved"):
        part.resolved.CopyFrom(response.resolved)
    size = part.ByteSize()
    tail = generation_pb2.StreamGenerateResponse()
    for name in ("usage", "timing"):
        if response.HasField(name):
            getattr(tail, name).CopyFrom(getattr(response, name))
    room = limit - tail.ByteSize()
    for field, entry in [("prompts", e) for e in response.prompts] + [("deltas", e) for e in response.deltas]:
        entry_size = entry.ByteSize() + 6  # tag and length
        if size + entry_size > room and size:
            parts.append(part)
            part, size = generation_pb2.StreamGenerateResponse(), 0
        getattr(part, field).append(entry)
        size += entry_size
    part.MergeFrom(tail)
    parts.append(part)
    return parts


# --- facts


def fill(message: Any, struct: msgspec.Struct) -> None:
    """Sets every field of `message` whose namesake in `struct` is set; None, and empty plain lists, are unset."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(struct, field.name, None)
        if value is None:
            continue
        target = getattr(message, field.name)
        inner = field.message_type
        if inner is None:
            if field.is_repeated:
                target.extend(value)
            else:
                setattr(message, field.name, value)
        elif inner.GetOptions().map_entry:
            target.update(value)
        elif field.is_repeated:
            target.extend(wire(entry) for entry in value)
        else:
            target.CopyFrom(duration(value) if inner.full_name == "google.protobuf.Duration" else wire(value))


def wire(value: msgspec.Struct | list[int]) -> Any:
    """The message of a struct that `fill` knows, or of a list of token ids."""
    if isinstance(value, list):
        return types_pb2.TokenIds(ids=value)
    message = _WIRE_MESSAGE[type(value)]()
    fill(message, value)
    return message


def load(value: types.EngineLoad | None, state: control_pb2.ServerState, now: float) -> control_pb2.Load:
    """`now`, seconds since the epoch, is the time of an answer without a report of the engine."""
    if value is None:
        return control_pb2.Load(time=timestamp(now), state=state)
    return control_pb2.Load(
        time=timestamp(value.time),
        state=state,
        running_requests=value.running_requests,
        waiting_requests=value.waiting_requests,
        waiting_tokens=value.waiting_tokens,
        used_kv_blocks=value.used_blocks,
        cached_kv_blocks=value.cached_blocks,
        total_kv_blocks=value.total_blocks,
        generation_tokens_per_second=value.generation_tokens_per_second,
        prompt_tokens_per_second=value.prompt_tokens_per_second,
        prefix_cache_hit_rate=value.prefix_cache_hit_rate,
        preemptions=value.preemptions,
        engine_steps=value.steps,
    )
