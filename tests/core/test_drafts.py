"""Which drafts are made, compared with transformers' own rule, and what they may take of a step."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from core.steps import Steps, request
from octavo.core.drafts import MAX_DRAFT_TOKENS, Lookup
from octavo.ipc import EngineCoreRequest
from octavo.step import FurtherTokens, ModelRunnerOutput, SchedulerOutput
from octavo.types import DraftLimits, FinishReason, GenerationParams
from transformers import LogitsProcessorList, NoBadWordsLogitsProcessor, SuppressTokensLogitsProcessor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

VOCAB = 12
LOOP = [1, 2, 3] * 4


def lookup(key: int, prompt: list[int], new_tokens: int = 20, num: int = 4, **options: object) -> EngineCoreRequest:
    params = GenerationParams(prompt_lookup_num_tokens=num, **options.pop("params", {}))  # type: ignore[arg-type, call-overload]
    return request(key, prompt, new_tokens, params=params, **options)


def of_transformers(history: list[int], num: int, ngram: int, ends: list[int], banned: list[int]) -> list[int]:
    processors = LogitsProcessorList()
    if banned:
        processors.append(SuppressTokensLogitsProcessor(banned[:1]))
    if banned[1:]:
        processors.append(NoBadWordsLogitsProcessor([[token] for token in banned[1:]]))
    rule = PromptLookupCandidateGenerator(
        eos_token_id=torch.tensor(ends) if ends else None,
        num_output_tokens=num,
        max_matching_ngram_size=ngram,
        max_length=1000,
        logits_processor=processors,
        vocab_size=VOCAB,
    )
    found, _ = rule.get_candidates(torch.tensor([history]))
    return found[0, len(history) :].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_draft_is_the_candidate_of_transformers(seed: int) -> None:
    rng = random.Random(seed)
    lengths = []
    for _ in range(300):
        history = [rng.randrange(rng.choice([3, VOCAB])) for _ in range(rng.randint(1, 30))]
        num, ngram = rng.randint(1, 8), rng.randint(1, 4)
        tokens = rng.sample(range(VOCAB), 4)
        ends, banned = tokens[: rng.choice([0, 0, 1, 2])], tokens[2 : rng.choice([2, 2, 3, 4])]
        spec = request(
            1, history, eos_token_ids=ends[:1], stop_token_ids=ends[1:],
            params=GenerationParams(
                prompt_lookup_num_tokens=num, max_matching_ngram_size=ngram, suppress_tokens=banned[:1],
                bad_words_ids=[[token] for token in banned[1:]],
            ),
        )  # fmt: skip
        draft = Lookup.of(spec).draft(np.array(history, np.int32), 1000).tolist()
        assert draft == of_transformers(history, num, ngram, ends, banned), (history, num, ngram, ends, banned)
        lengths.append(len(draft))
    assert all(lengths.count(length) > 5 for length in range(6)), "vacuous"


def test_longest_ngram_is_two_by_default() -> None:
    spec = lookup(1, [5, 1, 2, 9, 3, 1, 2, 8, 0, 3, 1, 2])
    assert Lookup.of(spec).draft(np.frombuffer(spec.prompt_token_ids, np.int32), 10).tolist() == [9, 3, 1, 2]


@pytest.mark.parametrize(("size", "length"), [(1, 0), (2, 0), (3, 1), (4, 1), (6, 3), (0, 4)])
def test_draft_does_not_repeat_a_banned_ngram(size: int, length: int) -> None:
    """A draft of i tokens behind an n-gram of 2 (or, where that is banned, of 1) repeats one of 2 + i."""
    spec = lookup(1, LOOP, params={"no_repeat_ngram_size": size})
    assert len(Lookup.of(spec).draft(np.array(LOOP, np.int32), 10)) == length


class Loop(Steps):
    """The model goes on in the loop 1, 2, 3, and takes the first `right` tokens of a draft for its own."""

    right = 100

    def finish(self, step: SchedulerOutput, *args: object) -> None:
        output = ModelRunnerOutput(np.full(step.num_rows, -1, np.int32), np.zeros(step.num_rows, np.uint8))
        more: list[tuple[int, int, int]] = []
        drafts = [[]] * (step.num_rows - len(step.drafts)) + [draft.tolist() for draft in step.drafts]
        for row in np.flatnonzero(step.samples).tolist():
            length = int(step.num_computed[row] + step.num_scheduled[row]) - len(drafts[row])
            tokens = [1 + (length + i) % 3 for i in range(1 + min(len(drafts[row]), self.right))]
            if self.right < len(drafts[row]):
                tokens[-1] = 9
            total = self._max_total[int(step.slots[row])]
            ends = [FinishReason.LENGTH if length + i + 1 == total else 0 for i in range(len(tokens))]
            output.token_ids[row], output.finish[row] = tokens[0], ends[0]
            more += [(row, token, end) for token, end in zip(tokens[1:], ends[1:], strict=True)]
        if more:
            rows, tokens, ends = zip(*more, strict=True)
            output.further = FurtherTokens(
                np.array(rows, np.int32), np.array(tokens, np.int32), np.array(ends, np.uint8)
            )
        self.heard.take(self.scheduler.update(step, output, self.now))
        self.scheduler.check()


@pytest.mark.parametrize(("right", "most_steps"), [(100, 1 + 4), (1, 1 + 18), (0, 1 + 19)])
def test_right_drafts_save_steps_and_wrong_ones_do_not_cost_any(right: int, most_steps: int) -> None:
    steps = Loop()
    steps.right = right
    steps.add(lookup(1, LOOP))
    num_steps = 0
    while steps.scheduler.has_work:
        num_steps += bool(steps.step())
    assert len(steps.heard.tokens[1]) == 20
    assert steps.heard.finished[1] is FinishReason.LENGTH
    assert num_steps <= most_steps
    assert right < 100 or steps.heard.tokens[1] == [1 + i % 3 for i in range(20)]


def test_wrong_drafts_become_shorter_and_right_ones_longer() -> None:
    steps = Loop(max_model_len=200)
    steps.add(lookup(1, LOOP, new_tokens=150, num=4))
    steps.step()
    lengths = []
    for steps.right in [0] * 12 + [100] * 10:
        lengths.append(steps.step().get(1, 0) - 1)
    drafted = [length for length in lengths if length]
    assert drafted[:4] == [4, 3, 2, 1]
    assert drafted[-1] == 4 and set(drafted[4:]) >= {1, 3}


def test_row_with_a_draft_comes_last_and_samples() -> None:
    steps = Loop()
    steps.add(lookup(1, LOOP), request(2, 5))
    steps.step()
    steps.add(request(3, 7))
    plan = steps.plan()
    assert plan is not None
    assert list(steps.rows(plan).items()) == [(2, 1), (3, 7), (1, 5)]
    assert [draft.tolist() for draft in plan.drafts] == [[2, 3, 1, 2]]
    assert plan.samples.all() and plan.num_decode_rows == 1


def test_nothing_is_drafted_for_a_worker_that_cannot_check_it() -> None:
    steps = Loop()
    steps.scheduler.drafts._limits = DraftLimits(max_rows=0)
    steps.add(lookup(1, LOOP))
    steps.step()
    plan = steps.plan()
    ahead = steps.plan()
    assert steps.rows(plan) == steps.rows(ahead) == {1: 1}, "it does not run ahead"


def test_nothing_is_drafted_beyond_what_a_worker_checks_in_a_step() -> None:
    steps = Loop()
    steps.scheduler.drafts._limits = DraftLimits(max_rows=2, max_tokens_of_row=3, beside_prompts=False)
    steps.add(*(lookup(key, LOOP, num=8) for key in range(1, 4)))
    steps.step()
    assert steps.step() == {3: 1, 1: 4, 2: 4}
    steps.add(request(4, 6))
    assert steps.step() == {1: 1, 2: 1, 3: 1, 4: 6}
    assert steps.step() == {3: 1, 4: 1, 1: 4, 2: 4}


def test_sequence_waits_for_what_is_in_flight_while_others_run_ahead() -> None:
    steps = Loop()
    steps.add(lookup(1, LOOP), request(2, 5))
    steps.step()
    first, second = steps.plan(), steps.plan()
    assert steps.rows(first) == {2: 1, 1: 5}
    assert steps.rows(second) == {2: 1}


def test_draft_takes_only_what_is_left_of_the_budget() -> None:
    steps = Loop(max_num_requests=4, max_num_batched_tokens=20)
    steps.add(lookup(1, LOOP, num=8), lookup(2, [1, 2, 3, 1, 2, 3], num=8))
    steps.step()
    steps.add(request(3, 10))
    assert steps.rows(steps.plan()) == {2: 1, 3: 10, 1: 9}


def test_draft_and_its_row_are_no_longer_than_a_chunk() -> None:
    for chunk, expected in ((4, 4), (1, 1)):
        steps = Loop(max_chunk_tokens=chunk)
        steps.add(lookup(1, LOOP, num=8))
        for _ in range(-(-len(LOOP) // chunk)):
            steps.step()
        assert steps.rows(steps.plan()) == {1: expected}


def test_all_drafts_of_a_step_are_bounded() -> None:
    steps = Loop(max_num_requests=32, max_num_batched_tokens=2048, num_blocks=1000)
    steps.add(*(lookup(key, LOOP * 3, new_tokens=60, num=32) for key in range(1, 17)))
    steps.step()
    plan = steps.plan()
    assert plan is not None
    assert sum(map(len, plan.drafts)) == MAX_DRAFT_TOKENS


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4])
def test_draft_leaves_room_for_the_token_behind_it(new_tokens: int) -> None:
    steps = Loop()
    steps.add(lookup(1, LOOP, new_tokens=new_tokens, num=8))
    steps.step()
    expected = {1: new_tokens - 1} if new_tokens > 1 else {}
    assert steps.rows(steps.plan()) == expected


def test_draft_takes_no_block_that_others_may_want_and_preempts_nobody() -> None:
    # 12 prompt tokens and one more: 3 blocks are full, the 4th has room for 3 tokens of a draft
    for num_blocks, expected in ((12, 9), (11, 8), (10, 4), (9, 4), (8, 4)):
        steps = Loop(num_blocks=num_blocks, prefix_caching=False)
        steps.add(lookup(1, LOOP, num=8), request(2, 13, new_tokens=3))
        steps.step()
        assert steps.rows(steps.plan())[1] == expected, num_blocks
        assert steps.scheduler.meter.total.preemptions == 0


def test_blocks_enter_the_prefix_cache_only_when_their_tokens_are_known() -> None:
    steps = Loop()
    steps.right = 0
    steps.add(lookup(1, LOOP, num=8))
    steps.step()
    step = steps.plan()
    assert step is not None and steps.rows(step) == {1: 9}
    steps.finish(step)
    assert steps.scheduler.kv.num_indexed[step.slots[0]] == len(LOOP) // 4


def test_time_that_is_over_ends_a_sequence_with_the_first_token_of_a_step() -> None:
    steps = Loop()
    steps.add(lookup(1, LOOP, params={"max_time": 1.0}))
    steps.step()
    steps.now = 2.0
    assert steps.step() == {1: 5}
    assert steps.heard.tokens == {1: [1, 2]}
    assert steps.heard.finished == {1: FinishReason.TIME}


def test_sequence_aborted_with_a_draft_in_flight_says_no_more() -> None:
    steps = Loop()
    steps.add(lookup(1, LOOP))
    steps.step()
    step = steps.plan()
    assert step is not None
    steps.scheduler.abort(0, [1])
    steps.finish(step)
    assert steps.heard.tokens == {1: [1]}
    assert not steps.scheduler.has_work and steps.used == 0
