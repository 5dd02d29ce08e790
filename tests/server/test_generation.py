"""The three shapes of generation give the same tokens, and streams keep their contract."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import grpc
import grpc.aio
import pytest
from octavo.config import Limits
from octavo.errors import Reason
from octavo.server.session import SessionTimes
from octavo_proto.v1 import generation_pb2 as pb
from octavo_proto.v1 import types_pb2
from server.harness import Served, drain, outcome, request, serving, stream_request, until

Submit = pb.GenerateSessionRequest.Submit
MIX: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 1},
    {"max_new_tokens": 30, "do_sample": True, "num_return_sequences": 3, "seed": 5},
    {"max_new_tokens": 40, "stop_strings": ["e"], "stop_string_output": types_pb2.STOP_STRING_OUTPUT_EXCLUDE},
]


def by_sequence(responses: list[pb.StreamGenerateResponse]) -> dict[tuple[int, int], tuple[str, list[int], int]]:
    """Text, ids and finish reason of each sequence, put together from its deltas."""
    texts: dict[tuple[int, int], str] = defaultdict(str)
    ids: dict[tuple[int, int], list[int]] = defaultdict(list)
    reasons: dict[tuple[int, int], int] = {}
    for response in responses:
        for delta in response.deltas:
            key = (delta.prompt_index, delta.output_index)
            assert key not in reasons, "a delta after the last"
            texts[key] += delta.text
            ids[key] += delta.token_ids
            if delta.HasField("finish"):
                reasons[key] = delta.finish.reason
    return {key: (texts[key], ids[key], reasons[key]) for key in texts}


def of_unary(response: pb.GenerateResponse) -> dict[tuple[int, int], tuple[str, list[int], int]]:
    return {
        (c.prompt_index, c.output_index): (c.text, list(c.token_ids), c.finish.reason) for c in response.completions
    }


class SessionClient:
    """A GenerateSession and its events by tag."""

    def __init__(self, served: Served, **kwargs: Any) -> None:
        self.call = served.client.generation.GenerateSession(**kwargs)
        self.responses: dict[int, list[pb.StreamGenerateResponse]] = defaultdict(list)
        self.errors: dict[int, list[pb.RequestError]] = defaultdict(list)
        self.messages: list[pb.GenerateSessionResponse] = []

    async def submit(self, tag: int, what: pb.GenerateRequest, **fields: Any) -> None:
        await self.call.write(pb.GenerateSessionRequest(submit=Submit(tag=tag, request=what, **fields)))

    async def cancel(self, tag: int) -> None:
        await self.call.write(pb.GenerateSessionRequest(cancel=pb.GenerateSessionRequest.Cancel(tag=tag)))

    async def read(self) -> bool:
        """One message; False at the end."""
        message = await self.call.read()
        if not isinstance(message, pb.GenerateSessionResponse):
            return False
        self.messages.append(message)
        for event in message.events:
            if event.WhichOneof("event") == "response":
                self.responses[event.tag].append(event.response)
            else:
                self.errors[event.tag].append(event.error)
        return True

    async def read_until_error(self, tag: int) -> pb.RequestError:
        while not self.errors[tag]:
            assert await self.read()
        return self.errors[tag][0]

    async def finish(self) -> None:
        await self.call.done_writing()
        while await self.read():
            pass


@pytest.mark.parametrize("params", MIX)
async def test_unary_stream_and_session_give_the_same_tokens(served: Served, params: dict[str, Any]) -> None:
    generation = served.client.generation
    unary = await generation.Generate(request("one", "another", **params))
    streamed = await drain(generation.StreamGenerate(stream_request("one", "another", **params)))
    session = SessionClient(served)
    await session.submit(7, request("one", "another", **params))
    await session.finish()
    expected = of_unary(unary)
    assert len(expected) == 2 * params.get("num_return_sequences", 1)
    assert by_sequence(streamed) == expected
    assert by_sequence(session.responses[7]) == expected
    assert streamed[-1].usage == unary.usage == session.responses[7][-1].usage


async def test_unary_answer_is_sorted_and_complete(served: Served) -> None:
    response = await served.client.generation.Generate(
        request("b", "a", "c", do_sample=True, num_return_sequences=2, seed=1, max_new_tokens=5)
    )
    assert [(c.prompt_index, c.output_index) for c in response.completions] == [
        (p, o) for p in range(3) for o in (0, 1)
    ]
    assert [p.prompt_index for p in response.prompts] == [0, 1, 2]
    assert response.model == "demo" and response.request_id
    assert response.usage.completion_tokens == 30
    assert all(c.finish.reason == types_pb2.FINISH_REASON_LENGTH for c in response.completions)
    assert response.timing.HasField("total")


async def test_stream_names_itself_first_and_counts_last(served: Served) -> None:
    served.core.hold()
    call = served.client.generation.StreamGenerate(stream_request("x", max_new_tokens=4))
    responses = []
    await served.core.arrived.wait()
    for _ in range(4):
        served.core.step()
        responses.append(await call.read())
    assert [len(r.deltas[0].token_ids) for r in responses] == [1] * 4
    assert [bool(r.request_id) for r in responses] == [bool(r.model) for r in responses] == [True, False, False, False]
    assert [r.HasField("usage") for r in responses] == [False, False, False, True]
    assert [len(r.prompts) for r in responses] == [1, 0, 0, 0]
    assert await call.read() is grpc.aio.EOF


async def test_steps_that_nobody_read_are_merged(served: Served) -> None:
    served.core.hold()
    call = served.client.generation.StreamGenerate(stream_request("x", max_new_tokens=9))
    await served.core.arrived.wait()
    for _ in range(9):
        served.core.step()
    responses = await drain(call)
    assert len(responses) == 1
    assert len(responses[0].deltas) == 1 and len(responses[0].deltas[0].token_ids) == 9


async def test_resolved_options_are_returned_when_asked_for(served: Served) -> None:
    what = request("x", max_new_tokens=3)
    what.output.return_resolved_options = True
    response = await served.client.generation.Generate(what)
    assert response.resolved.params.max_new_tokens == 3
    assert response.resolved.params.HasField("temperature")
    [streamed, *_] = await drain(served.client.generation.StreamGenerate(pb.StreamGenerateRequest(request=what)))
    assert streamed.resolved == response.resolved


async def test_logprobs_arrive_in_columns(served: Served) -> None:
    what = request("x", max_new_tokens=3)
    what.output.logprobs = 2
    what.output.logprob_token_ids.append(5)
    logprobs = (await served.client.generation.Generate(what)).completions[0].logprobs
    assert len(logprobs.chosen) == len(logprobs.ranks) == len(logprobs.requested) == 3
    assert logprobs.num_top == 2 and len(logprobs.top_token_ids) == len(logprobs.top_values) == 6


async def test_request_id_is_the_messages_then_the_metadatas_then_made_up(served: Served) -> None:
    generation = served.client.generation
    what = request("x", max_new_tokens=1)
    call = generation.Generate(what, metadata=(("x-request-id", "from-metadata"),))
    assert (await call).request_id == "from-metadata"
    headers = dict(await call.initial_metadata())
    assert headers["x-request-id"] == "from-metadata" and headers["x-octavo-instance"] == "instance"
    what.request_id = "mine"
    call = generation.Generate(what, metadata=(("x-request-id", "from-metadata"),))
    assert (await call).request_id == "mine"
    assert dict(await call.initial_metadata())["x-request-id"] == "mine"
    made_up = await generation.Generate(request("x"), metadata=(("x-request-id", "not valid!"),))
    assert made_up.request_id not in ("", "not valid!")


async def test_large_merged_updates_are_split_below_the_send_limit() -> None:
    async with serving(limits=Limits(max_send_message_bytes=4096)) as served:
        what = stream_request("x", "y", do_sample=True, num_return_sequences=8, seed=1, max_new_tokens=20)
        what.request.output.logprobs = 5
        served.core.hold()
        call = served.client.generation.StreamGenerate(what)
        await served.core.arrived.wait()
        for _ in range(20):
            served.core.step()
        responses = await drain(call)
        assert len(responses) > 2 and all(r.ByteSize() <= 4096 for r in responses)
        assert len(by_sequence(responses)) == 16
        assert all(len(ids) == 20 for _, ids, _ in by_sequence(responses).values())
        assert [r.HasField("usage") for r in responses][-1]
        session = SessionClient(served)
        await session.submit(3, what.request)
        await until(lambda: bool(served.core.running), "submitted")
        for _ in range(20):
            served.core.step()
        await session.finish()
        assert all(m.ByteSize() <= 4096 for m in session.messages)
        assert by_sequence(session.responses[3]) == by_sequence(responses)


# --- GenerateSession


async def test_session_sends_one_message_per_step_for_all_tags(served: Served) -> None:
    served.core.hold()
    session = SessionClient(served)
    for tag in range(5):
        await session.submit(tag, request(f"prompt {tag}", max_new_tokens=3))
    await until(lambda: len(served.core.running) == 5, "submitted")
    for _ in range(3):
        served.core.step()
        assert await session.read()
    assert [sorted(event.tag for event in message.events) for message in session.messages] == [[0, 1, 2, 3, 4]] * 3
    assert all(session.responses[tag][-1].HasField("usage") for tag in range(5))
    await session.finish()


async def test_session_tag_in_use_and_reuse_after_the_end(served: Served) -> None:
    served.core.hold()
    session = SessionClient(served)
    await session.submit(1, request("x", max_new_tokens=2))
    await session.submit(1, request("y", max_new_tokens=2))
    error = await session.read_until_error(1)
    assert (error.code, error.reason) == (6, "TAG_IN_USE")
    assert len(served.core.running) == 1
    served.core.release()
    while not any(r.HasField("usage") for r in session.responses[1]):
        assert await session.read()
    await session.submit(1, request("z", max_new_tokens=2))
    await session.finish()
    assert sum(r.HasField("usage") for r in session.responses[1]) == 2


async def test_session_refuses_more_requests_than_its_limit() -> None:
    async with serving(limits=Limits(max_session_requests=3)) as served:
        served.core.hold()
        session = SessionClient(served)
        for tag in range(4):
            await session.submit(tag, request("x", max_new_tokens=2))
        error = await session.read_until_error(3)
        assert (error.code, error.reason) == (8, "SESSION_FULL") and error.HasField("retry_delay")
        served.core.release()
        await session.finish()
        assert all(session.responses[tag][-1].HasField("usage") for tag in range(3))


async def test_session_errors_are_in_band_and_the_stream_lives_on(served: Served) -> None:
    session = SessionClient(served)
    await session.submit(1, request("x", top_p=1.5))
    error = await session.read_until_error(1)
    assert (error.code, error.reason) == (3, "INVALID_FIELD")
    assert [v.field for v in error.field_violations] == ["params.top_p"]
    await session.submit(3, request("x", max_new_tokens=5000))
    error = await session.read_until_error(3)
    assert error.reason == "CONTEXT_LENGTH_EXCEEDED" and {"max", "got", "request_id"} <= set(error.metadata)
    await session.submit(2, request("x", max_new_tokens=2))
    await session.finish()
    assert session.responses[2][-1].HasField("usage")
    assert (await session.call.code()).name == "OK"


async def test_session_cancel_ends_one_request_and_frees_it_at_once(served: Served) -> None:
    served.core.hold()
    session = SessionClient(served)
    await session.submit(1, request("x", max_new_tokens=9))
    await session.submit(2, request("y", max_new_tokens=2))
    await until(lambda: len(served.core.running) == 2, "submitted")
    await session.cancel(1)
    await session.cancel(99)
    error = await session.read_until_error(1)
    assert (error.code, error.reason) == (1, "CLIENT_CANCELLED")
    await until(lambda: len(served.core.running) == 1, "the cancelled request still runs")
    served.core.release()
    await session.finish()
    assert session.responses[2][-1].HasField("usage") and not session.responses[1]


async def test_session_timeout_fails_one_request(served: Served) -> None:
    served.core.hold()
    session = SessionClient(served)
    what: dict[str, Any] = {"timeout": {"nanos": 20_000_000}}
    await session.submit(1, request("x", max_new_tokens=9), **what)
    error = await session.read_until_error(1)
    assert (error.code, error.reason) == (4, "CLIENT_DEADLINE")
    assert not served.core.running
    await session.finish()


async def test_session_requests_keep_their_own_failures_apart(served: Served) -> None:
    served.core.hold()
    session = SessionClient(served)
    await session.submit(1, request("x", max_new_tokens=2))
    await until(lambda: len(served.core.running) == 1, "submitted")
    served.core.fail(Reason.NON_FINITE_LOGITS)
    error = await session.read_until_error(1)
    assert (error.code, error.reason) == (13, "NON_FINITE_LOGITS")
    served.core.release()
    await session.submit(2, request("x", max_new_tokens=2))
    await session.finish()
    assert session.responses[2][-1].HasField("usage")


async def test_half_closed_session_lets_running_requests_finish(served: Served) -> None:
    served.core.hold()
    session = SessionClient(served)
    await session.submit(1, request("x", max_new_tokens=5))
    await session.call.done_writing()
    await until(lambda: len(served.core.running) == 1, "submitted")
    served.core.release()
    await session.finish()
    assert session.responses[1][-1].HasField("usage")
    assert (await session.call.code()).name == "OK"


async def test_cancelling_a_session_aborts_its_requests(served: Served) -> None:
    served.core.hold()
    session = SessionClient(served)
    for tag in range(3):
        await session.submit(tag, request("x", max_new_tokens=5))
    await until(lambda: len(served.core.running) == 3, "submitted")
    session.call.cancel()
    await until(lambda: not served.core.running, "requests still run")


async def test_session_that_brings_nothing_ends_with_a_deadline(served: Served) -> None:
    served.server.generation._times = SessionTimes(first_request=0.05, idle=0.1)
    found = await outcome(drain(SessionClient(served).call))
    assert (found.code, found.reason) == ("DEADLINE_EXCEEDED", "SERVER_MAX_DURATION")
    session = SessionClient(served)
    await session.submit(1, request("x", max_new_tokens=2))
    found = await outcome(drain(session.call))
    assert (found.code, found.reason) == ("DEADLINE_EXCEEDED", "SERVER_MAX_DURATION")


async def test_running_requests_keep_a_session_from_being_idle(served: Served) -> None:
    served.server.generation._times = SessionTimes(first_request=0.05, idle=0.05)
    served.core.hold()
    session = SessionClient(served)
    await session.submit(1, request("x", max_new_tokens=2))
    await until(lambda: len(served.core.running) == 1, "submitted")
    await asyncio.sleep(0.15)
    served.core.release()
    while not session.responses[1]:
        assert await session.read()
    await session.finish()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (pb.GenerateSessionRequest(), "INVALID_FIELD"),
        (pb.GenerateSessionRequest.FromString(b"\xb8\x3e\x01"), "UNSUPPORTED_FIELD"),
    ],
)
async def test_session_without_an_operation_fails(served: Served, message: Any, reason: str) -> None:
    call = served.client.generation.GenerateSession()
    await call.write(message)
    found = await outcome(drain(call))
    assert (found.code, found.reason) == ("INVALID_ARGUMENT", reason)
