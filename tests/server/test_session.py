"""GenerateSession's writer: what it takes, when, in which order, and what a request's failure there costs others."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from octavo.errors import Reason
from octavo.frontend.request_state import RequestState
from octavo.server.rpc import Call
from octavo_proto.v1 import generation_pb2 as pb
from server.harness import Served, drain, request, stream_request, until
from server.test_generation import SessionClient, by_sequence

TOKENS = 12


def tasks_of_requests() -> int:
    return sum(task.get_name() == "octavo session request" for task in asyncio.all_tasks())


async def running(served: Served, session: SessionClient, **requests: pb.GenerateRequest) -> None:
    """Submits tag 1, 2, ... and waits until all of them run; no step is made."""
    served.core.hold()
    for tag, what in enumerate(requests.values(), 1):
        await session.submit(tag, what)
    await until(lambda: len(served.core.running) == len(requests), "not all requests run")


def hold_writes(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Until the event is set, a write takes its message and does not return."""
    go, original = asyncio.Event(), Call.write_raw

    async def write_raw(self: Call, raw: bytes) -> None:
        await original(self, raw)
        await go.wait()

    monkeypatch.setattr(Call, "write_raw", write_raw)
    return go


async def test_running_requests_have_no_task_of_their_own(served: Served) -> None:
    session = SessionClient(served)
    await running(served, session, a=request("a", max_new_tokens=3), b=request("b", max_new_tokens=3))
    assert tasks_of_requests() == 0
    served.core.release()
    await session.finish()


async def test_steps_during_a_write_merge_into_one_message(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    go = hold_writes(monkeypatch)
    what = request("x", max_new_tokens=TOKENS)
    session = SessionClient(served)
    await running(served, session, a=what, b=what)
    served.core.step()
    assert await session.read()
    for _ in range(TOKENS - 1):
        served.core.step()
        await asyncio.sleep(0)
    go.set()
    await session.finish()
    assert len(session.messages) == 2
    served.core.release()
    expected = by_sequence(await drain(served.client.generation.StreamGenerate(pb.StreamGenerateRequest(request=what))))
    assert by_sequence(session.responses[1]) == by_sequence(session.responses[2]) == expected


async def test_held_back_tokens_come_by_number_and_by_time(served: Served) -> None:
    what = request("x", max_new_tokens=40)
    what.output.stream_min_tokens = 10
    what.output.stream_max_delay.FromMilliseconds(40)
    session = SessionClient(served)
    await running(served, session, a=what)
    served.core.step()
    assert await session.read()
    for _ in range(10):
        served.core.step()
    assert await session.read()
    served.core.step()
    assert await session.read()
    counts = [len(delta.token_ids) for response in session.responses[1] for delta in response.deltas]
    assert counts == [1, 10, 1]
    served.core.release()
    await session.finish()


async def test_text_comes_before_the_error_that_ends_its_request(served: Served) -> None:
    session = SessionClient(served)
    await running(served, session, a=request("x", max_new_tokens=9))
    served.core.step()
    served.core.fail(Reason.NON_FINITE_LOGITS)
    await session.finish()
    events = [event.WhichOneof("event") for message in session.messages for event in message.events]
    assert events == ["response", "error"]
    assert session.errors[1][0].reason == "NON_FINITE_LOGITS"


async def test_an_exception_while_news_is_taken_is_internal_for_one_request(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = SessionClient(served)
    await running(served, session, a=request("bad", max_new_tokens=5), b=request("good", max_new_tokens=5))
    served.core.step()
    assert await session.read()
    original = RequestState.take_plain

    def take_plain(self: RequestState) -> Any:
        if self is bad:
            raise ZeroDivisionError
        return original(self)

    bad = next(iter(served.engine._handles))
    monkeypatch.setattr(RequestState, "take_plain", take_plain)
    with caplog.at_level(logging.CRITICAL, "octavo.server.rpc"):
        served.core.release()
        await session.finish()
    assert [error.reason for error in session.errors[1]] == ["INTERNAL"] and not session.errors[2]
    assert session.responses[2][-1].HasField("usage")


async def test_cancelled_news_is_dropped_and_its_tag_is_free_at_once(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = hold_writes(monkeypatch)
    what = request("x", max_new_tokens=TOKENS)
    session = SessionClient(served)
    await running(served, session, a=what)
    served.core.step()
    assert await session.read()
    served.core.step()  # waits for the writer, which is busy
    await session.cancel(1)
    await session.submit(1, what)
    await until(lambda: len(served.core.added) == 2, "the tag is not free")
    served.core.release()
    await until(lambda: not served.core.running, "still running")
    go.set()
    before = len(session.responses[1])
    await session.finish()
    assert [error.reason for error in session.errors[1]] == ["CLIENT_CANCELLED"]
    [(_, ids, _)] = by_sequence(session.responses[1][before:]).values()
    assert len(ids) == TOKENS


async def test_a_request_without_ids_or_text_for_a_while_sends_nothing(served: Served) -> None:
    """Half a character is no news where ids are not wanted."""
    what = request("x", max_new_tokens=60)
    what.output.return_token_ids = False
    session = SessionClient(served)
    await running(served, session, a=what)
    served.core.release()
    await session.finish()
    assert all(r.prompts or r.HasField("usage") or r.deltas[0].text for r in session.responses[1])
    stream = stream_request("x", max_new_tokens=60)
    stream.request.output.return_token_ids = False
    responses = await drain(served.client.generation.StreamGenerate(stream))
    assert all(r.prompts or r.HasField("usage") or r.deltas[0].text for r in responses)
    assert by_sequence(responses)[0, 0][0] == by_sequence(session.responses[1])[0, 0][0]
