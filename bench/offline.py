"""Offline throughput by workload: octavo in process beside transformers, vLLM and CTranslate2, in turns.

    python bench/offline.py                                  on a GPU gpt2-large in bf16; on the CPU gpt2, 1/64 of it
    python bench/offline.py --workloads 11/64,chat --contenders octavo,vllm

All requests of a workload are handed over at once; a time ends with the last answer. Greedy, end of sequence ignored,
prefix caches off, random weights and prompts. Before the turns each contender's first tokens are compared with those of
transformers in fp32 (`as fp32`; near ties of random weights differ between types). Records go to the end of
bench/results/offline.jsonl.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import environment
import turns
from contenders import Settings, names, prepare_checkpoint, start
from workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
CONTENDERS_OF = {
    "cuda": ["octavo", "vllm", "transformers", "transformers-continuous", "ctranslate2"],
    "cpu": ["octavo", "octavo-int8", "vllm", "transformers", "ctranslate2-int8"],
}
WORKLOADS_OF = {"cuda": list(WORKLOADS), "cpu": ["11/64", "128/128", "512/512", "900/64", "chat", "single", "prefill"]}
"""A 64th of batch-64 is one request, of batch-256 what 900/64 shows as well."""
PAIRS = [
    ("octavo", "vllm"),
    ("octavo", "transformers"),
    ("octavo", "transformers-fp32"),
    ("octavo", "transformers-continuous"),
    ("octavo", "ctranslate2"),
    ("octavo-int8", "ctranslate2-int8"),
    ("octavo-fp8-cache", "octavo"),
]
H100_RATES = {
    "single": 1_000,
    "batch-64": 30_000,
    "batch-256": 44_000,
    "11/64": 100_000,
    "128/128": 45_000,
    "chat": 34_000,
    "prefill": 280_000,
}
"""Tokens per second that octavo is meant to have with gpt2-large in bf16: output, for prefill total."""
H100_RATIO = 1.5
"""Over vLLM, on each workload."""
SETTINGS = ("shape", "scale", "repeats", "threads", "device", "max_requests", "kv_gib")
"""Options that a record names."""


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended
    options = parse()
    loads = [turns.Load(name, WORKLOADS[name].lengths(options.scale)) for name in options.workloads]
    checkpoint = prepare_checkpoint(options.shape)
    settings = Settings(options.threads, options.device, options.max_requests, options.kv_gib)
    reference_only = turns.REFERENCE not in options.contenders
    started = options.contenders + ([turns.REFERENCE] if reference_only and not options.no_check else [])
    entries, absent = start(started, settings, checkpoint=checkpoint, peers=options.peers)
    plan = turns.Plan(options.repeats, options.cell_seconds, reference_only=reference_only)
    cells, ratios = turns.take(plan, loads, entries, absent, PAIRS)
    header = turns.header(options, SETTINGS, entries, absent)
    verdicts = judge(header["device"], options, cells, ratios)
    if cells:
        turns.append(options.out, header, turns.records(cells, ratios) + verdicts)
    return 0 if any(cell.contender.startswith("octavo") for cell in cells) else 1


def parse() -> argparse.Namespace:
    on_gpu = bool(environment.gpu_state())
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--contenders", type=names, metavar="A,B,...", help="as bench/cpu.py has them")
    parser.add_argument("--workloads", type=workloads, metavar="A,B,...", help="of bench/workloads.py")
    parser.add_argument("--scale", type=float, help="of the number of requests; default: 1 on a GPU, else 1/64")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender on each workload")
    parser.add_argument("--cell-seconds", type=float, default=60.0, help="who has used as much takes no further turn")
    parser.add_argument("--no-check", action="store_true", help="no comparison of tokens with transformers in fp32")
    parser.add_argument("--shape", help="tiny, gpt2, gpt2-medium, gpt2-large or gpt2-xl; default: gpt2-large or gpt2")
    parser.add_argument("--threads", type=int, default=0, help="OpenMP threads of each; 0: each system's own choice")
    parser.add_argument("--max-requests", type=int, default=0, help="sequences at once; 0: each system's own choice")
    parser.add_argument("--kv-gib", type=int, help="of each system's KV-cache; default: 16 on a GPU, which they share")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="folder of the peers' virtual environments")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "offline.jsonl"), help='"" to write nothing')
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.contenders = options.contenders or CONTENDERS_OF[options.device]
    options.workloads = options.workloads or WORKLOADS_OF[options.device]
    options.shape = options.shape or ("gpt2-large" if cuda else "gpt2")
    options.scale = options.scale or (1.0 if cuda else 1 / 64)
    options.kv_gib = (16 if cuda else 0) if options.kv_gib is None else options.kv_gib
    return options


def workloads(text: str) -> list[str]:
    for name in text.split(","):
        if name not in WORKLOADS:
            raise argparse.ArgumentTypeError(f"no workload {name}; there are {', '.join(WORKLOADS)}")
    return text.split(",")


def judge(
    device: str, options: argparse.Namespace, cells: Sequence[turns.Cell], ratios: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Targets met or not. They are for gpt2-large on an H100, whole workloads; elsewhere there are none."""
    if "H100" not in device or options.shape != "gpt2-large" or options.scale != 1:
        return []
    verdicts: list[dict[str, Any]] = []
    for cell in cells:
        target = H100_RATES.get(cell.load.name)
        if cell.contender == "octavo" and target:
            rates = cell.total_rates if cell.load.name == "prefill" else cell.output_rates
            verdicts.append(verdict(f"{cell.load.name}, tokens/s", statistics.median(rates), target))
    for ratio in ratios:
        if (ratio["first"], ratio["second"]) == ("octavo", "vllm"):
            verdicts.append(verdict(f"{ratio['workload']}, octavo / vllm", ratio["median"], H100_RATIO))
    return verdicts


def verdict(what: str, value: float, target: float) -> dict[str, Any]:
    met = value >= target
    print(f"target: {what} >= {target}: {value:.2f}, {'met' if met else 'NOT met'}")
    return {"record": "target", "what": what, "value": value, "target": target, "met": met}


if __name__ == "__main__":
    sys.exit(main())
