"""The scheduler's promises: who runs, in which order, with how much, and what becomes of the blocks."""

from __future__ import annotations

import pytest
from core.steps import Steps, request
from octavo.config import CacheConfig, SchedulerConfig
from octavo.core.scheduler import Scheduler
from octavo.errors import Reason
from octavo.step import LogprobSpec
from octavo.types import FinishReason, LogprobKind

# --- order and budget -------------------------------------------------------------------------------------------------


def test_running_requests_are_scheduled_before_waiting_ones() -> None:
    steps = Steps(max_num_batched_tokens=8)
    steps.add(request(1, 6))
    steps.step()
    steps.add(request(2, 20, priority=100))
    assert steps.step() == {1: 1, 2: 7}


def test_waiting_requests_enter_by_priority_and_then_by_arrival() -> None:
    steps = Steps(max_num_requests=1)
    steps.add(request(1, 4), request(2, 4, priority=5), request(3, 4, priority=5), request(4, 4, priority=-5))
    order = []
    while steps.scheduler.has_work:
        order += [new.seed for new in steps.plan_and_finish()]
    assert order == [2, 3, 1, 4]


def test_first_request_that_does_not_fit_keeps_later_ones_out() -> None:
    """Else a stream of small requests would starve a large one."""
    steps = Steps(num_blocks=10)
    steps.add(request(1, 20))
    steps.step()
    steps.add(request(2, 30), request(3, 4))
    assert steps.step() == {1: 1}


def test_sum_of_scheduled_tokens_never_exceeds_the_budget() -> None:
    steps = Steps(max_num_batched_tokens=10)
    steps.add(request(1, 7), request(2, 7), request(3, 7))
    assert steps.step() == {1: 7, 2: 3}
    assert steps.step() == {1: 1, 2: 4, 3: 5}


def test_no_more_requests_run_than_allowed() -> None:
    steps = Steps(max_num_requests=2)
    steps.add(*(request(key, 4) for key in range(1, 5)))
    assert list(steps.step()) == [1, 2]
    assert list(steps.step()) == [1, 2]


def test_long_prompt_is_computed_in_chunks_and_samples_with_the_last_one() -> None:
    steps = Steps(max_num_batched_tokens=8)
    steps.add(request(1, 20, new_tokens=1))
    assert [steps.step() for _ in range(3)] == [{1: 8}, {1: 8}, {1: 4}]
    assert steps.heard.tokens == {1: [7]}
    assert steps.heard.finished == {1: FinishReason.LENGTH}


def test_chunk_limit_leaves_room_for_other_prompts() -> None:
    steps = Steps(max_num_batched_tokens=16, max_chunk_tokens=5)
    steps.add(request(1, 12), request(2, 12), request(3, 12), request(4, 12))
    assert steps.step() == {1: 5, 2: 5, 3: 5, 4: 1}
    assert steps.step() == {1: 5, 2: 5, 3: 5, 4: 1}
    assert steps.step() == {1: 2, 2: 2, 3: 2, 4: 5}


def test_decoding_goes_on_while_a_long_prompt_is_computed() -> None:
    steps = Steps(max_num_batched_tokens=8)
    steps.add(request(1, 4, new_tokens=20))
    steps.step()
    steps.add(request(2, 40))
    assert [steps.step() for _ in range(3)] == [{1: 1, 2: 7}] * 3


def test_rows_that_decode_come_first() -> None:
    steps = Steps(max_num_batched_tokens=16)
    steps.add(request(1, 20))
    steps.step()
    steps.add(request(2, 4))
    steps.step()
    steps.add(request(3, 40))
    step = steps.plan()
    assert step is not None
    assert steps.rows(step) == {1: 1, 2: 1, 3: 14}
    assert step.num_decode_rows == 2


def test_budget_below_the_number_of_requests_is_refused() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        Scheduler(
            SchedulerConfig(max_num_requests=8, max_num_batched_tokens=7),
            CacheConfig(block_size=4),
            num_blocks=8,
            max_model_len=16,
        )


