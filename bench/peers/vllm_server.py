"""vLLM's gRPC server (`vllm serve --grpc`) on this machine, one Generate call per prompt, all at once.

With mode "stream@N" or "unary@N" N callers with one request at a time each.

Its service takes and gives token ids; octavo's gives text besides.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time

import grpc
import vllm_environment
import worker_loop
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc
from worker_loop import NewTokens

START = "import sys; from vllm.entrypoints.cli.main import main; sys.argv[0] = 'vllm'; main()"
READY_TIMEOUT = 300.0


class OverGrpc:
    def __init__(self, options: worker_loop.Options) -> None:
        self.dtype = options.dtype
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = ["--grpc", "--host", "127.0.0.1", "--port", str(port), "--dtype", options.dtype]
        flags += ["--max-model-len", "1024", "--no-enable-prefix-caching", "--disable-log-stats"]
        if options.kv_gib and options.device == "cuda":
            flags += ["--kv-cache-memory-bytes", str(options.kv_gib << 30)]
        if options.max_requests:
            flags += ["--max-num-seqs", str(options.max_requests)]
        self._server = subprocess.Popen(
            [sys.executable, "-c", START, "serve", str(options.checkpoint), *flags],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **vllm_environment.variables(options)},
        )
        self._loop = asyncio.new_event_loop()
        self._count = 0
        self._loop.run_until_complete(self._connect(port))

    async def _connect(self, port: int) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._stub = vllm_engine_pb2_grpc.VllmEngineStub(self._channel)
        deadline = time.monotonic() + READY_TIMEOUT
        while True:
            try:
                await self._stub.HealthCheck(vllm_engine_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
                return
            except grpc.RpcError:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    worker_loop.stop(self._server)
                    raise RuntimeError("vLLM's gRPC server did not start") from None

    def run(self, prompts: list[list[int]], new_tokens: NewTokens, mode: str) -> tuple[float, list[list[int]]]:
        kind, _, concurrency = mode.partition("@")
        at_once = int(concurrency or len(prompts))
        return self._loop.run_until_complete(self._run(prompts, new_tokens, kind == "stream", at_once))

    async def _run(
        self, prompts: list[list[int]], new_tokens: NewTokens, stream: bool, at_once: int
    ) -> tuple[float, list[list[int]]]:
        async def one(prompt: list[int], length: int) -> list[int]:
            self._count += 1
            params = vllm_engine_pb2.SamplingParams(
                temperature=0.0, top_p=1.0, repetition_penalty=1.0, max_tokens=length, ignore_eos=True, n=1
            )
            request = vllm_engine_pb2.GenerateRequest(
                request_id=f"bench-{self._count}",
                tokenized=vllm_engine_pb2.TokenizedInput(input_ids=prompt),
                sampling_params=params,
                stream=stream,
            )
            token_ids: list[int] = []
            async for response in self._stub.Generate(request):
                if response.HasField("chunk"):
                    token_ids += response.chunk.token_ids
                elif not stream:
                    token_ids += response.complete.output_ids
            return token_ids

        calls = list(zip(prompts, worker_loop.lengths(prompts, new_tokens), strict=True))
        results: list[list[int]] = [[] for _ in calls]
        left = iter(range(len(calls)))

        async def caller() -> None:
            for i in left:
                results[i] = await one(*calls[i])

        begin = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(min(at_once, len(calls)))))
        return time.perf_counter() - begin, results

    def close(self) -> None:
        self._loop.run_until_complete(self._channel.close())
        worker_loop.stop(self._server)


if __name__ == "__main__":
    worker_loop.serve(OverGrpc, "vllm", "smg-grpc-servicer", "grpcio")
