"""Numbers as people and programs read them: a table, warnings, and JSON with the names of vLLM's benchmark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from octavo.loadtest.fleet import PointResult
from octavo.loadtest.measure import PERCENTILES, Distribution, Record, Summary, slo_met, summarize
from octavo.loadtest.run import label

BUSY: Final = 0.9
"""Share of its time that a client's event loop may compute before the report warns."""
LAG: Final = 0.020
"""Seconds that it may wake late at the 99th percentile."""
SUSTAINED: Final = 0.9
"""Part of the offered rate below which the report says what was in flight at the end."""
TITLES: Final = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2el": "E2EL",
    "ttft_scheduled": "TTFT from schedule",
    "e2el_scheduled": "E2EL from schedule",
    "send_delay": "late sends",
    "rejection": "rejection",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A point with its numbers."""

    result: PointResult
    summary: Summary
    slo: dict[str, float]
    """Metric -> milliseconds."""

    @property
    def name(self) -> str:
        return label(self.result.point)

    @property
    def within_slo(self) -> bool | None:
        return slo_met(self.summary, self.slo) if self.slo else None


def rows(results: Sequence[PointResult], slo: dict[str, float], *, streamed: bool) -> list[Row]:
    """With their summaries."""
    return [Row(result, summarize(result.records, slo, streamed=streamed), slo) for result in results]


def table(points: Sequence[Row]) -> str:
    """One line per point; for a single point its distributions, too."""
    lines = _aligned([_HEADER, *(_line(row) for row in points)])
    if len(points) == 1:
        lines += ["", *_aligned(_distributions(points[0].summary))]
    return "\n".join(lines)


_HEADER: Final = [
    *("load", "req/s", "out tok/s", "tok/s", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p50", "p99", "E2EL p50", "p99"),
    *("peak", "goodput", "late", "failed"),
]


def _line(row: Row) -> list[str]:
    numbers = row.summary
    cells = [row.name + ("*" if row.result.cut_short else ""), _number(numbers.request_throughput)]
    cells += [_number(numbers.output_throughput), _number(numbers.total_token_throughput)]
    for metric in ("ttft", "tpot", "itl", "e2el"):
        found = numbers.metrics[metric]
        cells += [_number(found.median), _number(found.percentiles[-1])] if found else ["-", "-"]
    late = "-" if row.result.point.rate is None else str(numbers.late_sends)
    return [*cells, str(numbers.max_concurrent_requests), _number(numbers.request_goodput), late, str(numbers.failed)]


def _distributions(summary: Summary) -> list[list[str]]:
    lines = [["ms", "mean", "median", *(f"p{p}" for p in PERCENTILES), "std"]]
    for name, found in summary.metrics.items():
        if found is not None:
            values = (found.mean, found.median, *found.percentiles, found.std)
            lines.append([TITLES[name], *(_number(value) for value in values)])
    return lines


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    ]
    return ["  ".join(line).rstrip() for line in padded]


def _number(value: float | None) -> str:
    """Three significant digits, and all before the point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def notes(points: Sequence[Row]) -> list[str]:
    """What a reader has to know besides the numbers: what failed, and what the load tester could not keep up with."""
    found: list[str] = []
    for row in points:
        found += [f"{row.name}: {text}" for text in [*_server_notes(row), *_client_notes(row)]]
    if points and points[0].slo:
        found.append(_slo_note(points))
    return found


