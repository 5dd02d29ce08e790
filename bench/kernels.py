"""The kernels beside what else there is, at the shapes of gpt2-large: µs and the part of the GPU's ceiling.

    python bench/kernels.py [BENCH ...] [--seconds N] [--out FILE]      linear decode shared prefill sampling norm layer
    python bench/kernels.py linear --sweep --seconds 1800               all tiles; prints lines for gemm_plan.MEASURED
    python bench/kernels.py --interpret                                 no GPU: tiny shapes, invented times

Times are of CUDA graph replays over buffers that rotate through more than the L2 cache, contenders in turns; median,
least and most of the replays. "of ceiling" is the least time that the card's measured copy bandwidth and bf16 product
allow for the bytes and operations of a case, over the time taken. A contender whose result differs from the first
one's is WRONG and makes the exit status 1, as does a fault. A missed target or a case left out for lack of time does
not: both are printed and recorded.
"""

from __future__ import annotations

import os
import sys

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import attention_cases
import gpu_timing
import linear_cases
import roofline
import sampling_cases
import torch
from gpu_timing import Clock, FakeClock, GraphClock, Timing, Work
from kernel_case import Case, Setting, TooLong, at_most
from roofline import Ceilings

ROOT = Path(__file__).resolve().parents[1]
BENCHES: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "decode": attention_cases.decode_cases,
    "shared": attention_cases.shared_cases,
    "sampling": sampling_cases.sampling_cases,
    "norm": linear_cases.norm_cases,
    "linear": linear_cases.linear_cases,
    "layer": linear_cases.layer_cases,
    "prefill": attention_cases.prefill_cases,
}
PREPARE_SECONDS = 60
"""For a contender to get ready, compilation included."""


@dataclass
class Outcome:
    """What came out of one case."""

    case: Case
    timings: dict[str, Timing]
    absent: dict[str, str]
    differences: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    met: list[str] = field(default_factory=list)


def main() -> int:
    options = parse()
    setting = make_setting(options)
    if setting is None:
        print("no CUDA device: with --interpret the benchmarks are only tried out", file=sys.stderr)
        return 2
    header = roofline.describe_gpu(setting.device)
    print(f"{header['device']}, torch {header['torch']}, triton {header['triton']}, commit {header['commit']}")
    clock: Clock = FakeClock() if setting.tiny else GraphClock(options.rounds)
    ceilings = roofline.FAKE if setting.tiny else roofline.measure_ceilings()
    print(
        f"ceilings: copy {ceilings.bytes_per_us / 1e6:.2f} TB/s, bf16 {ceilings.flops_per_us / 1e6:.0f} TFLOP/s, "
        f"kernel boundary {ceilings.boundary_us:.2f} µs"
    )
    journal = Journal(options, header, ceilings)
    measure(options, setting, clock, ceilings, journal)
    if options.sweep:
        print_plans(header["device"], journal.outcomes)
    return journal.end()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", metavar="BENCH", help=f"of {', '.join(BENCHES)}; default: all")
    parser.add_argument("--seconds", type=float, default=100.0, help="per bench; cases that do not fit are left out")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all benches together")
    parser.add_argument("--rounds", type=int, default=7, help="replays of each contender")
    parser.add_argument("--only", default="", metavar="PART", help="cases whose name contains this")
    parser.add_argument("--sweep", action="store_true", help="linear: time every plan of gemm_plan.candidates")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes in Triton's interpreter, invented times")
    parser.add_argument("--out", default=None, help='default: bench/results/kernels.jsonl; "": write nothing')
    options = parser.parse_args()
    unknown = [name for name in options.benches if name not in BENCHES]
    if unknown:
        parser.error(f"no bench {unknown[0]}; there are {', '.join(BENCHES)}")
    options.benches = options.benches or list(BENCHES)
    if options.out is None:
        options.out = "" if options.interpret else str(ROOT / "bench" / "results" / "kernels.jsonl")
    return options


def make_setting(options: argparse.Namespace) -> Setting | None:
    torch.manual_seed(0)
    if options.interpret:
        torch.set_num_threads(1)
        return Setting(torch.device("cpu"), torch.float16, 1.0, tiny=True, sweep=options.sweep)
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda")
    return Setting(device, torch.bfloat16, gpu_timing.l2_bytes(device), tiny=False, sweep=options.sweep)


