"""What requests share: prefixes found in the cache, and the prompt of one group's sequences."""

from __future__ import annotations

from core.steps import Steps, request
from octavo.types import FinishReason

PROMPT = list(range(100, 111))  # 11 tokens: two full blocks of 4, and 3 tokens
SHARED = PROMPT[:8]


def ran(first: dict[str, object] | None = None, **options: object) -> Steps:
    """Request 1 with PROMPT has run and left its blocks in the cache."""
    steps = Steps(**options)  # type: ignore[arg-type]
    steps.add(request(1, PROMPT, **(first or {})))
    steps.run()
    assert steps.heard.cached == {1: 0}
    return steps


def hit(steps: Steps, prompt: list[int], **options: object) -> int:
    """cached_tokens of request 2 with this prompt."""
    steps.add(request(2, prompt, **options))
    steps.run()
    steps.scheduler.check()
    return steps.heard.cached[2]


# --- prefix cache -----------------------------------------------------------------------------------------------------


def test_full_blocks_of_an_equal_prefix_are_found_and_not_computed_again() -> None:
    steps = ran()
    steps.add(request(2, [*SHARED, 1, 2, 3]))
    assert steps.step() == {2: 3}
    assert steps.heard.cached[2] == 8
    load = steps.scheduler.load(0.0)
    assert (load.prefix_cache_queries, load.prefix_cache_hits) == (22, 8)


def test_last_token_of_a_prompt_is_always_computed() -> None:
    assert hit(ran(), SHARED) == 4


def test_generated_tokens_are_found_as_well_as_the_prompt() -> None:
    steps = ran()  # 11 prompt tokens and four times 7, of which the last was never computed
    assert hit(steps, [*PROMPT, 7, 7, 7, 7, 7]) == 12


def test_prefix_with_one_other_token_is_found_up_to_its_block_only() -> None:
    assert hit(ran(), [*PROMPT[:6], 55, PROMPT[7], 1]) == 4
    assert hit(ran(), [55, *PROMPT[1:]]) == 0


def test_equal_block_behind_another_beginning_is_not_found() -> None:
    assert hit(ran(), [1, 2, 3, 4, *PROMPT[4:8], 9]) == 0


def test_different_salts_never_share() -> None:
    assert hit(ran({"cache_salt": "a"}), PROMPT, cache_salt="b") == 0
    assert hit(ran({"cache_salt": "a"}), PROMPT) == 0
    assert hit(ran(), PROMPT, cache_salt="a") == 0
    assert hit(ran({"cache_salt": "a"}), PROMPT, cache_salt="a") == 8


def test_request_that_bypasses_the_cache_neither_reads_nor_fills_it() -> None:
    assert hit(ran(), PROMPT, bypass_prefix_cache=True) == 0
    assert hit(ran({"bypass_prefix_cache": True}), PROMPT) == 0


def test_prompt_whose_logprobs_are_wanted_is_computed_whole() -> None:
    assert hit(ran(), PROMPT, prompt_logprobs=2) == 0


def test_disabled_cache_finds_nothing() -> None:
    assert hit(ran(prefix_caching=False), PROMPT) == 0


def test_reset_forgets_all_prefixes_and_tells_how_many_blocks_became_free() -> None:
    steps = ran()
    assert steps.scheduler.load(0.0).cached_blocks == 3
    assert steps.scheduler.reset_prefix_cache() == 3
    assert hit(steps, PROMPT) == 0


def test_running_request_shares_its_computed_blocks_at_once() -> None:
    steps = Steps()
    steps.add(request(1, PROMPT, new_tokens=20))
    steps.step()
    steps.add(request(2, [*SHARED, 1]))
    assert steps.step() == {1: 1, 2: 1}
    first, second = steps.scheduler.kv.blocks_of(0), steps.scheduler.kv.blocks_of(1)
    assert first[:2] == second[:2]
    assert steps.used == len(first) + len(second) - 2


def test_blocks_are_not_shared_before_they_are_computed() -> None:
    steps = Steps()
    steps.add(request(1, PROMPT), request(2, PROMPT))
    assert steps.step() == {1: 11, 2: 11}


