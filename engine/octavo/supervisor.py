"""`octavo serve`: starts one engine core and N front-ends, replaces what dies or hangs, and turns signals into a drain.

It holds no request and imports no torch. A child's death is the end of its control channel, so it is seen at once:

    core dies         every front-end hears EngineDown and fails its requests; a new core starts
    front-end dies    the core hears FrontendDown and frees its requests; a new front-end starts
    child hangs       no progress for `watchdog` seconds: its stacks go to stderr, then it is killed
    SIGTERM, SIGINT   drain: front-ends finish what they have and exit, then the core; a second signal ends all at once
    too many deaths   exit status 1
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from octavo import __version__, cpu_cores, log
from octavo.checkpoint import DEMO, read_spec, resolve
from octavo.child import Child, RestartPolicy, describe, limit_resources
from octavo.config import EngineConfig, ServerConfig, check, cores_of
from octavo.errors import StartupError
from octavo.frontend_slots import ClusterCalls, FrontendSlot, choose_number
from octavo.ipc import (
    ClusterCall,
    CoreReady,
    EngineDown,
    EngineUp,
    FromChild,
    FrontendDown,
    FrontendReady,
    FrontendReply,
    FrontendStalled,
    FrontendUp,
    Heartbeat,
    Progress,
    Shutdown,
    StartCore,
    StartFailed,
    StartFrontend,
    StopServer,
)
from octavo.ipc_channel import ProtocolError
from octavo.run_directory import Port, RunDirectory, is_loopback
from octavo.types import EngineInfo

CRASH_LOOP = 1
"""Exit status after too many deaths."""
TICK = 0.5
"""Seconds between two looks at the children's progress."""

