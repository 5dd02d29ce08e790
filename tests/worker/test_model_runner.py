"""The runner as the core sees it: steps in, tokens and values out, on the bundled model in fp32."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from octavo.checkpoint import resolve
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.errors import Reason, StartupError
from octavo.step import LogprobSpec, NewRequest, SchedulerOutput
from octavo.types import FinishReason, GenerationParams, LogprobKind
from octavo.worker.model_runner import ModelRunner

PROMPT = [40, 1023, 257, 800, 12, 5, 99, 2047, 3000, 1, 17, 64, 300, 301, 302, 303, 304, 1500, 7, 8]


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve("demo")


@pytest.fixture
def runner(path: Path):
    runner = ModelRunner(config(path), lambda text: None)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def reference(path: Path):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()


def config(path: Path, **model: object) -> EngineConfig:
    fields = {"path": str(path), "name": "demo", "device": "cpu", "dtype": "float32", **model}
    return EngineConfig(
        model=ModelConfig(**fields),  # type: ignore[arg-type]
        cache=CacheConfig(block_size=16, num_blocks=64),
        scheduler=SchedulerConfig(max_num_requests=4),
    )


def new_request(slot: int, **fields: object) -> NewRequest:
    request = NewRequest(
        slot=slot,
        group_id=slot,
        row=0,
        num_rows=1,
        token_ids=np.array(PROMPT, np.int32),
        prompt_len=len(PROMPT),
        num_computed_tokens=0,
        block_ids=np.array([1 + 4 * slot, 2 + 4 * slot, 3 + 4 * slot], np.int32),
        params=GenerationParams(),
        max_total_tokens=40,
        eos_token_ids=(),
        stop_token_ids=(),
        seed=0,
    )
    return msgspec.structs.replace(request, **fields)


def step(rows: list[tuple[int, int, int, bool]], **fields: object) -> SchedulerOutput:
    """rows: (slot, num_computed, num_scheduled, samples)."""
    slots, computed, scheduled, samples = (np.array(column) for column in zip(*rows, strict=True))
    decodes = next((i for i, row in enumerate(rows) if row[2] != 1 or not row[3]), len(rows))
    columns = (column.astype(np.int32) for column in (slots, computed, scheduled))
    return SchedulerOutput(1, *columns, samples.astype(bool), decodes, **fields)  # type: ignore[arg-type]


@torch.inference_mode()
def expected_logprobs(reference, token_ids: list[int]) -> torch.Tensor:
    return reference(torch.tensor([token_ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("chunks", [[20], [7, 7, 6], [1, 18, 1]], ids=str)
def test_prompt_logprobs_in_chunks_equal_one_forward_of_transformers(runner, reference, chunks):
    expected = expected_logprobs(reference, PROMPT)
    requests = [new_request(0, prompt_logprobs=3), new_request(1)]
    values, done = [], 0
    for size in chunks:
        rows = [(1, done, size, done + size == 20), (0, done, size, done + size == 20)]
        output = runner.submit(step(rows, new_requests=requests)).result()
        values += output.prompt_logprobs
        requests, done = [], done + size
    assert [(v.row, v.num_top) for v in values] == [(1, 3)] * len(values)
    assert values[0].start == 1
    assert [v.start for v in values[1:]] == [v.start + len(v.chosen) for v in values[:-1]]
    chosen = np.concatenate([v.chosen for v in values])
    assert np.allclose(chosen, expected[torch.arange(19), PROMPT[1:]], atol=1e-5)
    ranks = np.concatenate([v.ranks for v in values])
    assert ranks.tolist() == [int((expected[i] > expected[i, PROMPT[i + 1]]).sum()) + 1 for i in range(19)]
    top = expected[:19].topk(3)
    assert np.concatenate([v.top_token_ids for v in values]).tolist() == top.indices.tolist()
    assert np.allclose(np.concatenate([v.top_values for v in values]), top.values, atol=1e-5)


def test_logprob_rows_name_rows_of_the_step(runner, reference):
    spec = LogprobSpec(1, LogprobKind.RAW_LOGPROB, [5])
    requests = [new_request(0), new_request(1), new_request(2, logprobs=spec)]
    output = runner.submit(step([(0, 0, 20, True), (1, 0, 3, False), (2, 0, 20, True)], new_requests=requests)).result()
    expected = expected_logprobs(reference, PROMPT)[-1]
    assert output.logprobs.rows.tolist() == [2]
    assert output.logprobs.chosen == pytest.approx([float(expected.max())], abs=1e-5)
    assert output.logprobs.top_token_ids.tolist() == [int(expected.argmax())]
    assert output.logprobs.requested == pytest.approx([float(expected[5])], abs=1e-5)
    assert output.token_ids.tolist() == [int(expected.argmax()), -1, int(expected.argmax())]


def test_a_row_that_ended_is_muted_in_a_step_launched_before_that_was_known(runner):
    first = runner.submit(step([(0, 0, 20, True), (1, 0, 20, True)], new_requests=[new_request(0), new_request(1)]))
    token = int(first.result().token_ids[0])
    runner.submit(step([(1, 20, 1, True)], freed_slots=[0])).result()
    again = new_request(0, eos_token_ids=(token,))
    assert runner.submit(step([(0, 0, 20, True)], new_requests=[again])).result().finish.tolist() == [FinishReason.EOS]
    late = runner.submit(step([(0, 20, 1, True), (1, 21, 1, True)])).result()
    assert late.token_ids[0] == -1
    assert late.token_ids[1] >= 0
    assert late.finish.tolist() == [0, 0]
    assert late.failed == []


def test_copied_blocks_are_read_as_the_original(runner):
    """A fork: shares the full first block, has a copy of the second, computes the last token anew."""
    whole = runner.submit(step([(0, 0, 20, True)], new_requests=[new_request(0)])).result()
    fork = new_request(1, num_computed_tokens=19, block_ids=np.array([1, 9], np.int32))
    forked = runner.submit(step([(1, 19, 1, True)], new_requests=[fork], block_copies=[(2, 9)])).result()
    assert forked.token_ids.tolist() == whole.token_ids.tolist()


def test_request_that_no_token_suits_fails_alone_and_stays_silent(runner):
    banned = GenerationParams(logit_bias=dict.fromkeys(range(4096), -float("inf")))
    requests = [new_request(0, params=banned), new_request(1)]
    output = runner.submit(step([(0, 0, 20, True), (1, 0, 20, True)], new_requests=requests)).result()
    assert output.failed == [(0, Reason.NON_FINITE_SCORES)]
    assert output.token_ids[0] == -1
    assert output.token_ids[1] >= 0
    late = runner.submit(step([(0, 20, 1, True), (1, 20, 1, True)])).result()
    assert late.failed == []
    assert late.token_ids[0] == -1
    assert late.token_ids[1] >= 0


def test_a_request_whose_values_cannot_be_computed_fails_alone_and_stays_silent(runner):
    sampled = GenerationParams(do_sample=True)
    alone = runner.submit(step([(0, 0, 20, True)], new_requests=[new_request(0, params=sampled)])).result()
    requests = [
        new_request(0, params=sampled, group_id=7),
        new_request(1, prompt_logprobs=4097),  # more than there are tokens
        new_request(2, logprobs=LogprobSpec(4097, LogprobKind.RAW_LOGPROB, [])),
        new_request(3, prompt_logprobs=1),
    ]
    rows = [(slot, 0, 20, True) for slot in range(4)]
    output = runner.submit(step(rows, freed_slots=[0], released_groups=[0], new_requests=requests)).result()
    assert output.failed == [(1, Reason.INTERNAL), (2, Reason.INTERNAL)]
    assert output.token_ids[[1, 2]].tolist() == [-1, -1]
    assert output.token_ids[0] == alone.token_ids[0]
    assert output.token_ids[3] >= 0
    assert [values.row for values in output.prompt_logprobs] == [3]
    late = runner.submit(step([(slot, 20, 1, True) for slot in range(4)])).result()
    assert (late.token_ids >= 0).tolist() == [True, False, False, True]
    assert late.failed == []


def test_error_in_a_step_is_raised_with_its_result(runner):
    bad = new_request(0, block_ids=np.array([10**6], np.int32))
    pending = runner.submit(step([(0, 0, 3, True)], new_requests=[bad]))
    with pytest.raises((IndexError, RuntimeError)):
        pending.result()
    good = runner.submit(step([(0, 0, 20, True)], new_requests=[new_request(0)])).result()
    assert good.token_ids[0] >= 0


def test_random_streams_go_with_their_group(runner):
    params = GenerationParams(do_sample=True)
    runner.submit(step([(0, 0, 20, True)], new_requests=[new_request(0, params=params)])).result()
    assert len(runner._host._noise) == 1
    runner.submit(step([(1, 0, 20, True)], freed_slots=[0], released_groups=[0], new_requests=[new_request(1)]))
    assert len(runner._host._noise) == 0


def test_info_describes_what_was_loaded(runner):
    info = runner.info
    assert (info.device, info.dtype, info.num_blocks, info.block_size) == ("cpu", "float32", 64, 16)
    assert (info.vocab_size, info.n_positions, info.max_model_len) == (4096, 1024, 1025)
    assert len(info.weights_sha256) == 64
    assert info.num_parameters > 5_000_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_an_error_not_a_slow_success(path):
    with pytest.raises(StartupError) as raised:
        ModelRunner(config(path, device="cuda"), lambda text: None)
    assert raised.value.exit_code == StartupError.DEVICE
    assert "--device cpu" in str(raised.value)


@pytest.mark.parametrize("fields", [{"dtype": "float8"}, {"dtype": "float16"}, {"device": "tpu"}], ids=str)
def test_unusable_formats_and_devices_are_named(path, fields):
    with pytest.raises(StartupError) as raised:
        ModelRunner(config(path, **fields), lambda text: None)
    assert raised.value.exit_code == StartupError.USAGE
    assert next(iter(fields.values())) in str(raised.value)


def test_the_cpu_path_refuses_to_promise_equal_bits(path):
    with pytest.raises(StartupError, match="batch-invariant") as raised:
        ModelRunner(config(path, batch_invariant=True), lambda text: None)
    assert raised.value.exit_code == StartupError.USAGE


def test_weights_that_give_nan_stop_the_start(path, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((path / name).read_bytes())
    weights = load_file(path / "model.safetensors")
    name = next(name for name in weights if name.endswith("ln_f.weight"))
    weights[name][3] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StartupError) as raised:
        ModelRunner(config(tmp_path), lambda text: None)
    assert raised.value.exit_code == StartupError.CHECKPOINT
