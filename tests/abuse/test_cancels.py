"""Group D: deadlines and cancels, in every phase of a request and in all three shapes. Phases are held by gates."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from octavo.config import Limits
from octavo_proto.v1 import generation_pb2 as pb
from server.harness import Served, outcome, request, serving, stray_tasks, until

SHAPES = ["unary", "stream", "session"]
NS = [1, 4]


def message(n: int, new_tokens: int = 20, text: str = "x") -> pb.GenerateRequest:
    return request(text, max_new_tokens=new_tokens, do_sample=True, seed=1, num_return_sequences=n)


class Victim:
    """One RPC that will be cancelled."""

    def __init__(self, served: Served, shape: str, what: pb.GenerateRequest, **call: Any) -> None:
        generation = served.client.generation
        self.shape = shape
        if shape == "unary":
            self.call = generation.Generate(what, **call)
        elif shape == "stream":
            self.call = generation.StreamGenerate(pb.StreamGenerateRequest(request=what), **call)
        else:
            self.call = generation.GenerateSession(**call)
            self.first = pb.GenerateSessionRequest(submit=pb.GenerateSessionRequest.Submit(tag=1, request=what))

    async def start(self) -> None:
        if self.shape == "session":
            await self.call.write(self.first)

    async def first_message(self) -> None:
        if self.shape != "unary":
            await self.call.read()

    async def code(self) -> str:
        try:
            return str((await asyncio.wait_for(self.call.code(), 5)).name)
        except asyncio.CancelledError:
            return "CANCELLED"


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("shape", SHAPES)
class TestCancel:
    async def cancelled(self, served: Served, victim: Victim) -> None:
        victim.call.cancel()
        assert await victim.code() == "CANCELLED"
        await until(lambda: not served.core.running and not served.engine.num_inflight, "the request is still there")

    async def test_before_anything_was_sent(self, served: Served, shape: str, n: int) -> None:
        await self.cancelled(served, Victim(served, shape, message(n)))

    async def test_while_it_is_tokenized(
        self, served: Served, shape: str, n: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entered, leave = threading.Event(), threading.Event()
        original = served.engine._inputs.tokenize

        def tokenize(*args: Any) -> Any:
            entered.set()
            leave.wait(5)
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(served.engine._inputs, "tokenize", tokenize)
            victim = Victim(served, shape, message(n, text="word " * 600))  # long enough for a thread
            await victim.start()
            await until(entered.is_set, "tokenizing")
            try:
                await self.cancelled(served, victim)
            finally:
                leave.set()
        assert not served.core.added

    async def test_while_it_is_queued(self, served: Served, shape: str, n: int) -> None:
        served.core.hold()
        victim = Victim(served, shape, message(n))
        await victim.start()
        await served.core.arrived.wait()
        assert len(served.core.running) == n
        await self.cancelled(served, victim)
        assert len({key for key, _ in served.core.aborted}) == n

    async def test_in_the_middle(self, served: Served, shape: str, n: int) -> None:
        served.core.hold()
        victim = Victim(served, shape, message(n))
        await victim.start()
        await served.core.arrived.wait()
        for _ in range(3):
            served.core.step()
        await victim.first_message()
        served.core.step()
        await self.cancelled(served, victim)

    async def test_on_the_step_that_ends_it(self, served: Served, shape: str, n: int) -> None:
        served.core.hold()
        victim = Victim(served, shape, message(n, new_tokens=2))
        await victim.start()
        await served.core.arrived.wait()
        served.core.step()
        await victim.first_message()
        served.core.step()
        victim.call.cancel()
        assert await victim.code() in ("CANCELLED", "OK")
        await until(lambda: not served.engine.num_inflight, "the request is still there")

    async def test_after_its_last_message(self, served: Served, shape: str, n: int) -> None:
        victim = Victim(served, shape, message(n, new_tokens=1))
        await victim.start()
        if shape == "unary":
            await victim.call
        await victim.first_message()
        victim.call.cancel()
        assert await victim.code() in ("CANCELLED", "OK")

    async def test_others_are_not_touched(self, served: Served, shape: str, n: int) -> None:
        witness = message(2, text="witness")
        alone = await served.client.generation.Generate(witness)
        served.core.hold()
        served.core.arrived.clear()
        beside = asyncio.create_task(outcome(served.client.generation.Generate(witness)))
        await served.core.arrived.wait()
        victim = Victim(served, shape, message(n))
        await victim.start()
        await until(lambda: len(served.core.running) == 2 + n, "submitted")
        served.core.step()
        victim.call.cancel()
        await until(lambda: len(served.core.running) == 2, "the victim still runs")
        served.core.release()
        assert (await beside).result.completions == alone.completions


@pytest.mark.parametrize("shape", SHAPES)
class TestDeadline:
    @pytest.mark.parametrize("timeout", [-1.0, 0.0, 1e-6])
    async def test_65_past_deadlines_never_start(self, served: Served, shape: str, timeout: float) -> None:
        served.core.hold()
        victim = Victim(served, shape, message(1), timeout=timeout)
        assert await victim.code() == "DEADLINE_EXCEEDED"
        # A deadline that passes on the way in by microseconds reaches the core's queue, and with it the deadline.
        await until(lambda: not served.core.running, "still queued")
        assert not served.core.num_steps

    async def test_66_while_queued(self, served: Served, shape: str) -> None:
        served.core.hold()
        victim = Victim(served, shape, message(1), timeout=0.1)
        await victim.start()
        await served.core.arrived.wait()
        assert await victim.code() == "DEADLINE_EXCEEDED"
        await until(lambda: not served.core.running, "still queued")

    async def test_68_in_decode(self, served: Served, shape: str) -> None:
        served.core.hold()
        victim = Victim(served, shape, message(1), timeout=0.2)
        await victim.start()
        await served.core.arrived.wait()
        served.core.step()
        assert await victim.code() == "DEADLINE_EXCEEDED"
        await until(lambda: not served.core.running, "still running")

    async def test_69_a_deadline_in_ten_years_leaves_the_servers_own(self, shape: str) -> None:
        async with serving(limits=Limits(max_request_duration=0.05)) as served:
            served.core.hold()
            victim = Victim(served, shape, message(1), timeout=10 * 365 * 86_400)
            await victim.start()
            if shape == "session":
                event = (await victim.call.read()).events[0]
                assert (event.error.code, event.error.reason) == (4, "SERVER_MAX_DURATION")
                await victim.call.done_writing()
            else:
                assert await victim.code() == "DEADLINE_EXCEEDED"


async def test_deadlines_travel_to_the_core(served: Served) -> None:
    await served.client.generation.Generate(message(1), timeout=100)
    await served.client.generation.Generate(message(1))
    with_client, without = served.core.added
    assert with_client.deadline_is_client and not without.deadline_is_client
    assert with_client.deadline is not None and 90 < with_client.deadline - with_client.arrival_time < 101
    assert without.deadline is not None and 299 < without.deadline - without.arrival_time < 301


async def storm(served: Served, count: int, cancel_when: Callable[[int], int]) -> list[str]:
    """Starts `count` streams and cancels each after so many messages."""
    slots = asyncio.Semaphore(64)

    async def one(i: int) -> str:
        async with slots:
            victim = Victim(served, SHAPES[i % 3], message(NS[i % 2], new_tokens=40))
            await victim.start()
            # A session that is not half-closed has no end to read, and perhaps one message only.
            for _ in range(min(cancel_when(i), 1) if victim.shape == "session" else cancel_when(i)):
                await victim.first_message()
            victim.call.cancel()
            return await victim.code()

    return await asyncio.gather(*(one(i) for i in range(count)))


async def test_71_hundreds_of_cancels(served: Served) -> None:
    codes = await storm(served, 300, lambda i: i % 4)
    assert set(codes) <= {"CANCELLED", "OK"}
    await until(lambda: not stray_tasks() and not served.core.running, lambda: f"left: {stray_tasks()}")


@pytest.mark.slow
async def test_71_thousands_of_cancels(served: Served) -> None:
    assert set(await storm(served, 5000, lambda i: i % 4)) <= {"CANCELLED", "OK"}


async def test_80_clients_that_die_mid_stream(served: Served) -> None:
    served.core.hold()
    for _ in range(20):
        client = served.connect()
        call = client.generation.StreamGenerate(pb.StreamGenerateRequest(request=message(4)))
        await until(lambda: len(served.core.running) == 4, "submitted")
        served.core.step()
        await call.read()
        await client.channel.close()
        await until(lambda: not served.core.running, "a dead client's request still runs")


async def test_87_a_burst_of_calls_sees_no_cancelled(served: Served) -> None:
    calls = [outcome(served.client.generation.Generate(message(1, new_tokens=1))) for _ in range(500)]
    assert {found.code for found in await asyncio.gather(*calls)} == {"OK"}


@pytest.mark.slow
async def test_87_a_burst_of_thousands_is_served_or_shed(served: Served) -> None:
    calls = [outcome(served.client.generation.Generate(message(1, 1)), limit=60) for _ in range(4000)]
    assert {found.code for found in await asyncio.gather(*calls)} <= {"OK", "RESOURCE_EXHAUSTED"}


async def test_86_many_streams_on_one_connection(served: Served) -> None:
    served.core.hold()
    calls = [
        served.client.generation.StreamGenerate(pb.StreamGenerateRequest(request=message(1, 1))) for _ in range(400)
    ]
    await until(lambda: len(served.core.running) == 400, "all at once", limit=10)
    served.core.release()

    async def read(call: Any) -> int:
        return sum([1 async for _ in call])

    found = [await outcome(read(call)) for call in calls]
    assert {f.code for f in found} == {"OK"}
