"""octavo's CPU path beside transformers, vLLM and CTranslate2: tokens per second, in process and over gRPC, in one run.

    python bench/cpu.py                                     # everything that is installed; about 12 minutes
    python bench/cpu.py --contenders octavo,vllm --batches 1,16
    python bench/cpu.py --contenders octavo@1,octavo@2      # the same system with 1 and with 2 threads

Every system lives in a process of its own and stays warm. They take turns (ABAB...) on the same random prompts, so
that whatever else the machine does meets all of them; a ratio is the median of the ratios of single turns. Greedy,
end of sequence ignored, prefix caches off, random weights of gpt2's shape. Results go to standard output, and as JSON
lines (one "run", then its "cell"s and "ratio"s) to the end of bench/results/cpu.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import environment
from contenders import (
    COMPARISONS,
    CONTENDERS,
    DEFAULT,
    SLOW_BF16,
    Entry,
    Settings,
    WorkerError,
    agreement,
    announce,
    described,
    end,
    names,
    prepare_checkpoint,
    start,
)

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_TOKENS = (2, 8)
LARGEST_TOKEN = 50_000
DISTURBED = 0.2
"""Cores that others may use during a turn before it is taken again."""
TARGETS = {
    (ours, theirs, batch): 1.3
    for ours, theirs in [("octavo", "vllm"), ("octavo-stream", "vllm-stream"), ("octavo-int8", "ctranslate2-int8")]
    for batch in (1, 4, 16, 64)
}
TARGETS |= {(f"octavo-{mode}", "octavo", 16): 0.9 for mode in ("stream", "unary", "batch", "session")}
"""(first, second, batch) -> least ratio that octavo is meant to have."""


@dataclass
class Cell:
    """All turns of one contender at one batch size."""

    contender: str
    batch: int
    new_tokens: int
    repeats: int
    """How many turns it takes; fewer than the others, or none, when it is so slow that they would not fit."""
    expected_rate: float
    """Tokens per second that the warm-up promised."""
    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    """Cores that the rest of the machine, this program included, kept busy meanwhile."""
    agreement: list[float] = field(default_factory=list)
    """Part of the tokens that are those of transformers, in this run."""

    @property
    def rates(self) -> list[float]:
        return [self.batch * self.new_tokens / seconds for seconds in self.seconds]


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended
    options = parse()
    checkpoint = prepare_checkpoint(options.shape)
    settings = Settings(threads=options.threads)
    entries, absent = start(options.contenders, settings, checkpoint=checkpoint, peers=options.peers)
    try:
        announce(entries, absent)
        cells = measure(options, entries, absent) if entries else []
    finally:
        end(entries)
    ratios = compare(cells)
    report(cells, ratios)
    if options.out and cells:
        record(options, entries, absent, cells, ratios)
    return 0 if cells else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = DEFAULT if "avx512f" in environment.cpu_flags() else DEFAULT + SLOW_BF16
    parser.add_argument(
        "--contenders", type=names, default=default, metavar="A,B,...", help=f"of {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16, 64], metavar="N,M,...")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender at each batch size")
    parser.add_argument("--quick", action="store_true", help="2 turns at batch 1 and 16")
    parser.add_argument("--cell-seconds", type=float, default=20.0, help="who needs more takes fewer turns")
    parser.add_argument("--retakes", type=int, default=1, help="of a turn during which others used the CPU")
    parser.add_argument("--threads", type=int, default=0, help="OpenMP threads of each; 0: each system's own choice")
    parser.add_argument("--shape", default="gpt2", help="tiny, gpt2, gpt2-medium, gpt2-large or gpt2-xl")
    parser.add_argument("--prompt-tokens", type=int, default=11)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="folder of the peers' virtual environments")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "cpu.jsonl"), help='"" to write nothing')
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.batches = 2, [1, 16]
    return options


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def measure(options: argparse.Namespace, entries: dict[str, Entry], absent: dict[str, str]) -> list[Cell]:
    """Batch size by batch size: warms everyone up, then lets them take turns. A contender that fails drops out."""
    cells: list[Cell] = []
    for batch in options.batches:
        row: dict[str, Cell] = {}
        for name in [name for name in entries if name not in absent]:
            try:
                row[name] = warmed_up(options, name, entries[name], batch)
            except WorkerError as error:
                absent[name] = str(error)
        for turn in range(options.repeats):
            prompts = random_prompts(options, batch, turn)
            order = list(row)[turn % len(row) :] + list(row)[: turn % len(row)] if row else []
            answers: dict[str, list[list[int]]] = {}
            for name in order:
                if turn < row[name].repeats and name not in absent:
                    try:
                        answers[name] = take_turn(options, row[name], entries[name], prompts)
                    except WorkerError as error:
                        absent[name] = str(error)
            rates = ", ".join(f"{name} {row[name].rates[-1]:.0f}" for name in row if name in answers)
            if rates:
                print(f"batch {batch}, turn {turn + 1}, tokens/s: {rates}", flush=True)
            for name, answer in answers.items():
                if "transformers" in answers and name != "transformers":
                    row[name].agreement.append(agreement(answer, answers["transformers"]))
        cells += [cell for name, cell in row.items() if cell.seconds or name not in absent]
    for name in set(absent) & set(entries):
        print(f"{name} dropped out: {absent[name]}", flush=True)
    return cells


def warmed_up(options: argparse.Namespace, name: str, entry: Entry, batch: int) -> Cell:
    """Two short batches, which also tell how many turns fit into --cell-seconds."""
    prompts = random_prompts(options, batch, -1)
    few, more = WARM_UP_TOKENS
    first, _ = entry.worker.run(prompts, few, entry.contender.mode)
    expected = first / (few + 1) * options.new_tokens  # a prompt costs about as much as a token
    if first < options.cell_seconds / 4:
        second, _ = entry.worker.run(prompts, more, entry.contender.mode)
        expected = second + max(0.0, second - first) / (more - few) * (options.new_tokens - more)
    repeats = min(options.repeats, round(options.cell_seconds / expected))
    return Cell(name, batch, options.new_tokens, repeats, batch * options.new_tokens / expected)


def take_turn(options: argparse.Namespace, cell: Cell, entry: Entry, prompts: list[list[int]]) -> list[list[int]]:
    """One batch; again, at most --retakes times, while others take the CPU away: the least disturbed one counts."""
    attempts = []
    for _ in range(options.retakes + 1):
        busy, own, begin = environment.busy_seconds(), entry.worker.cpu_seconds(), time.perf_counter()
        seconds, token_ids = entry.worker.run(prompts, options.new_tokens, entry.contender.mode)
        busy, own = environment.busy_seconds() - busy, entry.worker.cpu_seconds() - own
        if [len(ids) for ids in token_ids] != [options.new_tokens] * len(prompts):
            raise WorkerError("answered with another number of tokens than asked for")
        attempts.append((max(0.0, busy - own) / (time.perf_counter() - begin), seconds))
        if attempts[-1][0] <= DISTURBED:
            break
    others, seconds = min(attempts)
    cell.seconds.append(seconds)
    cell.others.append(others)
    return token_ids


def random_prompts(options: argparse.Namespace, batch: int, turn: int) -> list[list[int]]:
    source = random.Random(f"{batch} {turn}")
    return [[source.randrange(LARGEST_TOKEN) for _ in range(options.prompt_tokens)] for _ in range(batch)]


def compare(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Ratios of tokens per second of the pairs in COMPARISONS, turn by turn."""
    found = []
    for first, second in COMPARISONS:
        for ours in cells:
            for theirs in cells:
                bases = (ours.contender.split("@")[0], theirs.contender.split("@")[0])
                if bases == (first, second) and ours.batch == theirs.batch and ours.seconds and theirs.seconds:
                    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=False)]
                    found.append(
                        {
                            "first": ours.contender,
                            "second": theirs.contender,
                            "batch": ours.batch,
                            "median": statistics.median(ratios),
                            "least": min(ratios),
                            "most": max(ratios),
                            "turns": len(ratios),
                            "target": TARGETS.get((*bases, ours.batch)),
                        }
                    )
    return found