# --- memory pressure --------------------------------------------------------------------------------------------------


def full_pool(*priorities: int) -> Steps:
    """Requests 1, 2, ... with a prompt of two blocks each, which is all the pool has; all want one block more."""
    steps = Steps(num_blocks=2 * len(priorities), max_model_len=12, prefix_caching=False)
    steps.add(*(request(key, 8, priority=priority) for key, priority in enumerate(priorities, 1)))
    assert list(steps.step()) == sorted(range(1, len(priorities) + 1), key=lambda key: (-priorities[key - 1], key))
    return steps


def test_victim_is_the_last_to_come_among_equal_priorities() -> None:
    steps = full_pool(0, 0, 0)
    assert list(steps.step()) == [1, 2]


def test_victim_has_the_lowest_priority_even_if_it_came_first() -> None:
    steps = full_pool(0, 1, 1)
    assert list(steps.step()) == [2, 3]


def test_step_that_preempted_admits_nobody() -> None:
    steps = full_pool(0, 0)
    steps.add(request(9, 1, priority=50))
    assert list(steps.step()) == [1]
    assert steps.entered == []
    assert steps.scheduler.pool.num_free == 1  # 9 would have fitted


def test_preempted_request_comes_back_with_all_its_tokens_and_is_reported() -> None:
    steps = full_pool(0, 0)
    assert list(steps.step()) == [1]
    steps.run()
    assert steps.heard.tokens == {1: [7] * 4, 2: [7] * 4}
    assert steps.heard.preempted == {2: 1}
    assert steps.scheduler.load(0.0).preemptions == 1


def test_preempted_request_resumes_before_later_ones() -> None:
    steps = full_pool(0, 0)
    steps.step()
    steps.add(request(3, 1))
    entered = []
    while steps.scheduler.has_work:
        entered += [new.seed for new in steps.plan_and_finish()]
    assert entered == [2, 3]


def test_admission_leaves_the_watermark_free_but_a_lone_request_may_use_it() -> None:
    steps = Steps(num_blocks=10, watermark=0.3, max_model_len=40)
    steps.add(request(1, 32))
    assert steps.step() == {1: 32}
    steps.add(request(2, 4))
    assert steps.step() == {1: 1}


def test_request_that_can_never_fit_fails_at_once() -> None:
    steps = Steps(num_blocks=3, max_model_len=100)
    steps.add(request(1, 20), request(2, 4))
    steps.run()
    assert steps.heard.failed == {1: Reason.REQUEST_TOO_LARGE}
    assert list(steps.heard.finished) == [2]


# --- ends -------------------------------------------------------------------------------------------------------------


def test_aborted_request_frees_its_blocks_before_the_next_schedule() -> None:
    steps = Steps(prefix_caching=False)
    steps.add(request(1, 20))
    steps.step()
    assert steps.used == 5
    steps.scheduler.abort(0, [1])
    assert steps.used == 0
    assert not steps.scheduler.has_work


def test_request_aborted_in_flight_frees_its_blocks_when_the_step_is_done() -> None:
    steps = Steps(prefix_caching=False)
    steps.add(request(1, 20))
    step = steps.plan()
    assert step is not None
    steps.scheduler.abort(0, [1])
    assert steps.used == 5
    steps.finish(step)
    assert steps.used == 0
    assert steps.heard.tokens == {}


def test_aborted_waiting_request_never_runs() -> None:
    steps = Steps(max_num_requests=1)
    steps.add(request(1, 4), request(2, 4))
    steps.step()
    steps.scheduler.abort(0, [2])
    steps.run()
    assert list(steps.heard.tokens) == [1]


def test_abort_of_unknown_or_ended_keys_changes_nothing() -> None:
    steps = Steps()
    steps.add(request(1, 4))
    steps.step(eos=[1])
    steps.scheduler.abort(0, [1, 77])
    assert steps.heard.finished == {1: FinishReason.EOS}
    steps.scheduler.check()


