"""When requests are sent, and by which process. Everything here is known before the first one is sent."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ARRIVALS = 1
"""Tells this use of the seed from those of the workload."""


@dataclass(frozen=True, slots=True)
class Point:
    """One load: an open loop (`rate`) or a closed loop (`concurrency`)."""

    number: int
    """Position in the run, from 1; 0 is the warm-up."""
    rate: float | None = None
    """Requests per second of an open loop; inf: all at once."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the gaps: 1 is Poisson, less has more bursts, inf is a clockwork."""
    concurrency: int | None = None
    """Requests in flight of a closed loop."""
    num_requests: int | None = None
    """None: `duration` decides."""
    duration: float | None = None
    """Seconds in which requests are sent; what runs then is waited for."""

    def count(self) -> int | None:
        """How many requests are sent: the smaller of `num_requests` and what `duration` allows. None: not known."""
        if self.rate is None or self.duration is None or math.isinf(self.rate):
            return self.num_requests
        within = max(1, round(self.rate * self.duration))
        return within if self.num_requests is None else min(within, self.num_requests)


def arrivals(rate: float, count: int, burstiness: float, seed: int) -> NDArray[np.float64]:
    """Times of `count` arrivals, in seconds since the start, ascending.

    As in vLLM's benchmark the gaps are gamma distributed with shape `burstiness` and mean 1/rate, and the whole is then
    scaled so that the last arrival is at count/rate: a short run has the rate that it is named after.
    """
    if math.isinf(rate):
        return np.zeros(count)
    if math.isinf(burstiness):
        gaps = np.ones(count)
    else:
        gaps = np.random.default_rng([seed, _ARRIVALS]).gamma(burstiness, 1.0, count)
    times = np.cumsum(gaps)
    return np.asarray(times * (count / rate / times[-1]), np.float64)


def share(point: Point, process: int, processes: int) -> Iterator[int]:
    """Indices of the requests that `process` sends, ascending; without end where the count is not known.

    A closed loop has as many slots as requests in flight; slots are dealt to processes, and requests to slots.
    """
    count = point.count()
    slots = point.concurrency or processes
    for index in itertools.count() if count is None else range(count):
        if index % slots % processes == process:
            yield index


def slots(point: Point, process: int, processes: int) -> int:
    """How many requests of a closed loop `process` keeps in flight."""
    return len(range(process, point.concurrency or 0, processes))
