"""Host cost of a decode step on the kernels' path, without a GPU: everything that the host does but the launches.

    python bench/host.py [--requests 1 64 256] [--steps 300] [--profile]

One engine core with the kernels' runner of a tiny model in Triton's interpreter. After the prompts the launches are
left out, as a GPU would have taken them from a graph, and every row gets some token. In µs per step, medians (p10 to
p90):

    schedule    Scheduler.schedule
    launch      submit: mirrors, diffs, layout, the copies that are started
    read        reading the step's record, mirrors
    update      Scheduler.update and the messages for the front-ends

A GPU never waits for the host as long as their sum is below its own time for a step. Target: 300 µs at 256.
Records go to the end of bench/results/host.jsonl.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import environment
import numpy as np
import torch
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.engine_core.engine_core import EngineCore
from octavo.ipc import AddRequests, EngineCoreRequest
from octavo.types import GenerationParams
from octavo.worker.device_runner import DeviceRunner
from octavo.worker.step_layout import StepShape
from octavo.worker.step_program import StepTensors

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "bench"
PARTS = ("schedule", "launch", "read", "update")
PROMPT_TOKENS = 8


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    print(f"{'requests':>9}{'step':>8}{'p10':>8}{'p90':>8}" + "".join(f"{part:>10}" for part in PARTS))
    cells = []
    for count in options.requests:
        cell = measure(count, options)
        cells.append(cell)
        parts = "".join(f"{cell['parts'][part]:>10.1f}" for part in PARTS)
        print(f"{count:>9}{cell['step']:>8.1f}{cell['p10']:>8.1f}{cell['p90']:>8.1f}{parts}", flush=True)
    if options.out:
        record(Path(options.out), cells)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="where the time goes, by cProfile, which doubles it")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "host.jsonl"), help='"" to write nothing')
    return parser.parse_args()


def measure(count: int, options: argparse.Namespace) -> dict[str, Any]:
    core = make_core(count)
    core.handle(AddRequests(0, [request(key) for key in range(count)]))
    core.step()  # the prompts, on the interpreter
    leave_out_launches(core.runner)
    for _ in range(20):
        core.step()
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    put_clocks(core, times)
    profiler = cProfile.Profile() if options.profile else None
    turns = []
    for _ in range(options.steps):
        if profiler:
            profiler.enable()
        begin = time.perf_counter_ns()
        core.step()
        turns.append((time.perf_counter_ns() - begin) / 1e3)
        if profiler:
            profiler.disable()
    if profiler:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    assert core.scheduler.batch.num_running == count, "a request ended"
    p10, median, p90 = np.percentile(turns, [10, 50, 90]).round(1).tolist()
    parts = {part: round(statistics.median(values), 1) for part, values in times.items()}
    return {"requests": count, "step": median, "p10": p10, "p90": p90, "parts": parts}


def make_core(count: int) -> EngineCore:
    folder = CACHE / "tiny"
    if not (folder / "config.json").exists():
        script = ROOT / "bench" / "peers" / "random_checkpoint.py"
        subprocess.run([sys.executable, script, folder, "tiny"], check=True, stderr=subprocess.DEVNULL)
    return EngineCore(
        EngineConfig(
            model=ModelConfig(path=str(folder), name="tiny", device="interpreter", cuda_graphs=False),
            cache=CacheConfig(num_blocks=32 * count + 8),
            scheduler=SchedulerConfig(max_num_requests=count, max_num_batched_tokens=max(64, PROMPT_TOKENS * count)),
        )
    )


def request(key: int) -> EngineCoreRequest:
    return EngineCoreRequest(
        key=key,
        num_sequences=1,
        prompt_token_ids=np.arange(key, key + PROMPT_TOKENS, dtype=np.int32).tobytes(),
        params=GenerationParams(max_new_tokens=1000, do_sample=True, top_k=50),
        max_total_tokens=1000,
        eos_token_ids=[50256],
        stop_token_ids=[],
        seed=key,
        arrival_time=time.monotonic(),
    )


def leave_out_launches(runner: Any) -> None:
    """Rows get token 1 at once; the state on the device stays as it is."""
    assert isinstance(runner, DeviceRunner)
    results = torch.zeros(1024, 4, dtype=torch.int32)
    results[:, 0] = 1
    nothing = torch.empty(0)
    runner._graphs.run = lambda shape: StepTensors(nothing, nothing, results[: _rows(shape)])  # type: ignore


def _rows(shape: StepShape) -> int:
    return shape.num_rows


def put_clocks(core: EngineCore, times: dict[str, list[float]]) -> None:
    def timed(part: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter_ns()
            try:
                return function(*arguments)
            finally:
                times[part].append((time.perf_counter_ns() - begin) / 1e3)

        return call

    submit = core.runner.submit

    def launch(step: Any) -> Any:
        pending = submit(step)
        pending.result = timed("read", pending.result)  # type: ignore[method-assign]
        return pending

    core.scheduler.schedule = timed("schedule", core.scheduler.schedule)  # type: ignore[method-assign]
    core.scheduler.update = timed("update", core.scheduler.update)  # type: ignore[method-assign]
    core.runner.submit = timed("launch", launch)  # type: ignore[method-assign]


def record(path: Path, cells: list[dict[str, Any]]) -> None:
    header = environment.describe()
    lines = [{"record": "run", **header}, *({"record": "cell", "run": header["time"], **cell} for cell in cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