def test_same_key_of_another_frontend_is_another_request() -> None:
    steps = Steps()
    steps.add(request(1, 4), frontend=0)
    steps.add(request(1, 8), frontend=1)
    steps.scheduler.abort(0, [1])
    step = steps.plan()
    assert step is not None
    assert step.num_scheduled.tolist() == [8]


def test_dead_frontend_takes_all_its_requests_along() -> None:
    steps = Steps(max_num_requests=2, prefix_caching=False)
    steps.add(request(1, 4), request(2, 4), request(3, 4), frontend=1)
    steps.step()
    steps.scheduler.abort_frontend(1)
    assert not steps.scheduler.has_work
    assert steps.used == 0


def test_failed_row_ends_its_request_alone() -> None:
    steps = Steps()
    steps.add(request(1, 4), request(2, 4))
    steps.step(failed=[1])
    assert steps.heard.failed == {1: Reason.NON_FINITE_LOGITS}
    assert steps.step() == {2: 1}


def test_failed_step_ends_the_forks_of_a_prompt_whose_first_sequence_was_aborted_meanwhile() -> None:
    steps = Steps()
    steps.add(request(1, 6, num_sequences=2))
    step = steps.plan()  # computes the prompt, from which sequence 2 may fork now
    assert step is not None
    steps.scheduler.abort(0, [1])
    steps.heard.take(steps.scheduler.fail_step(step, Reason.INTERNAL, steps.now))
    assert steps.heard.failed == {2: Reason.INTERNAL}
    assert not steps.scheduler.has_work and not steps.used


def test_blocks_of_a_failed_request_are_not_reused_as_a_prefix() -> None:
    steps = Steps()
    steps.add(request(1, 8))
    steps.step()
    steps.step(failed=[1])
    steps.add(request(2, [1000 + i for i in range(8)]))
    assert steps.step() == {2: 8}


def test_length_is_reported_as_context_where_the_default_was_cut() -> None:
    steps = Steps()
    steps.add(request(1, 4, length_is_context=True))
    steps.run()
    assert steps.heard.finished == {1: FinishReason.CONTEXT}


# --- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_client", "reason"), [(True, Reason.CLIENT_DEADLINE), (False, Reason.SERVER_MAX_DURATION)])
def test_deadline_expires_in_the_queue_without_a_step(is_client: bool, reason: Reason) -> None:
    steps = Steps(max_num_requests=1)
    steps.add(request(1, 4, new_tokens=20), request(2, 4, deadline=1.0, deadline_is_client=is_client))
    steps.step()
    steps.now = 1.5
    assert list(steps.step()) == [1]
    assert steps.heard.failed == {2: reason}
    steps.run()
    assert list(steps.heard.tokens) == [1]


def test_deadline_ends_a_running_request_and_frees_its_blocks() -> None:
    steps = Steps(prefix_caching=False)
    steps.add(request(1, 8, deadline=1.0, deadline_is_client=True))
    steps.step()
    steps.now = 1.0
    assert steps.plan() is None
    assert steps.heard.failed == {1: Reason.CLIENT_DEADLINE}
    assert steps.used == 0


def test_request_that_never_ran_times_out_in_the_queue_but_a_preempted_one_does_not() -> None:
    steps = full_pool(0, 0)
    steps.step()  # preempts 2
    steps.add(request(3, 1))
    steps.now = 31.0
    steps.step()
    assert steps.heard.failed == {3: Reason.QUEUE_TIMEOUT}
    steps.run()
    assert steps.heard.finished == {1: FinishReason.LENGTH, 2: FinishReason.LENGTH}


