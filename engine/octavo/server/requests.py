"""One generation request inside a servicer: from its message to a handle, and from updates to messages."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

import msgspec
from octavo_proto.v1 import generation_pb2 as pb

from octavo.errors import Reason, RequestError
from octavo.frontend.async_engine import AsyncEngine, RequestHandle
from octavo.metrics import Metrics, RequestMeter
from octavo.server import convert, fields
from octavo.server.rpc import Call


class ActiveRequest:
    """A submitted request; `async with` opens it and frees its places on every way out. One reader.

    Where opening and closing are far apart: `open`, and `close` if that returned.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        message: pb.GenerateRequest,
        call: Call,
        *,
        request_id: str,
        deadline: float | None,
        streaming: bool,
        metrics: Metrics | None,
    ) -> None:
        """`request_id` is the name of a request that has none; `deadline` the client's, monotonic seconds."""
        self._engine = engine
        self._message = message
        self._call = call
        self._request_id = request_id
        self._deadline = deadline
        self._streaming = streaming
        self._metrics = metrics
        self._meter: RequestMeter | None = None
        self._handle: RequestHandle | None = None
        self._is_first = True
        self.is_complete = False
        """The message with `usage`, the last of a request that succeeds, was taken."""

    async def __aenter__(self) -> ActiveRequest:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    async def open(self) -> None:
        """Submits it. Raises RequestError when it is not admitted; then there is nothing to close."""
        try:
            request = fields.read_request(self._message)
            if not request.request_id:
                request = msgspec.structs.replace(request, request_id=self._request_id)
            self._handle = await self._engine.submit(
                request, tenant=self._call.identity.tenant, deadline=self._deadline, streaming=self._streaming
            )
        except RequestError as error:
            if error.reason is Reason.MODEL_NOT_FOUND:
                error.metadata.setdefault("model", self._message.model[:128])
            if self._metrics is not None:
                self._metrics.rejected(str(error.reason))
            raise
        if self._metrics is not None:
            self._meter = self._metrics.request(len(request.prompts) * (request.params.num_return_sequences or 1))

    def close(self, error: BaseException | None = None) -> None:
        """Idempotent. `error`: why it did not end by itself."""
        self.handle.close()
        if self._meter is not None:
            self._meter.ended(_cause(error))

    @property
    def handle(self) -> RequestHandle:
        assert self._handle is not None
        return self._handle

    async def collect(self) -> pb.GenerateResponse:
        """The whole answer."""
        handle = self.handle
        update = await handle.collect()
        if self._meter is not None:
            self._meter.delivered(update)
        return convert.generate_response(
            update, request_id=handle.request_id, model=handle.model, options=handle.resolved
        )

    def take_plain(self, now: float) -> tuple[str, list[int]] | None:
        """New text and ids where there is nothing else, or None, and then `take` tells. `now` is monotonic."""
        assert self._handle is not None
        plain = self._handle.take_plain()
        if plain is not None and plain[1] and self._meter is not None:
            self._meter.delivered_tokens(len(plain[1]), now)
        return plain

    def take(self) -> bytes | None:
        """What is new, as a serialised StreamGenerateResponse; None where nothing is, as after the last. Raises
        RequestError when the request failed."""
        handle = self.handle
        update = handle.take()
        if update is None:
            return None
        if self._meter is not None:
            self._meter.delivered(update)
        self.is_complete = update.usage is not None
        response = convert.stream_response(update)
        if self._is_first:
            self._is_first = False
            convert.name_first_response(
                response, request_id=handle.request_id, model=handle.model, options=handle.resolved
            )
        return response.SerializeToString()


def _cause(error: BaseException | None) -> str:
    if isinstance(error, RequestError):
        return str(error.reason)
    if error is None or isinstance(error, asyncio.CancelledError):
        return str(Reason.CLIENT_CANCELLED)
    return str(Reason.INTERNAL)


def request_of(message: Any) -> pb.GenerateRequest:
    """The request inside an envelope, whose own unknown fields are refused."""
    fields.reject_unknown(message)
    request: pb.GenerateRequest = message.request
    return request
