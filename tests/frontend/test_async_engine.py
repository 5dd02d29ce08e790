"""AsyncEngine with a core that only records: delivery, cancellation, deadlines, limits, draining, a dying core."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from frontend.fakes import FakeCore, demo, engine_info, ids_of, request
from octavo.config import Limits, ServerConfig
from octavo.errors import Code, Reason, RequestError
from octavo.frontend import request_handle
from octavo.frontend.async_engine import MAX_TOKENIZER_CALLS, AsyncEngine, EngineState, RequestHandle
from octavo.frontend.cluster import LocalCluster
from octavo.frontend.failures import failure
from octavo.ipc import AbortCause, LoadReport
from octavo.types import EngineLoad, FinishReason, GenerateRequest, OutputOptions, Prompt, PromptOptions

LENGTH = FinishReason.LENGTH


def make(core: FakeCore | None = None, *, up: bool = True, frontend_processes: int = 1, **limits: Any) -> AsyncEngine:
    config = ServerConfig(limits=Limits(**limits), frontend_processes=frontend_processes)
    engine = AsyncEngine(demo(), core or FakeCore(), config, cache_secret=b"")
    if up:
        engine.engine_up(engine_info(), restarts=0)
    return engine


async def reason_of(awaitable: Any) -> Reason:
    with pytest.raises(RequestError) as caught:
        await awaitable
    return caught.value.reason


async def stream(core: FakeCore, engine: AsyncEngine, **options: Any) -> tuple[RequestHandle, int]:
    handle = await engine.submit(request(**options), streaming=True)
    return handle, core.key


async def test_updates_arrive_as_they_come_and_end_with_none() -> None:
    core = FakeCore()
    handle, key = await stream(core, make(core))
    reader = asyncio.ensure_future(handle.next())
    await asyncio.sleep(0)
    assert not reader.done()
    core.send((key, ids_of(" the")[0], 0), started=[key])
    update = await reader
    assert update is not None
    assert update.deltas[0].text == " the"
    core.send((key, 300, 0))
    core.send((key, 301, LENGTH))
    last = await handle.next()
    assert last is not None
    assert last.deltas[0].token_ids == [300, 301], "what came while nobody read is merged"
    assert last.usage is not None
    assert await handle.next() is None
    assert await handle.next() is None
    handle.close()


async def test_collect_gives_the_whole_answer_sorted() -> None:
    core = FakeCore()
    engine = make(core)
    handle = await engine.submit(request("a", "b", do_sample=True, num_return_sequences=2), streaming=False)
    keys = [key for sent in core.requests for key in range(sent.key, sent.key + 2)]
    reader = asyncio.ensure_future(handle.collect())
    for token_id in (300, 301):
        await asyncio.sleep(0)
        core.send(*[(key, token_id, LENGTH if token_id == 301 else 0) for key in reversed(keys)], started=keys[::2])
    answer = await reader
    assert [(delta.prompt_index, delta.output_index) for delta in answer.deltas] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(delta.token_ids == [300, 301] for delta in answer.deltas)
    assert len(answer.prompts) == 2
    handle.close()
    assert engine.num_inflight == 0


async def test_closing_aborts_in_the_core_once_and_gives_the_places_back() -> None:
    core = FakeCore()
    engine = make(core, max_inflight_requests=1)
    handle, key = await stream(core, engine)
    assert await reason_of(engine.submit(request(), streaming=True)) is Reason.QUEUE_FULL
    handle.close()
    handle.close()
    assert core.aborts == [([key], AbortCause.CLIENT)]
    core.send((key, 300, 0))
    assert engine.num_inflight == 0
    (await stream(core, engine))[0].close()


async def test_closing_a_finished_request_aborts_nothing() -> None:
    core = FakeCore()
    engine = make(core)
    handle, key = await stream(core, engine)
    core.send((key, 300, LENGTH))
    assert engine.num_inflight == 1
    handle.close()
    assert core.aborts == []
    assert engine.num_inflight == 0


async def test_cancelled_reader_leaves_the_request_to_be_closed() -> None:
    core = FakeCore()
    handle, key = await stream(core, make(core))
    reader = asyncio.ensure_future(handle.next())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    handle.close()
    assert core.aborts == [([key], AbortCause.CLIENT)]


async def test_stop_string_aborts_its_sequence_in_the_core() -> None:
    core = FakeCore()
    handle, key = await stream(core, make(core), stop_strings=["king"])
    core.send((key, ids_of(" king")[0], 0))
    assert core.aborts == [([key], AbortCause.STOP_STRING)]
    update = await handle.next()
    assert update is not None
    assert update.usage is not None
    handle.close()


async def test_client_deadline_fails_after_the_text_so_far() -> None:
    core = FakeCore()
    engine = make(core)
    handle = await engine.submit(request(), streaming=True, deadline=time.monotonic() + 0.05)
    assert core.requests[-1].deadline_is_client
    core.send((core.key, 300, 0))
    await asyncio.sleep(0.07)
    update = await handle.next()
    assert update is not None
    assert update.deltas[0].token_ids == [300]
    assert await reason_of(handle.next()) is Reason.CLIENT_DEADLINE
    assert core.aborts == [([core.key], AbortCause.CLIENT)]
    handle.close()


async def test_servers_own_limit_applies_without_a_deadline() -> None:
    core = FakeCore()
    engine = make(core, max_request_duration=0.05)
    handle = await engine.submit(request(), streaming=False, deadline=time.monotonic() + 100)
    assert not core.requests[-1].deadline_is_client
    assert await reason_of(handle.collect()) is Reason.SERVER_MAX_DURATION
    handle.close()


async def test_deadline_in_the_past_is_never_sent_to_the_core() -> None:
    core = FakeCore()
    engine = make(core)
    assert await reason_of(engine.submit(request(), streaming=True, deadline=0.0)) is Reason.CLIENT_DEADLINE
    assert core.requests == []
    assert engine.num_inflight == 0


async def test_places_are_counted_all_or_nothing_and_divided_among_the_front_ends() -> None:
    core = FakeCore()
    engine = make(core, max_inflight_requests=32, frontend_processes=2)
    handle, _ = await stream(core, engine, do_sample=True, num_return_sequences=2)
    with pytest.raises(RequestError) as caught:
        await engine.submit(request(do_sample=True, num_return_sequences=15), streaming=True)
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert caught.value.retry_after
    other, _ = await stream(core, engine, do_sample=True, num_return_sequences=14)
    handle.close()
    other.close()
    too_large = engine.submit(request(*["a"] * 17), streaming=True)
    assert await reason_of(too_large) is Reason.REQUEST_TOO_LARGE


async def test_one_tenant_cannot_take_all_places() -> None:
    core = FakeCore()
    engine = make(core, max_tenant_requests=1)
    first = await engine.submit(request(), streaming=True, tenant="a")
    assert await reason_of(engine.submit(request(), streaming=True, tenant="a")) is Reason.TENANT_LIMIT
    for tenant in ("b", "", ""):
        (await engine.submit(request(), streaming=True, tenant=tenant)).close()
    first.close()


async def test_waiting_prompt_tokens_are_bounded_until_their_computation_has_finished() -> None:
    core = FakeCore()
    engine = make(core, max_waiting_tokens=100)
    long = GenerateRequest(prompts=[Prompt(token_ids=[5] * 80)])
    first = await engine.submit(long, streaming=True)
    key = core.key
    assert await reason_of(engine.submit(long, streaming=True)) is Reason.TOKENS_FULL
    core.send((key, 300, 0), started=[key])
    second = await engine.submit(long, streaming=True)
    second.close()
    third = await engine.submit(long, streaming=True)
    for handle in (first, third):
        handle.close()


async def test_full_socket_is_queue_full_and_leaves_nothing_behind() -> None:
    core = FakeCore()
    engine = make(core, max_inflight_requests=1, max_waiting_tokens=100)
    long = GenerateRequest(prompts=[Prompt(token_ids=[5] * 80)])
    core.refusal = failure(Reason.QUEUE_FULL)
    for _ in range(3):
        assert await reason_of(engine.submit(long, streaming=True)) is Reason.QUEUE_FULL
    assert engine.num_inflight == 0
    core.refusal = None
    (await engine.submit(long, streaming=True)).close()


async def test_dying_core_fails_everything_and_the_next_one_serves() -> None:
    core = FakeCore()
    engine = make(core, up=False)
    states: list[EngineState] = []
    engine.on_state_change(states.append)
    assert await reason_of(engine.submit(request(), streaming=True)) is Reason.ENGINE_STARTING
    engine.engine_up(engine_info(), restarts=0)
    handle, key = await stream(core, engine)
    core.send((key, 300, 0))
    waiting, _ = await stream(core, engine)
    reader = asyncio.ensure_future(waiting.next())
    await asyncio.sleep(0)
    engine.engine_down()
    assert await reason_of(reader) is Reason.ENGINE_RESTARTED
    update = await handle.next()
    assert update is not None
    assert update.deltas[0].token_ids == [300]
    assert await reason_of(handle.next()) is Reason.ENGINE_RESTARTED
    assert await reason_of(engine.submit(request(), streaming=True)) is Reason.ENGINE_RESTARTED
    engine.engine_up(engine_info(), restarts=1)
    core.send((key, 301, 0))
    assert engine.restarts == 1
    assert states == [EngineState.READY, EngineState.RESTARTING, EngineState.READY]
    assert core.aborts == [], "there is nobody to tell"
    for each in (handle, waiting):
        each.close()


async def test_draining_refuses_new_requests_and_waits_for_running_ones() -> None:
    core = FakeCore()
    engine = make(core)
    handle, key = await stream(core, engine)
    engine.start_draining()
    assert engine.state is EngineState.DRAINING
    assert await reason_of(engine.submit(request(), streaming=True)) is Reason.DRAINING
    assert not await engine.wait_idle(0.02)
    core.send((key, 300, LENGTH))
    assert not await engine.wait_idle(0.02), "the reader has not got it yet"
    assert await handle.next() is not None
    handle.close()
    assert await engine.wait_idle(0.02)
    engine.stop_draining()
    assert engine.state is EngineState.READY


async def test_fail_all_ends_what_a_drain_cannot_wait_for() -> None:
    core = FakeCore()
    engine = make(core)
    handle, key = await stream(core, engine)
    engine.fail_all(failure(Reason.DRAINING))
    assert core.aborts == [([key], AbortCause.CLIENT)]
    assert await reason_of(handle.next()) is Reason.DRAINING
    handle.close()


async def test_abort_by_id_ends_all_requests_of_that_id_and_only_those_of_the_tenant() -> None:
    core = FakeCore()
    engine = make(core)
    named = GenerateRequest(prompts=[Prompt(text="a")], request_id="same")
    mine = [await engine.submit(named, streaming=True, tenant="a") for _ in range(2)]
    key = core.key
    other = await engine.submit(named, streaming=True, tenant="b")
    core.send((key, ids_of(" the")[0], 0))
    assert await engine.abort_requests(["same", "unknown"], "a") == [("same", 2)]
    assert [cause for _, cause in core.aborts] == [AbortCause.OPERATOR]
    update = await mine[1].next()
    assert update is not None
    assert update.deltas[0].text == " the"
    assert update.deltas[0].finish is not None
    assert update.deltas[0].finish.reason == FinishReason.ABORTED
    assert await reason_of(mine[1].next()) is Reason.ABORTED_BY_OPERATOR
    assert await engine.abort_requests(["same"], "a") == [], "they have ended"
    assert await engine.abort_requests(None, None) == [("same", 1)]
    for handle in [*mine, other]:
        handle.close()
    assert engine.num_inflight == 0


async def test_reader_that_stalls_with_too_much_pending_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_handle, "STALL_BYTES", 100)
    monkeypatch.setattr(request_handle, "STALL_SECONDS", 0.05)
    core = FakeCore()
    engine = make(core)
    stalled, stalled_key = await stream(core, engine, max_new_tokens=100)
    reading, reading_key = await stream(core, engine, max_new_tokens=100)
    unary = await engine.submit(request(max_new_tokens=100), streaming=False)
    told: list[RequestError] = []
    stalled.on_failure(told.append)
    for _ in range(8):
        core.send(*[(key, 300, 0) for key in (stalled_key, reading_key, core.key) for _ in range(10)])
        await reading.next()
        await asyncio.sleep(0.01)
    assert core.aborts == [([stalled_key], AbortCause.CLIENT)]
    assert [error.reason for error in told] == [Reason.SLOW_READER]
    assert not reading.state.ended
    assert not unary.state.ended
    update = await stalled.next()
    assert update is not None
    assert await reason_of(stalled.next()) is Reason.SLOW_READER
    for handle in (stalled, reading, unary):
        handle.close()


async def test_held_back_tokens_come_by_timer() -> None:
    core = FakeCore()
    output = OutputOptions(stream_min_tokens=50, stream_max_delay=0.03)
    handle = await make(core).submit(request(output=output, max_new_tokens=100), streaming=True)
    core.send((core.key, 300, 0))
    assert await handle.next() is not None
    core.send((core.key, 301, 0))
    begin = time.monotonic()
    update = await handle.next()
    assert update is not None
    assert update.deltas[0].token_ids == [301]
    assert 0.02 < time.monotonic() - begin < 1
    handle.close()


async def test_message_that_makes_no_sense_fails_what_is_in_flight_and_no_more() -> None:
    core = FakeCore()
    engine = make(core)
    handle, key = await stream(core, engine)
    core.send((key, 300, 77))
    assert await reason_of(drained(handle)) is Reason.INTERNAL
    handle.close()
    handle, key = await stream(core, engine)
    core.on_broken()
    assert await reason_of(handle.next()) is Reason.INTERNAL
    handle.close()
    (await stream(core, engine))[0].close()


async def drained(handle: RequestHandle) -> None:
    while await handle.next() is not None:
        pass


async def test_long_texts_are_tokenized_without_holding_up_the_loop() -> None:
    core = FakeCore()
    engine = make(core)
    submitting = asyncio.ensure_future(engine.submit(request("word " * 20_000), streaming=True))
    turns = 0
    while not submitting.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 3
    assert await reason_of(submitting) is Reason.CONTEXT_LENGTH_EXCEEDED
    assert engine.num_inflight == 0
    engine.close()


async def test_cancelled_submission_gives_its_places_back() -> None:
    engine = make(max_inflight_requests=1)
    submitting = asyncio.ensure_future(engine.submit(request("word " * 20_000), streaming=True))
    await asyncio.sleep(0)
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    assert engine.num_inflight == 0
    (await engine.submit(request(), streaming=True)).close()
    engine.close()


async def test_a_flood_of_tokenizer_rpcs_is_bounded_and_holds_up_no_request() -> None:
    engine = make()
    free = threading.Event()
    engine._rpc_thread.submit(free.wait)
    text = "word " * 1_000
    waiting = [asyncio.ensure_future(engine.tokenize([text], PromptOptions())) for _ in range(MAX_TOKENIZER_CALLS)]
    await asyncio.sleep(0)
    assert await reason_of(engine.tokenize([text], PromptOptions())) is Reason.QUEUE_FULL
    assert len(await engine.tokenize(["short"], PromptOptions())) == 1
    assert await reason_of(engine.submit(request("word " * 20_000), streaming=True)) is Reason.CONTEXT_LENGTH_EXCEEDED
    waiting.pop().cancel()
    free.set()
    assert len(await asyncio.gather(*waiting)) == MAX_TOKENIZER_CALLS - 1
    await engine.tokenize([text], PromptOptions())
    engine.close()


async def test_an_idle_engine_is_idle_without_any_time() -> None:
    engine = make()
    assert await engine.wait_idle(0.0)
    handle = await engine.submit(request(), streaming=True)
    assert not await engine.wait_idle(0.0)
    handle.close()
    assert await engine.wait_idle(0.0)


async def test_tokenize_is_what_generate_would_do_and_detokenize_its_inverse() -> None:
    engine = make()
    texts = ["I met a traveller", "", "<|endoftext|>"]
    ids = await engine.tokenize(texts, PromptOptions())
    assert ids == [ids_of(texts[0]), [4095], [4095]]
    assert await engine.detokenize(ids) == [texts[0], "<|endoftext|>", "<|endoftext|>"]
    assert await engine.detokenize(ids, skip_special_tokens=True) == [texts[0], "", ""]
    assert 4095 not in (await engine.tokenize(["<|endoftext|>"], PromptOptions(split_special_tokens=True)))[0]
    for bad in (engine.tokenize(["a"] * 129, PromptOptions()), engine.tokenize(["a" * 131_073], PromptOptions())):
        assert await reason_of(bad) is Reason.INVALID_FIELD
    assert await reason_of(engine.tokenize(["a"], PromptOptions(truncate_to_last=3))) is Reason.INVALID_FIELD
    assert await reason_of(engine.detokenize([[4096]])) is Reason.INVALID_FIELD


async def test_load_reports_are_kept_and_told() -> None:
    core = FakeCore()
    engine = make(core)
    seen: list[EngineLoad] = []
    stop = engine.on_load(seen.append)
    load = EngineLoad(time=1.0, running_requests=3)
    core.on_message(LoadReport(load))
    stop()
    core.on_message(LoadReport(EngineLoad(time=2.0)))
    assert seen == [load]
    assert engine.load == EngineLoad(time=2.0)
    assert await engine.reset_prefix_cache() == 7


async def test_local_cluster_calls_its_own_handler() -> None:
    async def handler(method: str, payload: str) -> str:
        return f"{method}:{payload}"

    assert await LocalCluster(handler).call("abort", "{}") == ["abort:{}"]
