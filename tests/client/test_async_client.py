"""The asyncio client and its multiplexed session against a fake server."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from client.fake_server import FakeServer, Refusal, reason
from octavo.client import AsyncClient, Cancelled, Overloaded, Unavailable


async def until(condition: object) -> None:
    for _ in range(500):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


async def test_generate_and_stream_agree(aclient: AsyncClient) -> None:
    out = await aclient.generate("one two three", request_id="same")
    async with aclient.stream("one two three", request_id="same") as stream:
        texts = [delta.text async for delta in stream]
        assert (await stream.response()).outputs[0][0] == out
    assert "".join(texts) == out.text == " three two one"
    async with aclient.stream(["a", "b"], n=2) as stream:
        response = await stream.response()
    assert [[item.text for item in outs] for outs in response.outputs] == [[" a", " a"], [" b", " b"]]


async def test_leaving_a_stream_cancels_it(aclient: AsyncClient, server: FakeServer) -> None:
    async with aclient.stream("forever") as stream:
        async for _ in stream:
            break
    await until(server.cancelled.is_set)


async def test_cancelled_task_cancels_its_request(aclient: AsyncClient, server: FakeServer) -> None:
    task = asyncio.create_task(aclient.generate("forever"))
    await until(lambda: server.requests)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(server.cancelled.is_set)


async def test_timeout_around_a_call_is_a_timeout(aclient: AsyncClient, server: FakeServer) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await aclient.generate("forever")
    await until(server.cancelled.is_set)


async def test_closing_the_client_fails_its_calls_without_cancelling_their_tasks(server: FakeServer) -> None:
    client = AsyncClient(server.address)
    task = asyncio.create_task(client.generate("forever"))
    await until(lambda: server.requests)
    await client.close()
    with pytest.raises((Cancelled, Unavailable)):
        await task


async def test_refusal_is_retried_after_its_push_back(aclient: AsyncClient, server: FakeServer) -> None:
    server.refusals.append(Refusal(grpc.StatusCode.UNAVAILABLE, "busy", reason("ENGINE_RESTARTED"), pushback_ms=50))
    assert (await aclient.generate("a")).text == " a"
    assert len(server.requests) == 2


async def test_small_calls(aclient: AsyncClient) -> None:
    assert await aclient.tokenize("one") == [3]
    assert await aclient.detokenize([[1]]) == ["1"]
    assert (await aclient.model()).model == "fake"
    assert (await aclient.info()).device == "cpu"
    assert (await aclient.load()).running_requests == 3
    assert [load.running_requests async for load in aclient.watch_load()] == [0, 1]
    assert (await aclient.abort("a")).aborted_requests == 1
    assert (await aclient.drain(undo=True)).finished_requests == 5
    assert await aclient.reset_prefix_cache() == 9
    assert await aclient.health() == "SERVING"
    async for status in aclient.watch_health():
        assert status == "SERVING"
        break
    await aclient.wait_until_ready(5)


async def test_session_runs_many_requests_on_one_stream(aclient: AsyncClient, server: FakeServer) -> None:
    async with aclient.multiplex() as session:
        prompts = [f"one two {index}" for index in range(50)]
        outs = await asyncio.gather(*(session.generate(prompt, seed=1) for prompt in prompts))
        async with session.stream("a b") as stream:
            assert [delta.text async for delta in stream] == [" b", " a"]
    assert [out.text for out in outs] == [f" {index} two one" for index in range(50)]
    assert server.sessions == 1


async def test_session_request_fails_alone(aclient: AsyncClient) -> None:
    async with aclient.multiplex() as session:
        good, bad = await asyncio.gather(
            session.generate("a"), session.generate("refuse", request_id="mine"), return_exceptions=True
        )
        assert good.text == " a"
        assert isinstance(bad, Overloaded)
        assert (bad.reason, bad.retry_after, bad.request_id) == ("QUEUE_FULL", 2.0, "mine")
        assert (await session.generate("b")).text == " b"


async def test_leaving_a_session_stream_cancels_that_request_only(aclient: AsyncClient, server: FakeServer) -> None:
    async with aclient.multiplex() as session:
        async with session.stream("forever") as stream:
            async for _ in stream:
                break
        await until(server.cancelled.is_set)
        assert server.session_cancels == [1]
        task = asyncio.create_task(session.generate("forever"))
        await until(lambda: len(server.requests) == 2)
        task.cancel()
        await until(lambda: server.session_cancels == [1, 2])
        assert (await session.generate("b")).text == " b"
    assert server.sessions == 1


async def test_leaving_a_session_cancels_what_runs(aclient: AsyncClient, server: FakeServer) -> None:
    async with aclient.multiplex() as session:
        task = asyncio.create_task(session.generate("forever"))
        await until(lambda: server.requests)
    with pytest.raises(Cancelled):
        await task
    await until(server.cancelled.is_set)


async def test_broken_session_fails_what_runs_and_opens_anew(aclient: AsyncClient, server: FakeServer) -> None:
    async with aclient.multiplex() as session:
        assert (await session.generate("a")).text == " a"
        server.break_session = True
        with pytest.raises(Unavailable):
            await session.generate("b")
        assert (await session.generate("c")).text == " c"
    assert server.sessions == 2
