"""One of two front-ends dies: the other one's streams do not notice, the core frees the rest. The supervisor dies."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
import urllib.request

import grpc
import psutil
import pytest
from chaos.server_under_test import (
    PROMPT,
    ServerUnderTest,
    Stream,
    eventually,
    generate,
    generate_when_up,
    get_load,
    kill,
)


@pytest.fixture(scope="module")
def server():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        metrics = f"127.0.0.1:{probe.getsockname()[1]}"
    server = ServerUnderTest(frontend_processes=2, metrics_address=metrics, watchdog=3.0)
    try:
        yield server.wait_until_ready()
    finally:
        server.close()


async def streams_on_both(server: ServerUnderTest, tokens: int) -> list[Stream]:
    """At least one running stream on each front-end, six in all."""
    running = [Stream(server.address, tokens) for _ in range(6)]
    for _ in range(10):
        for stream in running:
            await stream.started.wait()
        if all(connections(pid) for pid in server.frontend_pids):
            return running
        running.append(Stream(server.address, tokens))
    pytest.fail("the kernel gave all connections to one front-end")


def connections(pid: int) -> int:
    return sum(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process(pid).net_connections("tcp"))


def scrape(server: ServerUnderTest, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://{server.server.metrics_address}{path}", timeout=5) as reply:
        return reply.read().decode()


async def test_metrics_add_up_over_the_front_ends(server):
    served = await streams_on_both(server, 50)
    await asyncio.gather(*(stream.task for stream in served))

    def total() -> bool:
        text = scrape(server)
        return (
            f'octavo_request_success_total{{finished_reason="length"}} {float(len(served))}' in text
            and f"octavo_generation_tokens_total {50.0 * len(served)}" in text
            and "octavo_engine_up 1.0" in text
        )

    await eventually(lambda: asyncio.to_thread(total), 5.0)
    assert await asyncio.to_thread(scrape, server, "/healthz") == "ready\n"


async def test_killed_frontend_frees_its_requests_and_others_go_on_unchanged(server):
    solo = Stream(server.address, 250)
    await solo.task
    running = await streams_on_both(server, 250)
    core = server.core_pid
    victim, survivor = server.frontend_pids
    kill(victim)
    await asyncio.gather(*(stream.task for stream in running))
    lost = [stream for stream in running if stream.error is not None]
    kept = [stream for stream in running if stream.error is None]
    assert lost
    assert kept
    assert {stream.error.code() for stream in lost} == {grpc.StatusCode.UNAVAILABLE}
    assert {stream.text for stream in kept} == {solo.text}
    assert server.core_pid == core
    assert survivor in server.frontend_pids

    async def idle() -> bool:
        load = await get_load(server.address)
        return not (load.running_requests or load.waiting_requests or load.used_kv_blocks)

    await eventually(idle, 2.0)
    await eventually(lambda: len(server.frontend_pids) == 2, 5.0)


async def test_replaced_frontend_serves_again(server):
    async def both_serve() -> bool:
        await generate_when_up(server.address, 5)
        fresh = [Stream(server.address, 100) for _ in range(6)]
        for stream in fresh:
            await stream.started.wait()
        counts = [connections(pid) for pid in server.frontend_pids]
        await asyncio.gather(*(stream.task for stream in fresh))
        return len(counts) == 2 and all(counts) and all(stream.error is None for stream in fresh)

    await eventually(both_serve, 20.0)


async def test_stopped_frontend_is_replaced_by_the_watchdog(server):
    victim = server.frontend_pids[0]
    kill(victim, signal.SIGSTOP)
    await eventually(lambda: victim not in server.frontend_pids, 6.0)
    await eventually(lambda: len(server.frontend_pids) == 2, 5.0)
    assert "makes no progress" in server.stderr


async def test_killed_supervisor_takes_everything_with_it(server):
    stream = Stream(server.address, 900, prompt=PROMPT)
    await stream.started.wait()
    server.remember_tree()
    killed_at = time.monotonic()
    server.process.kill()
    server.wait(5)
    await eventually(lambda: not server.living(), 5.0)
    await stream.task
    assert stream.error is not None
    assert stream.error.code() == grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - killed_at < 5.0
    with pytest.raises(grpc.aio.AioRpcError):
        await generate(server.address)
