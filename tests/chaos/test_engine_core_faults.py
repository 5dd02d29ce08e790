"""The engine core dies or hangs: calls end at once with a reason, the server heals, front-ends stay. Then a drain."""

from __future__ import annotations

import asyncio
import signal
import time

import grpc
import pytest
import zmq
from chaos.server_under_test import ServerUnderTest, eventually, generate, generate_when_up, get_load, kill, streams


@pytest.fixture(scope="module")
def server():
    server = ServerUnderTest(watchdog=3.0, drain_timeout=60.0)
    try:
        yield server.wait_until_ready()
    finally:
        server.close()


async def holds_nothing(server: ServerUnderTest) -> bool:
    load = await get_load(server.address)
    return not (load.running_requests or load.waiting_requests or load.used_kv_blocks)


async def test_start_up_says_what_it_does_and_ends_in_one_ready_line(server):
    assert server.stdout[-1] == f"ready on {server.address}: demo, float32, cpu, 2048 blocks of 16"
    assert len(server.stdout) > 1
    assert await generate(server.address)
    assert server.stdout[-1].startswith("ready on ")  # and is quiet from then on
    assert server.stderr == ""


async def test_an_idle_server_does_not_poll(server):
    await asyncio.sleep(0.5)
    before = server.cpu_time()
    await asyncio.sleep(2.0)
    assert server.cpu_time() - before < 0.1


async def test_garbage_on_the_data_socket_costs_only_itself(server):
    core = server.core_pid
    stream, *_ = await streams(server.address, 1, 300)
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(f"ipc://{server.run_directory}/core-0.sock")
        for frame in [b"", b"garbage", b"\x81\xa4type\xa3add", b"\xff" * 1000, b"\x91" * 100_000]:
            socket.send(frame)
        await stream.task
    assert stream.error is None
    assert server.core_pid == core
    assert "dropped a message" in server.stderr


async def test_killed_core_fails_its_streams_within_a_second_and_is_replaced(server):
    before = server.frontend_pids
    solo = await generate(server.address, 200)
    running = await streams(server.address, 8, 900)
    old_core = server.core_pid
    killed_at = time.monotonic()
    kill(old_core)
    await asyncio.gather(*(stream.task for stream in running))
    for stream in running:
        assert stream.error is not None
        assert stream.error.code() == grpc.StatusCode.UNAVAILABLE
        assert stream.reason == "ENGINE_RESTARTED"
        assert stream.ended_at - killed_at <= 1.0
        assert stream.text[:100] == solo[: len(stream.text)][:100]
    text, reasons = await generate_when_up(server.address, 20, 200)
    assert text == solo
    assert set(reasons) <= {"ENGINE_RESTARTED"}
    assert server.core_pid != old_core
    assert server.frontend_pids == before


async def test_killed_only_frontend_comes_back_on_its_port_and_the_core_forgets_its_requests(server):
    core, (frontend,) = server.core_pid, server.frontend_pids
    running = await streams(server.address, 2, 900)
    kill(frontend)
    await asyncio.gather(*(stream.task for stream in running))
    assert {stream.error.code() for stream in running} == {grpc.StatusCode.UNAVAILABLE}
    await generate_when_up(server.address, 10)
    assert server.core_pid == core
    await eventually(lambda: holds_nothing(server), 2.0)  # reports come every 0.1 s; 900 tokens take longer


async def test_stopped_core_is_replaced_by_the_watchdog_with_its_stacks_in_the_log(server):
    old_core = server.core_pid
    running = await streams(server.address, 2, 900)
    stopped_at = time.monotonic()
    kill(old_core, signal.SIGSTOP)
    await asyncio.gather(*(stream.task for stream in running))
    for stream in running:
        assert stream.reason == "ENGINE_RESTARTED"
        assert 2.0 <= stream.ended_at - stopped_at <= 6.0
    await generate_when_up(server.address, 60)
    assert server.core_pid != old_core
    assert "makes no progress" in server.stderr
    assert "most recent call first" in server.stderr


async def test_core_holds_nothing_after_all_that(server):
    await eventually(lambda: holds_nothing(server), 2.0)


async def test_sigterm_lets_running_generations_finish_and_refuses_new_ones(server):
    running = await streams(server.address, 8, 400)
    server.terminate()

    async def refused() -> bool:
        try:
            await generate(server.address, 1)
        except grpc.aio.AioRpcError as error:
            return error.code() == grpc.StatusCode.UNAVAILABLE
        return False

    await eventually(refused, 2.0)
    await asyncio.gather(*(stream.task for stream in running))
    assert [stream.error for stream in running] == [None] * 8
    assert len({stream.text for stream in running}) == 1
    assert server.wait(10) == 0
