"""Host cost of a step without a model: `Scheduler.schedule()` plus `update()`, and `add()` where requests come.

    python bench/scheduler.py [--gate] [--json FILE] [--requests 1 64 256 1024] [--steps 400]

What the model runner would answer is prepared outside the timed part. Scenarios, all with blocks of 32 tokens:

steady      every request decodes; nobody comes or goes
churn       in each step 5 % of the requests end and as many new ones come (64 prompt tokens)
prefix      the same, with prompts of 512 tokens of which 480 are in the prefix cache
preemption  1 % end in each step, and there are 60 % of the blocks that the requests want: they push each other out

`--gate` exits with 1 when the steady median at 256 requests is over 300 µs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from octavo.config import CacheConfig, SchedulerConfig
from octavo.core.scheduler import Scheduler
from octavo.ipc import EngineCoreRequest
from octavo.step import ModelRunnerOutput, SchedulerOutput
from octavo.types import FinishReason, GenerationParams

BLOCK_SIZE = 32
MAX_MODEL_LEN = 1025
VOCAB_SIZE = 50257
GATE_REQUESTS = 256
GATE_US = 300.0


@dataclass(frozen=True)
class Scenario:
    name: str
    prompt_len: int = 64
    shared_len: int = 0
    """Leading tokens that all prompts have in common."""
    new_tokens: int = 128
    """Pool size and, with churn, lengths are made for this many."""
    churn: float = 0.0
    """Part of the requests that end in each step, and as many come."""
    pool: float = 1.25
    """Blocks, as a part of what the requests want when they are at their end."""


SCENARIOS = (
    Scenario("steady", new_tokens=900),
    Scenario("churn", churn=0.05),
    Scenario("prefix", prompt_len=512, shared_len=480, churn=0.05),
    Scenario("preemption", churn=0.01, pool=0.6),
)


@dataclass(frozen=True)
class Result:
    """µs per step."""

    scenario: str
    requests: int
    median: float
    p10: float
    p90: float
    schedule: float
    """Median of schedule() alone."""
    update: float
    rows: float
    """Mean rows per step."""
    preemptions: int
    hit_rate: float


class Workload:
    """A scheduler under a scenario, and the answers of a model that does not exist."""

    def __init__(self, scenario: Scenario, num_requests: int) -> None:
        self.scenario = scenario
        self.num_requests = num_requests
        self.rng = np.random.default_rng(0)
        self.shared = self.rng.integers(0, VOCAB_SIZE, scenario.shared_len, np.int32)
        self.max_total = scenario.prompt_len + scenario.new_tokens
        wanted = num_requests * -(-self.max_total // BLOCK_SIZE)
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_requests=num_requests, max_num_batched_tokens=max(2048, 8 * num_requests)),
            CacheConfig(block_size=BLOCK_SIZE),
            num_blocks=max(int(wanted * scenario.pool), -(-MAX_MODEL_LEN // BLOCK_SIZE)),
            max_model_len=MAX_MODEL_LEN,
        )
        self._next_key = 0

    def requests(self, count: int) -> list[EngineCoreRequest]:
        return [self._request() for _ in range(count)]

    def _request(self) -> EngineCoreRequest:
        own = self.rng.integers(0, VOCAB_SIZE, self.scenario.prompt_len - len(self.shared), np.int32)
        self._next_key += 1
        return EngineCoreRequest(
            key=self._next_key,
            prompt_token_ids=np.concatenate([self.shared, own]).tobytes(),
            params=GenerationParams(),
            max_total_tokens=self.max_total,
            eos_token_ids=[VOCAB_SIZE - 1],
            stop_token_ids=[],
            seed=self._next_key,
            arrival_time=time.monotonic(),
        )

    def answer(self, step: SchedulerOutput) -> tuple[ModelRunnerOutput, int]:
        """What a runner would return, and how many requests end in it."""
        token_ids = self.rng.integers(0, VOCAB_SIZE, step.num_rows, np.int32)
        token_ids[~step.samples] = -1
        finish = np.zeros(step.num_rows, np.uint8)
        if self.scenario.churn:
            lengths = step.num_computed + step.num_scheduled + 1
            finish[step.samples & (lengths >= self.max_total)] = FinishReason.LENGTH
            finish[step.samples & (self.rng.random(step.num_rows) < self.scenario.churn)] = FinishReason.EOS
        return ModelRunnerOutput(token_ids, finish), int(np.count_nonzero(finish))

    def fill(self) -> None:
        """Until every request decodes."""
        self.scheduler.add(0, self.requests(self.num_requests))
        for _ in range(20 + 2 * self.num_requests * self.scenario.prompt_len // 2048):
            step = self.scheduler.schedule(time.monotonic())
            assert step is not None
            output, ended = self.answer(step)
            self.scheduler.update(step, output, time.monotonic())
            self.scheduler.add(0, self.requests(ended))


def measure(scenario: Scenario, num_requests: int, num_steps: int) -> Result:
    work = Workload(scenario, num_requests)
    work.fill()
    scheduler, clock = work.scheduler, time.perf_counter_ns
    before = scheduler.load(time.monotonic())
    times = np.zeros((num_steps, 3))  # add, schedule, update
    rows = 0
    arriving: list[EngineCoreRequest] = []
    gc.collect()
    for i in range(num_steps):
        now = time.monotonic()
        start = clock()
        if arriving:
            scheduler.add(0, arriving)
        added = clock()
        step = scheduler.schedule(now)
        scheduled = clock()
        assert step is not None, "nothing to do"
        output, ended = work.answer(step)
        arriving = work.requests(ended)
        begin = clock()
        scheduler.update(step, output, now)
        end = clock()
        times[i] = added - start, scheduled - added, end - begin
        rows += step.num_rows
    times /= 1e3
    p10, median, p90 = np.percentile(times.sum(axis=1), [10, 50, 90]).tolist()
    after = scheduler.load(time.monotonic())
    return Result(
        scenario=scenario.name,
        requests=num_requests,
        median=round(median, 1),
        p10=round(p10, 1),
        p90=round(p90, 1),
        schedule=round(float(np.median(times[:, 1])), 1),
        update=round(float(np.median(times[:, 2])), 1),
        rows=round(rows / num_steps, 1),
        preemptions=after.preemptions - before.preemptions,
        hit_rate=round(
            (after.prefix_cache_hits - before.prefix_cache_hits)
            / max(after.prefix_cache_queries - before.prefix_cache_queries, 1),
            3,
        ),
    )


def environment() -> dict[str, object]:
    """What a number depends on."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git.stdout.strip(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64, 256, 1024], help="running requests")
    parser.add_argument("--scenarios", nargs="+", choices=[s.name for s in SCENARIOS], help="default: all")
    parser.add_argument("--steps", type=int, default=400, help="timed steps, at most 700")
    parser.add_argument("--json", metavar="FILE", help="append a record to this file")
    parser.add_argument("--gate", action="store_true", help=f"fail over {GATE_US:.0f} µs at {GATE_REQUESTS} steady")
    options = parser.parse_args()
    header = environment()
    print("  ".join(f"{name} {value}" for name, value in header.items()))
    print(f"\n{'µs per step':12}{'requests':>9}{'median':>9}{'p10':>8}{'p90':>8}   schedule  update   rows  preempted")
    results = []
    for scenario in SCENARIOS:
        if options.scenarios and scenario.name not in options.scenarios:
            continue
        for num_requests in options.requests:
            r = measure(scenario, num_requests, min(options.steps, 700))
            results.append(r)
            print(
                f"{r.scenario:12}{r.requests:9}{r.median:9.1f}{r.p10:8.1f}{r.p90:8.1f}{r.schedule:11.1f}{r.update:8.1f}"
                f"{r.rows:7.0f}{r.preemptions:11}" + (f"   hit rate {r.hit_rate:.2f}" if r.hit_rate else ""),
                flush=True,
            )
    if options.json:
        with open(options.json, "a") as file:
            file.write(json.dumps({"bench": "scheduler", **header, "results": [asdict(r) for r in results]}) + "\n")
    gated = [r.median for r in results if r.scenario == "steady" and r.requests == GATE_REQUESTS]
    if options.gate:
        if not gated:
            parser.error(f"--gate needs the steady scenario at {GATE_REQUESTS} requests")
        passed = min(gated) <= GATE_US
        print(f"\ngate: {min(gated):.1f} µs, limit {GATE_US:.0f} µs: {'passed' if passed else 'MISSED'}")
        return 0 if passed else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
