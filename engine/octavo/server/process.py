"""A front-end process: `python -m octavo.server.process --fd N`, started by the supervisor.

One event loop. It listens before an engine core is up (requests then fail with ENGINE_STARTING), outlives the cores,
and ends in a drain: health says NOT_SERVING, after `drain_delay` new requests are refused, running ones finish or are
failed one second before `drain_timeout`, then the listener closes. The end of the control channel ends it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import itertools
import logging
import os
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NoReturn

import uvloop

from octavo import __version__, log
from octavo.errors import Reason, StartupError
from octavo.frontend.async_engine import AsyncEngine, EngineState
from octavo.frontend.client import ZmqClient
from octavo.frontend.cluster import ClusterHandler
from octavo.frontend.failures import failure
from octavo.frontend.model import FrontendModel
from octavo.ipc import (
    ClusterCall,
    ClusterReply,
    EngineDown,
    EngineUp,
    FrontendCall,
    FrontendReady,
    FrontendReply,
    Heartbeat,
    Shutdown,
    StartFailed,
    StartFrontend,
    StopServer,
    ToChild,
)
from octavo.ipc_channel import AsyncChannel, ProtocolError, die_with_parent, socket_of_child
from octavo.metrics import Metrics
from octavo.run_directory import split_address
from octavo.server.grpc_server import GrpcServer
from octavo.server.metrics_http import MetricsServer

METRICS = "metrics"
"""The call that returns a front-end's `Metrics.snapshot`; answered here, the others by the server's handler."""

logger = logging.getLogger("octavo.server.process")


class FrontendProcess:
    """Puts the parts of a front-end together and does what the supervisor says."""

    def __init__(self, channel: AsyncChannel[ToChild], start: StartFrontend) -> None:
        """Raises StartupError when the checkpoint's configuration or tokenizer cannot be used."""
        self._channel = channel
        self._config = start.config
        self._index = start.frontend % start.config.frontend_processes
        model = FrontendModel.load(Path(start.model_path), start.model_name, start.max_model_len)
        self._client = ZmqClient(start.frontend, start.address)
        self._engine = AsyncEngine(
            model,
            self._client,
            start.config,
            frontend=start.frontend,
            cache_secret=bytes.fromhex(start.cache_secret),
        )
        self._metrics = Metrics(__version__)
        self._engine.on_load(self._metrics.load)
        self._engine.on_state_change(lambda state: self._metrics.draining(state is EngineState.DRAINING))
        self._cluster = SupervisorCluster(channel)
        self._server = GrpcServer(
            self._engine,
            start.config,
            cluster=self._cluster,
            frontend=self._index,
            instance_id=start.instance_id,
            start_time=start.start_time,
            metrics=self._metrics,
            stop_server=self._ask_to_stop,
        )
        self._metrics_server = MetricsServer(self._render_metrics, lambda: self._engine.state.value)
        self._over: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """The exit status, once known."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Listens, and obeys until told to end. Returns the exit status."""
        address = await self._server.start()
        if self._config.metrics_address and self._index == 0:
            await self._serve_metrics()
        self._channel.send(FrontendReady(address))
        self._spawn(self._beat())
        self._spawn(self._read_control())
        status = await self._over
        self._metrics_server.stop()
        self._client.close()
        return status

    async def _serve_metrics(self) -> None:
        try:
            await self._metrics_server.start(*split_address(self._config.metrics_address))
        except OSError as error:
            text = f"{self._config.metrics_address}: {os.strerror(error.errno or 0)}"
            raise StartupError(StartupError.USAGE, text) from None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("the front-end failed", exc_info=error)
            self._finish(1)

    def _finish(self, status: int) -> None:
        if not self._over.done():
            self._over.set_result(status)

    def _ask_to_stop(self) -> None:
        self._channel.send(StopServer())

    async def _beat(self) -> None:
        for beat in itertools.count():
            self._channel.send(Heartbeat(steps=beat, busy=True, inflight=self._engine.num_inflight))
            await asyncio.sleep(1.0)

    # --- the supervisor's messages

    async def _read_control(self) -> None:
        try:
            while (message := await self._channel.receive()) is not None:
                self._obey(message)
        except ProtocolError as error:
            logger.error("control channel: %s", error)
        self._finish(1)

    def _obey(self, message: ToChild) -> None:
        match message:
            case EngineUp(address, info, restarts):
                self._client.connect(address)
                self._metrics.engine_up(info, restarts)
                self._engine.engine_up(info, restarts)
            case EngineDown():
                self._client.disconnect()
                self._metrics.engine_down()
                self._engine.engine_down()
            case FrontendCall(call_id, method, payload):
                self._spawn(self._answer(call_id, method, payload))
            case ClusterReply(call_id, payloads):
                self._cluster.replied(call_id, payloads)
            case Shutdown():
                self._spawn(self._drain())

    async def _answer(self, call_id: int, method: str, payload: str) -> None:
        if method == METRICS:
            self._channel.send(FrontendReply(call_id, self._metrics.snapshot()))
            return
        assert self._cluster.handler is not None
        try:
            reply = await self._cluster.handler(method, payload)
        except Exception:
            logger.exception("the call %s failed", method)
            reply = "null"
        self._channel.send(FrontendReply(call_id, reply))

    async def _render_metrics(self) -> bytes:
        if self._config.frontend_processes == 1:
            return self._metrics.render()
        _, *others = await self._cluster.call(METRICS, "")
        return self._metrics.render(others)

    # --- the end

    async def _drain(self) -> None:
        started = time.monotonic()
        self._server.stop_advertising()
        await asyncio.sleep(self._config.drain_delay)
        self._engine.start_draining()
        left = started + self._config.drain_delay + self._config.drain_timeout - 1.0 - time.monotonic()
        if not await self._engine.wait_idle(max(0.0, left)):
            logger.warning("drain timeout: failing %d requests", self._engine.num_inflight)
            self._engine.fail_all(failure(Reason.DRAINING))
            await self._engine.wait_idle(0.5)
        # What has been generated is still on its way to slow readers.
        left = started + self._config.drain_delay + self._config.drain_timeout - 0.5 - time.monotonic()
        await self._server.stop(max(0.5, left))
        self._finish(0)


