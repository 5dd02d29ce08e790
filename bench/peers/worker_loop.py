"""The loop of a benchmark worker: one engine, kept warm, that answers "run this batch" over standard input and output.

Every system in cpu.py, offline.py and serve.py is such a worker, in a process of its own that runs in the system's own
environment, so this file and its neighbours need nothing but the standard library and the system they drive. One JSON
object a line:

    worker  {"ready": true, "dtype": "bfloat16", "versions": {...}}
    parent  {"prompts": [[id, ...], ...], "new_tokens": 64, "mode": "stream"}     new_tokens: or one number per prompt
    worker  {"seconds": 1.2, "token_ids": [[id, ...], ...]}          or {"error": "..."}, after which it ends

The worker ends at the end of its input. Whatever the system prints goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

NewTokens = int | list[int]
STATIC_BATCH_TOKENS = 98_304
"""Padded tokens, prompt and answer, in one batch of a system without continuous batching: 18 GB of gpt2-large's bf16
keys and values."""


@dataclass(frozen=True)
class Options:
    """What a worker is started with."""

    checkpoint: Path
    """Folder of a GPT2LMHeadModel."""
    dtype: str
    """"bfloat16", "float32" or "int8"."""
    threads: int
    """OpenMP threads; 0: the system's own choice."""
    scratch: Path
    """A folder for what the system wants to keep (compiled graphs, converted weights)."""
    device: str = "cpu"
    """"cpu" or "cuda"; octavo also knows "interpreter"."""
    max_requests: int = 0
    """Sequences that may run at once; 0: the system's own choice."""
    kv_gib: int = 0
    """GiB of the KV-cache, so that several systems share a card; 0: the system's own choice, on CPUs 1 GiB."""


class Engine(Protocol):
    dtype: str
    """What it computes with: the one asked for, or what takes its place where the CPU has no such arithmetic."""

    def run(self, prompts: list[list[int]], new_tokens: NewTokens, mode: str) -> tuple[float, list[list[int]]]:
        """Completes all prompts at once, greedily, by `new_tokens` each (or its element for each) whatever they are.

        Returns seconds from handing the prompts over until the last answer is complete, and the new tokens' ids.
        """

    def close(self) -> None: ...


def serve(start: Callable[[Options], Engine], *packages: str) -> None:
    """Runs a worker. `start` makes the engine, ready for its first batch; `packages` are those whose versions count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-requests", type=int, default=0)
    parser.add_argument("--kv-gib", type=int, default=0)
    options = Options(**vars(parser.parse_args()))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = None
    try:
        engine = start(options)
        versions = {name: metadata.version(name) for name in packages}
        print(json.dumps({"ready": True, "dtype": engine.dtype, "versions": versions}), file=replies)
        for line in sys.stdin:
            seconds, token_ids = engine.run(**json.loads(line))
            print(json.dumps({"seconds": seconds, "token_ids": token_ids}), file=replies)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}), file=replies)
    finally:
        if engine is not None:
            engine.close()


def lengths(prompts: list[list[int]], new_tokens: NewTokens) -> list[int]:
    """New tokens of each prompt."""
    return new_tokens if isinstance(new_tokens, list) else [new_tokens] * len(prompts)


def static_batches(prompts: list[list[int]], wanted: list[int]) -> list[list[int]]:
    """Indices of the prompts, longest answers first, in batches that a system without continuous batching runs whole:
    each to the longest of its answers, so that neighbours in length waste least."""
    order = sorted(range(len(prompts)), key=lambda i: (wanted[i], len(prompts[i])), reverse=True)
    batches: list[list[int]] = []
    longest = 0
    for i in order:
        width = max(longest, len(prompts[i]))
        if batches and (len(batches[-1]) + 1) * (width + wanted[batches[-1][0]]) <= STATIC_BATCH_TOKENS:
            batches[-1].append(i)
            longest = width
        else:
            batches.append([i])
            longest = len(prompts[i])
    return batches


def stop(process: subprocess.Popen[bytes], patience: float = 20.0) -> None:
    """Ends a server that a worker started: politely, then not."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
