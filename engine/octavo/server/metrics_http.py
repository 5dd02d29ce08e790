"""HTTP for Prometheus and for probes that cannot speak gRPC: GET /metrics and GET /healthz, nothing else.

A connection gets one answer and is closed; a request is at most 8 KiB and has five seconds to arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

MAX_REQUEST = 8192
TIMEOUT = 5.0
MAX_CONNECTIONS = 64

logger = logging.getLogger(__name__)


class MetricsServer:
    """Listens on one address. Owned by the front-end process."""

    def __init__(self, metrics: Callable[[], Awaitable[bytes]], health: Callable[[], str]) -> None:
        """`metrics` renders /metrics; `health` is the one word that /healthz answers while the process lives."""
        self._metrics = metrics
        self._health = health
        self._server: asyncio.Server | None = None
        self._connections = 0

    async def start(self, host: str, port: int) -> None:
        """Raises OSError when the address cannot be had."""
        self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_REQUEST)

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= MAX_CONNECTIONS:
                async with asyncio.timeout(TIMEOUT):
                    head = await reader.readuntil(b"\r\n\r\n")
                    status, kind, body = await self._answer(head)
                    writer.write(
                        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
                        "Connection: close\r\n\r\n".encode()
                    )
                    if not head.startswith(b"HEAD "):
                        writer.write(body)
                    await writer.drain()
        except (OSError, TimeoutError, EOFError, asyncio.LimitOverrunError):
            writer.transport.abort()  # the peer is gone, slow, or does not speak HTTP: what it did not take is dropped
        finally:
            self._connections -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, head: bytes) -> tuple[str, str, bytes]:
        """Status line, content type, body."""
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return "405 Method Not Allowed", "text/plain", b"only GET\n"
        if path == b"/healthz":
            return "200 OK", "text/plain", f"{self._health()}\n".encode()
        if path != b"/metrics":
            return "404 Not Found", "text/plain", b"/metrics or /healthz\n"
        try:
            return "200 OK", "text/plain; version=0.0.4; charset=utf-8", await self._metrics()
        except Exception:
            logger.exception("rendering the metrics failed")
            return "500 Internal Server Error", "text/plain", b"internal error\n"