def test_shared_blocks_outlive_the_request_that_computed_them() -> None:
    steps = Steps()
    steps.add(request(1, PROMPT, new_tokens=20))
    steps.step()
    steps.add(request(2, [*SHARED, 1], new_tokens=2))
    steps.step()
    steps.scheduler.abort(0, [1])
    steps.run()
    assert steps.heard.finished == {2: FinishReason.LENGTH}


def test_preempted_request_finds_its_own_blocks_again() -> None:
    steps = Steps(num_blocks=4, max_model_len=16)
    steps.add(request(1, 8, new_tokens=6), request(2, 8, new_tokens=6))
    steps.step()
    assert steps.step() == {1: 1}  # 2 was preempted, and the end of its prompt gave way to 1
    steps.scheduler.abort(0, [1])
    assert steps.step() == {2: 5}
    assert steps.entered[0].num_computed_tokens == 4


# --- several sequences of one prompt ----------------------------------------------------------------------------------


def test_prompt_of_n_sequences_is_computed_once() -> None:
    steps = Steps()
    steps.add(request(1, PROMPT, num_sequences=3))
    assert [steps.step() for _ in range(2)] == [{1: 11}, {1: 1, 2: 1, 3: 1}]
    steps.run()
    assert steps.heard.tokens == {1: [7] * 4, 2: [7] * 4, 3: [7] * 4}


def test_n_sequences_share_the_full_blocks_of_their_prompt_and_copy_the_last() -> None:
    steps = Steps()
    steps.add(request(1, PROMPT, num_sequences=3, new_tokens=20))
    steps.step()
    step = steps.plan()
    assert step is not None
    tables = [steps.scheduler.kv.blocks_of(new.slot) for new in steps.entered]
    source = steps.scheduler.kv.blocks_of(0)
    assert [table[:2] for table in tables] == [source[:2]] * 2
    assert step.block_copies == [(source[2], table[2]) for table in tables]
    assert len({source[2], tables[0][2], tables[1][2]}) == 3
    assert [new.num_computed_tokens for new in steps.entered] == [10, 10]


def test_sequences_of_a_prompt_share_even_when_the_cache_is_bypassed() -> None:
    steps = Steps()
    steps.add(request(1, PROMPT, num_sequences=2, bypass_prefix_cache=True))
    assert [steps.step() for _ in range(2)] == [{1: 11}, {1: 1, 2: 1}]
    assert steps.scheduler.load(0.0).cached_blocks == 0


def test_prompt_of_one_token_forks_without_a_copy() -> None:
    steps = Steps()
    steps.add(request(1, [5], num_sequences=2))
    steps.step()
    step = steps.plan()
    assert step is not None
    assert step.block_copies == []
    assert steps.rows(step) == {1: 1, 2: 1}


def test_aborting_the_sequence_that_computes_the_prompt_leaves_the_others() -> None:
    steps = Steps(max_num_batched_tokens=8)
    steps.add(request(1, PROMPT, num_sequences=3))
    steps.step()
    steps.scheduler.abort(0, [1])
    steps.run()
    assert steps.heard.tokens == {2: [7] * 4, 3: [7] * 4}
    assert steps.used == 0


def test_aborting_a_sequence_that_waits_for_its_prompt_leaves_the_others() -> None:
    steps = Steps(max_num_batched_tokens=8)
    steps.add(request(1, PROMPT, num_sequences=3))
    steps.step()
    steps.scheduler.abort(0, [2])
    steps.run()
    assert steps.heard.tokens == {1: [7] * 4, 3: [7] * 4}
    assert steps.used == 0


def test_group_is_released_with_its_last_sequence_and_not_before() -> None:
    steps = Steps()
    steps.add(request(1, PROMPT, num_sequences=2))
    steps.step()
    group = steps.scheduler.batch.request_at(0).group.group_id
    steps.step(eos=[1])
    step = steps.plan()
    assert step is not None
    assert step.released_groups == []
    steps.finish(step, eos=[2])
    steps.add(request(5, 4))
    step = steps.plan()
    assert step is not None
    assert step.released_groups == [group]


def test_forks_enter_before_later_requests() -> None:
    steps = Steps(max_num_requests=2)
    steps.add(request(1, PROMPT, num_sequences=2, new_tokens=9))
    steps.step()
    steps.add(request(9, 4))
    assert steps.step() == {1: 1, 2: 1}
