"""The device path under Triton's interpreter gives the tokens of the CPU path: greedy, seeded, in a crowded engine."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo.checkpoint import resolve
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.frontend.watermarks import resolve_watermark
from octavo.step import LogprobSpec, ModelRunnerOutput, NewRequest, SchedulerOutput
from octavo.types import EngineLoad, GenerationParams, GreenListWatermark, LogprobKind, SequenceBias, Watermark
from octavo.worker import model_loader
from octavo.worker.device import DEPENDENT_LAUNCH_CAPABILITY
from octavo.worker.host_sampler import HostSampler
from octavo.worker.model_runner import ModelRunner
from octavo.worker.runner import load_runner
from parity.cases import Answer, Case, random_cases, transformers_answers
from parity.engine import engine_answers
from reference.philox import race_noise

VOCAB_SIZE = 97
EOS = VOCAB_SIZE - 1
NUM_CASES = 7
TOKEN_PARAMS = {
    "logit_bias",
    "sequence_bias",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "allowed_token_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
}


class PhiloxNoise:
    """The random numbers of CUDA in the place of the CPU's: the same interface as `octavo.worker.noise.Noise`."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._seeds: dict[int, int] = {}

    def open(self, group_id: int, seed: int, num_rows: int) -> None:
        self._seeds[group_id] = seed

    def close(self, group_id: int) -> None:
        self._seeds.pop(group_id, None)

    def row_ended(self, group_id: int, row: int) -> None:
        pass

    def exponentials(self, group_id: int, row: int, step: int, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        noise = torch.from_numpy(race_noise(self._seeds[group_id], step, row, VOCAB_SIZE))
        return noise if token_ids is None else noise[token_ids]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model whose logits are far apart."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny")
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=160, n_embd=32, n_layer=1, n_head=1, bos_token_id=EOS, eos_token_id=EOS
    )
    model = GPT2LMHeadModel(config)
    model.transformer.wte.weight.data.mul_(8.0)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [_in_vocabulary(case) for case in random_cases(resolve("demo"), NUM_CASES, seed=5)]


def _in_vocabulary(case: Case) -> Case:
    ids = {name: tuple(token % VOCAB_SIZE for token in getattr(case, name)) for name in ("eos", "stop")}
    return dataclasses.replace(
        case,
        prompt=_smaller(case.prompt[:30]),
        params={name: _smaller(value) if name in TOKEN_PARAMS else value for name, value in case.params.items()},
        max_new_tokens=5,
        num_sequences=min(case.num_sequences, 2),
        **ids,
    )


def _smaller(value: Any) -> Any:
    """Token ids anywhere in a parameter's value, brought into the small vocabulary."""
    if isinstance(value, int):
        return value % VOCAB_SIZE
    if isinstance(value, dict):
        return {token % VOCAB_SIZE: bias for token, bias in value.items()}
    if isinstance(value, SequenceBias):
        return SequenceBias(_smaller(value.token_ids), value.bias)
    return [_smaller(item) for item in value]


def answers_of(device: str, path: Path, cases: list[Case], **fields: Any) -> tuple[list[Answer], EngineLoad]:
    config = config_of(device, path, **fields)
    runner = load_runner(config, lambda text: None)
    assert runner.info.kv_cache_dtype == ("float8_e4m3fn" if "kv_cache_dtype" in fields else "float32")
    if isinstance(runner, ModelRunner):
        runner._host = HostSampler(runner._states, PhiloxNoise(), path)
    return engine_answers(config, cases, order_seed=1, runner=runner)


def config_of(device: str, path: Path, **fields: Any) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(
            path=str(path),
            name="tiny",
            device=device,
            dtype="float32",
            cuda_graphs=fields.get("cuda_graphs", True),
            dependent_launch=fields.get("dependent_launch", "off"),
        ),
        cache=CacheConfig(
            block_size=int(fields.get("block_size", 16)),
            num_blocks=int(fields.get("num_blocks", 100)),
            kv_cache_dtype=str(fields.get("kv_cache_dtype", "auto")),
            enable_prefix_caching=bool(fields.get("prefix_caching", True)),
        ),
        scheduler=SchedulerConfig(
            max_num_requests=16,
            max_num_batched_tokens=128,
            max_chunk_tokens=int(fields.get("chunk", 0)),
            max_model_len=60,
            max_queue_time=3600.0,
        ),
    )


@pytest.fixture(scope="module")
def expected(path: Path, cases: list[Case]) -> list[Answer]:
    return answers_of("cpu", path, cases)[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"block_size": 16},
        {"block_size": 16, "chunk": 7, "num_blocks": 5, "prefix_caching": False},
    ],
    ids=["whole prompts, prefix hits", "chunks of 7, preemption"],
)
def test_the_device_path_gives_the_tokens_of_the_cpu_path(fields, path, cases, expected):
    answers, load = answers_of("interpreter", path, cases, **fields)
    assert answers == expected
    assert load.preemptions > 0 or "num_blocks" not in fields


def test_with_an_fp8_cache_both_paths_give_the_same_tokens_however_prompts_are_cut(path, cases):
    expected, _ = answers_of("cpu", path, cases, kv_cache_dtype="fp8")
    crowded = {"kv_cache_dtype": "fp8", "chunk": 7, "num_blocks": 5, "prefix_caching": False}
    answers, load = answers_of("cpu", path, cases, **crowded)
    assert answers == expected
    assert load.preemptions > 0
    answers, _ = answers_of("interpreter", path, cases[:2], **crowded)
    assert answers == expected[:2]


