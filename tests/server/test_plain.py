"""The messages written by hand have the bytes that protobuf gives them."""

from __future__ import annotations

import itertools
import random

from octavo.server import plain
from octavo_proto.v1 import generation_pb2 as pb


def of_protobuf(tag: int, text: str, token_ids: list[int]) -> tuple[bytes, bytes]:
    """The StreamGenerateResponse, and the GenerateSessionResponse around it."""
    response = pb.StreamGenerateResponse(deltas=[pb.OutputDelta(text=text, token_ids=token_ids)])
    events = [pb.GenerateSessionResponse.Event(tag=tag, response=response)]
    return response.SerializeToString(), pb.GenerateSessionResponse(events=events).SerializeToString()


def test_around_every_length_at_which_a_varint_grows() -> None:
    tags = [0, 1, 127, 128, 16_384, 2**32, 2**64 - 1]
    sizes = [1, 2, *range(90, 130), 16_383, 16_400]
    for tag, size, num_ids in itertools.product(tags, sizes, [0, 1, 2, 130]):
        text, token_ids = "x" * size, [50_000] * num_ids
        stream, session = of_protobuf(tag, text, token_ids)
        assert plain.stream_response(text, token_ids) == stream
        assert plain.event(plain.event_tag(tag), text, token_ids) == session


def test_random_texts_and_ids() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice("aé€😀\x00") for _ in range(rng.randrange(60)))
        token_ids = [rng.choice([0, 1, 127, 128, 16_383, 16_384, 50_256, 2**31]) for _ in range(rng.randrange(4))]
        if not text and not token_ids:
            continue
        tag = rng.randrange(2**64)
        stream, session = of_protobuf(tag, text, token_ids)
        assert plain.stream_response(text, token_ids) == stream
        assert plain.event(plain.event_tag(tag), text, token_ids) == session


def test_nothing_new_is_no_message() -> None:
    assert plain.stream_response("", []) == b""
    assert plain.event(plain.event_tag(1), "", []) == b""
