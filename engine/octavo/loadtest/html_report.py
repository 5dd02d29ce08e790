"""The report as one page that needs nothing but itself. It is well-formed XML, so that tests can read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Final

from octavo.loadtest.charts import SERIES, Series, line_chart
from octavo.loadtest.measure import PERCENTILES, Record
from octavo.loadtest.report import TITLES, Row

CDF_POINTS: Final = 200
"""A distribution is drawn with at most this many points."""

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5f6b7a; --paper: #ffffff; --rule: #e3e7ec;
  --c0: #2a6fbb; --c1: #d4692a; --c2: #2e8b6f; --c3: #b0418a; --c4: #7a6a1f; --c5: #6b55c2;
  --c6: #1f8fa3; --c7: #b23b3b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #97a3b2; --paper: #14171b; --rule: #2c323a;
  --c0: #6aa9ee; --c1: #ee9a5f; --c2: #5cc2a2; --c3: #df80c0; --c4: #c9b65a; --c5: #a795f0;
  --c6: #5cc3d6; --c7: #ec8080; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1180px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 1.5rem; }
figure { margin: 0; } svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--dim); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
text { fill: var(--ink); font: 12px system-ui, sans-serif; } text.title { font-weight: 600; font-size: 13px; }
text.tick, text.axis { fill: var(--dim); font-size: 11px; }
text.axis { text-anchor: middle; } line.grid { stroke: var(--rule); }
line.limit { stroke: var(--dim); stroke-dasharray: 5 4; } polyline { fill: none; stroke: var(--own); stroke-width: 2; }
circle { fill: var(--own); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .2rem 0 0 3.5rem;
  font-size: .85rem; } .legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem;
  background: var(--own); }
""" + "".join(f".s{n} {{ --own: var(--c{n}); }}\n" for n in range(SERIES))

_CDFS: Final[Mapping[str, Callable[[Record], float | None]]] = {
    "ttft": lambda record: record.ttft + record.delay,
    "tpot": lambda record: record.tpot,
    "e2el": lambda record: record.e2el + record.delay,
}


def page(points: Sequence[Row], header: Mapping[str, Mapping[str, Any]], notes: Sequence[str]) -> str:
    """The page. `header`: section -> name -> value."""
    parts = [
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head><meta charset="utf-8"/>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"/><title>octavo bench</title>',
        f"<style>{escape(_STYLE, quote=False)}</style></head><body><h1>octavo bench</h1>",
        _points_table(points),
    ]
    if notes:
        parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    if len(points) > 1:
        parts.append("<h2>Latency by throughput</h2>" + _figures(_curves(points)))
    parts.append("<h2>Latency distributions</h2>" + _figures(_cdfs(points)))
    parts.append("<h2>All latencies, in ms</h2>" + _latency_table(points))
    parts += [f"<h2>{escape(title.capitalize())}</h2>{_facts(facts)}" for title, facts in header.items()]
    return "\n".join([*parts, "</body></html>\n"])


def _curves(points: Sequence[Row]) -> list[str]:
    """Latency over output throughput, in order of the load: where a server is overloaded, a curve turns back."""
    charts = []
    ordered = sorted(points, key=lambda row: row.result.point.rate or row.result.point.concurrency or 0)
    for metric in ("ttft", "tpot", "itl", "e2el"):
        found = [(row.summary.output_throughput, row.summary.metrics[metric]) for row in ordered]
        series = [
            Series("median", [(x, values.median) for x, values in found if values]),
            Series("p99", [(x, values.percentiles[-1]) for x, values in found if values]),
        ]
        limit = points[0].slo.get(metric)
        charts.append(line_chart(TITLES[metric], "output tokens per second", "ms", series, markers=True, limit=limit))
    return charts


def _cdfs(points: Sequence[Row]) -> list[str]:
    """Share of completed requests with at most this latency, counted from the schedule in an open loop."""
    charts = []
    for metric, value in _CDFS.items():
        if all(row.summary.metrics[metric] is None for row in points):
            continue
        series = [
            Series(row.name, _cdf([value(record) for record in row.result.records if record.ok])) for row in points
        ]
        charts.append(line_chart(f"{TITLES[metric]}, cumulative", "ms", "share of requests", series, markers=False))
    return charts


def _cdf(seconds: Sequence[float | None]) -> list[tuple[float, float]]:
    values = sorted(value * 1e3 for value in seconds if value is not None)
    stride = max(1, len(values) // CDF_POINTS)
    kept = sorted({*range(0, len(values), stride), len(values) - 1} if values else ())
    return [(values[place], (place + 1) / len(values)) for place in kept]


def _figures(charts: Sequence[str]) -> str:
    shown = [f"<figure>{chart}</figure>" for chart in charts if chart]
    return f'<div class="charts">{"".join(shown)}</div>' if shown else "<p>No request completed.</p>"


def _points_table(points: Sequence[Row]) -> str:
    head = ["load", "requests/s", "output tokens/s", "tokens/s", "goodput", "within SLO", "peak in flight"]
    head += ["completed", "failed", "sent late", "s"]
    lines = []
    for row in points:
        numbers, within = row.summary, row.within_slo
        cells = [row.name + (" (cut short)" if row.result.cut_short else ""), f"{numbers.request_throughput:.2f}"]
        cells += [f"{numbers.output_throughput:.1f}", f"{numbers.total_token_throughput:.1f}"]
        cells += ["-" if numbers.request_goodput is None else f"{numbers.request_goodput:.2f}"]
        cells += ["-" if within is None else "yes" if within else "no", str(numbers.max_concurrent_requests)]
        cells += [str(numbers.completed), str(numbers.failed), str(numbers.late_sends), f"{numbers.duration:.1f}"]
        lines.append(cells)
    return _table(head, lines)


def _latency_table(points: Sequence[Row]) -> str:
    lines = []
    for row in points:
        for name, found in row.summary.metrics.items():
            if found is not None:
                values = (found.mean, found.median, *found.percentiles, found.std)
                lines.append([row.name, TITLES[name], *(f"{value:.2f}" for value in values)])
    return _table(["load", "", "mean", "median", *(f"p{p}" for p in PERCENTILES), "std"], lines)


def _facts(facts: Mapping[str, Any]) -> str:
    return _table(["", ""], [[str(name), str(value)] for name, value in facts.items()])


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values) + "</tr>"

    heading = f"<thead>{cells('th', head)}</thead>" if any(head) else ""
    body = "".join(cells("td", line) for line in lines)
    return f'<div class="scroll"><table>{heading}<tbody>{body}</tbody></table></div>'
