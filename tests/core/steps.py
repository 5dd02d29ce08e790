"""Drives a scheduler by hand: requests are named by their key, steps come back as plain dictionaries."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from octavo.config import CacheConfig, SchedulerConfig
from octavo.core.scheduler import Scheduler
from octavo.errors import Reason
from octavo.ipc import EngineCoreOutputs, EngineCoreRequest
from octavo.step import ModelRunnerOutput, NewRequest, SchedulerOutput
from octavo.types import FinishReason, GenerationParams


def request(key: int, prompt: list[int] | int, new_tokens: int = 4, **options: object) -> EngineCoreRequest:
    """`prompt` as a number: that many tokens which no other key has."""
    tokens = [1000 * key + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    max_time = options.pop("max_time", None)
    defaults: dict[str, object] = {"arrival_time": 0.0, "eos_token_ids": [], "stop_token_ids": []}
    return EngineCoreRequest(
        key=key,
        prompt_token_ids=np.array(tokens, np.int32).tobytes(),
        params=options.pop("params", GenerationParams(max_time=max_time)),  # type: ignore[arg-type]
        max_total_tokens=len(tokens) + new_tokens,
        seed=key,
        **{**defaults, **options},  # type: ignore[arg-type]
    )


@dataclass
class Heard:
    """What the front-ends were told, over all messages."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, FinishReason] = field(default_factory=dict)
    failed: dict[int, Reason] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    """cached_tokens of PromptStarted."""
    preempted: dict[int, int] = field(default_factory=dict)

    def take(self, messages: dict[int, EngineCoreOutputs]) -> None:
        for message in messages.values():
            keys = np.frombuffer(message.keys, np.int64).tolist()
            tokens = np.frombuffer(message.token_ids, np.int32).tolist()
            for key, token, finish in zip(keys, tokens, message.finish, strict=True):
                self.tokens.setdefault(key, []).append(token)
                if finish:
                    self.finished[key] = FinishReason(finish)
            self.cached.update({started.key: started.cached_tokens for started in message.started})
            self.failed.update({failure.key: failure.reason for failure in message.failed})
            self.preempted.update(dict(message.preempted))


class Steps:
    """A scheduler whose model always answers 7, until a request's length is reached. The tokens of requests with
    logprobs are chosen on the host."""

    def __init__(self, *, num_blocks: int = 100, block_size: int = 4, max_model_len: int = 100, **options: object):
        caching = options.pop("prefix_caching", True)
        config = {"max_num_requests": 8, "max_num_batched_tokens": 64, "watermark": 0.0, **options}
        self.scheduler = Scheduler(
            SchedulerConfig(**config),  # type: ignore[arg-type]
            CacheConfig(block_size=block_size, enable_prefix_caching=bool(caching)),
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            needs_host=lambda params, logprobs: logprobs is not None,
        )
        self.now = 0.0
        self.heard = Heard()
        self.entered: list[NewRequest] = []
        """NewRequests of the latest plan."""
        self.key_of: dict[int, int] = {}
        """Key by occupied slot; of a negative branch, minus that of its sequence."""
        self._max_total: dict[int, int] = {}

    def add(self, *requests: EngineCoreRequest, frontend: int = 0) -> None:
        self.scheduler.add(frontend, list(requests))

    def plan(self) -> SchedulerOutput | None:
        """schedule() alone."""
        step = self.scheduler.schedule(self.now)
        self.heard.take(self.scheduler.take_outputs())
        self.scheduler.check()
        self.entered = []
        if step is not None:
            self.entered = step.new_requests
            for new in step.new_requests:
                self.key_of[new.slot] = new.seed + new.row if new.guides < 0 else -self.key_of[new.guides]
                self._max_total[new.slot] = new.max_total_tokens
        return step

    def rows(self, step: SchedulerOutput | None) -> dict[int, int]:
        """num_scheduled by key, in the order of the rows."""
        if step is None:
            return {}
        return {self.key_of[s]: n for s, n in zip(step.slots.tolist(), step.num_scheduled.tolist(), strict=True)}

    def finish(self, step: SchedulerOutput, eos: Collection[int] = (), failed: Collection[int] = ()) -> None:
        """update() alone; the sequences of these keys end or fail."""
        tokens = np.where(step.samples, 7, -1).astype(np.int32)
        finish = np.zeros(step.num_rows, np.uint8)
        failures = []
        for row, slot in enumerate(step.slots.tolist()):
            if self.key_of[slot] < 0:
                tokens[row] = -1
                continue
            total = int(step.num_computed[row] + step.num_scheduled[row]) + 1
            if step.samples[row] and total == self._max_total[slot]:
                finish[row] = FinishReason.LENGTH
            if step.samples[row] and self.key_of[slot] in eos:
                finish[row] = FinishReason.EOS
            if self.key_of[slot] in failed:
                tokens[row], finish[row] = -1, 0
                failures.append((row, Reason.NON_FINITE_LOGITS))
        output = ModelRunnerOutput(tokens, finish, failed=failures)
        self.heard.take(self.scheduler.update(step, output, self.now))
        self.scheduler.check()

    def step(self, eos: Collection[int] = (), failed: Collection[int] = ()) -> dict[int, int]:
        """A whole step; what was scheduled, by key."""
        step = self.plan()
        rows = self.rows(step)
        if step is not None:
            self.finish(step, eos, failed)
        return rows

    def plan_and_finish(self) -> list[NewRequest]:
        """A whole step; who entered."""
        self.step()
        return self.entered

    def run(self, limit: int = 200) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("work is left")

    @property
    def used(self) -> int:
        return self.scheduler.pool.num_used
