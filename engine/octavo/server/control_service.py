"""ControlService: facts, load, aborting, draining. What concerns every front-end goes through the cluster."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

from octavo_proto.v1 import control_pb2 as pb

from octavo import __version__
from octavo.config import ServerConfig
from octavo.errors import Reason, RequestError
from octavo.frontend.async_engine import AsyncEngine, EngineState
from octavo.frontend.cluster import Cluster
from octavo.server import convert, fields, statuses
from octavo.server.rpc import Call

_STATES = {
    EngineState.STARTING: pb.SERVER_STATE_STARTING,
    EngineState.READY: pb.SERVER_STATE_READY,
    EngineState.DRAINING: pb.SERVER_STATE_DRAINING,
    EngineState.RESTARTING: pb.SERVER_STATE_RESTARTING,
}
_MAX_IDS = 1024
_INTERVALS = (0.1, 60.0)
_MAX_TIMEOUT = 86_400.0


class ControlService:
    """The servicer. Its methods are called by `rpc.Pipeline`, `handle_cluster_call` by the cluster."""

    def __init__(
        self,
        engine: AsyncEngine,
        config: ServerConfig,
        *,
        cluster: Cluster,
        instance_id: str,
        start_time: float,
        stop_server: Callable[[], None],
    ) -> None:
        """`stop_server` is called when a drain with `shutdown` is over."""
        self._engine = engine
        self._config = config
        self._cluster = cluster
        self._instance_id = instance_id
        self._start_time = start_time
        self._stop_server = stop_server
        self._is_stopping = False
        self._stopped = asyncio.Event()
        self._undrained = asyncio.Event()
        self._drains: set[asyncio.Task[Any]] = set()
        cluster.handler = self.handle_cluster_call

    def stop(self) -> None:
        """Ends every WatchLoad; a drain can no longer be undone."""
        self._is_stopping = True
        self._stopped.set()

    # --- everybody

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, call: Call) -> pb.GetServerInfoResponse:
        fields.reject_unknown(request)
        limits = self._engine.limits
        response = pb.GetServerInfoResponse(
            version=__version__,
            instance_id=self._instance_id,
            model=self._engine.model.name,
            max_model_len=self._engine.model.max_model_len,
            max_inflight_requests=limits.max_inflight_requests,
            max_waiting_tokens=limits.max_waiting_tokens,
            frontend_processes=self._config.frontend_processes,
            start_time=convert.timestamp(self._start_time),
            engine_restarts=self._engine.restarts,
        )
        if (info := self._engine.info) is not None:
            response.device = info.device
            response.attention_backend = info.attention_backend
            response.kv_cache_dtype = info.kv_cache_dtype
            response.cpu_cores = info.cpu_cores
            response.block_size = info.block_size
            response.total_kv_blocks = info.num_blocks
            response.max_num_requests = info.max_num_requests
            response.max_num_batched_tokens = info.max_num_batched_tokens
            response.engine_start_time.CopyFrom(convert.timestamp(info.start_time))
        return response

    async def GetLoad(self, request: pb.GetLoadRequest, call: Call) -> pb.GetLoadResponse:
        fields.reject_unknown(request)
        return pb.GetLoadResponse(load=self._load())

    async def WatchLoad(self, request: pb.WatchLoadRequest, call: Call) -> None:
        fields.reject_unknown(request)
        interval = _seconds(request, "interval", 1.0, *_INTERVALS)
        while not self._stopped.is_set():
            await call.write(pb.WatchLoadResponse(load=self._load()))
            try:
                await asyncio.wait_for(self._stopped.wait(), interval)
            except TimeoutError:
                continue
        raise RequestError(Reason.DRAINING, "the server stops")

    def _load(self) -> pb.Load:
        return convert.load(self._engine.load, _STATES[self._engine.state], time.time())

    async def AbortRequests(self, request: pb.AbortRequestsRequest, call: Call) -> pb.AbortRequestsResponse:
        fields.reject_unknown(request)
        if request.all and not call.is_admin:
            raise _not_admin()
        if request.all and request.request_ids:
            raise statuses.invalid("request_ids", "excluded by `all`")
        if not request.all and not 1 <= len(request.request_ids) <= _MAX_IDS:
            raise statuses.invalid("request_ids", f"must have 1 to {_MAX_IDS} entries, has {len(request.request_ids)}")
        ids = None if request.all else list(dict.fromkeys(request.request_ids))
        tenant = None if call.is_admin else call.identity.tenant
        payload = json.dumps({"request_ids": ids, "tenant": tenant})
        found: dict[str, int] = {}
        for reply in await self._cluster.call("abort", payload):
            for name, count in json.loads(reply) or ():
                found[name] = found.get(name, 0) + count
        return pb.AbortRequestsResponse(
            aborted_request_ids=list(found),
            not_found_request_ids=[name for name in ids or () if name not in found],
            aborted_requests=sum(found.values()),
        )

    # --- operators

    async def Drain(self, request: pb.DrainRequest, call: Call) -> pb.DrainResponse:
        if not call.is_admin:
            raise _not_admin()
        fields.reject_unknown(request)
        if request.undo:
            if request.shutdown or request.HasField("timeout"):
                raise statuses.invalid("undo", "excludes the other fields")
            await self._undo()
            return pb.DrainResponse()
        timeout = _seconds(request, "timeout", self._config.drain_timeout, 0.0, _MAX_TIMEOUT)
        # The draining goes on when this RPC ends early.
        return await asyncio.shield(self._spawn(self._drain(timeout, request.shutdown)))

    async def ResetPrefixCache(self, request: pb.ResetPrefixCacheRequest, call: Call) -> pb.ResetPrefixCacheResponse:
        if not call.is_admin:
            raise _not_admin()
        fields.reject_unknown(request)
        return pb.ResetPrefixCacheResponse(freed_blocks=await self._engine.reset_prefix_cache())

    async def _undo(self) -> None:
        if self._is_stopping:
            raise RequestError(Reason.STOPPING, "the server is stopping")
        replies = await self._cluster.call("undrain", "{}")
        if not all(json.loads(reply) for reply in replies):
            raise RequestError(Reason.STOPPING, "the server is stopping")

    async def _drain(self, timeout: float, shutdown: bool) -> pb.DrainResponse:
        payload = json.dumps({"timeout": timeout, "shutdown": shutdown})
        replies = [json.loads(reply) or {} for reply in await self._cluster.call("drain", payload)]
        if shutdown:
            self._stop_server()
        return pb.DrainResponse(
            finished_requests=sum(reply.get("finished", 0) for reply in replies),
            aborted_requests=sum(reply.get("aborted", 0) for reply in replies),
        )

    def _spawn(self, work: Coroutine[Any, Any, pb.DrainResponse]) -> asyncio.Task[pb.DrainResponse]:
        task = asyncio.create_task(work)
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)
        return task

    # --- this front-end's part

    async def handle_cluster_call(self, method: str, payload: str) -> str:
        """Runs a method of `frontend.cluster` here, whoever called it."""
        arguments = json.loads(payload or "{}")
        match method:
            case "abort":
                result: Any = await self._engine.abort_requests(arguments["request_ids"], arguments["tenant"])
            case "drain":
                result = await self._drain_here(arguments["timeout"], arguments["shutdown"])
            case "undrain":
                result = self._undrain_here()
            case "inflight":
                result = self._engine.num_inflight
            case _:
                raise ValueError(f"no such cluster method: {method}")
        return json.dumps(result)

    async def _drain_here(self, timeout: float, shutdown: bool) -> dict[str, int]:
        engine = self._engine
        self._is_stopping = self._is_stopping or shutdown
        self._undrained.clear()
        engine.start_draining()
        before = engine.num_inflight
        idle = asyncio.create_task(engine.wait_idle(timeout))
        undone = asyncio.create_task(self._undrained.wait())
        try:
            await asyncio.wait({idle, undone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            idle.cancel()
            undone.cancel()
        left = engine.num_inflight
        if self._undrained.is_set():
            return {"finished": max(0, before - left), "aborted": 0}
        engine.fail_all(RequestError(Reason.DRAINING, "the server is draining"))
        return {"finished": before - left, "aborted": left}

    def _undrain_here(self) -> bool:
        if self._is_stopping:
            return False
        self._undrained.set()
        self._engine.stop_draining()
        return True


def _seconds(message: Any, name: str, default: float, low: float, high: float) -> float:
    """Of an optional Duration field."""
    if not message.HasField(name):
        return default
    try:
        value = fields.seconds(getattr(message, name))
    except ValueError:
        raise statuses.invalid(name, "not a valid Duration") from None
    if not low <= value <= high:
        raise statuses.invalid(name, f"must be {low:g} s to {high:g} s, is {value:g} s")
    return value


def _not_admin() -> RequestError:
    return RequestError(Reason.NOT_ADMIN, "this is for operators, on the admin address")
