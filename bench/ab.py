"""Two versions of the code beside each other: processes of A and of B in turns, and whether they differ.

    python bench/ab.py HEAD~3 HEAD scheduler                  a bench by name, at two commits
    python bench/ab.py --repeats 11 ../other . step           in two folders, as they are
    python bench/ab.py main . my_timing.py --size 3           any program that prints a number

A and B are folders, or commits, which are unpacked for the time of the run. The program (Python, with options of its
own) runs in each of them with that version's packages first on the path: A B, B A, ... A bench by name gives the
numbers in its records; any other program those of its last line, a number or a JSON object of numbers.

For each number: medians, and the median ratio B / A of the turns with its bootstrap interval at 95 %. Where that
contains 1 the line says "noise"; of fewer than 6 turns it says nothing. Peers' environments (.peers) are those of each
folder; a commit has none.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import turns

ROOT = Path(__file__).resolve().parents[1]
Numbers = dict[str, float]
FEWEST_TURNS = 6
"""With fewer, the chance that all ratios lie on one side is over 5 % where there is no difference."""


@dataclass(frozen=True)
class Named:
    """A bench of this folder."""

    command: tuple[str, ...]
    out: str
    """Its flag for the file of records."""
    number: str
    """Field of a record that is compared."""
    names: tuple[str, ...]
    """Fields that tell the records of one run apart."""


NAMED = {
    "scheduler": Named(
        ("bench/scheduler.py", "--requests", "256", "--steps", "200"), "--json", "median", ("scenario", "requests")
    ),
    "step": Named(("bench/step.py", "--batches", "1,16", "--contexts", "64"), "--out", "step", ("batch", "context")),
    "offline": Named(
        ("bench/offline.py", "--shape", "tiny", "--contenders", "octavo", "--workloads", "11/64", "--repeats", "3"),
        "--out",
        "output_tokens_per_second",
        ("workload",),
    ),
}


class RunError(Exception):
    """A run failed, or printed no number, or A or B is neither folder nor commit."""


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was unpacked is removed
    options = parse()
    try:
        first, second = measure(options)
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    lines = compare(first, second)
    header = environment.describe() | {"a": Path(options.a).name, "b": Path(options.b).name}
    turns.append(options.out, header | {"command": [options.program, *options.arguments]}, lines)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="runs of each")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a run may take")
    parser.add_argument("--out", default="", help="file to add records to")
    parser.add_argument("a", help="folder or commit")
    parser.add_argument("b", help="folder or commit")
    parser.add_argument("program", help=f"{', '.join(NAMED)}, or a Python program's path, seen from A and B")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> tuple[list[Numbers], list[Numbers]]:
    values: tuple[list[Numbers], list[Numbers]] = ([], [])
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(version(side)) for side in (options.a, options.b)]
        for turn in range(options.repeats):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                values[side].append(run(options, folders[side]))
            print(f"turn {turn + 1}   A {shown(values[0][-1])}   B {shown(values[1][-1])}", flush=True)
    return values


@contextlib.contextmanager
def version(side: str) -> Iterator[Path]:
    """The folder, or a folder with the commit's files; checkpoints of random weights are shared with this one."""
    if Path(side).is_dir():
        yield Path(side).resolve()
        return
    packed = subprocess.run(["git", "archive", side], cwd=ROOT, capture_output=True)
    if packed.returncode:
        raise RunError(f"{side} is neither a folder nor a commit: {packed.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as name:
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
            files.extractall(name, filter="data")
        (ROOT / ".cache").mkdir(exist_ok=True)
        (Path(name) / ".cache").symlink_to(ROOT / ".cache")
        yield Path(name)


def run(options: argparse.Namespace, folder: Path) -> Numbers:
    named = NAMED.get(options.program)
    with tempfile.TemporaryDirectory() as name:
        records = Path(name) / "records.jsonl"
        command = [options.program] if named is None else [*named.command, named.out, str(records)]
        path = os.pathsep.join(str(folder / part) for part in ("engine", "kernels", "proto"))
        try:
            done = subprocess.run(
                [sys.executable, *command, *options.arguments],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=options.timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise RunError(f"not done within {options.timeout:.0f} s in {folder.name}") from error
        if done.returncode:
            raise RunError(f"status {done.returncode} in {folder.name}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
        return printed(done.stdout) if named is None else recorded(named, records)


def printed(output: str) -> Numbers:
    """Numbers of the last line."""
    try:
        value = json.loads(output.strip().splitlines()[-1])
        return {name: float(number) for name, number in (value if isinstance(value, dict) else {"": value}).items()}
    except (IndexError, ValueError, TypeError) as error:
        raise RunError(f"the last line is no number and no object of numbers: {output[-200:]!r}") from error


def recorded(named: Named, path: Path) -> Numbers:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    flat = [row for line in rows for row in line.get("results", [line])]
    return {" ".join(str(row[name]) for name in named.names): row[named.number] for row in flat if named.number in row}


def shown(values: Numbers) -> str:
    return ", ".join(f"{name} {value:.4g}".strip() for name, value in values.items())


def compare(first: Sequence[Numbers], second: Sequence[Numbers]) -> list[dict[str, Any]]:
    """Prints and returns a record per number that both have in every turn."""
    lines: list[dict[str, Any]] = []
    print(f"\n{'':<24}{'A':>12}{'B':>12}{'B / A':>9}   95 % interval")
    for name in first[0]:
        if all(name in values for values in [*first, *second]):
            ours, theirs = ([values[name] for values in side] for side in (first, second))
            ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
            low, high = turns.interval(ratios)
            noise = low <= 1 <= high if len(ratios) >= FEWEST_TURNS else None
            a, b, ratio = (statistics.median(values) for values in (ours, theirs, ratios))
            end = {True: "   noise", False: "", None: "   too few turns to tell"}[noise]
            print(f"{name:<24}{a:>12.5g}{b:>12.5g}{ratio:>9.3f}   {low:.3f} to {high:.3f}{end}")
            sides = {"a": ours, "b": theirs}
            result = {"ratio": ratio, "interval": [low, high], "noise": noise}
            lines.append({"record": "comparison", "name": name, **sides, **result})
    return lines


if __name__ == "__main__":
    sys.exit(main())
