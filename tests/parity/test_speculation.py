"""Speculation by prompt lookup changes how many steps a request takes, and nothing else: tokens, ends, logprobs."""

from __future__ import annotations

import functools
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo.checkpoint import resolve
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.engine_core.engine_core import EngineCore
from octavo.errors import Reason
from octavo.frontend.defaults import resolve_watermark
from octavo.ipc import AddRequests, EngineCoreOutputs, EngineCoreRequest
from octavo.llm import LLM
from octavo.step import LogprobSpec
from octavo.types import GreenListWatermark, LogprobKind, StructuredOutput, Watermark
from parity.cases import COMMON, TEXT, Case, random_cases
from parity.heard import Heard, answers, engine_request, listen

EOS = 4095
LOOKUP = {"prompt_lookup_num_tokens": 6}
CLOSE = functools.partial(pytest.approx, abs=1e-5, rel=1e-5)


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve("demo")


@pytest.fixture(scope="module")
def text(path: Path) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path / "tokenizer.json")).encode(TEXT).ids


def config(path: Path, **options: Any) -> EngineConfig:
    cache = {
        name: options.pop(name) for name in ("block_size", "num_blocks", "enable_prefix_caching") if name in options
    }
    return EngineConfig(
        model=ModelConfig(path=str(path), name="demo", device="cpu", dtype="float32"),
        cache=CacheConfig(**{"block_size": 16, **cache}),
        scheduler=SchedulerConfig(**{"max_num_requests": 32, "max_queue_time": 3600.0, **options}),
    )


def run(path: Path, requests: list[EngineCoreRequest], **options: Any) -> tuple[dict[int, Heard], EngineCore]:
    core = EngineCore(config(path, **options))
    return answers(core, requests), core


def crowd(path: Path, text: list[int]) -> list[tuple[Case, LogprobSpec | None, dict[str, Any]]]:
    """Mixes of all parameters; and greedy and sharply sampled requests behind text that repeats itself, for which
    drafts are often right."""
    rng = random.Random(3)
    cases = random_cases(path, 30, seed=11, every_parameter=True)
    for seed in range(24):
        start = rng.randrange(len(text) - 20)
        params: dict[str, Any] = {"do_sample": seed % 2 == 0}
        if params["do_sample"]:
            params |= {"temperature": rng.choice([0.1, 0.3, 0.5]), "top_k": rng.choice([0, 5, 50])}
        if seed % 3 == 0:
            params |= rng.choice(PROCESSORS)
        cases.append(
            Case(
                prompt=text[start : start + 12] * 3,
                seed=seed,
                num_sequences=rng.choice([1, 3]) if params["do_sample"] else 1,
                max_new_tokens=rng.choice([20, 30]),
                params=params,
                eos=rng.choice([(), (EOS,), (rng.choice(COMMON),)]),
            )
        )
    kinds = list(LogprobKind)
    found = []
    for i, case in enumerate(cases):
        logprobs = (
            LogprobSpec(num_top=rng.choice([0, 3]), kind=kinds[i % len(kinds)], token_ids=[11]) if i % 3 == 0 else None
        )
        found.append(
            (case, logprobs, {"prompt_lookup_num_tokens": rng.choice([1, 3, 10]), "max_matching_ngram_size": 1 + i % 3})
        )
    return found


PROCESSORS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.05},
    {"frequency_penalty": 0.3, "presence_penalty": 0.2},
    {"no_repeat_ngram_size": 5},
    {"min_new_tokens": 15},
    {"watermarking_config": resolve_watermark(Watermark(green_list=GreenListWatermark(bias=2.0)))},
    {"structured_output": StructuredOutput(regex="( the| and| a|,)*")},
]

SETTINGS = {
    "steps in flight": {"pipeline_depth": 1},
    "preemption": {"pipeline_depth": 1, "num_blocks": 24, "enable_prefix_caching": False},
    "chunks and preemption": {"max_chunk_tokens": 7, "num_blocks": 24, "max_num_batched_tokens": 48},
}


@pytest.fixture(scope="module")
def requests(path: Path, text: list[int]) -> list[tuple[EngineCoreRequest, EngineCoreRequest]]:
    """Without and with drafts."""
    found = crowd(path, text)
    return [
        (engine_request(i * 100, case, logprobs, {}), engine_request(i * 100, case, logprobs, lookup))
        for i, (case, logprobs, lookup) in enumerate(found)
    ]


@pytest.fixture(scope="module")
def plain(path: Path, requests: list[tuple[EngineCoreRequest, EngineCoreRequest]]) -> dict[int, Heard]:
    return run(path, [request for request, _ in requests])[0]


