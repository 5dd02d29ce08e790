"""The ceiling: a grpc.aio server that does nothing but write bytes of the front-end's sizes at the same ticks.

    python bare_server.py --shape session|stream --interval X --requests N --tokens T --ticks FILE

Prints its address. A session gets one message per tick, of `requests` events; a stream one message per tick. Whoever is
behind gets one message for all ticks that went by, as the front-end's slots merge. No request is parsed, nothing is
detokenized, no engine sends anything. Tokens are `tick number % CYCLE`, as in mock_core.py.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import grpc
import grpc.aio
import numpy as np
import uvloop
from mock_core import CYCLE
from octavo_proto.v1 import generation_pb2 as pb

TEXT = " tokens"


class BareServer:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._times = np.memmap(options.ticks, "<f8", "r+", shape=(CYCLE,))
        self._tick = 0
        self._next_tick: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrived = 0
        self._all_arrived = asyncio.Event()
        self._bodies: dict[tuple[int, int], bytes] = {}

    def add_request(self) -> None:
        self._arrived += 1
        if self._arrived == self._options.requests:
            self._all_arrived.set()

    async def tick(self) -> None:
        await self._all_arrived.wait()
        due = time.monotonic()
        for _ in range(self._options.tokens):
            due = max(due, time.monotonic() - self._options.interval) + self._options.interval
            await asyncio.sleep(due - time.monotonic())
            self._tick += 1
            self._times[self._tick % CYCLE] = time.monotonic()
            self._next_tick.set_result(None)
            self._next_tick = asyncio.get_running_loop().create_future()

    def body(self, first: int, last: int) -> bytes:
        """The message of the ticks first + 1 .. last: made once for all streams."""
        found = self._bodies.get((first, last))
        if found is None:
            ids = [tick % CYCLE for tick in range(first + 1, last + 1)]
            response = pb.StreamGenerateResponse(deltas=[pb.OutputDelta(text=TEXT * len(ids), token_ids=ids)])
            if self._options.shape == "session":
                events = [pb.GenerateSessionResponse.Event(tag=tag, response=response) for tag in self._tags()]
                found = pb.GenerateSessionResponse(events=events).SerializeToString()
            else:
                found = response.SerializeToString()
            self._bodies = {key: body for key, body in self._bodies.items() if key[1] >= last - 64} | {
                (first, last): found
            }
        return found

    def _tags(self) -> range:
        return range(1, self._options.requests + 1)

    async def session(self, requests: Any, context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            self.add_request()
        await self._write(context)

    async def stream(self, requests: Any, context: Any) -> None:
        await context.read()
        self.add_request()
        await self._write(context)

    async def _write(self, context: Any) -> None:
        sent = 0
        while sent < self._options.tokens:
            if sent == self._tick:
                await asyncio.shield(self._next_tick)
            first, sent = sent, self._tick
            await context.write(self.body(first, sent))


async def run(options: argparse.Namespace) -> None:
    bare = BareServer(options)
    server = grpc.aio.server()
    handlers = {
        "GenerateSession": grpc.stream_stream_rpc_method_handler(bare.session),
        "StreamGenerate": grpc.stream_stream_rpc_method_handler(bare.stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("octavo.v1.GenerationService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await bare.tick()
    await server.stop(30)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=["session", "stream"], required=True)
    parser.add_argument("--interval", type=float, required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--ticks", required=True)
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
