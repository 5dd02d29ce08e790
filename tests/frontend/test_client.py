"""ZmqClient against sockets that stand in for a core: order, a full queue, a core that goes, garbage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from frontend.fakes import demo, outputs, request
from octavo.config import Limits
from octavo.errors import Reason, RequestError
from octavo.frontend.client import ZmqClient
from octavo.frontend.input_processor import InputProcessor
from octavo.ipc import (
    MAX_FRAME,
    AbortCause,
    AbortSequences,
    AddRequests,
    EngineCoreRequest,
    PrefixCacheReset,
    ResetPrefixCache,
    ToCore,
    ToFrontend,
)


class Core:
    """The core's two sockets, by hand."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, frontend: str) -> None:
        self.address = address
        self.pull = context.socket(zmq.PULL)
        self.pull.setsockopt(zmq.RCVHWM, 1)
        self.pull.bind(address)
        self.push = context.socket(zmq.PUSH)
        self.push.connect(frontend)

    def receive(self) -> ToCore:
        assert self.pull.poll(2000), "nothing came"
        return msgspec.msgpack.decode(self.pull.recv(), type=ToCore)

    def send(self, message: ToFrontend) -> None:
        self.push.send(msgspec.msgpack.encode(message))

    def close(self) -> None:
        self.pull.close(linger=0)
        self.push.close(linger=0)


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.term()


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[ZmqClient]:
    client = ZmqClient(3, f"ipc://{tmp_path}/f3", send_queue=1)
    yield client
    client.close()


@pytest.fixture
def core(client: ZmqClient, context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> Iterator[Core]:
    core = Core(context, f"ipc://{tmp_path}/core", f"ipc://{tmp_path}/f3")
    client.connect(core.address)
    yield core
    core.close()


def requests() -> list[EngineCoreRequest]:
    return InputProcessor(demo(), Limits(), cache_secret=b"").process(request("a", "b"), arrival_time=1.0).core_requests


async def test_requests_and_aborts_arrive_as_they_were_sent(client: ZmqClient, core: Core) -> None:
    sent = requests()
    client.add(sent)
    assert core.receive() == AddRequests(3, sent)
    client.abort([1, 2], AbortCause.STOP_STRING)
    assert core.receive() == AbortSequences(3, [1, 2], AbortCause.STOP_STRING)


async def test_many_messages_are_handled_in_order(client: ZmqClient, core: Core) -> None:
    steps: list[int] = []
    done = asyncio.Event()

    def on_message(message: ToFrontend) -> None:
        steps.append(int.from_bytes(message.keys[:8], "little"))  # type: ignore[union-attr]
        if len(steps) == 300:
            done.set()

    client.on_message = on_message
    for key in range(300):
        core.send(outputs((key, 1, 0)))
    await asyncio.wait_for(done.wait(), 5)
    assert steps == list(range(300))


async def test_full_queue_refuses_requests_at_once_and_keeps_aborts_for_later(client: ZmqClient, core: Core) -> None:
    big = [msgspec.structs.replace(requests()[0], prompt_token_ids=bytes(1 << 20))]
    sent = 0

    def fill() -> None:
        nonlocal sent
        while sent < 200:
            client.add(big)
            sent += 1

    with pytest.raises(RequestError) as caught:
        fill()
    assert caught.value.reason is Reason.QUEUE_FULL
    client.abort([7], AbortCause.CLIENT)
    loop = asyncio.get_running_loop()

    received = await loop.run_in_executor(None, lambda: [core.receive() for _ in range(sent + 1)])
    assert received[-1] == AbortSequences(3, [7], AbortCause.CLIENT)
    client.add(big)


async def test_a_request_larger_than_a_message_may_be_is_refused_and_the_line_lives_on(
    client: ZmqClient, core: Core
) -> None:
    with pytest.raises(RequestError) as caught:
        client.add([msgspec.structs.replace(requests()[0], prompt_token_ids=bytes(MAX_FRAME))])
    assert caught.value.reason is Reason.REQUEST_TOO_LARGE
    client.add(requests())
    assert core.receive() == AddRequests(3, requests())


async def test_prefix_cache_reset_is_answered_or_fails_with_the_core(client: ZmqClient, core: Core) -> None:
    reset = asyncio.ensure_future(client.reset_prefix_cache())
    await asyncio.sleep(0)
    message = core.receive()
    assert isinstance(message, ResetPrefixCache)
    core.send(PrefixCacheReset(message.call_id, 5))
    assert await asyncio.wait_for(reset, 2) == 5
    reset = asyncio.ensure_future(client.reset_prefix_cache())
    await asyncio.sleep(0)
    client.disconnect()
    for awaitable in (reset, client.reset_prefix_cache()):
        with pytest.raises(RequestError) as caught:
            await awaitable
        assert caught.value.reason is Reason.ENGINE_RESTARTED
    with pytest.raises(RequestError):
        client.add(requests())
    client.abort([1], AbortCause.CLIENT)


async def test_next_core_at_another_address_gets_what_is_sent_then(
    client: ZmqClient, core: Core, context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    client.disconnect()
    second = Core(context, f"ipc://{tmp_path}/core2", f"ipc://{tmp_path}/f3")
    client.connect(second.address)
    client.add(requests())
    assert isinstance(second.receive(), AddRequests)
    second.close()


async def test_garbage_is_told_and_the_line_lives_on(client: ZmqClient, core: Core) -> None:
    broken, fine = asyncio.Event(), asyncio.Event()
    client.on_broken = broken.set
    client.on_message = lambda message: fine.set()
    for garbage in (b"", b"\xc1", msgspec.msgpack.encode({"type": "unknown"}), msgspec.msgpack.encode([1, 2])):
        broken.clear()
        core.push.send(garbage)
        await asyncio.wait_for(broken.wait(), 2)
    core.send(outputs((1, 1, 0)))
    await asyncio.wait_for(fine.wait(), 2)
