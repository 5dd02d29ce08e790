"""A client that costs little: raw grpc.aio, requests serialised before, answers kept as bytes and read at the end.

    python load.py --address A --shape session|stream --requests N --tokens T --ticks FILE --out FILE.npy

FILE.npy: float64 [M, 4], a row per message: time it came (CLOCK_MONOTONIC), tokens in it, events in it, seconds since
the tick of its newest token. Fails when a request did not get all of its tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections import Counter
from typing import Any

import grpc.aio
import numpy as np
import uvloop
from google.protobuf.duration_pb2 import Duration
from mock_core import CYCLE
from octavo_proto.v1 import generation_pb2 as pb
from octavo_proto.v1 import types_pb2

PROMPT = list(range(100, 108))
OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
Message = tuple[float, float, bytes]
"""When it came, the time of the tick that had just been, the bytes."""


class Client:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._channel = grpc.aio.insecure_channel(options.address, options=OPTIONS)
        self._messages: list[tuple[float, int, bytes]] = []
        self._request = pb.GenerateRequest(
            prompts=[types_pb2.Prompt(token_ids=types_pb2.TokenIds(ids=PROMPT))],
            params=types_pb2.GenerationParams(max_new_tokens=options.tokens),
        )

    async def run(self) -> list[tuple[float, int, bytes]]:
        """(time, stream, bytes) of every message."""
        gc.disable()
        if self._options.shape == "session":
            await self._session()
        else:
            await asyncio.gather(*(self._stream(number) for number in range(self._options.requests)))
        gc.enable()
        await self._channel.close()
        return self._messages

    def _method(self, name: str) -> Any:
        return self._channel.stream_stream(f"/octavo.v1.GenerationService/{name}")

    async def _session(self) -> None:
        submits = []
        for tag in range(1, self._options.requests + 1):
            submit = pb.GenerateSessionRequest.Submit(tag=tag, request=self._request, timeout=Duration(seconds=290))
            submits.append(pb.GenerateSessionRequest(submit=submit).SerializeToString())
        call = self._method("GenerateSession")()
        reader = asyncio.create_task(self._read(call, 0))
        for raw in submits:
            await call.write(raw)
        await call.done_writing()
        await reader

    async def _stream(self, number: int) -> None:
        call = self._method("StreamGenerate")()
        await call.write(pb.StreamGenerateRequest(request=self._request).SerializeToString())
        await call.done_writing()
        await self._read(call, number)

    async def _read(self, call: Any, number: int) -> None:
        read, keep, clock = call.read, self._messages.append, time.monotonic
        while (raw := await read()) is not grpc.aio.EOF:
            keep((clock(), number, raw))


def rows(messages: list[tuple[float, int, bytes]], options: argparse.Namespace) -> np.ndarray[Any, Any]:
    times = np.memmap(options.ticks, "<f8", "r", shape=(CYCLE,))
    counts: Counter[tuple[int, int]] = Counter()
    table = np.zeros((len(messages), 4))
    for row, (came, number, raw) in enumerate(messages):
        newest, tokens, events = -1, 0, 0
        for tag, response in responses(raw, options.shape):
            events += 1
            for delta in response.deltas:
                tokens += len(delta.token_ids)
                counts[number, tag] += len(delta.token_ids)
                if delta.token_ids:
                    newest = delta.token_ids[-1]
        table[row] = came, tokens, events, came - times[newest] if newest >= 0 else np.nan
    assert len(counts) == options.requests, f"{len(counts)} of {options.requests} requests were answered"
    short = [count for count in counts.values() if count != options.tokens]
    assert not short, f"{len(short)} requests got {short[:5]}... tokens instead of {options.tokens}"
    return table


def responses(raw: bytes, shape: str) -> list[tuple[int, pb.StreamGenerateResponse]]:
    if shape == "stream":
        return [(0, pb.StreamGenerateResponse.FromString(raw))]
    events = pb.GenerateSessionResponse.FromString(raw).events
    for event in events:
        assert not event.HasField("error"), event.error
    return [(event.tag, event.response) for event in events]


async def run(options: argparse.Namespace) -> None:
    messages = await Client(options).run()
    np.save(options.out, rows(messages, options))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--shape", choices=["session", "stream"], required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--ticks", required=True)
    parser.add_argument("--out", required=True)
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
