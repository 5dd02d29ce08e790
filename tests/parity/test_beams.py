"""Beam searches in a crowded engine find the sequences and scores of transformers alone: fp32, a tiny random model."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo import LLM
from octavo.checkpoint import resolve
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from parity.beams import EOS, beam_cases, differences, engine_params, transformers_beams
from parity.cases import Answer, Case, transformers_answers
from parity.engine import engine_answers


@dataclass(frozen=True)
class Setting:
    """One way to run the same requests."""

    name: str
    block_size: int = 16
    num_blocks: int = 400
    chunk: int = 0
    prefix_caching: bool = True
    pipeline_depth: int = 0
    max_num_requests: int = 48


SETTINGS = [
    Setting("room for all"),
    Setting("preemption, chunks of 7, steps in flight", num_blocks=30, chunk=7, pipeline_depth=1),
    Setting("preemption without prefix cache", num_blocks=30, prefix_caching=False, max_num_requests=20),
    Setting("preemption, blocks of 32, chunks of 1", block_size=32, num_blocks=18, chunk=1),
]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return beam_cases(seed=1)


@pytest.fixture(scope="module")
def expected(tiny_path: Path, cases: list[Case]) -> list[Answer]:
    return transformers_beams(tiny_path, cases)


@pytest.fixture(scope="module")
def ordinary() -> list[Case]:
    """Requests of other kinds that run beside the searches."""
    prompts = [[(11 * i + j) % EOS for j in range(3 + 4 * i)] for i in range(12)]
    kinds = [(1, {"do_sample": False, "top_k": 50}), (3, {"do_sample": True, "top_k": 20, "temperature": 1.2})]
    return [
        Case(prompt, 77 + i, kinds[i % 2][0], 12, kinds[i % 2][1], eos=(EOS,) if i % 3 else ())
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def ordinary_expected(tiny_path: Path, ordinary: list[Case]) -> list[Answer]:
    return transformers_answers(tiny_path, ordinary)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_searches_among_other_requests_find_what_transformers_finds_alone(
    setting: Setting, tiny_path, cases, expected, ordinary, ordinary_expected
):
    config = EngineConfig(
        model=ModelConfig(path=str(tiny_path), name="tiny", device="cpu", dtype="float32"),
        cache=CacheConfig(
            block_size=setting.block_size,
            num_blocks=setting.num_blocks,
            enable_prefix_caching=setting.prefix_caching,
        ),
        scheduler=SchedulerConfig(
            max_num_requests=setting.max_num_requests,
            max_chunk_tokens=setting.chunk,
            pipeline_depth=setting.pipeline_depth,
            max_queue_time=3600.0,
        ),
    )
    searches = [dataclasses.replace(case, params=engine_params(case.params)) for case in cases]
    answers, load = engine_answers(config, searches + ordinary, order_seed=setting.num_blocks)
    wrong = [
        f"{case}: {problem}"
        for case, found, right in zip(cases, answers, expected, strict=False)
        for problem in differences(case, found, right)
    ]
    assert wrong == [], f"{len(wrong)} differences, first: {wrong[0]}"
    assert answers[len(cases) :] == ordinary_expected
    assert (load.preemptions > 0) == (setting.num_blocks < 400)


def test_the_cases_are_not_vacuous(cases, expected):
    sequences = [ids for answer in expected for ids in answer.token_ids]
    assert sum(EOS in ids for ids in sequences) > len(sequences) / 4
    early = [c for c, a in zip(cases, expected, strict=True) if len(a.token_ids[0]) < c.max_new_tokens]
    assert len(early) > len(cases) / 4
    assert {case.params["num_beams"] for case in cases} == set(range(2, 9))


@pytest.mark.parametrize("stops", [["th"], [" and", "e of", "ing"], ["ael, So", "el."]], ids=str)
@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "top_k": 50, "temperature": 1.3}], ids=["greedy", "sampled"]
)
def test_stop_strings_end_beams_as_in_transformers(stops: list[str], sampling: dict[str, Any], demo, engine):
    """Through the front-end and the wire's messages; the last match begins in the prompt."""
    model, tokenizer = demo
    prompt = "Call me Ishma"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    keywords = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 10, **sampling}
    torch.manual_seed(5)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), stop_strings=stops, tokenizer=tokenizer, pad_token_id=4095,
            return_dict_in_generate=True, output_scores=True, **keywords,
        )  # fmt: skip
    seed = {"seed": 5} if sampling else {}
    found = engine.generate(prompt, stop_strings=stops, **keywords, **seed)
    width = expected.sequences.shape[1] - ids.shape[1]
    padded = [(output.token_ids + [4095] * width)[:width] for output in found]
    assert padded == expected.sequences[:, ids.shape[1] :].tolist()
    assert [output.sequence_score for output in found] == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)
    assert all(output.matched in stops for output in found if output.finish_reason == "stop_string")


@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "top_k": 50, "temperature": 1.3}], ids=["greedy", "sampled"]
)
def test_output_scores_and_logits_are_those_of_the_ancestors(sampling: dict[str, Any], demo, engine):
    """Through the front-end and the wire's messages."""
    model, tokenizer = demo
    prompt = "Call me Ishma"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    keywords = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 10, "repetition_penalty": 1.2, **sampling}
    torch.manual_seed(5)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=4095, return_dict_in_generate=True,
            output_scores=True, output_logits=True, **keywords,
        )  # fmt: skip
    for name, rows, tolerance in (("output_scores", expected.scores, 1e-5), ("output_logits", expected.logits, 3e-5)):
        right = model.compute_transition_scores(expected.sequences, rows, expected.beam_indices)
        found = engine.generate(prompt, **keywords, **{name: True}, **({"seed": 5} if sampling else {}))
        for output, values in zip(found, right.tolist(), strict=True):
            assert output.logprobs.chosen == pytest.approx(values[: len(output.token_ids)], abs=tolerance)


@pytest.fixture(scope="module")
def demo():
    from transformers import GPT2LMHeadModel, GPT2Tokenizer

    path = resolve("demo")
    return GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval(), GPT2Tokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def engine():
    with LLM("demo", device="cpu", dtype="float32") as engine:
        yield engine


def test_a_search_whose_time_is_over_returns_what_it_has(engine):
    outputs = engine.generate("Call me", num_beams=3, num_return_sequences=3, max_new_tokens=500, max_time=0.05)
    assert {output.finish_reason for output in outputs} <= {"time", "eos"}
    assert all(0 < len(output.token_ids) < 500 for output in outputs)
