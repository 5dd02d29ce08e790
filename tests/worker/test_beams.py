"""Beam searches in a runner: one that cannot go on fails alone, and goes with its group."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from octavo.checkpoint import resolve
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.errors import Reason
from octavo.step import NewRequest, SchedulerOutput
from octavo.types import FinishReason, GenerationParams
from octavo.worker import beams
from octavo.worker.logits import process_logits
from octavo.worker.model_runner import ModelRunner

PROMPT = np.array([40, 1023, 257, 800], np.int32)
SEARCH = GenerationParams(num_beams=2, num_return_sequences=2)


@pytest.fixture
def runner():
    config = EngineConfig(
        model=ModelConfig(path=str(resolve("demo")), name="demo", device="cpu", dtype="float32"),
        cache=CacheConfig(block_size=16, num_blocks=64),
        scheduler=SchedulerConfig(max_num_requests=6),
    )
    runner = ModelRunner(config, lambda text: None)
    yield runner
    runner.close()


def rows_of(group: int, params: GenerationParams, num_rows: int = 2, **fields: object) -> list[NewRequest]:
    """A prompt's rows, in the slots from 2 * group on, each with a block of its own."""
    first = NewRequest(
        slot=2 * group,
        group_id=group,
        row=0,
        num_rows=num_rows,
        token_ids=PROMPT,
        prompt_len=len(PROMPT),
        num_computed_tokens=0,
        block_ids=np.array([1 + 2 * group], np.int32),
        params=params,
        max_total_tokens=20,
        eos_token_ids=(),
        stop_token_ids=(),
        seed=0,
    )
    first = msgspec.structs.replace(first, **fields)  # type: ignore[arg-type]
    return [
        msgspec.structs.replace(
            first, slot=2 * group + row, row=row, block_ids=np.array([1 + 2 * group + row], np.int32)
        )
        for row in range(num_rows)
    ]


def step(slots: list[int], computed: int, scheduled: int, **fields: object) -> SchedulerOutput:
    """All rows sample."""
    size = len(slots)
    return SchedulerOutput(
        1,
        np.array(slots, np.int32),
        np.full(size, computed, np.int32),
        np.full(size, scheduled, np.int32),
        np.ones(size, np.bool_),
        size if scheduled == 1 else 0,
        **fields,  # type: ignore[arg-type]
    )


def test_a_search_without_a_choice_fails_alone_and_stays_silent(runner):
    banned = GenerationParams(num_beams=2, logit_bias=dict.fromkeys(range(4096), -float("inf")))
    requests = [*rows_of(0, banned), *rows_of(1, SEARCH), *rows_of(2, GenerationParams(), num_rows=1)]
    output = runner.submit(step([0, 1, 2, 3, 4], 0, 4, new_requests=requests)).result()
    assert output.failed == [(0, Reason.NON_FINITE_SCORES), (1, Reason.NON_FINITE_SCORES)]
    assert [choice.slot for choice in output.beams] == [2]
    assert output.token_ids[:4].tolist() == [-1] * 4
    assert output.token_ids[4] >= 0
    late = runner.submit(step([0, 1, 2, 3, 4], 4, 1)).result()
    assert late.failed == []
    assert [choice.slot for choice in late.beams] == [2]


def test_a_search_whose_choice_raises_fails_alone(runner):
    requests = [*rows_of(0, SEARCH), *rows_of(1, SEARCH)]
    runner.submit(step([0, 1, 2, 3], 0, 4, new_requests=requests)).result()
    runner._host._beams._searches[0].select = None  # type: ignore[method-assign]
    output = runner.submit(step([0, 1, 2, 3], 4, 1)).result()
    assert output.failed == [(0, Reason.INTERNAL), (1, Reason.INTERNAL)]
    assert [choice.slot for choice in output.beams] == [2]


