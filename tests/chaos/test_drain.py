"""Shutting down in order: health first, then a delay, then refusals; what runs too long is told why."""

from __future__ import annotations

import asyncio
import contextlib
import time

import grpc
from chaos.server_under_test import ServerUnderTest, eventually, generate, kill, reason_of, streams
from grpc_health.v1 import health_pb2, health_pb2_grpc
from octavo_proto.v1 import control_pb2, control_pb2_grpc

SERVICE = "octavo.v1.GenerationService"


@contextlib.asynccontextmanager
async def running(**config):
    server = ServerUnderTest(**config)
    try:
        await asyncio.to_thread(server.wait_until_ready)
        yield server
    finally:
        await asyncio.to_thread(server.close)


async def is_ready(address: str, service: str = SERVICE) -> bool:
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
        return reply.status == health_pb2.HealthCheckResponse.SERVING


async def refusal(address: str) -> str:
    try:
        await generate(address, 1)
    except grpc.aio.AioRpcError as error:
        return reason_of(error)
    return ""


async def test_sigterm_turns_health_waits_refuses_and_fails_what_runs_too_long():
    async with running(drain_delay=1.0, drain_timeout=2.0) as server:
        assert await is_ready(server.address)
        long = await streams(server.address, 24, 1000)
        server.terminate()
        signalled_at = time.monotonic()

        async def not_ready() -> bool:
            return not await is_ready(server.address)

        await eventually(not_ready, 0.8)
        assert await is_ready(server.address, "")  # a liveness probe must not kill a draining server
        assert await refusal(server.address) == ""  # balancers learn late: still taken

        async def refused() -> bool:
            return await refusal(server.address) == "DRAINING"

        await eventually(refused, 1.5)
        await asyncio.gather(*(stream.task for stream in long))
        assert {stream.reason for stream in long} <= {"DRAINING", ""}
        assert "DRAINING" in {stream.reason for stream in long}
        assert await asyncio.to_thread(server.wait, 10) == 0
        assert time.monotonic() - signalled_at <= 1.0 + 2.0 + 2.0


async def test_an_operator_drains_undoes_and_shuts_down():
    async with running() as server:
        admin = grpc.aio.insecure_channel(f"unix:{server.run_directory}/admin.sock")
        control = control_pb2_grpc.ControlServiceStub(admin)
        stream, *_ = await streams(server.address, 1, 200)
        reply = await control.Drain(control_pb2.DrainRequest(), timeout=30)
        await stream.task
        assert stream.error is None
        assert reply.finished_requests == 1
        assert await refusal(server.address) == "DRAINING"
        await control.Drain(control_pb2.DrainRequest(undo=True), timeout=5)
        assert await generate(server.address, 4)
        await control.Drain(control_pb2.DrainRequest(shutdown=True), timeout=30)
        await admin.close()
        assert await asyncio.to_thread(server.wait, 10) == 0


def test_a_core_that_keeps_dying_ends_the_server_with_exit_1():
    server = ServerUnderTest()
    try:
        deadline = time.monotonic() + 30.0
        killed: set[int] = set()
        while server.process.poll() is None:
            assert time.monotonic() < deadline
            for pid in set(server.core_pids) - killed:
                killed.add(pid)
                kill(pid)
            time.sleep(0.05)
        assert server.wait(1) == 1
        assert len(killed) == 4
        assert "giving up" in server.stderr
    finally:
        server.close()
