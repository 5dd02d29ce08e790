"""The front-end's end of the line to the engine core.

Reading is driven by the socket's descriptor on the event loop, one callback for as many messages as there are; sends
go out at once or are refused. Nothing blocks and nothing polls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import count
from typing import Final, Protocol

import msgspec
import zmq

from octavo.errors import Reason, RequestError
from octavo.frontend.failures import failure
from octavo.ipc import (
    MAX_FRAME,
    AbortCause,
    AbortSequences,
    AddRequests,
    EngineCoreRequest,
    PrefixCacheReset,
    ResetPrefixCache,
    ToCore,
    ToFrontend,
)

_log = logging.getLogger(__name__)

SEND_QUEUE: Final = 4096
"""Messages that may wait for the core before new requests are refused."""
_MAX_READS: Final = 64
"""Messages taken in before other callbacks of the loop get their turn."""


class EngineCoreClient(Protocol):
    """What AsyncEngine needs of a core. Methods never block."""

    on_message: Callable[[ToFrontend], None]
    """Set by AsyncEngine; called on its event loop for each message of the core, in order."""
    on_broken: Callable[[], None]
    """Set by AsyncEngine; called when a message of the core made no sense."""

    def add(self, requests: list[EngineCoreRequest]) -> None:
        """Sends the prompts of one request. Raises RequestError QUEUE_FULL when the socket is full, REQUEST_TOO_LARGE
        when the request is more than a message may hold."""
        ...

    def abort(self, keys: list[int], cause: AbortCause) -> None:
        """Never fails: what cannot be sent now is sent as soon as there is room."""
        ...

    async def reset_prefix_cache(self) -> int:
        """Blocks freed. Raises RequestError ENGINE_RESTARTED when the core goes away meanwhile."""
        ...


class ZmqClient:
    """An EngineCoreClient over ZeroMQ ipc sockets, for the front-end processes. Lives on one event loop."""

    def __init__(self, frontend: int, address: str, *, send_queue: int = SEND_QUEUE) -> None:
        """Binds `address` (ipc://...) for the core's messages. Call on the running event loop.

        Raises zmq.ZMQError when the address cannot be bound.
        """
        self.on_message: Callable[[ToFrontend], None] = lambda message: None
        self.on_broken: Callable[[], None] = lambda: None
        self._frontend = frontend
        self._send_queue = send_queue
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context(io_threads=1)
        self._decoder = msgspec.msgpack.Decoder(ToFrontend)
        self._encoder = msgspec.msgpack.Encoder()
        self._resets: dict[int, asyncio.Future[int]] = {}
        self._call_ids = count(1)
        self._unsent_aborts: list[AbortSequences] = []
        self._push: zmq.Socket[bytes] | None = None
        self._push_fd = -1
        self._pull: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._pull.setsockopt(zmq.RCVHWM, 0)  # the core must never block on us; what waits is bounded by its requests
        self._pull.bind(address)
        self._pull_fd = int(self._pull.getsockopt(zmq.FD))
        self._loop.add_reader(self._pull_fd, self._read)
        self._loop.call_soon(self._read)  # the descriptor tells of changes only

    def connect(self, address: str) -> None:
        """A core is up and listens there. Call before AsyncEngine.engine_up."""
        self.disconnect()
        push: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        push.setsockopt(zmq.LINGER, 0)
        push.setsockopt(zmq.SNDHWM, self._send_queue)
        push.connect(address)
        self._push = push
        self._push_fd = int(push.getsockopt(zmq.FD))
        self._loop.add_reader(self._push_fd, self._send_unsent)

    def disconnect(self) -> None:
        """The core is gone: unsent messages are dropped, waiting resets fail. Call with AsyncEngine.engine_down."""
        if self._push is not None:
            self._loop.remove_reader(self._push_fd)
            self._push.close()
            self._push = None
        self._unsent_aborts.clear()
        resets, self._resets = self._resets, {}
        for future in resets.values():
            if not future.done():
                future.set_exception(failure(Reason.ENGINE_RESTARTED))

    def close(self) -> None:
        """Frees the sockets; nothing can be sent or received afterwards."""
        self.disconnect()
        if not self._pull.closed:
            self._loop.remove_reader(self._pull_fd)
            self._pull.close(linger=0)
            self._context.term()

    def add(self, requests: list[EngineCoreRequest]) -> None:
        self._send_unsent()
        if self._push is None:
            raise failure(Reason.ENGINE_RESTARTED)
        data = self._encoder.encode(AddRequests(self._frontend, requests))
        if len(data) > MAX_FRAME:  # each prompt carries the parameters
            raise RequestError(
                Reason.REQUEST_TOO_LARGE,
                "the request is too large: fewer prompts or shorter lists in its parameters",
                metadata={"max": str(MAX_FRAME), "got": str(len(data))},
            )
        if self._unsent_aborts or not self._send_data(data):
            raise failure(Reason.QUEUE_FULL)

    def abort(self, keys: list[int], cause: AbortCause) -> None:
        if not keys or self._push is None:
            return
        self._unsent_aborts.append(AbortSequences(self._frontend, keys, cause))
        self._send_unsent()

    async def reset_prefix_cache(self) -> int:
        if self._push is None:
            raise failure(Reason.ENGINE_RESTARTED)
        call_id = next(self._call_ids)
        future: asyncio.Future[int] = self._loop.create_future()
        if not self._send(ResetPrefixCache(self._frontend, call_id)):
            raise failure(Reason.QUEUE_FULL)
        self._resets[call_id] = future
        try:
            return await future
        finally:
            self._resets.pop(call_id, None)

    def _send(self, message: ToCore) -> bool:
        """False if there is no room."""
        return self._send_data(self._encoder.encode(message))

    def _send_data(self, data: bytes) -> bool:
        assert self._push is not None
        try:
            self._push.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _send_unsent(self) -> None:
        """Also called when the descriptor of the sending socket tells of a change, such as room."""
        if self._push is None:
            return
        self._push.getsockopt(zmq.EVENTS)  # acknowledges the change
        sent = 0
        for message in self._unsent_aborts:
            if not self._send(message):
                break
            sent += 1
        del self._unsent_aborts[:sent]

    def _read(self) -> None:
        for _ in range(_MAX_READS):
            if self._pull.closed:
                return
            if not int(self._pull.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            self._handle(self._pull.recv(zmq.NOBLOCK))
        self._loop.call_soon(self._read)

    def _handle(self, data: bytes) -> None:
        try:
            message = self._decoder.decode(data)
        except msgspec.DecodeError:
            _log.error("a message of the engine core cannot be decoded (%d bytes)", len(data))
            self.on_broken()
            return
        if isinstance(message, PrefixCacheReset):
            future = self._resets.get(message.call_id)
            if future is not None and not future.done():
                future.set_result(message.freed_blocks)
            return
        self.on_message(message)
