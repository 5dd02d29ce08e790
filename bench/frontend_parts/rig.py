"""One run: the processes of a server or of the bare one, their load generators, and what each of them used."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from mock_core import CYCLE
from octavo.checkpoint import resolve
from octavo.child import Child
from octavo.config import EngineConfig, Limits, ModelConfig, SchedulerConfig, ServerConfig
from octavo.ipc import CoreReady, EngineUp, FromChild, FrontendReady, FrontendUp, StartCore, StartFailed, StartFrontend
from octavo.ipc_channel import AsyncChannel

HERE = Path(__file__).resolve().parent
PROMPT_TOKENS = 8
EDGES = (0.1, 0.9)
"""Parts of the tokens between which everything is measured."""
_SAMPLE_SECONDS = 0.05
_Processes = dict[str, list[int]]
"""Role -> process ids."""


@dataclass(frozen=True)
class Scenario:
    shape: str
    """"session" or "stream"."""
    requests: int
    """Running at once, over all front-ends."""
    rate: float
    """Tokens per second that the mock core makes."""
    tokens: int
    """Of each request."""
    frontends: int = 1

    @property
    def interval(self) -> float:
        return self.requests / self.rate


@dataclass
class Usage:
    """CPU seconds of each role over time."""

    times: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def sample(self, processes: dict[str, list[psutil.Process]]) -> None:
        used = {role: sum(sum(member.cpu_times()[:2]) for member in members) for role, members in processes.items()}
        self.times.append(time.monotonic())
        for role, seconds in used.items():
            self.seconds.setdefault(role, []).append(seconds)

    def between(self, start: float, end: float) -> dict[str, float]:
        return {
            role: float(np.diff(np.interp([start, end], self.times, seconds))[0])
            for role, seconds in self.seconds.items()
        }


async def measure(scenario: Scenario, *, bare: bool) -> dict[str, float]:
    """Numbers of one run; times in µs but for the latencies, which are in ms."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.zeros(CYCLE).tofile(folder / "ticks")
        serving = _bare(scenario, folder) if bare else _octavo(scenario, folder)
        async with serving as (addresses, processes):
            usage, tables = await _load(scenario, folder, addresses, processes)
    return summary(scenario, np.concatenate(tables), usage)


def summary(scenario: Scenario, table: np.ndarray[Any, Any], usage: Usage) -> dict[str, float]:
    """`table`: rows as load.py writes them."""
    table = table[np.argsort(table[:, 0])]
    tokens = np.cumsum(table[:, 1])
    first, last = np.searchsorted(tokens, [edge * tokens[-1] for edge in EDGES])
    start, end = table[first, 0], table[last, 0]
    inside = table[first + 1 : last + 1]
    num_tokens, messages = inside[:, 1].sum(), len(inside)
    p50, p99 = np.nanpercentile(inside[:, 3], [50, 99]) * 1e3
    numbers = {
        "tokens_per_second": num_tokens / (end - start),
        "messages_per_second": messages / (end - start),
        "tokens_per_event": num_tokens / inside[:, 2].sum(),
        "latency_p50_ms": p50,
        "latency_p99_ms": p99,
    }
    for role, seconds in usage.between(start, end).items():
        numbers[f"{role}_us_per_token"] = seconds * 1e6 / num_tokens
        numbers[f"{role}_us_per_message"] = seconds * 1e6 / messages
        numbers[f"{role}_cores"] = seconds / (end - start)
    return {key: round(float(value), 3) for key, value in numbers.items()}


