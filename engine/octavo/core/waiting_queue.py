"""The queue of requests that want to run, and the clocks that end them there."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from octavo.core.request import Request, RequestStatus


class WaitingQueue:
    """Requests by rank: priority, then order of arrival; a preempted one keeps its place. Removal is lazy."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Request]] = []

    def add(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        heapq.heappush(self._heap, (request.rank, request))

    def peek(self) -> Request | None:
        """The first one that still waits."""
        while self._heap and self._heap[0][1].status is not RequestStatus.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Takes out what `peek` has just shown."""
        heapq.heappop(self._heap)


class Timers:
    """Points in time at which a request has to be looked at. Ended requests are dropped now and then, not at once."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._counter = itertools.count()
        self._sweep_at = 1024

    def add(self, time: float, request: Request) -> None:
        if len(self._heap) >= self._sweep_at:
            self._heap = [entry for entry in self._heap if entry[2].status is not RequestStatus.ENDED]
            heapq.heapify(self._heap)
            self._sweep_at = 2 * len(self._heap) + 1024
        heapq.heappush(self._heap, (time, next(self._counter), request))

    def due(self, now: float) -> Iterator[Request]:
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[2]
