"""What the host chooses on the device path gives the tokens of the CPU path: guidance, watermarks, structured outputs,
beam searches, and lists too long for the device, among ordinary requests."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.checkpoint import resolve
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.frontend.watermarks import resolve_watermark
from octavo.types import (
    Choice,
    EarlyStopping,
    EngineLoad,
    ExponentialDecay,
    GreenListWatermark,
    SeedingScheme,
    SequenceBias,
    StructuredOutput,
    SynthIdWatermark,
    Watermark,
)
from octavo.worker.host_sampler import HostSampler
from octavo.worker.model_runner import ModelRunner
from octavo.worker.philox_noise import PhiloxNoise
from octavo.worker.runner import load_runner
from parity.cases import Answer, Case
from parity.engine import engine_answers

VOCAB_SIZE, EOS = 4096, 4095
INTERPRETED_THREADS = 132 * 2048
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 1.5}
TOP_K: dict[str, Any] = {"do_sample": True, "top_k": 20, "top_p": 0.9}
ENDS = {"sequence_bias": [SequenceBias([EOS], 4.0)]}
SHARED = [(7 * i) % 200 for i in range(17)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with the vocabulary of the bundled tokenizer, its logits far apart."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny")
    ends = {"bos_token_id": EOS, "eos_token_id": EOS}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=16, n_layer=1, n_head=1, **ends))
    model.transformer.wte.weight.data.mul_(12.0)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        if (source := resolve("demo") / name).exists():
            shutil.copy(source, path)
    return path


def mark(**fields: Any) -> dict[str, Any]:
    return {"watermarking_config": resolve_watermark(Watermark(**fields))}


def host_cases() -> list[Case]:
    """Each in an order of its own; prompts begin alike here and there, and have blocks to share."""
    left, self_hash = (
        GreenListWatermark(greenlist_ratio=0.5, bias=6.0, context_width=1, seeding_scheme=scheme)
        for scheme in (SeedingScheme.LEFTHASH, SeedingScheme.SELFHASH)
    )
    synth_id = SynthIdWatermark(ngram_len=3, keys=[5, 77, 12345], context_history_size=16)
    penalties = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3}
    beams = {"num_beams": 3, "early_stopping": EarlyStopping.NEVER, "length_penalty": 2.0, **TOP_K, **ENDS}
    return [
        _case(0, {"guidance_scale": 1.5, **GREEDY}, negative=(5, 6, 7)),
        _case(1, {"guidance_scale": 3.0, **SAMPLED, "repetition_penalty": 1.2}, num_sequences=2, negative=(9,)),
        _case(2, {**GREEDY, **mark(green_list=left)}),
        _case(3, {**SAMPLED, **mark(green_list=self_hash)}),
        _case(4, {**TOP_K, **mark(synth_id=synth_id)}, num_sequences=2),
        _case(5, {**GREEDY, "structured_output": StructuredOutput(choice=Choice([" yes", " no one knows"]))}),
        _case(6, {**SAMPLED, "structured_output": StructuredOutput(regex=r"[A-Z][a-z]{2,4}\.")}),
        _case(7, {**GREEDY, "structured_output": StructuredOutput(json_schema='{"type": "integer"}')}),
        _case(8, {**GREEDY, "num_beams": 2, "early_stopping": EarlyStopping.TRUE, "length_penalty": -1.0, **ENDS}),
        _case(9, beams, num_sequences=2),
        _case(10, {**GREEDY, "num_beams": 4, "top_k": 50, **penalties, **ENDS}, num_sequences=4),
        _case(11, {**SAMPLED, "num_beams": 2, "exponential_decay_length_penalty": ExponentialDecay(2, 1.3)}, eos=()),
        _case(12, {**TOP_K, "logit_bias": {3 * i: (i % 7) - 3.0 for i in range(1200)}}),
    ]


def ordinary_cases() -> list[Case]:
    params = [GREEDY, SAMPLED, {**TOP_K, "repetition_penalty": 1.3}, {**GREEDY, "no_repeat_ngram_size": 1}]
    return [_case(20 + i, own, num_sequences=1 + own["do_sample"]) for i, own in enumerate(params)]


def _case(index: int, params: dict[str, Any], **fields: Any) -> Case:
    own = [(31 * index + 5 * i) % EOS for i in range(2 + 5 * (index % 3))]
    prompt = [*(SHARED if index % 2 else []), *own]
    case = Case(prompt, seed=1000 + index, num_sequences=1, max_new_tokens=6, params=params, eos=(EOS,))
    return dataclasses.replace(case, **fields)


def answers_of(device: str, path: Path, cases: list[Case], **fields: int | bool) -> tuple[list[Answer], EngineLoad]:
    config = EngineConfig(
        model=ModelConfig(path=str(path), name="tiny", device=device, dtype="float32"),
        cache=CacheConfig(
            block_size=16,
            num_blocks=int(fields.get("num_blocks", 200)),
            enable_prefix_caching=bool(fields.get("prefix_caching", True)),
        ),
        scheduler=SchedulerConfig(
            max_num_requests=32,
            max_num_batched_tokens=128,
            max_chunk_tokens=int(fields.get("chunk", 0)),
            pipeline_depth=int(fields.get("depth", 0)),
            max_queue_time=3600.0,
        ),
    )
    runner = load_runner(config, lambda text: None)
    if isinstance(runner, ModelRunner):
        runner._host = HostSampler(runner._states, PhiloxNoise(VOCAB_SIZE, INTERPRETED_THREADS), path)
    return engine_answers(config, cases, order_seed=1, runner=runner)


@pytest.fixture(scope="module")
def expected(path: Path) -> list[Answer]:
    return answers_of("cpu", path, host_cases() + ordinary_cases())[0]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"chunk": 7, "num_blocks": 12, "depth": 1},
    ],
    ids=["whole prompts, prefix hits", "chunks of 7, preemption, steps in flight"],
)
def test_host_rows_give_the_tokens_of_the_cpu_path(fields, path, expected):
    cases = host_cases() + ordinary_cases()
    answers, load = answers_of("interpreter", path, cases, **fields)
    wrong = [i for i in range(len(cases)) if answers[i] != expected[i]]
    assert wrong == [], f"{cases[wrong[0]]}\n{answers[wrong[0]]}\n{expected[wrong[0]]}"
    assert (load.preemptions > 0) == ("num_blocks" in fields)
    assert load.prefix_cache_hits > 0


def test_the_parameters_have_an_effect(path, expected):
    plain = [
        dataclasses.replace(case, params={"do_sample": case.params["do_sample"], "top_k": case.params.get("top_k", 50)})
        for case in host_cases()
    ]
    answers = answers_of("cpu", path, [dataclasses.replace(case, negative=()) for case in plain])[0]
    same = [
        case for case, one, other in zip(plain, answers, expected, strict=False) if one.token_ids == other.token_ids
    ]
    assert same == []