@pytest.mark.parametrize("setting", SETTINGS)
def test_crowd_gets_the_same_with_drafts(setting: str, path, requests, plain):
    heard, core = run(path, [request for _, request in requests], **SETTINGS[setting])
    assert heard.keys() == plain.keys()
    for key, expected in plain.items():
        found = heard[key]
        assert (found.token_ids, found.finish) == (expected.token_ids, expected.finish), key
        assert found.logprobs == CLOSE(expected.logprobs), key
        assert len(found.top) == len(expected.top)
        for (ids, values), (expected_ids, expected_values) in zip(found.top, expected.top, strict=True):
            assert values == CLOSE(expected_values), key
            ties = len(set(np.round(values, 3))) < len(values)
            assert ties or ids == expected_ids, key
    total = core.scheduler.meter.total
    assert total.drafted_tokens > total.accepted_tokens > 100
    assert (total.preemptions > 0) == ("num_blocks" in SETTINGS[setting])
    assert (total.cache_hits > 0) == SETTINGS[setting].get("enable_prefix_caching", True)


def test_sampled_sequences_of_one_prompt_take_drafts_each_at_its_own_pace(path, text):
    case = Case(
        prompt=text[:12] * 3, seed=5, num_sequences=4, max_new_tokens=40, params={"do_sample": True, "temperature": 0.3}
    )
    plain, before = run(path, [engine_request(0, case, None, {})])
    drafted, after = run(path, [engine_request(0, case, None, LOOKUP)])
    assert drafted == plain
    assert len({tuple(sequence.token_ids) for sequence in plain.values()}) > 1
    assert after.scheduler.meter.total.accepted_tokens > 20
    assert after.num_steps < before.num_steps


def test_greedy_tokens_are_those_of_transformers_with_the_same_parameters(path: Path, text: list[int]) -> None:
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [text[start : start + 12] * 3 for start in range(0, 120, 30)]
    options = [{"prompt_lookup_num_tokens": 1 + i, "max_matching_ngram_size": 1 + i % 4} for i in range(len(prompts))]
    with LLM("demo", device="cpu", dtype="float32") as llm:
        found = llm.generate_each(
            [{"prompt": ids, "max_new_tokens": 40, **o} for ids, o in zip(prompts, options, strict=True)]
        )
    for ids, kwargs, result in zip(prompts, options, found, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0, **kwargs)
        assert result.token_ids == tokens[0, len(ids) :].tolist()


def test_stop_strings_and_time_limits_drop_what_a_step_brought_beyond(text: list[int]) -> None:
    """Stop strings are seen by the front-end, with the tokens of a whole step in one message."""
    stops: list[dict[str, Any]] = [
        {"stop_strings": [" the"]},
        {"stop_strings": [",", "\n"], "logprobs": 2},
        {"max_time": 0},
        {"stop_strings": [" of"], "do_sample": True, "temperature": 0.3, "num_return_sequences": 3},
        {"stop_strings": ["e"], "min_new_tokens": 8},
    ]
    requests = [
        {"prompt": text[start : start + 12] * 3, "seed": start, "max_new_tokens": 30, **stop}
        for start in range(0, 100, 20)
        for stop in stops
    ]
    with LLM("demo", device="cpu", dtype="float32") as llm:
        plain = llm.generate_each(requests)
        drafted = llm.generate_each([{**request, **LOOKUP} for request in requests])
    reasons = set()
    for one, other in zip(plain, drafted, strict=True):
        for expected, found in zip(_outputs(one), _outputs(other), strict=True):
            assert found.token_ids == expected.token_ids
            assert found.text == expected.text
            assert found.finish_reason == expected.finish_reason
            assert (found.logprobs is None) == (expected.logprobs is None)
            reasons.add(found.finish_reason)
    assert len(reasons) >= 3, reasons


def _outputs(result: Any) -> list[Any]:
    return result if isinstance(result, list) else [result]


def test_row_that_fails_behind_a_right_draft_has_sent_the_tokens_before(path: Path, text: list[int]) -> None:
    """As without drafts: it fails in the step that would have been its own."""
    case = Case(prompt=text[:12] * 3, seed=0, num_sequences=1, max_new_tokens=30, params={"allowed_token_ids": [11]})
    tokens, steps = [], []
    for lookup in ({}, LOOKUP):
        core = EngineCore(config(path))
        sampler = core.runner._host.sampler  # type: ignore[attr-defined]
        sample = sampler._sample

        def failing(logits: Any, slots: Any, guided: Any, states: Any = sampler._states, sample: Any = sample) -> Any:
            if states.length[slots[0]] == len(case.prompt) + 11:
                raise RuntimeError("planted")
            return sample(logits, slots, guided)

        sampler._sample = failing
        core.handle(AddRequests(0, [engine_request(0, case, None, lookup)]))
        heard: dict[int, Heard] = {}
        while core.has_work:
            for message in core.step().get(0, []):
                if isinstance(message, EngineCoreOutputs):
                    listen(message, heard)
        steps.append(core.num_steps)
        core.close()
        assert heard[0].finish is Reason.INTERNAL
        tokens.append(heard[0].token_ids)
    assert tokens[0] == tokens[1] and len(tokens[0]) == 11
    assert steps[1] < steps[0]
