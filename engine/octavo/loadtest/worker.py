"""A client process: reads its job and commands from standard input, answers on standard output, one JSON per line.

In:  its number and the Job; then for each point {"prepare": POINT}, {"start": TIME of the monotonic clock}; at any
     time {"stop": true}, which cancels what runs. The end of the input ends the process.
Out: {"ready": true} or {"error": TEXT}; {"prepared": true}; while a point runs {"progress": {...}}; at its end one
     {"record": {...}} per request and {"end": {...}}.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvloop

from octavo.client import OctavoError
from octavo.loadtest.job import Job
from octavo.loadtest.measure import LATE, Record, to_fields
from octavo.loadtest.schedule import Point, arrivals, share, slots
from octavo.loadtest.sender import Sender

INPUT_LIMIT = 1 << 28
"""Bytes of a line: a dataset may be long."""
_PROGRESS = 0.25
"""Seconds between two messages about progress."""
_LAG = 0.02
"""Seconds that the event loop is asked to sleep, to see by how much it oversleeps."""


@dataclass(slots=True)
class PointRun:
    """One point of load on this process. State: belongs to the event loop."""

    job: Job
    point: Point
    process: int
    sender: Sender
    records: list[Record] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    """Seconds by which the event loop was late."""
    progress: dict[str, int] = field(default_factory=lambda: {"over": 0, "failed": 0, "running": 0, "late": 0})
    """Requests by state, for people to look at while it runs."""
    _prompts: dict[int, str | list[int]] = field(default_factory=dict)
    _start: float = 0.0

    def prepare(self) -> None:
        """Makes the prompts beforehand, where their number is known."""
        if self.point.count() is not None:
            self._prompts = {index: self._prompt(index) for index in self._share()}

    async def run(self, start: float) -> dict[str, Any]:
        """Sends everything and waits for the answers; returns what is known of this process. `start`: time of the
        monotonic clock."""
        self._start = start
        await self._sleep_until(0.0)
        watcher = asyncio.create_task(self._watch())
        busy = time.thread_time()
        try:
            await (self._closed() if self.point.rate is None else self._open(self.point.rate))
        finally:
            watcher.cancel()
            busy = time.thread_time() - busy
        lasted = self._now()
        return {"busy": busy / lasted if lasted > 0 else 0.0, **self.lag()}

    def lag(self) -> dict[str, float]:
        """Seconds."""
        lags = self.lags or [0.0]
        return {"lag_p99": float(np.percentile(lags, 99)), "lag_max": max(lags)}

    def _now(self) -> float:
        return time.monotonic() - self._start

    def _share(self) -> Any:
        return share(self.point, self.process, self.job.processes)

    def _prompt(self, index: int) -> str | list[int]:
        return self.job.workload.prompt(self.point.number, index)

    async def _open(self, rate: float) -> None:
        count = self.point.count()
        assert count is not None
        times = arrivals(rate, count, self.point.burstiness, self.job.workload.seed)
        async with asyncio.TaskGroup() as group:
            for index in self._share():
                await self._sleep_until(times[index])
                group.create_task(self._send(index, float(times[index])))

    async def _sleep_until(self, time: float) -> None:
        """Yields at least once, and never ends early: the loop's timers have a resolution of 1 ms and may."""
        await asyncio.sleep(0)
        left = time - self._now()
        while left > 0:
            await asyncio.sleep(left)
            left = time - self._now()

    async def _closed(self) -> None:
        indices = self._share()
        limit = float("inf") if self.point.duration is None else self.point.duration

        async def slot() -> None:
            for index in indices:
                await self._send(index, None)
                if self._now() >= limit:
                    return

        async with asyncio.TaskGroup() as group:
            for _ in range(slots(self.point, self.process, self.job.processes)):
                group.create_task(slot())

    async def _send(self, index: int, scheduled: float | None) -> None:
        prompt = self._prompts.pop(index, None) or self._prompt(index)
        record = Record(index, scheduled, wanted=self.job.workload.lengths(index)[1])
        self.records.append(record)
        self.progress["running"] += 1
        await self.sender.send(record, prompt, self._now)
        self.progress["running"] -= 1
        self.progress["over"] += 1
        self.progress["failed"] += record.failed
        self.progress["late"] += record.delay > LATE

    async def _watch(self) -> None:
        reported = 0.0
        while True:
            before = time.monotonic()
            await asyncio.sleep(_LAG)
            after = time.monotonic()
            self.lags.append(max(0.0, after - before - _LAG))
            if after - reported >= _PROGRESS:
                reported = after
                tell({"progress": self.progress})


def tell(message: dict[str, Any]) -> None:
    """One line to the parent."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def serve() -> None:
    """Until the input ends."""
    reader = asyncio.StreamReader(limit=INPUT_LIMIT)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    process = int(await reader.readline())
    job = Job.from_json(await reader.readline())
    try:
        async with Sender(job) as sender:
            tell({"ready": True})
            await _obey(reader, job, process, sender)
    except OctavoError as error:
        tell({"error": str(error)})


async def _obey(reader: asyncio.StreamReader, job: Job, process: int, sender: Sender) -> None:
    prepared: PointRun | None = None
    running: asyncio.Task[None] | None = None
    while line := await reader.readline():
        command = json.loads(line)
        if "prepare" in command:
            prepared = PointRun(job, Point(**command["prepare"]), process, sender)
            prepared.prepare()
            tell({"prepared": True})
        elif "start" in command and prepared is not None:
            running = asyncio.create_task(_measure(prepared, command["start"]))
        elif "stop" in command and running is not None:
            running.cancel()
    if running is not None:
        running.cancel()
        await asyncio.wait({running})


async def _measure(run: PointRun, start: float) -> None:
    """A point that is stopped, too, tells what it has measured."""
    end: dict[str, Any] = {}
    try:
        end = await run.run(start)
    except asyncio.CancelledError:
        end = {"busy": 0.0, **run.lag()}
    except Exception as error:
        traceback.print_exception(error)
        tell({"error": f"a client process failed: {error!r}"})
        return
    for record in run.records:
        if record.ended:
            tell({"record": to_fields(record)})
    tell({"end": end})


if __name__ == "__main__":
    uvloop.run(serve())
