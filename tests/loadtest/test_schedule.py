"""Arrivals have the distribution they are named after; the same seed is the same schedule for any processes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from octavo.loadtest.schedule import Point, arrivals, share, slots


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed_with_the_rates_mean(burstiness: float) -> None:
    """Shape k: mean 1/rate, coefficient of variation 1/sqrt(k), skewness 2/sqrt(k)."""
    gaps = np.diff(arrivals(8.0, 200_000, burstiness, seed=1), prepend=0.0)
    deviations = (gaps - gaps.mean()) / gaps.std()
    assert gaps.mean() == pytest.approx(1 / 8)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.02)
    assert (deviations**3).mean() == pytest.approx(2 * burstiness**-0.5, rel=0.06)


def test_a_poisson_process_has_equal_mean_and_variance_of_counts_and_memoryless_gaps() -> None:
    times = arrivals(10.0, 100_000, 1.0, seed=2)
    counts = np.bincount(times.astype(int), minlength=10_000)[:10_000]
    assert counts.mean() == pytest.approx(10, rel=0.02)
    assert counts.var() == pytest.approx(10, rel=0.06)
    gaps = np.diff(times)
    assert (gaps > 0.1).mean() == pytest.approx(np.exp(-1), abs=0.01)
    assert np.corrcoef(gaps[:-1], gaps[1:])[0, 1] == pytest.approx(0, abs=0.02)


def test_the_last_arrival_is_at_count_by_rate_and_extremes_are_clockwork_and_all_at_once() -> None:
    assert arrivals(5.0, 7, 1.0, seed=3)[-1] == pytest.approx(7 / 5)
    assert np.diff(arrivals(4.0, 9, float("inf"), seed=0)) == pytest.approx([0.25] * 8)
    assert arrivals(float("inf"), 3, 1.0, seed=0).tolist() == [0, 0, 0]


def test_the_seed_decides_the_arrivals() -> None:
    assert np.array_equal(arrivals(3.0, 50, 1.0, seed=4), arrivals(3.0, 50, 1.0, seed=4))
    assert not np.array_equal(arrivals(3.0, 50, 1.0, seed=4), arrivals(3.0, 50, 1.0, seed=5))


POINTS = [Point(1, rate=2.0, num_requests=37), Point(1, concurrency=5, num_requests=37)]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_request_is_sent_by_exactly_one_process(point: Point, processes: int) -> None:
    parts = [list(share(point, process, processes)) for process in range(processes)]
    assert sorted(itertools.chain(*parts)) == list(range(37))
    assert all(part == sorted(part) for part in parts)
    wanted = [slots(point, process, processes) if point.concurrency else 1 for process in range(processes)]
    for part, weight in zip(parts, wanted, strict=True):
        assert len(part) == pytest.approx(37 * weight / sum(wanted), abs=weight)


@pytest.mark.parametrize(("concurrency", "processes"), [(1, 1), (5, 2), (8, 3), (3, 3)])
def test_slots_of_all_processes_are_the_concurrency(concurrency: int, processes: int) -> None:
    point = Point(1, concurrency=concurrency)
    found = [slots(point, process, processes) for process in range(processes)]
    assert sum(found) == concurrency
    assert max(found) - min(found) <= 1


def test_the_count_follows_from_requests_duration_and_rate() -> None:
    assert Point(1, rate=4.0, num_requests=10).count() == 10
    assert Point(1, rate=4.0, duration=5.0).count() == 20
    assert Point(1, rate=4.0, duration=5.0, num_requests=10).count() == 10
    assert Point(1, rate=0.01, duration=5.0).count() == 1
    assert Point(1, concurrency=4, duration=5.0).count() is None
    endless = share(Point(1, concurrency=4, duration=5.0), 1, 2)
    assert list(itertools.islice(endless, 4)) == [1, 3, 5, 7]