def _server_notes(row: Row) -> list[str]:
    numbers, rate = row.summary, row.result.point.rate
    found: list[str] = []
    if row.result.cut_short:
        left = f", {row.result.not_sent} were not sent" if row.result.not_sent else ""
        found.append(f"cut short; {numbers.unfinished} requests were running{left}")
    elif rate is not None and not math.isinf(rate) and numbers.request_throughput < SUSTAINED * rate:
        found.append(
            f"{_number(numbers.request_throughput)} of {rate:g} req/s completed; "
            f"{numbers.in_flight_at_last_send} requests were in flight when the last one was sent"
        )
    if numbers.failed:
        codes = ", ".join(f"{count} {name}" for name, count in numbers.failures.items())
        message = next(record.message for record in row.result.records if record.failed)
        found.append(f"{numbers.failed} requests failed: {codes}; the first: {message}")
    if numbers.short_outputs:
        found.append(f"{numbers.short_outputs} outputs were shorter than asked for")
    if numbers.tokens_per_message > 1.05 and numbers.metrics["itl"] is not None:
        found.append(f"a message brought {numbers.tokens_per_message:.2f} tokens on average; ITL is per message")
    if numbers.total_cached_tokens:
        cached = f"{numbers.total_cached_tokens} of {numbers.total_input_tokens} input tokens"
        found.append(f"{cached} were in the prefix cache; another --seed has other prompts")
    return found


def _client_notes(row: Row) -> list[str]:
    found: list[str] = []
    delay = row.summary.metrics.get("send_delay")
    if row.summary.late_sends and delay is not None:
        found.append(
            f"{row.summary.late_sends} of {len(row.result.records)} requests were sent more than 10 ms late "
            f"(p99 {_number(delay.percentiles[-1])} ms): the client did not keep up"
        )
    busy = max((client.busy for client in row.result.clients), default=0.0)
    lag = max((client.lag_p99 for client in row.result.clients), default=0.0)
    if busy > BUSY:
        found.append(
            f"a client process computed {busy:.0%} of the time, so latencies are too high: use more --processes"
        )
    if lag > LAG:
        found.append(
            f"a client process woke {lag * 1e3:.0f} ms late at p99, and may have seen messages as much too late: "
            "its machine is short of CPU"
        )
    return found


def _slo_note(points: Sequence[Row]) -> str:
    limits = ", ".join(f"p99 {TITLES[name]} <= {limit:g} ms" for name, limit in points[0].slo.items())
    within = [row for row in points if row.within_slo]
    best = max(within, key=lambda row: row.summary.request_throughput, default=None)
    return f"highest load with {limits} and no failure: {best.name if best else 'none of these'}"


def to_json(row: Row, *, detailed: bool) -> dict[str, Any]:
    """A point with the field names of vLLM's benchmark; `detailed` adds one entry per request to some lists."""
    point, numbers = row.result.point, row.summary
    fields: dict[str, Any] = {
        "request_rate": "inf" if point.rate is not None and math.isinf(point.rate) else point.rate,
        "burstiness": point.burstiness if point.rate is not None else None,
        "max_concurrency": point.concurrency,
        "num_prompts": len(row.result.records),
        "cut_short": row.result.cut_short,
        "not_sent": row.result.not_sent,
        "slo_met": row.within_slo,
    }
    scalars = [name for name in Summary.__slots__ if name != "metrics"]
    fields |= {name: getattr(numbers, name) for name in scalars}
    for metric, found in numbers.metrics.items():
        fields |= found.named(metric) if found else dict.fromkeys(_EMPTY.named(metric))
    fields["clients"] = [
        {"busy": client.busy, "lag_p99_ms": client.lag_p99 * 1e3, "lag_max_ms": client.lag_max * 1e3}
        for client in row.result.clients
    ]
    return {**fields, **_detailed(row.result.records)} if detailed else fields


_EMPTY: Final = Distribution(0.0, 0.0, 0.0, (0.0,) * len(PERCENTILES))


def _detailed(records: Sequence[Record]) -> dict[str, list[Any]]:
    """In order of the requests' indices; times in seconds. What failed has the values that it got as far as."""
    return {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "scheduled_times": [record.scheduled for record in records],
        "start_times": [record.sent for record in records],
        "ttfts": [record.ttft for record in records],
        "itls": [record.gaps for record in records],
        "latencies": [record.e2el for record in records],
        "errors": ["" if record.ok else f"{record.code}/{record.reason}: {record.message}" for record in records],
    }
