"""Watermarked requests among plain ones, preempted and not, equal transformers' generate() on each alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from octavo.checkpoint import resolve
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.frontend.watermarks import resolve_watermark
from octavo.types import GreenListWatermark, SeedingScheme, SynthIdWatermark, Watermark
from parity.cases import Case, random_cases, transformers_answers
from parity.engine import engine_answers

NUM_CASES = 32


def random_mark(rng: random.Random) -> tuple[Watermark, Any]:
    """The same watermark in our form and in transformers'."""
    from transformers.generation.configuration_utils import SynthIDTextWatermarkingConfig, WatermarkingConfig

    if rng.random() < 0.5:
        fields: dict[str, Any] = {
            "ngram_len": rng.choice([2, 3, 5]),
            "keys": [rng.randrange(2**40) for _ in range(rng.choice([1, 5]))],
            "context_history_size": rng.choice([2, 1024]),
            "skip_first_ngram_calls": rng.random() < 0.3,
        }
        return Watermark(synth_id=SynthIdWatermark(**fields)), SynthIDTextWatermarkingConfig(**fields)
    scheme = rng.choice(list(SeedingScheme))
    fields = {
        "greenlist_ratio": rng.choice([0.25, 0.5]),
        "bias": rng.choice([2, 4.0]),
        "context_width": rng.choice([1, 3]),
    }
    return (
        Watermark(green_list=GreenListWatermark(seeding_scheme=scheme, **fields)),
        WatermarkingConfig(seeding_scheme=scheme.name.lower(), **fields),
    )


@pytest.fixture(scope="module")
def cases() -> tuple[list[Case], list[Case]]:
    """Ours and transformers'."""
    rng = random.Random(8)
    ours, theirs = [], []
    for i, case in enumerate(random_cases(resolve("demo"), NUM_CASES, seed=8)):
        mark, config = random_mark(rng)
        marked = i % 4 != 0
        ours.append(
            replace(case, params={**case.params, "watermarking_config": resolve_watermark(mark)}) if marked else case
        )
        theirs.append(replace(case, params={**case.params, "watermarking_config": config}) if marked else case)
    return ours, theirs


def test_every_token_of_watermarked_requests_equals_transformers_alone(cases):
    ours, theirs = cases
    path = str(resolve("demo"))
    config = EngineConfig(
        model=ModelConfig(path=path, name="demo", device="cpu", dtype="float32"),
        cache=CacheConfig(block_size=16, num_blocks=27),
        scheduler=SchedulerConfig(max_num_requests=24, max_chunk_tokens=7, max_model_len=145, max_queue_time=3600.0),
    )
    answers, load = engine_answers(config, ours, order_seed=1)
    threads = torch.get_num_threads()
    expected = transformers_answers(resolve("demo"), theirs)
    torch.set_num_threads(threads)
    wrong = [i for i in range(len(ours)) if answers[i] != expected[i]]
    assert wrong == [], f"{ours[wrong[0]]}\n{answers[wrong[0]]}\n{expected[wrong[0]]}"
    assert load.preemptions > 0
    plain = transformers_answers(resolve("demo"), random_cases(resolve("demo"), NUM_CASES, seed=8))
    assert sum(a.token_ids != b.token_ids for a, b in zip(expected, plain, strict=True)) > NUM_CASES // 3
