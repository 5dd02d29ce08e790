"""A real grpc.aio server on port 0 over AsyncEngine and a fake core, its stubs, and the check after every test."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2_grpc
from octavo.checkpoint import resolve
from octavo.config import Limits, ServerConfig
from octavo.frontend.async_engine import AsyncEngine
from octavo.frontend.cluster import LocalCluster
from octavo.frontend.model import FrontendModel
from octavo.server.grpc_server import GrpcServer
from octavo_proto.v1 import (
    control_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2_grpc,
    types_pb2,
)
from server.fake_core import INFO, FakeCore

CLIENT_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),
]


@functools.cache
def model() -> FrontendModel:
    return FrontendModel.load(resolve("demo"), "demo")


@dataclass
class Outcome:
    """How one RPC ended."""

    code: str
    message: str = ""
    reason: str = ""
    domain: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: dict[str, str] = field(default_factory=dict)
    retry_delay: float | None = None
    resource: str = ""
    trailers: dict[str, Any] = field(default_factory=dict)
    result: Any = None

    @property
    def fields(self) -> list[str]:
        return list(self.violations)


def outcome_of(error: grpc.RpcError) -> Outcome:
    trailers = dict(error.trailing_metadata() or ())
    outcome = Outcome(error.code().name, error.details() or "", trailers=trailers)
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    for detail in status.details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry, resource = error_details_pb2.RetryInfo(), error_details_pb2.ResourceInfo()
        if detail.Unpack(info):
            outcome.reason, outcome.domain, outcome.metadata = info.reason, info.domain, dict(info.metadata)
        elif detail.Unpack(bad):
            outcome.violations = {v.field: v.description for v in bad.field_violations}
        elif detail.Unpack(retry):
            outcome.retry_delay = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif detail.Unpack(resource):
            outcome.resource = resource.resource_name
    return outcome


async def outcome(call: Awaitable[Any], *, cancelled: bool = False, limit: float = 20.0) -> Outcome:
    """Awaits a unary call, or a coroutine over a stream. No status may ever be UNKNOWN, nor CANCELLED by the server."""
    try:
        result = await asyncio.wait_for(call, limit)
        found = Outcome("OK", result=result)
    except grpc.RpcError as error:
        found = outcome_of(error)
    except asyncio.CancelledError:
        found = Outcome("CANCELLED")
    assert found.code != "UNKNOWN", found
    assert cancelled or found.code != "CANCELLED", found
    return found


async def drain(call: Any) -> list[Any]:
    """All messages of a stream."""
    return [message async for message in call]


def prompt(text: str) -> types_pb2.Prompt:
    return types_pb2.Prompt(text=text)


def ids_prompt(ids: list[int]) -> types_pb2.Prompt:
    return types_pb2.Prompt(token_ids=types_pb2.TokenIds(ids=ids))


def request(*texts: str, **params: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        prompts=[prompt(text) for text in texts or ("I met a traveller",)],
        params=types_pb2.GenerationParams(**params),
    )


def stream_request(*texts: str, **params: Any) -> generation_pb2.StreamGenerateRequest:
    return generation_pb2.StreamGenerateRequest(request=request(*texts, **params))


class Client:
    """Stubs over one connection."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self.models = model_pb2_grpc.ModelServiceStub(channel)
        self.control = control_pb2_grpc.ControlServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    def raw(self, method: str, kind: str = "unary_unary") -> Any:
        """A method that takes and gives bytes. `method` is Service/Method, of octavo.v1 unless it has a dot."""
        path = method if method.startswith("/") else f"/octavo.v1.{method}"
        return getattr(self.channel, kind)(path)


@dataclass
class Served:
    """A running server."""

    engine: AsyncEngine
    core: FakeCore
    server: GrpcServer
    address: str
    client: Client

    def connect(self, address: str = "", **options: int) -> Client:
        """Another connection; the caller closes its channel."""
        pairs = [*CLIENT_OPTIONS, *options.items()]
        return Client(grpc.aio.insecure_channel(address or self.address, options=pairs))

    async def after_check(self) -> None:
        """Nothing runs, nothing is held, and an ordinary request works. reliability.md section 5."""
        self.core.release()
        self.core.is_full = False
        await until(lambda: not self.core.running and not self.engine.num_inflight, "a request is left")
        assert self.engine._admission.num_sequences == 0, "places are left"
        if self.engine.state.value == "ready":
            found = await outcome(self.client.generation.Generate(request("after", max_new_tokens=2)))
            assert found.code == "OK"
        await until(lambda: not stray_tasks(), lambda: f"tasks are left: {stray_tasks()}")


def stray_tasks() -> list[str]:
    """Tasks of RPCs and sessions that still live."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith(("HandleExceptions", "octavo session"))]


async def until(condition: Callable[[], bool], message: str | Callable[[], str], limit: float = 2.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, message if isinstance(message, str) else message()
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(
    *,
    up: bool = True,
    limits: Limits | None = None,
    check: bool = True,
    server: dict[str, Any] | None = None,
    **config: Any,
) -> AsyncIterator[Served]:
    """`server`: further arguments of GrpcServer; `config`: fields of ServerConfig."""
    settings = ServerConfig(
        **{"address": "127.0.0.1:0", "limits": limits or Limits(), "frontend_processes": 1, **config}
    )
    core = FakeCore()
    engine = AsyncEngine(model(), core, settings, cache_secret=b"secret")
    grpc_server = GrpcServer(
        engine, settings, cluster=LocalCluster(), frontend=0, instance_id="instance", start_time=1.0, **server or {}
    )
    if up:
        engine.engine_up(INFO, 0)
    address = await grpc_server.start()
    client = Client(grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS))
    served = Served(engine, core, grpc_server, address, client)
    try:
        yield served
        if check:
            await served.after_check()
    finally:
        await client.channel.close()
        await grpc_server.stop(0)
        engine.close()
