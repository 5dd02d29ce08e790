"""From a RequestError to what the client sees: a gRPC status with google.rpc details, or an in-band error."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.rpc import error_details_pb2, status_pb2
from octavo_proto.v1 import generation_pb2

from octavo.errors import Code, FieldViolation, Reason, RequestError
from octavo.server import convert

DOMAIN = "octavo"
MAX_DETAILS = 4096
"""Bytes of grpc-status-details-bin: gRPC refuses metadata over 8 KiB at random."""

RETRY_AFTER: dict[Reason, float] = {
    Reason.QUEUE_FULL: 1.0,
    Reason.TOKENS_FULL: 1.0,
    Reason.TENANT_LIMIT: 1.0,
    Reason.QUEUE_TIMEOUT: 2.0,
    Reason.SESSION_FULL: 1.0,
    Reason.ENGINE_STARTING: 1.0,
    Reason.ENGINE_RESTARTED: 1.0,
    Reason.DRAINING: 1.0,
}
"""Seconds that are advised when the error itself advises none."""


class PlainStatus(Exception):
    """A status of a standard service, without reason and details."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def response_too_large(limit: int) -> RequestError:
    """The answer turned out larger than was estimated. Trying again would not help."""
    error = RequestError(
        Reason.RESPONSE_TOO_LARGE,
        "the answer is larger than the send limit; stream it",
        metadata={"max": str(limit)},
    )
    error.code = Code.RESOURCE_EXHAUSTED
    return error


def retry_after(error: RequestError) -> float | None:
    """Seconds after which a try may succeed."""
    return error.retry_after if error.retry_after is not None else RETRY_AFTER.get(error.reason)


def details(error: RequestError, request_id: str) -> status_pb2.Status:
    """The message of `grpc-status-details-bin`, with as many violations as fit."""
    status = status_pb2.Status(code=int(error.code), message=error.message)
    info = error_details_pb2.ErrorInfo(reason=str(error.reason), domain=DOMAIN, metadata=error.metadata)
    info.metadata["request_id"] = request_id
    status.details.add().Pack(info)
    delay = retry_after(error)
    if delay is not None:
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=convert.duration(delay)))
    if error.reason is Reason.MODEL_NOT_FOUND:
        name = error.metadata.get("model", "")[:128]
        resource = error_details_pb2.ResourceInfo(resource_type="octavo.v1.Model", resource_name=name)
        status.details.add().Pack(resource)
    if error.violations:
        room = MAX_DETAILS - status.ByteSize() - 64
        bad = error_details_pb2.BadRequest()
        for violation in fitting(error.violations, room):
            bad.field_violations.add(field=violation.field, description=violation.description)
        status.details.add().Pack(bad)
    return status


def fitting(violations: list[FieldViolation], room: int) -> list[FieldViolation]:
    """The first violations that fit into `room` bytes; the last entry then tells how many more there are."""
    kept: list[FieldViolation] = []
    room -= 64
    for violation in violations:
        room -= len(violation.field.encode()) + len(violation.description.encode()) + 8
        if room < 0:
            break
        kept.append(violation)
    if len(kept) < len(violations):
        rest = len(violations) - len(kept)
        kept.append(FieldViolation(violations[len(kept)].field[:64], f"and {rest - 1} further fields at fault"))
    return kept


def trailers(error: RequestError, request_id: str) -> tuple[tuple[str, Any], ...]:
    """Trailing metadata of a failed RPC."""
    pairs: list[tuple[str, Any]] = [
        ("x-request-id", request_id),
        ("grpc-status-details-bin", details(error, request_id).SerializeToString()),
    ]
    delay = retry_after(error)
    if delay is not None:
        pairs.append(("grpc-retry-pushback-ms", str(round(delay * 1000))))
    elif error.code is Code.RESOURCE_EXHAUSTED:
        pairs.append(("grpc-retry-pushback-ms", "-1"))  # the client's policy would repeat it
    return tuple(pairs)


async def abort(context: Any, error: RequestError, request_id: str) -> NoReturn:
    """Ends the RPC with this error. Always raises: gRPC's AbortError."""
    code = getattr(grpc.StatusCode, error.code.name)
    await context.abort(code, error.message, trailers(error, request_id))
    raise AssertionError("context.abort returned")


def in_band(error: RequestError, request_id: str) -> generation_pb2.RequestError:
    """The form of a GenerateSession."""
    delay = retry_after(error)
    return generation_pb2.RequestError(
        code=int(error.code),
        message=error.message,
        reason=str(error.reason),
        field_violations=[
            generation_pb2.RequestError.FieldViolation(field=violation.field, description=violation.description)
            for violation in fitting(error.violations, MAX_DETAILS)
        ],
        retry_delay=convert.duration(delay) if delay is not None else None,
        metadata=error.metadata | {"request_id": request_id},
    )


def invalid(path: str, description: str) -> RequestError:
    """One field at fault."""
    return RequestError(
        Reason.INVALID_FIELD, "the request has invalid fields", violations=[FieldViolation(path, description)]
    )


def internal() -> RequestError:
    """A fault of ours; the request id is all that the client is told."""
    return RequestError(Reason.INTERNAL, "internal error")


def malformed() -> RequestError:
    return RequestError(Reason.MALFORMED_REQUEST, "the message is not a valid one of its type")
