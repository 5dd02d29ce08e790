"""What the engine samples has the distribution that transformers samples from: chi-square, the bundled model, fp32."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from octavo.checkpoint import resolve
from octavo.llm import LLM
from parity.cases import TEXT

Params = dict[str, Any]
NUM_SEQUENCES, NUM_SEEDS = 16, 48
LEAST_EXPECTED = 5.0
"""Tokens expected less often are counted together."""
LEAST_P = 1e-3
"""Of 12 sound engines' tests one in 80 would be below it; the seeds are fixed."""

SETS: dict[str, Params] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.02},
    "top_h": {"top_h": 0.6},
    "repetition_penalty and temperature": {"repetition_penalty": 1.4, "temperature": 1.2, "top_k": 60},
    "sequence_bias": {"sequence_bias": {(40,): 1.0, (46,): -1.5}, "top_k": 60},
    "watermark": {"watermarking_config": {"bias": 3.0, "greenlist_ratio": 0.4}, "top_k": 60},
    "mix": {
        "temperature": 1.3,
        "top_k": 80,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "sequence_bias": {(50,): 1.0},
        "watermarking_config": {"bias": 1.5},
    },
}
"""Keywords of generate(). Every set samples, from a top_k of 0 if it names none."""


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(resolve("demo") / "tokenizer.json")).encode(TEXT).ids[:17])


@pytest.fixture(scope="module")
def samples(prompt: list[int]) -> dict[str, Counter[int]]:
    """Of each set, how often each token came; all sets run in one batch."""
    requests = [
        {
            "prompt": prompt,
            "do_sample": True,
            "max_new_tokens": 1,
            "num_return_sequences": NUM_SEQUENCES,
            "seed": 1000 * number + seed,
            **({"top_k": 0} | params),
        }
        for seed in range(NUM_SEEDS)
        for number, params in enumerate(SETS.values())
    ]
    with LLM("demo", dtype="float32", device="cpu", max_num_requests=256, num_blocks=600) as llm:
        results = llm.generate_each(requests)
    counts: dict[str, Counter[int]] = {name: Counter() for name in SETS}
    for i, outputs in enumerate(results):
        counts[list(SETS)[i % len(SETS)]].update(output.token_ids[0] for output in outputs)
    return counts


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(resolve("demo"), dtype=torch.float32).eval()


@torch.inference_mode()
def probabilities(model: Any, prompt: list[int], params: Params) -> torch.Tensor:
    """[vocab_size] float64, of transformers' own processors and warpers."""
    from transformers import WatermarkingConfig

    settings = {"top_k": 0, **params}
    if mark := settings.get("watermarking_config"):
        settings["watermarking_config"] = WatermarkingConfig(**mark)
    row = torch.tensor([prompt])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            pad_token_id=0,
            do_sample=True,
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
    return found.scores[0][0].double().softmax(-1)


def p_value(counts: Counter[int], expected: torch.Tensor) -> float:
    """Of the chi-square test that `counts` were drawn from `expected`; 0 if a token has no probability."""
    total = counts.total()
    observed = torch.zeros_like(expected)
    observed[list(counts)] = torch.tensor(list(counts.values()), dtype=expected.dtype)
    if (observed[expected == 0] > 0).any():
        return 0.0
    frequent = expected * total >= LEAST_EXPECTED
    bins = torch.cat([expected[frequent], expected[~frequent].sum()[None]]) * total
    seen = torch.cat([observed[frequent], observed[~frequent].sum()[None]])
    used = bins > 0
    statistic = ((seen - bins)[used] ** 2 / bins[used]).sum()
    freedom = torch.tensor(float(used.sum() - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


@pytest.mark.parametrize("name", SETS)
def test_samples_have_the_distribution_of_transformers(name: str, samples, model, prompt) -> None:
    expected = probabilities(model, prompt, SETS[name])
    assert samples[name].total() == NUM_SEQUENCES * NUM_SEEDS
    assert (expected * samples[name].total() >= LEAST_EXPECTED).sum() >= 5
    assert p_value(samples[name], expected) > LEAST_P


def test_a_slightly_wrong_distribution_is_found(samples, model, prompt) -> None:
    for name, wrong in {
        "temperature": {"temperature": 0.9},
        "top_k": {"top_k": 11},
        "sequence_bias": {**SETS["sequence_bias"], "sequence_bias": {(40,): 1.5, (46,): -1.5}},
        "watermark": {**SETS["watermark"], "watermarking_config": {"bias": 2.0, "greenlist_ratio": 0.4}},
    }.items():
        assert p_value(samples[name], probabilities(model, prompt, wrong)) < LEAST_P, name
