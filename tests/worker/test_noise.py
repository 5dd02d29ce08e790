"""The random numbers against torch.multinomial with a seeded generator, as generate() calls it."""

from __future__ import annotations

import pytest
import torch
from octavo.worker.noise import Noise

V = 301


def expected_draws(seed: int, num_rows: int, steps: int, probs: torch.Tensor) -> list[list[int]]:
    """[steps][n] tokens of torch.manual_seed(seed) and one multinomial a step."""
    generator = torch.Generator().manual_seed(seed)
    rows = probs.expand(num_rows, -1)
    return [torch.multinomial(rows, 1, generator=generator)[:, 0].tolist() for _ in range(steps)]


@pytest.fixture
def probs() -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(0)).softmax(-1)


def draw(noise: Noise, group: int, row: int, step: int, probs: torch.Tensor) -> int:
    return int((probs / noise.exponentials(group, row, step)).argmax())


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("seed", [0, 1234, 2**32, 2**63 + 5, 2**64 - 1])
def test_draws_equal_multinomial(num_rows: int, seed: int, probs):
    noise = Noise(V, torch.device("cpu"))
    noise.open(7, seed, num_rows)
    actual = [[draw(noise, 7, row, step, probs) for row in range(num_rows)] for step in range(12)]
    assert actual == expected_draws(seed, num_rows, 12, probs)


def test_negative_seeds_are_twos_complement(probs):
    assert expected_draws(-3, 1, 4, probs) == expected_draws(2**64 - 3, 1, 4, probs)


def test_exponentials_equal_torchs(probs):
    for raw_words in (True, False):
        noise = Noise(V, torch.device("cpu"))
        noise._raw_words = raw_words and noise._raw_words
        noise.open(1, 42, 2)
        generator = torch.Generator().manual_seed(42)
        for step in range(3):
            fill = torch.empty(2, V).exponential_(generator=generator)
            ids = torch.tensor([300, 0, 5])
            assert torch.equal(noise.exponentials(1, 0, step), fill[0])
            assert torch.equal(noise.exponentials(1, 1, step, ids), fill[1, ids])


def test_rows_out_of_step_draw_what_they_would_have_drawn(probs):
    expected = expected_draws(9, 3, 12, probs)
    noise = Noise(V, torch.device("cpu"))
    noise.open(1, 9, 3)
    actual = [[-1] * 3 for _ in range(12)]
    # Row 2 is preempted at step 4, row 1 ends after step 8; row 2 catches up while row 0 goes on.
    order = [(step, row) for step in range(4) for row in range(3)]
    order += [(step, row) for step in range(4, 8) for row in range(2)]
    order += [
        (4, 2),
        (8, 1),
        (8, 0),
        (5, 2),
        (9, 0),
        (6, 2),
        (7, 2),
        (8, 2),
        (10, 0),
        (9, 2),
        (10, 2),
        (11, 2),
        (11, 0),
    ]
    for step, row in order:
        actual[step][row] = draw(noise, 1, row, step, probs)
    for step in range(12):
        for row in range(3):
            assert actual[step][row] in (expected[step][row], -1)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_row_may_ask_again_for_its_last_step_and_changes_nothing_by_it(num_rows: int, probs):
    noise = Noise(V, torch.device("cpu"))
    noise.open(1, 9, num_rows)
    actual = []
    for step in range(6):
        for _ in range(1 + step % 3):
            tokens = [draw(noise, 1, row, step, probs) for row in range(num_rows)]
        actual.append(tokens)
    assert actual == expected_draws(9, num_rows, 6, probs)
    with pytest.raises(AssertionError):
        noise.exponentials(1, 0, 4)


def test_states_are_kept_from_the_slowest_living_row_on_only(probs):
    noise = Noise(V, torch.device("cpu"))
    noise.open(1, 9, 2)
    stream = noise._streams[1]
    for step in range(20):
        noise.exponentials(1, 0, step)
    assert len(stream.states) == 20
    for step in range(10):
        noise.exponentials(1, 1, step)
    assert len(stream.states) == 11
    noise.row_ended(1, 1)
    noise.exponentials(1, 0, 20)
    assert len(stream.states) == 1
    noise.close(1)
    assert len(noise) == 0


def test_a_group_lives_through_a_preemption(probs):
    expected = expected_draws(5, 1, 6, probs)
    noise = Noise(V, torch.device("cpu"))
    noise.open(3, 5, 1)
    actual = [[draw(noise, 3, 0, step, probs)] for step in range(3)]
    noise.open(3, 5, 1)
    actual += [[draw(noise, 3, 0, step, probs)] for step in range(3, 6)]
    assert actual == expected


def test_a_group_may_begin_at_a_later_step(probs):
    noise = Noise(V, torch.device("cpu"))
    noise.open(3, 5, 2)
    assert draw(noise, 3, 1, 4, probs) == expected_draws(5, 2, 5, probs)[4][1]
    assert draw(noise, 3, 0, 2, probs) == expected_draws(5, 2, 5, probs)[2][0]
