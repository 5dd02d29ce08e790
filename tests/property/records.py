"""What a property test asks of the scheduler, and what it has heard: prompts and their sequences."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from octavo.errors import Reason
from octavo.ipc import EngineCoreOutputs
from octavo.step import Int32s
from octavo.types import FinishReason
from property.beam_oracle import BeamAnswer
from property.oracle import VOCAB_SIZE, Answer, mix


@dataclass(kw_only=True)
class PromptSpec:
    """What a test asks for; the session turns it into an EngineCoreRequest."""

    tokens: list[int]
    max_new_tokens: int
    num_sequences: int = 1
    num_beams: int = 1
    lookup: int = 0
    """Most tokens of a draft; 0: none."""
    priority: int = 0
    salt: str = ""
    bypass: bool = False
    eos: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    deadline: float | None = None
    """Seconds from now."""
    deadline_is_client: bool = True
    max_time: float | None = None
    length_is_context: bool = False
    num_top: int | None = None
    """Logprobs of generated tokens."""
    prompt_logprobs: int | None = None


@dataclass
class Sequence:
    """One sequence and what has been heard of it."""

    prompt: SentPrompt
    row: int
    expected: Answer
    received: list[int] = field(default_factory=list)
    ended: FinishReason | Reason | None = None
    aborted: bool = False

    @property
    def alive(self) -> bool:
        return self.ended is None and not self.aborted


@dataclass
class SentPrompt:
    spec: PromptSpec
    key: int
    seed: int
    arrival: float
    deadline: float | None
    sequences: list[Sequence] = field(default_factory=list)
    scheduled_time: float | None = None
    """PromptStarted has come."""
    next_prompt_logprob: int = 1
    may_fail: bool = False
    search: BeamAnswer | None = None
    """What a beam search must find."""
    too_large: bool = False
    """Can never fit."""

    @property
    def domain(self) -> int:
        """Requests of equal domains may share blocks."""
        return mix(mix(hash_of(self.spec.salt)) ^ (self.seed if self.spec.bypass else 0))


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "little") & ((1 << 62) - 1)


def columns(outputs: EngineCoreOutputs) -> list[tuple[int, int, int]]:
    """(key, token, finish) per entry."""
    keys = np.frombuffer(outputs.keys, np.int64).tolist()
    tokens = np.frombuffer(outputs.token_ids, np.int32).tolist()
    finish = np.frombuffer(outputs.finish, np.uint8).tolist()
    return list(zip(keys, tokens, finish, strict=True))


def random_prompt(rng: random.Random, group: int, length: int) -> list[int]:
    """Prompts of one group share a beginning: the same tokens at first, then tokens of their own."""
    shared = [mix(group * 1000 + position) % VOCAB_SIZE for position in range(length)]
    split = rng.randint(0, length)
    return shared[:split] + [rng.randrange(VOCAB_SIZE) for _ in range(length - split)]


def guess(sequence: Sequence, known: int, limit: int, chance: int) -> Int32s:
    """A draft behind `known` tokens of the output: some of the right ones, then perhaps wrong ones."""
    spec = sequence.prompt.spec
    length = max(0, min(limit, spec.lookup))
    right = sequence.expected.token_ids[known:][: chance % (length + 2)][:length]
    tokens = [*right, *([mix(chance) % VOCAB_SIZE] * (length - len(right)))]
    ends = [i for i, token in enumerate(tokens) if token in (*spec.eos, *spec.stop)]
    return np.array(tokens[: ends[0]] if ends else tokens, np.int32)
