"""The control path between the supervisor and a child: one JSON struct a line, over a socketpair.

End of file means that the other side is gone. A line that is no message of the expected types, or is too long, is a
`ProtocolError`, which ends that peer: the two sides are the same release, so nothing else can be wrong but a bug.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import socket
import sys
import threading
from typing import Any, Generic, TypeVar

import msgspec

Received = TypeVar("Received")

MAX_LINE = 8 << 20
"""Bytes of one message, and of what may wait for a peer that does not read."""

_PR_SET_PDEATHSIG = 1


class ProtocolError(Exception):
    """The peer sent what is no message of this channel."""


class Channel(Generic[Received]):
    """Blocking end: any thread sends, one thread receives."""

    def __init__(self, sock: socket.socket, received: Any) -> None:
        """`received` is the union of the structs that the peer may send; `sock` belongs to the channel from now on."""
        sock.setblocking(True)
        self._sock = sock
        self._file = sock.makefile("rb")
        self._decoder: msgspec.json.Decoder[Received] = msgspec.json.Decoder(received)
        self._send_lock = threading.Lock()

    def send(self, message: msgspec.Struct) -> bool:
        """Writes one message; False when the other side is gone."""
        line = msgspec.json.encode(message) + b"\n"
        try:
            with self._send_lock:
                self._sock.sendall(line)
        except OSError:
            return False
        return True

    def receive(self) -> Received | None:
        """The next message; None when the other side is gone. Raises ProtocolError."""
        try:
            line = self._file.readline(MAX_LINE)
        except OSError:
            return None
        if not line.endswith(b"\n"):
            if len(line) >= MAX_LINE:
                raise ProtocolError("line too long")
            return None
        return _decode(self._decoder, line)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._sock.close()


class AsyncChannel(Generic[Received]):
    """The same on an asyncio loop. `send` never waits: the messages are few and small."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, received: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.json.Decoder[Received] = msgspec.json.Decoder(received)

    @classmethod
    async def open(cls, sock: socket.socket, received: Any) -> AsyncChannel[Received]:
        sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE)
        return cls(reader, writer, received)

    def send(self, message: msgspec.Struct) -> bool:
        """Queues one message; False when the other side is gone or has let MAX_LINE bytes pile up."""
        transport = self._writer.transport
        if transport.is_closing():
            return False
        if transport.get_write_buffer_size() > MAX_LINE:
            transport.abort()
            return False
        self._writer.write(msgspec.json.encode(message) + b"\n")
        return True

    async def receive(self) -> Received | None:
        """The next message; None when the other side is gone. Raises ProtocolError."""
        try:
            line = await self._reader.readline()
        except ValueError:
            raise ProtocolError("line too long") from None
        except OSError:
            return None
        if not line.endswith(b"\n"):
            return None
        return _decode(self._decoder, line)

    async def flush(self) -> None:
        """Returns when what was sent is on its way, or cannot be."""
        with contextlib.suppress(OSError):
            await self._writer.drain()

    def close(self) -> None:
        self._writer.close()


def die_with_parent() -> None:
    """Called by a child first of all: the kernel kills it when the thread that started it ends (Linux).

    The end of the control channel says the same; this also works while the child hangs or is stopped.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def socket_of_child(fd: int) -> socket.socket:
    """The child's end of the pair, from the number on its command line. Its own children do not inherit it."""
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    return sock


def _decode(decoder: msgspec.json.Decoder[Received], line: bytes) -> Received:
    try:
        return decoder.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"no message of this channel ({type(error).__name__})") from None
