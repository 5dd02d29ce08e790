"""Number by number: what generate() refuses of a parameter is refused by its name, what it accepts is accepted.

generate() itself is asked, on a tiny model. Where octavo differs, `MORE` and `FEWER` say so and why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
import torch
from frontend.fakes import demo
from octavo.config import Limits
from octavo.errors import Reason, RequestError
from octavo.frontend.input_processor import InputProcessor
from octavo.types import GenerateRequest, GenerationParams, Prompt

NUMBERS = [-1.5, -1, -1e-6, 0, 0.0, 1e-6, 0.5, 1, 1.0, 1.5, 2, 2.0, 3]
INTEGERS = [-1, 0, 1, 2]
FLOATS = [
    "temperature", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "length_penalty", "guidance_scale", "max_time",
]  # fmt: skip
COUNTS = [
    "top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens", "max_new_tokens",
    "max_length", "num_return_sequences", "num_beams", "forced_bos_token_id",
]  # fmt: skip
Outside = Callable[[float], bool]
MORE: dict[str, Outside] = {
    "temperature": lambda value: value == 0,  # greedy
}
"""Accepted although generate() refuses it; besides, an int stands for the same float."""
FEWER: dict[str, Outside] = {
    # generate() switches the warper off without a word
    "top_p": lambda value: value > 1,
    "typical_p": lambda value: value > 1,
    "epsilon_cutoff": lambda value: not 0 <= value < 1,
    "eta_cutoff": lambda value: not 0 <= value < 1,
    # or the processor, the minimum or the count
    "no_repeat_ngram_size": lambda value: value < 0,
    "encoder_no_repeat_ngram_size": lambda value: value < 0,
    "min_length": lambda value: value < 0,
    "min_new_tokens": lambda value: value < 0,
    "num_return_sequences": lambda value: value < 1,
    # and takes it as 0, or for a token counted from the end of the vocabulary
    "max_time": lambda value: value < 0,
    "forced_bos_token_id": lambda value: value < 0,
}
"""Refused although generate() accepts it."""


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=1, vocab_size=4096, n_positions=64, bos_token_id=4095, eos_token_id=4095
    )
    return GPT2LMHeadModel(config).eval()


def keywords(name: str, value: Any) -> dict[str, Any]:
    found = {"do_sample": True, name: value}
    if name not in ("max_new_tokens", "max_length"):
        found["max_new_tokens"] = 2
    if name == "length_penalty":
        found["num_beams"] = 3
    return found


def accepted_by_generate(model: Any, name: str, value: float) -> bool:
    row = torch.tensor([[5]])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        try:
            model.generate(row, attention_mask=torch.ones_like(row), pad_token_id=0, **keywords(name, value))
        except (ValueError, TypeError, RuntimeError, ArithmeticError):  # the last two where nobody checked
            return False
    return True


def refused(name: str, value: Any) -> list[str]:
    """The fields that octavo names; none if it accepts the value."""
    processor = InputProcessor(demo(), Limits(), cache_secret=b"secret")
    params = GenerationParams(**keywords(name, value))
    try:
        processor.process(GenerateRequest(prompts=[Prompt(token_ids=[5])], params=params), arrival_time=1.0)
    except RequestError as error:
        return [violation.field for violation in error.violations if error.reason is Reason.INVALID_FIELD]
    return []


@pytest.mark.parametrize("name", [*FLOATS, *COUNTS])
def test_value_is_accepted_as_generate_accepts_it(name: str, model) -> None:
    values = NUMBERS if name in FLOATS else INTEGERS
    for value in values:
        expected = accepted_by_generate(model, name, float(value) if name in FLOATS else value)
        if MORE.get(name, lambda value: False)(value):
            assert not expected
            expected = True
        if FEWER.get(name, lambda value: False)(value):
            assert expected
            expected = False
        assert refused(name, value) == ([] if expected else [f"params.{name}"]), value


@pytest.mark.parametrize("name", [*FLOATS, *COUNTS])
@pytest.mark.parametrize("value", [nan, inf, -inf, "1", True], ids=repr)
def test_no_parameter_takes_what_is_no_finite_number(name: str, value: Any) -> None:
    assert refused(name, value) == [f"params.{name}"]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [1.5, 2.0])
def test_counts_are_integers(name: str, value: float) -> None:
    assert refused(name, value) == [f"params.{name}"]
