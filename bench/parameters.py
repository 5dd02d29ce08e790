"""What each parameter costs: a step of a batch in which requests use it, beside a step of plain greedy ones.

    python bench/parameters.py [--batch 64] [--users 64 1] [--rounds 5] [--steps 12] [--only top_p ...] [--out FILE]

The whole engine core runs: scheduler, model, sampler. In every round each parameter has a turn right after a turn of
plain greedy requests, or right before one; a turn is some steps in which every request decodes, and counts as its
median step. A ratio is the median over the rounds, beside the least and the most; `nothing` is a plain turn beside a
plain one. With one user in the batch, what the ratio has over that of `nothing` is paid for that row: the others pay
nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import environment
import numpy as np
from octavo.checkpoint import resolve
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.engine_core.engine_core import EngineCore
from octavo.ipc import AbortCause, AbortSequences, AddRequests, EngineCoreRequest
from octavo.step import LogprobSpec
from octavo.types import ExponentialDecay, GenerationParams, LogprobKind, SequenceBias
from peers.random_checkpoint import SHAPES, make

PROMPT_LEN = 65
"""Four blocks, which come from the prefix cache in all turns but the first, and a token."""
EOS = 0
ENDS = {"min_new_tokens", "min_length", "exponential_decay_length_penalty"}
"""What acts on end-of-sequence tokens only; all other requests have none, so that no sampled one ends a turn."""
FRONTEND = 0
SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 0}
IDS = list(range(5, 205))

PARAMETERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "sequence_bias (20 tokens)": {"sequence_bias": [SequenceBias([i], 0.1) for i in range(5, 25)]},
    "sequence_bias (20 pairs)": {"sequence_bias": [SequenceBias([i, i + 1], 0.1) for i in range(5, 25)]},
    "logit_bias (20)": {"logit_bias": dict.fromkeys(range(5, 25), 0.1)},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.2},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "frequency_penalty": {"frequency_penalty": 0.2},
    "presence_penalty": {"presence_penalty": 0.2},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 3},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 3},
    "bad_words_ids (20)": {"bad_words_ids": [[i] for i in range(5, 25)]},
    "bad_words_ids (20 pairs)": {"bad_words_ids": [[i, i + 1] for i in range(5, 25)]},
    "min_new_tokens": {"min_new_tokens": 500},
    "min_length": {"min_length": 500},
    "allowed_token_ids (200)": {"allowed_token_ids": IDS},
    "forced_bos_token_id": {"forced_bos_token_id": 5},
    "forced_eos_token_id": {"forced_eos_token_id": [5]},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": ExponentialDecay(1, 1.0001)},
    "suppress_tokens (200)": {"suppress_tokens": IDS},
    "begin_suppress_tokens (200)": {"begin_suppress_tokens": IDS},
    "do_sample": SAMPLED,
    "temperature": SAMPLED | {"temperature": 0.8},
    "top_k (50)": SAMPLED | {"top_k": 50},
    "top_p": SAMPLED | {"top_p": 0.9},
    "top_k (50) and top_p": SAMPLED | {"top_k": 50, "top_p": 0.9},
    "min_p": SAMPLED | {"min_p": 0.05},
    "typical_p": SAMPLED | {"typical_p": 0.9},
    "top_h": SAMPLED | {"top_h": 0.5},
    "epsilon_cutoff": SAMPLED | {"epsilon_cutoff": 3e-4},
    "eta_cutoff": SAMPLED | {"eta_cutoff": 3e-4},
    "renormalize_logits": SAMPLED | {"renormalize_logits": True},
    "logprobs (5)": {"logprobs": 5},
}
"""Name in the table -> fields of GenerationParams; `logprobs` is of the output's options."""


@dataclass(frozen=True)
class Result:
    parameter: str
    users: int
    """Requests of the batch that use it."""
    ratio: float
    """Step with it / plain greedy step."""
    least: float
    most: float
    step_ms: float


