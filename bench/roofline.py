"""The ceilings of a GPU and what launches cost on it: what every other number is to be compared with.

    python bench/roofline.py [--out FILE]

copy        TB/s of a large device-to-device copy, bytes read and written: the ceiling of memory-bound kernels
read        TB/s of reading alone
l2 read     TB/s of reading 16 MiB again and again
bf16        TFLOP/s of an 8192 x 8192 x 8192 product of random numbers
boundary    µs per kernel of a graph of tiny kernels: what each kernel costs beyond its work
eager       µs of the host to launch one kernel, of torch and of Triton
replay      µs of the host to replay a graph of 260 kernels

Random data: on zeros GPUs run faster. Medians of several runs, least and most beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import torch
import triton
import triton.language as tl
from gpu_timing import GraphClock, Timing, Work, host_us

ROOT = Path(__file__).resolve().parents[1]
COPY_BYTES = 1 << 30
MATRIX = 8192
CHAIN = 400
REPLAYED = 260
"""Kernels of a decode step of gpt2-large: 36 layers of 7, and 8 more."""


@dataclass(frozen=True)
class Ceilings:
    """What the GPU at hand can do."""

    bytes_per_us: float
    flops_per_us: float
    boundary_us: float

    def floor_us(self, num_bytes: float, flops: float) -> float:
        """No kernel that moves and computes this much is faster."""
        return max(num_bytes / self.bytes_per_us, flops / self.flops_per_us)


FAKE = Ceilings(bytes_per_us=3.0e6, flops_per_us=8.0e8, boundary_us=2.0)
"""About an H100's: for tests without a GPU."""


@triton.jit
def tiny_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)


def once(run: Callable[[], object], launches: int = 1, rounds: int = 7) -> Timing:
    """µs per launch; `run` makes `launches` of them."""
    timings, absent = GraphClock(rounds).times({"": Work(lambda copy: run())}, copies=16)
    if absent:
        raise RuntimeError(absent[""])
    timing = timings[""]
    return Timing(timing.median / launches, timing.least / launches, timing.most / launches, timing.replays)


def measure_ceilings(rounds: int = 5) -> Ceilings:
    """The three that the kernels' benchmarks need; about two seconds."""
    copied, multiplied = copy_time(rounds), product_time(rounds)
    torch.cuda.empty_cache()
    return Ceilings(2 * COPY_BYTES / copied.median, 2 * MATRIX**3 / multiplied.median, boundary().median)


def copy_time(rounds: int = 7) -> Timing:
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return once(lambda: target.copy_(source), rounds=rounds)


def product_time(rounds: int = 7) -> Timing:
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return once(lambda: a @ b, rounds=rounds)


def boundary() -> Timing:
    counter = torch.zeros(32, dtype=torch.int32, device="cuda")

    def chain() -> None:
        for _ in range(CHAIN // 16):
            tiny_kernel[(1,)](counter, num_warps=1)

    return once(chain, CHAIN // 16)


def measure_all() -> list[dict[str, Any]]:
    large = torch.randn(COPY_BYTES // 4, device="cuda")
    small = large[: 4 << 20]
    found = [
        rate("copy", "TB/s", 2 * COPY_BYTES / 1e6, copy_time()),
        rate("read", "TB/s", COPY_BYTES / 1e6, once(large.sum)),
        rate("l2 read", "TB/s", small.nbytes / 1e6, once(small.sum)),
        rate("bf16", "TFLOP/s", 2 * MATRIX**3 / 1e6, product_time()),
        cost("boundary", boundary()),
    ]
    counter = torch.zeros(32, dtype=torch.int32, device="cuda")
    one = torch.zeros(1, device="cuda")
    row = torch.randn(1, 1280, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1280, 1280, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPLAYED):
            tiny_kernel[(1,)](counter, num_warps=1)
    for what, call, repeats in (
        ("eager add_", lambda: one.add_(1), 1000),
        ("eager Triton kernel", lambda: tiny_kernel[(1,)](counter, num_warps=1), 1000),
        ("eager linear", lambda: torch.nn.functional.linear(row, weight), 1000),
        (f"replay of {REPLAYED} kernels", graph.replay, 50),
    ):
        times = [host_us(call, repeats) for _ in range(5)]
        found.append(cost(f"{what}, host", Timing(sorted(times)[2], min(times), max(times), 5)))
    return found


def rate(what: str, unit: str, amount: float, timing: Timing) -> dict[str, Any]:
    """amount: of the unit times a µs."""
    values = (amount / timing.median, amount / timing.most, amount / timing.least)
    return {"what": what, "unit": unit} | dict(zip(("median", "least", "most"), map(_rounded, values), strict=True))


def cost(what: str, timing: Timing) -> dict[str, Any]:
    values = (timing.median, timing.least, timing.most)
    return {"what": what, "unit": "µs"} | dict(zip(("median", "least", "most"), map(_rounded, values), strict=True))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Header of a record: machine, device, versions, commit."""
    header = environment.describe()
    header["torch"], header["triton"] = torch.__version__, triton.__version__
    if device.type != "cuda":
        return header | {"device": "interpreter"}
    properties = torch.cuda.get_device_properties(device)
    return header | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20),
        "cuda": torch.version.cuda,
        "gpu": environment.gpu_state(),
    }


def append(path: str, lines: list[dict[str, Any]]) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    print(f"appended {len(lines)} records to {file.name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "roofline.jsonl"), help='"": write nothing')
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 2
    header = describe_gpu(torch.device("cuda"))
    print(f"{header['device']}, torch {header['torch']}, triton {header['triton']}, commit {header['commit']}")
    found = measure_all()
    for line in found:
        print(f"{line['what']:<28}{line['median']:>10} {line['unit']:<8} ({line['least']} to {line['most']})")
    if options.out:
        run = header["time"]
        append(options.out, [{"record": "run", "run": run, "bench": "roofline", **header}]
               + [{"record": "ceiling", "run": run, **line} for line in found])  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
