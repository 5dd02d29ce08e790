"""ModelService, ControlService, health, reflection, channelz."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from octavo import __version__
from octavo.config import Limits
from octavo.server import fields
from octavo.types import EngineLoad
from octavo_proto.v1 import control_pb2, generation_pb2, model_pb2, types_pb2
from server.fake_core import INFO
from server.harness import Client, Served, drain, outcome, request, serving, stream_request, until

SERVICES = ["octavo.v1.GenerationService", "octavo.v1.ModelService", "octavo.v1.ControlService"]
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


@contextlib.asynccontextmanager
async def with_admin(**config: Any) -> AsyncIterator[tuple[Served, Client]]:
    with tempfile.TemporaryDirectory(prefix="oct-") as folder:
        path = Path(folder) / "admin.sock"
        async with serving(admin_address=f"unix:{path}", **config) as served:
            assert path.stat().st_mode & 0o777 == 0o600
            admin = served.connect(f"unix:{path}")
            try:
                yield served, admin
            finally:
                await admin.channel.close()
        assert not path.exists()


# --- ModelService


async def test_get_model_tells_facts_limits_and_fields(served: Served) -> None:
    model = await served.client.models.GetModel(model_pb2.GetModelRequest())
    assert (model.model, model.architecture, model.vocab_size) == ("demo", "GPT2LMHeadModel", 4096)
    assert list(model.supported_fields) == fields.supported_fields()
    assert model.default_params.max_new_tokens == 20 and model.default_params.top_k == 50
    assert list(model.eos_token_ids) == [4095] and model.bos_token_id == 4095
    assert model.limits.max_prompts == 128 and model.limits.max_queue_time.seconds == 30
    found = await outcome(served.client.models.GetModel(model_pb2.GetModelRequest(model="another")))
    assert (found.code, found.reason, found.resource) == ("NOT_FOUND", "MODEL_NOT_FOUND", "another")


async def test_get_model_waits_for_the_engine() -> None:
    async with serving(up=False, check=False) as served:
        found = await outcome(served.client.models.GetModel(model_pb2.GetModelRequest()))
        assert (found.code, found.reason) == ("UNAVAILABLE", "ENGINE_STARTING")


async def test_tokenize_and_detokenize_are_inverse(served: Served) -> None:
    texts = ["I met a traveller", "naïve ☃", "x<|endoftext|>y"]
    tokens = await served.client.models.Tokenize(model_pb2.TokenizeRequest(texts=texts))
    back = await served.client.models.Detokenize(model_pb2.DetokenizeRequest(token_ids=tokens.results))
    assert list(back.texts) == texts
    skipped = model_pb2.DetokenizeRequest(token_ids=tokens.results, skip_special_tokens=True)
    assert (await served.client.models.Detokenize(skipped)).texts[2] == "xy"
    split = model_pb2.TokenizeRequest(
        texts=texts[2:], prompt_options=types_pb2.PromptOptions(split_special_tokens=True)
    )
    assert 4095 not in (await served.client.models.Tokenize(split)).results[0].ids


@pytest.mark.parametrize(
    ("method", "message", "reason", "path"),
    [
        ("Tokenize", model_pb2.TokenizeRequest(texts=["x"] * 129), "INVALID_FIELD", "texts"),
        ("Tokenize", model_pb2.TokenizeRequest(texts=["x" * 131_073]), "INVALID_FIELD", "texts[0]"),
        ("Tokenize", model_pb2.TokenizeRequest.FromString(b"\xb8\x3e\x01"), "UNSUPPORTED_FIELD", "999"),
        (
            "Tokenize",
            model_pb2.TokenizeRequest(texts=["x"], prompt_options=types_pb2.PromptOptions(truncate_to_last=3)),
            "INVALID_FIELD",
            "prompt_options.truncate_to_last",
        ),
        (
            "Detokenize",
            model_pb2.DetokenizeRequest(token_ids=[types_pb2.TokenIds(ids=[4096])]),
            "INVALID_FIELD",
            "token_ids[0].ids[0]",
        ),
    ],
)
async def test_tokenizer_rpcs_name_the_field(
    served: Served, method: str, message: Any, reason: str, path: str
) -> None:  # fmt: skip
    found = await outcome(getattr(served.client.models, method)(message))
    assert (found.code, found.reason) == ("INVALID_ARGUMENT", reason)
    assert found.fields and found.fields[0].startswith(path.partition("[")[0])


# --- ControlService


async def test_server_info_before_and_after_the_engine_is_up() -> None:
    async with serving(up=False, check=False) as served:
        info = await served.client.control.GetServerInfo(control_pb2.GetServerInfoRequest())
        assert (info.version, info.instance_id, info.device) == (__version__, "instance", "")
        served.engine.engine_up(INFO, 2)
        info = await served.client.control.GetServerInfo(control_pb2.GetServerInfoRequest())
        assert (info.device, info.total_kv_blocks, info.engine_restarts) == ("cpu", 4096, 2)
        assert info.engine_start_time.seconds == 1 and info.start_time.seconds == 1


async def test_load_and_state(served: Served) -> None:
    served.core.report_load(EngineLoad(time=5.0, running_requests=3, steps=9))
    load = (await served.client.control.GetLoad(control_pb2.GetLoadRequest())).load
    assert (load.running_requests, load.engine_steps, load.time.seconds) == (3, 9, 5)
    assert load.state == control_pb2.SERVER_STATE_READY
    served.engine.start_draining()
    load = (await served.client.control.GetLoad(control_pb2.GetLoadRequest())).load
    assert load.state == control_pb2.SERVER_STATE_DRAINING
    served.engine.stop_draining()


async def test_watch_load_gives_the_first_at_once_and_ends_when_the_server_stops() -> None:
    async with serving(check=False) as served:
        call = served.client.control.WatchLoad(control_pb2.WatchLoadRequest(interval={"nanos": 100_000_000}))
        for _ in range(3):
            assert (await call.read()).load.state == control_pb2.SERVER_STATE_READY
        stopping = asyncio.create_task(served.server.stop(1.0))
        found = await outcome(drain_reads(call))
        assert (found.code, found.reason) == ("UNAVAILABLE", "DRAINING")
        await stopping


async def drain_reads(call: Any) -> None:
    while await call.read():
        pass


@pytest.mark.parametrize("interval", [{"nanos": 1}, {"seconds": 61}, {"seconds": -1}, {"seconds": 1, "nanos": -5}])
async def test_watch_load_refuses_an_interval_out_of_range(served: Served, interval: dict[str, int]) -> None:
    found = await outcome(drain(served.client.control.WatchLoad(control_pb2.WatchLoadRequest(interval=interval))))
    assert (found.code, found.fields) == ("INVALID_ARGUMENT", ["interval"])


ADMIN_CALLS = [
    ("Drain", control_pb2.DrainRequest()),
    ("Drain", control_pb2.DrainRequest(undo=True)),
    ("ResetPrefixCache", control_pb2.ResetPrefixCacheRequest()),
    ("AbortRequests", control_pb2.AbortRequestsRequest(all=True)),
]


@pytest.mark.parametrize(("method", "message"), ADMIN_CALLS)
async def test_operators_calls_are_refused_on_the_public_port(served: Served, method: str, message: Any) -> None:
    found = await outcome(getattr(served.client.control, method)(message))
    assert (found.code, found.reason) == ("PERMISSION_DENIED", "NOT_ADMIN")
    assert served.engine.state.value == "ready"


async def test_admin_socket_aborts_all_and_resets_the_cache() -> None:
    async with with_admin() as (served, admin):
        served.core.hold()
        calls = [asyncio.create_task(outcome(served.client.generation.Generate(request("x")))) for _ in range(3)]
        await until(lambda: len(served.core.running) == 3, "submitted")
        answer = await admin.control.AbortRequests(control_pb2.AbortRequestsRequest(all=True))
        assert answer.aborted_requests == 3 and len(answer.aborted_request_ids) == 3
        assert [(await call).reason for call in calls] == ["ABORTED_BY_OPERATOR"] * 3
        reset = await admin.control.ResetPrefixCache(control_pb2.ResetPrefixCacheRequest())
        assert reset.freed_blocks == served.core.freed_by_reset


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (control_pb2.AbortRequestsRequest(), "request_ids"),
        (control_pb2.AbortRequestsRequest(request_ids=["x"] * 1025), "request_ids"),
        (control_pb2.AbortRequestsRequest(request_ids=["x"], all=True), "request_ids"),
    ],
)
async def test_abort_requests_checks_its_request(message: Any, path: str) -> None:
    async with with_admin() as (_, admin):
        found = await outcome(admin.control.AbortRequests(message))
        assert (found.code, found.fields) == ("INVALID_ARGUMENT", [path])


async def test_drain_lets_running_requests_finish_and_can_be_undone() -> None:
    async with with_admin() as (served, admin):
        served.core.hold()
        running = asyncio.create_task(outcome(served.client.generation.Generate(request("x"))))
        await served.core.arrived.wait()
        drain_call = admin.control.Drain(control_pb2.DrainRequest())
        await until(lambda: served.engine.state.value == "draining", "draining")
        check = health_pb2.HealthCheckRequest(service=SERVICES[0])
        assert (await served.client.health.Check(check)).status == NOT_SERVING
        found = await outcome(served.client.generation.Generate(request("y")))
        assert (found.code, found.reason) == ("UNAVAILABLE", "DRAINING")
        served.core.release()
        assert (await running).code == "OK"
        answer = await drain_call
        assert (answer.finished_requests, answer.aborted_requests) == (1, 0)
        await admin.control.Drain(control_pb2.DrainRequest(undo=True))
        assert (await served.client.health.Check(check)).status == SERVING


async def test_drain_timeout_fails_what_is_left() -> None:
    async with with_admin() as (served, admin):
        served.core.hold()
        running = asyncio.create_task(outcome(served.client.generation.Generate(request("x"))))
        await served.core.arrived.wait()
        answer = await admin.control.Drain(control_pb2.DrainRequest(timeout={"nanos": 50_000_000}))
        assert (answer.finished_requests, answer.aborted_requests) == (0, 1)
        found = await running
        assert (found.code, found.reason) == ("UNAVAILABLE", "DRAINING")


async def test_draining_goes_on_when_its_rpc_is_cancelled_and_undo_ends_the_wait() -> None:
    async with with_admin() as (served, admin):
        served.core.hold()
        running = asyncio.create_task(outcome(served.client.generation.Generate(request("x"))))
        await served.core.arrived.wait()
        first = admin.control.Drain(control_pb2.DrainRequest())
        await until(lambda: served.engine.state.value == "draining", "draining")
        first.cancel()
        second = asyncio.create_task(outcome(admin.control.Drain(control_pb2.DrainRequest())))
        await asyncio.sleep(0.05)
        assert served.engine.state.value == "draining"
        await admin.control.Drain(control_pb2.DrainRequest(undo=True))
        assert (await second).result.aborted_requests == 0
        assert served.engine.state.value == "ready" and served.core.running
        served.core.release()
        assert (await running).code == "OK"


async def test_drain_with_shutdown_stops_the_server_and_cannot_be_undone() -> None:
    stopped: list[bool] = []
    async with with_admin(server={"stop_server": lambda: stopped.append(True)}) as (_, admin):
        await admin.control.Drain(control_pb2.DrainRequest(shutdown=True))
        assert stopped == [True]
        found = await outcome(admin.control.Drain(control_pb2.DrainRequest(undo=True)))
        assert (found.code, found.reason) == ("FAILED_PRECONDITION", "STOPPING")


# --- health


async def test_health_of_process_and_services_through_the_engines_life() -> None:
    async with serving(up=False, check=False) as served:

        async def status(name: str) -> int:
            return (await served.client.health.Check(health_pb2.HealthCheckRequest(service=name))).status

        async def all_of() -> list[int]:
            return [await status(name) for name in ["", *SERVICES]]

        assert await all_of() == [SERVING, NOT_SERVING, NOT_SERVING, NOT_SERVING]
        served.engine.engine_up(INFO, 0)
        assert await all_of() == [SERVING] * 4
        served.engine.engine_down()
        assert await all_of() == [SERVING, NOT_SERVING, NOT_SERVING, NOT_SERVING]
        served.engine.engine_up(INFO, 1)
        served.engine.start_draining()
        assert await all_of() == [SERVING, NOT_SERVING, NOT_SERVING, NOT_SERVING]
        served.engine.stop_draining()
        assert await all_of() == [SERVING] * 4
        served.server.stop_advertising()
        assert await all_of() == [SERVING, NOT_SERVING, NOT_SERVING, NOT_SERVING]
        assert (await outcome(served.client.generation.Generate(request("x")))).code == "OK"


async def test_health_default_readiness_turns_the_empty_name_round() -> None:
    async with serving(up=False, check=False, health_default="readiness") as served:
        assert (await served.client.health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        served.engine.engine_up(INFO, 0)
        assert (await served.client.health.Check(health_pb2.HealthCheckRequest())).status == SERVING
        listed = await served.client.health.List(health_pb2.HealthListRequest())
        assert set(listed.statuses) == {"", *SERVICES}


async def test_health_watch_streams_every_change(served: Served) -> None:
    watch = served.client.health.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]))
    unknown = served.client.health.Watch(health_pb2.HealthCheckRequest(service="nobody"))
    assert (await watch.read()).status == SERVING
    assert (await unknown.read()).status == SERVICE_UNKNOWN
    served.engine.start_draining()
    served.engine.stop_draining()
    served.engine.engine_down()
    assert [(await watch.read()).status for _ in range(3)] == [NOT_SERVING, SERVING, NOT_SERVING]
    served.engine.engine_up(INFO, 1)
    assert (await watch.read()).status == SERVING
    unknown.cancel()
    watch.cancel()


async def test_health_watch_ends_when_the_server_stops() -> None:
    async with serving(check=False) as served:
        watch = served.client.health.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]))
        assert (await watch.read()).status == SERVING
        stopping = asyncio.create_task(served.server.stop(1.0))
        found = await outcome(drain_reads(watch))
        assert found.code == "UNAVAILABLE"
        await stopping


@pytest.mark.parametrize("kind", ["session", "reflection", "unary"])
async def test_rpcs_that_wait_for_their_client_end_when_the_server_stops(kind: str) -> None:
    async with serving(check=False, reflection=True) as served:
        if kind == "unary":
            call = served.client.channel.stream_unary("/octavo.v1.GenerationService/Generate")()
            found = asyncio.create_task(outcome(call))
            await asyncio.sleep(0.1)
        else:
            path = {
                "session": "/octavo.v1.GenerationService/GenerateSession",
                "reflection": "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            }[kind]
            call = served.client.channel.stream_stream(path)()
            if kind == "reflection":
                asked = reflection_pb2.ServerReflectionRequest(list_services="*")
                await call.write(asked.SerializeToString())
                await call.read()
            else:
                await call.write(cancel_of_nothing().SerializeToString())
            found = asyncio.create_task(outcome(drain_reads(call)))
            await asyncio.sleep(0.1)
        await asyncio.wait_for(served.server.stop(30.0), 5.0)
        assert ((await found).code, (await found).reason) == ("UNAVAILABLE", "DRAINING")


def cancel_of_nothing() -> generation_pb2.GenerateSessionRequest:
    return generation_pb2.GenerateSessionRequest(cancel=generation_pb2.GenerateSessionRequest.Cancel(tag=1))


async def test_a_session_finishes_what_runs_when_the_server_stops() -> None:
    async with serving(check=False) as served:
        served.core.hold()
        call = served.client.generation.GenerateSession()
        submit = generation_pb2.GenerateSessionRequest.Submit(tag=1, request=request(max_new_tokens=3))
        await call.write(generation_pb2.GenerateSessionRequest(submit=submit))
        await served.core.arrived.wait()
        stopping = asyncio.create_task(served.server.stop(30.0))
        await asyncio.sleep(0.1)
        served.core.release()
        events = []
        while not any(event.response.HasField("usage") for event in events):
            events += (await call.read()).events
        found = await outcome(drain_reads(call))
        assert (found.code, found.reason) == ("UNAVAILABLE", "DRAINING")
        await asyncio.wait_for(stopping, 5.0)


async def test_a_message_that_does_not_come_is_not_waited_for_for_ever() -> None:
    async with serving(limits=Limits(max_request_duration=0.1)) as served:
        found = await outcome(served.client.channel.stream_unary("/octavo.v1.GenerationService/Generate")())
        assert (found.code, found.reason) == ("DEADLINE_EXCEEDED", "SERVER_MAX_DURATION")


async def test_health_of_an_unknown_service(served: Served) -> None:
    found = await outcome(served.client.health.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert found.code == "NOT_FOUND"


# --- reflection and channelz


async def reflect(served: Served, version: str, *requests: reflection_pb2.ServerReflectionRequest) -> list[Any]:
    call = served.client.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    return await drain(call(iter(requests)))


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_services_and_gives_their_files(version: str) -> None:
    async with serving(reflection=True) as served:
        ask = reflection_pb2.ServerReflectionRequest
        listed, symbol, missing = await reflect(
            served,
            version,
            ask(list_services=""),
            ask(file_containing_symbol="octavo.v1.GenerationService"),
            ask(file_containing_symbol="octavo.v1.Nothing"),
        )
        names = [service.name for service in listed.list_services_response.service]
        assert set(SERVICES) <= set(names) and "grpc.health.v1.Health" in names
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(raw)
            for raw in symbol.file_descriptor_response.file_descriptor_proto
        ]
        assert "octavo_proto/v1/generation.proto" in [file.name for file in files]
        assert missing.error_response.error_code == 5


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_is_off_unless_asked_for(served: Served, version: str) -> None:
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    assert (await outcome(reflect(served, version, ask))).code == "UNIMPLEMENTED"


async def test_channelz_answers_on_the_admin_address_only() -> None:
    async with with_admin() as (served, admin):
        servers = await channelz_pb2_grpc.ChannelzStub(admin.channel).GetServers(channelz_pb2.GetServersRequest())
        assert servers.server
        missing = channelz_pb2.GetServerRequest(server_id=10**9)
        found = await outcome(channelz_pb2_grpc.ChannelzStub(admin.channel).GetServer(missing))
        assert found.code == "NOT_FOUND"
        public = channelz_pb2_grpc.ChannelzStub(served.client.channel)
        assert (await outcome(public.GetServers(channelz_pb2.GetServersRequest()))).code == "UNIMPLEMENTED"


async def test_metrics_hook_is_told_of_every_rpc() -> None:
    from octavo.metrics import Metrics

    metrics = Metrics("test")
    async with serving(server={"metrics": metrics}) as served:
        await served.client.generation.Generate(request("x", max_new_tokens=3))
        await drain(served.client.generation.StreamGenerate(stream_request("x", "y", max_new_tokens=3)))
        await outcome(served.client.generation.Generate(request("x", top_p=7.0)))
        await outcome(served.client.raw("GenerationService/Nothing")(b""))
    text = metrics.render().decode()
    method = 'grpc_method="Generate",grpc_service="octavo.v1.GenerationService"'
    assert f'grpc_server_handled_total{{grpc_code="OK",{method}}}' in text
    assert f'grpc_server_handled_total{{grpc_code="INVALID_ARGUMENT",{method}}} 1.0' in text
    assert "Nothing" not in text
    assert 'octavo_admission_rejections_total{reason="INVALID_FIELD"} 1.0' in text
    assert 'octavo_request_success_total{finished_reason="length"}' in text
