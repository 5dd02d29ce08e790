"""A child of the supervisor: its process, its control channel, and what is known of its progress."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections import deque

import msgspec

from octavo.ipc import FromChild, Heartbeat
from octavo.ipc_channel import AsyncChannel

_DUMP_TIME = 0.3
"""Seconds a hanging process gets to write its stacks to stderr."""


class Child:
    """Owned by the supervisor. Ends with `wait`, which also reaps it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, channel: AsyncChannel[FromChild]) -> None:
        self.name = name
        self.pid = process.pid
        self.ready = False
        self.stuck_for = 0.0
        """Seconds without progress; while it is not ready: since it was started."""
        self._process = process
        self._channel = channel
        self._steps = -1

    @classmethod
    async def start(cls, name: str, module: str) -> Child:
        """Runs `python -m module --fd N`. In a process group of its own: a Ctrl-C is the supervisor's to handle."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", module, "--fd", str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        return cls(name, process, await AsyncChannel.open(ours, FromChild))

    def send(self, message: msgspec.Struct) -> bool:
        return self._channel.send(message)

    async def receive(self) -> FromChild | None:
        """The next message; None when the child is gone or closed its channel. Raises ProtocolError."""
        return await self._channel.receive()

    async def wait(self) -> int:
        """Its exit status, negative for a signal. Several may wait."""
        return await self._process.wait()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # Not Process.send_signal: it polls, and so takes the exit status away from whoever waits for it.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill_with_stacks(self) -> None:
        """Lets it write all threads' stacks to stderr, even if it is stopped, and kills it."""
        self._signal(signal.SIGUSR1)
        self._signal(signal.SIGCONT)
        await asyncio.sleep(_DUMP_TIME)
        self.kill()

    def close(self) -> None:
        self._channel.close()

    def saw(self, beat: Heartbeat) -> None:
        """A child that is ready makes progress when it is idle or its steps grow."""
        if self.ready and (not beat.busy or beat.steps != self._steps):
            self.stuck_for = 0.0
        self._steps = beat.steps

    def saw_ready(self) -> None:
        self.ready = True
        self.stuck_for = 0.0


class RestartPolicy:
    """When to start a child again: after 0.5 s, doubling to 8 s; not any more after too many deaths in a while."""

    FIRST_DELAY = 0.5
    LAST_DELAY = 8.0
    MAX_DEATHS = 3
    WINDOW = 300.0
    """Seconds in which at most MAX_DEATHS deaths are forgiven."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque()

    def after_death(self, now: float | None = None) -> float | None:
        """Seconds to wait; None: give up. `now` is monotonic."""
        now = time.monotonic() if now is None else now
        while self._deaths and now - self._deaths[0] > self.WINDOW:
            self._deaths.popleft()
        self._deaths.append(now)
        if len(self._deaths) > self.MAX_DEATHS:
            return None
        return float(min(self.FIRST_DELAY * 2.0 ** (len(self._deaths) - 1), self.LAST_DELAY))


def describe(status: int) -> str:
    """An exit status for people."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def limit_resources() -> None:
    """For this process and its children: no core dumps (they hold prompts), as many files as allowed."""
    if os.name != "posix":
        return
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < 65_536:
            wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
