"""Calls to all front-ends of a server: aborting, draining and counting concern every process, not one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

ClusterHandler = Callable[[str, str], Awaitable[str]]
"""Runs (method, JSON payload) in this front-end and returns a JSON payload."""


class Cluster(Protocol):
    """Methods: "abort", "drain", "undrain", "inflight". Payloads are JSON; the caller merges the answers."""

    handler: ClusterHandler | None
    """Set by the server: runs a method of this front-end, whoever called it."""

    async def call(self, method: str, payload: str) -> list[str]:
        """Runs `method` in every living front-end, this one included, and gathers the answers, ours first."""
        ...


class LocalCluster:
    """A cluster of one front-end."""

    def __init__(self, handler: ClusterHandler | None = None) -> None:
        self.handler = handler

    async def call(self, method: str, payload: str) -> list[str]:
        assert self.handler is not None, "a method is called before the server set its handler"
        return [await self.handler(method, payload)]
