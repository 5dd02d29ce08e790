"""What the prefix cache is worth: prompts with a common beginning, with the cache on and off, in turns.

    python bench/prefix.py                       512 common tokens, 64 of one's own, 64 new; 64 requests, on a GPU 256
    python bench/prefix.py --shared 256 --own 16 --new 32 --requests 16

Two engines in this process, alike but for the cache, get the same requests, all at once; the common beginning is
another one in every turn, so that the first of its requests finds nothing. On a GPU there is a third, "apart": with the
cache, but decode attention reads the common blocks for each request anew (`--no-shared-prefix-attention`). Tokens per
second, time to the first token (from handing all requests over), hit rate as the scheduler counts it. Every answer must
be the same in all engines: exactly in float32; in other types equal batches may round differently, and the part that is
the same is reported. Records go to the end of bench/results/prefix.jsonl.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import environment
import numpy as np
import turns
from contenders import agreement, prepare_checkpoint
from octavo.ipc import EngineCoreOutputs
from octavo.llm import LLM
from workloads import LARGEST_TOKEN

ROOT = Path(__file__).resolve().parents[1]
PERCENTS = (50, 99)
ENGINES: dict[str, dict[str, bool]] = {
    "on": {},
    "off": {"enable_prefix_caching": False},
    "apart": {"shared_prefix_attention": False},
}
MISSES = 16
"""Requests that may find nothing, as they enter before the first one's blocks are full."""


@dataclass
class Turns:
    """All turns of one engine."""

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Seconds to the first token, of all requests of all turns."""
    hit_rate: float = 0.0


def main() -> int:
    options = parse()
    names = list(ENGINES) if options.on_gpu else ["on", "off"]
    engines = {name: make(options, ENGINES[name]) for name in names}
    found = {name: Turns() for name in engines}
    for llm in engines.values():
        run(llm, prompts(options, -1)[:2], min(options.new, 4))  # warm-up
    before = {name: counted(llm) for name, llm in engines.items()}
    same: dict[str, list[float]] = {name: [] for name in names[1:]}
    for turn in range(options.repeats):
        asked, answers = prompts(options, turn), {}
        for name in list(engines) if turn % 2 == 0 else list(engines)[::-1]:
            seconds, first, answers[name] = run(engines[name], asked, options.new)
            found[name].seconds.append(seconds)
            found[name].first += first
        for name, parts in same.items():
            parts.append(agreement(answers["on"], answers[name]))
    for name, llm in engines.items():
        hits, queries = (after - start for after, start in zip(counted(llm), before[name], strict=True))
        found[name].hit_rate = hits / max(1, queries)
    info = engines["on"].info
    equal = {name: min(parts) for name, parts in same.items()}
    lines = report(options, found, equal, info.dtype)
    header = environment.describe() | {"device": info.device, "gpu": environment.gpu_state(), "dtype": info.dtype}
    header["settings"] = {name: getattr(options, name) for name in ("shape", "shared", "own", "new", "requests")}
    for llm in engines.values():
        llm.close()
    turns.append(options.out, header, lines)
    if info.dtype == "float32" and min(equal.values()) < 1:
        print(f"other tokens than with the prefix cache: {equal}", file=sys.stderr)
        return 1
    return 0


def parse() -> argparse.Namespace:
    on_gpu = bool(environment.gpu_state())
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--shape", default="gpt2-large" if on_gpu else "gpt2", help="as peers/random_checkpoint.py has")
    parser.add_argument("--shared", type=int, default=512, help="tokens that all prompts of a turn begin with")
    parser.add_argument("--own", type=int, default=64, help="tokens that follow")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=256 if on_gpu else 64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "prefix.jsonl"), help='"" to write nothing')
    options = parser.parse_args()
    options.on_gpu = on_gpu and options.device in ("auto", "cuda")
    return options


def make(options: argparse.Namespace, settings: dict[str, bool]) -> LLM:
    """An engine whose cache holds all requests at once; one that shares blocks needs fewer."""
    own = -(-(options.own + options.new) // 32) + 2
    shared = options.shared // 32
    misses = options.requests if settings.get("enable_prefix_caching") is False else min(MISSES, options.requests)
    return LLM(
        str(prepare_checkpoint(options.shape)),
        device=options.device,
        dtype=options.dtype,
        num_threads=options.threads,
        num_blocks=options.requests * own + misses * shared,
        max_num_requests=options.requests,
        **settings,
    )


def prompts(options: argparse.Namespace, turn: int) -> list[list[int]]:
    source = random.Random(f"prefix {turn}")
    shared = [source.randrange(LARGEST_TOKEN) for _ in range(options.shared)]
    return [shared + [source.randrange(LARGEST_TOKEN) for _ in range(options.own)] for _ in range(options.requests)]


def run(llm: LLM, asked: list[list[int]], new_tokens: int) -> tuple[float, list[float], list[list[int]]]:
    """Seconds, seconds to each request's first token, and the answers."""
    first: dict[int, float] = {}
    core, step = llm.core, llm.core.step
    begin = time.perf_counter()

    def watched() -> Any:
        messages = step()
        now = time.perf_counter() - begin
        for message in (message for part in messages.values() for message in part):
            if isinstance(message, EngineCoreOutputs):
                for key in np.frombuffer(message.keys, np.int64).tolist():
                    first.setdefault(key, now)
        return messages

    core.step = watched  # type: ignore[method-assign]
    try:
        outputs = llm.generate(asked, max_new_tokens=new_tokens, ignore_eos=True)
    finally:
        del core.step  # type: ignore[attr-defined]
    return time.perf_counter() - begin, list(first.values()), [list(output.token_ids) for output in outputs]


def counted(llm: LLM) -> tuple[int, int]:
    """Prompt tokens found in the prefix cache so far, and those looked for."""
    load = llm.core.scheduler.load(time.monotonic())
    return load.prefix_cache_hits, load.prefix_cache_queries


def report(
    options: argparse.Namespace, found: dict[str, Turns], equal: dict[str, float], dtype: str
) -> list[dict[str, Any]]:
    """equal: of each engine but the first, the least part of its tokens in a turn that are those of the first."""
    tokens = options.requests * options.new
    lines: list[dict[str, Any]] = []
    print(
        f"{options.requests} requests, {options.shared} shared + {options.own} own + {options.new} new tokens, {dtype}"
    )
    for name, part in found.items():
        rates = [tokens / seconds for seconds in part.seconds]
        p50, p99 = np.percentile(part.first, PERCENTS).tolist()
        median, least, most = statistics.median(rates), min(rates), max(rates)
        print(
            f"cache {name:<6} {median:8.0f} output tokens/s ({least:.0f} to {most:.0f})   first token p50 "
            f"{p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms   hit rate {part.hit_rate:.3f}"
        )
        lines.append(
            {
                "record": "cell",
                "cache": name,
                "output_tokens_per_second": median,
                "seconds": part.seconds,
                "first_token_p50_ms": p50 * 1e3,
                "first_token_p99_ms": p99 * 1e3,
                "hit_rate": part.hit_rate,
            }
        )
    for name, same in equal.items():
        ratios = [other / on for on, other in zip(found["on"].seconds, found[name].seconds, strict=True)]
        low, high = turns.interval(ratios)
        print(
            f"on / {name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), median within "
            f"{low:.2f} to {high:.2f}; least part of equal tokens in a turn: {same:.4f}"
        )
        ratio = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        line = {"record": "ratio", "first": "on", "second": name, **ratio, "interval": [low, high]}
        lines.append(line | {"equal_tokens": same})
    return lines


if __name__ == "__main__":
    sys.exit(main())
