"""The synchronous client against a fake server: results, streams, cancellation, errors, retries."""

from __future__ import annotations

import threading
import time

import grpc
import pytest
from client.fake_server import FakeServer, Refusal, reason, retry_in, running
from google.rpc import error_details_pb2
from octavo.client import (
    Aborted,
    Client,
    ContextLengthExceeded,
    DeadlineExceeded,
    FinishReason,
    InternalError,
    InvalidRequest,
    OctavoError,
    Output,
    Overloaded,
    Unauthenticated,
    Unavailable,
    Violation,
)

CODE = grpc.StatusCode


def bad_fields(*fields: str) -> error_details_pb2.BadRequest:
    violations = [error_details_pb2.BadRequest.FieldViolation(field=name, description="no") for name in fields]
    return error_details_pb2.BadRequest(field_violations=violations)


def test_one_prompt_gives_one_output(client: Client) -> None:
    out = client.generate("one two three", response_length=2, logprobs=2)
    assert isinstance(out, Output)
    assert (out.text, out.token_ids, out.finish_reason, out.matched) == (
        " three two",
        [0, 1],
        FinishReason.STOP_STRING,
        "!",
    )
    assert out.usage.completion_tokens == 2
    assert out.prompt is not None
    assert out.prompt.seed == 7
    assert out.logprobs is not None
    assert out.logprobs.top_token_ids == [[0, 1], [0, 1]]


def test_lists_of_prompts_and_several_sequences_nest(client: Client) -> None:
    flat = client.generate(["a b", [5, 6]])
    assert [out.text for out in flat] == [" b a", " 6 5"]
    assert [out.output_index for out in client.generate("a", n=2)] == [0, 1]
    nested = client.generate(["a", "b"], do_sample=True, num_return_sequences=2, seed=1)
    assert [[out.text for out in outs] for outs in nested] == [[" a", " a"], [" b", " b"]]
    assert len(client.generate(["a"])) == 1


def test_generate_all_returns_everything_the_server_said(client: Client) -> None:
    response = client.generate_all(["a", "b"], request_id="mine")
    assert (response.request_id, response.model, response.usage.completion_tokens) == ("mine", "fake", 4)
    assert response.timing is not None
    assert response.timing.total == 0.5
    assert [len(outputs) for outputs in response.outputs] == [1, 1]


def test_stream_adds_up_to_the_unary_answer(client: Client) -> None:
    whole = client.generate_all(["one two three", "four five"], n=2, logprobs=1, request_id="same")
    with client.stream(["one two three", "four five"], n=2, logprobs=1, request_id="same") as stream:
        streamed = stream.response()
    assert streamed.outputs == whole.outputs
    assert streamed.usage == whole.usage


def test_stream_gives_deltas_as_they_come(client: Client) -> None:
    with client.stream("one two three") as stream:
        deltas = list(stream)
        assert stream.response().outputs[0][0].text == " three two one"
    assert [delta.text for delta in deltas] == [" three", " two", " one"]
    assert [delta.finish_reason for delta in deltas] == [None, None, FinishReason.STOP_STRING]
    assert deltas[-1].completion_tokens == 3


def test_leaving_a_stream_cancels_it(client: Client, server: FakeServer) -> None:
    with client.stream("forever and ever") as stream:
        for delta in stream:
            assert delta.text == " ever"
            break
    assert server.cancelled.wait(5)


def test_stream_is_used_in_a_with_block_only(client: Client) -> None:
    with pytest.raises(RuntimeError, match="with"):
        list(client.stream("a"))


def test_deadline_passes_and_the_call_is_cancelled(client: Client, server: FakeServer) -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        client.generate("forever", timeout=0.2)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert server.cancelled.wait(5)


def test_every_call_has_a_deadline_and_carries_the_key(server: FakeServer) -> None:
    with Client(server.address, api_key="secret") as client:
        client.generate("a")
        with client.stream("a") as stream:
            list(stream)
        client.tokenize("a")
        client.abort("x")
    assert len(server.deadlines) == 4
    assert [round(seconds / 10) for seconds in server.deadlines] == [30, 30, 30, 30]
    assert all(metadata["authorization"] == "Bearer secret" for metadata in server.metadata)


