"""GenerateSession: many requests on one stream, one message per wake-up for all of them.

No task per request: one that has news puts itself on a list, and the writer, the RPC's own task, takes from all that
are listed when it can send. So what waits for a slow stream stays in the requests' slots, where it is merged, and the
session itself holds errors only. A task opens a request and ends when that is admitted.
"""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from dataclasses import dataclass, field

from octavo_proto.v1 import generation_pb2 as pb

from octavo.errors import Reason, RequestError
from octavo.frontend.async_engine import AsyncEngine
from octavo.frontend.failures import failure
from octavo.metrics import Metrics
from octavo.server import convert, fields, plain, statuses
from octavo.server.requests import ActiveRequest, request_of
from octavo.server.rpc import REQUEST_ID, Call, current_task, log_bug

_MAX_PENDING = 1024
"""Errors that may wait before no more requests are read."""
_MAX_PENDING_BYTES = 4 << 20
"""The same in bytes."""


@dataclass(frozen=True, slots=True)
class SessionTimes:
    """When a session ends that does nothing. Seconds."""

    first_request: float = 30.0
    idle: float = 600.0


@dataclass(eq=False, slots=True)
class _Running:
    """A request from its submission to its last event."""

    tag: int
    request_id: str
    event_tag: bytes
    """Its tag as it is in the bytes of an event."""
    opening: asyncio.Task[None] | None = None
    """Until it is admitted."""
    active: ActiveRequest | None = None
    """From then on."""


@dataclass(slots=True)
class _Outbox:
    """Errors that wait for the writer, each a serialised message of one event."""

    events: list[bytes] = field(default_factory=list)
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
        self._ready: list[_Running] = []
        """Those that have news, in the order in which they got them."""
        self._opening: set[asyncio.Task[None]] = set()
        """Those of requests that were cancelled included."""
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
            tasks = [reader, *self._opening]
            for task in tasks:
                task.cancel()
            for running in self._running.values():
                if running.active is not None:
                    running.active.close()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- the writer

    async def _write_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            outbox, self._outbox = self._outbox, _Outbox()
            events = outbox.events + self._take_all()
            if events:
                await self._write(events)
            outbox.sent.set()
            if self._failure is not None:
                raise self._failure
            if (self._half_closed or self._stopping) and not self._running and not self._outbox.events:
                if self._half_closed:
                    return
                raise failure(Reason.DRAINING)

    async def _write(self, events: list[bytes]) -> None:
        """`events` are messages of one event each; protobuf merges what is concatenated."""
        raw = b"".join(events)
        if len(raw) <= self._call.max_message:
            await self._call.write_raw(raw)
            return
        part: list[bytes] = []
        size = 0
        for event in self._split(events):
            if part and size + len(event) > self._call.max_message:
                await self._call.write_raw(b"".join(part))
                part, size = [], 0
            part.append(event)
            size += len(event)
        await self._call.write_raw(self._call.checked(b"".join(part)))

    def _split(self, events: list[bytes]) -> list[bytes]:
        limit = self._call.max_message - 32  # the envelope
        parts = []
        for raw in events:
            if len(raw) <= limit:
                parts.append(raw)
                continue
            [event] = pb.GenerateSessionResponse.FromString(raw).events
            for response in convert.split_response(event.response, limit):
                parts.append(plain.response_event(plain.event_tag(event.tag), response.SerializeToString()))
        return parts

    # --- news

    def _take_all(self) -> list[bytes]:
        """Everything that is due, as messages of one event: at most one per request, or one and its error."""
        ready, self._ready = self._ready, []
        now = time.monotonic()
        events: list[bytes] = []
        for running in ready:
            active = running.active
            if active is None:  # cancelled meanwhile
                continue
            try:
                if (news := active.take_plain(now)) is None:
                    self._take(running, active, events)
                elif event := plain.event(running.event_tag, *news):
                    events.append(event)
            except RequestError as error:
                events.append(self._end(running, error))
            except Exception as error:
                log_bug(error, running.request_id)
                events.append(self._end(running, statuses.internal()))
        return events

    def _take(self, running: _Running, active: ActiveRequest, events: list[bytes]) -> None:
        """Where the news is more than new text and ids. Raises what ends the request."""
        while (response := active.take()) is not None:
            events.append(plain.response_event(running.event_tag, response))
            if active.is_complete:
                self._forget(running, None)
                return
            if not active.handle.state.ended:
                return
        if active.handle.state.taken:
            raise statuses.internal()  # it ended without usage and without error

    def _end(self, running: _Running, error: RequestError) -> bytes:
        """Its last event. It is no longer running, whatever the writer does."""
        self._forget(running, error)
        return _error_event(running, error)

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
        running = _Running(tag, _request_id(submit), plain.event_tag(tag))
        if tag in self._running:
            text = f"a running request of this stream has the tag {tag}"
            self._put_error(running, RequestError(Reason.TAG_IN_USE, text))
        elif len(self._running) >= limit:
            text = f"{limit} requests are running on this stream; wait for one of them"
            self._put_error(running, RequestError(Reason.SESSION_FULL, text))
        else:
            task = asyncio.create_task(self._open(submit, running), name="octavo session request")
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
            running.opening = task
            self._running[tag] = running
        if not self._running:
            self._start_idle_timer(self._times.idle)

    def _cancel(self, tag: int) -> None:
        running = self._running.get(tag)
        if running is not None:
            if running.opening is not None:
                running.opening.cancel()
            error = RequestError(Reason.CLIENT_CANCELLED, "cancelled")
            self._put_error(running, error)
            self._forget(running, error)

    # --- a request

    async def _open(self, submit: pb.GenerateSessionRequest.Submit, running: _Running) -> None:
        try:
            active = self._request(submit, running.request_id)
            await active.open()
        except RequestError as error:
            ending = error
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and current_task().cancelling():
                raise
            log_bug(error, running.request_id)
            ending = statuses.internal()
        else:
            running.opening, running.active = None, active
            active.handle.on_failure(self._reader_may_be_stuck)
            active.handle.when_ready(functools.partial(self._has_news, running))
            return
        self._put_error(running, ending)
        self._forget(running, ending)

    def _has_news(self, running: _Running) -> None:
        if not self._ready:
            self._wake.set()
        self._ready.append(running)

    def _reader_may_be_stuck(self, error: RequestError) -> None:
        """A request failed while its news waited to be sent. The others are in the same queue."""
        if error.reason is Reason.SLOW_READER:
            self._call.end_if_stuck(error, 0.0)

    def _request(self, submit: pb.GenerateSessionRequest.Submit, request_id: str) -> ActiveRequest:
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

    def _put_error(self, running: _Running, error: RequestError) -> None:
        event = _error_event(running, error)
        self._outbox.events.append(event)
        self._outbox.size += len(event)
        self._wake.set()

    def _forget(self, running: _Running, error: RequestError | None) -> None:
        """It has ended, with an error or without."""
        del self._running[running.tag]
        if running.active is not None:
            running.active.close(error)
            running.active = None
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


def _error_event(running: _Running, error: RequestError) -> bytes:
    event = pb.GenerateSessionResponse.Event(tag=running.tag, error=statuses.in_band(error, running.request_id))
    return pb.GenerateSessionResponse(events=[event]).SerializeToString()


def _request_id(submit: pb.GenerateSessionRequest.Submit) -> str:
    """The client's if it is a valid one, else one made up."""
    own = submit.request.request_id
    return own if REQUEST_ID.fullmatch(own) else uuid.uuid4().hex
