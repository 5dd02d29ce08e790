"""Errors that a caller can cause or has to hear of, with their gRPC code and reason (the status table of the API).

Texts are fixed sentences: no paths of the server, no exception strings, no part of a prompt.
"""

from __future__ import annotations

import enum

import msgspec


class Code(enum.IntEnum):
    """google.rpc.Code, the ones in use."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Reason(enum.StrEnum):
    """ErrorInfo.reason."""

    MALFORMED_REQUEST = "MALFORMED_REQUEST"
    INVALID_FIELD = "INVALID_FIELD"
    UNSUPPORTED_FIELD = "UNSUPPORTED_FIELD"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    RESPONSE_TOO_LARGE = "RESPONSE_TOO_LARGE"
    CONSTRAINT_TOO_COMPLEX = "CONSTRAINT_TOO_COMPLEX"
    NON_FINITE_SCORES = "NON_FINITE_SCORES"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    QUEUE_FULL = "QUEUE_FULL"
    TOKENS_FULL = "TOKENS_FULL"
    TENANT_LIMIT = "TENANT_LIMIT"
    QUEUE_TIMEOUT = "QUEUE_TIMEOUT"
    SESSION_FULL = "SESSION_FULL"
    ENGINE_STARTING = "ENGINE_STARTING"
    ENGINE_RESTARTED = "ENGINE_RESTARTED"
    DRAINING = "DRAINING"
    CLIENT_DEADLINE = "CLIENT_DEADLINE"
    SERVER_MAX_DURATION = "SERVER_MAX_DURATION"
    CLIENT_CANCELLED = "CLIENT_CANCELLED"
    ABORTED_BY_OPERATOR = "ABORTED_BY_OPERATOR"
    SLOW_READER = "SLOW_READER"
    TAG_IN_USE = "TAG_IN_USE"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    NOT_ADMIN = "NOT_ADMIN"
    STOPPING = "STOPPING"
    NON_FINITE_LOGITS = "NON_FINITE_LOGITS"
    INTERNAL = "INTERNAL"


CODE_OF_REASON: dict[Reason, Code] = {
    Reason.MALFORMED_REQUEST: Code.INVALID_ARGUMENT,
    Reason.INVALID_FIELD: Code.INVALID_ARGUMENT,
    Reason.UNSUPPORTED_FIELD: Code.INVALID_ARGUMENT,
    Reason.CONTEXT_LENGTH_EXCEEDED: Code.INVALID_ARGUMENT,
    Reason.REQUEST_TOO_LARGE: Code.INVALID_ARGUMENT,
    Reason.RESPONSE_TOO_LARGE: Code.INVALID_ARGUMENT,
    Reason.CONSTRAINT_TOO_COMPLEX: Code.INVALID_ARGUMENT,
    Reason.NON_FINITE_SCORES: Code.INVALID_ARGUMENT,
    Reason.MODEL_NOT_FOUND: Code.NOT_FOUND,
    Reason.QUEUE_FULL: Code.RESOURCE_EXHAUSTED,
    Reason.TOKENS_FULL: Code.RESOURCE_EXHAUSTED,
    Reason.TENANT_LIMIT: Code.RESOURCE_EXHAUSTED,
    Reason.QUEUE_TIMEOUT: Code.RESOURCE_EXHAUSTED,
    Reason.SESSION_FULL: Code.RESOURCE_EXHAUSTED,
    Reason.ENGINE_STARTING: Code.UNAVAILABLE,
    Reason.ENGINE_RESTARTED: Code.UNAVAILABLE,
    Reason.DRAINING: Code.UNAVAILABLE,
    Reason.CLIENT_DEADLINE: Code.DEADLINE_EXCEEDED,
    Reason.SERVER_MAX_DURATION: Code.DEADLINE_EXCEEDED,
    Reason.CLIENT_CANCELLED: Code.CANCELLED,
    Reason.ABORTED_BY_OPERATOR: Code.ABORTED,
    Reason.SLOW_READER: Code.ABORTED,
    Reason.TAG_IN_USE: Code.ALREADY_EXISTS,
    Reason.UNAUTHENTICATED: Code.UNAUTHENTICATED,
    Reason.NOT_ADMIN: Code.PERMISSION_DENIED,
    Reason.STOPPING: Code.FAILED_PRECONDITION,
    Reason.NON_FINITE_LOGITS: Code.INTERNAL,
    Reason.INTERNAL: Code.INTERNAL,
}


class FieldViolation(msgspec.Struct, frozen=True):
    field: str
    """Path from GenerateRequest, such as "params.top_p" or "prompts[2].text"."""
    description: str
    """For people: the rule, the limit and the value. Never repeats the prompt."""


class RequestError(Exception):
    """A request, or one RPC, failed in a way that its caller is told of."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        violations: list[FieldViolation] | None = None,
        metadata: dict[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.code = CODE_OF_REASON[reason]
        self.message = message
        self.violations = violations or []
        self.metadata = metadata or {}
        """ErrorInfo.metadata."""
        self.retry_after = retry_after
        """Seconds, for RetryInfo and the push-back trailer; None: no advice."""


class StartupError(Exception):
    """The server cannot start. `str()` is one line for people; `exit_code` as in the table of the CLI."""

    USAGE = 2
    CHECKPOINT = 3
    DEVICE = 4

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
