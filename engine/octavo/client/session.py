"""Many requests multiplexed on one GenerateSession stream.

One task reads the stream and puts each event into the mailbox of its tag; whoever submitted the tag reads there. The
stream is opened by the first request, and anew by the first one after it broke: what was running then fails.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from octavo_proto.v1 import generation_pb2

from octavo.client import wire
from octavo.client.errors import (
    Cancelled,
    DeadlineExceeded,
    Failure,
    OctavoError,
    Unavailable,
    error_from_event,
    error_from_rpc,
)
from octavo.client.params import Call, Prompts, build
from octavo.client.results import Collector, Delta, Response, shaped

SESSION_TIMEOUT = 86_400.0
"""Seconds that a session may live."""
_GRACE = 5.0
"""Seconds beyond a request's timeout after which the client stops waiting for the server to say so."""
_CLOSE = 5.0
"""Seconds that the server gets to end a stream on which nothing runs."""

_Message = generation_pb2.GenerateSessionRequest
_Event = generation_pb2.StreamGenerateResponse | generation_pb2.RequestError | OctavoError


class Session:
    """A multiplexed stream: `async with client.multiplex() as session: await session.generate(...)`.

    Leaving the block cancels what still runs. State: belongs to one event loop.
    """

    def __init__(self, start: Callable[[AsyncIterator[_Message], float], Any], timeout: float | None) -> None:
        self._start = start
        self._timeout = SESSION_TIMEOUT if timeout is None else timeout
        self._tags = itertools.count(1)
        self._mailboxes: dict[int, asyncio.Queue[_Event]] = {}
        self._outgoing: asyncio.Queue[_Message | None] = asyncio.Queue()
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        call, reader = self._call, self._reader
        if call is None or reader is None:
            return
        if self._mailboxes or kind is not None:
            call.cancel()
        self._outgoing.put_nowait(None)
        await asyncio.wait({reader}, timeout=_CLOSE)
        call.cancel()
        await reader

    async def generate(self, prompts: Prompts = None, **keywords: Any) -> Any:
        """As Client.generate."""
        call = build(prompts, keywords)
        return shaped(await self._collect(call), call.single)

    async def generate_all(self, prompts: Prompts = None, **keywords: Any) -> Response:
        """As Client.generate_all."""
        return await self._collect(build(prompts, keywords))

    def stream(self, prompts: Prompts = None, **keywords: Any) -> SessionStream:
        """As AsyncClient.stream; leaving the block cancels this request only."""
        return SessionStream(self, build(prompts, keywords))

    async def _collect(self, call: Call) -> Response:
        async with SessionStream(self, call) as stream:
            return await stream.response()

    def submit(self, call: Call) -> int:
        """Sends a request; returns its tag. Used by SessionStream."""
        if self._call is None:
            self._open()
        tag = next(self._tags)
        self._mailboxes[tag] = asyncio.Queue()
        submit = _Message.Submit(tag=tag, request=call.message, timeout=wire.duration(call.timeout))
        self._outgoing.put_nowait(_Message(submit=submit))
        return tag

    async def event(self, tag: int, give_up: float) -> _Event:
        """The next event of a tag. Raises DeadlineExceeded at `give_up` (time of the loop). Used by SessionStream."""
        try:
            async with asyncio.timeout_at(give_up):
                return await self._mailboxes[tag].get()
        except TimeoutError:
            raise DeadlineExceeded(Failure("DEADLINE_EXCEEDED", "the server did not answer in time")) from None

    def forget(self, tag: int, *, running: bool) -> None:
        """Drops a tag's mailbox, and cancels the request if it is still running. Used by SessionStream."""
        del self._mailboxes[tag]
        if running and self._call is not None:
            self._outgoing.put_nowait(_Message(cancel=_Message.Cancel(tag=tag)))

    def _open(self) -> None:
        self._outgoing = asyncio.Queue()
        self._call = self._start(_until_none(self._outgoing), self._timeout)
        self._reader = asyncio.create_task(self._read(self._call))

    async def _read(self, call: Any) -> None:
        """Reads until the stream ends; then every request that still runs has failed."""
        failure: OctavoError = Unavailable(Failure("UNAVAILABLE", "the server ended the session"))
        try:
            async for message in call:
                for event in message.events:
                    self._deliver(event)
        except grpc.RpcError as error:
            failure = error_from_rpc(error)
        except asyncio.CancelledError:  # grpc.aio raises this for a cancelled call, too
            failure = Cancelled(Failure("CANCELLED", "the session was closed"))
            if _task_is_cancelled():
                raise
        finally:
            call.cancel()
            self._call = None
            for mailbox in self._mailboxes.values():
                mailbox.put_nowait(failure)

    def _deliver(self, event: generation_pb2.GenerateSessionResponse.Event) -> None:
        mailbox = self._mailboxes.get(event.tag)
        if mailbox is not None:  # else it was left in the meantime
            mailbox.put_nowait(event.error if event.WhichOneof("event") == "error" else event.response)


class SessionStream:
    """One request of a session: `async with session.stream(...) as stream: async for delta in stream: ...`."""

    def __init__(self, session: Session, call: Call) -> None:
        self._session = session
        self._request = call
        self._tag: int | None = None
        self._give_up = 0.0
        self._ended = False
        self._collector = Collector(call.request_id)

    @property
    def request_id(self) -> str:
        return self._collector.request_id

    async def __aenter__(self) -> Self:
        self._give_up = asyncio.get_running_loop().time() + self._request.timeout + _GRACE
        self._tag = self._session.submit(self._request)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tag is not None:
            self._session.forget(self._tag, running=not self._ended)
            self._tag = None

    async def __aiter__(self) -> AsyncIterator[Delta]:
        if self._tag is None:
            raise RuntimeError("a stream is iterated inside its `async with` block")
        while not self._ended:
            event = await self._session.event(self._tag, self._give_up)
            if isinstance(event, generation_pb2.StreamGenerateResponse):
                deltas = self._collector.add(event)
                self._ended = event.HasField("usage")
                for delta in deltas:
                    yield delta
            else:
                self._ended = True
                raise event if isinstance(event, OctavoError) else error_from_event(event, self.request_id)

    async def response(self) -> Response:
        """Reads what is left and returns the whole answer."""
        async for _ in self:
            pass
        return self._collector.response()


async def _until_none(queue: asyncio.Queue[_Message | None]) -> AsyncIterator[_Message]:
    while (message := await queue.get()) is not None:
        yield message


def raise_if_only_the_call_was_cancelled(request_id: str) -> None:
    """grpc.aio raises CancelledError for a call with status CANCELLED, too, where no task was cancelled."""
    if not _task_is_cancelled():
        raise Cancelled(Failure("CANCELLED", "the call was cancelled", request_id=request_id)) from None


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
