"""The ceiling: a grpc.aio server that does nothing but write bytes of the front-end's sizes at the same ticks.

    python bare_server.py --shape session|stream --interval X --requests N --tokens T --ticks FILE

Prints its address. A session gets one message per tick, of `requests` events; a stream one message per tick. Whoever is
behind gets the messages of all ticks that went by as one, as the front-end's slots merge. No request is parsed, nothing
is detokenized, no engine sends anything, and all messages are made before the first tick. Tokens are
`tick number % CYCLE`, as in mock_core.py.
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
        self._bodies = [self._body(tick) for tick in range(1, options.tokens + 1)]

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

    def _body(self, tick: int) -> bytes:
        response = pb.StreamGenerateResponse(deltas=[pb.OutputDelta(text=TEXT, token_ids=[tick % CYCLE])])
        if self._options.shape == "stream":
            return response.SerializeToString()
        tags = range(1, self._options.requests + 1)
        events = [pb.GenerateSessionResponse.Event(tag=tag, response=response) for tag in tags]
        return pb.GenerateSessionResponse(events=events).SerializeToString()

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
            bodies, sent = self._bodies[sent : self._tick], self._tick
            await context.write(bodies[0] if len(bodies) == 1 else b"".join(bodies))


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