logger = logging.getLogger(__name__)


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Runs the server until a signal or a failure ends it. Returns the exit status of the command line."""
    log.configure("supervisor")
    try:
        with contextlib.ExitStack() as stack:
            engine, server = _checked(engine, server)
            port = Port(server.address, shared=server.frontend_processes > 1)
            stack.callback(port.close)
            if server.metrics_address:
                Port(server.metrics_address, shared=False).close()
            run_directory = RunDirectory(server.run_directory)
            stack.callback(run_directory.close)
            server = msgspec.structs.replace(
                server,
                address=port.address,
                run_directory=str(run_directory.path),
                admin_address=server.admin_address or f"unix:{run_directory.path}/admin.sock",
            )
            limit_resources()
            _introduce(engine, server)
            return asyncio.run(_supervise(engine, server, run_directory))
    except StartupError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 0
    finally:
        log.unconfigure()


class Supervisor:
    """Owns the children. Made on its event loop; no threads."""

    def __init__(self, engine: EngineConfig, server: ServerConfig, run_directory: RunDirectory) -> None:
        self._engine = engine
        self._server = server
        self._run_directory = run_directory
        self._instance_id = secrets.token_hex(8)
        self._cache_secret = secrets.token_hex(32)
        self._start_time = time.time()
        self._core: Child | None = None
        self._core_info: EngineInfo | None = None
        """Set while the core is warm."""
        bound = cores_of(engine.model)
        self._frontend_cores = cpu_cores.others(bound) if bound else []
        """That front-ends keep to; empty: any."""
        self._core_starts = 0
        self._core_restarts = RestartPolicy()
        self._slots = [FrontendSlot(index) for index in range(server.frontend_processes)]
        self._calls = ClusterCalls(self._slots)
        self._was_ready = False
        self._stopping = False
        self._outcome: asyncio.Future[int] = asyncio.Future()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Returns the exit status; no child is left."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            self._spawn(self._keep_core())
            for slot in self._slots:
                self._spawn(self._keep_frontend(slot))
            self._spawn(self._watch())
            return await self._outcome
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for child in self._children():
                child.kill()
                await child.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("the supervisor failed", exc_info=error)
            self._finish(1)

    def _finish(self, status: int) -> None:
        if not self._outcome.done():
            self._outcome.set_result(status)

    def _children(self) -> list[Child]:
        children = [self._core, *(slot.child for slot in self._slots)]
        return [child for child in children if child is not None]

    # --- the engine core

    async def _keep_core(self) -> None:
        while not self._stopping:
            self._core = child = await Child.start("engine core", "octavo.engine_core.process")
            name = f"core-{self._core_starts}"
            address = self._run_directory.address(name)
            child.send(StartCore(self._engine, address))
            self._core_starts += 1
            status = await self._attend(child, self._from_core)
            self._core = None
            self._engine_down()
            self._run_directory.forget(name)
            if self._stopping or not await self._mourn(child, status, self._core_restarts):
                return

    def _from_core(self, message: FromChild) -> None:
        assert self._core is not None
        match message:
            case CoreReady(info):
                self._core.saw_ready()
                self._core_info = info
                for slot in self._slots:
                    self._connect(slot)
                self._announce()
            case FrontendStalled(frontend):
                for slot in self._slots:
                    if slot.number == frontend and slot.child is not None:
                        slot.child.kill()

    def _connect(self, slot: FrontendSlot) -> None:
        """Tells a core and a front-end of each other when both are ready. The core must hear first."""
        if self._core is None or self._core_info is None or slot.ready is None:
            return
        self._core.send(FrontendUp(slot.number, self._run_directory.address(slot.name)))
        address = self._run_directory.address(f"core-{self._core_starts - 1}")
        slot.ready.send(EngineUp(address, self._core_info, self._core_starts - 1))

    def _engine_down(self) -> None:
        if self._core_info is not None:
            self._core_info = None
            for slot in self._slots:
                if slot.ready is not None:
                    slot.ready.send(EngineDown())

    # --- the front-ends

    async def _keep_frontend(self, slot: FrontendSlot) -> None:
        while not self._stopping:
            slot.number = slot.index + len(self._slots) * slot.replaced
            slot.child = child = await Child.start(f"front-end {slot.index}", "octavo.server.process")
            child.send(self._start_frontend(slot))
            status = await self._attend(child, functools.partial(self._from_frontend, slot))
            slot.child = None
            slot.replaced += 1
            if self._core is not None:
                self._core.send(FrontendDown(slot.number))
            self._calls.lost(slot.number)
            self._run_directory.forget(slot.name)
            if self._stopping or not await self._mourn(child, status, slot.restarts):
                return

    def _start_frontend(self, slot: FrontendSlot) -> StartFrontend:
        return StartFrontend(
            frontend=slot.number,
            config=self._server,
            model_path=self._engine.model.path,
            model_name=self._engine.model.name,
            address=self._run_directory.address(slot.name),
            instance_id=self._instance_id,
            cache_secret=self._cache_secret,
            max_model_len=self._engine.scheduler.max_model_len,
            start_time=self._start_time,
            cpu_cores=self._frontend_cores,
        )

    def _from_frontend(self, slot: FrontendSlot, message: FromChild) -> None:
        assert slot.child is not None
        match message:
            case FrontendReady(address):
                slot.child.saw_ready()
                self._server = msgspec.structs.replace(self._server, address=address)
                self._calls.repeat_drain(slot)
                self._connect(slot)
                self._announce()
            case ClusterCall():
                self._calls.start(slot.number, message)
            case FrontendReply(call_id, payload):
                self._calls.reply(slot.number, call_id, payload)
            case StopServer():
                self._stop("asked to by an operator")

    # --- both

    async def _attend(self, child: Child, handle: Callable[[FromChild], None]) -> int:
        """Reads a child's messages until it is gone. Returns its exit status."""
        try:
            while (message := await child.receive()) is not None:
                if isinstance(message, Heartbeat):
                    child.saw(message)
                elif isinstance(message, Progress):
                    if not self._was_ready:
                        say(message.text)
                elif isinstance(message, StartFailed):
                    self._refuse(child, message)
                else:
                    handle(message)
        except ProtocolError as error:
            logger.error("%s: %s", child.name, error)
        if not self._stopping:
            child.kill()  # if it lives, it has closed its channel: nothing good can come
        status = await child.wait()
        child.close()
        return status

    async def _mourn(self, child: Child, status: int, restarts: RestartPolicy) -> bool:
        """Waits before a restart. False: too many deaths, the server ends."""
        delay = restarts.after_death()
        if delay is None:
            logger.critical("%s died (%s) too often: giving up", child.name, describe(status))
            self._finish(CRASH_LOOP)
            return False
        logger.error("%s died (%s): restarting it in %.1f s", child.name, describe(status), delay)
        await asyncio.sleep(delay)
        return True

    def _refuse(self, child: Child, message: StartFailed) -> None:
        if self._was_ready:  # what worked once may work again, such as memory that the last one has not given back yet
            logger.error("%s cannot start: %s", child.name, message.message)
        elif not self._stopping:
            self._stopping = True
            _complain(message.message)
            self._finish(message.exit_code)

    def _announce(self) -> None:
        """Says once that the server is up; a log line after each replacement."""
        info = self._core_info
        if info is None or any(slot.ready is None for slot in self._slots) or self._stopping:
            return
        text = (
            f"ready on {self._server.address}: {info.model}, {info.dtype}, {info.device}, "
            f"{info.num_blocks} blocks of {info.block_size}"
        )
        if self._was_ready:
            logger.warning("%s", text)
        else:
            say(text)
        self._was_ready = True

    async def _watch(self) -> None:
        """Kills what makes no progress. Counts ticks, so that a pause of this process is not held against others."""
        while True:
            await asyncio.sleep(TICK)
            for child in self._children():
                child.stuck_for += TICK
                limit = self._server.watchdog if child.ready else self._server.startup_timeout
                if child.stuck_for > limit > 0:
                    child.stuck_for = 0.0
                    logger.error("%s makes no progress for %.0f s: replacing it", child.name, limit)
                    if child is self._core:
                        self._engine_down()
                    self._spawn(child.kill_with_stacks())

    # --- the end

    def _on_signal(self, number: int) -> None:
        if self._stopping:
            logger.warning("second signal: stopping at once")
            self._finish(0)
        else:
            self._stop(f"got {signal.Signals(number).name}")

    def _stop(self, why: str) -> None:
        if not self._stopping:
            self._stopping = True
            logger.info("%s: draining", why)
            self._spawn(self._drain())

    async def _drain(self) -> None:
        """Front-ends first, so that the core can finish their requests."""
        for slot in self._slots:
            if slot.ready is not None:
                slot.ready.send(Shutdown(drain=True))
            elif slot.child is not None:
                slot.child.kill()
        frontends = [slot.child for slot in self._slots if slot.child is not None]
        await _all_gone(frontends, self._server.drain_delay + self._server.drain_timeout + 2.0)
        if self._core is not None:
            if self._core.ready:
                self._core.send(Shutdown(drain=False))
                await _all_gone([self._core], 2.0)
            else:
                self._core.kill()
        self._finish(0)