def test_interrupted_thread_cancels_its_call(
    client: Client, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = client._generation.Generate

    class Interrupted:
        def future(self, *args: object, **keywords: object) -> object:
            call = method.future(*args, **keywords)

            class Future:
                cancel = staticmethod(call.cancel)

                def result(self) -> None:
                    assert not server.cancelled.wait(0.3)
                    raise KeyboardInterrupt

            return Future()

    monkeypatch.setattr(client._generation, "Generate", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        client.generate("forever")
    assert server.cancelled.wait(5)


ERRORS: list[tuple[Refusal, type[OctavoError]]] = [
    (
        Refusal(CODE.INVALID_ARGUMENT, "two fields", reason("INVALID_FIELD"), bad_fields("params.top_p", "model")),
        InvalidRequest,
    ),
    (
        Refusal(
            CODE.INVALID_ARGUMENT, "long", reason("CONTEXT_LENGTH_EXCEEDED", max="1025", got="2000", prompt_index="0")
        ),
        ContextLengthExceeded,
    ),
    (Refusal(CODE.NOT_FOUND, "no such model", reason("MODEL_NOT_FOUND")), InvalidRequest),
    (Refusal(CODE.RESOURCE_EXHAUSTED, "full", reason("QUEUE_FULL"), retry_in(1.5)), Overloaded),
    (Refusal(CODE.UNAVAILABLE, "draining", reason("DRAINING"), retry_in(2)), Unavailable),
    (Refusal(CODE.DEADLINE_EXCEEDED, "too long", reason("SERVER_MAX_DURATION")), DeadlineExceeded),
    (Refusal(CODE.ABORTED, "aborted", reason("ABORTED_BY_OPERATOR")), Aborted),
    (Refusal(CODE.UNAUTHENTICATED, "no key", reason("UNAUTHENTICATED")), Unauthenticated),
    (Refusal(CODE.PERMISSION_DENIED, "not admin", reason("NOT_ADMIN")), Unauthenticated),
    (Refusal(CODE.INTERNAL, "NaN", reason("NON_FINITE_LOGITS", request_id="abc")), InternalError),
    (Refusal(CODE.UNIMPLEMENTED, "no such method"), OctavoError),
]


@pytest.mark.parametrize(("refusal", "kind"), ERRORS, ids=[row[0].message for row in ERRORS])
@pytest.mark.parametrize("streaming", [False, True])
def test_status_with_details_becomes_a_typed_error(
    server: FakeServer, refusal: Refusal, kind: type[OctavoError], streaming: bool
) -> None:
    def call(client: Client) -> None:
        if streaming:
            with client.stream("a", request_id="mine") as stream:
                list(stream)
        else:
            client.generate("a", request_id="mine")

    server.refusals.append(refusal)
    with Client(server.address, retry=False) as client, pytest.raises(OctavoError) as caught:
        call(client)
    error = caught.value
    assert type(error) is kind
    assert error.code == refusal.code.name
    assert error.message == refusal.message
    assert error.request_id == ("abc" if refusal.message == "NaN" else "mine")
    if isinstance(error, ContextLengthExceeded):
        assert (error.max, error.got, error.prompt_index, error.reason) == (1025, 2000, 0, "CONTEXT_LENGTH_EXCEEDED")
    elif isinstance(error, Overloaded):
        assert error.retry_after == 1.5
    elif refusal.message == "two fields":
        assert isinstance(error, InvalidRequest)
        assert error.violations == (Violation("params.top_p", "no"), Violation("model", "no"))
        assert str(error) == "INVALID_ARGUMENT/INVALID_FIELD: two fields (params.top_p: no; model: no) [request mine]"


def test_garbled_details_leave_the_plain_status(server: FakeServer) -> None:
    refusal = Refusal(CODE.INTERNAL, "broken")
    refusal.trailers = [("grpc-status-details-bin", b"\xff\xff\xff")]
    server.refusals.append(refusal)
    with Client(server.address) as client, pytest.raises(InternalError, match="broken"):
        client.generate("a")


@pytest.mark.parametrize("code", [CODE.RESOURCE_EXHAUSTED, CODE.UNAVAILABLE])
def test_call_is_retried_when_the_push_back_says(client: Client, server: FakeServer, code: grpc.StatusCode) -> None:
    server.refusals.append(Refusal(code, "full", reason("QUEUE_FULL"), pushback_ms=300))
    begin = time.monotonic()
    assert client.generate("a", request_id="same").text == " a"
    assert 0.25 < time.monotonic() - begin < 3
    assert [request.request_id for request in server.requests] == ["same", "same"]


def test_retries_end_after_four_attempts_and_with_retry_off_after_one(server: FakeServer) -> None:
    for retry, attempts in ((True, 4), (False, 1)):
        server.requests.clear()
        server.refusals[:] = [
            Refusal(CODE.RESOURCE_EXHAUSTED, "full", reason("QUEUE_FULL"), pushback_ms=1) for _ in range(9)
        ]
        with Client(server.address, retry=retry) as client, pytest.raises(Overloaded) as caught:
            client.generate("a")
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after == 0.001
        assert len(server.requests) == attempts


def test_stream_that_fails_after_its_first_message_is_not_repeated(client: Client, server: FakeServer) -> None:
    seen = []
    with pytest.raises(OctavoError), client.stream("fail late") as stream:
        seen.extend(delta.text for delta in stream)
    assert seen == [" late"]
    assert len(server.requests) == 1


def test_nothing_is_sent_for_an_unknown_keyword(client: Client, server: FakeServer) -> None:
    with pytest.raises(TypeError, match="unknown keyword tempreature"):
        client.generate("a", tempreature=1.0)
    assert server.requests == []


def test_small_calls(client: Client, server: FakeServer) -> None:
    assert client.tokenize("one three") == [3, 5]
    assert client.tokenize(["one", "three four"], add_special_tokens=False) == [[3], [5, 4]]
    assert server.requests[-1].prompt_options.add_special_tokens is False
    assert client.detokenize([1, 2]) == "1 2"
    assert client.detokenize([[1], [2, 3]], skip_special_tokens=True) == ["1", "2 3"]
    assert client.model().n_positions == 1024
    assert client.info().total_kv_blocks == 64
    assert client.load().running_requests == 3
    assert [load.running_requests for load in client.watch_load(0.5)] == [0, 1]
    assert server.requests[-1].interval.nanos == 500_000_000
    assert list(client.abort("a", "b").not_found_request_ids) == ["b"]
    assert client.drain(5, shutdown=True).finished_requests == 5
    assert server.requests[-1].timeout.seconds == 5
    assert client.reset_prefix_cache() == 9
    with pytest.raises(ValueError, match="abort"):
        client.abort()
    with pytest.raises(TypeError, match="top_p"):
        client.tokenize("a", top_p=1)


def test_health_is_told_and_watched(client: Client, server: FakeServer) -> None:
    assert client.health() == "SERVING"
    assert client.health("") == "SERVING"
    server.set_serving(False)
    assert client.health() == "NOT_SERVING"
    changes = client.watch_health(timeout=10)
    assert next(changes) == "NOT_SERVING"
    server.set_serving(True)
    assert next(changes) == "SERVING"
    changes.close()


def test_wait_until_ready_returns_when_the_service_turns_serving(server: FakeServer) -> None:
    server.set_serving(False)
    with Client(server.address) as client:
        with pytest.raises(DeadlineExceeded):
            client.wait_until_ready(timeout=0.3)
        assert client.info().model == "fake"  # facts are to be had meanwhile
        with pytest.raises(Unavailable) as caught:
            client.generate("a")
        assert caught.value.reason == "NOT_SERVING"
        threading.Timer(0.3, server.set_serving, [True]).start()
        client.wait_until_ready(timeout=10)
        assert client.generate("a").text == " a"


def test_no_server_is_unavailable_and_not_ready() -> None:
    with Client("127.0.0.1:1", retry=False) as client:
        with pytest.raises(Unavailable):
            client.generate("a")
        with pytest.raises(DeadlineExceeded):
            client.wait_until_ready(timeout=0.2)


def test_calls_are_spread_over_the_servers_that_serve() -> None:
    with running() as one, running() as two, Client(one.address, two.address) as client:
        client.wait_until_ready(10)
        deadline = time.monotonic() + 5
        while not (one.requests and two.requests) and time.monotonic() < deadline:
            client.generate("a")
        assert one.requests
        assert two.requests
        one.set_serving(False)
        time.sleep(0.3)
        one.requests.clear()
        for _ in range(10):
            client.generate("a")
        assert one.requests == []


def test_unix_socket_is_an_address(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    with running(f"unix:{path}"), Client(f"unix:{path}") as client:
        assert client.generate("a").text == " a"


@pytest.mark.parametrize("addresses", [(), ("",), ("a", "b"), ("127.0.0.1:1", "[::1]:1")])
def test_bad_addresses_are_refused(addresses: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="address"):
        Client(*addresses)
