"""The commonest messages of a stream, written by hand: one sequence's new text and ids, and nothing else.

protobuf's objects cost several times as much as these few bytes. The rules: a field is its tag (number * 8 + 2, for
what has a length), its length, its bytes; lengths and ids are varints; a field that is empty is left out.
`tests/server/test_plain.py` compares with protobuf's own serialisation.
"""

from __future__ import annotations

import functools


@functools.lru_cache(maxsize=1 << 17)
def varint(value: int) -> bytes:
    """`value` is not negative."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def _delta(text: bytes, token_ids: bytes) -> bytes:
    """An OutputDelta of sequence 0 of prompt 0."""
    delta = b"\x1a%b%b" % (varint(len(text)), text) if text else b""  # text = 3
    return delta + b"\x22%b%b" % (varint(len(token_ids)), token_ids) if token_ids else delta  # token_ids = 4


def stream_response(text: str, token_ids: list[int]) -> bytes:
    """A StreamGenerateResponse with one delta; nothing where both are empty."""
    delta = _delta(text.encode(), b"".join(map(varint, token_ids)))
    return b"\x22%b%b" % (varint(len(delta)), delta) if delta else b""  # deltas = 4


def event_tag(tag: int) -> bytes:
    """The first field of an Event of a GenerateSessionResponse."""
    return b"\x08%b" % varint(tag) if tag else b""  # tag = 1, a varint itself


def response_event(event_tag: bytes, response: bytes) -> bytes:
    """A GenerateSessionResponse with one Event, of a serialised StreamGenerateResponse."""
    event = b"%b\x12%b%b" % (event_tag, varint(len(response)), response)  # response = 2
    return b"\x0a%b%b" % (varint(len(event)), event)  # events = 1


def event(event_tag: bytes, text: str, token_ids: list[int]) -> bytes:
    """`response_event` of `stream_response`, at once where all lengths are single bytes; nothing if that is nothing."""
    data = text.encode()
    ids = varint(token_ids[0]) if len(token_ids) == 1 else b"".join(map(varint, token_ids))
    num_data, num_ids = len(data), len(ids)
    size = num_data + num_ids + 4
    if num_data and num_ids and size < 112:  # with tag and lengths still below 128
        return b"\x0a%c%b\x12%c\x22%c\x1a%c%b\x22%c%b" % (
            *(size + 4 + len(event_tag), event_tag, size + 2, size, num_data, data, num_ids, ids),
        )
    response = stream_response(text, token_ids)
    return response_event(event_tag, response) if response else b""
