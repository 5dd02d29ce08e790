"""Where the time of a decode step goes: scheduler, launch, device, reading, and how far the device is from its floor.

    python bench/step.py                                  gpt2's shape on the CPU; gpt2-large's in bf16 on a GPU
    python bench/step.py --batches 1,64 --contexts 64,256
    python bench/step.py --kv-cache-dtype fp8             of the cache, else the model's type
    python bench/step.py --profile step.txt --trace step.json.gz    also a table of kernels, a Chrome trace
    python bench/step.py --device cpu --parts             also the CPU path's parts, with a floor of each

One engine core, in process, without front-end; requests with prompts of `context` tokens decode, prefix cache off. Per
step, in ms, medians over `--steps`:

    step       from one turn of the loop to the next
    schedule, launch, read, update    the host's parts; where launching is computing (CPU) launch is the device's time
    device     CUDA events around the launches; on the CPU the launch
    bubble     the part of the step in which the device had nothing to do
    floor      weights and cached keys and values once, at the copy bandwidth measured at the start

Records go to the end of bench/results/step.jsonl.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import environment
import msgspec
import numpy as np
import step_parts
import torch
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.engine_core.engine_core import EngineCore
from octavo.ipc import AbortCause, AbortSequences, AddRequests, EngineCoreRequest
from octavo.types import GenerationParams

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "bench"
RESULTS = ROOT / "bench" / "results"
PARTS = ("schedule", "launch", "read", "update")
LARGEST_TOKEN = 50_000
COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}


@dataclass
class Cell:
    """Medians, ms."""

    batch: int
    context: int
    step: float
    device: float
    floor: float
    parts: dict[str, float]
    p10: float
    p90: float
    """Of `step`."""
    inside: list[step_parts.Part] = field(default_factory=list)
    """With --parts."""

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.step * 1e3

    @property
    def bubble(self) -> float:
        return max(0.0, 1 - self.device / self.step)


@dataclass
class Clock:
    """Times of the parts of each step, from wrappers around the core's own calls."""

    times: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def wrap(self, core: EngineCore) -> None:
        scheduler, runner, times = core.scheduler, core.runner, self.times
        schedule, submit, update = scheduler.schedule, runner.submit, scheduler.update

        def timed(part: str, function: Any) -> Any:
            def call(*arguments: Any) -> Any:
                begin = time.perf_counter()
                try:
                    return function(*arguments)
                finally:
                    times[part].append((time.perf_counter() - begin) * 1e3)

            return call

        def launch(step: Any) -> Any:
            if torch.cuda.is_available():
                events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                events[0].record()
                pending = submit(step)
                events[1].record()
                self.events.append(events)
            else:
                pending = submit(step)
            pending.result = timed("read", pending.result)
            return pending

        scheduler.schedule = timed("schedule", schedule)  # type: ignore[method-assign]
        scheduler.update = timed("update", update)  # type: ignore[method-assign]
        runner.submit = timed("launch", launch)  # type: ignore[method-assign]

    def clear(self) -> None:
        for values in self.times.values():
            values.clear()
        self.events.clear()

    def device_ms(self) -> float:
        if not self.events:
            return statistics.median(self.times["launch"])
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in self.events)


