"""The engine-core process with a runner that computes nothing: `python mock_core.py --fd N --ticks FILE ...`.

Scheduler, sockets and messages are the real ones. A step ends at the next tick of a clock; every request gets the
token `step number % CYCLE`, and the time of that step is in FILE, an array of CYCLE float64 (CLOCK_MONOTONIC seconds),
so that whoever sees the token knows how long it was on its way. The first step waits until all requests are there.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from octavo.config import EngineConfig
from octavo.engine_core import process
from octavo.engine_core.engine_core import EngineCore, Messages
from octavo.ipc import StartCore
from octavo.ipc_channel import Channel, die_with_parent, socket_of_child
from octavo.step import LogprobSpec, ModelRunnerOutput, SchedulerOutput
from octavo.types import EngineInfo, FinishReason, GenerationParams

CYCLE = 4000
"""Below the demo model's vocabulary and its end of sequence."""
BLOCK_SIZE = 32
MAX_MODEL_LEN = 1025


def engine_info(num_requests: int) -> EngineInfo:
    return EngineInfo(
        model="mock",
        architecture="none",
        weights_sha256="",
        dtype="float32",
        device="none",
        attention_backend="none",
        kv_cache_dtype="float32",
        num_parameters=0,
        vocab_size=4096,
        n_positions=MAX_MODEL_LEN - 1,
        block_size=BLOCK_SIZE,
        num_blocks=num_requests * (MAX_MODEL_LEN // BLOCK_SIZE + 1),
        max_num_requests=num_requests,
        max_num_batched_tokens=max(2048, 16 * num_requests),
        max_model_len=MAX_MODEL_LEN,
        batch_invariant=True,
        start_time=time.time(),
    )


class MockRunner:
    """Its own pending step: a result is due at the next tick."""

    progress = 0

    def __init__(self, options: argparse.Namespace) -> None:
        self.info = engine_info(options.requests)
        self._interval = options.interval
        self._total = options.total
        self._times = np.memmap(options.ticks, "<f8", "r+", shape=(CYCLE,))
        self._next = 0.0
        self._step: SchedulerOutput | None = None

    def submit(self, step: SchedulerOutput) -> MockRunner:
        self._step = step
        return self

    def result(self) -> ModelRunnerOutput:
        step = self._step
        assert step is not None
        while (left := self._next - time.monotonic()) > 0:
            time.sleep(left)
        now = time.monotonic()
        self._next = max(self._next, now - self._interval) + self._interval
        token = step.step_id % CYCLE
        self._times[token] = now
        ends = step.samples & (step.num_computed + step.num_scheduled + 1 >= self._total)
        return ModelRunnerOutput(
            np.where(step.samples, np.int32(token), np.int32(-1)),
            np.where(ends, np.uint8(FinishReason.LENGTH), np.uint8(0)),
        )

    def needs_host(self, params: GenerationParams, logprobs: LogprobSpec | None) -> bool:
        return False

    def check_device(self) -> None: ...

    def close(self) -> None: ...


class WaitingCore(EngineCore):
    """Does not begin before all of the requests are there."""

    def __init__(self, config: EngineConfig, runner: MockRunner, num_requests: int) -> None:
        super().__init__(config, runner=runner)
        self._missing = num_requests

    def step(self) -> Messages:
        if self._missing:
            load = self.scheduler.load(time.monotonic())
            if load.waiting_requests < self._missing:
                time.sleep(0.002)
                return {}
            self._missing = 0
        return super().step()


class MockProcess(process.CoreProcess):
    def __init__(self, channel: Channel[process.ToChild], options: argparse.Namespace) -> None:
        super().__init__(channel)
        self._options = options

    def _build(self, start: StartCore) -> EngineCore:
        return WaitingCore(start.config, MockRunner(self._options), self._options.requests)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True, help="the control channel")
    parser.add_argument("--ticks", required=True, help="file of the ticks' times")
    parser.add_argument("--interval", type=float, required=True, help="seconds between two ticks")
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--total", type=int, required=True, help="length at which a request ends, prompt included")
    options = parser.parse_args()
    die_with_parent()
    process.log.configure("core")
    MockProcess(Channel(socket_of_child(options.fd), process.ToChild), options).run()


if __name__ == "__main__":
    main()
