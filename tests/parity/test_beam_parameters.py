"""Logprobs, watermarks and octavo's own parameters of beam searches equal what transformers makes of each search alone.

All run in one crowd, preempted now and then: fp32, a tiny random model.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.frontend.watermarks import resolve_watermark
from octavo.step import LogprobSpec
from octavo.types import GreenListWatermark, LogprobKind, SeedingScheme, SynthIdWatermark, Watermark
from parity.beams import (
    EOS,
    GREEDY,
    SAMPLED,
    answer_of,
    beam_cases,
    differences,
    engine_params,
    transformers_searches,
)
from parity.cases import Answer, Case
from parity.engine import engine_answers
from transformers import GPT2LMHeadModel, LogitsProcessor, SynthIDTextWatermarkingConfig, WatermarkingConfig

SHOWN = (3, 50, EOS)
"""Requested token ids."""
PROMPT = [7, 3, 11, 7, 3, 20, 41]


class OutputPenalty(LogitsProcessor):
    def __init__(self, frequency: float, presence: float) -> None:
        self._frequency, self._presence = frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        output = input_ids[:, len(PROMPT) :]
        counts = torch.zeros_like(scores).scatter_add_(1, output, torch.ones(output.shape))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class Bias(LogitsProcessor):
    def __init__(self, biases: dict[int, float]) -> None:
        self._biases = biases

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for token, bias in self._biases.items():
            scores[:, token] += bias
        return scores


class Allow(LogitsProcessor):
    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self._token_ids] = scores[:, self._token_ids]
        return allowed


FEW, MANY, BIASES = [3, 20, EOS], [*range(0, 60, 3), EOS], {11: 2.5, 41: -3.0, 60: 1.5}
EXTENSIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "frequency_penalty": ({"frequency_penalty": 1.5}, lambda: OutputPenalty(1.5, 0.0)),
    "presence_penalty": ({"presence_penalty": 2.0}, lambda: OutputPenalty(0.0, 2.0)),
    "both penalties": ({"frequency_penalty": -0.75, "presence_penalty": 1.25}, lambda: OutputPenalty(-0.75, 1.25)),
    "logit_bias": ({"logit_bias": BIASES}, lambda: Bias(BIASES)),
    "allowed_token_ids": ({"allowed_token_ids": MANY}, lambda: Allow(MANY)),
    "fewer allowed_token_ids than beams": ({"allowed_token_ids": FEW}, lambda: Allow(FEW)),
}
"""What transformers does not have, and a processor that does it there."""

SYNTH_IDS: list[dict[str, Any]] = [
    {"ngram_len": 5, "keys": [654, 400, 836]},
    {"ngram_len": 2, "keys": [9, 2**40, 5], "context_history_size": 2},
    {"ngram_len": 3, "keys": [1], "skip_first_ngram_calls": True},
]
GREEN_LISTS: list[dict[str, Any]] = [
    {"seeding_scheme": SeedingScheme.LEFTHASH, "bias": 3.0},
    {"seeding_scheme": SeedingScheme.SELFHASH, "context_width": 3},
]
MARKS = [
    *((Watermark(synth_id=SynthIdWatermark(**mark)), SynthIDTextWatermarkingConfig(**mark)) for mark in SYNTH_IDS),
    *(
        (
            Watermark(green_list=GreenListWatermark(**mark)),
            WatermarkingConfig(**{**mark, "seeding_scheme": mark["seeding_scheme"].name.lower()}),
        )
        for mark in GREEN_LISTS
    ),
]


@dataclass(frozen=True)
class Pair:
    """A search in our form and in transformers'."""

    name: str
    ours: Case
    theirs: Case


def pair(name: str, case: Case, ours: dict[str, Any], theirs: dict[str, Any]) -> Pair:
    own = replace(case, params=engine_params(case.params) | ours)
    return Pair(name, own, replace(case, params=case.params | theirs))


def searches() -> list[Pair]:
    kinds = itertools.cycle(LogprobKind)
    pairs = [pair("logprobs", replace(case, logprobs=spec(next(kinds))), {}, {}) for case in beam_cases(seed=2)[::2]]
    rng = random.Random(3)
    for sampling in (GREEDY, SAMPLED):
        for name, (ours, processor) in EXTENSIONS.items():
            pairs.append(pair(name, search(rng, sampling), ours, {"logits_processor": [processor()]}))
        for i, (mark, config) in enumerate(MARKS):
            ours = {"watermarking_config": resolve_watermark(mark)}
            pairs.append(pair(f"watermark {i}", search(rng, sampling), ours, {"watermarking_config": config}))
        stops = replace(search(rng, sampling), eos=(EOS,), stop=(20, 41, 3))
        pairs.append(pair("stop_token_ids", stops, {"min_new_tokens": 3}, {"min_new_tokens": 3}))
    return pairs


def spec(kind: LogprobKind) -> LogprobSpec:
    """Of every size from nothing on, whatever the kind."""
    return LogprobSpec(num_top=kind % 3, kind=kind, token_ids=list(SHOWN[: kind - 1]))


def search(rng: random.Random, sampling: dict[str, Any]) -> Case:
    beams = rng.choice([4, 5])
    return Case(
        prompt=PROMPT,
        seed=rng.randrange(2**63),
        num_sequences=beams,
        max_new_tokens=18,
        params={"num_beams": beams, "sequence_bias": {(EOS,): 2.0}, **sampling},
        eos=(EOS,),
        logprobs=spec(rng.choice(list(LogprobKind))),
    )


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return searches()


