"""Guided sequences in the scheduler: two rows that enter, sample, make way and end together."""

from __future__ import annotations

import random

import numpy as np
import pytest
from core.steps import Steps, request
from octavo.errors import Reason
from octavo.ipc import EngineCoreRequest
from octavo.types import FinishReason


def guided(key: int, prompt: int, negative: int, new_tokens: int = 4, **options: object) -> EngineCoreRequest:
    tokens = np.arange(500 * key, 500 * key + negative, dtype=np.int32)
    return request(key, prompt, new_tokens, negative_prompt_token_ids=tokens.tobytes(), **options)


def test_both_rows_sample_in_the_same_steps_whatever_their_lengths() -> None:
    steps = Steps(max_num_batched_tokens=8)
    steps.add(guided(1, 3, 11, new_tokens=3))
    assert [steps.step() for _ in range(4)] == [{1: 2, -1: 6}, {-1: 4}, {1: 1, -1: 1}, {1: 1, -1: 1}]
    assert steps.step() == {1: 1, -1: 1}
    assert steps.heard.tokens == {1: [7, 7, 7]}
    assert steps.heard.finished == {1: FinishReason.LENGTH}
    assert steps.heard.cached == {1: 0}
    assert steps.used == 0 and not steps.scheduler.has_work


def test_the_second_row_is_told_as_the_branch_of_the_first_with_its_own_tokens() -> None:
    steps = Steps()
    steps.add(guided(1, 6, 2))
    steps.plan()
    own, branch = steps.entered
    assert (own.guides, branch.guides) == (-1, own.slot)
    assert own.token_ids.tolist() == list(range(1000, 1006))
    assert (branch.token_ids.tolist(), branch.prompt_len, branch.max_total_tokens) == ([500, 501], 2, 6)
    assert not branch.params.do_sample and branch.logprobs is None
    assert len(branch.block_ids) == 1, "room for its prompt from the beginning"


def test_sequences_of_one_prompt_have_two_rows_each_and_their_own_random_row() -> None:
    steps = Steps()
    steps.add(guided(1, 4, 2, num_sequences=3))
    steps.plan()
    assert [(new.row, new.num_rows, new.guides < 0) for new in steps.entered] == [
        (row, 3, own) for row in range(3) for own in (True, False)
    ]


def test_it_waits_until_two_slots_are_free() -> None:
    steps = Steps(max_num_requests=3)
    steps.add(request(1, 4, new_tokens=2), request(2, 4, new_tokens=8), guided(3, 4, 2))
    assert steps.step() == {1: 4, 2: 4}
    assert steps.step() == {1: 1, 2: 1}
    assert set(steps.step()) == {2, 3, -3}


@pytest.mark.parametrize(("num_blocks", "max_num_requests"), [(3, 8), (100, 1)])
def test_what_could_never_fit_is_refused(num_blocks: int, max_num_requests: int) -> None:
    steps = Steps(num_blocks=num_blocks, max_num_requests=max_num_requests)
    steps.add(guided(1, 4, 4, new_tokens=5))
    steps.plan()
    assert steps.heard.failed == {1: Reason.REQUEST_TOO_LARGE}
    assert not steps.scheduler.has_work


def test_a_preempted_one_comes_back_with_the_tokens_of_both_rows() -> None:
    steps = Steps(num_blocks=6, prefix_caching=False)
    steps.add(request(1, 4, new_tokens=12), guided(2, 4, 5, new_tokens=6))
    entered = []
    while steps.scheduler.has_work:
        entered += steps.plan_and_finish()
    assert steps.heard.tokens == {1: [7] * 12, 2: [7] * 6}
    assert steps.heard.preempted[2] >= 1
    again, branch = entered[-2:]
    output = len(again.token_ids) - 4
    assert output > 0
    assert again.token_ids.tolist() == [2000, 2001, 2002, 2003] + [7] * output
    assert branch.token_ids.tolist() == [1000, 1001, 1002, 1003, 1004] + [7] * output


def test_it_fails_and_is_aborted_as_a_whole() -> None:
    steps = Steps()
    steps.add(guided(1, 4, 2), guided(2, 4, 2))
    steps.step()
    steps.step(failed=[1])
    assert steps.heard.failed == {1: Reason.NON_FINITE_LOGITS}
    assert set(steps.step()) == {2, -2}
    steps.scheduler.abort(0, [2])
    assert steps.used == 0 and not steps.scheduler.has_work


def test_its_time_ends_it() -> None:
    steps = Steps()
    steps.add(guided(1, 4, 2, new_tokens=50, max_time=5.0))
    steps.step()
    steps.step()
    steps.now = 6.0
    steps.step()
    assert steps.heard.finished == {1: FinishReason.TIME}


@pytest.mark.parametrize("seed", range(6))
def test_random_mixes_end_with_all_tokens_and_no_blocks(seed: int) -> None:
    rng = random.Random(seed)
    steps = Steps(num_blocks=24, max_num_requests=6, max_num_batched_tokens=12, max_chunk_tokens=rng.choice([0, 3]))
    wanted, aborted = {}, []
    for key in range(1, 40):
        count = rng.randint(1, 8)
        options = {"priority": rng.randint(0, 2), "num_sequences": rng.choice([1, 1, 2])}
        if rng.random() < 0.6:
            steps.add(guided(2 * key, rng.randint(1, 20), rng.randint(1, 20), count, **options))
        else:
            steps.add(request(2 * key, rng.randint(1, 20), count, **options))
        wanted.update({2 * key + row: count for row in range(options["num_sequences"])})
        if rng.random() < 0.1:
            aborted.append(2 * key)
            steps.scheduler.abort(0, [2 * key])
        for _ in range(rng.randint(0, 3)):
            steps.step()
    steps.run(limit=2000)
    for key, count in wanted.items():
        if key not in aborted:
            assert steps.heard.tokens[key] == [7] * count, key
    assert steps.used == 0
