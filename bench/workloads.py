"""The loads of offline.py and serve.py: prompt and answer lengths, and random prompts of them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

CHAT_LENGTHS = Path(__file__).resolve().parent / "chat_lengths.json"
LARGEST_TOKEN = 50_000


@dataclass(frozen=True)
class Workload:
    name: str
    requests: int
    """At scale 1."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    """Both 0: lengths of chats, from chat_lengths.json."""
    scales: bool = True
    """Whether the number of requests follows --scale."""

    def lengths(self, scale: float) -> list[tuple[int, int]]:
        """(prompt, new) tokens of each request."""
        count = max(1, round(self.requests * scale)) if self.scales else self.requests
        if self.prompt_tokens:
            return [(self.prompt_tokens, self.new_tokens)] * count
        chats: list[list[int]] = json.loads(CHAT_LENGTHS.read_text())["lengths"]
        return [(prompt, new) for prompt, new in (chats[i % len(chats)] for i in range(count))]


WORKLOADS = {
    workload.name: workload
    for workload in [
        Workload("11/64", 1024, 11, 64),
        Workload("128/128", 1024, 128, 128),
        Workload("512/512", 256, 512, 512),
        Workload("900/64", 256, 900, 64),
        Workload("19/58", 1024, 19, 58),
        Workload("chat", 512),
        Workload("single", 1, 16, 128, scales=False),
        Workload("batch-64", 64, 224, 64),
        Workload("batch-256", 256, 224, 64),
        Workload("prefill", 256, 900, 1),
    ]
}
"""batch-64 and batch-256 have a mean context of 256 tokens; their prompts' computation is in the time. prefill: what
counts is the total."""


def prompts(lengths: list[tuple[int, int]], seed: str) -> list[list[int]]:
    """Random token ids; equal for equal seeds."""
    source = random.Random(seed)
    return [[source.randrange(LARGEST_TOKEN) for _ in range(prompt)] for prompt, _ in lengths]


def make_chat_lengths(count: int = 1024, seed: int = 0, longest: int = 1024) -> list[tuple[int, int]]:
    """Lognormal lengths like ShareGPT's (medians 58 and 152 tokens, long tails), prompt + answer at most `longest`.

    A pair that is too long is drawn again, as benchmarks that filter the data set do.
    """
    source = random.Random(seed)
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        prompt, new = round(source.lognormvariate(4.06, 1.35)), round(source.lognormvariate(5.02, 0.95))
        if prompt >= 4 and new >= 4 and prompt + new <= longest:
            pairs.append((prompt, new))
    return pairs


if __name__ == "__main__":
    made = [list(pair) for pair in make_chat_lengths()]
    head = '{"made_by": "python bench/workloads.py", "columns": ["prompt_tokens", "new_tokens"], "lengths": [\n'
    rows = [json.dumps(made[i : i + 16])[1:-1] for i in range(0, len(made), 16)]
    CHAT_LENGTHS.write_text(head + ",\n".join(rows) + "\n]}\n")