@torch.inference_mode()
def measure(options: argparse.Namespace, setting: Setting, clock: Clock, ceilings: Ceilings, journal: Journal) -> None:
    """All cases of all benches, each bench within its time; an exception ends its bench."""
    end = time.monotonic() + options.budget
    for bench in options.benches:
        deadline = min(end, time.monotonic() + options.seconds)
        print(f"\n{bench:<44}{'µs':>9}{'least':>9}{'most':>9}{'of ceiling':>12}{'TB/s':>8}{'TFLOP/s':>9}  differs")
        cases = BENCHES[bench](setting)
        while True:
            case = None
            try:
                case = next(cases, None)
                if case is None:
                    break
                if time.monotonic() > deadline:
                    journal.left_out.append(f"{bench}: {case.name} and what follows: no time left")
                    break
                if options.only in case.name:
                    journal.add(measure_case(case, clock, ceilings))
            except Exception:
                journal.faults.append(f"{bench}{f' {case.name}' if case else ''}: {traceback.format_exc(limit=-4)}")
                break
            finally:
                case = None
                gc.collect()
                torch.cuda.empty_cache()


def measure_case(case: Case, clock: Clock, ceilings: Ceilings) -> Outcome:
    works: dict[str, Work] = {}
    absent: dict[str, str] = {}
    for name, make in case.contenders.items():
        try:
            with at_most(PREPARE_SECONDS):
                works[name] = make()
                works[name].run(0)
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
        except (ImportError, NotImplementedError, TooLong) as error:
            absent[name] = str(error)
            works.pop(name, None)
        except Exception as error:
            if name.startswith("octavo"):
                raise
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            works.pop(name, None)
    compared, wrong = compare(case, works)
    timings, failed = clock.times(works, case.copies)
    ours = {name: why for name, why in failed.items() if name.startswith("octavo")}
    if ours:
        raise RuntimeError(str(ours))
    outcome = Outcome(case, timings, absent | failed, compared, wrong)
    if isinstance(clock, GraphClock):
        judge(outcome, ceilings)
    return outcome


def compare(case: Case, works: dict[str, Work]) -> tuple[dict[str, float], list[str]]:
    """Differences from the first contender that has a result, and who is wrong."""
    found: dict[str, float] = {}
    first: torch.Tensor | None = None
    for name, work in works.items():
        if work.result is None:
            continue
        result = work.result().float().clone()
        if first is None:
            first = result
        found[name] = gpu_timing.difference(result, first)
    return found, [name for name, value in found.items() if not value <= case.tolerance]


def judge(outcome: Outcome, ceilings: Ceilings) -> None:
    """Compares with the case's target."""
    target = outcome.case.target
    if target is None or target.contender not in outcome.timings:
        return
    ours = outcome.timings[target.contender].median
    fraction = fraction_of(outcome.case, target.contender, ours, ceilings)

    def note(met: bool, text: str) -> None:
        (outcome.met if met else outcome.missed).append(text)

    if target.fraction is not None:
        note(fraction >= target.fraction, f"{fraction:.0%} of the ceiling, target {target.fraction:.0%}")
    if target.microseconds is not None:
        note(ours <= target.microseconds, f"{ours:.1f} µs, target {target.microseconds:.0f} µs")
    if target.ahead:
        others = {name: t.median for name, t in outcome.timings.items() if not name.startswith("octavo")}
        for name, theirs in others.items():
            note(ours <= theirs, f"{ours:.2f} µs, {name} {theirs:.2f} µs")


def fraction_of(case: Case, contender: str, microseconds: float, ceilings: Ceilings) -> float:
    return ceilings.floor_us(case.floor_bytes(contender), case.flops) / microseconds


def print_outcome(outcome: Outcome, ceilings: Ceilings) -> None:
    case = outcome.case
    print(case.name)
    for name, timing in outcome.timings.items():
        fraction = fraction_of(case, name, timing.median, ceilings)
        rate, speed = case.floor_bytes(name) / timing.median / 1e6, case.flops / timing.median / 1e6
        differs = f"{outcome.differences[name]:.1e}" if name in outcome.differences else "-"
        print(
            f"  {name:<42}{timing.median:>9.2f}{timing.least:>9.2f}{timing.most:>9.2f}{fraction:>12.1%}"
            f"{rate:>8.2f}{speed:>9.1f}  {differs}",
            flush=True,
        )
    for name, why in outcome.absent.items():
        print(f"  {name:<42}absent: {why}", flush=True)


