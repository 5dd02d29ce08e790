"""A server of the wire contract without an engine: it answers with the words of the prompt, backwards.

It runs in a thread with its own event loop, so that the synchronous client can be tested against it, too. Prompts that
begin with "forever" never end: how they were left is seen in `cancelled`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from octavo_proto.v1 import (
    control_pb2,
    control_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    types_pb2,
)

SERVICE = "octavo.v1.GenerationService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Refusal:
    """What the next call shall fail with."""

    def __init__(self, code: grpc.StatusCode, message: str, *details: Any, pushback_ms: int | None = None) -> None:
        self.code, self.message = code, message
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        self.trailers = [("grpc-status-details-bin", status.SerializeToString())]
        if pushback_ms is not None:
            self.trailers.append(("grpc-retry-pushback-ms", str(pushback_ms)))


def reason(name: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=name, domain="octavo", metadata=metadata)


def retry_in(seconds: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromNanoseconds(round(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def words(request: generation_pb2.GenerateRequest, index: int) -> list[str]:
    """The tokens of the answer to a prompt: its words in reverse order, at most max_new_tokens."""
    prompt = request.prompts[index]
    source = prompt.text.split() if prompt.WhichOneof("prompt") == "text" else [str(i) for i in prompt.token_ids.ids]
    limit = request.params.max_new_tokens if request.params.HasField("max_new_tokens") else 20
    return [f" {word}" for word in reversed(source)][:limit]


def completions(request: generation_pb2.GenerateRequest) -> list[generation_pb2.Completion]:
    result = []
    for index in range(len(request.prompts)):
        tokens = words(request, index)
        for output in range(max(1, request.params.num_return_sequences)):
            result.append(
                generation_pb2.Completion(
                    prompt_index=index,
                    output_index=output,
                    text="".join(tokens),
                    token_ids=list(range(len(tokens))),
                    logprobs=logprobs(request, len(tokens)),
                    finish=types_pb2.FinishInfo(
                        reason=types_pb2.FINISH_REASON_STOP_STRING, stop_string="!", completion_tokens=len(tokens)
                    ),
                )
            )
    return result


def logprobs(request: generation_pb2.GenerateRequest, rows: int) -> types_pb2.Logprobs | None:
    if not request.output.HasField("logprobs"):
        return None
    top = request.output.logprobs
    return types_pb2.Logprobs(
        chosen=[-1.0] * rows,
        ranks=[1] * rows,
        num_top=top,
        top_token_ids=list(range(top)) * rows,
        top_values=[-1.0] * top * rows,
    )


def prompt_infos(request: generation_pb2.GenerateRequest) -> list[types_pb2.PromptInfo]:
    count = range(len(request.prompts))
    return [types_pb2.PromptInfo(prompt_index=i, prompt_tokens=len(words(request, i)), seed=7) for i in count]


class FakeServer(
    generation_pb2_grpc.GenerationServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    control_pb2_grpc.ControlServiceServicer,
):
    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.deadlines: list[float] = []
        self.refusals: list[Refusal] = []
        self.cancelled = threading.Event()
        self.session_cancels: list[int] = []
        self.sessions = 0
        self.break_session = False
        self.health = health.aio.HealthServicer()
        self.address = ""

    async def _arrived(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.deadlines.append(context.time_remaining())
        if self.refusals:
            refusal = self.refusals.pop(0)
            await context.abort(refusal.code, refusal.message, trailing_metadata=tuple(refusal.trailers))

    async def _forever(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def Generate(self, request: Any, context: Any) -> Any:
        await self._arrived(request, context)
        if request.prompts[0].text.startswith("forever"):
            await self._forever()
        return generation_pb2.GenerateResponse(
            request_id=request.request_id,
            model="fake",
            completions=completions(request),
            prompts=prompt_infos(request),
            usage=types_pb2.Usage(prompt_tokens=3, completion_tokens=4),
            timing=types_pb2.Timing(total=Duration(nanos=500_000_000)),
        )

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._arrived(request.request, context)
        try:
            async for message in self._messages(request.request):
                yield message
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def _messages(self, request: Any) -> AsyncIterator[Any]:
        yield generation_pb2.StreamGenerateResponse(
            request_id=request.request_id, model="fake", prompts=prompt_infos(request)
        )
        whole = completions(request)
        for step in range(max(len(item.token_ids) for item in whole)):
            deltas = [self._delta(request, item, step) for item in whole if step < len(item.token_ids)]
            yield generation_pb2.StreamGenerateResponse(deltas=deltas)
            if request.prompts[0].text.startswith("fail late"):
                raise RuntimeError("after the first token")
        if request.prompts[0].text.startswith("forever"):
            await self._forever()
        yield generation_pb2.StreamGenerateResponse(usage=types_pb2.Usage(prompt_tokens=3, completion_tokens=4))

    def _delta(self, request: Any, item: Any, step: int) -> generation_pb2.OutputDelta:
        last = step == len(item.token_ids) - 1 and not request.prompts[0].text.startswith("forever")
        return generation_pb2.OutputDelta(
            prompt_index=item.prompt_index,
            output_index=item.output_index,
            text=words(request, item.prompt_index)[step],
            token_ids=[step],
            logprobs=logprobs(request, 1),
            finish=item.finish if last else None,
        )

    async def GenerateSession(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        self.sessions += 1
        outgoing: asyncio.Queue[Any] = asyncio.Queue()
        running: dict[int, asyncio.Task[None]] = {}

        async def answer(submit: Any) -> None:
            async for message in self._messages(submit.request):
                await outgoing.put(
                    generation_pb2.GenerateSessionResponse.Event(tag=submit.tag, response=message),
                )

        async def read() -> None:
            async for message in requests:
                if message.WhichOneof("op") == "cancel":
                    self.session_cancels.append(message.cancel.tag)
                    running[message.cancel.tag].cancel()
                elif message.submit.request.prompts[0].text == "refuse":
                    error = generation_pb2.RequestError(
                        code=8, message="full", reason="QUEUE_FULL", retry_delay=Duration(seconds=2)
                    )
                    await outgoing.put(
                        generation_pb2.GenerateSessionResponse.Event(tag=message.submit.tag, error=error)
                    )
                else:
                    self.requests.append(message.submit.request)
                    running[message.submit.tag] = asyncio.create_task(answer(message.submit))
            await asyncio.gather(*running.values(), return_exceptions=True)
            await outgoing.put(None)

        reader = asyncio.create_task(read())
        try:
            while (event := await outgoing.get()) is not None:
                if self.break_session:
                    self.break_session = False
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
                yield generation_pb2.GenerateSessionResponse(events=[event])
        finally:
            reader.cancel()
            for task in running.values():
                task.cancel()

    async def Tokenize(self, request: Any, context: Any) -> Any:
        await self._arrived(request, context)
        return model_pb2.TokenizeResponse(
            results=[types_pb2.TokenIds(ids=[len(word) for word in text.split()]) for text in request.texts]
        )

    async def Detokenize(self, request: Any, context: Any) -> Any:
        await self._arrived(request, context)
        return model_pb2.DetokenizeResponse(texts=[" ".join(map(str, entry.ids)) for entry in request.token_ids])

    async def GetModel(self, request: Any, context: Any) -> Any:
        return model_pb2.GetModelResponse(model="fake", n_positions=1024, vocab_size=100)

    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        return control_pb2.GetServerInfoResponse(version="0.0", model="fake", device="cpu", total_kv_blocks=64)

    async def GetLoad(self, request: Any, context: Any) -> Any:
        load = control_pb2.Load(state=control_pb2.SERVER_STATE_READY, running_requests=3)
        return control_pb2.GetLoadResponse(load=load)

    async def WatchLoad(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        for count in range(2):
            yield control_pb2.WatchLoadResponse(load=control_pb2.Load(running_requests=count))

    async def AbortRequests(self, request: Any, context: Any) -> Any:
        await self._arrived(request, context)
        return control_pb2.AbortRequestsResponse(
            aborted_request_ids=request.request_ids[:1],
            not_found_request_ids=request.request_ids[1:],
            aborted_requests=1,
        )

    async def Drain(self, request: Any, context: Any) -> Any:
        await self._arrived(request, context)
        return control_pb2.DrainResponse(finished_requests=5)

    async def ResetPrefixCache(self, request: Any, context: Any) -> Any:
        await self._arrived(request, context)
        return control_pb2.ResetPrefixCacheResponse(freed_blocks=9)

    def set_serving(self, serving: bool) -> None:
        """Changes readiness; may be called from any thread."""
        status = SERVING if serving else NOT_SERVING
        asyncio.run_coroutine_threadsafe(self.health.set(SERVICE, status), self.loop).result(5)

    async def serve(self, started: threading.Event, stop: asyncio.Event, addresses: list[str], tls: Any) -> None:
        self.loop = asyncio.get_running_loop()
        app = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, app)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, app)
        control_pb2_grpc.add_ControlServiceServicer_to_server(self, app)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, app)
        await self.health.set("", SERVING)
        await self.health.set(SERVICE, SERVING)
        ports = [app.add_secure_port(address, tls) if tls else app.add_insecure_port(address) for address in addresses]
        self.address = f"127.0.0.1:{ports[0]}"
        await app.start()
        started.set()
        await stop.wait()
        await app.stop(0)


@contextlib.contextmanager
def running(*addresses: str, tls: Any = None) -> Iterator[FakeServer]:
    """A FakeServer on 127.0.0.1 and a free port, or on the given addresses. `tls`: grpc.ServerCredentials."""
    server, started, stops = FakeServer(), threading.Event(), []

    def main() -> None:
        async def run() -> None:
            stops.append(asyncio.Event())
            await server.serve(started, stops[0], list(addresses) or ["127.0.0.1:0"], tls)

        asyncio.run(run())

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        server.loop.call_soon_threadsafe(stops[0].set)
        thread.join(10)
        assert not thread.is_alive()
