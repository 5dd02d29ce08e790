"""guidance_scale and negative_prompt: what is refused, and what the core gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from frontend.fakes import demo, engine_info, ids_of, request
from octavo.config import Limits
from octavo.errors import Reason, RequestError
from octavo.frontend.input_processor import InputProcessor
from octavo.frontend.requests import ProcessedRequest
from octavo.types import EngineInfo, GenerateRequest, Prompt


def process(asked: GenerateRequest, info: EngineInfo | None = None) -> ProcessedRequest:
    inputs = InputProcessor(demo(), Limits(), cache_secret=b"secret")
    return inputs.process(asked, arrival_time=1.0, info=info)


def refused(asked: GenerateRequest, info: EngineInfo | None = None) -> RequestError:
    with pytest.raises(RequestError) as caught:
        process(asked, info)
    return caught.value


def negatives(processed: ProcessedRequest) -> list[list[int]]:
    return [np.frombuffer(r.negative_prompt_token_ids, "<i4").tolist() for r in processed.core_requests]


def test_the_negative_prompt_is_tokenized_like_a_prompt_and_is_the_last_token_by_default() -> None:
    texts = ("It was the best", "of times")
    asked = {"guidance_scale": 1.5, "bad_words": ["x"]}
    ids = [ids_of(text) for text in texts]
    assert negatives(process(request(*texts, **asked))) == [[ids[0][-1]], [ids[1][-1]]]
    worst = Prompt(text="the worst of")
    assert negatives(process(request(*texts, negative_prompt=worst, **asked))) == [ids_of("the worst of")] * 2
    given = Prompt(token_ids=[5, 6])
    assert negatives(process(request(*texts, negative_prompt=given, **asked))) == [[5, 6]] * 2
    assert negatives(process(request(*texts, negative_prompt=Prompt(text=""), **asked))) == [[4095]] * 2
    assert negatives(process(request(*texts, guidance_scale=1))) == [[], []]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"guidance_scale": float("nan")}, "params.guidance_scale"),
        ({"negative_prompt": Prompt(text="x")}, "params.negative_prompt"),
        ({"negative_prompt": Prompt(text="x"), "guidance_scale": 1.0}, "params.negative_prompt"),
        ({"negative_prompt": Prompt(), "guidance_scale": 2.0}, "params.negative_prompt"),
        ({"negative_prompt": Prompt(token_ids=[]), "guidance_scale": 2.0}, "params.negative_prompt.token_ids"),
        (
            {"negative_prompt": Prompt(token_ids=[1, 4096]), "guidance_scale": 2.0},
            "params.negative_prompt.token_ids[1]",
        ),
        ({"num_beams": 2, "guidance_scale": 2.0}, "params.guidance_scale"),
    ],
)
def test_what_is_wrong_is_told_by_its_path(params: dict[str, Any], field: str) -> None:
    error = refused(request(**params))
    assert error.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in error.violations] == [field]


def test_the_negative_prompt_with_what_is_generated_has_to_fit() -> None:
    longest = {"guidance_scale": 2.0, "negative_prompt": Prompt(token_ids=[1] * 1000)}
    process(request("x", max_new_tokens=25, **longest))
    error = refused(request("x", max_new_tokens=26, **longest))
    assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    assert [violation.field for violation in error.violations] == ["params.negative_prompt"]
    assert error.metadata == {"max": "1025", "got": "1026", "prompt_index": "0"}


def test_both_branches_have_to_fit_into_an_empty_engine() -> None:
    asked = request("x", guidance_scale=2.0, max_new_tokens=30, negative_prompt=Prompt(token_ids=[1] * 20))
    process(asked, engine_info(num_blocks=2 + 4, block_size=16))
    assert refused(asked, engine_info(num_blocks=4, block_size=16)).reason is Reason.REQUEST_TOO_LARGE
    assert refused(asked, engine_info(max_num_requests=1)).reason is Reason.REQUEST_TOO_LARGE


def test_they_take_two_places_each() -> None:
    assert process(request("x", "y", guidance_scale=2.0, do_sample=True, num_return_sequences=3)).num_rows == 12
    assert (
        refused(request(*["x"] * 20, guidance_scale=2.0, do_sample=True, num_return_sequences=7)).reason
        is Reason.REQUEST_TOO_LARGE
    )