async def _supervise(engine: EngineConfig, server: ServerConfig, run_directory: RunDirectory) -> int:
    return await Supervisor(engine, server, run_directory).run()


def _introduce(engine: EngineConfig, server: ServerConfig) -> None:
    """The first lines of a start; the children tell the rest."""
    bundled = engine.model.path == str(resolve(DEMO))
    say(f"octavo {__version__}: {'the bundled model' if bundled else engine.model.path}, served as {engine.model.name}")
    metrics = f", metrics: {server.metrics_address}" if server.metrics_address else ""
    say(f"front-end processes: {server.frontend_processes}, operators: {server.admin_address}{metrics}")


def say(text: str) -> None:
    """A line for people on stdout; nobody has to read it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)


def _complain(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"octavo: {' '.join(text.split())}", file=sys.stderr, flush=True)


async def _all_gone(children: list[Child], timeout: float) -> None:
    """Waits for the ends of these children, at most so many seconds."""
    if children:
        await asyncio.wait([asyncio.ensure_future(child.wait()) for child in children], timeout=timeout)


def _checked(engine: EngineConfig, server: ServerConfig) -> tuple[EngineConfig, ServerConfig]:
    """What can be found wrong before anything is started. Resolves the checkpoint's folder."""
    if server.frontend_processes < 0:
        raise StartupError(StartupError.USAGE, "frontend processes: at least 1, or 0 to choose by the cores")
    usable, free = len(cpu_cores.others([])), len(cpu_cores.others(cores_of(engine.model)))
    number = server.frontend_processes or choose_number(server.address, usable, free)
    server = msgspec.structs.replace(server, frontend_processes=number)
    if server.frontend_processes > 1 and server.address.startswith("unix:"):
        raise StartupError(StartupError.USAGE, f"{server.address}: several front-ends cannot share a unix socket")
    if bool(server.tls_cert) != bool(server.tls_key):
        raise StartupError(StartupError.USAGE, "TLS needs both a certificate and a key")
    if server.tls_client_ca and not server.tls_cert:
        raise StartupError(StartupError.USAGE, "a client CA needs TLS: certificate and key")
    if not (server.tls_cert or server.insecure_allow_remote or is_loopback(server.address)):
        raise StartupError(
            StartupError.USAGE,
            f"{server.address} can be reached from other machines: use TLS, or --insecure-allow-remote",
        )
    check(engine)
    path = resolve(engine.model.path)
    read_spec(path)
    model = msgspec.structs.replace(engine.model, path=str(path))
    return msgspec.structs.replace(engine, model=model), server
