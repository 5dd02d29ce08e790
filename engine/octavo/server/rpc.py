"""What every RPC passes through: request id, API key, the servicer's method, its errors as statuses, metrics, log.

All methods are registered with gRPC as streams of raw bytes. So a key is checked before the message is read, a message
that cannot be parsed is INVALID_ARGUMENT, one that never comes too, and nothing that is raised becomes UNKNOWN.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from octavo.errors import Reason, RequestError
from octavo.frontend.failures import failure as failure_of
from octavo.server import statuses
from octavo.server.api_keys import ApiKeys, FailureMeter, Identity
from octavo.server.statuses import PlainStatus

logger = logging.getLogger(__name__)
access = logging.getLogger("octavo.access")

REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
STALL_SECONDS = 60.0
"""After which a write that the client does not take ends its RPC with SLOW_READER, after twice as long at the latest.
What waits in it may belong to requests that have ended, whose places are others' by now."""

Observer = Callable[[str, str, str, float], None]
"""Is told service, method, code and seconds of each RPC that ended; never a name that does not exist."""


class Call:
    """One RPC as its servicer sees it."""

    def __init__(self, context: Any, method: _Method, pipeline: Pipeline) -> None:
        metadata = context.invocation_metadata()
        self.context = context
        self.request_id = _request_id(metadata)
        """The client's x-request-id, or one made up."""
        self.identity = Identity()
        self.on_admin_port = pipeline.on_admin_port
        remaining = context.time_remaining()
        self.deadline: float | None = None if remaining is None else time.monotonic() + remaining
        """The client's, monotonic seconds."""
        self.max_message = pipeline.max_message
        """Bytes that a message to the client may have."""
        self.authorization = [value for key, value in metadata if key == "authorization"]
        self.stuck_with: RequestError | None = None
        """This RPC was cancelled from here, to end with this: the client took nothing for too long, or the server stops
        while it waits for a message."""
        self.max_duration = pipeline.max_duration
        """Seconds that the message of an RPC that has one may take to come."""
        self._parse = method.parse
        self._instance_id = pipeline.instance_id
        self._is_reading = False
        self._is_stopping = False
        self._on_stop: Callable[[], None] | None = None
        self._sent_headers = False
        self._is_writing = False
        self._num_writes = 0
        self._stuck_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._task = current_task()

    @property
    def is_admin(self) -> bool:
        """Whether the operator's RPCs are allowed here."""
        return self.on_admin_port and self.identity.is_admin

    async def read(self) -> Any | None:
        """The client's next message, None after its last. Raises RequestError MALFORMED_REQUEST."""
        if self._is_stopping and self._on_stop is None:
            raise failure_of(Reason.DRAINING)
        self._is_reading = True
        raw = await self.context.read()
        self._is_reading = False
        if raw is grpc.aio.EOF:
            return None
        try:
            return self._parse(raw)
        except (DecodeError, RecursionError, ValueError):
            raise statuses.malformed() from None

    async def messages(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not None:
            yield message

    async def send_headers(self) -> None:
        """Before the first message, and only then: a failure without headers can be retried by the client."""
        if not self._sent_headers:
            self._sent_headers = True
            await self.context.send_initial_metadata(
                (("x-request-id", self.request_id), ("x-octavo-instance", self._instance_id))
            )

    def serialize(self, message: Message) -> bytes:
        """Raises RequestError RESPONSE_TOO_LARGE."""
        return self.checked(message.SerializeToString())

    def checked(self, raw: bytes) -> bytes:
        """Raises RequestError RESPONSE_TOO_LARGE."""
        if len(raw) > self.max_message:
            raise statuses.response_too_large(self.max_message)
        return raw

    async def write(self, message: Message) -> None:
        await self.write_raw(self.serialize(message))

    async def write_raw(self, raw: bytes) -> None:
        """Returns when gRPC's flow control has taken the message."""
        if not self._sent_headers:
            await self.send_headers()
        self._num_writes += 1
        self._is_writing = True
        if self._stall_timer is None:
            self._watch_write()
        await self.context.write(raw)
        self._is_writing = False

    def end_if_stuck(self, error: RequestError, grace: float) -> None:
        """The request failed: if its servicer is in a write now, and in the same one after `grace` seconds, the RPC is
        ended with `error` although the client takes nothing. Called from the event loop, outside of the RPC's task."""
        if self._is_writing and self._stuck_timer is None:
            loop = asyncio.get_running_loop()
            self._stuck_timer = loop.call_later(grace, self._end_if_same_write, error, self._num_writes)

    def _end_if_same_write(self, error: RequestError, num_writes: int) -> None:
        self._stuck_timer = None
        if self._is_writing and self._num_writes == num_writes and self.stuck_with is None:
            self.stuck_with = error
            self._task.cancel()

    def _watch_write(self) -> None:
        """One timer for many writes."""
        loop = asyncio.get_running_loop()
        self._stall_timer = loop.call_later(STALL_SECONDS, self._check_write, self._num_writes)

    def _check_write(self, num_writes: int) -> None:
        self._stall_timer = None
        if not self._is_writing:
            return
        if self._num_writes != num_writes:
            self._watch_write()
        elif self.stuck_with is None:
            self.stuck_with = failure_of(Reason.SLOW_READER)
            self._task.cancel()

    def when_stopping(self, callback: Callable[[], None]) -> None:
        """`callback` is called when the server stops. Without it an RPC that waits for a message ends with DRAINING."""
        self._on_stop = callback
        if self._is_stopping:
            callback()

    def stop(self) -> None:
        """The server stops: what was asked for is finished, nothing more is taken."""
        self._is_stopping = True
        if self._on_stop is not None:
            self._on_stop()
        elif self._is_reading and self.stuck_with is None:
            self.stuck_with = failure_of(Reason.DRAINING)
            self._task.cancel()

    def close(self) -> None:
        for timer in (self._stuck_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()


@dataclass(frozen=True, slots=True)
class _Method:
    service: str
    name: str
    parse: Callable[[bytes], Any]
    invoke: Callable[[Call], Awaitable[Any]]
    """Returns the answer of a unary method."""
    is_open: bool
    """Needs no key."""
    is_known: bool = True


class Pipeline:
    """Makes gRPC handlers of servicers. One for each port."""

    def __init__(
        self,
        *,
        keys: ApiKeys | None,
        on_admin_port: bool,
        instance_id: str,
        max_message: int,
        max_duration: float = 300.0,
        observe: Observer | None = None,
    ) -> None:
        """`keys` None: everybody may call, and on the admin port is an admin. `max_duration`: seconds that the message
        of an RPC that has one may take to come."""
        self.on_admin_port = on_admin_port
        self.instance_id = instance_id
        self.max_message = max_message
        self._keys = keys
        self.max_duration = max_duration
        self._failures = FailureMeter()
        self._observe = observe
        self._calls: set[Call] = set()
        self._is_stopping = False

    def stop(self) -> None:
        """Ends the RPCs that wait for their clients; those that compute or write an answer go on."""
        self._is_stopping = True
        for call in list(self._calls):
            call.stop()

    def service(self, descriptor: Any, servicer: object, *, name: str = "", is_open: bool = False) -> Any:
        """The handlers of a service: `servicer` has an async method per RPC, called as `method(request, call)`, or
        `method(call)` where the client streams. It returns the answer, or writes answers where the server streams.

        `name`: registered under this instead of the descriptor's.
        """
        service = name or descriptor.full_name
        handlers = {}
        for rpc in descriptor.methods:
            function = getattr(servicer, rpc.name)
            invoke = function if rpc.client_streaming else _with_request(function)
            parse = GetMessageClass(rpc.input_type).FromString
            method = _Method(service, rpc.name, parse, invoke, is_open)
            handlers[rpc.name] = self._stream(method) if rpc.server_streaming else self._unary(method)
        return grpc.method_handlers_generic_handler(service, handlers)

    def fallback(self) -> Any:
        """Handles every method that no service has: UNIMPLEMENTED, with a key only."""

        async def refuse(call: Call) -> None:
            raise PlainStatus(grpc.StatusCode.UNIMPLEMENTED, "no such method")

        return _Fallback(self._stream(_Method("unknown", "unknown", bytes, refuse, is_open=False, is_known=False)))

    def _unary(self, method: _Method) -> Any:
        async def handler(requests: object, context: Any) -> bytes:
            async def work(call: Call) -> bytes:
                raw = call.serialize(await method.invoke(call))
                await call.send_headers()
                return raw

            result: bytes = await self._run(method, context, work)
            return result

        return grpc.stream_unary_rpc_method_handler(handler)

    def _stream(self, method: _Method) -> Any:
        async def handler(requests: object, context: Any) -> None:
            await self._run(method, context, method.invoke)

        return grpc.stream_stream_rpc_method_handler(handler)

    async def _run(self, method: _Method, context: Any, work: Callable[[Call], Awaitable[Any]]) -> Any:
        started = time.monotonic()
        call = Call(context, method, self)
        code = "OK"
        self._calls.add(call)
        if self._is_stopping:
            call.stop()
        try:
            await self._authenticate(method, call)
            return await work(call)
        except BaseException as error:
            failure = _failure(error, call)
            if failure is None:
                code = "DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED"
                raise
            code = failure.code.name
        finally:
            call.close()
            self._calls.discard(call)
            self._ended(method, call, code, started)
        # Outside of `except`, so that gRPC's exception does not drag ours, with its frames, along.
        if isinstance(failure, PlainStatus):
            await context.abort(failure.code, failure.message)
        else:
            await statuses.abort(context, failure, call.request_id)

    def _ended(self, method: _Method, call: Call, code: str, started: float) -> None:
        seconds = time.monotonic() - started
        if self._observe is not None:
            self._observe(method.service, method.name, code, seconds)
        access.debug(
            "%s/%s %s %.3f s request=%s key=%s", method.service, method.name, code, seconds, call.request_id,
            call.identity.name,
        )  # fmt: skip

    async def _authenticate(self, method: _Method, call: Call) -> None:
        if self._keys is None:
            call.identity = Identity(is_admin=self.on_admin_port)
            return
        if method.is_open:
            return
        try:
            call.identity = self._keys.identify(call.authorization)
        except RequestError:
            if self._failures.is_excessive(call.context.peer()):
                await asyncio.sleep(1.0)
            raise


class _Fallback(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, handler: Any) -> None:
        self._handler = handler

    def service(self, handler_call_details: Any) -> Any:
        return self._handler


def _with_request(function: Callable[[Any, Call], Awaitable[Any]]) -> Callable[[Call], Awaitable[Any]]:
    async def invoke(call: Call) -> Any:
        try:
            async with asyncio.timeout(call.max_duration):
                request = await call.read()
        except TimeoutError:
            raise failure_of(Reason.SERVER_MAX_DURATION) from None
        if request is None:
            raise statuses.malformed()
        return await function(request, call)

    return invoke


def _failure(error: BaseException, call: Call) -> RequestError | PlainStatus | None:
    """What the client is told; None if there is nobody left to tell, and `error` has to go on."""
    if isinstance(error, RequestError | PlainStatus):
        return error
    if isinstance(error, GeneratorExit | grpc.aio.AbortError | grpc.aio.InternalError):
        return None  # gRPC's own: the call is over
    if isinstance(error, asyncio.CancelledError):
        task = current_task()
        if call.stuck_with is not None:
            task.uncancel()
            return call.stuck_with
        if task.cancelling():
            return None  # by gRPC: the client is gone, or the server stops
    log_bug(error, call.request_id)
    return statuses.internal()


def log_bug(error: BaseException, request_id: str) -> None:
    """Type and frames of an exception that nobody expected. Not its text, which may hold parts of a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    logger.error("request %s failed with %s at %s", request_id, type(error).__name__, where)


def current_task() -> asyncio.Task[Any]:
    """The task that runs this coroutine."""
    task = asyncio.current_task()
    assert task is not None, "gRPC runs each RPC in a task"
    return task


def _request_id(metadata: Any) -> str:
    for key, value in metadata:
        if key == "x-request-id" and isinstance(value, str) and REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex
