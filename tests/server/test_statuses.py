"""Every row of the API's status table: code, reason and details, as a client sees them."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from octavo.config import Limits
from octavo.errors import CODE_OF_REASON, Code, FieldViolation, Reason, RequestError
from octavo.server import statuses
from octavo_proto.v1 import control_pb2, generation_pb2
from server.harness import (
    Outcome,
    Served,
    drain,
    ids_prompt,
    outcome,
    request,
    serving,
    stream_request,
    until,
)

SHAPES = ["unary", "stream"]


async def generate(served: Served, shape: str, what: generation_pb2.GenerateRequest, **call: Any) -> Outcome:
    generation = served.client.generation
    if shape == "unary":
        return await outcome(generation.Generate(what, **call))
    return await outcome(drain(generation.StreamGenerate(generation_pb2.StreamGenerateRequest(request=what), **call)))


def check(found: Outcome, code: str, reason: str) -> None:
    assert (found.code, found.reason, found.domain) == (code, reason, "octavo")
    assert found.metadata["request_id"] == found.trailers["x-request-id"]
    assert len(found.trailers["grpc-status-details-bin"]) <= 6000


@pytest.mark.parametrize("shape", SHAPES)
class TestInvalid:
    async def test_value_out_of_range_names_every_field(self, served: Served, shape: str) -> None:
        found = await generate(served, shape, request("x", do_sample=True, top_p=1.5, min_p=-1.0))
        check(found, "INVALID_ARGUMENT", "INVALID_FIELD")
        assert set(found.fields) == {"params.top_p", "params.min_p"}
        assert "grpc-retry-pushback-ms" not in found.trailers

    async def test_no_prompts(self, served: Served, shape: str) -> None:
        found = await generate(served, shape, generation_pb2.GenerateRequest())
        check(found, "INVALID_ARGUMENT", "INVALID_FIELD")
        assert found.fields == ["prompts"]

    async def test_unsupported_field(self, served: Served, shape: str) -> None:
        what = request("x")
        what.params.ParseFromString(b"\xb8\x3e\x01")
        found = await generate(served, shape, what)
        check(found, "INVALID_ARGUMENT", "UNSUPPORTED_FIELD")
        assert found.fields == ["params.999"]

    async def test_context_length(self, served: Served, shape: str) -> None:
        found = await generate(served, shape, request("x", max_new_tokens=5000))
        check(found, "INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED")
        assert {"max", "got", "prompt_index"} <= set(found.metadata) and found.fields

    async def test_unknown_model(self, served: Served, shape: str) -> None:
        what = request("x")
        what.model = "another"
        found = await generate(served, shape, what)
        check(found, "NOT_FOUND", "MODEL_NOT_FOUND")
        assert found.resource == "another"

    async def test_more_sequences_than_the_server_takes(self, served: Served, shape: str) -> None:
        found = await generate(served, shape, request(*["x"] * 128, do_sample=True, num_return_sequences=16))
        assert found.code == "INVALID_ARGUMENT"
        assert found.reason in ("INVALID_FIELD", "REQUEST_TOO_LARGE")

    @pytest.mark.parametrize("reason", [Reason.NON_FINITE_SCORES, Reason.NON_FINITE_LOGITS, Reason.INTERNAL])
    async def test_failure_of_one_request(self, served: Served, shape: str, reason: Reason) -> None:
        served.core.hold()
        call = asyncio.create_task(generate(served, shape, request("x")))
        await served.core.arrived.wait()
        served.core.fail(reason)
        check(await call, CODE_OF_REASON[reason].name, str(reason))


async def test_unary_answer_too_large_by_estimate() -> None:
    async with serving(limits=Limits(max_send_message_bytes=4096)) as served:
        found = await generate(served, "unary", request("x", max_new_tokens=1000))
        check(found, "INVALID_ARGUMENT", "RESPONSE_TOO_LARGE")
        assert (await generate(served, "stream", request("x", max_new_tokens=1000))).code == "OK"


async def test_unary_answer_too_large_against_the_estimate_is_not_retried(served: Served) -> None:
    served.client.raw("")
    error = statuses.response_too_large(100)
    assert error.code is Code.RESOURCE_EXHAUSTED
    assert dict(statuses.trailers(error, "r"))["grpc-retry-pushback-ms"] == "-1"


@pytest.mark.parametrize("shape", SHAPES)
class TestOverload:
    def check_retry(self, found: Outcome, code: str, reason: str) -> None:
        check(found, code, reason)
        assert found.retry_delay is not None and found.retry_delay > 0
        assert int(found.trailers["grpc-retry-pushback-ms"]) == round(found.retry_delay * 1000)

    async def test_queue_full(self, shape: str) -> None:
        async with serving(limits=Limits(max_inflight_requests=2)) as served:
            served.core.hold()
            running = asyncio.create_task(generate(served, shape, request("x", "y")))
            await served.core.arrived.wait()
            self.check_retry(await generate(served, shape, request("z")), "RESOURCE_EXHAUSTED", "QUEUE_FULL")
            served.core.release()
            assert (await running).code == "OK"

    async def test_tokens_full(self, shape: str) -> None:
        async with serving(limits=Limits(max_waiting_tokens=10)) as served:
            served.core.hold()
            running = asyncio.create_task(generate(served, shape, request("one two three four five six")))
            await served.core.arrived.wait()
            long = request("one two three four five six seven eight")
            self.check_retry(await generate(served, shape, long), "RESOURCE_EXHAUSTED", "TOKENS_FULL")
            served.core.release()
            assert (await running).code == "OK"

    async def test_queue_timeout(self, served: Served, shape: str) -> None:
        served.core.hold()
        call = asyncio.create_task(generate(served, shape, request("x")))
        await served.core.arrived.wait()
        served.core.fail(Reason.QUEUE_TIMEOUT)
        self.check_retry(await call, "RESOURCE_EXHAUSTED", "QUEUE_TIMEOUT")

    async def test_starting_restarting_and_draining(self, shape: str) -> None:
        async with serving(up=False, check=False) as served:
            self.check_retry(await generate(served, shape, request("x")), "UNAVAILABLE", "ENGINE_STARTING")
        async with serving(check=False) as served:
            served.engine.engine_down()
            self.check_retry(await generate(served, shape, request("x")), "UNAVAILABLE", "ENGINE_RESTARTED")
        async with serving(check=False) as served:
            served.engine.start_draining()
            self.check_retry(await generate(served, shape, request("x")), "UNAVAILABLE", "DRAINING")

    async def test_engine_dies_under_a_request(self, shape: str) -> None:
        async with serving(check=False) as served:
            served.core.hold()
            call = asyncio.create_task(generate(served, shape, request("x")))
            await served.core.arrived.wait()
            served.core.step()
            served.engine.engine_down()
            self.check_retry(await call, "UNAVAILABLE", "ENGINE_RESTARTED")

    async def test_draining_fails_what_is_left(self, served: Served, shape: str) -> None:
        served.core.hold()
        call = asyncio.create_task(generate(served, shape, request("x")))
        await served.core.arrived.wait()
        served.engine.fail_all(RequestError(Reason.DRAINING, "the server is draining"))
        self.check_retry(await call, "UNAVAILABLE", "DRAINING")


@pytest.mark.parametrize("shape", SHAPES)
class TestEnds:
    async def test_clients_deadline(self, served: Served, shape: str) -> None:
        served.core.hold()
        found = await generate(served, shape, request("x"), timeout=0.05)
        assert found.code == "DEADLINE_EXCEEDED"

    async def test_servers_longest_duration(self, shape: str) -> None:
        async with serving(limits=Limits(max_request_duration=0.05)) as served:
            served.core.hold()
            found = await generate(served, shape, request("x"), timeout=1000)
            check(found, "DEADLINE_EXCEEDED", "SERVER_MAX_DURATION")

    async def test_cancelled_by_the_client(self, served: Served, shape: str) -> None:
        served.core.hold()
        generation = served.client.generation
        call = generation.Generate(request("x")) if shape == "unary" else generation.StreamGenerate(stream_request("x"))
        await served.core.arrived.wait()
        call.cancel()
        await until(lambda: not served.core.running, "the request still runs")

    async def test_aborted_by_the_operator(self, served: Served, shape: str) -> None:
        served.core.hold()
        what = request("x")
        what.request_id = "victim"
        call = asyncio.create_task(generate(served, shape, what))
        await served.core.arrived.wait()
        served.core.step()
        answer = await served.client.control.AbortRequests(
            control_pb2.AbortRequestsRequest(request_ids=["victim", "nobody"])
        )
        assert list(answer.aborted_request_ids) == ["victim"] and answer.aborted_requests == 1
        assert list(answer.not_found_request_ids) == ["nobody"]
        check(await call, "ABORTED", "ABORTED_BY_OPERATOR")
        assert not served.core.running


async def test_stream_delivers_what_there_was_before_an_error(served: Served) -> None:
    served.core.hold()
    call = served.client.generation.StreamGenerate(stream_request("x"))
    await served.core.arrived.wait()
    served.core.step()
    assert len((await call.read()).deltas[0].token_ids) == 1
    served.core.step()
    await served.engine.abort_requests(None, None)
    last = await call.read()
    assert last.deltas[0].finish.reason == 7 and len(last.deltas[0].token_ids) == 1
    found = await outcome(call.read())
    check(found, "ABORTED", "ABORTED_BY_OPERATOR")


class Panic(BaseException):
    """What a native extension may raise."""


@pytest.mark.parametrize("error", [Panic("secret"), ValueError("secret"), asyncio.CancelledError(), MemoryError()])
@pytest.mark.parametrize("shape", [*SHAPES, "session"])
async def test_anything_raised_in_a_handler_is_internal_without_its_text(
    served: Served, shape: str, error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "submit", broken)
        if shape == "session":
            call = served.client.generation.GenerateSession()
            submit = generation_pb2.GenerateSessionRequest.Submit(tag=1, request=request("canary"))
            await call.write(generation_pb2.GenerateSessionRequest(submit=submit))
            event = (await call.read()).events[0]
            assert (event.error.code, event.error.reason) == (13, "INTERNAL")
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
        else:
            check(await generate(served, shape, request("canary")), "INTERNAL", "INTERNAL")
    assert "secret" not in caplog.text and "canary" not in caplog.text
    assert type(error).__name__ in caplog.text


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_makes_a_status_with_details(reason: Reason) -> None:
    error = RequestError(reason, "text", metadata={"max": "1"})
    status = statuses.details(error, "r")
    assert status.code == CODE_OF_REASON[reason]
    assert getattr(grpc.StatusCode, error.code.name)
    pairs = dict(statuses.trailers(error, "r"))
    retryable = CODE_OF_REASON[reason] in (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)
    assert ("grpc-retry-pushback-ms" in pairs) == retryable


def test_details_stay_small_and_tell_how_many_fields_are_left_out() -> None:
    violations = [FieldViolation(f"params.field_{i}", "é" * 100) for i in range(1000)]
    error = RequestError(Reason.INVALID_FIELD, "text", violations=violations)
    assert statuses.details(error, "r").ByteSize() <= statuses.MAX_DETAILS
    kept = statuses.fitting(violations, 4096)
    assert kept[0] == violations[0]
    assert kept[-1].description.endswith("further fields at fault")
    assert str(1000 - len(kept)) in kept[-1].description
    in_band = statuses.in_band(error, "r")
    assert len(in_band.field_violations) == len(kept)


async def test_a_hundred_faulty_fields_reach_the_client(served: Served) -> None:
    what = request("x")
    for _ in range(100):
        what.prompts.append(ids_prompt([2**32 - 1] * 3))
    found = await generate(served, "unary", what)
    check(found, "INVALID_ARGUMENT", "INVALID_FIELD")
    assert len(found.fields) > 10
