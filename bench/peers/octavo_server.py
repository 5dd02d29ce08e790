"""octavo over gRPC: `octavo serve` on this machine and octavo.client.

Modes: "stream" and "unary" make one call per prompt, all at once; "batch" one unary call with all prompts; "session"
sends all prompts over one stream, GenerateSession. "stream@N", "unary@N" and "session@N" are closed loops: N callers,
each with one request at a time.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop
import worker_loop
from octavo.client import AsyncClient
from worker_loop import NewTokens

READY_TIMEOUT = 180.0
OWN_TYPES = {
    "int8": ["bfloat16", "--quantization", "int8"],
    "bound": ["bfloat16", "--cpu-cores", "auto"],
}
"""What is called a dtype here and is none of the model's, and the flags for it after --dtype."""


class OverGrpc:
    def __init__(self, options: worker_loop.Options) -> None:
        self.dtype = options.dtype
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        dtype = OWN_TYPES.get(options.dtype, [options.dtype])
        flags = [
            "--device",
            options.device,
            "--num-threads",
            str(options.threads),
            "--no-enable-prefix-caching",
            "--max-queue-time",
            "300",  # a load that is handed over at once waits as long as it takes
            "--dtype",
            *dtype,
        ]
        if options.kv_gib:
            flags += ["--kv-cache-memory", str(options.kv_gib << 30)]
        if options.max_requests:
            flags += ["--max-num-requests", str(options.max_requests)]
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

    def run(self, prompts: list[list[int]], new_tokens: NewTokens, mode: str) -> tuple[float, list[list[int]]]:
        kind, _, concurrency = mode.partition("@")
        at_once = int(concurrency or len(prompts))
        return self._loop.run_until_complete(self._run(prompts, new_tokens, kind, at_once))

    async def _run(
        self, prompts: list[list[int]], new_tokens: NewTokens, kind: str, at_once: int
    ) -> tuple[float, list[list[int]]]:
        calls = list(zip(prompts, worker_loop.lengths(prompts, new_tokens), strict=True))

        def params(length: int) -> dict[str, Any]:
            return {"max_new_tokens": length, "ignore_eos": True}

        begin = time.perf_counter()
        outputs: list[Any]
        if kind == "batch":
            if not isinstance(new_tokens, int):
                raise ValueError("a batch call has one length for all its prompts")
            outputs = await self._client.generate(prompts, **params(new_tokens))
        elif kind == "unary":
            outputs = await closed_loop(calls, at_once, lambda p, n: self._client.generate(p, **params(n)))
        elif kind == "session":
            async with self._client.multiplex() as session:
                outputs = await closed_loop(calls, at_once, lambda p, n: streamed(session.stream(p, **params(n))))
        else:
            outputs = await closed_loop(calls, at_once, lambda p, n: streamed(self._client.stream(p, **params(n))))
        seconds = time.perf_counter() - begin
        return seconds, [output if isinstance(output, list) else list(output.token_ids) for output in outputs]

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        worker_loop.stop(self._server)


async def closed_loop(
    calls: list[tuple[list[int], int]], at_once: int, call: Callable[[list[int], int], Awaitable[Any]]
) -> list[Any]:
    """Answers of all calls, in order; `at_once` of them run at any time while there are as many left."""
    results: list[Any] = [None] * len(calls)
    left = iter(range(len(calls)))

    async def caller() -> None:
        for i in left:
            results[i] = await call(*calls[i])

    await asyncio.gather(*(caller() for _ in range(min(at_once, len(calls)))))
    return results


async def streamed(call: Any) -> list[int]:
    token_ids: list[int] = []
    async with call as stream:
        async for delta in stream:
            token_ids += delta.token_ids
    return token_ids


if __name__ == "__main__":
    worker_loop.serve(OverGrpc, "octavo", "grpcio", "torch")
