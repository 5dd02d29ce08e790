"""Runs the steps that the scheduler decides: model, cache, request states and sampler, on one device."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from octavo.checkpoint import ModelSpec, read_spec
from octavo.config import EngineConfig
from octavo.errors import Reason, StartupError
from octavo.step import Int32s, ModelRunnerOutput, NewRequest, SchedulerOutput
from octavo.types import EngineInfo, GenerationParams
from octavo.worker.device import choose_device, choose_dtype, choose_load_dtype, describe_device, resolve_budget
from octavo.worker.gpt2 import GPT2
from octavo.worker.input_batch import InputBatch, InputBatchBuilder
from octavo.worker.kv_cache import KVCache, num_blocks_that_fit
from octavo.worker.logprobs import gather_prompt_logprobs, join_prompt_logprobs
from octavo.worker.memory import FrugalWeights, give_back_heap
from octavo.worker.noise import Noise
from octavo.worker.request_states import Float32s, Int64s, RequestStates
from octavo.worker.sampler import Sampler
from octavo.worker.weights import load_weights

log = logging.getLogger(__name__)

PROMPT_LOGPROB_ROWS = 64
"""Positions whose whole rows of logits are held at once for prompt logprobs: 26 MB at GPT-2's vocabulary."""
WARM_UP_TOKENS = 16


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
        path = Path(config.model.path)
        spec = read_spec(path)
        device = choose_device(config.model.device)
        config = resolve_budget(config, device)
        dtype = choose_dtype(config.model, spec, device)
        progress(f"device: {describe_device(device)}, dtype {_name(dtype)}")
        if config.model.num_threads:
            torch.set_num_threads(config.model.num_threads)
        if device.type == "cpu":  # what cannot work is said before the weights are read; a GPU's memory is known after
            _num_blocks(config, spec, device, dtype)
        load_dtype = choose_load_dtype(config.model, spec, device, dtype)
        weights = load_weights(path, spec, device=device, dtype=load_dtype, progress=progress)
        source = FrugalWeights(weights.tensors)
        self._model = GPT2(spec, source, device=device, dtype=dtype, quantization=config.model.quantization)
        give_back_heap()
        self.num_blocks = _num_blocks(config, spec, device, dtype)
        self._kv_cache = KVCache(spec, self.num_blocks, config.cache.block_size, dtype=dtype, device=device)
        progress(f"KV-cache: {self.num_blocks} blocks of {config.cache.block_size} tokens")
        self._states = RequestStates(
            config.scheduler.max_num_requests, spec.n_positions, config.cache.block_size, spec.vocab_size
        )
        self._noise = Noise(spec.vocab_size, device)
        self._sampler = Sampler(self._states, self._noise)
        self._batches = InputBatchBuilder(self._states, device)
        self._warm_up(min(WARM_UP_TOKENS, spec.n_positions - 1, config.cache.block_size - 1))
        self.info = EngineInfo(
            model=config.model.name,
            architecture="GPT2LMHeadModel",
            weights_sha256=weights.sha256,
            dtype=_name(dtype),
            device=describe_device(device),
            attention_backend=self._model.attention_backend,
            kv_cache_dtype=_name(self._kv_cache.dtype),
            num_parameters=weights.num_parameters,
            vocab_size=spec.vocab_size,
            n_positions=spec.n_positions,
            block_size=config.cache.block_size,
            num_blocks=self.num_blocks,
            max_num_requests=config.scheduler.max_num_requests,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=_max_model_len(config, spec),
            batch_invariant=False,
            start_time=time.time(),
        )
        weights.tensors.close()

    def submit(self, step: SchedulerOutput) -> PendingStep:
        """Launches a step; steps take effect in the order of the calls."""
        self._states.apply(step)
        for group_id in step.released_groups:
            self._noise.close(group_id)
        for group_id, row in step.ended_rows:
            self._noise.row_ended(group_id, row)
        for request in step.new_requests:
            if request.params.do_sample:
                self._noise.open(request.group_id, request.seed, request.num_rows)
        return PendingStep(lambda: self._compute(step))

    @property
    def progress(self) -> int:
        """Layers computed: grows while a step is computed."""
        return self._model.num_layers_computed

    def check_device(self) -> None:
        """After a failed step: raises if the device can compute no more, as a CUDA context after an illegal access."""
        if self._kv_cache.data.is_cuda:
            torch.cuda.synchronize(self._kv_cache.data.device)

    def close(self) -> None:
        """Gives the memory back."""
        del self._model, self._kv_cache

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
            self._add_prompt_logprobs(step, batch, hidden, output)
        if output.failed:
            alive = states.finished[slots[rows]] == 0
            rows, indices = rows[alive], indices[torch.from_numpy(alive).to(indices.device)]
        if len(rows):
            self._choose(self._model.logits(hidden[indices]), slots, rows, output)
        if any(reason is Reason.INTERNAL for _, reason in output.failed):
            self.check_device()  # if it is broken, no row is to blame
        return output

    def _choose(self, logits: Tensor, slots: Int32s, rows: Int64s, output: ModelRunnerOutput) -> None:
        """Samples the rows [S] of a step and appends the tokens to their requests."""
        states = self._states
        chosen = self._sampler.sample(logits, slots[rows])
        if chosen.failed:
            failed = [(int(rows[i]), reason) for i, reason in chosen.failed]
            states.fail(slots[[row for row, _ in failed]])
            output.failed += failed
        if chosen.logprobs is not None:
            chosen.logprobs.rows = rows[chosen.logprobs.rows].astype(np.int32)
            output.logprobs = chosen.logprobs
        output.token_ids[rows] = chosen.token_ids
        alive = rows[chosen.token_ids >= 0] if chosen.failed else rows
        output.finish[alive] = states.append(slots[alive], output.token_ids[alive])

    def _add_prompt_logprobs(
        self, step: SchedulerOutput, batch: InputBatch, hidden: Tensor, output: ModelRunnerOutput
    ) -> None:
        """Values of the prompt tokens that follow this step's positions, for the requests that asked. One whose
        computation raises fails alone."""
        states = self._states
        for row in np.flatnonzero(np.isin(step.slots, list(states.prompt_logprobs))).tolist():
            slot = int(step.slots[row])
            num_top = states.prompt_logprobs[slot]
            first = int(step.num_computed[row])
            count = min(int(step.num_scheduled[row]), int(states.prompt_len[slot]) - 1 - first)
            if first + count == int(states.prompt_len[slot]) - 1:
                del states.prompt_logprobs[slot]
            if count <= 0:
                continue
            begin = int(batch.query_start_loc_np[row])
            next_ids = states.hist[slot, first + 1 : first + count + 1]
            try:
                parts = self._prompt_logprobs(hidden[begin : begin + count], next_ids, num_top)
            except torch.AcceleratorError:
                raise
            except Exception:
                log.exception("prompt logprobs for slot %d failed; its request fails with them", slot)
                output.failed.append((row, Reason.INTERNAL))
                states.fail(step.slots[[row]])
                states.prompt_logprobs.pop(slot, None)
            else:
                output.prompt_logprobs.append(join_prompt_logprobs(row, first + 1, parts))

    def _prompt_logprobs(
        self, hidden: Tensor, next_ids: Int32s, num_top: int
    ) -> list[tuple[Float32s, Int32s, Int32s, Float32s]]:
        """In parts: hidden [T, E] of consecutive positions, next_ids [T]."""
        parts = []
        for start in range(0, len(next_ids), PROMPT_LOGPROB_ROWS):
            part = slice(start, start + PROMPT_LOGPROB_ROWS)
            parts.append(gather_prompt_logprobs(self._model.logits(hidden[part]), next_ids[part], num_top))
        return parts

    def _warm_up(self, num_tokens: int) -> None:
        """A prompt and a token, so that libraries are loaded and buffers exist; also that the weights make sense."""
        request = NewRequest(
            slot=0,
            group_id=-1,
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
            if (failed := self.submit(step).result().failed) and failed[0][1] is Reason.NON_FINITE_LOGITS:
                raise StartupError(StartupError.CHECKPOINT, "the weights give logits that are not finite")
        self._states.free(0)
        self._noise.close(-1)


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


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    longest = spec.n_positions + 1
    asked = config.scheduler.max_model_len or longest
    if not 2 <= asked <= longest:
        raise StartupError(StartupError.USAGE, f"max-model-len {asked}: must be from 2 to {longest} for this model")
    return asked


def _num_blocks(config: EngineConfig, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> int:
    """Usable blocks of the cache. Raises StartupError for sizes that cannot work."""
    block_size = config.cache.block_size
    if block_size not in (16, 32, 64):
        raise StartupError(StartupError.USAGE, f"block-size {block_size}: must be 16, 32 or 64")
    return num_blocks_that_fit(
        spec,
        config.cache,
        config.scheduler,
        max_model_len=_max_model_len(config, spec),
        dtype=dtype,
        device=device,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
