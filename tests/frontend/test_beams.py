"""Rules of beam search in a request, what an engine has to have for it, and how its sequences are told."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np
import pytest
from frontend.fakes import demo, engine_info, ids_of, outputs, request
from octavo.config import Limits
from octavo.errors import Reason, RequestError
from octavo.frontend.beams import num_rows
from octavo.frontend.defaults import checkpoint_params, resolve_params
from octavo.frontend.input_processor import InputProcessor
from octavo.frontend.output_processor import OutputProcessor
from octavo.frontend.request_state import RequestState
from octavo.frontend.requests import ProcessedRequest
from octavo.ipc import BeamSequence
from octavo.types import (
    EarlyStopping,
    FinishInfo,
    FinishReason,
    GenerateUpdate,
    GenerationParams,
    OutputOptions,
    StopStringOutput,
    SynthIdWatermark,
    Watermark,
)

SYNTH_ID = Watermark(synth_id=SynthIdWatermark(ngram_len=3, keys=[1, 2]))


def process(*texts: str, info: Any = None, **params: Any) -> ProcessedRequest:
    inputs = InputProcessor(demo(), Limits(), cache_secret=b"secret")
    return inputs.process(request(*texts, **params), arrival_time=1.0, info=info)


def refusal(*texts: str, **params: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        process(*texts, **params)
    return caught.value


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"num_beams": 0}, "params.num_beams"),
        ({"num_beams": 9}, "params.num_beams"),
        ({"num_beams": True}, "params.num_beams"),
        ({"num_beams": 2, "length_penalty": nan}, "params.length_penalty"),
        ({"num_beams": 2, "length_penalty": -inf}, "params.length_penalty"),
        ({"length_penalty": 2.0}, "params.length_penalty"),
        ({"early_stopping": EarlyStopping.NEVER}, "params.early_stopping"),
        ({"num_beams": 2, "early_stopping": 9}, "params.early_stopping"),
        ({"num_beams": 2, "num_return_sequences": 3}, "params.num_return_sequences"),
        ({"num_beams": 2, "num_return_sequences": 3, "do_sample": True}, "params.num_return_sequences"),
        ({"num_beams": 2, "top_p": 0.5}, "params.top_p"),
        ({"num_beams": 2, "do_sample": True, "watermarking_config": SYNTH_ID}, "params.watermarking_config.synth_id"),
    ],
    ids=str,
)
def test_what_generate_refuses_of_beams_is_refused_by_name(params: dict[str, Any], field: str) -> None:
    error = refusal(**params)
    assert error.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in error.violations] == [field]


def test_logprobs_of_beams_are_refused_as_not_implemented() -> None:
    error = refusal(num_beams=2, output=OutputOptions(logprobs=1))
    assert error.reason is Reason.UNSUPPORTED_FIELD
    assert [violation.field for violation in error.violations] == ["output.logprobs"]
    process(num_beams=2, output=OutputOptions(prompt_logprobs=1))


def test_beam_fields_at_neutral_values_and_legal_mixes_pass() -> None:
    process(num_beams=1, length_penalty=1, early_stopping=EarlyStopping.FALSE)
    process(num_beams=8, num_return_sequences=8, length_penalty=-2, early_stopping=EarlyStopping.TRUE)
    greedy = process(num_beams=2, do_sample=True, temperature=0.0, num_return_sequences=2)
    assert greedy.prompts[0].seed is None
    sampled = process(num_beams=2, do_sample=True, top_k=3, seed=7)
    assert sampled.prompts[0].seed == 7


def test_beams_of_the_checkpoint_apply_and_its_other_beam_fields_lie_dormant_without_them() -> None:
    raw = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never"}
    checkpoint = checkpoint_params(raw, 100)
    resolved = resolve_params(GenerationParams(), checkpoint)
    assert (resolved.num_beams, resolved.length_penalty, resolved.early_stopping) == (3, 0.5, EarlyStopping.NEVER)
    assert num_rows(resolve_params(GenerationParams(num_beams=1), checkpoint)) == 1


def test_beams_count_as_sequences_but_only_those_returned_have_keys() -> None:
    processed = process("a", "b", num_beams=4, num_return_sequences=2)
    assert processed.num_sequences == 4
    assert processed.num_rows == 8
    assert [len(prompt.keys) for prompt in processed.prompts] == [2, 2]
    error = refusal(*["x"] * 33, num_beams=8)
    assert error.reason is Reason.REQUEST_TOO_LARGE
    assert error.metadata == {"max": "256", "got": "264"}


def test_stop_strings_go_to_the_core_only_for_beams() -> None:
    assert process(stop_strings=["x"]).core_requests[0].params.stop_strings == []
    assert process(stop_strings=["x"], num_beams=2).core_requests[0].params.stop_strings == ["x"]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_requests": 3},
        {"num_blocks": 7},
    ],
    ids=["fewer slots than beams", "fewer blocks than beams can need"],
)
def test_an_engine_that_can_never_run_a_search_refuses_it(changes: dict[str, Any]) -> None:
    length = 17 - len(ids_of("Hello"))  # 16 tokens are fed back, and one more makes two blocks of each beam
    process(num_beams=4, max_new_tokens=length + 1, info=engine_info(num_blocks=8))
    process(max_new_tokens=length + 1, info=engine_info(**changes))
    with pytest.raises(RequestError) as caught:
        process(num_beams=4, max_new_tokens=length + 1, info=engine_info(**changes))
    assert caught.value.reason is Reason.REQUEST_TOO_LARGE


def add(outputs_of: OutputProcessor, **params: Any) -> tuple[RequestState, list[int]]:
    processed = process(**params)
    return outputs_of.add(processed), list(processed.prompts[0].keys)


def found(key: int, ids: list[int], finish: FinishReason, score: float) -> BeamSequence:
    return BeamSequence(key, np.array(ids, "<i4").tobytes(), finish, score)


def taken(state: RequestState) -> GenerateUpdate:
    update = state.take(3.0)
    assert update is not None
    return update


def test_sequences_of_a_search_come_whole_with_their_scores() -> None:
    processor = OutputProcessor(demo().tokenizer)
    state, keys = add(processor, num_beams=3, num_return_sequences=3)
    ids = ids_of(" the king")
    beams = [
        found(keys[0], [*ids, 4095], FinishReason.EOS, -0.5),
        found(keys[1], ids, FinishReason.CONTEXT, -1.5),
        found(keys[2], [], FinishReason.LENGTH, -1e9),
    ]
    changed, aborts = processor.process(outputs(started=[keys[0]], beams=beams), 2.0)
    assert (changed, aborts) == ([state], [])
    update = taken(state)
    assert [delta.text for delta in update.deltas] == [" the king", " the king", ""]
    assert [delta.sequence_score for delta in update.deltas] == [-0.5, -1.5, -1e9]
    assert [delta.finish for delta in update.deltas] == [
        FinishInfo(FinishReason.EOS, len(ids) + 1, token_id=4095),
        FinishInfo(FinishReason.CONTEXT, len(ids)),
        FinishInfo(FinishReason.LENGTH, 0),
    ]
    assert update.usage is not None
    assert update.usage.completion_tokens == 2 * len(ids) + 1
    assert state.taken
    assert processor.num_sequences == 0


@pytest.mark.parametrize(
    ("output", "text"), [(StopStringOutput.TOKENS, " the king"), (StopStringOutput.EXCLUDE, " the")]
)
def test_stop_string_that_the_core_saw_is_named_and_cut(output: StopStringOutput, text: str) -> None:
    processor = OutputProcessor(demo().tokenizer)
    state, [key] = add(processor, num_beams=2, stop_strings=["zzz", " king"], stop_string_output=output)
    ids = ids_of(" the king")
    processor.process(outputs(beams=[found(key, ids, FinishReason.STOP_STRING, -1.0)]), 2.0)
    [delta] = taken(state).deltas
    assert delta.text == text
    assert delta.token_ids == ids
    assert delta.finish == FinishInfo(FinishReason.STOP_STRING, len(ids), stop_string=" king")


def test_results_of_a_search_that_was_cancelled_are_dropped() -> None:
    processor = OutputProcessor(demo().tokenizer)
    state, keys = add(processor, num_beams=2, num_return_sequences=2)
    error = RequestError(Reason.CLIENT_CANCELLED, "gone")
    assert processor.fail(state, error) == keys
    assert processor.process(outputs(beams=[found(key, [5], FinishReason.EOS, 0.0) for key in keys]), 2.0) == ([], [])
