"""What each parameter costs: a step of a batch in which requests use it, beside a step of plain greedy ones.

    python bench/parameters.py [--batch 64] [--rounds 5] [--steps 6] [--only top_p ...] [--out FILE]

Whole engine cores run (scheduler, model, sampler), five of them in this process, each with a batch of its own:

plain         a batch of 64 plain greedy requests
all           all 64 use the parameter
one           one of the 64 uses it
alone         one request, which uses it
alone, plain  one plain request

They take their steps in turns, so that a slow second of the machine is everybody's, and change places every round.
Ratios are of the steps of one turn; `nothing` is all of this without any parameter.

`others` is what the 63 plain requests pay because one beside them uses the parameter: what that one adds beyond what
it adds when alone, over a plain step: (one - plain - (alone - alone, plain)) / plain. The differences are of what steps
take without the model, which is the same with any parameter and moves by more than is looked for.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import environment
import numpy as np
import turns
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
MOST_STEPS_TO_FILL = 64
WARM_UP = 3
"""Steps in which all decode, before the first that counts."""
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
class Times:
    """Of a step, seconds."""

    whole: float
    without_model: float


Turn = dict[str, Times]
"""Role -> its step."""


@dataclass(frozen=True)
class Role:
    requests: int
    users: int
    """Of them, those that use the parameter."""


def roles(batch: int) -> dict[str, Role]:
    return {
        "plain": Role(batch, 0),
        "all": Role(batch, batch),
        "one": Role(batch, 1),
        "alone": Role(1, 1),
        "alone, plain": Role(1, 0),
    }


@dataclass(frozen=True)
class Spread:
    """Of the turns' values: their median, its bootstrap interval at 95 %, and where eight tenths of them lie."""

    median: float
    interval: tuple[float, float]
    p10: float
    p90: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        low, *_, high = statistics.quantiles(values, n=10) if len(values) > 1 else (values[0], values[0])
        return Spread(statistics.median(values), turns.interval(values), low, high)


@dataclass(frozen=True)
class Result:
    parameter: str
    plain_ms: float
    all: Spread
    """Steps in which all use it / plain steps."""
    one: Spread
    """Steps in which one uses it / plain steps."""
    others: Spread
    """Part of a plain step that the requests beside the one pay."""


