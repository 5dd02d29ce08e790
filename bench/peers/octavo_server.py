"""octavo over gRPC: `octavo serve` on this machine and octavo.client.

Modes: "stream" and "unary" make one call per prompt, all at once; "batch" one unary call with all prompts; "session"
sends all prompts over one stream, GenerateSession.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from typing import Any

import uvloop
import worker_loop
from octavo.client import AsyncClient

READY_TIMEOUT = 180.0


class OverGrpc:
    def __init__(self, options: worker_loop.Options) -> None:
        self.dtype = options.dtype
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        dtype = ["bfloat16", "--quantization", "int8"] if options.dtype == "int8" else [options.dtype]
        flags = [
            "--device",
            "cpu",
            "--num-threads",
            str(options.threads),
            "--no-enable-prefix-caching",
            "--dtype",
            *dtype,
        ]
        self._server = subprocess.Popen(
            [sys.executable, "-m", "octavo.cli", "serve", str(options.checkpoint), "--address", address, *flags],
            stdin=subprocess.DEVNULL,
        )
        self._loop = uvloop.new_event_loop()
        self._loop.run_until_complete(self._connect(address))

    async def _connect(self, address: str) -> None:
        self._client = AsyncClient(address)
        ready = asyncio.ensure_future(self._client.wait_until_ready(READY_TIMEOUT))
        while not ready.done():
            await asyncio.wait([ready], timeout=1.0)
            if self._server.poll() is not None:
                raise RuntimeError(f"octavo serve ended with status {self._server.returncode}")
        ready.result()

    def run(self, prompts: list[list[int]], new_tokens: int, mode: str) -> tuple[float, list[list[int]]]:
        return self._loop.run_until_complete(self._run(prompts, mode, max_new_tokens=new_tokens, ignore_eos=True))

    async def _run(self, prompts: list[list[int]], mode: str, **params: Any) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        if mode == "batch":
            outputs = await self._client.generate(prompts, **params)
        elif mode == "unary":
            outputs = await asyncio.gather(*(self._client.generate(prompt, **params) for prompt in prompts))
        elif mode == "session":
            async with self._client.multiplex() as session:
                outputs = await asyncio.gather(*(streamed(session.stream(prompt, **params)) for prompt in prompts))
        else:
            outputs = await asyncio.gather(*(streamed(self._client.stream(prompt, **params)) for prompt in prompts))
        seconds = time.perf_counter() - begin
        return seconds, [output if isinstance(output, list) else list(output.token_ids) for output in outputs]

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        worker_loop.stop(self._server)


async def streamed(call: Any) -> list[int]:
    token_ids: list[int] = []
    async with call as stream:
        async for delta in stream:
            token_ids += delta.token_ids
    return token_ids


if __name__ == "__main__":
    worker_loop.serve(OverGrpc, "octavo", "grpcio", "torch")