def report(cells: Sequence[Cell], ratios: Sequence[dict[str, Any]]) -> None:
    batches = sorted({cell.batch for cell in cells})
    print("\ntokens per second: median (least to most)")
    print(f"{'':<24}" + "".join(f"{f'batch {batch}':>24}" for batch in batches))
    for name in dict.fromkeys(cell.contender for cell in cells):
        row = {cell.batch: summary(cell) for cell in cells if cell.contender == name}
        print(f"{name:<24}" + "".join(f"{row.get(batch, '-'):>24}" for batch in batches))
    print("\nratio of tokens per second: median (least to most)")
    for pair in dict.fromkeys((ratio["first"], ratio["second"]) for ratio in ratios):
        row = {ratio["batch"]: ratio_text(ratio) for ratio in ratios if pair == (ratio["first"], ratio["second"])}
        print(f"{' / '.join(pair):<40}" + "".join(f"{row.get(batch, '-'):>20}" for batch in batches))
    for ratio in ratios:
        if ratio["target"]:
            met = "met" if ratio["median"] >= ratio["target"] else "NOT met"
            print(f"target: {ratio['first']} / {ratio['second']} at batch {ratio['batch']} >= {ratio['target']}: {met}")
    if cells:
        others = statistics.median([value for cell in cells for value in cell.others] or [0.0])
        print(f"the rest of the machine kept {others:.2f} cores busy meanwhile (median)")


def summary(cell: Cell) -> str:
    if not cell.seconds:
        return f"about {cell.expected_rate:.0f} x0"
    return f"{statistics.median(cell.rates):.0f} ({min(cell.rates):.0f}-{max(cell.rates):.0f}) x{len(cell.rates)}"


def ratio_text(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f}-{ratio['most']:.2f})"


def record(
    options: argparse.Namespace,
    entries: dict[str, Entry],
    absent: dict[str, str],
    cells: Sequence[Cell],
    ratios: Sequence[dict[str, Any]],
) -> None:
    header = environment.describe()
    run = header["time"]
    header["settings"] = {
        key: getattr(options, key) for key in ("shape", "prompt_tokens", "new_tokens", "repeats", "threads")
    }
    header["contenders"] = described(entries)
    header["absent"] = absent
    lines = [{"record": "run", "run": run, **header}]
    for cell in cells:
        lines.append(
            {
                "record": "cell",
                "run": run,
                "contender": cell.contender,
                "batch": cell.batch,
                "tokens_per_second": round(statistics.median(cell.rates), 1) if cell.seconds else None,
                "expected_by_warm_up": round(cell.expected_rate, 1),
                "seconds": [round(value, 4) for value in cell.seconds],
                "other_cores_busy": [round(value, 2) for value in cell.others],
                "agreement_with_transformers": [round(value, 3) for value in cell.agreement],
            }
        )
    for ratio in ratios:
        rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in ratio.items()}
        lines.append({"record": "ratio", "run": run, **rounded})
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    print(f"appended {len(lines)} records to {path.name}")


if __name__ == "__main__":
    sys.exit(main())
