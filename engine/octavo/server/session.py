"""GenerateSession: many requests on one stream, one message per wake-up for all of them.

A task per request (the pump) takes updates from its handle and puts events into the session's list; one writer, the
RPC's own task, sends the list whole. A pump waits until its event was sent before it takes the next update, so that a
slow stream makes updates merge in the handles, and a session holds one event per request.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field

from octavo_proto.v1 import generation_pb2 as pb

from octavo.errors import Reason, RequestError
from octavo.frontend.async_engine import AsyncEngine
from octavo.frontend.failures import failure
from octavo.metrics import Metrics
from octavo.server import convert, fields, statuses
from octavo.server.requests import ActiveRequest, request_of
from octavo.server.rpc import REQUEST_ID, Call, current_task, log_bug

Event = pb.GenerateSessionResponse.Event

_MAX_PENDING = 1024
"""Events that may wait before no more requests are read."""
_MAX_PENDING_BYTES = 4 << 20
"""The same in bytes."""


@dataclass(frozen=True, slots=True)
class SessionTimes:
    """When a session ends that does nothing. Seconds."""

    first_request: float = 30.0
    idle: float = 600.0


@dataclass(frozen=True, slots=True)
class _Running:
    task: asyncio.Task[None]
    request_id: str


@dataclass(slots=True)
class _Outbox:
    """Events that wait for the writer."""

    events: list[Event] = field(default_factory=list)
    size: int = 0
    """Bytes of `events`."""
    sent: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when `events` have been written."""


