"""Writes the tables of README.md and bench/results/README.md from the newest run of each bench/results/*.jsonl.

    python bench/tables.py             rewrites what stands between <!-- table:NAME --> and <!-- end -->
    python bench/tables.py --check     changes nothing; exit status 1 if something would change

NAME is one of TABLES. A number without a record has no table: a marker whose file of records is missing is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = [ROOT / "README.md", RESULTS / "README.md"]
SECTION = re.compile(r"(<!-- table:([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
CPU_ROWS = [
    ("octavo", "octavo-stream"),
    ("vllm", "vllm-stream"),
    ("vllm-fp32", ""),
    ("transformers", ""),
    ("octavo-int8", "octavo-int8-stream"),
    ("ctranslate2-int8", ""),
]
"""In process, and over gRPC."""
CPU_RATIOS = [
    ("octavo", "vllm"),
    ("octavo", "vllm-fp32"),
    ("octavo", "transformers"),
    ("octavo-stream", "vllm-stream"),
    ("octavo-int8", "ctranslate2-int8"),
    ("octavo-stream", "octavo"),
    ("octavo-int8-stream", "octavo-int8"),
]
SHORT_TYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16", "int8": "int8"}
SYSTEMS = {"octavo": "octavo", "vllm": "vLLM", "transformers": "transformers", "ctranslate2": "CTranslate2"}
Record = dict[str, Any]


@dataclass
class Run:
    """The newest run of a file: its header and the records that follow."""

    header: Record
    lines: list[Record]

    def of(self, kind: str) -> list[Record]:
        return [line for line in self.lines if line["record"] == kind]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say what would change")
    options = parser.parse_args()
    changed = [path for path in DOCUMENTS if path.read_text() != rewritten(path.read_text(), RESULTS)]
    for path in changed:
        name = path.relative_to(ROOT)
        if options.check:
            print(f"{name} is not what its records say; run: python bench/tables.py")
        else:
            path.write_text(rewritten(path.read_text(), RESULTS))
            print(f"rewrote {name}")
    return 1 if changed and options.check else 0


def rewritten(text: str, results: Path) -> str:
    """The document with its sections made anew from the records in `results`."""

    def section(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]](results)}\n{match[3]}"

    return SECTION.sub(section, text)


def newest(path: Path, kind: str | None = None) -> Run:
    """The last "run" line and what follows it; or the last line, where a line is a run with its results. kind: the last
    run that has such records."""
    lines: list[Record] = [json.loads(line) for line in path.read_text().splitlines()]
    if kind is not None:
        last = max(i for i, line in enumerate(lines) if line.get("record") == kind)
        end = next((i for i in range(last, len(lines)) if lines[i]["record"] == "run"), len(lines))
        lines = lines[:end]
    start = max(i for i, line in enumerate(lines) if "results" in line or line["record"] == "run")
    header = {name: value for name, value in lines[start].items() if name != "results"}
    results = [{"record": "result", **line} for line in lines[start].get("results", [])]
    return Run(header, results + lines[start + 1 :])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def spread(record: Record, digits: int = 2) -> str:
    if record.get("turns") == 1:
        return f"{record['median']:.{digits}f} (one turn)"
    return f"{record['median']:.{digits}f} ({record['least']:.{digits}f} to {record['most']:.{digits}f})"


def system(run: Run, contender: str) -> str:
    """As "vLLM 0.32 bf16"; octavo without its version, which the commit tells better."""
    facts = run.header["contenders"][contender]
    base = contender.split("-")[0]
    version = "" if base == "octavo" else ".".join(facts["versions"][base].split("+")[0].split(".")[:2])
    return " ".join(part for part in (SYSTEMS[base], version, SHORT_TYPES[facts["dtype"]]) if part)


def conditions(run: Run) -> str:
    header = run.header
    where = header["cpu"] if header.get("device", "cpu") == "cpu" else header["device"]
    cores = f", {header['cores']} cores" if header.get("device", "cpu") == "cpu" else ""
    return f"{where}{cores}, commit {header['commit'][:12]}, {header['time'][:10]}."


def cpu(results: Path) -> str:
    """Tokens per second by batch, then ratios."""
    run = newest(results / "cpu.jsonl")
    cells = {(cell["contender"], cell["batch"]): cell for cell in run.of("cell")}
    batches = sorted({batch for _, batch in cells})

    def rate(name: str, batch: int) -> str:
        cell = cells.get((name, batch))
        if cell is None:
            return "-"
        return f"~{cell['expected_by_warm_up']:.0f}" if not cell["seconds"] else f"{cell['tokens_per_second']:.0f}"

    rows = []
    for first, second in CPU_ROWS:
        if first in run.header["contenders"]:
            names = [name for name in (first, second) if name in run.header["contenders"]]
            how = "in process / over gRPC" if len(names) == 2 else "in process"
            values = [" / ".join(rate(name, batch) for name in names) for batch in batches]
            rows.append([f"{system(run, first)}, {how}", *values])
    return f"{table(['batch', *map(str, batches)], rows)}\n\n{cpu_ratios(run, batches)}\n\n{conditions(run)}"


def cpu_ratios(run: Run, batches: Sequence[int]) -> str:
    ratios = {(line["first"], line["second"], line["batch"]): line for line in run.of("ratio")}
    rows = []
    for first, second in CPU_RATIOS:
        found = [ratios.get((first, second, batch)) for batch in batches]
        if any(found):
            ours, theirs = system(run, first), system(run, second)
            grpc = [" over gRPC" if name.endswith("-stream") else "" for name in (first, second)]
            other = "in process" if ours == theirs else f"{theirs}{grpc[1]}"
            rows.append([f"{ours}{grpc[0]} / {other}", *(spread(line) if line else "" for line in found)])
    return table(["ratio, median (least to most)", *(f"batch {batch}" for batch in batches)], rows)


def throughput(file: str) -> Callable[[Path], str]:
    """Of offline.jsonl or serve.jsonl: output tokens per second by workload (of prefill all), then ratios."""

    def rate(cell: Record) -> str:
        kind = "total" if cell["workload"] == "prefill" else "output"
        return f"{cell[f'{kind}_tokens_per_second']:.0f}"

    def render(results: Path) -> str:
        run = newest(results / file)
        cells = {(line["contender"], line["workload"]): line for line in run.of("cell")}
        ratios = {(line["first"], line["second"], line["workload"]): line for line in run.of("ratio")}
        workloads = list(dict.fromkeys(workload for _, workload in cells))
        rows = []
        for name in dict.fromkeys(name for name, _ in cells):
            found = [cells.get((name, workload)) for workload in workloads]
            rows.append([name, *(rate(cell) if cell else "-" for cell in found)])
        for first, second in dict.fromkeys((first, second) for first, second, _ in ratios):
            pairs = [ratios.get((first, second, workload)) for workload in workloads]
            rows.append([f"{first} / {second}", *(spread(pair) if pair else "-" for pair in pairs)])
        heads = ["prefill (all tokens)" if workload == "prefill" else workload for workload in workloads]
        return f"{table(['output tokens/s; ratios', *heads], rows)}\n\n{conditions(run)}"

    return render


def step(results: Path) -> str:
    run = newest(results / "step.jsonl")
    head = ["batch", "context", "step, ms (p10 to p90)", "device, ms", "bubble", "floor, ms", "of floor", "tokens/s"]
    rows = [
        [
            str(cell["batch"]),
            str(cell["context"]),
            f"{cell['step']:.3f} ({cell['p10']:.3f} to {cell['p90']:.3f})",
            f"{cell['device']:.3f}",
            f"{cell['bubble']:.1%}",
            f"{cell['floor']:.3f}",
            f"{cell['floor'] / cell['step']:.0%}",
            f"{cell['tokens_per_second']:.0f}",
        ]
        for cell in run.of("cell")
    ]
    return f"{table(head, rows)}\n\n{conditions(run)}"


def step_parts(results: Path) -> str:
    """Of the newest run with --parts: the parts of a step as shares of it, and how near they are to their floors."""
    run = newest(results / "step.jsonl", "part")
    found = {((line["batch"], line["context"]), line["name"]): line for line in run.of("part")}
    places = list(dict.fromkeys(place for place, _ in found))
    rows = []
    for name in dict.fromkeys(name for _, name in found):
        parts = [found[place, name] for place in places]
        of_floor = [f"{part['floor'] / part['ms']:.0%}" if part["floor"] else "" for part in parts]
        shares = [f"{part['share']:.1%}" for part in parts]
        rows.append([name, *(cell for pair in zip(shares, of_floor, strict=True) for cell in pair)])
    head = [cell for batch, context in places for cell in (f"share, batch {batch}, context {context}", "of floor")]
    return f"{table(['part', *head], rows)}\n\n{conditions(run)}"


def scheduler(results: Path) -> str:
    run = newest(results / "scheduler.jsonl")
    found = {(line["scenario"], line["requests"]): line for line in run.of("result")}
    sizes = sorted({size for _, size in found})
    rows = []
    for scenario in dict.fromkeys(scenario for scenario, _ in found):
        cells = [found.get((scenario, size)) for size in sizes]
        rows.append([scenario, *(f"{c['median']:.0f} ({c['p10']:.0f} to {c['p90']:.0f})" if c else "-" for c in cells)])
    return f"{table(['µs, median (p10 to p90); requests', *map(str, sizes)], rows)}\n\n{conditions(run)}"


def prefix(results: Path) -> str:
    run = newest(results / "prefix.jsonl")
    head = ["prefix cache", "output tokens/s", "first token p50 / p99, ms", "hit rate"]
    rows = [
        [
            cell["cache"],
            f"{cell['output_tokens_per_second']:.0f}",
            f"{cell['first_token_p50_ms']:.0f} / {cell['first_token_p99_ms']:.0f}",
            f"{cell['hit_rate']:.2f}",
        ]
        for cell in run.of("cell")
    ]
    rows += [[f"{line['first']} / {line['second']}", spread(line), "", ""] for line in run.of("ratio")]
    return f"{table(head, rows)}\n\n{conditions(run)}"


def quality(results: Path) -> str:
    run = newest(results / "quality.jsonl")
    rows = [[line["name"], line["setting"], f"{line['perplexity']:.3f}"] for line in run.of("setting")]
    [line] = run.of("comparison")
    ratio = f"{line['perplexity_ratio']:.4f} ± {line['perplexity_ratio_error']:.4f}"
    same = f"{line['greedy_agreement']:.0%} equal greedy tokens"
    before = f"{line['greedy_tokens_before_difference']:.0f} of {line['greedy_tokens']} before the first other one"
    rows.append(["B / A", f"{same}, {before}", ratio])
    return f"{table(['', 'setting', 'perplexity'], rows)}\n\n{conditions(run)}"


def parameters(results: Path) -> str:
    run = newest(results / "parameters.jsonl")

    def within(value: Record, form: str) -> str:
        low, high = value["interval"]
        return f"{value['median']:{form}} ({low:{form}} to {high:{form}})"

    head = ["median, and where it lies by 95 %", "all use it", "one uses it", "the others pay"]
    rows = [
        [line["parameter"], within(line["all"], ".2f"), within(line["one"], ".2f"), within(line["others"], "+.1%")]
        for line in run.of("parameter")
    ]
    return f"{table(head, rows)}\n\n{conditions(run)}"


def host(results: Path) -> str:
    run = newest(results / "host.jsonl")
    cells = run.of("cell")
    head = ["µs, median; requests", *(str(cell["requests"]) for cell in cells)]
    steps = [f"{cell['step']:.0f} ({cell['p10']:.0f} to {cell['p90']:.0f})" for cell in cells]
    rows = [["a step (p10 to p90)", *steps]]
    for part in cells[0]["parts"]:
        rows.append([part, *(f"{cell['parts'][part]:.0f}" for cell in cells)])
    return f"{table(head, rows)}\n\n{conditions(run)}"


def runs(results: Path) -> str:
    """What there is: a line per file."""
    rows = []
    for path in sorted(results.glob("*.jsonl")):
        header = newest(path).header
        where = header["cpu"] if header.get("device", "cpu") == "cpu" else header["device"]
        cells = [f"`{path.name}`", f"`python bench/{path.stem}.py`", where, str(header["cores"])]
        rows.append([*cells, header["commit"][:12], header["time"][:10]])
    return table(["file", "by", "newest run on", "cores", "commit", "date"], rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "cpu": cpu,
    "offline": throughput("offline.jsonl"),
    "serve": throughput("serve.jsonl"),
    "step": step,
    "step-parts": step_parts,
    "scheduler": scheduler,
    "prefix": prefix,
    "quality": quality,
    "parameters": parameters,
    "host": host,
    "runs": runs,
}

if __name__ == "__main__":
    sys.exit(main())
