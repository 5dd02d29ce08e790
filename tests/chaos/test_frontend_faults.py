"""One of two front-ends dies: the other one's streams do not notice, the core frees the rest. The supervisor dies."""

from __future__ import annotations

import asyncio
import time

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
    server = ServerUnderTest(frontend_processes=2)
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


async def test_killed_frontend_frees_its_requests_and_others_go_on_unchanged(server):
    solo = Stream(server.address, 600)
    await solo.task
    running = await streams_on_both(server, 600)
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
