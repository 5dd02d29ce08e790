"""Groups F and G: bytes that are no protobuf, no gRPC, no HTTP/2; methods that do not exist or are called wrongly."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import grpc
import grpc.aio
import pytest
from abuse import http2
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2
from octavo.config import ServerConfig
from octavo.server import grpc_server
from octavo_proto.v1 import control_pb2, generation_pb2, model_pb2, types_pb2
from server.harness import Served, drain, outcome, request, serving, until

UNARY = [
    "GenerationService/Generate",
    "ModelService/GetModel",
    "ModelService/Tokenize",
    "ModelService/Detokenize",
    "ControlService/GetServerInfo",
    "ControlService/GetLoad",
    "ControlService/AbortRequests",
    "ControlService/Drain",
    "ControlService/ResetPrefixCache",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/List",
]
SERVER_STREAMS = ["GenerationService/StreamGenerate", "ControlService/WatchLoad", "/grpc.health.v1.Health/Watch"]
BIDI = ["GenerationService/GenerateSession"]
GENERATE = "/octavo.v1.GenerationService/Generate"

GARBAGE = {
    "truncated": b"\x0a\x7f\x01",
    "invalid UTF-8 as a name": b"\x0a\x02\xff\xfe",
    "open group": b"\x93\x06",
    "wire type 7": b"\x0f",
    "field 0": b"\x00\x01",
    "endless varint": b"\x08" + b"\xff" * 11,
    "200 nested groups": b"\x93\x06" * 200,
    "100,000 nested groups": b"\x93\x06" * 100_000,
}


async def call_raw(served: Served, method: str, kind: str, *messages: bytes, **call: Any) -> Any:
    """As if the method had this kind, whatever it has."""
    stub = served.client.raw(method, kind)
    argument: Any = iter(messages) if kind.startswith("stream") else messages[0]
    rpc = stub(argument, **call)
    return await outcome(drain(rpc) if kind.endswith("stream") else rpc, limit=5)


# --- 88, 89: what is no protobuf


METHODS_AND_GARBAGE = [
    (method, title)
    for method in [*UNARY, *SERVER_STREAMS, *BIDI]
    for title in GARBAGE
    if "UTF-8" not in title or method in ("GenerationService/Generate", "ModelService/GetModel")  # a string is field 1
]


@pytest.mark.parametrize(("method", "title"), METHODS_AND_GARBAGE)
async def test_88_garbage_is_malformed_for_every_method(served: Served, method: str, title: str) -> None:
    kind = "unary_unary" if method in UNARY else "unary_stream" if method in SERVER_STREAMS else "stream_stream"
    found = await call_raw(served, method, kind, GARBAGE[title], timeout=4)
    if found.code in ("OK", "DEADLINE_EXCEEDED", "PERMISSION_DENIED"):
        assert found.code == "PERMISSION_DENIED" or method.endswith("List"), "garbage was understood"
        return
    assert found.code == "INVALID_ARGUMENT" and found.reason in ("MALFORMED_REQUEST", "UNSUPPORTED_FIELD"), found


async def test_88_another_messages_bytes_are_no_request(served: Served) -> None:
    file = FileDescriptorProto()
    generation_pb2.DESCRIPTOR.CopyToProto(file)
    for data in (file.SerializeToString(), os.urandom(300), b"GET / HTTP/1.1\r\n\r\n"):
        found = await call_raw(served, "GenerationService/Generate", "unary_unary", data)
        assert found.code == "INVALID_ARGUMENT" and found.reason


async def test_88_garbage_inside_a_session_ends_the_stream(served: Served) -> None:
    submit = generation_pb2.GenerateSessionRequest.Submit(tag=1, request=request("x"))
    good = generation_pb2.GenerateSessionRequest(submit=submit).SerializeToString()
    found = await call_raw(served, BIDI[0], "stream_stream", good, GARBAGE["truncated"])
    assert (found.code, found.reason) == ("INVALID_ARGUMENT", "MALFORMED_REQUEST")


# --- 90 to 95: what is no gRPC


async def exchange(
    served: Served, data: bytes, seconds: float = 5.0, until: bytes = b"grpc-status"
) -> tuple[bytes, bool]:
    return await asyncio.to_thread(http2.exchange, served.address, data, seconds, until)


@pytest.mark.parametrize("length", [10, 1000, 2**20 + 1, 2**31, 2**32 - 1])
async def test_90_a_length_beyond_the_data_is_an_error(served: Served, length: int) -> None:
    body = http2.message(b"\x12\x03\x0a\x01x", length=length)
    answer, closed = await exchange(served, http2.call(GENERATE, body), until=b"grpc-status")
    assert closed or b"grpc-status" in answer or _has_reset(answer)


def _has_reset(answer: bytes) -> bool:
    while len(answer) >= 9:
        if answer[3] == http2.RST_STREAM:
            return True
        answer = answer[9 + int.from_bytes(answer[:3], "big") :]
    return False


async def test_91_a_message_over_the_cap_is_refused_by_grpc(served: Served) -> None:
    found = await outcome(served.client.generation.Generate(request("x" * (1 << 20))))
    assert (found.code, found.reason) == ("RESOURCE_EXHAUSTED", "")
    assert (await outcome(served.client.generation.Generate(request("x")))).code == "OK"


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_92_a_compressed_bomb_is_refused_and_honest_compression_served(
    served: Served, compression: grpc.Compression
) -> None:
    bomb = request("a" * (16 << 20))
    found = await outcome(served.client.generation.Generate(bomb, compression=compression))
    assert found.code == "RESOURCE_EXHAUSTED"
    found = await outcome(served.client.generation.Generate(request("x"), compression=compression))
    assert found.code == "OK"


async def test_92_unknown_encoding_and_a_flag_without_one(served: Served) -> None:
    body = http2.message(b"\x12\x03\x0a\x01x", compressed=1)
    answer, _ = await exchange(served, http2.call(GENERATE, body, grpc__encoding="rot13"))
    assert b"\x0212" in answer or b"\x0213" in answer  # UNIMPLEMENTED; INTERNAL where the name itself is unknown
    answer, closed = await exchange(served, http2.call(GENERATE, body))
    assert closed or b"grpc-status" in answer


@pytest.mark.parametrize(
    "extra",
    [
        {"content-type": "text/plain"},
        {"te": "gzip"},
        {"grpc-timeout": "soon"},
        {"grpc-timeout": "-1S"},
        {"Upper": "case"},
        {"x-bin": "%%%"},
        {":path": "no-slash"},
        {":method": "GET"},
    ],
)
async def test_93_95_faulty_headers_are_an_error_and_no_hang(served: Served, extra: dict[str, str]) -> None:
    body = http2.message(request("x", max_new_tokens=1).SerializeToString())
    data = http2.call(extra.pop(":path", GENERATE), body, **extra)
    answer, closed = await exchange(served, data, seconds=1.0)
    assert closed or b"status" in answer or _has_reset(answer)


async def test_94_metadata_within_8_kib_is_served_and_above_16_kib_refused(served: Served) -> None:
    async def call(*metadata: tuple[str, str]) -> str:
        found = await outcome(served.client.generation.Generate(request("x", max_new_tokens=1), metadata=metadata))
        return found.code

    assert await call(("x-big", "a" * 4096)) == "OK"
    assert await call(("x-big", "a" * 17_000)) == "RESOURCE_EXHAUSTED"
    assert await call(*((f"x-{i}", "a" * 40) for i in range(500))) == "RESOURCE_EXHAUSTED"
    assert await call(("x-big", "a" * 12_000)) in ("OK", "RESOURCE_EXHAUSTED")
    assert await call() == "OK"


@pytest.mark.parametrize(
    "opening",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00" + b"\0" * 100, bytes(range(256)) * 2],
    ids=["HTTP/1.1", "TLS hello", "noise"],
)
async def test_96_other_protocols_are_closed_at_once(served: Served, opening: bytes) -> None:
    begin = time.monotonic()
    _, closed = await exchange(served, opening, until=b"\0never")
    assert closed and time.monotonic() - begin < 1.0


@pytest.mark.parametrize(
    "opening", [b"", http2.PREFACE[:10], http2.PREFACE], ids=["silent", "half a preface", "no SETTINGS"]
)
async def test_97_silent_connections_are_closed_at_the_handshake_timeout(
    opening: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(grpc_server.server_options(ServerConfig(), shared_port=False))
    assert options["grpc.server_handshake_timeout_ms"] == 5000
    original = grpc_server.server_options

    def quick(*args: Any, **kwargs: Any) -> list[tuple[str, int]]:
        return list((dict(original(*args, **kwargs)) | {"grpc.server_handshake_timeout_ms": 300}).items())

    monkeypatch.setattr(grpc_server, "server_options", quick)
    async with serving() as served:
        begin = time.monotonic()
        _, closed = await exchange(served, opening, until=b"\0never")
        assert closed and time.monotonic() - begin < 2.5


async def test_connections_above_the_limit_are_refused_and_existing_ones_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpc_server, "MAX_CONNECTIONS", 3)
    async with serving() as served:
        assert (await outcome(served.client.generation.Generate(request("x")))).code == "OK"
        host, _, port = served.address.rpartition(":")
        writers = []
        closed = 0
        for _ in range(8):
            reader, writer = await asyncio.open_connection(host, int(port))
            writers.append(writer)
            try:
                writer.write(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0))
                closed += not await asyncio.wait_for(reader.read(1), 2)
            except OSError:
                closed += 1
        assert closed >= 5
        assert (await outcome(served.client.generation.Generate(request("x")))).code == "OK"
        for writer in writers:
            writer.close()


@pytest.mark.slow
async def test_102_client_pings_through_a_silent_call_do_not_end_it(served: Served) -> None:
    served.core.hold()
    client = served.connect(
        **{
            "grpc.keepalive_time_ms": 1000,
            "grpc.keepalive_permit_without_calls": 1,
            "grpc.http2.max_pings_without_data": 0,
        }
    )
    call = asyncio.create_task(outcome(client.generation.Generate(request("x"))))
    await asyncio.sleep(8)
    served.core.release()
    assert (await call).code == "OK"
    await client.channel.close()


# --- 103, 104: methods that do not exist, or are called wrongly


@pytest.mark.parametrize(
    "method",
    ["GenerationService/Nothing", "Nothing/Generate", "/x/y", "/a.b.C/D/E", "/octavo.v1.GenerationService/"],
)
@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_stream"])
async def test_103_unknown_methods_are_unimplemented(served: Served, method: str, kind: str) -> None:
    assert (await call_raw(served, method, kind, b"")).code == "UNIMPLEMENTED"


@pytest.mark.parametrize("method", [*UNARY, SERVER_STREAMS[0]])
async def test_104_a_call_without_any_message_is_an_error_and_no_hang(served: Served, method: str) -> None:
    found = await call_raw(served, method, "stream_stream")
    assert found.code in ("INVALID_ARGUMENT", "PERMISSION_DENIED")


async def test_104_streams_called_as_unary_and_the_reverse_end(served: Served) -> None:
    streamed = generation_pb2.StreamGenerateRequest(request=request("x", max_new_tokens=1)).SerializeToString()
    assert (await call_raw(served, SERVER_STREAMS[0], "unary_unary", streamed)).code == "OK"
    # A client that takes one message of many waits for its own deadline; the server is done at once.
    streamed = generation_pb2.StreamGenerateRequest(request=request("x")).SerializeToString()
    waiting = asyncio.create_task(call_raw(served, SERVER_STREAMS[0], "unary_unary", streamed, timeout=0.5))
    await until(lambda: len(served.core.added) == 2 and not served.core.running, "the request runs on")
    assert (await waiting).code in ("OK", "INTERNAL", "UNIMPLEMENTED", "DEADLINE_EXCEEDED")
    one = request("x").SerializeToString()
    found = await call_raw(served, UNARY[0], "stream_stream", one, one, one)
    assert found.code in ("OK", "INVALID_ARGUMENT", "INTERNAL")


async def test_requests_of_other_services_with_unknown_fields_are_refused(served: Served) -> None:
    unknown = b"\xb8\x3e\x01"
    for method in ("ModelService/GetModel", "ControlService/GetLoad", "ControlService/GetServerInfo"):
        found = await call_raw(served, method, "unary_unary", unknown)
        assert (found.code, found.reason, found.fields) == ("INVALID_ARGUMENT", "UNSUPPORTED_FIELD", ["999"])


# --- health under abuse


async def test_112_health_watchers_that_do_not_read_hold_nobody_up(served: Served) -> None:
    lazy = [
        served.client.health.Watch(health_pb2.HealthCheckRequest(service="octavo.v1.GenerationService"))
        for _ in range(20)
    ]
    watch = served.client.health.Watch(health_pb2.HealthCheckRequest(service="octavo.v1.GenerationService"))
    assert (await watch.read()).status == 1
    for _ in range(50):
        served.engine.start_draining()
        served.engine.stop_draining()
        await asyncio.sleep(0)
    last = None
    for _ in range(3):
        last = await watch.read()
    assert last is not None
    for call in [*lazy, watch]:
        call.cancel()
    await until(lambda: not served.server._health._watchers, "watchers are left")


async def test_every_service_survives_a_mixed_load(served: Served) -> None:
    calls = []
    for i in range(60):
        calls += [
            served.client.generation.Generate(request("x", max_new_tokens=3)),
            served.client.generation.Generate(request("x", top_p=float(i))),
            served.client.models.Tokenize(model_pb2.TokenizeRequest(texts=["some text"] * 5)),
            served.client.models.Detokenize(model_pb2.DetokenizeRequest(token_ids=[types_pb2.TokenIds(ids=[i, 9999])])),
            served.client.control.GetLoad(control_pb2.GetLoadRequest()),
            served.client.control.AbortRequests(control_pb2.AbortRequestsRequest(request_ids=["nobody"])),
        ]
    codes = {found.code for found in await asyncio.gather(*(outcome(call) for call in calls))}
    assert codes == {"OK", "INVALID_ARGUMENT"}
