"""Requests whose blocks are read once for several of them, and those beside them, get the tokens of the CPU path."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.types import EngineLoad
from octavo.worker import gpt2_triton, shared_prefixes
from octavo.worker.host_sampler import HostSampler
from octavo.worker.model_runner import ModelRunner
from octavo.worker.philox_noise import PhiloxNoise
from octavo.worker.runner import load_runner
from octavo.worker.step_program import INTERPRETED_SMS, THREADS_PER_SM
from parity.cases import Answer, Case
from parity.engine import engine_answers
from torch import Tensor

VOCAB_SIZE = 97
SHARED = [(7 * i + i // 13) % 90 for i in range(260)]
"""More than a split of 256 tokens."""
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 20}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model whose logits are far apart, and whose tokens follow from what attention reads."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny")
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=300, n_embd=32, n_layer=1, n_head=1, eos_token_id=96)
    model = GPT2LMHeadModel(config)
    model.transformer.wte.weight.data.mul_(4.0)
    model.transformer.h[0].attn.c_attn.weight.data.mul_(10.0)
    model.transformer.h[0].attn.c_proj.weight.data.mul_(60.0)
    model.save_pretrained(path)
    return path


def cases() -> list[Case]:
    """Sequences of one prompt, a prompt that goes on differently, beams, and requests that share nothing."""

    def case(index: int, prompt: list[int], params: dict[str, Any], num_sequences: int = 1) -> Case:
        return Case([*prompt, index, 3 * index], 100 + index, num_sequences, 3, params)

    return [
        case(1, SHARED, SAMPLED, 3),
        case(2, SHARED[:258], GREEDY),
        case(3, SHARED, GREEDY | {"num_beams": 2}),
        case(4, SHARED[:30], SAMPLED),
    ]


def answers_of(device: str, path: Path, asked: list[Case], **options: Any) -> tuple[list[Answer], EngineLoad]:
    config = EngineConfig(
        model=ModelConfig(path=str(path), name="tiny", device=device, dtype="float32", **options),
        cache=CacheConfig(block_size=32, num_blocks=150),
        scheduler=SchedulerConfig(max_num_requests=8, max_num_batched_tokens=300, max_queue_time=3600.0),
    )
    runner = load_runner(config, lambda text: None)
    if isinstance(runner, ModelRunner):
        noise = PhiloxNoise(VOCAB_SIZE, torch.device("cpu"), THREADS_PER_SM * INTERPRETED_SMS)
        runner._host = HostSampler(runner._states, noise, path)
    # The first and the last come first, the others when the prefix is in the cache.
    return engine_answers(config, asked, order_seed=33, runner=runner)


@pytest.fixture
def shared_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of rows that share something at each launch that reads for several, in order. It pays always."""
    monkeypatch.setattr(shared_prefixes, "LEAST_SAVED", 1)
    counts: list[int] = []
    launch = gpt2_triton.shared_attention

    def counted(*arguments: Any, **options: Any) -> None:
        tiles: Tensor = arguments[4]
        if tiles.device.type == "cpu":  # a CUDA graph that is captured has no numbers yet
            counts.append(int((tiles >= 0).sum()))
        launch(*arguments, **options)

    monkeypatch.setattr(gpt2_triton, "shared_attention", counted)
    return counts


def test_sequences_hits_and_beams_share_and_keep_the_tokens_of_the_cpu_path(path: Path, shared_rows: list[int]):
    answers, load = answers_of("interpreter", path, cases())
    expected = answers_of("cpu", path, cases())[0]
    for found, right in zip(answers, expected, strict=True):
        assert found.scores == pytest.approx(right.scores, abs=1e-5)
        assert dataclasses.replace(found, scores=[]) == dataclasses.replace(right, scores=[])
    assert len({token for answer in expected for ids in answer.token_ids for token in ids}) > 9
    assert load.prefix_cache_hits > 0
    assert max(shared_rows) > 3, "more than the sequences of one prompt"


@pytest.mark.gpu
@pytest.mark.usefixtures("shared_rows")
def test_a_gpu_gives_the_greedy_tokens_of_the_cpu_path_with_shares(path: Path):
    greedy = [dataclasses.replace(case, params=case.params | GREEDY) for case in cases()]
    expected = answers_of("cpu", path, greedy)[0]
    for cuda_graphs in (True, False):
        answers = answers_of("cuda", path, greedy, cuda_graphs=cuda_graphs)[0]
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
