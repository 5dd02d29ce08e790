"""What a call can raise: one class per kind of failure, made from the status and its google.rpc details."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from octavo_proto.v1 import generation_pb2

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
NOT_SERVING = "NOT_SERVING"
"""The one reason that this side makes up: every server's health says NOT_SERVING, so nothing was sent."""
_UNHEALTHY = "backend unhealthy"


@dataclass(frozen=True, slots=True)
class Violation:
    """One field at fault."""

    field: str
    """Path from GenerateRequest, such as "params.top_p" or "prompts[2].text"."""
    description: str
    """The rule, the limit and the value, for people."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A status with its details, before it has become an exception."""

    code: str
    message: str
    reason: str = ""
    request_id: str = ""
    violations: tuple[Violation, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after: float | None = None
    """Seconds."""


class OctavoError(Exception):
    """A call failed. Subclasses say how; `code` and `reason` are those of the API's status table."""

    def __init__(self, failure: Failure) -> None:
        where = f" [request {failure.request_id}]" if failure.request_id else ""
        reason = f"/{failure.reason}" if failure.reason else ""
        super().__init__(f"{failure.code}{reason}: {_text(failure)}{where}")
        self.code = failure.code
        """Name of the gRPC status code, such as "INVALID_ARGUMENT"."""
        self.reason = failure.reason
        """For programs, such as "QUEUE_FULL"; empty when gRPC itself failed the call."""
        self.message = failure.message
        """The server's own words, which may change."""
        self.request_id = failure.request_id
        self.metadata = failure.metadata
        """Further facts by name, as text."""


class InvalidRequest(OctavoError):
    """The request cannot be served as it is: INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.violations = failure.violations


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or prompt and max_new_tokens, do not fit into the model's context."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.max = _number(failure, "max")
        """Most tokens; None if the server does not say."""
        self.got = _number(failure, "got")
        self.prompt_index = _number(failure, "prompt_index")


class Overloaded(OctavoError):
    """RESOURCE_EXHAUSTED: a queue or a share is full, or a message was too large for gRPC (no reason then)."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.retry_after = failure.retry_after
        """Seconds after which a try may succeed; None if the server does not say."""


class Unavailable(OctavoError):
    """No server, or one that starts, drains or has just lost its engine."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.retry_after = failure.retry_after


class DeadlineExceeded(OctavoError):
    """The call's own timeout passed, or the server's longest duration."""


class Aborted(OctavoError):
    """Somebody ended the request with AbortRequests, or its reader stalled."""


class Cancelled(OctavoError):
    """The call was cancelled by this side."""


class Unauthenticated(OctavoError):
    """No API key, a wrong one, or one without the right (then `code` is PERMISSION_DENIED)."""


class InternalError(OctavoError):
    """A fault of the server."""


_CLASSES: dict[str, type[OctavoError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "NOT_FOUND": InvalidRequest,
    "ALREADY_EXISTS": InvalidRequest,
    "FAILED_PRECONDITION": InvalidRequest,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "ABORTED": Aborted,
    "CANCELLED": Cancelled,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": Unauthenticated,
    "INTERNAL": InternalError,
    "UNKNOWN": InternalError,
    "DATA_LOSS": InternalError,
}


def error_from(failure: Failure) -> OctavoError:
    """The exception for a failure."""
    if failure.reason == "CONTEXT_LENGTH_EXCEEDED":
        return ContextLengthExceeded(failure)
    return _CLASSES.get(failure.code, OctavoError)(failure)


def error_from_rpc(rpc_error: grpc.RpcError, request_id: str = "") -> OctavoError:
    """The exception for what grpc or grpc.aio raised; details come from `grpc-status-details-bin`."""
    trailers = dict(_pairs(rpc_error.trailing_metadata()))
    code = rpc_error.code()
    name = code.name if code is not None else "UNKNOWN"
    details = trailers.get(DETAILS_KEY)
    failure = _from_details(details, name, str(rpc_error.details() or ""), request_id)
    if name == "UNAVAILABLE" and _UNHEALTHY in failure.message:
        failure = replace(failure, reason=NOT_SERVING, message="no server is ready: starting, restarting or draining")
    pushback = trailers.get(PUSHBACK_KEY)
    if failure.retry_after is None and pushback is not None and str(pushback).isdecimal():
        failure = replace(failure, retry_after=int(pushback) / 1000)
    return error_from(failure)


def error_from_event(error: generation_pb2.RequestError, request_id: str = "") -> OctavoError:
    """The exception for a failure that a GenerateSession reports in band."""
    code = code_pb2.Code.Name(error.code) if error.code in code_pb2.Code.values() else "UNKNOWN"
    delay = error.retry_delay
    failure = Failure(
        code=code,
        message=error.message,
        reason=error.reason,
        request_id=request_id,
        violations=tuple(Violation(item.field, item.description) for item in error.field_violations),
        retry_after=delay.seconds + delay.nanos / 1e9 if error.HasField("retry_delay") else None,
        metadata=dict(error.metadata),
    )
    return error_from(failure)


def _from_details(raw: bytes | str | None, code: str, message: str, request_id: str) -> Failure:
    reason, metadata, violations, retry_after = "", {}, [], None
    status = status_pb2.Status()
    with contextlib.suppress(DecodeError):  # a proxy's own bytes; the plain status still says what it can
        status.ParseFromString(raw if isinstance(raw, bytes) else b"")
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations += [Violation(item.field, item.description) for item in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    request_id = metadata.get("request_id", request_id)
    return Failure(code, message, reason, request_id, tuple(violations), metadata, retry_after)


def _text(failure: Failure) -> str:
    """The message and the violations that it does not tell itself."""
    untold = [item for item in failure.violations if item.description not in failure.message]
    listed = "; ".join(f"{item.field}: {item.description}" for item in untold)
    return f"{failure.message} ({listed})" if listed else failure.message


def _number(failure: Failure, name: str) -> int | None:
    value = failure.metadata.get(name, "")
    return int(value) if value.isdecimal() else None


def _pairs(metadata: Iterable[tuple[str, Any]] | None) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in metadata or ()]
