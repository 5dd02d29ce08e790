"""Runs the steps that the scheduler decides, on the CPU: model, cache, request states and sampler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from octavo.config import EngineConfig
from octavo.errors import Reason
from octavo.step import LogprobSpec, ModelRunnerOutput, SchedulerOutput
from octavo.types import GenerationParams
from octavo.worker.constraints import Constraints
from octavo.worker.gpt2 import GPT2
from octavo.worker.host_sampler import HostSampler
from octavo.worker.input_batch import InputBatchBuilder
from octavo.worker.model_loader import load_model
from octavo.worker.noise import Noise
from octavo.worker.prompt_logprobs import add_prompt_logprobs
from octavo.worker.request_states import RequestStates
from octavo.worker.speculation import DraftChecker, draft_indices
from octavo.worker.warm_up import WARM_UP_GROUP, warm_up


class PendingStep:
    """A launched step. It has been computed already: until the state lives on the device, launching is computing."""

    def __init__(self, compute: Callable[[], ModelRunnerOutput]) -> None:
        self._error: Exception | None = None
        try:
            self._output = compute()
        except Exception as error:
            self._error = error

    def result(self) -> ModelRunnerOutput:
        """Raises what went wrong in the step, if it did: none of its tokens count then."""
        if self._error is not None:
            raise self._error
        return self._output


class ModelRunner:
    """The worker of an engine core: loads a checkpoint, then computes steps in the order in which they come."""

    def __init__(self, config: EngineConfig, progress: Callable[[str], None]) -> None:
        """Loads the weights, allocates the cache and warms up. Raises StartupError.

        Args:
            progress: told of each stage, one line for people.
        """
        loaded = load_model(config, progress)
        config, spec = loaded.config, loaded.spec
        assert isinstance(loaded.model, GPT2)
        self._threads = loaded.threads
        self._model = loaded.model
        self._kv_cache = loaded.kv_cache
        self.num_blocks = loaded.num_blocks
        self._states = RequestStates(
            config.scheduler.max_num_requests,
            spec.n_positions,
            config.cache.block_size,
            spec.vocab_size,
            Constraints(Path(config.model.path), spec.vocab_size),
        )
        noise = Noise(spec.vocab_size, loaded.device)
        self._host = HostSampler(self._states, noise, Path(config.model.path))
        self._drafts = DraftChecker(self._states, self._host.sampler)
        self._batches = InputBatchBuilder(self._states, loaded.device)
        warm_up(self, spec, config.cache)
        self._states.free(0)
        self._host.release(WARM_UP_GROUP)
        self.info = loaded.info()

    def submit(self, step: SchedulerOutput) -> PendingStep:
        """Launches a step; steps take effect in the order of the calls."""
        self._states.apply(step)
        self._host.apply(step, step.new_requests)
        return PendingStep(lambda: self._compute(step))

    @property
    def progress(self) -> int:
        """Layers computed: grows while a step is computed."""
        return self._model.num_layers_computed

    def needs_host(self, params: GenerationParams, logprobs: LogprobSpec | None) -> bool:
        """Launching is computing: every token is there when the next step is scheduled."""
        return False

    def check_device(self) -> None:
        """After a failed step: raises if the device can compute no more, as a CUDA context after an illegal access."""
        if self._kv_cache.data.is_cuda:
            torch.cuda.synchronize(self._kv_cache.data.device)

    def close(self) -> None:
        """Gives memory and cores back."""
        del self._model, self._kv_cache
        self._threads.release()

    @torch.inference_mode()
    def _compute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        states, slots = self._states, step.slots
        rows = np.flatnonzero(step.samples & (states.finished[slots] == 0))
        batch = self._batches.build(step, rows)
        if step.block_copies:
            self._kv_cache.copy_blocks(step.block_copies)
        hidden = self._model.forward(batch, self._kv_cache)
        states.num_computed[slots] = step.num_computed + step.num_scheduled
        output = ModelRunnerOutput(np.full(len(slots), -1, np.int32), np.zeros(len(slots), np.uint8))
        indices = batch.logits_indices
        if states.prompt_logprobs:
            add_prompt_logprobs(states, self._model, step, batch.query_start_loc_np, hidden, output)
        if output.failed:
            alive = states.finished[slots[rows]] == 0
            rows, indices = rows[alive], indices[torch.from_numpy(alive).to(indices.device)]
        if len(rows):
            if step.drafts:
                drafted = torch.from_numpy(draft_indices(step, rows, batch.query_start_loc_np)).to(indices.device)
                indices = torch.cat([indices, drafted])
            logits = self._model.logits(hidden[indices])
            self._host.choose(logits[: len(rows)], step, rows, output)
            if step.drafts:
                self._drafts.check(logits[len(rows) :], step, rows, output)
        if any(reason is Reason.INTERNAL for _, reason in output.failed):
            self.check_device()  # if it is broken, no row is to blame
        return output
