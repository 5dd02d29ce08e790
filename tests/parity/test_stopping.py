"""Where generation stops and what of a long prompt is kept: as in generate() and the text-generation pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from octavo.checkpoint import resolve
from octavo.llm import LLM
from parity.cases import TEXT

PROMPT = "Call me Ishma"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", dtype="float32", device="cpu", num_blocks=400) as llm:
        yield llm


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(resolve("demo"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import GPT2Tokenizer

    return GPT2Tokenizer.from_pretrained(resolve("demo"))


def generate(model: Any, tokenizer: Any, prompt: str, **keywords: Any) -> list[int]:
    """The new tokens of generate() alone."""
    row = tokenizer(prompt, return_tensors="pt").input_ids
    torch.manual_seed(keywords.pop("seed", 0))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        found = model.generate(
            row, attention_mask=torch.ones_like(row), tokenizer=tokenizer, pad_token_id=4095, **keywords
        )
    return list(found[0, row.shape[1] :].tolist())


@pytest.mark.parametrize("stops", [["Ishmael"], ["mael,"], ["a"], ["zzz", "Ishma"], ["me Ishmae"]], ids=str)
def test_a_stop_string_may_begin_in_the_prompt(stops: list[str], llm, model, tokenizer) -> None:
    plain = generate(model, tokenizer, PROMPT, max_new_tokens=12)
    expected = generate(model, tokenizer, PROMPT, max_new_tokens=12, stop_strings=stops)
    found = llm.generate(PROMPT, max_new_tokens=12, stop_strings=stops)
    assert found.token_ids == expected
    own = llm.generate(PROMPT, max_new_tokens=12, stop_strings=stops, stop_strings_ignore_prompt=True)
    assert len(expected) <= len(own.token_ids) <= len(plain)


@pytest.mark.parametrize("stops", [["é"], ["ê"], ["éx", "xé", "êx", "xê", "éé"]], ids=["é", "ê", "several"])
def test_a_stop_string_is_found_in_bytes_that_several_tokens_make(stops: list[str], llm, model, tokenizer) -> None:
    """Only the bytes of é and ê, and x, may come: characters arrive whole, halved and broken."""
    ids = tokenizer.convert_tokens_to_ids(["Ã", "©", "ª", "x"])
    assert tokenizer.unk_token_id not in ids
    stopped = 0
    for seed in range(3):
        keywords = {"do_sample": True, "top_k": 0, "temperature": 30.0, "max_new_tokens": 24, "stop_strings": stops}
        expected = generate(
            model, tokenizer, PROMPT, seed=seed, prefix_allowed_tokens_fn=lambda batch, row: ids, **keywords
        )
        found = llm.generate(PROMPT, seed=seed, allowed_token_ids=ids, **keywords)
        assert found.token_ids == expected
        stopped += found.finish_reason == "stop_string"
    assert stopped


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "num_return_sequences": 2, "seed": 3}], ids=str)
def test_max_time_ends_sequences_early_and_changes_no_token(sampling: dict[str, Any], llm) -> None:
    def outputs(**keywords: Any) -> list[Any]:
        found = llm.generate(PROMPT, ignore_eos=True, max_new_tokens=150, **sampling, **keywords)
        return found if isinstance(found, list) else [found]

    for timed, whole in zip(outputs(max_time=0.03), outputs(), strict=True):
        assert timed.finish_reason == "time"
        assert 0 < len(timed.token_ids) < 150
        assert timed.token_ids == whole.token_ids[: len(timed.token_ids)]


@pytest.mark.parametrize("lengths", [{"max_new_tokens": 24}, {"max_new_tokens": 3}, {}], ids=str)
def test_hole_keeps_of_a_long_prompt_what_the_pipeline_keeps(lengths: dict[str, int], llm, model, tokenizer) -> None:
    from transformers import pipeline

    long = (TEXT + "\n") * 3
    assert len(tokenizer(long).input_ids) > 1024
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        settings = {"max_new_tokens": 20, **lengths, "pad_token_id": 4095, "return_full_text": False}
        (expected,) = pipe(long, handle_long_generation="hole", do_sample=False, **settings)
    assert tokenizer.model_max_length == 1024
    assert llm.generate(long, handle_long_generation="hole", **lengths).text == expected["generated_text"]
