"""A run: the warm-up, then the points one after the other, until all are done or Ctrl-C cuts it short."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from octavo.loadtest.fleet import Fleet, LoadTestError, PointResult
from octavo.loadtest.job import Job
from octavo.loadtest.measure import summarize
from octavo.loadtest.schedule import Point

SWEEP: Final = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1)
"""Rates of a sweep, as parts of the throughput with all requests sent at once."""
_WARMUP_CONCURRENCY = 32

Watch = Callable[[Fleet, Point], contextlib.AbstractContextManager[None]]
"""Entered while a point runs, to show its progress."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be measured."""

    points: tuple[Point, ...]
    warmup: int
    """Requests before the first point, which are not measured."""
    sweep: bool = False
    """The first and only point is the open loop with everything at once; the other rates follow from it."""


async def run(job: Job, load: Load, watch: Watch) -> list[PointResult]:
    """The results; the last one is marked when Ctrl-C cut the run short.

    Raises LoadTestError when a client process cannot connect or ends, or when every request of the warm-up fails.
    """
    async with Fleet(job) as fleet:
        with _interrupts(fleet):
            await _warm_up(fleet, load, job.processes)
            results = await _run_points(fleet, load.points, watch)
            if load.sweep:
                results += await _run_points(fleet, sweep_points(results), watch)
            return results


def sweep_points(results: Sequence[PointResult]) -> list[Point]:
    """The open loops that follow from the one with everything at once; none where that completed nothing."""
    if not results:
        return []
    first = results[0].point
    top = summarize(results[0].records, {}).request_throughput
    rates = [float(f"{part * top:.3g}") for part in SWEEP]
    return [
        Point(number, rate, first.burstiness, None, first.num_requests, first.duration)
        for number, rate in enumerate(rates, 2)
        if rate > 0
    ]


async def _warm_up(fleet: Fleet, load: Load, processes: int) -> None:
    if load.warmup == 0:
        return
    busiest = max(_concurrency(point) for point in load.points)
    concurrency = max(processes, min(load.warmup, busiest))
    result = await fleet.run(Point(0, concurrency=concurrency, num_requests=load.warmup))
    if result.records and all(record.failed for record in result.records):
        first = result.records[0]
        reason = f"{first.code}/{first.reason}".rstrip("/")
        raise LoadTestError(
            f"all {len(result.records)} requests of the warm-up failed; the first: {reason}: {first.message}"
        )


def _concurrency(point: Point) -> int:
    return point.concurrency or _WARMUP_CONCURRENCY


async def _run_points(fleet: Fleet, points: Sequence[Point], watch: Watch) -> list[PointResult]:
    results: list[PointResult] = []
    for point in points:
        if fleet.stopped:
            break
        with watch(fleet, point):
            results.append(await fleet.run(point))
    return results


@contextlib.contextmanager
def _interrupts(fleet: Fleet) -> Iterator[None]:
    """The first Ctrl-C stops the fleet, which then tells what it has; the second one ends everything."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        fleet.stop()

    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def label(point: Point) -> str:
    """Of a point, for people: "8 req/s", "all at once", "16 in flight"."""
    if point.rate is None:
        return f"{point.concurrency} in flight" if point.number else "warm-up"
    return "all at once" if math.isinf(point.rate) else f"{point.rate:g} req/s"
