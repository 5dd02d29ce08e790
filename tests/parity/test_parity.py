"""Every token of a mixed, crowded engine equals that of transformers run alone: fp32, the bundled model.

All cases run in one engine, once hundreds at a time and once with few blocks; every other setting gets its share of
them, and all of them in the slow tests.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from octavo.checkpoint import resolve
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.engine_core.engine_core import EngineCore
from octavo.types import EngineLoad
from parity.cases import Answer, Case, random_cases, transformers_answers
from parity.engine import engine_answers

pytestmark = pytest.mark.timeout(900)
NUM_CASES = 500
NUM_ORDINARY = 40
MAX_MODEL_LEN = 145


@dataclass(frozen=True)
class Setting:
    """One way to run the same requests."""

    block_size: int
    prefix_caching: bool
    chunk: int
    """Most tokens of a prompt in one step; 0: no limit."""
    num_blocks: int = 0
    """So few that running requests have to make way; 0: enough for all."""
    max_num_requests: int = 32
    max_num_batched_tokens: int = 2048

    def __str__(self) -> str:
        cache = "cache" if self.prefix_caching else "no cache"
        blocks = f"{self.num_blocks or 'all'} blocks of {self.block_size}"
        return f"{blocks}, {cache}, chunks of {self.chunk}, {self.max_num_requests} requests"


CROWDS = [
    Setting(block_size=16, prefix_caching=True, chunk=7, max_num_requests=256),
    Setting(block_size=16, prefix_caching=True, chunk=7, max_num_requests=256, num_blocks=27),
]
"""For all cases in one engine: hundreds run at once, or few because the blocks are."""
SETTINGS = [
    Setting(block_size=16, prefix_caching=True, chunk=2048),
    Setting(block_size=16, prefix_caching=False, chunk=7, num_blocks=27),
    Setting(block_size=32, prefix_caching=True, chunk=64, num_blocks=11),
    Setting(block_size=32, prefix_caching=False, chunk=1, max_num_requests=64),
    Setting(block_size=64, prefix_caching=True, chunk=7, num_blocks=6),
    Setting(block_size=64, prefix_caching=False, chunk=2048, num_blocks=6),
    Setting(block_size=16, prefix_caching=True, chunk=1, num_blocks=27, max_num_batched_tokens=40),
    Setting(block_size=32, prefix_caching=True, chunk=2048, num_blocks=9, max_num_requests=8),
]


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve("demo")


@pytest.fixture(scope="module")
def cases(path: Path) -> list[Case]:
    """The mixes of parameters, then ordinary requests."""
    return [*random_cases(path, NUM_CASES, seed=0, every_parameter=True), *_ordinary(path)]


def _ordinary(path: Path) -> list[Case]:
    rng = random.Random(1)
    settings = [{"do_sample": False, "top_k": 50}, {"do_sample": True, "top_k": 50}]
    found = random_cases(path, NUM_ORDINARY, seed=1)
    return [Case(c.prompt, c.seed, 1, c.max_new_tokens, rng.choice(settings), eos=(4095,)) for c in found]


@pytest.fixture(scope="module")
def expected(path: Path, cases: list[Case]) -> list[Answer]:
    return transformers_answers(path, cases, processes=2)


@pytest.mark.parametrize("setting", CROWDS, ids=str)
def test_all_cases_in_one_engine_equal_transformers_alone(setting: Setting, path, cases, expected):
    running: list[int] = []

    def count(core: EngineCore) -> None:
        running.append(core.scheduler.load(0.0).running_requests)

    _check(setting, path, cases, expected, count)
    assert setting.num_blocks or max(running) >= 200


@pytest.mark.parametrize("index", range(len(SETTINGS)), ids=lambda index: str(SETTINGS[index]))
def test_every_token_equals_transformers_alone(index: int, path, cases, expected):
    share = slice(index, None, len(SETTINGS))
    _check(SETTINGS[index], path, cases[share], expected[share])


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_token_of_all_cases_equals_transformers_alone(setting: Setting, path, cases, expected):
    _check(setting, path, cases, expected)


def _check(
    setting: Setting,
    path: Path,
    cases: list[Case],
    expected: list[Answer],
    after_step: Callable[[EngineCore], None] = lambda core: None,
) -> EngineLoad:
    config = EngineConfig(
        model=ModelConfig(path=str(path), name="demo", device="cpu", dtype="float32"),
        cache=CacheConfig(
            block_size=setting.block_size,
            num_blocks=setting.num_blocks,
            enable_prefix_caching=setting.prefix_caching,
        ),
        scheduler=SchedulerConfig(
            max_num_requests=setting.max_num_requests,
            max_num_batched_tokens=setting.max_num_batched_tokens,
            max_chunk_tokens=setting.chunk,
            max_model_len=MAX_MODEL_LEN,
            max_queue_time=3600.0,
        ),
    )
    order_seed = setting.block_size + setting.chunk
    answers, load = engine_answers(config, cases, order_seed, after_step=after_step)
    wrong = [i for i in range(len(cases)) if answers[i] != expected[i]]
    assert wrong == [], f"case {wrong[0]}: {cases[wrong[0]]}\n{answers[wrong[0]]}\n{expected[wrong[0]]}"
    assert (load.preemptions > 0) == (setting.num_blocks > 0)
    assert (load.prefix_cache_hits > 0) == setting.prefix_caching
    return load


def test_the_cases_are_not_vacuous(cases, expected):
    assert sum(len(tokens) for answer in expected for tokens in answer.token_ids) > 2000
    reasons = [reason for answer in expected for reason in answer.finish]
    assert {reason.name: reasons.count(reason) > 10 for reason in set(reasons)} == {
        "EOS": True,
        "STOP_TOKEN": True,
        "LENGTH": True,
    }
    used = [name for case in cases for name, value in case.params.items() if value]
    assert {name: used.count(name) >= 8 for name in set(used)} == dict.fromkeys(set(used), True)
    assert len(set(used)) == 26, sorted(set(used))
    sampled = [answer for case, answer in zip(cases, expected, strict=True) if case.num_sequences > 1]
    assert sum(answer.token_ids[0] != answer.token_ids[1] for answer in sampled) > len(sampled) // 2
