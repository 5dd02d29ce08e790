"""The asyncio client: the methods of Client, awaited. Belongs to the event loop in which it was made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from octavo_proto.v1 import (
    control_pb2,
    control_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

from octavo.client import wire
from octavo.client.channel import GENERATION_SERVICE, TLS, Endpoint, deadline
from octavo.client.errors import DeadlineExceeded, Failure, error_from_rpc
from octavo.client.params import Call, Prompts, build
from octavo.client.results import Collector, Delta, Response, shaped
from octavo.client.session import Session, raise_if_only_the_call_was_cancelled


class AsyncClient:
    """A connection to one or several octavo servers; arguments as of Client. Make it where an event loop runs."""

    def __init__(
        self, *addresses: str, tls: bool | TLS = False, api_key: str | None = None, retry: bool = True
    ) -> None:
        self._endpoint = Endpoint.of(addresses, tls, api_key, retry)
        self._data = self._endpoint.open(grpc.aio, health_check=True)
        self._control = self._endpoint.open(grpc.aio, health_check=False)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._data)  # type: ignore[no-untyped-call]
        self._model = model_pb2_grpc.ModelServiceStub(self._control)  # type: ignore[no-untyped-call]
        self._operator = control_pb2_grpc.ControlServiceStub(self._control)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all calls and connections."""
        await self._data.close()
        await self._control.close()

    async def generate(self, prompts: Prompts = None, **keywords: Any) -> Any:
        """As Client.generate. Cancelling the task cancels the request."""
        call = build(prompts, keywords)
        return shaped(await self._generate(call), call.single)

    async def generate_all(self, prompts: Prompts = None, **keywords: Any) -> Response:
        """As Client.generate_all."""
        return await self._generate(build(prompts, keywords))

    def stream(self, prompts: Prompts = None, **keywords: Any) -> AsyncStream:
        """As Client.stream: `async with client.stream(...) as stream: async for delta in stream: ...`."""
        call = build(prompts, keywords)
        request = generation_pb2.StreamGenerateRequest(request=call.message)
        return AsyncStream(lambda: self._start(self._generation.StreamGenerate, request, call.timeout), call)

    def multiplex(self, *, timeout: float | None = None) -> Session:
        """Many requests over one stream, with the same `generate` and `stream`: `async with client.multiplex() as s`.

        `timeout`: most seconds that the stream as a whole may live, a day by default; each request has its own.
        """

        def start(requests: AsyncIterator[generation_pb2.GenerateSessionRequest], limit: float) -> Any:
            return self._generation.GenerateSession(requests, timeout=limit, metadata=self._metadata)

        return Session(start, timeout)

    async def tokenize(self, texts: str | Sequence[str], *, timeout: float | None = None, **options: Any) -> Any:
        """As Client.tokenize."""
        request = wire.tokenize_request(texts, options)
        return wire.tokenize_result(texts, await self._unary(self._model.Tokenize, request, timeout))

    async def detokenize(
        self, token_ids: Iterable[Any], *, skip_special_tokens: bool = False, timeout: float | None = None
    ) -> Any:
        """As Client.detokenize."""
        request, single = wire.detokenize_request(token_ids, skip_special_tokens)
        texts = list((await self._unary(self._model.Detokenize, request, timeout)).texts)
        return texts[0] if single else texts

    async def model(self, *, timeout: float | None = None) -> model_pb2.GetModelResponse:
        """As Client.model."""
        request = model_pb2.GetModelRequest()
        answer: model_pb2.GetModelResponse = await self._unary(self._model.GetModel, request, timeout)
        return answer

    async def info(self, *, timeout: float | None = None) -> control_pb2.GetServerInfoResponse:
        """As Client.info."""
        request = control_pb2.GetServerInfoRequest()
        answer: control_pb2.GetServerInfoResponse = await self._unary(self._operator.GetServerInfo, request, timeout)
        return answer

    async def load(self, *, timeout: float | None = None) -> control_pb2.Load:
        """As Client.load."""
        request = control_pb2.GetLoadRequest()
        answer: control_pb2.GetLoadResponse = await self._unary(self._operator.GetLoad, request, timeout)
        return answer.load

    async def watch_load(
        self, interval: float = 1.0, *, timeout: float | None = None
    ) -> AsyncIterator[control_pb2.Load]:
        """As Client.watch_load."""
        request = control_pb2.WatchLoadRequest(interval=wire.duration(interval))
        async for response in self._iterate(self._operator.WatchLoad, request, timeout):
            yield response.load

    async def abort(
        self, *request_ids: str, all_requests: bool = False, timeout: float | None = None
    ) -> control_pb2.AbortRequestsResponse:
        """As Client.abort."""
        request = wire.abort_request(request_ids, all_requests)
        answer: control_pb2.AbortRequestsResponse = await self._unary(self._operator.AbortRequests, request, timeout)
        return answer

    async def drain(
        self, timeout: float | None = None, *, shutdown: bool = False, undo: bool = False
    ) -> control_pb2.DrainResponse:
        """As Client.drain."""
        request = wire.drain_request(timeout, shutdown, undo)
        limit = wire.drain_deadline(timeout)
        answer: control_pb2.DrainResponse = await self._unary(self._operator.Drain, request, limit)
        return answer

    async def reset_prefix_cache(self, *, timeout: float | None = None) -> int:
        """As Client.reset_prefix_cache."""
        request = control_pb2.ResetPrefixCacheRequest()
        answer: control_pb2.ResetPrefixCacheResponse = await self._unary(
            self._operator.ResetPrefixCache, request, timeout
        )
        return answer.freed_blocks

    async def health(self, service: str = GENERATION_SERVICE, *, timeout: float | None = None) -> str:
        """As Client.health."""
        return str(await self._unary(wire.HealthCall(service).check(self._control), None, timeout))

    async def watch_health(
        self, service: str = GENERATION_SERVICE, *, timeout: float | None = None
    ) -> AsyncIterator[str]:
        """As Client.watch_health."""
        async for status in self._iterate(wire.HealthCall(service).watch(self._control), None, timeout):
            yield status

    async def wait_until_ready(self, timeout: float = 60.0) -> None:
        """As Client.wait_until_ready."""
        try:
            async with asyncio.timeout(deadline(timeout)):
                await self._data.channel_ready()
        except TimeoutError:
            raise DeadlineExceeded(Failure("DEADLINE_EXCEEDED", f"no server was ready within {timeout:g} s")) from None

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return self._endpoint.metadata

    async def _generate(self, call: Call) -> Response:
        collector = Collector(call.request_id)
        collector.add(await self._unary(self._generation.Generate, call.message, call.timeout, call.request_id))
        return collector.response()

    async def _unary(self, method: Any, request: Any, timeout: float | None, request_id: str = "") -> Any:
        call = self._start(method, request, timeout)
        try:
            return await call
        except grpc.RpcError as error:
            raise error_from_rpc(error, request_id) from None
        except asyncio.CancelledError:
            raise_if_only_the_call_was_cancelled(request_id)
            raise
        finally:
            call.cancel()

    def _start(self, method: Any, request: Any, timeout: float | None) -> Any:
        return method(request, timeout=deadline(timeout), metadata=self._metadata)

    async def _iterate(self, method: Any, request: Any, timeout: float | None) -> AsyncIterator[Any]:
        call = self._start(method, request, timeout)
        try:
            async for message in call:
                yield message
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        except asyncio.CancelledError:
            raise_if_only_the_call_was_cancelled("")
            raise
        finally:
            call.cancel()


class AsyncStream:
    """A streamed answer: `async with client.stream(...) as stream: async for delta in stream: ...`.

    One Delta per sequence and message. State: belongs to the task that iterates.
    """

    def __init__(self, start: Callable[[], Any], call: Call) -> None:
        self._start = start
        self._call: Any = None
        self._collector = Collector(call.request_id)

    @property
    def request_id(self) -> str:
        return self._collector.request_id

    async def __aenter__(self) -> Self:
        self._call = self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        if self._call is None:
            raise RuntimeError("a stream is iterated inside its `async with` block")
        try:
            async for message in self._call:
                for delta in self._collector.add(message):
                    yield delta
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.request_id) from None
        except asyncio.CancelledError:
            raise_if_only_the_call_was_cancelled(self.request_id)
            raise

    async def response(self) -> Response:
        """Reads what is left and returns the whole answer."""
        async for _ in self:
            pass
        return self._collector.response()