async def _load(
    scenario: Scenario, folder: Path, addresses: list[str], processes: _Processes
) -> tuple[Usage, list[np.ndarray[Any, Any]]]:
    share, left = divmod(scenario.requests, len(addresses))
    assert not left, "the requests are not a multiple of the front-ends"
    outs = [folder / f"load{index}.npy" for index in range(len(addresses))]
    clients = [
        await _spawn(
            *("load.py", "--address", address, "--shape", scenario.shape, "--requests", share),
            *("--tokens", scenario.tokens, "--ticks", folder / "ticks", "--out", out),
        )
        for address, out in zip(addresses, outs, strict=True)
    ]
    everyone = processes | {"client": [client.pid for client in clients]}
    handles = {role: [psutil.Process(pid) for pid in pids] for role, pids in everyone.items()}
    usage = Usage()
    ends = asyncio.gather(*(client.wait() for client in clients))
    while not ends.done():
        with contextlib.suppress(psutil.Error):  # a client has just ended: the window is over
            usage.sample(handles)
        await asyncio.wait([ends], timeout=_SAMPLE_SECONDS)
    if any(await ends):
        raise RuntimeError("a load generator failed")
    return usage, [np.load(out) for out in outs]


async def _spawn(script: str, *arguments: object, **options: Any) -> asyncio.subprocess.Process:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, **options)


@contextlib.asynccontextmanager
async def _bare(scenario: Scenario, folder: Path) -> AsyncIterator[tuple[list[str], _Processes]]:
    assert scenario.frontends == 1
    server = await _spawn(
        *("bare_server.py", "--shape", scenario.shape, "--interval", scenario.interval),
        *("--requests", scenario.requests, "--tokens", scenario.tokens, "--ticks", folder / "ticks"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert server.stdout is not None
        address = (await server.stdout.readline()).decode().strip()
        yield [address], {"server": [server.pid]}
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.kill()
        await server.wait()


@contextlib.asynccontextmanager
async def _octavo(scenario: Scenario, folder: Path) -> AsyncIterator[tuple[list[str], _Processes]]:
    """A core and front-ends, introduced to each other as the supervisor does, each front-end on a port of its own."""
    core = await _start_core(scenario, folder)
    frontends = [
        await Child.start(f"front-end {index}", "octavo.server.process") for index in range(scenario.frontends)
    ]
    try:
        address = f"ipc://{folder}/core"
        engine = EngineConfig(
            model=ModelConfig(path=str(resolve("demo")), name="demo"),
            scheduler=SchedulerConfig(max_num_requests=scenario.requests),
        )
        core.send(StartCore(engine, address))
        for index, frontend in enumerate(frontends):
            frontend.send(_start_frontend(scenario, index, folder))
        ready = await _await(core, CoreReady)
        addresses = []
        for index, frontend in enumerate(frontends):
            addresses.append((await _await(frontend, FrontendReady)).address)
            core.send(FrontendUp(index, f"ipc://{folder}/frontend-{index}"))
            frontend.send(EngineUp(address, ready.info, 0))
        yield addresses, {"server": [frontend.pid for frontend in frontends], "core": [core.pid]}
    finally:
        for child in [core, *frontends]:
            child.kill()
            await child.wait()
            child.close()


async def _start_core(scenario: Scenario, folder: Path) -> Child:
    ours, theirs = socket.socketpair()
    with theirs:
        process = await _spawn(
            *("mock_core.py", "--fd", theirs.fileno(), "--ticks", folder / "ticks", "--interval", scenario.interval),
            *("--requests", scenario.requests, "--total", PROMPT_TOKENS + scenario.tokens),
            pass_fds=[theirs.fileno()],
        )
    return Child("engine core", process, await AsyncChannel.open(ours, FromChild))


def _start_frontend(scenario: Scenario, index: int, folder: Path) -> StartFrontend:
    room = 4 * scenario.requests * scenario.frontends
    config = ServerConfig(
        address="127.0.0.1:0",
        run_directory=str(folder),
        frontend_processes=scenario.frontends,
        limits=Limits(max_session_requests=room, max_inflight_requests=room, max_tenant_requests=room),
    )
    return StartFrontend(
        frontend=index,
        config=config,
        model_path=str(resolve("demo")),
        model_name="demo",
        address=f"ipc://{folder}/frontend-{index}",
        instance_id="bench",
        cache_secret=secrets.token_hex(32),
        max_model_len=0,
        start_time=time.time(),
    )


async def _await(child: Child, kind: Any) -> Any:
    while not isinstance(message := await child.receive(), kind):
        if message is None or isinstance(message, StartFailed):
            raise RuntimeError(f"{child.name} did not start: {message}")
    return message
