"""What cannot be served is refused with one line and an exit status, and an impatient operator is obeyed."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from chaos.server_under_test import ServerUnderTest, engine_config, eventually, generate_when_up, kill, streams
from octavo.checkpoint import resolve

PICKLE = b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x03wte\x94]\x94s."
"""{"wte": []}"""


def refused(server: ServerUnderTest, timeout: float = 60.0) -> tuple[int, str]:
    """Exit status and the one line."""
    try:
        status = server.wait(timeout)
        lines = [line for line in server.stderr.splitlines() if line.startswith("octavo: ")]
        assert len(lines) == 1, server.stderr
        assert "Traceback" not in server.stderr
        assert not any(line.startswith("ready") for line in server.stdout)
        return status, lines[0]
    finally:
        server.close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(resolve("demo"), folder)
    return folder


@pytest.mark.parametrize("frontends", [1, 2])
def test_port_in_use_is_exit_2_within_a_second(frontends):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        server = ServerUnderTest(address=address, frontend_processes=frontends)
        status, line = refused(server)
        assert time.monotonic() - server.started < 5.0  # a second, and the start of an interpreter on a busy machine
        assert (status, line) == (2, f"octavo: {address}: address already in use")


def test_missing_checkpoint_is_exit_3():
    status, line = refused(ServerUnderTest(engine_config(path="./no/such/folder")))
    assert status == 3
    assert "no such folder" in line


def test_truncated_weights_are_exit_3(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    status, line = refused(ServerUnderTest(engine_config(path=str(checkpoint))))
    assert status == 3
    assert "model.safetensors" in line


async def test_a_core_that_cannot_be_replaced_at_first_is_tried_again(checkpoint):
    server = ServerUnderTest(engine_config(path=str(checkpoint))).wait_until_ready()
    try:
        weights = checkpoint / "model.safetensors"
        weights.rename(checkpoint / "away")
        kill(server.core_pid)
        await eventually(lambda: "cannot start" in server.stderr, 20)
        (checkpoint / "away").rename(weights)
        await generate_when_up(server.address, 30)
    finally:
        server.close()


def test_pickled_weights_are_refused_with_exit_3(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(PICKLE)
    status, line = refused(ServerUnderTest(engine_config(path=str(checkpoint))))
    assert status == 3
    assert "pickle" in line


def test_cuda_without_a_gpu_is_exit_4():
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    status, line = refused(ServerUnderTest(engine_config(device="cuda")))
    assert status == 4
    assert "cuda" in line.lower()


async def test_second_signal_ends_everything_within_three_seconds():
    server = ServerUnderTest(drain_timeout=60.0)
    try:
        await asyncio.to_thread(server.wait_until_ready)
        running = await streams(server.address, 2, 1000)
        server.terminate()
        await asyncio.sleep(0.3)
        assert server.process.poll() is None
        second_at = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        await asyncio.to_thread(server.wait, 3)
        assert time.monotonic() - second_at <= 3.0
        await asyncio.gather(*(stream.task for stream in running))
    finally:
        server.close()


def test_a_signal_while_loading_ends_it_within_three_seconds():
    server = ServerUnderTest()
    try:
        time.sleep(1.0)
        assert not server.address
        server.remember_tree()
        signalled_at = time.monotonic()
        server.terminate()
        assert server.wait(3) == 0
        assert time.monotonic() - signalled_at <= 3.0
    finally:
        server.close()