class Lane:
    """An engine core with a batch that decodes a step when told to."""

    def __init__(self, path: Path, batch: int, steps: int, threads: int) -> None:
        self._max_tokens = PROMPT_LEN + MOST_STEPS_TO_FILL + steps
        blocks = 2 * batch * -(-self._max_tokens // 16)
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
        self._keys: list[int] = []
        self._next_key = 0
        self._in_model = 0.0
        for name in ("forward", "logits"):
            self._put_clock(name)

    def fill(self, settings: dict[str, Any], role: Role) -> None:
        """Admits the role's requests and lets all of them decode."""
        self._keys = list(range(self._next_key, self._next_key + role.requests))
        self._next_key += role.requests
        requests = [
            self._request(key, prompt, settings if i < role.users else {})
            for i, (key, prompt) in enumerate(zip(self._keys, self._prompts, strict=False))
        ]
        self._core.handle(AddRequests(FRONTEND, requests))
        decoded = 0
        while decoded < WARM_UP:
            decoded = decoded + 1 if self._step() == role.requests else 0

    def time_step(self) -> Times:
        """Of a step in which every request gets a token."""
        self._in_model = 0.0
        began = time.perf_counter()
        num_tokens = self._step()
        elapsed = time.perf_counter() - began
        assert num_tokens == len(self._keys), "requests ended before their time"
        return Times(elapsed, elapsed - self._in_model)

    def _put_clock(self, name: str) -> None:
        """On a method of the model."""
        function = getattr(self._core.runner._model, name)  # type: ignore[attr-defined]

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self._in_model += time.perf_counter() - began

        setattr(self._core.runner._model, name, timed)  # type: ignore[attr-defined]

    def _step(self) -> int:
        total = self._core.scheduler.meter.total
        before = total.generation_tokens
        self._core.step()
        return total.generation_tokens - before

    def empty(self) -> None:
        self._core.handle(AbortSequences(FRONTEND, self._keys, AbortCause.CLIENT))
        while self._core.has_work:
            self._core.step()

    def _request(self, key: int, prompt: list[int], settings: dict[str, Any]) -> EngineCoreRequest:
        own = dict(settings)
        num_top = own.pop("logprobs", None)
        logprobs = None if num_top is None else LogprobSpec(num_top, LogprobKind.RAW_LOGPROB, [])
        return EngineCoreRequest(
            key=key,
            num_sequences=1,
            prompt_token_ids=np.array(prompt, np.int32).tobytes(),
            params=GenerationParams(**({"do_sample": False} | own)),
            max_total_tokens=self._max_tokens,
            eos_token_ids=[EOS] if ENDS & own.keys() else [],
            stop_token_ids=[],
            seed=key,
            arrival_time=time.monotonic(),
            logprobs=logprobs,
        )

    def close(self) -> None:
        self._core.close()


def measure(lanes: Sequence[Lane], batch: int, names: Sequence[str], rounds: int, steps: int) -> list[Result]:
    found: dict[str, list[Turn]] = {name: [] for name in names}
    for i in range(-1, rounds):  # the first for the caches
        for name in names if i >= 0 else names[:1]:
            taken = take_turns(lanes[i:] + lanes[:i], roles(batch), PARAMETERS[name], steps)
            found[name] += taken if i >= 0 else []
        print(f"round {i + 1} of {rounds}", file=sys.stderr)
    return [result(name, found[name]) for name in names]


def take_turns(lanes: Sequence[Lane], roles: dict[str, Role], settings: dict[str, Any], steps: int) -> list[Turn]:
    """A step of every role in each turn; who comes first changes."""
    cast = dict(zip(roles, lanes, strict=True))
    for name, lane in cast.items():
        lane.fill(settings, roles[name])
    order = list(cast)
    taken = []
    for _ in range(steps):
        order = order[1:] + order[:1]
        taken.append({name: cast[name].time_step() for name in order})
    for lane in lanes:
        lane.empty()
    return taken


def result(name: str, taken: Sequence[Turn]) -> Result:
    def others(turn: Turn) -> float:
        one, plain, alone, alone_plain = (
            turn[role].without_model for role in ("one", "plain", "alone", "alone, plain")
        )
        return (one - plain - (alone - alone_plain)) / turn["plain"].whole

    return Result(
        name,
        plain_ms=1e3 * statistics.median(turn["plain"].whole for turn in taken),
        all=Spread.of([turn["all"].whole / turn["plain"].whole for turn in taken]),
        one=Spread.of([turn["one"].whole / turn["plain"].whole for turn in taken]),
        others=Spread.of([others(turn) for turn in taken]),
    )


def table(results: Sequence[Result], batch: int) -> str:
    head = ["parameter", f"all {batch} use it / plain [95 %]", "one uses it / plain [95 %]", "the others pay [95 %]"]
    lines = [head, ["---"] * len(head)]
    for each in results:
        ratios = [f"{s.median:.3f} [{s.interval[0]:.3f}, {s.interval[1]:.3f}]" for s in (each.all, each.one)]
        low, high = each.others.interval
        lines.append([each.parameter, *ratios, f"{each.others.median:+.1%} [{low:+.1%}, {high:+.1%}]"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["demo", *SHAPES], default="gpt2", help="a model with random weights")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of each role, a round")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(PARAMETERS), default=list(PARAMETERS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="append records to this file, one JSON object a line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = resolve("demo") if options.shape == "demo" else Path(folder) / options.shape
        if options.shape != "demo":
            make(path, options.shape)
        lanes = [Lane(path, options.batch, options.steps, options.threads) for _ in roles(options.batch)]
        results = measure(lanes, options.batch, options.only, options.rounds, options.steps)
        for lane in lanes:
            lane.close()
    print(table(results, options.batch))
    if options.out is not None:
        settings = {name: getattr(options, name) for name in ("shape", "batch", "rounds", "steps")}
        lines = [{"record": "parameter", **asdict(each)} for each in results]
        turns.append(str(options.out), environment.describe() | settings, lines)


if __name__ == "__main__":
    main()
