"""Hand-made outputs of a core become deltas, finish reasons, logprobs and usage; one failure stays one failure."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from frontend.fakes import demo, ids_of, outputs, request
from octavo.config import Limits
from octavo.errors import Reason
from octavo.frontend.failures import failure
from octavo.frontend.input_processor import InputProcessor
from octavo.frontend.output_processor import OutputProcessor
from octavo.frontend.request_state import RequestState
from octavo.ipc import LogprobColumns, PromptLogprobColumns, PromptStarted, SequenceFailed
from octavo.types import FinishInfo, FinishReason, GenerateUpdate, Logprobs, OutputOptions, StopStringOutput

NONE, EOS, LENGTH = FinishReason.NONE, FinishReason.EOS, FinishReason.LENGTH


class Session:
    """An output processor with requests in it."""

    def __init__(self) -> None:
        self.inputs = InputProcessor(demo(), Limits(), cache_secret=b"")
        self.outputs = OutputProcessor(demo().tokenizer)

    def add(self, *texts: str, output: OutputOptions | None = None, **params: Any) -> tuple[RequestState, list[int]]:
        """The state, and the keys of its sequences."""
        processed = self.inputs.process(request(*texts, output=output, **params), arrival_time=1.0)
        return self.outputs.add(processed), [key for prompt in processed.prompts for key in prompt.keys]

    def feed(self, state: RequestState, key: int, ids: list[int], now: float = 2.0) -> list[int]:
        """One token a step, until the sequence has ended. Returns keys to abort."""
        aborts: list[int] = []
        for token_id in ids:
            aborts += self.outputs.process(outputs((key, token_id, NONE)), now)[1]
        return aborts


def taken(state: RequestState, now: float = 3.0) -> GenerateUpdate:
    update = state.take(now)
    assert update is not None
    return update


def test_steps_merge_into_one_delta_until_it_is_taken() -> None:
    session = Session()
    state, [key] = session.add("Hello")
    session.outputs.process(outputs((key, ids_of(" the")[0], NONE), started=[key]), 2.0)
    first = taken(state)
    assert first.prompts[0].prompt_tokens == len(ids_of("Hello"))
    assert [delta.text for delta in first.deltas] == [" the"]
    assert state.take(3.0) is None
    session.feed(state, key, ids_of(" king and"))
    [delta] = taken(state).deltas
    assert (delta.text, delta.token_ids, delta.finish) == (" king and", ids_of(" king and"), None)
    session.outputs.process(outputs((key, 4095, EOS)), 5.0)
    last = taken(state)
    assert last.deltas[0].text == ""
    assert last.deltas[0].finish == FinishInfo(EOS, len(ids_of(" king and")) + 2, token_id=4095)
    assert last.usage is not None
    assert last.usage.completion_tokens == len(ids_of(" king and")) + 2
    assert last.timing is not None
    assert (last.timing.queue, last.timing.time_to_first_token, last.timing.total) == (0.5, 1.0, 4.0)
    assert state.taken
    assert session.outputs.num_sequences == session.outputs.num_waiting_tokens == 0


def test_sequences_of_several_prompts_are_sorted_and_complete_together() -> None:
    session = Session()
    state, keys = session.add("a", "b", do_sample=True, num_return_sequences=2)
    session.outputs.process(outputs(*[(key, 300 + key, LENGTH) for key in reversed(keys[1:])]), 2.0)
    assert not state.ended
    session.outputs.process(outputs((keys[0], 300, LENGTH), started=[keys[0], keys[2]]), 2.0)
    update = taken(state)
    assert [(delta.prompt_index, delta.output_index) for delta in update.deltas] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [info.prompt_index for info in update.prompts] == [0, 1]
    assert update.usage is not None
    assert update.usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("core", "token", "expected"),
    [
        (FinishReason.EOS, " king", FinishInfo(FinishReason.EOS, 1, token_id=0)),
        (FinishReason.STOP_TOKEN, " king", FinishInfo(FinishReason.STOP_TOKEN, 1, token_id=0)),
        (FinishReason.LENGTH, " king", FinishInfo(FinishReason.STOP_STRING, 1, stop_string="king")),
        (FinishReason.NONE, " king", FinishInfo(FinishReason.STOP_STRING, 1, stop_string="king")),
        (FinishReason.LENGTH, " the", FinishInfo(FinishReason.LENGTH, 1)),
    ],
)
def test_smallest_of_several_reasons_wins(core: FinishReason, token: str, expected: FinishInfo) -> None:
    session = Session()
    state, [key] = session.add(stop_strings=["king"])
    [token_id] = ids_of(token)
    _, aborts = session.outputs.process(outputs((key, token_id, core)), 2.0)
    finish = taken(state).deltas[0].finish
    assert finish is not None
    assert (finish.reason, finish.completion_tokens, finish.stop_string) == (
        expected.reason,
        expected.completion_tokens,
        expected.stop_string,
    )
    assert (finish.token_id == token_id) == (expected.token_id is not None)
    assert aborts == ([key] if core == FinishReason.NONE else []), "the core knows what it ended itself"


def test_tokens_after_a_stop_string_are_dropped() -> None:
    session = Session()
    state, [key] = session.add(stop_strings=["king"], stop_string_output=StopStringOutput.EXCLUDE)
    assert session.feed(state, key, ids_of(" the king is dead")) == [key]
    [delta] = taken(state).deltas
    assert delta.text == " the "
    assert delta.token_ids == ids_of(" the king")
    assert session.outputs.process(outputs((key, 5, LENGTH)), 2.0) == ([], [])


def test_default_length_cut_by_the_context_is_the_reason_context() -> None:
    session = Session()
    state, [key] = session.add("a " * 1015)
    session.outputs.process(outputs((key, 5, LENGTH)), 2.0)
    finish = taken(state).deltas[0].finish
    assert finish is not None
    assert finish.reason == FinishReason.CONTEXT


def test_time_ends_without_a_token() -> None:
    session = Session()
    state, [key] = session.add(max_time=1)
    session.outputs.process(outputs((key, 300, NONE)), 2.0)
    session.outputs.process(outputs((key, -1, FinishReason.TIME)), 2.0)
    [delta] = taken(state).deltas
    assert delta.token_ids == [300]
    assert delta.finish == FinishInfo(FinishReason.TIME, 1)


def test_include_prompt_puts_the_prompt_as_it_was_sent_in_front_once() -> None:
    session = Session()
    state, keys = session.add(
        "Hello <|endoftext|>", output=OutputOptions(include_prompt=True), do_sample=True, num_return_sequences=2
    )
    for key in keys:
        session.outputs.process(outputs((key, ids_of(" the")[0], NONE)), 2.0)
    assert [delta.text for delta in taken(state).deltas] == ["Hello <|endoftext|> the"] * 2
    session.outputs.process(outputs(*[(key, ids_of(" king")[0], LENGTH) for key in keys]), 2.0)
    assert [delta.text for delta in taken(state).deltas] == [" king"] * 2


def test_without_ids_half_a_character_is_no_delta() -> None:
    session = Session()
    state, [key] = session.add(output=OutputOptions(return_token_ids=False))
    ids = ids_of("🙂")
    assert len(ids) > 1
    session.feed(state, key, ids[:-1])
    assert state.take(2.0) is None
    assert state.due(2.0) > 1e9
    session.feed(state, key, ids[-1:])
    assert [(delta.text, delta.token_ids) for delta in taken(state).deltas] == [("🙂", [])]


def test_return_text_false_gives_ids_and_still_finds_stop_strings() -> None:
    session = Session()
    state, [key] = session.add(output=OutputOptions(return_text=False), stop_strings=["king"])
    session.feed(state, key, ids_of(" the king"))
    [delta] = taken(state).deltas
    assert delta.text == ""
    assert delta.finish is not None
    assert delta.finish.reason == FinishReason.STOP_STRING


def test_stream_min_tokens_holds_back_but_not_the_first_nor_the_last_nor_too_long() -> None:
    session = Session()
    state, [key] = session.add(output=OutputOptions(stream_min_tokens=4, stream_max_delay=0.5))
    session.feed(state, key, [300], now=2.0)
    assert state.due(2.0) == 0
    taken(state, 2.0)
    session.feed(state, key, [301, 302], now=2.1)
    assert state.due(2.1) == pytest.approx(0.5)
    assert state.take(2.1) is None
    assert [delta.token_ids for delta in taken(state, 2.7).deltas] == [[301, 302]]
    session.feed(state, key, [303, 304, 305, 306], now=3.0)
    assert state.due(3.0) == 0
    taken(state, 3.0)
    session.outputs.process(outputs((key, 307, LENGTH)), 3.1)
    assert state.due(3.1) == 0
    assert taken(state, 3.1).usage is not None


def columns(rows: list[tuple[int, float, list[tuple[int, float]], list[float]]]) -> LogprobColumns:
    """From (entry, chosen value, [(top id, value)], requested values)."""
    tops = [len(row[2]) for row in rows]
    requests = [len(row[3]) for row in rows]
    return LogprobColumns(
        entries=np.array([row[0] for row in rows], "<i4").tobytes(),
        chosen=np.array([row[1] for row in rows], "<f4").tobytes(),
        ranks=np.arange(1, len(rows) + 1, dtype="<i4").tobytes(),
        top_offsets=np.cumsum([0, *tops], dtype="<i4").tobytes(),
        top_token_ids=np.array([top[0] for row in rows for top in row[2]], "<i4").tobytes(),
        top_values=np.array([top[1] for row in rows for top in row[2]], "<f4").tobytes(),
        requested_offsets=np.cumsum([0, *requests], dtype="<i4").tobytes(),
        requested=np.array([value for row in rows for value in row[3]], "<f4").tobytes(),
    )


def test_logprobs_of_different_shapes_find_their_sequences_and_merge() -> None:
    session = Session()
    two, [a] = session.add(output=OutputOptions(logprobs=2, logprob_token_ids=[7]))
    none, [b] = session.add()
    zero, [c] = session.add(output=OutputOptions(logprobs=0))
    for step in range(2):
        values = columns([(0, -1.0 - step, [(5, -0.5), (6, -1.5)], [-9.0]), (2, -2.0, [], [])])
        message = outputs((a, 300, NONE), (b, 301, NONE), (c, 302, NONE), logprobs=values)
        session.outputs.process(message, 2.0)
    assert taken(two).deltas[0].logprobs == Logprobs(
        num_top=2,
        chosen=[-1.0, -2.0],
        ranks=[1, 1],
        top_token_ids=[5, 6, 5, 6],
        top_values=[-0.5, -1.5, -0.5, -1.5],
        requested=[-9.0, -9.0],
    )
    assert taken(none).deltas[0].logprobs is None
    assert taken(zero).deltas[0].logprobs == Logprobs(num_top=0, chosen=[-2.0, -2.0], ranks=[2, 2])


def test_prompt_logprobs_are_put_together_from_chunks() -> None:
    session = Session()
    state, [key] = session.add("one two three", output=OutputOptions(prompt_logprobs=1))

    def chunk(start: int, size: int) -> PromptLogprobColumns:
        values = np.arange(start, start + size)
        ints, floats = values.astype("<i4").tobytes(), (-values).astype("<f4").tobytes()
        return PromptLogprobColumns(key, start, 1, floats, ints, ints, floats)

    for message in ([chunk(1, 2)], [chunk(3, 1)], [chunk(1, 2)]):  # the last: computed again after a preemption
        session.outputs.process(outputs(prompt_logprobs=message), 2.0)
    session.outputs.process(outputs((key, 300, NONE), started=[key]), 2.0)
    logprobs = taken(state).prompts[0].logprobs
    assert logprobs is not None
    assert (logprobs.num_top, logprobs.chosen, logprobs.ranks) == (1, [-1, -2, -3], [1, 2, 3])


def test_failed_sequence_fails_its_request_after_the_text_and_nobody_else() -> None:
    session = Session()
    failing, keys = session.add(do_sample=True, num_return_sequences=3)
    other, [other_key] = session.add()
    session.outputs.process(outputs((keys[0], ids_of(" the")[0], NONE), (other_key, 300, NONE)), 2.0)
    changed, aborts = session.outputs.process(outputs(failed=[SequenceFailed(keys[1], Reason.NON_FINITE_LOGITS)]), 2.0)
    assert changed == [failing]
    assert sorted(aborts) == [keys[0], keys[2]]
    assert failing.ended
    assert not failing.taken
    update = taken(failing)
    assert [delta.text for delta in update.deltas] == [" the"]
    assert update.usage is None
    assert failing.taken
    assert failing.error is not None
    assert failing.error.reason is Reason.NON_FINITE_LOGITS
    assert not other.ended
    assert session.outputs.num_sequences == 1


def test_exception_in_one_request_is_internal_for_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session()
    failing, [key] = session.add(stop_strings=["x"])
    other, [other_key] = session.add()
    sequence = failing.prompts[0].sequences[0]
    assert sequence.matcher is not None
    monkeypatch.setattr(sequence.matcher, "push", None)
    changed, aborts = session.outputs.process(outputs((key, 300, NONE), (other_key, 300, NONE)), 2.0)
    assert aborts == [key]
    assert set(changed) == {failing, other}
    assert failing.error is not None
    assert failing.error.reason is Reason.INTERNAL
    assert not other.ended
    session.outputs.process(outputs((key, 300, NONE), (other_key, 300, LENGTH)), 2.0)
    assert taken(other).usage is not None


def test_abort_delivers_what_is_certain_with_the_reason_aborted() -> None:
    session = Session()
    state, [key] = session.add(stop_strings=["the end"], stop_string_output=StopStringOutput.EXCLUDE)
    session.feed(state, key, ids_of(" king the e"))
    assert session.outputs.fail(state, failure(Reason.ABORTED_BY_OPERATOR), aborted=True) == [key]
    [delta] = taken(state).deltas
    assert delta.text == " king ", "held back text may still be part of a stop string"
    assert delta.finish is not None
    assert delta.finish.reason == FinishReason.ABORTED
    assert state.taken


def test_preemptions_and_cached_tokens_are_counted() -> None:
    session = Session()
    state, [key] = session.add("one two three")
    message = outputs((key, 300, LENGTH), preempted=[(key, 3)])
    message = msgspec.structs.replace(message, started=[PromptStarted(key, 1.2, 2)])
    session.outputs.process(message, 2.0)
    update = taken(state)
    assert update.prompts[0].cached_tokens == 2
    assert update.usage is not None
    assert update.usage.cached_tokens == 2
    assert update.timing is not None
    assert update.timing.preemptions == 3


def test_outputs_of_unknown_keys_change_nothing() -> None:
    session = Session()
    message = outputs((99, 1, NONE), (98, 1, EOS), started=[97], failed=[SequenceFailed(96, Reason.INTERNAL)])
    assert session.outputs.process(message, 2.0) == ([], [])