class SupervisorCluster:
    """The front-ends of a server, reached through the supervisor. The `Cluster` of the server's front-end processes."""

    def __init__(self, channel: AsyncChannel[ToChild]) -> None:
        self.handler: ClusterHandler | None = None
        self._channel = channel
        self._waiting: dict[int, asyncio.Future[list[str]]] = {}
        self._ids = itertools.count()

    async def call(self, method: str, payload: str) -> list[str]:
        call_id = next(self._ids)
        future: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = future
        try:
            self._channel.send(ClusterCall(call_id, method, payload))
            return await future
        finally:
            del self._waiting[call_id]

    def replied(self, call_id: int, payloads: list[str]) -> None:
        future = self._waiting.get(call_id)
        if future is not None and not future.done():
            future.set_result(payloads)


async def _run(fd: int) -> int:
    channel: AsyncChannel[ToChild] = await AsyncChannel.open(socket_of_child(fd), ToChild)
    start = await channel.receive()
    if not isinstance(start, StartFrontend):
        return 1
    if start.cpu_cores:
        os.sched_setaffinity(0, start.cpu_cores)
    try:
        # Ends here and not through the runner, which would cancel the calls still running: their clients, who cancelled
        # nothing, would see CANCELLED instead of a closed connection.
        _exit_now(await FrontendProcess(channel, start).run())
    except StartupError as error:
        channel.send(StartFailed(error.exit_code, str(error)))
        await channel.flush()
        return error.exit_code


def main() -> None:
    parser = argparse.ArgumentParser(prog="octavo.server.process")
    parser.add_argument("--fd", type=int, required=True, help="the control channel")
    arguments = parser.parse_args()
    die_with_parent()
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides, also when the whole group is signalled
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    log.configure("frontend")
    try:
        status = uvloop.run(_run(arguments.fd))
    except BaseException:
        logger.critical("the front-end failed", exc_info=True)
        status = 1
    _exit_now(status)


def _exit_now(status: int) -> NoReturn:
    log.flush()
    os._exit(status)  # gRPC's threads may still have something to do; nobody waits for it


if __name__ == "__main__":
    main()
