"""Requests and answers of the small RPCs, shared by the sync and the async client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from octavo_proto.v1 import control_pb2, model_pb2, types_pb2

from octavo.client import values
from octavo.client.channel import deadline

HEALTH_NAMES: Final[tuple[str, ...]] = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
"""grpc.health.v1.HealthCheckResponse.ServingStatus."""


def tokenize_request(texts: str | Sequence[str], options: dict[str, Any]) -> model_pb2.TokenizeRequest:
    """Raises TypeError for an option that is not one of PromptOptions."""
    items = [texts] if isinstance(texts, str) else texts
    request = model_pb2.TokenizeRequest(texts=[values.text("texts", item) for item in items])
    fields = types_pb2.PromptOptions.DESCRIPTOR.fields_by_name
    for name, value in options.items():
        if name not in fields:
            raise TypeError(f"unknown keyword {name}")
        values.set_field(request.prompt_options, fields[name], value)
    return request


def tokenize_result(texts: str | Sequence[str], response: model_pb2.TokenizeResponse) -> Any:
    """list[int] for a string, a list of those for a list."""
    lists = [list(entry.ids) for entry in response.results]
    return lists[0] if isinstance(texts, str) else lists


def detokenize_request(token_ids: Iterable[Any], skip_special_tokens: bool) -> tuple[model_pb2.DetokenizeRequest, bool]:
    """The request, and whether one list was given rather than a list of lists."""
    items = [values.plain(item) for item in values.plain(token_ids)]
    single = not items or isinstance(items[0], int)
    lists = [values.token_ids("token_ids", part) for part in ([items] if single else items)]
    message = model_pb2.DetokenizeRequest(
        token_ids=[types_pb2.TokenIds(ids=part) for part in lists], skip_special_tokens=skip_special_tokens
    )
    return message, single


def drain_request(timeout: float | None, shutdown: bool, undo: bool) -> control_pb2.DrainRequest:
    """`timeout` in seconds; None: the server's own."""
    request = control_pb2.DrainRequest(shutdown=shutdown, undo=undo)
    if timeout is not None:
        request.timeout.CopyFrom(duration(timeout))
    return request


def abort_request(request_ids: Sequence[str], all_requests: bool) -> control_pb2.AbortRequestsRequest:
    """Raises ValueError unless there are ids, or all are meant, and not both."""
    if bool(request_ids) == all_requests:
        raise ValueError("abort: give request ids, or all_requests=True")
    return control_pb2.AbortRequestsRequest(request_ids=request_ids, all=all_requests)


def duration(seconds: float) -> Duration:
    """Seconds as the wire has them."""
    result = Duration()
    result.FromNanoseconds(round(seconds * 1e9))
    return result


@dataclass(frozen=True, slots=True)
class HealthCall:
    """Check and Watch of grpc.health.v1 without its package.

    HealthCheckRequest{string service = 1} has the encoding of a StringValue, and
    HealthCheckResponse{ServingStatus status = 1} that of an Int32Value.
    """

    service: str

    def encode(self, _: None) -> bytes:
        return StringValue(value=self.service).SerializeToString()

    @staticmethod
    def decode(raw: bytes) -> str:
        number = Int32Value.FromString(raw).value
        return HEALTH_NAMES[number] if 0 <= number < len(HEALTH_NAMES) else HEALTH_NAMES[0]

    def check(self, channel: Any) -> Callable[..., Any]:
        path = "/grpc.health.v1.Health/Check"
        method: Callable[..., Any] = channel.unary_unary(
            path, request_serializer=self.encode, response_deserializer=self.decode
        )
        return method

    def watch(self, channel: Any) -> Callable[..., Any]:
        path = "/grpc.health.v1.Health/Watch"
        method: Callable[..., Any] = channel.unary_stream(
            path, request_serializer=self.encode, response_deserializer=self.decode
        )
        return method


def drain_deadline(timeout: float | None) -> float:
    """Seconds to wait for a drain: its own timeout and some more, so that the server answers first."""
    return deadline(None) if timeout is None else timeout + 10
