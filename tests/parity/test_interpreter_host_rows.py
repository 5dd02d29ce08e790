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

VOCAB_SIZE, EOS = 257, 256
INTERPRETED_THREADS = 132 * 2048
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 1.5}
TOP_K: dict[str, Any] = {"do_sample": True, "top_k": 20, "top_p": 0.9}
ENDS = {"sequence_bias": [SequenceBias([EOS], 4.0)]}
SHARED = [(7 * i) % 200 for i in range(17)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model whose logits are far apart; each byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny")
    ends = {"bos_token_id": EOS, "eos_token_id": EOS}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=16, n_layer=1, n_head=1, **ends))
    model.transformer.wte.weight.data.mul_(6.0)
    model.transformer.wpe.weight.data.mul_(12.0)
    model.save_pretrained(path)
    shutil.copy(resolve("demo") / "tokenizer_config.json", path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({**{char: i for i, char in enumerate(alphabet)}, "<|endoftext|>": EOS}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def mark(**fields: Any) -> dict[str, Any]:
    return {"watermarking_config": resolve_watermark(Watermark(**fields))}


def host_cases() -> list[Case]:
    """Half of the prompts begin with a block of the same tokens; the last one's last token is 150, and its words are
    more than a slot of the device holds."""
    left, self_hash = (
        GreenListWatermark(greenlist_ratio=0.5, bias=6.0, context_width=1, seeding_scheme=scheme)
        for scheme in (SeedingScheme.LEFTHASH, SeedingScheme.SELFHASH)
    )
    synth_id = SynthIdWatermark(ngram_len=3, keys=[5, 77, 12345], context_history_size=16)
    penalties = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3}
    beams = {"num_beams": 3, "early_stopping": EarlyStopping.NEVER, "length_penalty": 2.0, **TOP_K, **ENDS}
    return [
        _case(0, {"guidance_scale": 4.0, **GREEDY}, negative=(5, 6, 7)),
        _case(1, {"guidance_scale": 3.0, **SAMPLED, "repetition_penalty": 1.2}, num_sequences=2, negative=(9,)),
        _case(2, {**GREEDY, **mark(green_list=left)}),
        _case(3, {**SAMPLED, **mark(green_list=self_hash)}),
        _case(4, {**TOP_K, **mark(synth_id=synth_id)}),
        _case(5, {**GREEDY, "structured_output": StructuredOutput(choice=Choice([" yes", " no one knows"]))}),
        _case(6, {**SAMPLED, "structured_output": StructuredOutput(regex=r"[A-Z][a-z]{2,3}\.")}),
        _case(7, {**GREEDY, "structured_output": StructuredOutput(json_schema='{"type": "boolean"}')}),
        _case(
            8,
            {
                **GREEDY,
                "num_beams": 2,
                "early_stopping": EarlyStopping.TRUE,
                "length_penalty": -1.0,
                "min_new_tokens": 2,
                **ENDS,
            },
        ),
        _case(9, beams, num_sequences=2),
        _case(10, {**GREEDY, "num_beams": 4, **penalties, **ENDS}, num_sequences=4),
        _case(11, {**GREEDY, "bad_words_ids": [[150, token] for token in range(200)]}),
    ]


def ordinary_cases() -> list[Case]:
    return [_case(21, {**GREEDY, "repetition_penalty": 1.3}), _case(22, SAMPLED, num_sequences=2)]


def _case(index: int, params: dict[str, Any], **fields: Any) -> Case:
    own = [(31 * index + 5 * i) % EOS for i in range((3, 13, 14)[index % 3])]
    prompt = [*(SHARED if index % 2 else []), *own]
    case = Case(prompt, seed=1000 + index, num_sequences=1, max_new_tokens=5, params=params, eos=(EOS,))
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
        noise = PhiloxNoise(VOCAB_SIZE, torch.device("cpu"), INTERPRETED_THREADS)
        runner._host = HostSampler(runner._states, noise, path)
    return engine_answers(config, cases, order_seed=1, runner=runner)


@pytest.fixture(scope="module")
def expected(path: Path) -> list[Answer]:
    return answers_of("cpu", path, host_cases() + ordinary_cases())[0]


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({}, slice(1, None, 2)),
        ({"chunk": 7, "num_blocks": 12, "depth": 1}, slice(None)),
    ],
    ids=["whole prompts, prefix hits", "chunks of 7, preemption, steps in flight"],
)
def test_host_rows_give_the_tokens_of_the_cpu_path(fields, part, path, expected):
    cases, expected = (host_cases() + ordinary_cases())[part], expected[part]
    answers, load = answers_of("interpreter", path, cases, **fields)
    for found, right in zip(answers, expected, strict=True):
        assert found.scores == pytest.approx(right.scores, abs=1e-5)
        found.scores = right.scores
    wrong = [i for i in range(len(cases)) if answers[i] != expected[i]]
    assert wrong == [], f"{cases[wrong[0]]}\n{answers[wrong[0]]}\n{expected[wrong[0]]}"
    assert (load.preemptions > 0) == ("num_blocks" in fields)
    assert load.prefix_cache_hits > 0


def test_the_parameters_have_an_effect(path, expected):
    sampling = ("do_sample", "top_k", "top_p", "temperature")
    plain = [
        dataclasses.replace(case, params={name: case.params[name] for name in sampling if name in case.params})
        for case in host_cases()
    ]
    answers = answers_of("cpu", path, [dataclasses.replace(case, negative=()) for case in plain])[0]
    same = [
        case for case, one, other in zip(plain, answers, expected, strict=False) if one.token_ids == other.token_ids
    ]
    assert same == []