def print_plans(device: str, outcomes: list[Outcome]) -> None:
    """Lines for gemm_plan.MEASURED: the fastest plan of each shape, from the number of rows before it on."""
    print("\nfor MEASURED in kernels/octavo_kernels/gemm_plan.py:")
    before: dict[str, int] = {}
    for outcome in outcomes:
        facts = outcome.case.facts
        times = {
            name: timing.median for name, timing in outcome.timings.items() if name == "cuBLAS" or " splits " in name
        }
        if outcome.case.bench != "linear" or not times:
            continue
        best = min(times, key=lambda name: times[name])
        words = best.replace("x", " ").split()
        plan = "None"
        if best != "cuBLAS":
            _, m, o, k, _, splits, _, warps, _, stages = words
            plan = f"GemmPlan({m}, {o}, {k}, {splits}, {warps}, {stages})"
        first = before.get(facts["layer"], 0) + 1
        before[facts["layer"]] = facts["m"]
        dtype = "torch.bfloat16"
        print(f'    Measured("{device}", {dtype}, {facts["o"]}, {facts["k"]}, {first}, {facts["m"]}, {plan}),'
              f"  # {times[best]:.2f} µs, cuBLAS {times.get('cuBLAS', float('nan')):.2f}")  # fmt: skip


class Journal:
    """Prints and records outcomes as they come, so that a run that is ended early keeps what it has."""

    def __init__(self, options: argparse.Namespace, header: dict[str, Any], ceilings: Ceilings) -> None:
        self._ceilings = ceilings
        self._invented = options.interpret
        self._run = header["time"]
        self._file: TextIO | None = None
        self.outcomes: list[Outcome] = []
        self.faults: list[str] = []
        self.left_out: list[str] = []
        if options.out:
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(options.out, "a")  # noqa: SIM115 -- closed by end()
        measured = {
            "copy_tb_s": round(ceilings.bytes_per_us / 1e6, 3),
            "bf16_tflop_s": round(ceilings.flops_per_us / 1e6, 1),
            "boundary_us": round(ceilings.boundary_us, 2),
        }
        self._write("run", bench="kernels", **header, benches=options.benches, ceilings=measured)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print_outcome(outcome, self._ceilings)
        case = outcome.case
        place = {"bench": case.bench, "case": case.name}
        for name, timing in outcome.timings.items():
            self._write(
                "time",
                **place,
                **case.facts,
                contender=name,
                us=round(timing.median, 3),
                least_us=round(timing.least, 3),
                most_us=round(timing.most, 3),
                replays=timing.replays,
                of_ceiling=round(fraction_of(case, name, timing.median, self._ceilings), 5),
                bytes=round(case.floor_bytes(name)),
                flops=round(case.flops),
                differs=outcome.differences.get(name),
                wrong=name in outcome.wrong,
                invented=self._invented,
            )
        for name, why in outcome.absent.items():
            self._write("absent", **place, contender=name, why=why)
        for met, texts in ((True, outcome.met), (False, outcome.missed)):
            for text in texts:
                self._write("target", **place, met=met, text=text)

    def end(self) -> int:
        """What is to be said at the end; returns the exit status."""
        wrong = [
            f"{outcome.case.bench} {outcome.case.name}: {name}" for outcome in self.outcomes for name in outcome.wrong
        ]
        self._write("end", faults=self.faults, wrong=wrong, left_out=self.left_out)
        if self._file:
            self._file.close()
        for what, lines in (("left out:", self.left_out), ("FAULT", self.faults), ("WRONG", wrong)):
            for line in lines:
                print(what, line)
        if self._invented:
            print("times are invented: targets are not judged")
        else:
            for outcome in self.outcomes:
                for text in outcome.missed:
                    print(f"target NOT met: {outcome.case.bench} {outcome.case.name}: {text}")
            print(f"targets met: {sum(len(outcome.met) for outcome in self.outcomes)}")
        return 1 if self.faults or wrong or not self.outcomes else 0

    def _write(self, record: str, **fields: Any) -> None:
        if self._file:
            self._file.write(json.dumps({"record": record, "run": self._run, **fields}) + "\n")
            self._file.flush()


if __name__ == "__main__":
    sys.exit(main())
