"""The synchronous client. Thread-safe: many threads may use one client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
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
from octavo.client.errors import Cancelled, DeadlineExceeded, Failure, error_from_rpc
from octavo.client.params import Call, Prompts, build
from octavo.client.results import Collector, Delta, Response, shaped


class Client:
    """A connection to one or several octavo servers.

    `addresses`: "host:port", "dns:///host:port", "unix:PATH", or several host:port, among which calls are spread.
    `api_key` is sent with every call. `retry=False` switches gRPC's retries off.
    """

    def __init__(
        self, *addresses: str, tls: bool | TLS = False, api_key: str | None = None, retry: bool = True
    ) -> None:
        self._endpoint = Endpoint.of(addresses, tls, api_key, retry)
        self._data = self._endpoint.open(grpc, health_check=True)
        self._control = self._endpoint.open(grpc, health_check=False)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._data)  # type: ignore[no-untyped-call]
        self._model = model_pb2_grpc.ModelServiceStub(self._control)  # type: ignore[no-untyped-call]
        self._operator = control_pb2_grpc.ControlServiceStub(self._control)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all calls and connections."""
        self._data.close()
        self._control.close()

    def generate(self, prompts: Prompts = None, **keywords: Any) -> Any:
        """Completes a prompt (str or token ids) or a list of prompts, with the keywords of transformers' `generate()`.

        Returns an Output for one prompt and a list for a list of prompts; where a prompt has several sequences, a
        list of Outputs stands in place of the Output: `outs[i][j]`. Raises TypeError or ValueError before anything
        is sent, and OctavoError. `timeout`: seconds, 300 by default.
        """
        call = build(prompts, keywords)
        return shaped(self._generate(call), call.single)

    def generate_all(self, prompts: Prompts = None, **keywords: Any) -> Response:
        """Like `generate`, but returns all that the server said: outputs[i][j], prompts, usage, timing."""
        return self._generate(build(prompts, keywords))

    def stream(self, prompts: Prompts = None, **keywords: Any) -> Stream:
        """Like `generate`, as a context manager over which one iterates for Deltas. Leaving the block cancels."""
        call = build(prompts, keywords)
        request = generation_pb2.StreamGenerateRequest(request=call.message)
        return Stream(lambda: self._start(self._generation.StreamGenerate, request, call.timeout), call)

    def tokenize(self, texts: str | Sequence[str], *, timeout: float | None = None, **options: Any) -> Any:
        """Token ids of a text (list[int]) or of several, exactly as generate() would make them."""
        request = wire.tokenize_request(texts, options)
        return wire.tokenize_result(texts, self._unary(self._model.Tokenize, request, timeout))

    def detokenize(
        self, token_ids: Iterable[Any], *, skip_special_tokens: bool = False, timeout: float | None = None
    ) -> Any:
        """The text of a list of token ids, or a list of texts for a list of lists."""
        request, single = wire.detokenize_request(token_ids, skip_special_tokens)
        texts = list(self._unary(self._model.Detokenize, request, timeout).texts)
        return texts[0] if single else texts

    def model(self, *, timeout: float | None = None) -> model_pb2.GetModelResponse:
        """Facts, defaults and limits of the served model, and the fields that requests may use."""
        answer: model_pb2.GetModelResponse = self._unary(self._model.GetModel, model_pb2.GetModelRequest(), timeout)
        return answer

    def info(self, *, timeout: float | None = None) -> control_pb2.GetServerInfoResponse:
        """Version, device and capacity of the server."""
        request = control_pb2.GetServerInfoRequest()
        answer: control_pb2.GetServerInfoResponse = self._unary(self._operator.GetServerInfo, request, timeout)
        return answer

    def load(self, *, timeout: float | None = None) -> control_pb2.Load:
        """One snapshot of the scheduler."""
        answer: control_pb2.GetLoadResponse = self._unary(self._operator.GetLoad, control_pb2.GetLoadRequest(), timeout)
        return answer.load

    def watch_load(self, interval: float = 1.0, *, timeout: float | None = None) -> Iterator[control_pb2.Load]:
        """Snapshots every `interval` seconds, until the iterator is closed or `timeout` has passed."""
        request = control_pb2.WatchLoadRequest(interval=wire.duration(interval))
        for response in self._iterate(self._operator.WatchLoad, request, timeout):
            yield response.load

    def abort(
        self, *request_ids: str, all_requests: bool = False, timeout: float | None = None
    ) -> control_pb2.AbortRequestsResponse:
        """Ends requests by id; `all_requests` works on the admin address only."""
        request = wire.abort_request(request_ids, all_requests)
        answer: control_pb2.AbortRequestsResponse = self._unary(self._operator.AbortRequests, request, timeout)
        return answer

    def drain(
        self, timeout: float | None = None, *, shutdown: bool = False, undo: bool = False
    ) -> control_pb2.DrainResponse:
        """Stops taking requests and waits for the running ones, at most `timeout` seconds. Admin address only."""
        request = wire.drain_request(timeout, shutdown, undo)
        answer: control_pb2.DrainResponse = self._unary(self._operator.Drain, request, wire.drain_deadline(timeout))
        return answer

    def reset_prefix_cache(self, *, timeout: float | None = None) -> int:
        """Forgets all cached prefixes; returns the number of KV blocks that became free. Admin address only."""
        request = control_pb2.ResetPrefixCacheRequest()
        answer: control_pb2.ResetPrefixCacheResponse = self._unary(self._operator.ResetPrefixCache, request, timeout)
        return answer.freed_blocks

    def health(self, service: str = GENERATION_SERVICE, *, timeout: float | None = None) -> str:
        """ "SERVING", "NOT_SERVING" or "UNKNOWN": readiness of a service, or with "" liveness of the process."""
        return str(self._unary(wire.HealthCall(service).check(self._control), None, timeout))

    def watch_health(self, service: str = GENERATION_SERVICE, *, timeout: float | None = None) -> Iterator[str]:
        """The status now and at every change, until the iterator is closed or `timeout` has passed."""
        yield from self._iterate(wire.HealthCall(service).watch(self._control), None, timeout)

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Returns when a server would take a request. Raises DeadlineExceeded after `timeout` seconds."""
        ready = grpc.channel_ready_future(self._data)
        try:
            ready.result(timeout=deadline(timeout))
        except grpc.FutureTimeoutError:
            raise DeadlineExceeded(Failure("DEADLINE_EXCEEDED", f"no server was ready within {timeout:g} s")) from None
        finally:
            ready.cancel()

    def _generate(self, call: Call) -> Response:
        collector = Collector(call.request_id)
        collector.add(self._unary(self._generation.Generate, call.message, call.timeout, call.request_id))
        return collector.response()

    def _unary(self, method: Any, request: Any, timeout: float | None, request_id: str = "") -> Any:
        """One call that is cancelled when its thread is interrupted."""
        future = method.future(request, timeout=deadline(timeout), metadata=self._endpoint.metadata)
        try:
            return future.result()
        except grpc.RpcError as error:
            raise error_from_rpc(error, request_id) from None
        except grpc.FutureCancelledError:
            raise Cancelled(Failure("CANCELLED", "the call was cancelled", request_id=request_id)) from None
        finally:
            future.cancel()

    def _start(self, method: Any, request: Any, timeout: float | None) -> Any:
        return method(request, timeout=deadline(timeout), metadata=self._endpoint.metadata)

    def _iterate(self, method: Any, request: Any, timeout: float | None) -> Iterator[Any]:
        call = self._start(method, request, timeout)
        try:
            yield from call
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        finally:
            call.cancel()


class Stream:
    """A streamed answer: `with client.stream(...) as stream: for delta in stream: ...`.

    One Delta per sequence and message. State: belongs to the thread that iterates.
    """

    def __init__(self, start: Callable[[], Any], call: Call) -> None:
        self._start = start
        self._call: Any = None
        self._collector = Collector(call.request_id)

    @property
    def request_id(self) -> str:
        return self._collector.request_id

    def __enter__(self) -> Self:
        self._call = self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()

    def __iter__(self) -> Iterator[Delta]:
        if self._call is None:
            raise RuntimeError("a stream is iterated inside its `with` block")
        try:
            for message in self._call:
                yield from self._collector.add(message)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.request_id) from None

    def response(self) -> Response:
        """Reads what is left and returns the whole answer."""
        for _ in self:
            pass
        return self._collector.response()