def test_all_sequences_of_a_prompt_time_out_in_the_queue() -> None:
    steps = Steps(max_num_requests=1)
    steps.add(request(1, 4, new_tokens=50), request(2, 4, num_sequences=3))
    steps.step()
    steps.now = 31.0
    steps.step()
    assert set(steps.heard.failed) == {2, 3, 4}


def test_max_time_ends_a_sequence_with_what_there_is_and_counts_from_its_first_step() -> None:
    steps = Steps(max_num_requests=1)
    steps.add(request(1, 4, new_tokens=2), request(2, 4, new_tokens=50, max_time=1.0))
    steps.now = 5.0
    steps.step()
    steps.step()  # 1 has ended
    steps.now = 9.0
    steps.step()  # 2 starts
    assert steps.heard.finished == {1: FinishReason.LENGTH}
    steps.now = 9.9
    steps.step()
    steps.now = 10.1
    steps.step()
    assert steps.heard.finished[2] == FinishReason.TIME
    assert steps.heard.tokens[2] == [7, 7, 7]


def test_max_time_of_zero_gives_one_token() -> None:
    steps = Steps()
    steps.add(request(1, 4, max_time=0.0))
    steps.run()
    assert steps.heard.tokens == {1: [7]}
    assert steps.heard.finished == {1: FinishReason.TIME}


# --- one step ahead ---------------------------------------------------------------------------------------------------


def test_next_step_is_scheduled_before_the_tokens_of_the_last_one_are_known() -> None:
    steps = Steps(pipeline_depth=1)
    steps.add(request(1, 6, new_tokens=3))
    first = steps.plan()
    second = steps.plan()
    assert first is not None
    assert second is not None
    assert second.num_computed.tolist() == [6]
    assert second.samples.tolist() == [True]
    steps.finish(first)
    third = steps.plan()
    assert third is not None
    steps.finish(second)
    assert steps.plan() is None  # its last token is in flight: the length is known ahead
    steps.finish(third)
    assert steps.heard.tokens == {1: [7, 7, 7]}
    assert not steps.scheduler.has_work


def test_a_request_that_needs_the_host_waits_for_its_token_and_others_do_not() -> None:
    steps = Steps(pipeline_depth=1, max_chunk_tokens=4)
    steps.add(request(1, 6, new_tokens=3, logprobs=LogprobSpec(1, LogprobKind.RAW_LOGPROB, [])), request(2, 2))
    plans = [steps.plan()]
    launched = [steps.rows(plans[0])]
    for _ in range(5):
        plans.append(steps.plan())
        launched.append(steps.rows(plans[-1]))
        if (step := plans.pop(0)) is not None:
            steps.finish(step)
    assert launched == [{1: 4, 2: 2}, {2: 1, 1: 2}, {2: 1}, {2: 1, 1: 1}, {}, {1: 1}]


def test_blocks_of_an_ended_request_stay_until_no_launched_step_contains_it() -> None:
    steps = Steps(pipeline_depth=1, prefix_caching=False)
    steps.add(request(1, 6, new_tokens=10))
    first, second = steps.plan(), steps.plan()
    assert first is not None
    assert second is not None
    steps.finish(first, eos=[1])
    assert steps.heard.finished == {1: FinishReason.EOS}
    assert steps.used == 2
    steps.finish(second)
    assert steps.used == 0
    assert steps.heard.tokens == {1: [7]}


def test_nothing_to_do_is_no_step() -> None:
    steps = Steps()
    assert steps.plan() is None
    assert not steps.scheduler.has_work


def test_load_counts_running_waiting_and_blocks() -> None:
    steps = Steps(max_num_requests=1, prefix_caching=False)
    steps.add(request(1, 8), request(2, 5))
    steps.step()
    load = steps.scheduler.load(0.0)
    assert (load.running_requests, load.waiting_requests, load.waiting_tokens) == (1, 1, 5)
    assert (load.used_blocks, load.total_blocks, load.steps) == (2, 100, 1)
    assert (load.prompt_tokens, load.generation_tokens) == (8, 1)
