"""The sampler against the reference pipeline and against the processors that transformers itself builds."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from octavo.errors import Reason
from octavo.step import LogprobSpec
from octavo.types import FinishReason, LogprobKind
from reference.hf_pipeline import transformers_row
from worker.sampling import Bench, Row, every_processed_logit, random_row, sample_together, step_with


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def processed_rows(output, vocab_size: int) -> torch.Tensor:
    return torch.from_numpy(output.logprobs.requested).view(-1, vocab_size)


def disputed(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """Number of tokens that one of the two drops and the other keeps; all others must have the same value."""
    kept = (actual > -math.inf) & (expected > -math.inf)
    assert torch.equal(actual[kept], expected[kept])
    return int(((actual > -math.inf) != (expected > -math.inf)).sum())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", [97, 5000])
def test_batch_of_mixed_rows_equals_the_reference_row_by_row(vocab_size: int, bf16: bool):
    rng = random.Random(vocab_size + bf16)
    total = differing = wrong_tokens = 0
    for _ in range(8):
        rows = [random_row(rng, vocab_size, bf16=bf16) for _ in range(32)]
        output = sample_together(rows)
        assert output.failed == []
        for i, (row, actual) in enumerate(zip(rows, processed_rows(output, vocab_size), strict=True)):
            expected = row.expected_scores(intervals=True)
            total += 1
            if disputed(actual, expected):
                differing += 1
            elif output.token_ids[i] != row.expected_token(expected):
                wrong_tokens += 1
    # A sum in another order may be off by one last bit, and a bound may then move by one token.
    assert differing <= total // 200
    assert wrong_tokens == 0


@pytest.mark.parametrize("vocab_size", [97, 5000])
def test_rows_equal_the_processors_of_transformers(vocab_size: int):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=vocab_size, bos_token_id=vocab_size - 1)
    model = GPT2LMHeadModel(config).eval()
    rng = random.Random(vocab_size)
    rows = [random_row(rng, vocab_size) for _ in range(128)]
    output = sample_together(rows)
    differing = 0
    for row, actual in zip(rows, processed_rows(output, vocab_size), strict=True):
        kwargs = dict(
            row.transformers_names(), max_length=row.max_total_tokens, eos_token_id=list(row.eos + row.stop) or None
        )
        allowed = kwargs.pop("allowed_token_ids", None)
        expected = transformers_row(model, row.logits, torch.tensor(row.token_ids), row.prompt_len, kwargs, allowed)
        differing += disputed(actual, expected) > 0
    assert differing <= 1


def test_a_row_does_not_depend_on_the_rest_of_the_batch():
    rng = random.Random(5)
    rows = [random_row(rng, 5000, bf16=i % 2 == 0) for i in range(32)]
    for row in rows:
        row.logits = row.logits.float()
    together = sample_together(rows)
    processed = processed_rows(together, 5000)
    for i, row in enumerate(rows):
        alone = sample_together([row])
        assert alone.token_ids[0] == together.token_ids[i]
        assert torch.equal(processed_rows(alone, 5000)[0], processed[i])


def test_logits_are_left_as_they_were():
    rows = [random_row(random.Random(i), 97) for i in range(16)]
    bench = Bench(97, 16)
    bench.add(rows, range(16))
    logits = torch.stack([row.logits for row in rows])
    before = logits.clone()
    bench.sampler.sample(logits, np.arange(16, dtype=np.int32))
    assert torch.equal(logits, before)


def test_greedy_takes_the_first_of_equal_logits():
    logits = torch.zeros(500)
    logits[[17, 40, 499]] = 3.0
    rows = [Row(logits, [1], 1), Row(logits.bfloat16().float(), [1], 1, {"do_sample": True, "temperature": 0.0})]
    assert sample_together(rows).token_ids.tolist() == [17, 17]


@pytest.mark.parametrize("top_k", [5, 63, 64])
def test_all_tokens_tied_with_the_kth_survive(top_k: int):
    logits = torch.full((500,), -1.0)
    logits[100:300] = 2.0
    row = Row(logits, [1], 1, {"do_sample": True, "top_k": top_k}, logprobs=every_processed_logit(500))
    kept = processed_rows(sample_together([row]), 500)[0] > -math.inf
    assert kept.nonzero().flatten().tolist() == list(range(100, 300))


def test_frequency_and_presence_count_output_tokens_only():
    logits = torch.linspace(-1, 1, 97)
    params = {"frequency_penalty": 0.5, "presence_penalty": 0.25}
    spec = every_processed_logit(97)
    rows = [
        Row(logits, [3, 3, 4, 9, 9, 9, 3], 3, params, logprobs=spec),
        Row(logits, [3, 9], 2, params, logprobs=spec),
        Row(logits, [3, 3, 3], 1, {"frequency_penalty": -1.0}, logprobs=spec),
    ]
    expected = torch.stack([logits] * 3)
    expected[0, 9] -= torch.tensor(1.5)
    expected[0, 9] -= 0.25
    expected[0, 3] -= 0.5
    expected[0, 3] -= 0.25
    expected[2, 3] += 2.0
    assert torch.equal(processed_rows(sample_together(rows), 97), expected)


def test_bad_rows_fail_alone():
    good = torch.linspace(0, 1, 97)
    nan, inf = good.clone(), good.clone()
    nan[5] = math.nan
    inf[6] = math.inf
    ban_all = {"logit_bias": dict.fromkeys(range(97), -math.inf)}
    rows = [
        Row(good, [1], 1),
        Row(nan, [1], 1),
        Row(good, [1], 1, ban_all),
        Row(good, [1], 1, {"do_sample": True, "top_k": 5}, seed=3),
        Row(nan, [1], 1, {"do_sample": True, "top_k": 5}),
        Row(good, [1], 1, {"do_sample": True, "temperature": 1e-45}),
        Row(inf, [1], 1, {"do_sample": True}),
        Row(good, [1], 1, {"do_sample": True, **ban_all}),
        Row(nan, [1], 1, {"do_sample": True, "top_k": 0, "top_p": 0.9}),
        Row(inf, [1], 1),
    ]
    for row in rows:
        row.logprobs = LogprobSpec(2, LogprobKind.PROCESSED_LOGPROB, [])
    output = sample_together(rows)
    logits, scores = Reason.NON_FINITE_LOGITS, Reason.NON_FINITE_SCORES
    expected = [(1, logits), (2, scores), (4, logits), (5, scores), (6, logits), (7, scores), (8, logits)]
    assert output.failed == expected
    assert [i for i, token in enumerate(output.token_ids) if token < 0] == [i for i, _ in expected]
    assert output.token_ids[[0, 9]].tolist() == [96, 6]
    assert output.token_ids[3] == rows[3].expected_token(rows[3].expected_scores(intervals=True))
    assert output.logprobs.rows.tolist() == [0, 3, 9]


@pytest.mark.parametrize("vocab_size", [97, 5000])
@pytest.mark.parametrize("kind", list(LogprobKind))
def test_logprobs_are_those_of_log_softmax(kind: LogprobKind, vocab_size: int):
    rng = random.Random(kind)
    rows = [random_row(rng, vocab_size) for _ in range(24)]
    for i, row in enumerate(rows):
        row.logprobs = LogprobSpec(i % 4, kind, [3, 96][: i % 3]) if i % 5 else None
    output = sample_together(rows)
    asked = [i for i, row in enumerate(rows) if row.logprobs is not None]
    found = output.logprobs
    assert found.rows.tolist() == asked
    for q, i in enumerate(asked):
        row = rows[i]
        raw = kind in (LogprobKind.RAW_LOGPROB, LogprobKind.RAW_LOGIT)
        values = row.logits.float() if raw else row.expected_scores(intervals=True)
        if kind in (LogprobKind.RAW_LOGPROB, LogprobKind.PROCESSED_LOGPROB):
            values = values.log_softmax(-1)
        token = output.token_ids[i]
        assert found.chosen[q] == pytest.approx(float(values[token]), abs=1e-5)
        assert found.ranks[q] == int((values > values[token]).sum()) + 1
        top = slice(found.top_offsets[q], found.top_offsets[q + 1])
        best = values.topk(row.logprobs.num_top)
        finite = best.values > -math.inf
        assert np.allclose(found.top_values[top], best.values, atol=1e-5)
        assert found.top_token_ids[top][finite.numpy()].tolist() == best.indices[finite].tolist()
        requested = found.requested[found.requested_offsets[q] : found.requested_offsets[q + 1]]
        assert np.allclose(requested, values[row.logprobs.token_ids], atol=1e-5)


def test_append_says_why_a_sequence_ends():
    bench = Bench(97, 8)
    cases = [
        ({"eos": (5,), "stop": (6,)}, 5, FinishReason.EOS),
        ({"eos": (5,), "stop": (6,)}, 6, FinishReason.STOP_TOKEN),
        ({"eos": (5,), "stop": (6,)}, 7, FinishReason.NONE),
        ({"eos": (1, 2, 3, 5), "stop": tuple(range(4, 40))}, 39, FinishReason.STOP_TOKEN),
        ({"eos": (5,), "stop": (5,), "max_total_tokens": 3}, 5, FinishReason.EOS),
        ({"stop": (6,), "max_total_tokens": 3}, 6, FinishReason.STOP_TOKEN),
        ({"max_total_tokens": 3}, 5, FinishReason.LENGTH),
        ({"max_total_tokens": 4}, 5, FinishReason.NONE),
    ]
    bench.add([Row(torch.zeros(97), [1, 2], 2, **fields) for fields, _, _ in cases], range(8))
    finish = bench.states.append(np.arange(8, dtype=np.int32), np.array([token for _, token, _ in cases], np.int32))
    assert finish.tolist() == [reason for _, _, reason in cases]
    assert bench.states.length[:8].tolist() == [3] * 8
    assert bench.states.hist[:8, 2].tolist() == [token for _, token, _ in cases]


def test_one_minus_top_p_is_subtracted_in_double():
    bench = Bench(97, 1)
    bench.add([Row(torch.zeros(97), [1], 1, {"do_sample": True, "top_p": 0.9})], [0])
    assert bench.states.sampling.top_p_tail[0] == np.float32(1 - 0.9) != np.float32(1) - np.float32(0.9)


def test_a_slot_forgets_its_last_request():
    bench = Bench(97, 2)
    first = random_row(random.Random(1), 97)
    first.params.update(logit_bias={3: 100.0}, repetition_penalty=2.0, min_new_tokens=5)
    first.eos, first.stop = (3, 4), (9,)
    bench.add([first], [0])
    bench.states.apply(step_with(freed_slots=[0]))
    plain = Row(torch.linspace(0, 1, 97), [3], 1)
    bench.add([plain], [0])
    output = bench.sample([plain], [0])
    assert output.token_ids.tolist() == [96]
    assert output.logprobs is None
    assert bench.states.append(np.array([0], np.int32), np.array([3], np.int32)).tolist() == [0]


def test_a_row_that_raises_fails_alone_and_changes_no_other(caplog):
    """Rows 1 and 4 cannot be computed; the others get the tokens and values that they get with rows that can."""
    rng = random.Random(5)
    rows = [random_row(rng, 97) for _ in range(6)]
    for row in rows:
        row.params["do_sample"] = True
    expected = sample_together(rows)
    rows[1].logprobs = LogprobSpec(98, LogprobKind.RAW_LOGPROB, [])  # more than there are tokens
    rows[4].logprobs = LogprobSpec(0, LogprobKind.RAW_LOGPROB, [97])
    bench = Bench(97, 6)
    bench.add(rows, range(6))
    output = bench.sample(rows, range(6))
    assert output.failed == [(1, Reason.INTERNAL), (4, Reason.INTERNAL)]
    others = [0, 2, 3, 5]
    assert output.token_ids[[1, 4]].tolist() == [-1, -1]
    assert output.token_ids[others].tolist() == expected.token_ids[others].tolist()
    assert output.logprobs.rows.tolist() == others
    assert np.array_equal(output.logprobs.chosen, expected.logprobs.chosen[others])
    assert np.array_equal(output.logprobs.requested.reshape(4, 97), expected.logprobs.requested.reshape(6, 97)[others])
    assert np.array_equal(np.diff(output.logprobs.requested_offsets), [97] * 4)
    assert len(caplog.records) == 3
    assert all(record.exc_info for record in caplog.records)
