"""The session around a whole EngineCore, on a device that takes its time and sometimes fails.

Time passes while the core waits for a result, so that deadlines and time limits run out between the launch of a step
and its result; what front-ends want meanwhile reaches the core with a step in flight. A step may fail when it is
submitted, with an earlier one in flight, or when its result is read, with a later one in flight.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.engine_core import engine_core
from octavo.ipc import EngineCoreOutputs
from octavo.step import LogprobSpec, ModelRunnerOutput, SchedulerOutput
from octavo.types import EngineInfo, GenerationParams
from property.fake_runner import FakePendingStep, needs_host, require
from property.session import Session

LATENCIES = (0.0, 0.0, 0.0005, 0.001, 0.002, 0.06, 0.6)
"""Seconds until a result is there."""


class CoreSession(Session):
    """`step` is a turn of the core's own loop."""

    rng = random.Random(0)
    failures = 0.03
    """Part of the steps that fail."""

    def __init__(
        self, *, num_blocks: int, max_model_len: int, scheduler: SchedulerConfig, cache: CacheConfig, check: bool = True
    ) -> None:
        super().__init__(
            num_blocks=num_blocks, max_model_len=max_model_len, scheduler=scheduler, cache=cache, check=check
        )
        self.device = Device(self)
        self.core = engine_core.EngineCore(
            EngineConfig(model=ModelConfig(path="fake", name="fake"), cache=cache, scheduler=scheduler),
            runner=self.device,
        )
        self.scheduler = self.core.scheduler
        self._guess_drafts()
        self.in_flight = self.core._in_flight  # type: ignore[assignment]

    def take_clock(self, patch: pytest.MonkeyPatch) -> None:
        """The core reads the session's clock."""
        patch.setattr(engine_core, "time", SimpleNamespace(monotonic=lambda: self.now))

    def _step(self) -> SchedulerOutput | None:
        self.device.launched = None
        for frontend, messages in self.core.step().items():
            for message in messages:
                if isinstance(message, EngineCoreOutputs):
                    self._receive({frontend: message})
        self._check()
        return self.device.launched

    def settle_one(self) -> None:
        self.step()

    def settle(self) -> None:
        """The core reads results only in its turn."""
        self.step()

    def shut_down(self) -> None:
        """All front-ends go, with steps in flight: no step is launched any more, and everything is given back."""
        steps = self.num_steps
        for frontend in {owner for owner, _ in self.sequences}:
            self.abort_frontend(frontend)
        while self.in_flight:
            self.step()
        require(self.num_steps == steps, "a step for nobody")
        require(not self.core.has_work, "work is left, but nobody waits for it")
        require(self.scheduler.load(self.now).used_blocks == 0, "blocks have leaked")


class Device:
    """`engine_core.Runner` with random latencies and failures, around the fake runner."""

    def __init__(self, session: CoreSession) -> None:
        self._session = session
        self.launched: SchedulerOutput | None = None
        self.num_failed = 0
        config = session.config
        self.info = EngineInfo(
            model="fake", architecture="fake", weights_sha256="", dtype="float32", device="cpu",
            attention_backend="fake", kv_cache_dtype="float32", num_parameters=0, vocab_size=0,
            n_positions=session.max_model_len, block_size=session.block_size, num_blocks=session.num_blocks,
            max_num_requests=config.max_num_requests, max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=session.max_model_len, batch_invariant=True, start_time=0.0,
        )  # fmt: skip
        self.progress = 0
        self._calm = 3
        """Steps until one may fail: the core gives up when two in a row do."""

    def submit(self, step: SchedulerOutput) -> LatePendingStep:
        session, runner = self._session, self._session.runner
        session._check_plan(step)
        session.num_steps += 1
        self.launched = step
        self._calm -= 1
        runner.fail_step = fails = self._calm < 0 and session.rng.random() < session.failures
        pending = runner.submit(step)
        if fails:
            self._calm = 3
            self.num_failed += 1
            for slot in step.slots.tolist():
                session.prompts[runner.slots[slot].request.seed].may_fail = True
            if session.rng.random() < 0.3:
                pending.fail()
        return LatePendingStep(session, pending)

    def needs_host(self, params: GenerationParams, logprobs: LogprobSpec | None) -> bool:
        return needs_host(params)

    def check_device(self) -> None:
        pass

    def close(self) -> None:
        pass


class LatePendingStep:
    def __init__(self, session: CoreSession, pending: FakePendingStep) -> None:
        self._session = session
        self._pending = pending

    def result(self) -> ModelRunnerOutput:
        self._session.now += self._session.rng.choice(LATENCIES)
        return self._pending.result()


def statistics(session: CoreSession) -> dict[str, Any]:
    return session.statistics() | {"failed_steps": session.device.num_failed}
