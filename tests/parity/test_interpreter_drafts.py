"""Speculation by prompt lookup on the device path changes how many steps a request takes, and nothing else."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.engine_core.engine_core import EngineCore
from octavo.errors import Reason
from octavo.step import LogprobSpec
from octavo.types import EngineLoad, FinishReason, LogprobKind
from octavo.worker.host_sampler import HostSampler
from octavo.worker.model_runner import ModelRunner
from octavo.worker.philox_noise import PhiloxNoise
from octavo.worker.runner import load_runner
from octavo.worker.step_program import INTERPRETED_SMS, THREADS_PER_SM
from parity.cases import Case
from parity.heard import Heard, answers, engine_request

VOCAB_SIZE = 97
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.05}
LOOKUP = {"prompt_lookup_num_tokens": 5}
CLOSE = functools.partial(pytest.approx, abs=1e-4)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model that repeats itself now and then, and whose tokens follow from what attention reads."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(9)
    path = tmp_path_factory.mktemp("tiny")
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=1, n_head=1, eos_token_id=96)
    model = GPT2LMHeadModel(config)
    model.transformer.wte.weight.data.mul_(4.0)
    model.transformer.wpe.weight.data.mul_(0.5)
    model.transformer.h[0].attn.c_attn.weight.data.mul_(10.0)
    model.transformer.h[0].attn.c_proj.weight.data.mul_(60.0)
    model.save_pretrained(path)
    return path


def case(index: int, params: dict[str, Any], **fields: Any) -> Case:
    """Its prompt says a passage twice."""
    passage = [(7 * index + 3 * i) % 90 for i in range(12)]
    return Case(
        passage * 2, **{"seed": 50 + index, "num_sequences": 1, "max_new_tokens": 10, "params": params, **fields}
    )


def cases() -> list[Case]:
    """Penalties and bans change few tokens: most of the drafts are right."""
    processed, raw = LogprobSpec(1, LogprobKind.PROCESSED_LOGPROB, [5]), LogprobSpec(2, LogprobKind.RAW_LOGIT, [])
    return [
        case(2, GREEDY, max_new_tokens=8),
        case(3, SAMPLED | {"frequency_penalty": 0.02, "no_repeat_ngram_size": 7}, max_new_tokens=14),
        case(8, SAMPLED | {"top_k": 20}, num_sequences=2, logprobs=processed),
        case(3, GREEDY, eos=(19,), max_new_tokens=20, logprobs=raw),
    ]


def run(
    device: str, path: Path, asked: list[Case], lookups: list[dict[str, Any]], **fields: Any
) -> tuple[dict[int, Heard], EngineLoad]:
    core = EngineCore(config_of(device, path, **fields), runner=runner_of(device, path, **fields))
    requests = [
        engine_request(100 * i, each, each.logprobs, lookup)
        for i, (each, lookup) in enumerate(zip(asked, lookups, strict=True))
    ]
    return answers(core, requests), core.scheduler.load(0.0)


def runner_of(device: str, path: Path, **fields: Any) -> Any:
    runner = load_runner(config_of(device, path, **fields), lambda text: None)
    if isinstance(runner, ModelRunner):
        noise = PhiloxNoise(VOCAB_SIZE, torch.device("cpu"), THREADS_PER_SM * INTERPRETED_SMS)
        runner._host = HostSampler(runner._states, noise, path)
    return runner


def config_of(device: str, path: Path, **fields: Any) -> EngineConfig:
    cache_type = fields.get("kv_cache_dtype", "auto")
    return EngineConfig(
        model=ModelConfig(
            path=str(path), name="tiny", device=device, dtype="float32", cuda_graphs=fields.get("cuda_graphs", True)
        ),
        cache=CacheConfig(block_size=16, num_blocks=fields.get("num_blocks", 100), kv_cache_dtype=cache_type),
        scheduler=SchedulerConfig(
            max_num_requests=8,
            max_num_batched_tokens=64,
            max_chunk_tokens=fields.get("chunk", 0),
            max_model_len=60,
            pipeline_depth=fields.get("depth", 0),
            max_queue_time=3600.0,
        ),
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "the graphs' shapes, prefix hits": {},
    "exact shapes, chunks, preemption, fp8, steps in flight": {
        "cuda_graphs": False, "chunk": 13, "num_blocks": 5, "kv_cache_dtype": "fp8", "depth": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS.keys())
def test_rows_with_drafts_get_the_tokens_and_logprobs_of_steps_without(fields: dict[str, Any], path: Path) -> None:
    asked, lookups = cases(), [{}, LOOKUP, LOOKUP, LOOKUP]
    if "num_blocks" in fields:
        asked, lookups = asked[2:], lookups[2:]
    expected, _ = run("cpu", path, asked, [{}] * len(asked), kv_cache_dtype=fields.get("kv_cache_dtype", "auto"))
    found, after = run("interpreter", path, asked, lookups, **fields)
    assert found.keys() == expected.keys()
    for key, right in expected.items():
        assert (found[key].token_ids, found[key].finish) == (right.token_ids, right.finish), key
        assert found[key].logprobs == CLOSE(right.logprobs), key
        assert [ids for ids, _ in found[key].top] == [ids for ids, _ in right.top], key
        assert [x for _, values in found[key].top for x in values] == CLOSE([x for _, v in right.top for x in v])
    assert FinishReason.EOS in {heard.finish for heard in expected.values()}
    assert after.drafted_tokens > after.accepted_tokens > 3
    assert (after.preemptions > 0) == ("num_blocks" in fields)
    assert after.prefix_cache_hits > 0 or fields


def test_a_row_that_fails_behind_a_right_draft_has_sent_the_tokens_before(path: Path) -> None:
    """As without drafts: it fails in the step that would have been its own. Nothing may follow 70, 14 said twice."""
    words = [[70, 14, 70, 14, token] for token in range(VOCAB_SIZE)]
    asked = [case(3, GREEDY | {"bad_words_ids": words})]
    expected, before = run("cpu", path, asked, [{}])
    found, after = run("interpreter", path, asked, [LOOKUP])
    assert found == expected
    assert (found[0].token_ids, found[0].finish) == ([41, 70, 14, 70, 14], Reason.NON_FINITE_SCORES)
    assert after.steps == before.steps and after.drafted_tokens == 4, "the one right token of a draft was the first"


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
def test_a_gpu_gives_the_greedy_tokens_of_the_cpu_path_with_drafts(path: Path, cuda_graphs: bool) -> None:
    asked = [case(i, GREEDY, max_new_tokens=20) for i in range(8)]
    expected, _ = run("cpu", path, asked, [{}] * 8)
    found, load = run("cuda", path, asked, [LOOKUP] * 8, cuda_graphs=cuda_graphs)
    assert {key: heard.token_ids for key, heard in found.items()} == {
        key: heard.token_ids for key, heard in expected.items()
    }
    assert load.accepted_tokens > 10


@pytest.mark.gpu
def test_drafts_change_no_seeded_token_on_a_gpu(path: Path) -> None:
    asked = [*cases(), *(case(i, SAMPLED, max_new_tokens=20) for i in range(4))]
    plain, _ = run("cuda", path, asked, [{}] * len(asked))
    found, load = run("cuda", path, asked, [LOOKUP] * len(asked))
    assert {key: heard.token_ids for key, heard in found.items()} == {
        key: heard.token_ids for key, heard in plain.items()
    }
    assert load.accepted_tokens > 10