class Bench:
    """An engine core that stays warm, and the turns on it."""

    def __init__(self, path: Path, batch: int, steps: int, threads: int) -> None:
        blocks = 2 * batch * -(-(PROMPT_LEN + 64 + 2 * steps) // 16)
        self._core = EngineCore(
            EngineConfig(
                model=ModelConfig(path=str(path), name="bench", device="cpu", num_threads=threads),
                cache=CacheConfig(block_size=16, num_blocks=blocks, enable_prefix_caching=True),
                scheduler=SchedulerConfig(max_num_requests=batch, max_queue_time=3600.0),
            )
        )
        rng = random.Random(0)
        top = self._core.info.vocab_size
        self._prompts = [[rng.randrange(1, top) for _ in range(PROMPT_LEN)] for _ in range(batch)]
        self._steps = steps
        self._next_key = 0

    def turn(self, settings: dict[str, Any], users: int) -> float:
        """Median seconds of a step in which every request decodes and `users` of them have these settings."""
        first = self._next_key
        self._next_key += len(self._prompts)
        requests = [self._request(first + i, prompt, settings, i < users) for i, prompt in enumerate(self._prompts)]
        core = self._core
        core.handle(AddRequests(FRONTEND, requests))
        seconds: list[float] = []
        while len(seconds) < self._steps:
            tokens, began = core.scheduler.meter.total.generation_tokens, time.perf_counter()
            core.step()
            elapsed = time.perf_counter() - began
            assert core.has_work, "requests ended before their time"
            if core.scheduler.meter.total.generation_tokens - tokens == len(requests):
                seconds.append(elapsed)
        core.handle(AbortSequences(FRONTEND, [request.key for request in requests], AbortCause.CLIENT))
        while core.has_work:
            core.step()
        return statistics.median(seconds[1:] or seconds)

    def _request(self, key: int, prompt: list[int], settings: dict[str, Any], uses: bool) -> EngineCoreRequest:
        own = dict(settings) if uses else {}
        num_top = own.pop("logprobs", None)
        logprobs = None if num_top is None else LogprobSpec(num_top, LogprobKind.RAW_LOGPROB, [])
        return EngineCoreRequest(
            key=key,
            num_sequences=1,
            prompt_token_ids=np.array(prompt, np.int32).tobytes(),
            params=GenerationParams(**({"do_sample": False} | own)),
            max_total_tokens=PROMPT_LEN + 64 + 2 * self._steps,
            eos_token_ids=[EOS] if ENDS & own.keys() else [],
            stop_token_ids=[],
            seed=key,
            arrival_time=time.monotonic(),
            logprobs=logprobs,
        )

    def close(self) -> None:
        self._core.close()


def measure(bench: Bench, names: list[str], users: list[int], rounds: int) -> list[Result]:
    cells = [(name, count) for name in names for count in users]
    ratios: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    times: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    for _ in range(2):
        bench.turn({}, 0)
    for i in range(rounds):
        for name, count in cells[i % len(cells) :] + cells[: i % len(cells)]:
            order = [0, count] if i % 2 else [count, 0]
            seconds = {num_users: bench.turn(PARAMETERS[name], num_users) for num_users in order}
            ratios[name, count].append(seconds[count] / seconds[0])
            times[name, count].append(seconds[count])
    return [
        Result(
            name,
            count,
            ratio=statistics.median(ratios[name, count]),
            least=min(ratios[name, count]),
            most=max(ratios[name, count]),
            step_ms=1e3 * statistics.median(times[name, count]),
        )
        for name, count in cells
    ]


def table(results: list[Result], users: list[int], batch: int) -> str:
    head = ["parameter", *(f"{count} of {batch} use it: step / plain step [least, most]" for count in users)]
    lines = [head, ["---"] * len(head)]
    for name in dict.fromkeys(result.parameter for result in results):
        row = [result for result in results if result.parameter == name]
        lines.append([name, *(f"{r.ratio:.3f} [{r.least:.3f}, {r.most:.3f}]" for r in row)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["demo", *SHAPES], default="demo", help="a model with random weights")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--users", type=int, nargs="+", default=[64, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(PARAMETERS), default=list(PARAMETERS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="append records to this file, one JSON object a line")
    options = parser.parse_args()
    users = [min(count, options.batch) for count in options.users]
    with tempfile.TemporaryDirectory() as folder:
        path = resolve("demo") if options.shape == "demo" else Path(folder) / options.shape
        if options.shape != "demo":
            make(path, options.shape)
        bench = Bench(path, options.batch, options.steps, options.threads)
        results = measure(bench, options.only, users, options.rounds)
        bench.close()
    print(table(results, users, options.batch))
    if options.out is not None:
        run = environment.describe() | {"shape": options.shape, "batch": options.batch, "rounds": options.rounds}
        with options.out.open("a") as file:
            for record in ({"record": "run", **run}, *({"record": "parameter", **asdict(r)} for r in results)):
                print(json.dumps(record), file=file)


if __name__ == "__main__":
    main()
