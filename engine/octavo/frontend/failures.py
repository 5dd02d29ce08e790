"""What a caller is told for each way in which a request can fail after it was found valid."""

from __future__ import annotations

from typing import Final

from octavo.errors import Code, Reason, RequestError

_TEXTS: Final[dict[Reason, str]] = {
    Reason.NON_FINITE_SCORES: "the parameters leave no token that could be chosen",
    Reason.CONSTRAINT_TOO_COMPLEX: "the structured output takes more work or memory than a request may",
    Reason.NON_FINITE_LOGITS: "the model's output for this request is not finite",
    Reason.QUEUE_FULL: "too many requests are in the server",
    Reason.TOKENS_FULL: "too many prompt tokens are waiting",
    Reason.TENANT_LIMIT: "too many requests of this tenant are in the server",
    Reason.QUEUE_TIMEOUT: "the request waited too long for its first step",
    Reason.ENGINE_STARTING: "the engine is starting",
    Reason.ENGINE_RESTARTED: "the engine restarted; what it computed is lost",
    Reason.DRAINING: "the server is draining",
    Reason.CLIENT_DEADLINE: "the client's deadline has passed",
    Reason.SERVER_MAX_DURATION: "the request took longer than the server allows",
    Reason.CLIENT_CANCELLED: "the client cancelled",
    Reason.ABORTED_BY_OPERATOR: "the request was ended by AbortRequests",
    Reason.SLOW_READER: "the client did not read its stream",
    Reason.INTERNAL: "an error inside the server",
}
_RETRY_AFTER: Final[dict[Reason, float]] = {
    Reason.ENGINE_STARTING: 2.0,
    Reason.ENGINE_RESTARTED: 1.0,
    Reason.DRAINING: 1.0,
}
"""Seconds; other RESOURCE_EXHAUSTED and UNAVAILABLE reasons take _RETRY_SOON."""
_RETRY_SOON: Final = 0.5


def failure(reason: Reason) -> RequestError:
    """The error of a reason, with advice when to try again where that makes sense."""
    error = RequestError(reason, _TEXTS[reason])
    if error.code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE):
        error.retry_after = _RETRY_AFTER.get(reason, _RETRY_SOON)
    return error


def again(error: RequestError) -> RequestError:
    """A copy to raise: one error may end many requests, and an exception collects the traces of all who raise it."""
    return RequestError(
        error.reason,
        error.message,
        violations=error.violations,
        metadata=error.metadata,
        retry_after=error.retry_after,
    )
