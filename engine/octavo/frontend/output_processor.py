"""From the core's outputs to the deltas of each request: text, stop strings, finish reasons, usage, times.

Synchronous and free of I/O, so that the server and `octavo.LLM` share it.
"""

from __future__ import annotations

from octavo.errors import RequestError
from octavo.frontend.input_processor import ProcessedRequest
from octavo.frontend.tokenizer import Tokenizer
from octavo.ipc import EngineCoreOutputs
from octavo.types import GenerateUpdate


class RequestState:
    """One request until its last update is taken. Owned by the OutputProcessor; readers call `take`."""

    request: ProcessedRequest
    error: RequestError | None
    """Why the request failed; what was generated before can still be taken."""

    @property
    def ended(self) -> bool:
        """No more will come: every sequence has ended, or the request failed."""
        ...

    def due(self, now: float) -> float:
        """Seconds until `take` has something to give: 0 at once, infinity if nothing is pending."""
        ...

    def take(self, now: float) -> GenerateUpdate | None:
        """What is due since the last call, merged; None if nothing. After the end everything is due.

        The update that completes a successful request has `usage` and `timing`.
        """
        ...


class OutputProcessor:
    """Keeps the state of every sequence in flight, by key."""

    def __init__(self, tokenizer: Tokenizer) -> None: ...

    def add(self, request: ProcessedRequest) -> RequestState:
        """Before the request goes to the core."""
        ...

    def process(self, outputs: EngineCoreOutputs, now: float) -> tuple[list[RequestState], list[int]]:
        """Takes in one message. Returns the requests that changed, and keys to abort in the core (STOP_STRING).

        An exception while a request's tokens are handled fails that request alone, with INTERNAL.
        """
        ...

    def fail(self, state: RequestState, error: RequestError) -> list[int]:
        """Ends a request. Returns the keys that still run and are to be aborted in the core."""
        ...
