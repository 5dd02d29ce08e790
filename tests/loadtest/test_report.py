"""Table, notes, JSON and page of made-up results."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from octavo.loadtest import html_report, report
from octavo.loadtest.fleet import ClientReport, PointResult
from octavo.loadtest.measure import Record
from octavo.loadtest.schedule import Point

IDLE = ClientReport(busy=0.2, lag_p99=0.001, lag_max=0.01)
SLO = {"ttft": 200.0, "e2el": 5000.0}
VLLM_FIELDS = {
    *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"),
    *("request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s"),
    *("max_concurrent_requests", "request_rate", "burstiness", "max_concurrency", "num_prompts"),
    *(
        f"{statistic}_{metric}_ms"
        for statistic in ("mean", "median", "std", "p90", "p95", "p99")
        for metric in ("ttft", "tpot", "itl", "e2el")
    ),
}
"""Those of vllm/benchmarks/serve.py."""
DETAILED = {"input_lens", "output_lens", "start_times", "ttfts", "itls", "latencies", "errors"}


def result(number: int, rate: float | None = 4.0, **changes: Any) -> PointResult:
    """Eight requests, a quarter second apart, each with four tokens."""
    records = []
    for index in range(8):
        sent = index / 4 + 0.001
        run = [(sent + 0.1 * number + step / 20, 1) for step in range(4)]
        scheduled = None if rate is None else sent - 0.001
        records.append(Record(index, scheduled, sent, run[-1][0], "OK", "", "", 4, 6, 0, [run]))
    point = Point(number, rate, concurrency=None if rate else 3, num_requests=8)
    return PointResult(**{"point": point, "records": records, "clients": [IDLE], **changes})


def rows(*results: PointResult) -> list[report.Row]:
    return report.rows(results, SLO, streamed=True)


def test_json_has_the_field_names_of_vllms_benchmark() -> None:
    (row,) = rows(result(1))
    fields = report.to_json(row, detailed=False)
    assert set(fields) >= VLLM_FIELDS
    assert not DETAILED & set(fields)
    assert fields["mean_ttft_ms"] == pytest.approx(100)
    assert fields["p99_tpot_ms"] == pytest.approx(50)
    assert fields["slo_met"] is True
    detailed = report.to_json(row, detailed=True)
    assert set(detailed) >= VLLM_FIELDS | DETAILED
    assert {len(detailed[name]) for name in DETAILED} == {8}


def test_json_keeps_the_names_of_metrics_without_values() -> None:
    fields = report.to_json(rows(result(1, records=[]))[0], detailed=False)
    assert set(fields) >= VLLM_FIELDS
    assert fields["p99_ttft_ms"] is None
    assert report.to_json(rows(result(1, float("inf")))[0], detailed=False)["request_rate"] == "inf"


def test_the_table_has_a_line_per_point_and_one_point_has_its_distributions() -> None:
    lines = report.table(rows(result(1, 4.0), result(2, None))).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["load", "4 req/s", "3 in flight"]
    assert len(lines[0].split()) > 10
    alone = report.table(rows(result(1, 4.0)))
    assert "TTFT from schedule" in alone
    assert [line.split()[0] for line in alone.splitlines()[3:7]] == ["ms", "TTFT", "TPOT", "ITL"]


def test_notes_tell_what_neither_side_kept_up_with() -> None:
    failed = Record(8, 2.0, 2.0, 2.1, "RESOURCE_EXHAUSTED", "QUEUE_FULL", "the queue is full")
    late = Record(9, 0.0, 3.0, 3.5, "OK", wanted=4, runs=[[(3.5, 2)]], cached_tokens=1)
    busy = [ClientReport(0.95, 0.05, 0.1)]
    good = result(1)
    bad = result(2, 8.0, records=[*result(2).records, failed, late], clients=busy)
    text = "\n".join(report.notes(rows(good, bad)))
    assert "4 req/s: " not in text
    assert "8 req/s: 2.57 of 8 req/s completed; 1 requests were in flight" in text
    assert "1 requests failed: 1 RESOURCE_EXHAUSTED/QUEUE_FULL; the first: the queue is full" in text
    assert "1 outputs were shorter" in text
    assert "1 of 10 requests were sent more than 10 ms late (p99 2730 ms): the client did not keep up" in text
    assert "computed 95% of the time" in text
    assert "woke 50 ms late at p99" in text
    assert "prefix cache" in text
    assert "highest load with p99 TTFT <= 200 ms, p99 E2EL <= 5000 ms and no failure: 4 req/s" in text


def test_what_was_cut_short_says_so_everywhere() -> None:
    running = Record(8, 2.0, 2.0, 2.1)
    cut = rows(result(1, records=[*result(1).records[:2], running], cut_short=True))
    assert "4 req/s*" in report.table(cut)
    assert "4 req/s: cut short; 1 requests were running, 5 were not sent" in report.notes(cut)
    assert report.to_json(cut[0], detailed=False)["cut_short"] is True
    assert "4 req/s (cut short)" in html_report.page(cut, {}, [])


def tags(page: str, name: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    return [element for element in root.iter() if element.tag.split("}")[-1] == name]


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    page = html_report.page(
        rows(result(1), result(2, 8.0)), {"server": {"model": "<a> & 'b'"}}, ["a note with <b> & more"]
    )
    assert "<a>" not in page and "<b>" not in page
    assert len(tags(page, "svg")) == 4 + 3  # curves of four metrics, distributions of three
    assert len(tags(page, "table")) == 3
    for name in ("script", "link", "img", "iframe", "image"):
        assert tags(page, name) == []
    assert "url(" not in page and "@import" not in page and "src=" not in page and "href=" not in page
    curve = tags(page, "svg")[0]
    lines = [element for element in curve if element.tag.endswith("polyline")]
    assert len(lines) == 2
    assert all(len(line.attrib["points"].split()) == 2 for line in lines)
    assert len([element for element in curve if element.get("class") == "limit"]) == 1


def test_a_page_of_one_point_or_none_completed_has_no_curves() -> None:
    assert len(tags(html_report.page(rows(result(1)), {}, []), "svg")) == 3
    assert tags(html_report.page(rows(result(1, records=[])), {}, []), "svg") == []


def test_points_of_a_chart_lie_inside_it_on_a_logarithmic_axis_too() -> None:
    from octavo.loadtest.charts import HEIGHT, WIDTH, Series, line_chart

    for values in ([(1.0, 1.0), (2.0, 3.0)], [(1.0, 0.5), (50.0, 9000.0)], [(0.0, 0.0)], [(3.0, 7.0)]):
        chart = line_chart("t", "x", "y", [Series("one", values)], markers=True)
        (line,) = tags(f"<div>{chart}</div>", "polyline")
        for pair in line.attrib["points"].split():
            x, y = (float(part) for part in pair.split(","))
            assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT
        assert len([tick for tick in tags(f"<div>{chart}</div>", "text") if tick.get("class") == "tick"]) >= 4
