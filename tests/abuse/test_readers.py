"""Group E: clients that read slowly or not at all. Generation goes on, memory is bounded, others are not held up."""

from __future__ import annotations

import asyncio

import pytest
from octavo.frontend import request_handle
from octavo.server import rpc
from octavo_proto.v1 import generation_pb2 as pb
from server.harness import Served, drain, outcome, request, until
from server.test_generation import by_sequence


def big(n: int = 16) -> pb.GenerateRequest:
    """An answer of about 2 MB for n = 16."""
    what = request("x", max_new_tokens=800, do_sample=True, seed=1, num_return_sequences=n)
    what.output.logprobs = 20
    return what


async def test_75_generation_ends_although_nobody_reads(served: Served) -> None:
    what = pb.StreamGenerateRequest(request=request("x", max_new_tokens=1000))
    call = served.client.generation.StreamGenerate(what)
    await until(lambda: bool(served.core.added), "submitted")
    await until(lambda: not served.core.running, "generation waits for its reader", limit=5)
    responses = await drain(call)
    assert len(by_sequence(responses)[0, 0][1]) == 1000


async def test_77_a_slow_reader_gets_fewer_and_larger_messages(served: Served) -> None:
    served.core.hold()
    call = served.client.generation.StreamGenerate(pb.StreamGenerateRequest(request=big(4)))
    await served.core.arrived.wait()
    for _ in range(800):
        served.core.step()
    responses = await drain(call)
    assert len(responses) < 100
    assert all(len(ids) == 800 for _, ids, _ in by_sequence(responses).values())


@pytest.mark.parametrize("shape", ["stream", "session"])
async def test_76_a_reader_that_stalls_on_megabytes_is_ended(
    served: Served, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(request_handle, "STALL_SECONDS", 0.1)
    served.core.hold()
    # A client with a small window, so that gRPC itself takes little before it stops.
    client = served.connect(**{"grpc.http2.bdp_probe": 0, "grpc.http2.lookahead_bytes": 65536})
    fast = asyncio.create_task(outcome(served.client.generation.Generate(request("witness", max_new_tokens=900))))
    await served.core.arrived.wait()
    if shape == "stream":
        call = client.generation.StreamGenerate(pb.StreamGenerateRequest(request=big()))
    else:
        call = client.generation.GenerateSession()
        submit = pb.GenerateSessionRequest.Submit(tag=1, request=big())
        await call.write(pb.GenerateSessionRequest(submit=submit))
    await until(lambda: len(served.core.running) == 17, "submitted")
    for _ in range(750):  # each one a turn of the loop, so that the server writes until it is blocked
        served.core.step()
        await asyncio.sleep(0)
    await until(lambda: len(served.core.running) == 1, "the stalled reader's sequences still run", limit=5)
    served.core.release()
    assert (await fast).code == "OK"

    async def read_all() -> None:
        while await call.read():
            pass

    found = await outcome(read_all())
    assert (found.code, found.reason) == ("ABORTED", "SLOW_READER")
    await client.channel.close()


@pytest.mark.parametrize("shape", ["stream", "session"])
async def test_an_answer_that_is_complete_does_not_wait_for_ever_for_its_reader(
    served: Served, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "STALL_SECONDS", 0.2)
    client = served.connect(**{"grpc.http2.bdp_probe": 0, "grpc.http2.lookahead_bytes": 65536})
    if shape == "stream":
        call = client.generation.StreamGenerate(pb.StreamGenerateRequest(request=big()))
    else:
        call = client.generation.GenerateSession()
        submit = pb.GenerateSessionRequest.Submit(tag=1, request=big())
        await call.write(pb.GenerateSessionRequest(submit=submit))
    await until(lambda: bool(served.core.added), "submitted")
    await until(lambda: not served.core.running, "generation waits for its reader", limit=5)
    await asyncio.sleep(0.5)
    await until(lambda: not served.engine.num_inflight, "the request waits for its reader", limit=5)

    async def read_all() -> None:
        while await call.read():
            pass

    found = await outcome(read_all())
    assert (found.code, found.reason) == ("ABORTED", "SLOW_READER")
    await client.channel.close()


async def test_a_session_that_is_not_read_does_not_queue_errors_without_bound(served: Served) -> None:
    client = served.connect(**{"grpc.http2.bdp_probe": 0, "grpc.http2.lookahead_bytes": 65536})
    call = client.generation.GenerateSession()
    bad = pb.GenerateSessionRequest(
        submit=pb.GenerateSessionRequest.Submit(tag=1, request=request("x" * 1000, top_p=7.0, min_p=7.0))
    )

    async def flood() -> None:
        for _ in range(20_000):
            await call.write(bad)

    task = asyncio.create_task(flood())
    done, _ = await asyncio.wait({task}, timeout=1.0)
    assert not done, "20 MB of requests were read although their answers are not"
    task.cancel()
    call.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await client.channel.close()
