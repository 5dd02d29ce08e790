"""What a client process is told, as JSON: no pickles cross the pipe."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Final, Self

from octavo.client import TLS, AsyncClient
from octavo.loadtest.schedule import Point
from octavo.loadtest.workload import Entry, Workload

TRANSPORTS: Final = ("stream", "session", "unary")
"""StreamGenerate, GenerateSession, Generate."""


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the server is."""

    addresses: tuple[str, ...]
    tls: TLS | None = None
    api_key: str | None = None

    def open(self) -> AsyncClient:
        """A client that does not try again: what the server refuses is a result."""
        return AsyncClient(*self.addresses, tls=self.tls or False, api_key=self.api_key, retry=False)


@dataclass(frozen=True, slots=True)
class Job:
    """All that the client processes have in common."""

    connection: Connection
    workload: Workload
    params: dict[str, Any]
    """Keywords of the client's `generate`, the same for every request."""
    transport: str = "stream"
    connections: int = 1
    """Of each process; requests take turns on them."""
    processes: int = 1
    timeout: float | None = None
    """Seconds of a request."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        fields = json.loads(text)
        connection, workload = fields.pop("connection"), fields.pop("workload")
        tls = connection["tls"]
        return cls(
            Connection(tuple(connection["addresses"]), TLS(**tls) if tls else None, connection["api_key"]),
            Workload(
                **{
                    **workload,
                    "sigmas": tuple(workload["sigmas"]),
                    "entries": tuple(Entry(**entry) for entry in workload["entries"]),
                }
            ),
            **fields,
        )


def point_to_fields(point: Point) -> dict[str, Any]:
    """The inverse is Point(**fields)."""
    return dataclasses.asdict(point)
