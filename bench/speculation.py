"""What speculation by prompt lookup gains: the same requests with and without drafts, in turns.

    python bench/speculation.py [--device cpu] [--dtype float32] [--shape demo] [--batch 1 4 8] [--rounds 5]
                                [--new-tokens 96] [--drafts 8] [--out FILE]

The whole engine core runs, in fp32 on the CPU and in bf16 on CUDA. `repetitive` continues a passage that its prompt
says three times, greedily, as one quotes, edits or fills in tables; `sampled` draws from the 50 most likely tokens
behind a passage that is said once, where hardly any draft is right. A turn answers one batch from the first step to
the last token; prompts come from the prefix cache. With and without take turns (A B, B A, ...), and have to give the
same tokens; in bf16, where sums depend on how many rows a step has, it is said of how many requests they are the
same. A ratio is the median over the rounds, beside the least and the most. Other shapes than `demo` have random
weights: what they write tells what a step costs, not how often real text repeats itself.
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
from octavo.ipc import AddRequests, EngineCoreOutputs, EngineCoreRequest
from octavo.types import GenerationParams
from peers.random_checkpoint import SHAPES, make
from tokenizers import Tokenizer

TEXT = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,
it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness,
it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing before us, we were
all going direct to Heaven, we were all going direct the other way. Call me Ishmael. Some years ago, never mind how long
precisely, having little or no money in my purse, and nothing particular to interest me on shore, I thought I would sail
about a little and see the watery part of the world."""
PASSAGE = 16
"""Tokens."""
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "repetitive": (3, {"do_sample": False}),
    "sampled": (1, {"do_sample": True, "top_k": 50}),
}
"""Name -> how often a prompt says its passage, and fields of GenerationParams."""


@dataclass(frozen=True)
class Turn:
    seconds: float
    steps: int
    drafted: int
    accepted: int
    token_ids: dict[int, list[int]]
    """By request."""


@dataclass(frozen=True)
class Result:
    kind: str
    batch: int
    tokens_per_second: float
    """With drafts."""
    plain_tokens_per_second: float
    ratio: float
    least: float
    most: float
    tokens_per_step: float
    """Of one request, with drafts."""
    acceptance: float
    """Part of the drafted tokens that were right."""
    same: float
    """Part of the requests with the same tokens in all turns."""


