"""The choices of a beam search on hand-made scores; tests/parity/test_beams.py compares them with transformers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from octavo.types import EarlyStopping, FinishReason
from octavo.worker.beam_search import BeamParams, BeamSearch, Selection, contains_stop

V = 6
EOS = 5
PROMPT = [1, 2]
PARAMS = BeamParams(
    num_beams=2,
    num_return_sequences=2,
    prompt_len=len(PROMPT),
    max_total_tokens=len(PROMPT) + 10,
    eos_token_ids=(EOS,),
    stop_token_ids=(),
    length_penalty=1.0,
    early_stopping=EarlyStopping.FALSE,
    do_sample=False,
)


class Driver:
    """A search and the histories of its rows."""

    def __init__(self, search: BeamSearch) -> None:
        self.search = search
        self.rows = np.array([PROMPT] * search.params.num_beams, np.int32)

    def step(self, *scores: dict[int, float], out_of_time: bool = False) -> Selection:
        """`scores`: of each row, log-probabilities of some tokens; the others have -100."""
        table = torch.full((len(scores), V), -100.0)
        for row, values in enumerate(scores):
            for token, value in values.items():
                table[row, token] = value
        selected = self.search.select(self.search.accumulated(table), self.rows, out_of_time=out_of_time)
        self.rows = np.concatenate([self.rows[selected.parents], selected.token_ids[:, None]], axis=1)
        return selected


def driver(**changes: object) -> Driver:
    return Driver(BeamSearch(dataclasses.replace(PARAMS, **changes)))  # type: ignore[arg-type]


def test_at_first_all_beams_come_from_row_0():
    selected = driver().step({0: -1.0, 3: -2.0}, {1: 0.0, 2: 0.0})
    assert selected.parents.tolist() == [0, 0]
    assert selected.token_ids.tolist() == [0, 3]
    assert selected.found is None


def test_rows_follow_their_parents_by_accumulated_score():
    search = driver()
    search.step({0: -1.0, 3: -3.0}, {})
    selected = search.step({4: -5.0}, {1: -0.5, 2: -0.7})
    assert selected.parents.tolist() == [1, 1]
    assert search.rows.tolist() == [[*PROMPT, 3, 1], [*PROMPT, 3, 2]]


def test_pool_keeps_ended_candidates_by_score_over_generated_length():
    search = driver()
    search.step({EOS: -2.0, 0: -1.0, 3: -4.0}, {})
    selected = search.step({EOS: -1.0, 1: -9.0}, {4: -9.0, 2: -9.5})
    assert selected.found is not None
    assert [found.token_ids.tolist() for found in selected.found] == [[0, EOS], [EOS]]
    assert [found.score for found in selected.found] == [-1.0, -2.0]
    assert [found.finish for found in selected.found] == [FinishReason.EOS] * 2


def test_an_ended_candidate_beyond_the_first_k_does_not_enter_the_pool():
    search = driver(early_stopping=EarlyStopping.TRUE)
    search.step({0: -1.0, 3: -2.0, EOS: -3.0}, {})
    selected = search.step({EOS: -0.1}, {EOS: -0.2})
    assert selected.found is not None
    assert [found.token_ids.tolist() for found in selected.found] == [[0, EOS], [3, EOS]]


def test_length_ends_every_candidate_with_the_search():
    search = driver(max_total_tokens=len(PROMPT) + 1)
    selected = search.step({0: -1.0, 3: -2.0, EOS: -1.5}, {})
    assert selected.found is not None
    assert [(found.token_ids.tolist(), found.finish) for found in selected.found] == [
        ([0], FinishReason.LENGTH),
        ([EOS], FinishReason.EOS),
    ]


def test_time_ends_every_candidate_with_the_search():
    selected = driver().step({0: -1.0, 3: -2.0}, {}, out_of_time=True)
    assert selected.found is not None
    assert [found.finish for found in selected.found] == [FinishReason.TIME] * 2


def test_early_stopping_ends_with_a_full_pool_and_never_waits_for_what_could_be_better():
    def steps(early_stopping: EarlyStopping, length_penalty: float = 1.0) -> list[bool]:
        search = driver(early_stopping=early_stopping, length_penalty=length_penalty)
        first = search.step({EOS: -1.0, 0: -1.1, 3: -1.2}, {})
        second = search.step({EOS: -0.4, 1: -0.6}, {4: -0.7})
        return [first.found is not None, second.found is not None]

    assert steps(EarlyStopping.TRUE) == [False, True]
    assert steps(EarlyStopping.NEVER) == [False, False]
    assert steps(EarlyStopping.FALSE, length_penalty=0.0) == [False, True]


def test_places_of_the_pool_that_nothing_filled_are_empty_sequences():
    search = driver(max_total_tokens=len(PROMPT) + 1)
    table = torch.full((1, 2 * V), -math.inf)
    table[0, 3] = -1.0
    found = search.search.select(table, search.rows).found
    assert found is not None
    assert [entry.token_ids.tolist() for entry in found] == [[3], []]
    assert found[1].score == pytest.approx(-1e9)


def test_sampled_candidates_come_in_the_order_of_torch_multinomial():
    params = dataclasses.replace(PARAMS, do_sample=True)
    flat = torch.randn(1, 2 * V, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(11)
    search = BeamSearch(params, lambda step: torch.empty_like(flat).exponential_(generator=generator))
    drawn = torch.multinomial(flat.softmax(-1), 4, generator=torch.Generator().manual_seed(11))[0]
    rows = np.array([PROMPT] * 2, np.int32)
    selected = search.select(flat, rows)
    alive = [i for i in drawn.tolist() if i % V != EOS]
    best = sorted(alive, key=lambda i: -float(flat[0, i]))[:2]
    assert [p * V + t for p, t in zip(selected.parents.tolist(), selected.token_ids.tolist(), strict=True)] == best


def test_as_many_candidates_as_leave_k_beside_all_ends():
    assert PARAMS.num_candidates == 4
    assert dataclasses.replace(PARAMS, stop_token_ids=(1, 2)).num_candidates == 8
    assert dataclasses.replace(PARAMS, eos_token_ids=()).min_keep == 2


def test_length_penalty_beyond_all_floats_gives_zero_scores():
    search = driver(length_penalty=1e300, max_total_tokens=len(PROMPT) + 2)
    search.step({0: -1.0, 3: -2.0}, {})
    found = search.step({0: -1.0, 3: -2.0}, {}).found
    assert found is not None
    assert [entry.score for entry in found] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("tail", "data", "expected"),
    [
        (b"Hello wor", b"ld", True),
        (b"", b" worldwide", True),
        (b"world", b"!", False),
        (b"worl", b"", False),
        (b"wor", b"l", False),
    ],
)
def test_stop_string_counts_if_it_ends_inside_the_newest_token(tail: bytes, data: bytes, expected: bool):
    assert contains_stop(tail, data, [b"zzz", b"world"]) is expected
