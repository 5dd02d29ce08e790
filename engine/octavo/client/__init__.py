"""The public Python client. Needs grpcio, protobuf and googleapis-common-protos; nothing else of octavo is imported."""

from octavo.client.async_client import AsyncClient, AsyncStream
from octavo.client.channel import TLS
from octavo.client.client import Client, Stream
from octavo.client.errors import (
    Aborted,
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    OctavoError,
    Overloaded,
    Unauthenticated,
    Unavailable,
    Violation,
)
from octavo.client.results import Delta, FinishReason, Logprobs, Output, PromptInfo, Response, Timing, Usage
from octavo.client.session import Session, SessionStream

__all__ = [
    "TLS",
    "Aborted",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Client",
    "ContextLengthExceeded",
    "DeadlineExceeded",
    "Delta",
    "FinishReason",
    "InternalError",
    "InvalidRequest",
    "Logprobs",
    "OctavoError",
    "Output",
    "Overloaded",
    "PromptInfo",
    "Response",
    "Session",
    "SessionStream",
    "Stream",
    "Timing",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "Violation",
]
