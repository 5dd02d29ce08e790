"""One engine core: a scheduler and a model runner, stepped together. No threads, no sockets: `process` has those."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from octavo.config import EngineConfig
from octavo.core.scheduler import Scheduler
from octavo.errors import Reason, StartupError
from octavo.ipc import (
    AbortSequences,
    AddRequests,
    EngineCoreOutputs,
    LoadReport,
    PrefixCacheReset,
    ResetPrefixCache,
    ToCore,
    ToFrontend,
)
from octavo.step import LogprobSpec, ModelRunnerOutput, SchedulerOutput
from octavo.types import EngineInfo, GenerationParams

LOAD_INTERVAL = 0.1
"""Seconds between load reports."""

log = logging.getLogger(__name__)

Messages = dict[int, list[ToFrontend]]


class PendingStep(Protocol):
    def result(self) -> ModelRunnerOutput: ...


class Runner(Protocol):
    """What the core needs of `worker.model_runner.ModelRunner`; tests have a fake."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def progress(self) -> int:
        """Grows while a step is computed, so that slow can be told from hung."""
        ...

    def submit(self, step: SchedulerOutput) -> PendingStep: ...

    def needs_host(self, params: GenerationParams, logprobs: LogprobSpec | None) -> bool:
        """Whether a request's next step cannot be submitted before its last one's result was taken."""
        ...

    def check_device(self) -> None:
        """After a failed step: raises if the device can compute no more."""
        ...

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
            runner = _load_runner(config, progress)
        self.runner = runner
        self.info = runner.info
        self.scheduler = Scheduler(
            msgspec.structs.replace(config.scheduler, max_num_batched_tokens=self.info.max_num_batched_tokens),
            config.cache,
            num_blocks=self.info.num_blocks,
            max_model_len=self.info.max_model_len,
            needs_host=runner.needs_host,
            drafts=self.info.drafts,
        )
        self.frontends: dict[int, None] = {}
        """Front-ends that get load reports: those that were heard of and are not gone."""
        depth = config.scheduler.pipeline_depth
        self._depth = int(self.info.device.startswith("cuda")) if depth is None else depth
        self._in_flight: deque[tuple[SchedulerOutput, PendingStep]] = deque()
        self._last_step_failed = False
        self._next_report = 0.0
        self._replies: list[tuple[int, ToFrontend]] = []

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._replies)

    @property
    def num_steps(self) -> int:
        return self.scheduler.meter.total.steps

    @property
    def progress(self) -> int:
        """Grows while work is done, within a step too."""
        return self.num_steps + self.runner.progress

    def handle(self, message: ToCore) -> None:
        """Takes a front-end's message. What it leads to comes with the next `step`."""
        self.frontends[message.frontend] = None
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
        self.frontends.pop(frontend, None)
        self.scheduler.abort_frontend(frontend)

    def step(self) -> Messages:
        """One turn: schedule and launch a step, take the result of the oldest one in flight, tell the front-ends."""
        step = self.scheduler.schedule(time.monotonic())
        messages: Messages = {}
        if step is not None:
            self._launch(step, messages)
        for frontend, reply in self._replies:
            messages.setdefault(frontend, []).append(reply)
        self._replies.clear()
        if self._in_flight and (step is None or len(self._in_flight) > self._depth):
            self._finish_oldest(messages)
        _add(messages, self.scheduler.take_outputs())
        self._report_load(messages)
        return messages

    def _launch(self, step: SchedulerOutput, messages: Messages) -> None:
        try:
            self._in_flight.append((step, self.runner.submit(step)))
        except BaseException as error:
            self._fail_step(step, error, messages)

    def _finish_oldest(self, messages: Messages) -> None:
        step, pending = self._in_flight.popleft()
        try:
            result = pending.result()
        except BaseException as error:
            self._fail_step(step, error, messages)
        else:
            self._last_step_failed = False
            _add(messages, self.scheduler.update(step, result, time.monotonic()))

    def _fail_step(self, step: SchedulerOutput, error: BaseException, messages: Messages) -> None:
        """A step that cannot be computed fails its requests. Two in a row, or a broken device, end the process."""
        outputs = self.scheduler.fail_step(step, Reason.INTERNAL, time.monotonic())
        if not isinstance(error, Exception) or self._last_step_failed:
            raise error
        self._last_step_failed = True
        log.error("step %d failed; its %d requests fail with it", step.step_id, step.num_rows, exc_info=error)
        self.runner.check_device()
        _add(messages, outputs)

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


def _load_runner(config: EngineConfig, progress: Callable[[str], None]) -> Runner:
    from octavo.worker.runner import load_runner

    try:
        return load_runner(config, progress)
    except (RuntimeError, MemoryError) as error:  # torch's errors about memory, drivers and kernels
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise StartupError(StartupError.DEVICE, f"the device cannot run the model: {cause}") from error


def _add(messages: Messages, outputs: dict[int, EngineCoreOutputs]) -> None:
    for frontend, output in outputs.items():
        messages.setdefault(frontend, []).append(output)
