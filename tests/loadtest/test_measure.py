"""Numbers from records: against values worked out by hand, and against numpy."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from octavo.loadtest import measure
from octavo.loadtest.measure import Distribution, Record, slo_met, summarize


def record(index: int, sent: float, times: list[float], *, tokens: int = 1, **fields: Any) -> Record:
    """One that got messages with `tokens` tokens each at `times`."""
    run = [(time, tokens) for time in times]
    scheduled = fields.pop("scheduled", None)
    ended = fields.pop("ended", times[-1] if times else sent)
    values = {"code": "OK", "prompt_tokens": 10, "wanted": tokens * len(times), **fields}
    return Record(index, scheduled, sent, ended, runs=[run] if run else [], **values)


def shed(index: int, sent: float, ended: float) -> Record:
    return Record(index, None, sent, ended, "RESOURCE_EXHAUSTED", "QUEUE_FULL", "full", wanted=3)


THREE = [
    record(0, 0.0, [0.1, 0.2, 0.4]),  # TTFT 100, TPOT 150, E2EL 400 ms
    record(1, 1.0, [1.3, 1.4], cached_tokens=4),  # 300, 100, 400
    record(2, 1.2, [2.0], wanted=2),  # 800, none, 800
]


def test_metrics_of_three_requests_by_hand() -> None:
    found = summarize(THREE, {})
    assert found.duration == 2.0
    assert (found.completed, found.failed, found.unfinished, found.short_outputs) == (3, 0, 0, 1)
    assert (found.total_input_tokens, found.total_output_tokens, found.total_cached_tokens) == (30, 6, 4)
    assert (found.request_throughput, found.output_throughput, found.total_token_throughput) == (1.5, 3.0, 18.0)
    assert (found.request_goodput, found.request_goodput_scheduled) == (None, None)
    assert (found.max_concurrent_requests, found.in_flight_at_last_send) == (2, 2)
    assert found.max_output_tokens_per_s == 3.0
    means = {name: values.mean for name, values in found.metrics.items() if values}
    assert means == pytest.approx({"ttft": 400, "tpot": 125, "itl": 400 / 3, "e2el": 1600 / 3})


def test_percentiles_are_those_of_numpy_and_the_deviation_is_of_the_population() -> None:
    seconds = np.random.default_rng(0).exponential(size=101).tolist()
    found = Distribution.of(seconds)
    assert found is not None
    milliseconds = np.array(seconds) * 1e3
    assert found.named("ttft") == pytest.approx(
        {
            "mean_ttft_ms": milliseconds.mean(),
            "median_ttft_ms": np.percentile(milliseconds, 50),
            "std_ttft_ms": np.std(milliseconds),
            "p90_ttft_ms": np.percentile(milliseconds, 90),
            "p95_ttft_ms": np.percentile(milliseconds, 95),
            "p99_ttft_ms": np.percentile(milliseconds, 99),
        }
    )
    ten = Distribution.of([value / 1e3 for value in range(1, 11)])
    assert ten is not None
    assert ten.percentiles == pytest.approx((9.1, 9.55, 9.91))  # by hand: 1 + 9 * 0.9, and so on
    assert Distribution.of([]) is None


def test_goodput_counts_requests_within_every_limit() -> None:
    assert summarize(THREE, {"ttft": 301}).request_goodput == 1.0
    assert summarize(THREE, {"ttft": 301, "tpot": 120}).request_goodput == 0.5
    assert summarize(THREE, {"tpot": 120}).request_goodput == 1.0  # a request with one token has a TPOT of 0
    assert summarize(THREE, {"e2el": 100}).request_goodput == 0.0
    assert summarize(THREE, {"e2el": 800.0001}).request_goodput == 1.5


def test_a_late_send_counts_against_the_schedule_only_there() -> None:
    late = [record(0, 0.5, [0.6, 0.7], scheduled=0.1), record(1, 1.0, [1.1, 1.2], scheduled=0.995)]
    found = summarize(late, {"ttft": 200})
    assert found.late_sends == 1
    assert (found.request_goodput, found.request_goodput_scheduled) == pytest.approx((2 / 1.2, 1 / 1.2))
    means = {name: values.mean for name, values in found.metrics.items() if values}
    assert means["ttft"] == pytest.approx(100)
    assert means["ttft_scheduled"] == pytest.approx((500 + 105) / 2)
    assert means["e2el_scheduled"] == pytest.approx((600 + 205) / 2)
    assert means["send_delay"] == pytest.approx((400 + 5) / 2)
    assert not slo_met(found, {"ttft": 200})
    assert slo_met(found, {"ttft": 600})


def test_failed_requests_are_counted_by_code_and_are_in_no_latency() -> None:
    internal = Record(5, None, 0.0, 3.0, "INTERNAL", "", "broken")
    cut = Record(6, None, 0.0, 2.5)
    found = summarize([*THREE, shed(3, 1.0, 1.01), shed(4, 1.0, 1.03), internal, cut], {"e2el": 10_000})
    assert (found.completed, found.failed, found.unfinished, found.rejected) == (3, 3, 1, 2)
    assert found.failures == {"RESOURCE_EXHAUSTED/QUEUE_FULL": 2, "INTERNAL": 1}
    assert found.duration == 3.0
    assert found.request_goodput == 1.0
    assert found.metrics["e2el"] == summarize(THREE, {}).metrics["e2el"]
    rejection = found.metrics["rejection"]
    assert rejection is not None and rejection.mean == pytest.approx(20)
    assert not slo_met(found, {"e2el": 10_000})


def test_a_message_with_several_tokens_ends_one_gap() -> None:
    found = summarize([record(0, 0.0, [0.1, 0.3], tokens=4)], {})
    assert found.tokens_per_message == 4
    assert found.total_output_tokens == 8
    itl, tpot = found.metrics["itl"], found.metrics["tpot"]
    assert itl is not None and itl.mean == pytest.approx(200)
    assert tpot is not None and tpot.mean == pytest.approx(200 / 7)


def test_several_sequences_of_a_request_do_not_mix_their_gaps() -> None:
    both = Record(0, None, 0.0, 0.5, "OK", runs=[[(0.1, 1), (0.3, 1)], [(0.2, 1), (0.5, 1)]])
    assert both.gaps == pytest.approx([0.2, 0.3])
    assert (both.ttft, both.e2el, both.output_tokens) == (0.1, 0.5, 4)
    assert both.tpot == pytest.approx(0.4)


def test_without_streaming_there_is_only_the_end_to_end_latency() -> None:
    found = summarize([record(0, 0.0, [0.5], tokens=8, scheduled=0.0)], {}, streamed=False)
    assert {name for name, values in found.metrics.items() if values} == {"e2el", "e2el_scheduled", "send_delay"}


def test_nothing_at_all_gives_zeros() -> None:
    found = summarize([], {"ttft": 1})
    assert (found.duration, found.request_throughput, found.max_concurrent_requests) == (0.0, 0.0, 0)
    assert set(found.metrics.values()) == {None}
    assert not slo_met(found, {"ttft": 1})


def test_concurrency_is_of_one_instant() -> None:
    assert measure.peak_concurrency([record(0, 0, [1]), record(1, 1, [2]), record(2, 2, [3])]) == 1
    assert measure.peak_concurrency([record(0, 0, [2]), record(1, 1, [3]), record(2, 1.5, [1.6])]) == 3


def test_records_survive_json() -> None:
    for one in (*THREE, shed(3, 1.0, 2.0)):
        assert measure.from_fields(json.loads(json.dumps(measure.to_fields(one)))) == one