def test_the_device_path_gives_the_tokens_of_the_cpu_path_for_every_processor_and_filter(path):
    cases = [_in_vocabulary(case) for case in random_cases(resolve("demo"), 12, seed=3, every_parameter=True)]
    used = {name for case in cases for name in case.params}
    assert used >= TOKEN_PARAMS | {"no_repeat_ngram_size", "top_h", "eta_cutoff", "exponential_decay_length_penalty"}
    assert answers_of("interpreter", path, cases)[0] == answers_of("cpu", path, cases)[0]


def test_the_expected_tokens_are_not_all_alike(expected):
    tokens = [token for answer in expected for ids in answer.token_ids for token in ids]
    assert len(np.unique(tokens)) > 9


def test_logprobs_of_output_and_prompt_equal_the_cpu_path(path):
    """The vocabulary is no multiple of what the device pads it to; the first row's token is chosen on the host."""
    mark = Watermark(green_list=GreenListWatermark(bias=3.0))
    requests = [
        NewRequest(
            slot=slot,
            group_id=slot,
            row=0,
            num_rows=1,
            token_ids=np.arange(3 + slot, 15, dtype=np.int32),
            prompt_len=12 - slot,
            num_computed_tokens=0,
            block_ids=np.array([1 + slot], np.int32),
            params=params,
            max_total_tokens=20,
            eos_token_ids=(),
            stop_token_ids=(),
            seed=0,
            logprobs=LogprobSpec(num_top, LogprobKind.RAW_LOGPROB, [5]),
            prompt_logprobs=2,
        )
        for slot, (num_top, params) in enumerate(
            [(1, GenerationParams(watermarking_config=resolve_watermark(mark))), (3, GenerationParams())]
        )
    ]
    slots, lengths = np.arange(2, dtype=np.int32), np.array([12, 11], np.int32)
    step = SchedulerOutput(1, slots, slots * 0, lengths, np.ones(2, bool), 0, new_requests=requests)
    outputs = []
    for device in ("cpu", "interpreter"):
        runner = load_runner(config_of(device, path), lambda text: None)
        outputs.append(runner.submit(step).result())
        runner.close()
    expected, found = outputs
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert logprobs_of(found, 0) == logprobs_of(expected, 0)
    assert logprobs_of(found, 1) == logprobs_of(expected, 1)
    for prompt, expected_prompt in zip(found.prompt_logprobs, expected.prompt_logprobs, strict=True):
        assert prompt.chosen == pytest.approx(expected_prompt.chosen, abs=1e-5)
        assert prompt.top_token_ids.tolist() == expected_prompt.top_token_ids.tolist()


def logprobs_of(output: ModelRunnerOutput, row: int) -> tuple[list[int], list[float]]:
    """Rank and top ids; values of the chosen, the top and the requested tokens, rounded."""
    values = output.logprobs
    assert values is not None
    i = values.rows.tolist().index(row)
    top = slice(values.top_offsets[i], values.top_offsets[i + 1])
    requested = slice(values.requested_offsets[i], values.requested_offsets[i + 1])
    numbers = [values.chosen[i], *values.top_values[top], *values.requested[requested]]
    return [int(values.ranks[i]), *values.top_token_ids[top].tolist()], np.round(numbers, 4).tolist()


@pytest.mark.gpu
def test_a_gpu_gives_the_greedy_tokens_of_the_cpu_path(path, cases):
    """Seeded draws are left out: a GPU divides and takes logarithms in its own way."""
    greedy = [case for case in cases if not case.params["do_sample"]]
    assert answers_of("cuda", path, greedy)[0] == answers_of("cpu", path, greedy)[0]


def test_dependent_launch_is_of_every_kernel_of_a_step(path, monkeypatch):
    """The interpreter cannot launch so: what the kernels' launches are asked for is recorded instead."""
    import octavo.worker.device_runner  # noqa: F401 -- so that all kernels are there to be patched

    asked: dict[str, set[bool]] = {}

    def recorded(family: str) -> Callable[[bool], dict[str, bool]]:
        def options(dependent_launch: bool) -> dict[str, bool]:
            asked.setdefault(family, set()).add(dependent_launch)
            return {"DEPENDENT_LAUNCH": False}

        return options

    for name, module in list(sys.modules.items()):
        if name.startswith("octavo_kernels.") and hasattr(module, "launch_options"):
            monkeypatch.setattr(module, "launch_options", recorded(name.removeprefix("octavo_kernels.")))
    monkeypatch.setattr(model_loader, "uses_dependent_launch", lambda config, device: True)
    params = {"do_sample": False, "no_repeat_ngram_size": 9, "prompt_lookup_num_tokens": 1}
    answers_of("interpreter", path, [Case([1, 1, 1, 1], seed=0, num_sequences=1, max_new_tokens=3, params=params)])
    families = "embed history inputs kv_write linear norm paged_attention prefill_attention sampling verify_attention"
    assert asked == {family: {True} for family in families.split()}


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
def test_dependent_launch_changes_no_token(path, cases, cuda_graphs):
    if torch.cuda.get_device_capability() < DEPENDENT_LAUNCH_CAPABILITY:
        pytest.skip("needs compute capability 9.0")
    off = answers_of("cuda", path, cases, cuda_graphs=cuda_graphs)[0]
    for _ in range(2):
        assert answers_of("cuda", path, cases, cuda_graphs=cuda_graphs, dependent_launch="auto")[0] == off


@pytest.mark.gpu
def test_a_gpu_gives_the_seeded_tokens_of_transformers_on_it(path, cases):
    """The same generator, division and logarithm: what a user of `generate()` on that card would have seen."""
    assert answers_of("cuda", path, cases)[0] == transformers_answers(path, cases, "cuda")
