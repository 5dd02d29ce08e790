"""Contenders that take turns on workloads, and what is made of their times: offline.py and serve.py."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import environment
from contenders import Entry, WorkerError, agreement, announce, described, end
from workloads import prompts

WARM_UP_PROMPTS = 16
WARM_UP_TOKENS = 16
CHECKED_PROMPTS = 4
CHECKED_TOKENS = 32
REFERENCE = "transformers-fp32"
BOOTSTRAP = 2000


@dataclass
class Load:
    """A workload at its scale."""

    name: str
    lengths: list[tuple[int, int]]
    """(prompt, new) tokens of each request."""

    @property
    def new_tokens(self) -> list[int]:
        return [new for _, new in self.lengths]

    @property
    def total(self) -> int:
        return sum(map(sum, self.lengths))


@dataclass
class Cell:
    """All turns of one contender on one workload."""

    contender: str
    load: Load
    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    """Cores that the rest of the machine, this program included, kept busy meanwhile."""
    agreement: float | None = None
    """Part of the first CHECKED_TOKENS of the first CHECKED_PROMPTS that are transformers' in fp32, in this run."""

    @property
    def output_rates(self) -> list[float]:
        return [sum(self.load.new_tokens) / seconds for seconds in self.seconds]

    @property
    def total_rates(self) -> list[float]:
        return [self.load.total / seconds for seconds in self.seconds]


@dataclass(frozen=True)
class Plan:
    """How turns are taken."""

    repeats: int
    cell_seconds: float
    """A contender that has used this much on a workload takes no further turn there."""
    mode_suffix: str = ""
    """Added to the modes of contenders that have one."""
    reference_only: bool = False
    """Whether the REFERENCE answers for the check and takes no turns."""


def measure(plan: Plan, loads: Sequence[Load], entries: Mapping[str, Entry], absent: dict[str, str]) -> list[Cell]:
    """Workload by workload, in turns A B C, B C A, ... A contender that fails drops out, into `absent`."""
    cells: list[Cell] = []
    for load in loads:
        row = {name: Cell(name, load) for name in entries if name not in absent}
        attempt(row, absent, lambda name, cell: warm_up(plan, cell, entries[name]))
        check_answers(plan, load, row, entries, absent)
        for turn in range(plan.repeats):
            names = [name for name in row if not (plan.reference_only and name == REFERENCE)]
            order = names[turn % max(1, len(names)) :] + names[: turn % max(1, len(names))]
            due = {name: row[name] for name in order if sum(row[name].seconds) < plan.cell_seconds}
            attempt(due, absent, lambda name, cell, turn=turn: take_turn(plan, cell, entries[name], turn))
            rates = ", ".join(f"{name} {cell.output_rates[-1]:.0f}" for name, cell in due.items() if cell.seconds)
            print(f"{load.name}, turn {turn + 1}, output tokens/s: {rates}", flush=True)
        cells += [cell for cell in row.values() if cell.seconds]
    for name in set(absent) & set(entries):
        print(f"{name} dropped out: {absent[name]}", flush=True)
    return cells


def attempt(row: Mapping[str, Cell], absent: dict[str, str], action: Any) -> None:
    for name, cell in row.items():
        if name not in absent:
            try:
                action(name, cell)
            except WorkerError as error:
                absent[name] = str(error)


def mode(plan: Plan, entry: Entry) -> str:
    return entry.contender.mode + plan.mode_suffix if entry.contender.mode else ""


def warm_up(plan: Plan, cell: Cell, entry: Entry) -> None:
    """The first requests with short answers, with prompts of their own."""
    lengths = cell.load.lengths[:WARM_UP_PROMPTS]
    short = [min(new, WARM_UP_TOKENS) for _, new in lengths]
    entry.worker.run(prompts(lengths, f"{cell.load.name} warm-up"), short, mode(plan, entry))


def check_answers(
    plan: Plan, load: Load, row: Mapping[str, Cell], entries: Mapping[str, Entry], absent: dict[str, str]
) -> None:
    """Fills `agreement`, where the reference takes part."""
    if REFERENCE not in row or REFERENCE in absent:
        return
    lengths = load.lengths[:CHECKED_PROMPTS]
    short = [min(new, CHECKED_TOKENS) for _, new in lengths]
    answers: dict[str, list[list[int]]] = {}

    def ask(name: str, _: Cell) -> None:
        own = mode(plan, entries[name])
        answers[name] = entries[name].worker.run(prompts(lengths, f"{load.name} check"), short, own)[1]

    attempt(row, absent, ask)
    for name in answers:
        if name != REFERENCE and REFERENCE in answers:
            row[name].agreement = agreement(answers[name], answers[REFERENCE])


