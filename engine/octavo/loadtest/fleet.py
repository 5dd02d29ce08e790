"""The client processes, and a point of load run on all of them."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Self

from octavo.loadtest.job import Job, point_to_fields
from octavo.loadtest.measure import Record, from_fields
from octavo.loadtest.schedule import Point

_MARGIN = 0.1
"""Seconds between "start" and the start, so that every process hears of it before."""
_STOP = 5.0
"""Seconds that a process gets to end."""
_LINE = 1 << 26
"""Bytes of a line from a process."""


class LoadTestError(Exception):
    """The test itself failed: a client process could not connect, or ended."""


@dataclass(frozen=True, slots=True)
class ClientReport:
    """How a client process fared in a point."""

    busy: float
    """Share of the time that its event loop computed: near 1 it is the bottleneck."""
    lag_p99: float
    """Seconds by which its event loop woke late, 99th percentile."""
    lag_max: float


@dataclass(frozen=True, slots=True)
class PointResult:
    """What a point gave."""

    point: Point
    records: list[Record]
    """In order of their index."""
    clients: list[ClientReport]
    cut_short: bool = False

    @property
    def not_sent(self) -> int:
        """Requests that were still to be sent when the point was cut short, where their number is known."""
        count = self.point.count()
        return max(0, count - len(self.records)) if self.cut_short and count is not None else 0


@dataclass(slots=True)
class Client:
    """A client process. State: belongs to the Fleet."""

    number: int
    process: asyncio.subprocess.Process
    progress: dict[str, int] = field(default_factory=dict)

    @classmethod
    async def start(cls, number: int, job: Job) -> Self:
        """In a process group of its own: a Ctrl-C is the parent's to handle."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "octavo.loadtest.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            process_group=0,
            limit=_LINE,
        )
        client = cls(number, process)
        client.tell(str(number), job.to_json())
        return client

    def tell(self, *lines: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(line + "\n" for line in lines).encode())

    async def hear(self) -> dict[str, Any]:
        """The next message. Raises LoadTestError when the process is gone or tells of an error."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            status = await self.process.wait()
            raise LoadTestError(f"client process {self.number} ended with status {status}")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise LoadTestError(message["error"])
        return message

    async def expect(self, name: str) -> None:
        message = await self.hear()
        assert name in message, message

    async def result(self) -> tuple[list[Record], ClientReport]:
        """Hears until the point has ended."""
        records: list[Record] = []
        while True:
            message = await self.hear()
            if "progress" in message:
                self.progress = message["progress"]
            elif "record" in message:
                records.append(from_fields(message["record"]))
            else:
                return records, ClientReport(**message["end"])

    async def end(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(_STOP):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


class Fleet:
    """The client processes of a run: `async with Fleet(job) as fleet: await fleet.run(point)`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._clients: list[Client] = []
        self.stopped = False

    async def __aenter__(self) -> Self:
        """Raises LoadTestError when a process cannot connect."""
        try:
            for number in range(self._job.processes):
                self._clients.append(await Client.start(number, self._job))
            await asyncio.gather(*(client.expect("ready") for client in self._clients))
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def _end(self) -> None:
        await asyncio.gather(*(client.end() for client in self._clients))

    def stop(self) -> None:
        """Cancels what runs; `run` then returns what was measured so far."""
        self.stopped = True
        for client in self._clients:
            client.tell('{"stop": true}')
        asyncio.get_running_loop().call_later(_STOP, self._kill)

    def _kill(self) -> None:
        for client in self._clients:
            if client.process.returncode is None:
                client.process.kill()

    async def run(self, point: Point) -> PointResult:
        """Runs a point on all processes from one instant on."""
        for client in self._clients:
            client.progress = {}
            client.tell(json.dumps({"prepare": point_to_fields(point)}))
        await asyncio.gather(*(client.expect("prepared") for client in self._clients))
        if self.stopped:
            return PointResult(point, [], [], cut_short=True)
        start = time.monotonic() + _MARGIN
        for client in self._clients:
            client.tell(json.dumps({"start": start}))
        results = await asyncio.gather(*(client.result() for client in self._clients))
        records = sorted((record for part, _ in results for record in part), key=lambda record: record.index)
        return PointResult(point, records, [report for _, report in results], self.stopped)

    def progress(self) -> dict[str, int]:
        """Requests by state, as far as the processes have told."""
        names = ("over", "failed", "running", "late")
        return {name: sum(client.progress.get(name, 0) for client in self._clients) for name in names}
