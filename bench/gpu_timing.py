"""Times of GPU work: replays of CUDA graphs, contenders in turns, over more memory than the L2 cache holds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

L2_TIMES = 3.0
"""A rotation of buffers is this many times the L2 cache."""
MAX_COPIES = 256
MIN_LAUNCHES = 16
"""In one graph, so that the start of a replay does not count."""


@dataclass(frozen=True)
class Work:
    """What one contender does in a case."""

    run: Callable[[int], object]
    """Launches it once on buffers number `copy`; must be fit for capture in a graph."""
    result: Callable[[], Tensor] | None = None
    """What run(0) left behind, as a tensor that all contenders of the case agree on; None: not compared."""
    reset: Callable[[], None] | None = None
    """Puts back what a replay changes; not timed."""


@dataclass(frozen=True)
class Timing:
    """µs of one launch: each number is a replay's time over its launches."""

    median: float
    least: float
    most: float
    replays: int


class Clock(Protocol):
    """Times contenders side by side."""

    def times(self, works: Mapping[str, Work], copies: int) -> tuple[dict[str, Timing], dict[str, str]]:
        """Timings by contender, and why the others have none. copies: buffers that each rotates through."""
        ...


class GraphClock:
    """Captures each contender's rotation as a graph and replays the graphs in turns: A B C, B C A, ..."""

    def __init__(self, rounds: int = 7) -> None:
        self._rounds = rounds

    def times(self, works: Mapping[str, Work], copies: int) -> tuple[dict[str, Timing], dict[str, str]]:
        launches = copies * max(1, math.ceil(MIN_LAUNCHES / copies))
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        absent: dict[str, str] = {}
        for name, work in works.items():
            try:
                graphs[name] = self._capture(work, copies, launches)
            except Exception as error:
                torch.cuda.synchronize()
                absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        found: dict[str, list[float]] = {name: [] for name in graphs}
        names = list(graphs)
        for turn in range(self._rounds):
            for i in range(len(names)):
                name = names[(turn + i) % len(names)]
                found[name].append(self._replay(works[name], graphs[name]) / launches)
        return {name: summary(times) for name, times in found.items()}, absent

    def _capture(self, work: Work, copies: int, launches: int) -> torch.cuda.CUDAGraph:
        """Warms up outside the capture: compiles, autotunes, allocates."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for copy in range(min(2, copies)):
                work.run(copy)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(launches):
                work.run(i % copies)
        if work.reset:
            work.reset()
        graph.replay()  # the first replay uploads the graph
        torch.cuda.synchronize()
        return graph

    def _replay(self, work: Work, graph: torch.cuda.CUDAGraph) -> float:
        if work.reset:
            work.reset()
        torch.cuda.synchronize()
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3


class FakeClock:
    """Runs every contender, on a CPU in Triton's interpreter, and invents the times: for the benchmarks' tests."""

    def times(self, works: Mapping[str, Work], copies: int) -> tuple[dict[str, Timing], dict[str, str]]:
        found: dict[str, Timing] = {}
        absent: dict[str, str] = {}
        for i, (name, work) in enumerate(works.items()):
            try:
                work.run(copies - 1)
                if work.reset:
                    work.reset()
            except (ImportError, NotImplementedError) as error:  # all else is a fault of the benchmark
                absent[name] = f"{type(error).__name__}: {error}"
                continue
            found[name] = Timing(10.0 + i, 10.0 + i, 10.0 + i, 1)
        return found, absent


def summary(times: list[float]) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), len(times))


def copies_for(bytes_each: float, l2_bytes: float) -> int:
    """How many buffers of a size rotate so that none is in the L2 cache when its turn comes."""
    return int(min(MAX_COPIES, max(2, math.ceil(L2_TIMES * l2_bytes / max(bytes_each, 1.0)))))


def l2_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return 1.0
    return float(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))


def host_us(call: Callable[[], object], repeats: int) -> float:
    """µs of the host per call, while launches queue up on the device."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    used = time.perf_counter() - begin
    torch.cuda.synchronize()
    return used / repeats * 1e6


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference relative to the norm of `theirs`, in fp32."""
    a, b = ours.float().flatten(), theirs.float().flatten()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
