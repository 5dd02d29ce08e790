"""octavo over gRPC beside octavo in process and vLLM's gRPC server, under one closed loop of requests.

    python bench/serve.py                              on a GPU gpt2-large, 256 callers; on the CPU gpt2, 16 callers
    python bench/serve.py --workloads 11/64 --concurrency 64

`octavo serve` and `vllm serve --grpc` run on this machine beside one client process of `--concurrency` callers, each
with one request at a time: "stream" makes a StreamGenerate call per request, "session" sends all over one
GenerateSession, "unary" waits for whole answers. In process as many requests may run at once. What the comparison
shows is what gRPC, front-end and client take away; latencies are `octavo bench`'s business. Records go to the end of
bench/results/serve.jsonl.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import environment
import turns
from contenders import Settings, names, prepare_checkpoint, start
from offline import verdict, workloads
from workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ["octavo", "octavo-stream", "octavo-session", "vllm", "vllm-stream"]
PAIRS = [
    ("octavo-stream", "octavo"),
    ("octavo-session", "octavo"),
    ("octavo-unary", "octavo"),
    ("vllm-stream", "vllm"),
    ("octavo-stream", "vllm-stream"),
    ("octavo-session", "vllm-stream"),
]
OVER_GRPC = 0.9
"""Least ratio of octavo over gRPC to octavo in process that is meant to hold, on every workload."""
SETTINGS = ("shape", "concurrency", "rounds", "repeats", "threads", "device", "kv_gib")
"""Options that a record names."""


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and servers are ended
    options = parse()
    count = options.concurrency * options.rounds
    loads = [turns.Load(name, WORKLOADS[name].lengths(count / WORKLOADS[name].requests)) for name in options.workloads]
    settings = Settings(options.threads, options.device, options.concurrency, options.kv_gib)
    checkpoint = prepare_checkpoint(options.shape)
    entries, absent = start(options.contenders, settings, checkpoint=checkpoint, peers=options.peers)
    plan = turns.Plan(options.repeats, options.cell_seconds, f"@{options.concurrency}")
    cells, ratios = turns.take(plan, loads, entries, absent, PAIRS)
    verdicts = judge(ratios)
    if cells:
        header = turns.header(options, SETTINGS, entries, absent)
        turns.append(options.out, header, turns.records(cells, ratios) + verdicts)
    return 0 if any(cell.contender.startswith("octavo-") for cell in cells) else 1


def parse() -> argparse.Namespace:
    on_gpu = bool(environment.gpu_state())
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--contenders", type=names, default=DEFAULT, metavar="A,B,...", help="as bench/cpu.py has them")
    parser.add_argument("--workloads", type=workloads, default=["11/64", "128/128", "chat"], metavar="A,B,...")
    parser.add_argument("--concurrency", type=int, help="callers; default: 256 on a GPU, else 16")
    parser.add_argument("--rounds", type=int, default=5, help="requests of a turn, as a multiple of the callers")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender on each workload")
    parser.add_argument("--cell-seconds", type=float, default=60.0, help="who has used as much takes no further turn")
    parser.add_argument("--shape", help="tiny, gpt2, gpt2-medium, gpt2-large or gpt2-xl; default: gpt2-large or gpt2")
    parser.add_argument("--threads", type=int, default=0, help="OpenMP threads of each; 0: each system's own choice")
    parser.add_argument("--kv-gib", type=int, help="of each system's KV-cache; default: 12 on a GPU, which they share")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="folder of the peers' virtual environments")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "serve.jsonl"), help='"" to write nothing')
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.concurrency = options.concurrency or (256 if cuda else 16)
    options.shape = options.shape or ("gpt2-large" if cuda else "gpt2")
    options.kv_gib = (12 if cuda else 0) if options.kv_gib is None else options.kv_gib
    return options


def judge(ratios: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The target holds on every device."""
    return [
        verdict(f"{ratio['workload']}, {ratio['first']} / octavo", ratio["median"], OVER_GRPC)
        for ratio in ratios
        if ratio["second"] == "octavo" and ratio["first"] in ("octavo-stream", "octavo-session")
    ]


if __name__ == "__main__":
    sys.exit(main())
