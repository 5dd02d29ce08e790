"""One engine core: a scheduler and a model runner, stepped together. No threads, no sockets: `process` has those."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from octavo.config import EngineConfig
from octavo.core.scheduler import Scheduler
from octavo.errors import Reason
from octavo.ipc import AbortSequences, AddRequests, LoadReport, PrefixCacheReset, ResetPrefixCache, ToCore, ToFrontend
from octavo.step import ModelRunnerOutput, SchedulerOutput
from octavo.types import EngineInfo

LOAD_INTERVAL = 0.1
"""Seconds between load reports."""
STEP_FAILURE_WINDOW = 60.0
"""A second failed step within this many seconds is taken for a broken process, not for a bad request."""

log = logging.getLogger(__name__)

Messages = dict[int, list[ToFrontend]]


class PendingStep(Protocol):
    def result(self) -> ModelRunnerOutput: ...


class Runner(Protocol):
    """What the core needs of `worker.model_runner.ModelRunner`; tests have a fake."""

    @property
    def info(self) -> EngineInfo: ...

    def submit(self, step: SchedulerOutput) -> PendingStep: ...

    def close(self) -> None: ...


class EngineCore:
    """Feeds the runner with steps. `pipeline_depth` steps may be in flight beside the one whose result is awaited."""

    def __init__(
        self,
        config: EngineConfig,
        progress: Callable[[str], None] = lambda text: None,
        runner: Runner | None = None,
    ) -> None:
        if runner is None:
            from octavo.worker.model_runner import ModelRunner

            runner = ModelRunner(config, progress)
        self.runner = runner
        self.info = runner.info
        self.scheduler = Scheduler(
            config.scheduler,
            config.cache,
            num_blocks=self.info.num_blocks,
            max_model_len=self.info.max_model_len,
        )
        self.frontends: set[int] = set()
        """Front-ends that get load reports: those that were heard of and are not gone."""
        self._depth = config.scheduler.pipeline_depth
        self._in_flight: deque[tuple[SchedulerOutput, PendingStep]] = deque()
        self._last_failure = -STEP_FAILURE_WINDOW
        self._next_report = 0.0
        self._replies: list[tuple[int, ToFrontend]] = []

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._replies)

    @property
    def num_steps(self) -> int:
        return self.scheduler.meter.total.steps

    def handle(self, message: ToCore) -> None:
        """Takes a front-end's message. What it leads to comes with the next `step`."""
        self.frontends.add(message.frontend)
        match message:
            case AddRequests(frontend=frontend, requests=requests):
                self.scheduler.add(frontend, requests)
            case AbortSequences(frontend=frontend, keys=keys):
                self.scheduler.abort(frontend, keys)
            case ResetPrefixCache(frontend=frontend, call_id=call_id):
                freed = self.scheduler.reset_prefix_cache()
                self._replies.append((frontend, PrefixCacheReset(call_id, freed)))

    def abort_frontend(self, frontend: int) -> None:
        """Ends everything of a front-end that is gone."""
        self.frontends.discard(frontend)
        self.scheduler.abort_frontend(frontend)

    def step(self) -> Messages:
        """One turn: schedule and launch a step, take the result of the oldest one in flight, tell the front-ends."""
        step = self.scheduler.schedule(time.monotonic())
        if step is not None:
            self._in_flight.append((step, self.runner.submit(step)))
        messages: Messages = {}
        for frontend, reply in self._replies:
            messages.setdefault(frontend, []).append(reply)
        self._replies.clear()
        for frontend, outputs in self.scheduler.take_outputs().items():
            messages.setdefault(frontend, []).append(outputs)
        if self._in_flight and (step is None or len(self._in_flight) > self._depth):
            self._finish_oldest(messages)
        self._report_load(messages)
        return messages

    def _finish_oldest(self, messages: Messages) -> None:
        step, pending = self._in_flight.popleft()
        try:
            result = pending.result()
        except Exception:
            now = time.monotonic()
            if now - self._last_failure < STEP_FAILURE_WINDOW:
                raise
            self._last_failure = now
            log.exception("step %d failed; its %d requests fail with it", step.step_id, step.num_rows)
            outputs = self.scheduler.fail_step(step, Reason.INTERNAL, now)
        else:
            outputs = self.scheduler.update(step, result, time.monotonic())
        for frontend, output in outputs.items():
            messages.setdefault(frontend, []).append(output)

    def _report_load(self, messages: Messages) -> None:
        now = time.monotonic()
        if now < self._next_report and self.has_work:
            return
        self._next_report = now + LOAD_INTERVAL
        report = LoadReport(self.scheduler.load(now))
        for frontend in self.frontends:
            messages.setdefault(frontend, []).append(report)

    def close(self) -> None:
        self.runner.close()
