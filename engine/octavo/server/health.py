"""grpc.health.v1.Health: the empty name is the process, each service's name is readiness for requests.

grpcio-health-checking's own servicer holds a lock while it writes to a watcher, so that one slow watcher could stop
every change; this one gives each watcher a short queue.
"""

from __future__ import annotations

import asyncio
from typing import Final

import grpc
from grpc_health.v1 import health_pb2 as pb

from octavo.server.rpc import Call
from octavo.server.statuses import PlainStatus

SERVING: Final = pb.HealthCheckResponse.SERVING
NOT_SERVING: Final = pb.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN: Final = pb.HealthCheckResponse.SERVICE_UNKNOWN

_MAX_CHANGES = 16
"""Changes kept for a slow watcher; beyond that it only gets the last."""


class HealthService:
    """The servicer. Its methods are called by `rpc.Pipeline`."""

    def __init__(self, services: list[str], *, empty_is_readiness: bool) -> None:
        self._status = {"": NOT_SERVING if empty_is_readiness else SERVING} | dict.fromkeys(services, NOT_SERVING)
        self._empty_is_readiness = empty_is_readiness
        self._watchers: list[_Watcher] = []
        self._stopped = False

    def set_ready(self, ready: bool) -> None:
        """Whether a request would be admitted."""
        status = SERVING if ready else NOT_SERVING
        for name, old in self._status.items():
            if (name or self._empty_is_readiness) and old != status:
                self._status[name] = status
                for watcher in self._watchers:
                    watcher.changed(name, status)

    def stop(self) -> None:
        """Ends every Watch."""
        self._stopped = True
        for watcher in self._watchers:
            watcher.wake.set()

    async def Check(self, request: pb.HealthCheckRequest, call: Call) -> pb.HealthCheckResponse:
        status = self._status.get(request.service)
        if status is None:
            raise PlainStatus(grpc.StatusCode.NOT_FOUND, "unknown service")
        return pb.HealthCheckResponse(status=status)

    async def List(self, request: pb.HealthListRequest, call: Call) -> pb.HealthListResponse:
        return pb.HealthListResponse(
            statuses={name: pb.HealthCheckResponse(status=status) for name, status in self._status.items()}
        )

    async def Watch(self, request: pb.HealthCheckRequest, call: Call) -> None:
        watcher = _Watcher(request.service, self._status.get(request.service, SERVICE_UNKNOWN))
        self._watchers.append(watcher)
        try:
            while True:
                while watcher.changes:
                    await call.write(pb.HealthCheckResponse(status=watcher.changes.pop(0)))
                if self._stopped:
                    raise PlainStatus(grpc.StatusCode.UNAVAILABLE, "the server stops")
                await watcher.wake.wait()
                watcher.wake.clear()
        finally:
            self._watchers.remove(watcher)


class _Watcher:
    """One Watch RPC."""

    def __init__(self, service: str, status: int) -> None:
        self.service = service
        self.changes = [status]
        self.wake = asyncio.Event()

    def changed(self, service: str, status: int) -> None:
        if service == self.service:
            if len(self.changes) >= _MAX_CHANGES:
                self.changes.clear()
            self.changes.append(status)
            self.wake.set()