class Session:
    """One GenerateSession RPC."""

    def __init__(self, engine: AsyncEngine, call: Call, metrics: Metrics | None, times: SessionTimes) -> None:
        self._engine = engine
        self._call = call
        self._metrics = metrics
        self._times = times
        self._running: dict[int, _Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        """Pumps, those of requests that were cancelled included."""
        self._outbox = _Outbox()
        self._wake = asyncio.Event()
        self._half_closed = False
        self._stopping = False
        self._failure: BaseException | None = None
        """Why the stream as a whole fails."""
        self._idle_timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Until the client has closed its side and every request has ended. Raises what ends the stream otherwise."""
        self._start_idle_timer(self._times.first_request)
        self._call.when_stopping(self._stop)
        reader = asyncio.create_task(self._read_all(), name="octavo session reader")
        try:
            await self._write_all()
        finally:
            self._stop_idle_timer()
            tasks = [reader, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- the writer

    async def _write_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            outbox, self._outbox = self._outbox, _Outbox()
            if outbox.events:
                await self._write(outbox.events)
            outbox.sent.set()
            if self._failure is not None:
                raise self._failure
            if (self._half_closed or self._stopping) and not self._running and not self._outbox.events:
                if self._half_closed:
                    return
                raise failure(Reason.DRAINING)

    async def _write(self, events: list[Event]) -> None:
        raw = pb.GenerateSessionResponse(events=events).SerializeToString()
        if len(raw) <= self._call.max_message:
            await self._call.write_raw(raw)
            return
        part, size = pb.GenerateSessionResponse(), 0
        for event in self._split(events):
            event_size = event.ByteSize() + 6  # tag and length
            if size and size + event_size > self._call.max_message:
                await self._call.write(part)
                part, size = pb.GenerateSessionResponse(), 0
            part.events.append(event)
            size += event_size
        await self._call.write(part)

    def _split(self, events: list[Event]) -> list[Event]:
        limit = self._call.max_message - 32  # the envelope
        parts = []
        for event in events:
            if event.ByteSize() <= limit:
                parts.append(event)
            else:
                parts += [Event(tag=event.tag, response=r) for r in convert.split_response(event.response, limit)]
        return parts

    # --- the reader

    async def _read_all(self) -> None:
        try:
            while (message := await self._call.read()) is not None:
                fields.reject_unknown(message)
                match message.WhichOneof("op"):
                    case "submit":
                        self._submit(message.submit)
                    case "cancel":
                        fields.reject_unknown(message.cancel, "cancel.")
                        self._cancel(message.cancel.tag)
                    case _:
                        raise statuses.invalid("op", "must be set")
                if len(self._outbox.events) > _MAX_PENDING or self._outbox.size > _MAX_PENDING_BYTES:
                    await self._outbox.sent.wait()
            self._half_closed = True
            self._stop_idle_timer()
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and current_task().cancelling():
                raise
            self._failure = error
        self._wake.set()

    def _submit(self, submit: pb.GenerateSessionRequest.Submit) -> None:
        tag = submit.tag
        self._stop_idle_timer()
        limit = self._engine.limits.max_session_requests
        if tag in self._running:
            text = f"a running request of this stream has the tag {tag}"
            self._put_error(tag, RequestError(Reason.TAG_IN_USE, text), _request_id(submit))
        elif len(self._running) >= limit:
            text = f"{limit} requests are running on this stream; wait for one of them"
            self._put_error(tag, RequestError(Reason.SESSION_FULL, text), _request_id(submit))
        else:
            request_id = _request_id(submit)
            task = asyncio.create_task(self._pump(submit, request_id), name="octavo session request")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self._running[tag] = _Running(task, request_id)
        if not self._running:
            self._start_idle_timer(self._times.idle)

    def _cancel(self, tag: int) -> None:
        running = self._running.get(tag)
        if running is not None:
            running.task.cancel()
            self._put_error(tag, RequestError(Reason.CLIENT_CANCELLED, "cancelled"), running.request_id)
            self._forget(tag)

    # --- a request

    async def _pump(self, submit: pb.GenerateSessionRequest.Submit, request_id: str) -> None:
        """After the request's last event it is no longer running, whatever the writer does."""
        tag = submit.tag
        try:
            async with self._open(submit, request_id) as active:
                active.handle.on_failure(self._reader_may_be_stuck)
                while (response := await active.next()) is not None:
                    outbox = self._put(Event(tag=tag, response=response))
                    if response.HasField("usage"):
                        self._forget(tag)
                        return
                    await outbox.sent.wait()
        except RequestError as error:
            ending = error
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and current_task().cancelling():
                raise
            log_bug(error, request_id)
            ending = statuses.internal()
        else:
            ending = statuses.internal()  # a handle ended without usage and without error
        self._put_error(tag, ending, request_id)
        self._forget(tag)

    def _reader_may_be_stuck(self, error: RequestError) -> None:
        """A request failed while its last event waited to be sent. The others are in the same queue."""
        if error.reason is Reason.SLOW_READER:
            self._call.end_if_stuck(error, 0.0)

    def _open(self, submit: pb.GenerateSessionRequest.Submit, request_id: str) -> ActiveRequest:
        return ActiveRequest(
            self._engine,
            request_of(submit),
            self._call,
            request_id=request_id,
            deadline=self._deadline(submit),
            streaming=True,
            metrics=self._metrics,
        )

    def _deadline(self, submit: pb.GenerateSessionRequest.Submit) -> float | None:
        """The earlier of the stream's and the request's."""
        ends = [] if self._call.deadline is None else [self._call.deadline]
        if submit.HasField("timeout"):
            try:
                timeout = fields.seconds(submit.timeout)
            except ValueError:
                timeout = -1.0
            if timeout < 0:
                raise statuses.invalid("timeout", "must be a Duration of at least 0 s")
            ends.append(time.monotonic() + timeout)
        return min(ends, default=None)

    def _put(self, event: Event) -> _Outbox:
        self._outbox.events.append(event)
        self._outbox.size += event.ByteSize()
        self._wake.set()
        return self._outbox

    def _put_error(self, tag: int, error: RequestError, request_id: str) -> None:
        self._put(Event(tag=tag, error=statuses.in_band(error, request_id)))

    def _forget(self, tag: int) -> None:
        del self._running[tag]
        if not self._running and not self._half_closed:
            self._start_idle_timer(self._times.idle)

    def _stop(self) -> None:
        """The server stops: the stream ends once nothing runs and everything is sent."""
        self._stopping = True
        self._wake.set()

    # --- a stream that does nothing

    def _start_idle_timer(self, seconds: float) -> None:
        self._stop_idle_timer()
        self._idle_timer = asyncio.get_running_loop().call_later(seconds, self._idle_too_long, seconds)

    def _stop_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _idle_too_long(self, seconds: float) -> None:
        self._failure = RequestError(Reason.SERVER_MAX_DURATION, f"no request came for {seconds:g} seconds")
        self._wake.set()


def _request_id(submit: pb.GenerateSessionRequest.Submit) -> str:
    """The client's if it is a valid one, else one made up."""
    own = submit.request.request_id
    return own if REQUEST_ID.fullmatch(own) else uuid.uuid4().hex
