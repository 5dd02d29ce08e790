"""A few bytes of HTTP/2, enough to send gRPC servers what no client library would."""

from __future__ import annotations

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(path: str, **extra: str) -> bytes:
    """HPACK literals without indexing. Keyword `a__b` is the header `a-b`."""
    pairs = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "x",
        "te": "trailers",
        "content-type": "application/grpc",
    } | {name.replace("__", "-"): value for name, value in extra.items()}
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in pairs.items())


def _text(value: str) -> bytes:
    data = value.encode("latin-1")
    assert len(data) < 127
    return bytes([len(data)]) + data


def message(payload: bytes, *, length: int | None = None, compressed: int = 0) -> bytes:
    """gRPC's prefix and a payload; `length` may lie."""
    return bytes([compressed]) + struct.pack(">I", len(payload) if length is None else length) + payload


def call(path: str, body: bytes, **extra: str) -> bytes:
    """A connection's bytes with one call, half-closed."""
    start = PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, headers(path, **extra))
    return start + frame(DATA, END_STREAM, 1, body)


def exchange(address: str, data: bytes, seconds: float, until: bytes = b"grpc-status") -> tuple[bytes, bool]:
    """Sends and reads until the answer has `until` or the server closes. Returns bytes and whether it closed."""
    host, _, port = address.rpartition(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=seconds) as raw:
        try:
            raw.sendall(data)
            while until not in received or not until:
                chunk = raw.recv(65536)
                if not chunk:
                    return received, True
                received += chunk
        except TimeoutError:
            return received, False
        except OSError:
            return received, True
    return received, False