def take_turn(plan: Plan, cell: Cell, entry: Entry, turn: int) -> None:
    asked = prompts(cell.load.lengths, f"{cell.load.name} {turn}")
    busy, own, begin = environment.busy_seconds(), entry.worker.cpu_seconds(), time.perf_counter()
    seconds, token_ids = entry.worker.run(asked, cell.load.new_tokens, mode(plan, entry))
    busy, own = environment.busy_seconds() - busy, entry.worker.cpu_seconds() - own
    if [len(ids) for ids in token_ids] != cell.load.new_tokens:
        raise WorkerError("answered with another number of tokens than asked for")
    cell.seconds.append(seconds)
    cell.others.append(max(0.0, busy - own) / (time.perf_counter() - begin))


def compare(cells: Sequence[Cell], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Ratios of tokens per second, first over second, turn by turn, with a bootstrap interval of their median."""
    found = []
    for first, second in pairs:
        for ours in cells:
            for theirs in cells:
                bases = (ours.contender.split("@")[0], theirs.contender.split("@")[0])
                if bases == (first, second) and ours.load.name == theirs.load.name:
                    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=False)]
                    low, high = interval(ratios)
                    found.append(
                        {
                            "first": ours.contender,
                            "second": theirs.contender,
                            "workload": ours.load.name,
                            "median": statistics.median(ratios),
                            "least": min(ratios),
                            "most": max(ratios),
                            "interval": [low, high],
                            "turns": len(ratios),
                        }
                    )
    return found


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the median; the same for the same values."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(values, k=len(values))) for _ in range(BOOTSTRAP))
    tail = round((1 - level) / 2 * BOOTSTRAP)
    return medians[tail], medians[-1 - tail]


def take(
    plan: Plan,
    loads: Sequence[Load],
    entries: dict[str, Entry],
    absent: dict[str, str],
    pairs: Sequence[tuple[str, str]],
) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Measures, ends the workers whatever happens, and reports. Returns the cells and the ratios of the pairs."""
    try:
        announce(entries, absent)
        cells = measure(plan, loads, entries, absent)
    finally:
        end(entries)
    ratios = compare(cells, pairs)
    report(cells, ratios)
    return cells, ratios


def header(
    options: argparse.Namespace, settings: Sequence[str], entries: Mapping[str, Entry], absent: Mapping[str, str]
) -> dict[str, Any]:
    """Of a run's records: machine, device, the named options, who took part and who did not."""
    return (
        environment.describe()
        | environment.accelerator(options.device)
        | {
            "settings": {name: getattr(options, name) for name in settings},
            "contenders": described(entries),
            "absent": absent,
        }
    )


def report(cells: Sequence[Cell], ratios: Sequence[Mapping[str, Any]]) -> None:
    for load in dict.fromkeys(cell.load.name for cell in cells):
        row = [cell for cell in cells if cell.load.name == load]
        print(f"\n{load}: {len(row[0].load.lengths)} requests, {sum(row[0].load.new_tokens)} new tokens")
        print(f"{'tokens per second':<26}{'output: median (least to most)':>32}{'total':>10}{'as fp32':>10}")
        for cell in row:
            rates = cell.output_rates
            text = f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) x{len(rates)}"
            same = "-" if cell.agreement is None else f"{cell.agreement:.3f}"
            print(f"{cell.contender:<26}{text:>32}{statistics.median(cell.total_rates):>10.0f}{same:>10}")
        for ratio in ratios:
            if ratio["workload"] == load:
                low, high = ratio["interval"]
                noise = ", noise" if low <= 1 <= high else ""
                print(
                    f"  {ratio['first']} / {ratio['second']}: {ratio['median']:.2f} ({ratio['least']:.2f} to "
                    f"{ratio['most']:.2f}), median within {low:.2f} to {high:.2f}{noise}"
                )
    if cells:
        others = statistics.median([value for cell in cells for value in cell.others])
        print(f"\nthe rest of the machine kept {others:.2f} cores busy meanwhile (median)")


def records(cells: Sequence[Cell], ratios: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {
            "record": "cell",
            "contender": cell.contender,
            "workload": cell.load.name,
            "requests": len(cell.load.lengths),
            "output_tokens_per_second": statistics.median(cell.output_rates),
            "total_tokens_per_second": statistics.median(cell.total_rates),
            "seconds": cell.seconds,
            "other_cores_busy": cell.others,
            "agreement_with_fp32": cell.agreement,
        }
        for cell in cells
    ]
    return lines + [{"record": "ratio", **ratio} for ratio in ratios]


def append(path: str, header: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Adds a run to a file of records: the header, then the lines, each with the run's time. "" writes nothing."""
    if not path:
        return
    run = header["time"]
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps({"record": "run", "run": run, **header}) + "\n")
        file.writelines(json.dumps({"record": line["record"], "run": run, **rounded(line)}) + "\n" for line in lines)
    print(f"appended {len(lines) + 1} records to {out.name}")


def rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
