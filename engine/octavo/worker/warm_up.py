"""The first steps of a runner: libraries are loaded, kernels compiled, and weights that make no sense are found."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from octavo.checkpoint import ModelSpec
from octavo.config import CacheConfig
from octavo.errors import Reason, StartupError
from octavo.step import ModelRunnerOutput, NewRequest, SchedulerOutput
from octavo.types import GenerationParams

WARM_UP_TOKENS = 16
WARM_UP_GROUP = -1


class Step(Protocol):
    def result(self) -> ModelRunnerOutput: ...


class Runner(Protocol):
    def submit(self, step: SchedulerOutput) -> Step: ...


def warm_up(runner: Runner, spec: ModelSpec, cache: CacheConfig) -> None:
    """Runs a prompt and a token in slot 0, which is the caller's to free. Raises StartupError."""
    num_tokens = min(WARM_UP_TOKENS, spec.n_positions - 1, cache.block_size - 1)
    request = NewRequest(
        slot=0,
        group_id=WARM_UP_GROUP,
        row=0,
        num_rows=1,
        token_ids=np.zeros(num_tokens, np.int32),
        prompt_len=num_tokens,
        num_computed_tokens=0,
        block_ids=np.array([1], np.int32),
        params=GenerationParams(do_sample=True, top_k=50),
        max_total_tokens=num_tokens + 2,
        eos_token_ids=(),
        stop_token_ids=(),
        seed=0,
    )
    steps = [_single_row_step(0, num_tokens, [request]), _single_row_step(num_tokens, 1, [])]
    for step in steps:
        if (failed := runner.submit(step).result().failed) and failed[0][1] is Reason.NON_FINITE_LOGITS:
            raise StartupError(StartupError.CHECKPOINT, "the weights give logits that are not finite")


def _single_row_step(num_computed: int, num_tokens: int, new_requests: list[NewRequest]) -> SchedulerOutput:
    return SchedulerOutput(
        step_id=0,
        slots=np.zeros(1, np.int32),
        num_computed=np.array([num_computed], np.int32),
        num_scheduled=np.array([num_tokens], np.int32),
        samples=np.ones(1, np.bool_),
        num_decode_rows=int(num_tokens == 1),
        new_requests=new_requests,
    )
