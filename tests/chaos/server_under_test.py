"""A real server in its own process tree: supervisor, engine core, front-ends, on the bundled model.

It signals only processes of its own tree, and `close` checks that nothing of the tree and no run directory is left.
"""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import psutil
from google.rpc import error_details_pb2, status_pb2
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, ServerConfig
from octavo_proto.v1 import control_pb2, control_pb2_grpc, generation_pb2, generation_pb2_grpc, types_pb2

SERVE = """
import sys, msgspec
from octavo.config import EngineConfig, ServerConfig
from octavo.supervisor import serve
engine, server = sys.argv[1:]
sys.exit(serve(msgspec.json.decode(engine, type=EngineConfig), msgspec.json.decode(server, type=ServerConfig)))
"""
PROMPT = "I met a traveller from an antique land, who said"
START_TIMEOUT = 90.0


def engine_config(**model: Any) -> EngineConfig:
    fields = {"path": "demo", "name": "demo", "device": "cpu", "dtype": "float32", "num_threads": 1, **model}
    return EngineConfig(
        model=ModelConfig(**fields),
        cache=CacheConfig(block_size=16, num_blocks=2048),
        scheduler=SchedulerConfig(max_num_requests=64),
    )


class ServerUnderTest:
    """Start it, break it, `close` it. `address` is known once it is ready."""

    def __init__(self, engine: EngineConfig | None = None, **server: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="oct-"))
        self.run_directory = self.folder / "run"
        self.engine = engine or engine_config()
        fields = {"address": "127.0.0.1:0", "frontend_processes": 1, "run_directory": str(self.run_directory), **server}
        self.server = ServerConfig(**fields)
        self.address = ""
        self.stdout: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._stderr = (self.folder / "stderr").open("w+")
        self._tree: dict[int, psutil.Process] = {}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, *(msgspec.json.encode(c).decode() for c in (self.engine, self.server))],
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        threading.Thread(target=self._read_stdout, daemon=True).start()

    def wait_until_ready(self) -> ServerUnderTest:
        deadline = self.started + START_TIMEOUT
        while not self.address:
            line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
            assert line is not None, f"the server ended: {self.stderr}"
            if line.startswith("ready on "):
                self.address = line.removeprefix("ready on ").partition(": ")[0]
        self.remember_tree()
        return self

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.stdout.append(line.rstrip("\n"))
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    # --- the tree

    def remember_tree(self) -> None:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self._tree.setdefault(process.pid, process)

    def cpu_time(self) -> float:
        """Seconds of CPU that the living tree has used."""
        times = [p.cpu_times() for p in [psutil.Process(self.process.pid), *self.living()]]
        return sum(t.user + t.system for t in times)

    def _pids(self, module: str) -> list[int]:
        if self.process.poll() is not None:
            return []
        self.remember_tree()
        found = []
        for process in psutil.Process(self.process.pid).children():
            try:
                if module in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except psutil.NoSuchProcess:
                continue
        return sorted(found)

    @property
    def core_pids(self) -> list[int]:
        """One, or none while it is being replaced."""
        return self._pids("octavo.engine_core.process")

    @property
    def core_pid(self) -> int:
        (pid,) = self.core_pids
        return pid

    @property
    def frontend_pids(self) -> list[int]:
        return self._pids("octavo.server.process")

    def living(self) -> list[psutil.Process]:
        """Processes of the tree, children that the supervisor left behind included."""
        return [p for p in self._tree.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    # --- the end

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def wait(self, timeout: float) -> int:
        return self.process.wait(timeout)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Stops what still runs and checks that nothing is left."""
        killed = self.process.poll() == -signal.SIGKILL
        if self.process.poll() is None:
            self.remember_tree()
            self.terminate()
            try:
                self.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.wait(5)
                raise
        _, alive = psutil.wait_procs(self._tree.values(), timeout=5)
        alive = [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
        for process in alive:
            process.kill()
        assert not alive, f"left behind: {alive}"
        if not killed:
            assert not self.run_directory.exists()
        print(self.stderr)  # shown by pytest when the test failed
        self._stderr.close()
        shutil.rmtree(self.folder)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)


class Stream:
    """One greedy StreamGenerate on a connection of its own."""

    def __init__(self, address: str, max_new_tokens: int, prompt: str = PROMPT, timeout: float = 60.0) -> None:
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        params = types_pb2.GenerationParams(max_new_tokens=max_new_tokens, ignore_eos=True)
        request = generation_pb2.GenerateRequest(prompts=[types_pb2.Prompt(text=prompt)], params=params)
        self.call = generation_pb2_grpc.GenerationServiceStub(self.channel).StreamGenerate(
            generation_pb2.StreamGenerateRequest(request=request), timeout=timeout
        )
        self.text = ""
        self.tokens = 0
        self.error: grpc.aio.AioRpcError | None = None
        self.ended_at = 0.0
        self.started = asyncio.Event()
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for response in self.call:
                for delta in response.deltas:
                    self.text += delta.text
                    self.tokens += len(delta.token_ids)
                self.started.set()
        except grpc.aio.AioRpcError as error:
            self.error = error
        finally:
            self.ended_at = time.monotonic()
            self.started.set()
            await self.channel.close()

    @property
    def reason(self) -> str:
        return reason_of(self.error)


def reason_of(error: grpc.aio.AioRpcError | None) -> str:
    """ErrorInfo.reason of a failed call; "" when there is none."""
    if error is None:
        return ""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return info.reason
    return ""


async def streams(address: str, count: int, max_new_tokens: int, **options: Any) -> list[Stream]:
    """So many streams, all of which have delivered something."""
    started = [Stream(address, max_new_tokens, **options) for _ in range(count)]
    for stream in started:
        await stream.started.wait()
        assert stream.error is None, stream.error
    return started


async def generate(address: str, max_new_tokens: int = 8) -> str:
    """Text of a small greedy request."""
    stream = Stream(address, max_new_tokens)
    await stream.task
    if stream.error is not None:
        raise stream.error
    return stream.text


async def generate_when_up(address: str, timeout: float, max_new_tokens: int = 8) -> tuple[str, list[str]]:
    """The text once the server serves again, and the reasons for which it refused until then."""
    deadline = time.monotonic() + timeout
    reasons: list[str] = []
    while True:
        try:
            return await generate(address, max_new_tokens), reasons
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                raise
            reasons.append(reason_of(error))
            await asyncio.sleep(0.1)


async def get_load(address: str) -> control_pb2.Load:
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        reply = await control_pb2_grpc.ControlServiceStub(channel).GetLoad(control_pb2.GetLoadRequest(), timeout=5)
        return reply.load


async def eventually(check: Callable[[], Any], timeout: float) -> None:
    """Waits until `check` (which may be a coroutine function) is true."""
    deadline = time.monotonic() + timeout
    while True:
        result = check()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.02)