def test_a_search_whose_scores_raise_fails_alone_though_others_are_scored_with_it(runner, monkeypatch):
    def process_all_but_the_first(scores, slots, *rest):
        assert 0 not in slots
        process_logits(scores, slots, *rest)

    monkeypatch.setattr(beams, "process_logits", process_all_but_the_first)
    penalised = GenerationParams(num_beams=2, repetition_penalty=1.3)
    requests = [*rows_of(0, penalised), *rows_of(1, penalised), *rows_of(2, SEARCH)]
    output = runner.submit(step([0, 1, 2, 3, 4, 5], 0, 4, new_requests=requests)).result()
    assert output.failed == [(0, Reason.INTERNAL), (1, Reason.INTERNAL)]
    assert [choice.slot for choice in output.beams] == [2, 4]


def test_searches_scored_together_choose_what_they_choose_alone(runner):
    kinds = [SEARCH, GenerationParams(num_beams=2, repetition_penalty=1.3)]
    together = [*rows_of(0, kinds[0]), *rows_of(1, kinds[1]), *rows_of(2, kinds[0])]
    output = runner.submit(step([0, 1, 2, 3, 4, 5], 0, 4, new_requests=together)).result()
    for group, choice in enumerate(output.beams):
        group_alone = rows_of(group, kinds[group % 2], group_id=group + 10)
        slots = [2 * group, 2 * group + 1]
        new = {"new_requests": group_alone, "freed_slots": slots, "released_groups": [group]}
        [alone] = runner.submit(step(slots, 0, 4, **new)).result().beams
        assert alone.parents.tolist() == choice.parents.tolist()
        assert alone.token_ids.tolist() == choice.token_ids.tolist()


def test_a_search_with_invalid_logits_fails_alone(runner, monkeypatch):
    logits_of = runner._model.logits

    def spoilt(hidden):
        logits = logits_of(hidden)
        logits[2, 7] = float("nan")
        return logits

    monkeypatch.setattr(runner._model, "logits", spoilt)
    requests = [*rows_of(0, SEARCH), *rows_of(1, SEARCH)]
    output = runner.submit(step([0, 1, 2, 3], 0, 4, new_requests=requests)).result()
    assert output.failed == [(2, Reason.NON_FINITE_LOGITS), (3, Reason.NON_FINITE_LOGITS)]
    assert [choice.slot for choice in output.beams] == [0]


def test_the_order_of_the_rows_in_a_step_does_not_matter(runner):
    requests = [*rows_of(0, SEARCH), *rows_of(1, SEARCH)]
    output = runner.submit(step([3, 0, 2, 1], 0, 4, new_requests=requests)).result()
    one, two = output.beams
    assert (one.slot, two.slot) == (0, 2)
    assert one.token_ids.tolist() == two.token_ids.tolist()


def test_scores_outlive_a_preemption_and_go_with_the_group(runner):
    first = runner.submit(step([0, 1], 0, 4, new_requests=rows_of(0, SEARCH))).result().beams[0]
    own_block = {
        "block_slots": np.array([1], np.int32),
        "block_columns": np.array([0], np.int32),
        "block_ids": np.array([2], np.int32),
        "block_copies": [(1, 2)],
    }
    whole = runner.submit(step([0, 1], 4, 1, **own_block)).result().beams[0]
    again = [
        msgspec.structs.replace(row, group_id=1, slot=row.slot, token_ids=np.append(PROMPT, token).astype(np.int32))
        for row, token in zip(rows_of(0, SEARCH), first.token_ids.tolist(), strict=True)
    ]
    runner.submit(step([2, 3], 0, 4, new_requests=rows_of(1, SEARCH), freed_slots=[0, 1], released_groups=[0])).result()
    assert len(runner._host._beams) == 1
    back = runner.submit(step([0, 1], 0, 5, new_requests=again, freed_slots=[2, 3])).result().beams[0]
    assert (back.parents.tolist(), back.token_ids.tolist()) == (whole.parents.tolist(), whole.token_ids.tolist())


def test_expired_groups_end_with_their_step(runner):
    requests = [*rows_of(0, SEARCH), *rows_of(1, SEARCH)]
    output = runner.submit(step([0, 1, 2, 3], 0, 4, new_requests=requests, expired_groups=[1])).result()
    assert output.beams[0].found is None
    assert output.beams[1].found is not None
    assert [found.finish for found in output.beams[1].found] == [FinishReason.TIME] * 2
