"""One case of bench/kernels.py: a problem of one size, who solves it, and what it costs at least."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from gpu_timing import Work


class TooLong(Exception):
    """A contender needs more time to get ready than it may have."""


@dataclass(frozen=True)
class Setting:
    """Where the cases run."""

    device: torch.device
    dtype: torch.dtype
    """bf16; fp16 in the interpreter, which computes bf16 products wrongly."""
    l2_bytes: float
    tiny: bool
    """Shapes for the interpreter."""
    sweep: bool = False
    """Also all candidates of what is chosen by measurement, and the peers that are slow to start everywhere."""


@dataclass(frozen=True)
class Target:
    """What issue and design promise of a contender in a case."""

    contender: str
    fraction: float | None = None
    """Of the ceiling, at least."""
    microseconds: float | None = None
    """At most."""
    ahead: bool = False
    """Of every baseline, that is, every contender whose name does not begin with "octavo"."""


@dataclass
class Case:
    bench: str
    name: str
    facts: dict[str, Any]
    """Sizes, for the record."""
    bytes: float
    """Moved at least."""
    flops: float
    copies: int
    contenders: dict[str, Callable[[], Work]]
    """Made when their turn comes; the first is what the others are compared with."""
    target: Target | None = None
    tolerance: float = 0.02
    """Relative difference of results that is still right."""
    own_bytes: dict[str, float] = field(default_factory=dict)
    """Of contenders that move other bytes: an fp8 cache."""

    def floor_bytes(self, contender: str) -> float:
        return self.own_bytes.get(contender, self.bytes)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises TooLong in the block after so many seconds: peers that compile at first use."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"not ready after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
