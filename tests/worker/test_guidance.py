"""The two branches of guidance become one row, as transformers makes it, and only guided rows change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from octavo.errors import Reason
from octavo.step import LogprobSpec
from octavo.types import GenerationParams, LogprobKind
from octavo.worker.guidance import guide
from reference.hf_pipeline import guide as reference_guide
from worker.sampling import Bench, Row, every_processed_logit, step_with

V = 97


def bench_of(rows: list[Row], branches: dict[int, Row]) -> Bench:
    """Rows in slots 0, 1, ..., then the branches of some of them."""
    bench = Bench(V, len(rows) + len(branches))
    bench.add(rows, range(len(rows)))
    requests = []
    for i, (guided, branch) in enumerate(branches.items()):
        request = branch.request(len(rows) + i)
        requests.append(replace(request, guides=guided, params=GenerationParams()))
    bench.states.apply(step_with(new_requests=requests))
    return bench


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guided_scores_are_those_of_transformers_and_other_rows_are_untouched(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, V, generator=generator) * 4).to(dtype)
    spec = every_processed_logit(V)
    rows = [
        Row(logits[0], [1, 2], 2, {"guidance_scale": 1.5}, logprobs=spec),
        Row(logits[1], [3], 1, logprobs=spec),
        Row(logits[2], [4], 1, {"guidance_scale": -0.7, "repetition_penalty": 1.3}, logprobs=spec),
        Row(logits[3], [5], 1, {"do_sample": True, "top_k": 5}, seed=3, logprobs=spec),
    ]
    bench = bench_of(rows, {0: Row(logits[4], [9], 1), 2: Row(logits[5], [8, 7], 2)})
    order = np.array([4, 0, 3, 5, 2, 1], np.int32)  # slots, in any order
    kept, guided = guide(logits[torch.from_numpy(order).long()], order, bench.states)
    assert kept.tolist() == [False, True, True, False, True, True]
    slots = order[kept]
    output = bench.sampler.sample(logits[torch.from_numpy(slots).long()], slots, guided)
    scores = torch.from_numpy(output.logprobs.requested).view(4, V)[np.argsort(slots)]
    assert torch.equal(scores[0], reference_guide(logits[0].float(), logits[4], 1.5))
    expected = reference_guide(logits[2].float(), logits[5], -0.7)
    expected[4] = expected[4] * 1.3 if expected[4] < 0 else expected[4] / 1.3
    assert torch.equal(scores[2], expected)
    assert torch.equal(scores[1], logits[1].float())
    assert torch.equal(scores[3], rows[3].expected_scores(intervals=True))
    assert output.token_ids[slots == 0] == scores[0].argmax()


def test_raw_values_are_the_models_own_and_a_bad_branch_fails_its_sequence_alone():
    logits = torch.linspace(0, 1, V).repeat(4, 1)
    logits[3, 5] = torch.nan
    spec = LogprobSpec(0, LogprobKind.RAW_LOGIT, list(range(V)))
    rows = [Row(logits[i], [1], 1, {"guidance_scale": 2.0}, logprobs=spec) for i in range(2)]
    bench = bench_of(rows, {0: Row(logits[2], [9], 1), 1: Row(logits[3], [9], 1)})
    slots = np.arange(4, dtype=np.int32)
    kept, guided = guide(logits, slots, bench.states)
    output = bench.sampler.sample(logits[:2], slots[kept], guided)
    assert [row for row, _ in output.failed] == [1]
    assert output.failed[0][1] in (Reason.NON_FINITE_LOGITS, Reason.NON_FINITE_SCORES)
    assert torch.equal(torch.from_numpy(output.logprobs.requested), logits[0])


def test_a_guided_row_keeps_its_scores_when_rows_are_tried_alone(caplog):
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(1))
    rows = [Row(logits[i], [1], 1, {"guidance_scale": 3.0}) for i in range(2)]
    rows.append(Row(logits[2], [1], 1, logprobs=LogprobSpec(V + 1, LogprobKind.RAW_LOGPROB, [])))  # raises
    bench = bench_of(rows, {1: Row(logits[3], [9], 1)})
    slots = np.arange(4, dtype=np.int32)
    kept, guided = guide(logits, slots, bench.states)
    output = bench.sampler.sample(logits[:3], slots[kept], guided)
    assert output.failed == [(2, Reason.INTERNAL)]
    expected = reference_guide(logits[1], logits[3], 3.0)
    assert output.token_ids.tolist() == [int(logits[0].argmax()), int(expected.argmax()), -1]


def test_a_branch_gets_the_tokens_of_its_sequence_and_is_forgotten_with_it():
    rows = [Row(torch.zeros(V), [1, 2], 2, {"guidance_scale": 2.0}), Row(torch.zeros(V), [3], 1)]
    bench = bench_of(rows, {0: Row(torch.zeros(V), [9], 1)})
    states = bench.states
    states.append(np.array([0, 1], np.int32), np.array([50, 60], np.int32))
    assert states.hist[2, :3].tolist() == [9, 50, 0]
    assert states.length[:3].tolist() == [3, 2, 2]
    states.apply(step_with(freed_slots=[0, 2]))
    bench.add(rows[1:], [0])
    states.append(np.array([0], np.int32), np.array([70], np.int32))
    assert states.length[2] == 0 and not states.is_negative.any()