class Bench:
    """An engine core that stays warm."""

    def __init__(self, path: Path, batch: int, new_tokens: int, model: dict[str, Any]) -> None:
        """model: fields of ModelConfig."""
        self._core = EngineCore(
            EngineConfig(
                model=ModelConfig(path=str(path), name="bench", **model),
                cache=CacheConfig(block_size=16, num_blocks=20 * batch * -(-(4 * PASSAGE + new_tokens) // 16)),
                scheduler=SchedulerConfig(max_num_requests=batch, max_queue_time=3600.0),
            )
        )
        self.info = self._core.info
        self._new_tokens = new_tokens
        self._passages = passages(path, self.info.vocab_size)

    def turn(self, kind: str, batch: int, drafts: int) -> Turn:
        times, fields = KINDS[kind]
        params = GenerationParams(prompt_lookup_num_tokens=drafts or None, **fields)
        requests = [self._request(i, self._passages[i % len(self._passages)] * times, params) for i in range(batch)]
        core, total = self._core, self._core.scheduler.meter.total
        before = (total.steps, total.drafted_tokens, total.accepted_tokens)
        token_ids: dict[int, list[int]] = {i: [] for i in range(batch)}
        began = time.perf_counter()
        core.handle(AddRequests(0, requests))
        while core.has_work:
            for message in core.step().get(0, []):
                if isinstance(message, EngineCoreOutputs):
                    tokens = np.frombuffer(message.token_ids, np.int32).tolist()
                    for key, token_id in zip(np.frombuffer(message.keys, np.int64).tolist(), tokens, strict=True):
                        token_ids[key].append(token_id)
        seconds = time.perf_counter() - began
        after = (total.steps, total.drafted_tokens, total.accepted_tokens)
        return Turn(seconds, *(now - then for now, then in zip(after, before, strict=True)), token_ids)

    def _request(self, key: int, prompt: list[int], params: GenerationParams) -> EngineCoreRequest:
        return EngineCoreRequest(
            key=key,
            prompt_token_ids=np.array(prompt, np.int32).tobytes(),
            params=params,
            max_total_tokens=len(prompt) + self._new_tokens,
            eos_token_ids=[],
            stop_token_ids=[],
            seed=key,
            arrival_time=time.monotonic(),
        )

    def close(self) -> None:
        self._core.close()


def passages(path: Path, vocab_size: int) -> list[list[int]]:
    """Parts of the text; random tokens for a model that has no tokenizer."""
    file = path / "tokenizer.json"
    rng = random.Random(0)
    if file.exists():
        ids = Tokenizer.from_file(str(file)).encode(TEXT).ids
    else:
        ids = [rng.randrange(1, vocab_size) for _ in range(16 * PASSAGE)]
    return [ids[start : start + PASSAGE] for start in range(0, len(ids) - PASSAGE, PASSAGE)]


def measure(bench: Bench, kind: str, batch: int, drafts: int, rounds: int) -> Result:
    bench.turn(kind, batch, 0)
    bench.turn(kind, batch, drafts)
    turns: dict[int, list[Turn]] = {0: [], drafts: []}
    for i in range(rounds):
        for count in (0, drafts) if i % 2 == 0 else (drafts, 0):
            turns[count].append(bench.turn(kind, batch, count))
    tokens = turns[0][0].token_ids
    same = [key for key in tokens if all(turn.token_ids[key] == tokens[key] for turn in turns[0] + turns[drafts])]
    assert len(same) == batch or bench.info.dtype != "float32", "other tokens"
    num_tokens = sum(map(len, tokens.values()))
    ratios = [one.seconds / other.seconds for one, other in zip(turns[0], turns[drafts], strict=True)]
    drafted = sum(turn.drafted for turn in turns[drafts])
    return Result(
        kind=kind,
        batch=batch,
        tokens_per_second=num_tokens / statistics.median(turn.seconds for turn in turns[drafts]),
        plain_tokens_per_second=num_tokens / statistics.median(turn.seconds for turn in turns[0]),
        ratio=statistics.median(ratios),
        least=min(ratios),
        most=max(ratios),
        tokens_per_step=1 + turns[drafts][0].accepted / (num_tokens - turns[drafts][0].accepted),
        acceptance=sum(turn.accepted for turn in turns[drafts]) / drafted if drafted else 0.0,
        same=len(same) / batch,
    )


def table(results: list[Result]) -> str:
    lines = [
        ["text", "batch", "tokens/s without", "with", "ratio [least, most]", "tokens per row", "acceptance", "same"]
    ]
    lines.append(["---"] * len(lines[0]))
    for r in results:
        speeds = [f"{r.plain_tokens_per_second:.0f}", f"{r.tokens_per_second:.0f}"]
        ratio = f"{r.ratio:.2f} [{r.least:.2f}, {r.most:.2f}]"
        lines.append(
            [r.kind, str(r.batch), *speeds, ratio, f"{r.tokens_per_step:.2f}", f"{r.acceptance:.0%}", f"{r.same:.0%}"]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="by default float32, and bfloat16 on CUDA")
    parser.add_argument("--shape", choices=["demo", *SHAPES], default="demo", help="others: random weights")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--drafts", type=int, default=8, help="prompt_lookup_num_tokens")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=environment.ROOT / "bench" / "results" / "speculation.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = resolve("demo") if options.shape == "demo" else Path(folder) / options.shape
        if options.shape != "demo":
            make(path, options.shape)
        options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
        model = {"device": options.device, "dtype": options.dtype, "num_threads": options.threads}
        bench = Bench(path, max(options.batch), options.new_tokens, model)
        cells = [(kind, batch) for kind in KINDS for batch in options.batch]
        results = [measure(bench, kind, batch, options.drafts, options.rounds) for kind, batch in cells]
        bench.close()
    print(table(results))
    run = environment.describe() | {name: value for name, value in vars(options).items() if name != "out"}
    run |= {"device": bench.info.device, "gpu": environment.gpu_state()}
    with options.out.open("a") as file:
        for record in ({"record": "run", **run}, *({"record": "speculation", **asdict(r)} for r in results)):
            print(json.dumps(record), file=file)


if __name__ == "__main__":
    main()
