"""The front-end's end of the line to the engine core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from octavo.ipc import AbortCause, EngineCoreRequest, ToFrontend


class EngineCoreClient(Protocol):
    """What AsyncEngine needs of a core. Methods never block."""

    on_message: Callable[[ToFrontend], None]
    """Set by AsyncEngine; called on its event loop for each message of the core, in order."""

    def add(self, requests: list[EngineCoreRequest]) -> None:
        """Sends the prompts of one request. Raises RequestError QUEUE_FULL when the socket is full."""
        ...

    def abort(self, keys: list[int], cause: AbortCause) -> None:
        """Never fails: what cannot be sent now is sent as soon as there is room."""
        ...

    async def reset_prefix_cache(self) -> int:
        """Blocks freed. Raises RequestError ENGINE_RESTARTED when the core goes away meanwhile."""
        ...


class ZmqClient:
    """An EngineCoreClient over ZeroMQ ipc sockets, for the front-end processes. Lives on one event loop."""

    def __init__(self, frontend: int, address: str) -> None:
        """Binds `address` (ipc://...) for the core's messages. Call on the running event loop."""
        ...

    def connect(self, address: str) -> None:
        """A core is up and listens there. Call before AsyncEngine.engine_up."""
        ...

    def disconnect(self) -> None:
        """The core is gone: unsent messages are dropped, waiting resets fail. Call with AsyncEngine.engine_down."""
        ...

    def close(self) -> None: ...
