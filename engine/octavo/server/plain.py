"""The commonest messages of a stream, written by hand: one sequence's new text and ids, and nothing else.

protobuf's objects cost several times as much as these few bytes. The rules: a field is its tag (number * 8 + 2, for
what has a length), its length, its bytes; lengths and ids are varints; a field that is empty is left out.
`tests/server/test_plain.py` compares with protobuf's own serialisation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable


@functools.lru_cache(maxsize=1 << 17)
def varint(value: int) -> bytes:
    """`value` is not negative."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def stream_response(text: str, token_ids: list[int]) -> bytes:
    """A StreamGenerateResponse with one OutputDelta, of sequence 0 of prompt 0. Something of it is not empty."""
    delta = b""
    if text:
        data = text.encode()
        delta = b"\x1a%b%b" % (varint(len(data)), data)  # text = 3
    if token_ids:
        data = varint(token_ids[0]) if len(token_ids) == 1 else b"".join(map(varint, token_ids))
        delta += b"\x22%b%b" % (varint(len(data)), data)  # token_ids = 4
    return b"\x22%b%b" % (varint(len(delta)), delta)  # deltas = 4


def event_tag(tag: int) -> bytes:
    """The first field of an Event of a GenerateSessionResponse."""
    return b"\x08%b" % varint(tag) if tag else b""  # tag = 1, a varint itself


def response_event(event_tag: bytes, response: bytes) -> bytes:
    """An Event with a serialised StreamGenerateResponse."""
    return b"%b\x12%b%b" % (event_tag, varint(len(response)), response)  # response = 2


def session_response(events: Iterable[bytes]) -> bytes:
    """A GenerateSessionResponse of serialised Events."""
    return b"".join([b"\x0a%b%b" % (varint(len(event)), event) for event in events])  # events = 1