@pytest.fixture(scope="module")
def expected(tiny_path: Path, pairs: list[Pair]) -> list[Any]:
    return transformers_searches(tiny_path, [pair.theirs for pair in pairs])


@pytest.fixture(scope="module")
def answers(tiny_path: Path, pairs: list[Pair]) -> list[Answer]:
    config = EngineConfig(
        model=ModelConfig(path=str(tiny_path), name="tiny", device="cpu", dtype="float32"),
        cache=CacheConfig(block_size=16, num_blocks=30),
        scheduler=SchedulerConfig(max_num_requests=48, max_chunk_tokens=7, pipeline_depth=1, max_queue_time=3600.0),
    )
    answers, load = engine_answers(config, [pair.ours for pair in pairs], order_seed=4)
    assert load.preemptions > 0
    return answers


def test_every_search_finds_what_transformers_finds_alone(pairs, answers, expected):
    wrong = [
        f"{pair.name}, {pair.ours}: {problem}"
        for pair, answer, found in zip(pairs, answers, expected, strict=True)
        for problem in differences(pair.theirs, answer, answer_of(pair.theirs, found))
    ]
    assert wrong == [], f"{len(wrong)} differences, first: {wrong[0]}"


def test_each_parameter_changes_what_is_found(tiny_path, pairs, expected):
    unmarked = [pair for pair in pairs if pair.name != "logprobs"]
    plain = [replace(pair.theirs, params=without(pair.theirs.params), stop=()) for pair in unmarked]
    found = [search for pair, search in zip(pairs, expected, strict=True) if pair.name != "logprobs"]
    for pair, other, search in zip(unmarked, transformers_searches(tiny_path, plain), found, strict=True):
        assert search.sequences.tolist() != other.sequences.tolist(), pair.name


def without(params: dict[str, Any]) -> dict[str, Any]:
    ours = ("logits_processor", "watermarking_config", "min_new_tokens")
    return {name: value for name, value in params.items() if name not in ours}


def test_logprobs_follow_the_ancestors_as_transition_scores_do(tiny_path, pairs, answers, expected):
    model = GPT2LMHeadModel.from_pretrained(tiny_path)
    seen = set()
    for pair, answer, found in zip(pairs, answers, expected, strict=True):
        assert pair.ours.logprobs is not None
        kind = pair.ours.logprobs.kind
        if kind is LogprobKind.PROCESSED_LOGIT:
            right = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
            for i, ids in enumerate(answer.token_ids):
                assert close(floats(answer.logprobs[i].chosen), right[i, : len(ids)].numpy()), pair
        for i, ids in enumerate(answer.token_ids):
            check_values(pair.ours.logprobs, ids, answer.logprobs[i], found, found.beam_indices[i].tolist())
        seen.add((kind, pair.ours.params["do_sample"]))
    assert len(seen) == 8


def check_values(asked: LogprobSpec, ids: list[int], columns: Any, found: Any, beams: list[int]) -> None:
    """Columns of one sequence, beside the rows of transformers' scores or logits that its ancestors had."""
    kind, num_top = asked.kind, asked.num_top
    source = found.logits if kind in (LogprobKind.RAW_LOGIT, LogprobKind.RAW_LOGPROB) else found.scores
    rows = [source[step][beam] for step, beam in enumerate(beams[: len(ids)])]
    if kind in (LogprobKind.RAW_LOGPROB, LogprobKind.PROCESSED_LOGPROB):
        rows = [row.log_softmax(-1) for row in rows]
    assert columns.num_top == num_top
    chosen, ranks = floats(columns.chosen), np.frombuffer(columns.ranks, "<i4")
    tops = floats(columns.top_values).reshape(len(ids), num_top)
    top_ids = np.frombuffer(columns.top_token_ids, "<i4").reshape(len(ids), num_top)
    requested = floats(columns.requested).reshape(len(ids), len(asked.token_ids))
    assert len(chosen) == len(ranks) == len(ids)
    for step, (row, token) in enumerate(zip(rows, ids, strict=True)):
        assert close(chosen[step], row[token].numpy())
        assert close(tops[step], row.topk(num_top).values.numpy())
        assert close(row[top_ids[step].tolist()].numpy(), tops[step])
        assert close(requested[step], row[asked.token_ids].numpy())
        near = float(chosen[step])
        assert (row > near + 1e-4).sum() < ranks[step] <= (row > near - 1e-4).sum() + 1


def floats(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<f4")


def close(found: np.ndarray, right: np.ndarray) -> bool:
    """Within 1e-5, relative where the values are large, as the lowest floats that a watermark leaves."""
    return np.allclose(found, right, rtol=1e-6, atol=1e-5)


def test_processed_logits_add_up_to_the_score_of_the_sequence(pairs, answers):
    checked = 0
    for pair, answer in zip(pairs, answers, strict=True):
        if pair.ours.logprobs.kind is LogprobKind.PROCESSED_LOGIT and all(answer.token_ids):
            penalty = pair.ours.params.get("length_penalty", 1.0)
            for ids, columns, score in zip(answer.token_ids, answer.logprobs, answer.scores, strict=True):
                assert float(floats(columns.chosen).sum()) / len(ids) ** penalty == pytest.approx(score, abs=1e-4)
                checked += 1
    assert checked > 10