def main() -> int:
    options = parse()
    core = make_core(options)
    clock = Clock()
    clock.wrap(core)
    inside = step_parts.PartTimes(core) if options.parts else None
    bandwidth, rates = copy_bandwidth(), step_parts.measure_rates(core) if inside else None
    types = f"{core.info.dtype}, cache {core.info.kv_cache_dtype}"
    print(f"{core.info.device}, {types}, {options.shape}; copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    print(
        f"{'batch':>6}{'context':>8}{'step':>9}{'p10':>8}{'p90':>8}" + "".join(f"{part:>9}" for part in PARTS), end=""
    )
    print(f"{'device':>9}{'bubble':>8}{'floor':>8}{'of floor':>9}{'tok/s':>9}")
    cells = []
    for batch in options.batches:
        for context in options.contexts:
            cell = measure(core, clock, batch, context, options.steps, bandwidth, inside)
            if inside and rates:
                cell.inside = inside.parts(batch, context + options.steps // 2, rates)
            cells.append(cell)
            print(
                f"{batch:>6}{context:>8}{cell.step:>9.3f}{cell.p10:>8.3f}{cell.p90:>8.3f}"
                + "".join(f"{cell.parts[part]:>9.3f}" for part in PARTS)
                + f"{cell.device:>9.3f}{cell.bubble:>8.1%}{cell.floor:>8.3f}{cell.floor / cell.step:>9.1%}"
                f"{cell.tokens_per_second:>9.0f}",
                flush=True,
            )
            step_parts.print_parts(cell.inside)
    if options.profile or options.trace:
        profile(core, options)
    if options.out:
        record(options, core, bandwidth, cells)
    core.close()
    return 0


def parse() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batches", type=numbers, default=[1, 8, 64, 256] if on_gpu else [1, 4, 16, 64])
    parser.add_argument("--contexts", type=numbers, default=[64, 256, 512] if on_gpu else [64, 256])
    parser.add_argument("--steps", type=int, default=100 if on_gpu else 20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto" if not on_gpu else "bfloat16")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--shape", default="gpt2-large" if on_gpu else "gpt2", help="as peers/random_checkpoint.py has")
    parser.add_argument("--no-graphs", action="store_true", help="launch kernel by kernel")
    parser.add_argument("--parts", action="store_true", help="of the CPU path: norms, linear layers, attention, ...")
    parser.add_argument("--profile", metavar="FILE", help="table of operators of the last cell's steps")
    parser.add_argument("--trace", metavar="FILE", help="Chrome trace of them, .json or .json.gz")
    parser.add_argument("--out", default=str(RESULTS / "step.jsonl"), help='"" to write nothing')
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def checkpoint(shape: str) -> Path:
    folder = CACHE / shape
    if not (folder / "config.json").exists():
        script = ROOT / "bench" / "peers" / "random_checkpoint.py"
        subprocess.run([sys.executable, script, folder, shape], check=True, stderr=subprocess.DEVNULL)
    return folder


def make_core(options: argparse.Namespace, **fields: Any) -> EngineCore:
    """fields: more of the ModelConfig."""
    model = ModelConfig(
        path=str(checkpoint(options.shape)),
        name=options.shape,
        device=options.device,
        dtype=options.dtype,
        num_threads=options.threads,
        cuda_graphs=not options.no_graphs,
        **fields,
    )
    scheduler = SchedulerConfig(max_num_requests=max(options.batches), max_queue_time=3600.0)
    cache = CacheConfig(enable_prefix_caching=False, kv_cache_dtype=options.kv_cache_dtype)
    if options.device != "auto" or not torch.cuda.is_available():
        per_request = -(-(max(options.contexts) + options.steps + 40) // cache.block_size)
        cache = msgspec.structs.replace(cache, num_blocks=max(options.batches) * per_request + 64)
    return EngineCore(EngineConfig(model=model, cache=cache, scheduler=scheduler), print)


def copy_bandwidth() -> float:
    """Bytes per second, read and written together, of a large copy."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.zeros(COPY_BYTES[kind] // 2, dtype=torch.uint8, device=kind)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(6):
        if kind == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source)
        if kind == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * source.nbytes / (time.perf_counter() - begin))
    return best


def measure(
    core: EngineCore,
    clock: Clock,
    batch: int,
    context: int,
    steps: int,
    bandwidth: float,
    inside: step_parts.PartTimes | None = None,
) -> Cell:
    """Fills the engine, lets it settle, and times steps."""
    add_requests(core, batch, context)
    while core.scheduler.load(time.monotonic()).waiting_requests or not settled(core, batch):
        core.step()
    for _ in range(5):
        core.step()
    clock.clear()
    if inside:
        inside.clear()
    turns = []
    for _ in range(steps):
        begin = time.perf_counter()
        core.step()
        turns.append((time.perf_counter() - begin) * 1e3)
        if inside:
            inside.end_step(turns[-1])
    p10, median, p90 = np.percentile(turns, [10, 50, 90]).tolist()
    cell = Cell(
        batch=batch,
        context=context,
        step=median,
        device=clock.device_ms(),
        floor=step_bytes(core, batch, context + steps // 2) / bandwidth * 1e3,
        parts={part: statistics.median(clock.times[part]) for part in PARTS},
        p10=p10,
        p90=p90,
    )
    core.handle(AbortSequences(0, list(range(batch)), AbortCause.CLIENT))
    while core.scheduler.has_work:
        core.step()
    return cell


def add_requests(core: EngineCore, batch: int, context: int) -> None:
    rng = np.random.default_rng(0)
    vocab = min(LARGEST_TOKEN, core.info.vocab_size)
    requests = [
        EngineCoreRequest(
            key=key,
            num_sequences=1,
            prompt_token_ids=rng.integers(0, vocab, context, np.int32).tobytes(),
            params=GenerationParams(max_new_tokens=core.info.max_model_len - context),
            max_total_tokens=core.info.max_model_len,
            eos_token_ids=[],
            stop_token_ids=[],
            seed=key,
            arrival_time=time.monotonic(),
        )
        for key in range(batch)
    ]
    core.handle(AddRequests(0, requests))


def settled(core: EngineCore, batch: int) -> bool:
    """Whether every request decodes."""
    running, order = core.scheduler.batch, core.scheduler.batch.order
    return len(order) == batch and bool((running.num_tokens[order] - running.num_computed[order] <= 1).all())


def step_bytes(core: EngineCore, batch: int, context: int) -> float:
    """What a decode step has to read: every weight but the position table and, if it is tied, one copy of wte."""
    itemsize, cache_itemsize = (getattr(torch, name).itemsize for name in (core.info.dtype, core.info.kv_cache_dtype))
    spec = json.loads((CACHE / core.info.model / "config.json").read_text())
    weights = (core.info.num_parameters - spec["n_positions"] * spec["n_embd"]) * itemsize
    cache = 2 * spec["n_layer"] * spec["n_embd"] * cache_itemsize * context * batch
    return float(weights + cache)


def profile(core: EngineCore, options: argparse.Namespace) -> None:
    """Operators of a few steps at the largest batch and context."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    add_requests(core, options.batches[-1], options.contexts[-1])
    while not settled(core, options.batches[-1]):
        core.step()
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with torch_profile(activities=activities) as profiler:
        for _ in range(5):
            core.step()
    sort_by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=sort_by, row_limit=25, max_name_column_width=60)
    head = (
        f"5 steps, batch {options.batches[-1]}, context {options.contexts[-1]}, {core.info.device}, {core.info.dtype}"
    )
    if options.profile:
        Path(options.profile).write_text(f"{head}\n{table}\n")
    if options.trace:
        profiler.export_chrome_trace(options.trace.removesuffix(".gz"))
        if options.trace.endswith(".gz"):
            plain = Path(options.trace.removesuffix(".gz"))
            Path(options.trace).write_bytes(gzip.compress(plain.read_bytes()))
            plain.unlink()


def record(options: argparse.Namespace, core: EngineCore, bandwidth: float, cells: list[Cell]) -> None:
    header = environment.describe() | facts(options, core) | {"copy_gb_per_s": round(bandwidth / 1e9, 1)}
    lines = [{"record": "run", **header}]
    for cell in cells:
        values = asdict(cell) | {"tokens_per_second": cell.tokens_per_second, "bubble": cell.bubble}
        inside = values.pop("inside")
        lines.append({"record": "cell", "run": header["time"], **rounded(values)})
        place = {"run": header["time"], "batch": cell.batch, "context": cell.context}
        lines += [{"record": "part", **place, **rounded(part)} for part in inside]
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


def facts(options: argparse.Namespace, core: EngineCore) -> dict[str, Any]:
    """What a header says of the engine."""
    return {
        "device": core.info.device,
        "gpu": environment.gpu_state(),
        "dtype": core.info.dtype,
        "kv_cache_dtype": core.info.kv_cache_dtype,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "shape": options.shape,
        "graphs": not options.no_graphs,
    }


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return rounded(value)
        return round(value, 4) if isinstance(value, float) else value

    return {name: of(value) for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
