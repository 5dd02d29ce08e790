"""Runs the steps that the scheduler decides on the kernels: embedding to sampled token without the host.

A step is one copy to the device (what changed, and which rows run), kernel launches, and a small record per row back.
Tokens, lengths and finished flags stay on the device and feed the next step; the host keeps a mirror of them in
`RequestStates`, one step late, for what only it does. Random numbers are a function of seed, step
and token (`octavo_kernels.philox`). Of requests that the fused sampler does not serve the host chooses the tokens, see
`host_rows`; a step without them does nothing more for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from octavo_kernels.history import apply_history
from octavo_kernels.inputs import StepInputs, apply_diffs, copy_blocks, prepare
from octavo_kernels.logprobs import LogprobBuffers, gather_logprobs
from octavo_kernels.paged_attention import prefill_tiles
from octavo_kernels.sampling import sample
from octavo_kernels.state import Feature, Finish
from octavo_kernels.workspace import SamplerWorkspace
from torch import Tensor

from octavo.config import EngineConfig
from octavo.errors import Reason
from octavo.step import Int32s, LogprobSpec, ModelRunnerOutput, SchedulerOutput
from octavo.types import GenerationParams
from octavo.worker.constraints import Constraints
from octavo.worker.device_logprobs import ReadLogprobs, copy_to_host, logprob_rows
from octavo.worker.device_states import DeviceStates
from octavo.worker.gpt2_triton import DeviceBatch, TritonGPT2
from octavo.worker.host_rows import HostRows, needs_host
from octavo.worker.host_sampler import HostSampler
from octavo.worker.input_batch import Ints, num_leading_ones, upload
from octavo.worker.model_loader import load_model
from octavo.worker.philox_noise import PhiloxNoise
from octavo.worker.prompt_logprobs import add_prompt_logprobs
from octavo.worker.request_states import Int64s, RequestStates
from octavo.worker.warm_up import warm_up

THREADS_PER_SM = 2048
INTERPRETED_SMS = 132
"""As many multiprocessors as an H100: how many rows of random numbers one fill has, see `octavo_kernels.philox`."""
HISTORY = (
    Feature.NO_REPEAT_NGRAM
    | Feature.ENCODER_NO_REPEAT_NGRAM
    | Feature.BAD_WORDS
    | Feature.BIAS
    | Feature.OUTPUT_PENALTY
)
"""What `apply_history` is launched for."""
FAILURES = {Finish.NON_FINITE_LOGITS: Reason.NON_FINITE_LOGITS, Finish.NON_FINITE_SCORES: Reason.NON_FINITE_SCORES}


Read = Callable[[ModelRunnerOutput], None]
"""Adds what a launched step gave, once the device has come that far."""


class LaunchedStep:
    """A step whose kernels are launched; its record is on its way to the host."""

    def __init__(self, finish: Callable[[], ModelRunnerOutput]) -> None:
        self._finish = finish
        self._output: ModelRunnerOutput | None = None

    def result(self) -> ModelRunnerOutput:
        """Waits for the device. Raises what went wrong in the step, if it did: none of its tokens count then."""
        if self._output is None:
            self._output = self._finish()
        return self._output


class DeviceRunner:
    """The worker of an engine core: loads a checkpoint, then computes steps in the order in which they come."""

    def __init__(self, config: EngineConfig, progress: Callable[[str], None]) -> None:
        """As `ModelRunner`."""
        loaded = load_model(config, progress)
        config, spec, device = loaded.config, loaded.spec, loaded.device
        assert isinstance(loaded.model, TritonGPT2)
        rows = config.scheduler.max_num_requests
        shape = (rows, spec.n_positions, config.cache.block_size, spec.vocab_size)
        self._device = device
        self._model = loaded.model
        self._model.reserve(rows)
        self._kv_cache = loaded.kv_cache
        self.num_blocks = loaded.num_blocks
        path = Path(config.model.path)
        self._states = RequestStates(*shape, Constraints(path, spec.vocab_size))
        self._device_states = DeviceStates(*shape, device)
        self._inputs = StepInputs.allocate(
            config.scheduler.max_num_batched_tokens, rows, self._states.block_table.shape[1], device
        )
        self._workspace = SamplerWorkspace.allocate(rows, spec.vocab_size, device)
        self._results = torch.empty(rows, 4, dtype=torch.int32, device=device)
        self._logprobs = LogprobBuffers.allocate(rows, device)
        self._num_threads = THREADS_PER_SM * (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED_SMS
        )
        sampler = HostSampler(self._states, PhiloxNoise(spec.vocab_size, self._num_threads), path)
        self._host_rows = HostRows(self._states, self._device_states, sampler)
        warm_up(self, spec, config.cache)
        self._states.free(0)
        self.info = loaded.info()

    def submit(self, step: SchedulerOutput) -> LaunchedStep:
        """Launches a step; steps take effect in the order of the calls. What goes wrong is raised by its result."""
        self._states.apply(step)
        self._host_rows.apply(step)
        self._device_states.stage(step, self._host_rows.mask)
        if self._host_rows:
            self._host_rows.stage(step)
        try:
            return LaunchedStep(self._launch(step))
        except Exception as error:
            return LaunchedStep(_raising(error))

    @property
    def progress(self) -> int:
        """Layers launched."""
        return self._model.num_layers_computed

    def needs_host(self, params: GenerationParams, logprobs: LogprobSpec | None) -> bool:
        """Whether a request's tokens have to be back before it is scheduled again."""
        return needs_host(params, logprobs)

    def check_device(self) -> None:
        """After a failed step: raises if the device can compute no more, as a CUDA context after an illegal access."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Gives the memory back."""
        del self._model, self._kv_cache, self._device_states, self._workspace

    @torch.inference_mode()
    def _launch(self, step: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        states, slots = self._states, step.slots
        rows = np.flatnonzero(step.samples & (states.finished[slots] == 0))
        if self._host_rows:
            rows = self._host_rows.behind(rows, slots)
        starts = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(step.num_scheduled, out=starts[1:])
        batch, indices, sample_slots = self._prepare(step, rows, starts)
        hidden = self._model.forward(batch, self._kv_cache)
        states.num_computed[slots] = step.num_computed + step.num_scheduled
        output = ModelRunnerOutput(np.full(len(slots), -1, np.int32), np.zeros(len(slots), np.uint8))
        if states.prompt_logprobs:
            add_prompt_logprobs(states, self._model, step, starts, hidden, output)
        if output.failed:
            alive = states.finished[slots[rows]] == 0
            kept = torch.from_numpy(np.flatnonzero(alive)).to(self._device)
            rows, indices, sample_slots = rows[alive], indices[kept], sample_slots[kept]
        if len(rows) == 0:
            return lambda: output
        reads = self._choose(self._model.logits(hidden[indices]), sample_slots, step, rows)
        event = self._recorded_event()

        def finish() -> ModelRunnerOutput:
            if event is not None:
                event.synchronize()
            for read in reads:
                read(output)
            return output

        return finish

    def _choose(self, logits: Tensor, sample_slots: Tensor, step: SchedulerOutput, rows: Int64s) -> list[Read]:
        """Chooses for rows [S] of a step, those of the host last, or starts what it takes."""
        num_on_host = int(self._host_rows.mask[step.slots[rows]].sum()) if self._host_rows else 0
        split, reads = len(rows) - num_on_host, []
        if split:
            reads.append(self._sample(logits[:split], sample_slots[:split], step.slots, rows[:split]))
        if num_on_host:
            own = logits[split:, : self._states.vocab_size]  # the device pads the vocabulary
            reads.append(self._host_rows.fetch(own, step, rows[split:]))
        return reads

    def _prepare(self, step: SchedulerOutput, rows: Int64s, starts: Int32s) -> tuple[DeviceBatch, Tensor, Tensor]:
        """Writes the step's diff to the state and lays out its tokens.

        Returns the batch, the index of each sampling row's last token, and the sampling rows' slots.
        """
        offsets, values = self._device_states.take()
        decodes = num_leading_ones(step.num_scheduled)
        tile_rows, tile_starts = prefill_tiles(starts, decodes)
        pairs = np.array(step.block_copies, np.int32).reshape(-1, 2)
        arrays: list[Ints] = [
            offsets,
            values,
            np.array([len(offsets)], np.int32),
            step.slots.astype(np.int32),
            starts,
            starts[1:][rows].astype(np.int64) - 1,
            step.slots[rows].astype(np.int32),
            tile_rows,
            tile_starts,
            np.ascontiguousarray(pairs[:, 0]),
            np.ascontiguousarray(pairs[:, 1]),
        ]
        on_device = upload(arrays, self._device)
        row_slots, query_start_loc, indices, sample_slots = on_device[3:7]
        if len(offsets):
            apply_diffs(self._device_states.state, *on_device[:3])
        if len(pairs):
            copy_blocks(self._kv_cache.data, on_device[9], on_device[10])
        inputs = self._inputs.narrow(int(starts[-1]), len(step.slots))
        prepare(
            self._device_states.state,
            row_slots,
            query_start_loc,
            inputs,
            block_size=self._kv_cache.block_size,
            num_blocks=self._kv_cache.data.shape[2],
        )
        batch = DeviceBatch(
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            query_start_loc=query_start_loc,
            seq_lens=inputs.seq_lens,
            block_tables=inputs.block_tables,
            num_decode_rows=decodes,
            tile_rows=on_device[7] if len(tile_rows) else None,
            tile_starts=on_device[8] if len(tile_rows) else None,
        )
        return batch, indices, sample_slots

    def _sample(self, logits: Tensor, row_slots: Tensor, slots: Int32s, rows: Int64s) -> Read:
        """Chooses a token for each of a step's rows [S] and advances its state; what was chosen comes to the host."""
        features = self._states.sampling.features[slots[rows]]
        used = int(np.bitwise_or.reduce(features))
        state, reciprocal = self._device_states.state, self._device.type == "cuda"
        results = self._results[: len(rows)]
        if used & HISTORY:
            apply_history(logits, state, row_slots, self._workspace, reciprocal=reciprocal)
        sample(logits, state, row_slots, self._workspace, results, reciprocal=reciprocal, num_threads=self._num_threads)
        values = None
        if used & Feature.LOGPROBS:
            gather_logprobs(logits, state, row_slots, self._workspace, results, self._logprobs)
            values = logprob_rows(self._logprobs, self._states, slots[rows], features & Feature.LOGPROBS != 0)
        record = copy_to_host(results)
        return lambda output: self._read(slots, rows, record, values, output)

    def _recorded_event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _read(
        self, slots: Int32s, rows: Int64s, record: Tensor, values: ReadLogprobs | None, output: ModelRunnerOutput
    ) -> None:
        """Reads what was sampled and brings the mirror up to it."""
        states = self._states
        token_ids, finish = record[:, 0].numpy(), record[:, 1].numpy()
        failed = [(int(rows[i]), FAILURES[Finish(int(finish[i]))]) for i in np.flatnonzero(finish >= min(FAILURES))]
        if failed:
            states.fail(slots[[row for row, _ in failed]])
            output.failed += failed
        chosen = token_ids >= 0
        if values is not None:
            output.logprobs = values(np.flatnonzero(chosen).tolist())
            if output.logprobs is not None:
                output.logprobs.rows = rows[output.logprobs.rows].astype(np.int32)
        output.token_ids[rows] = token_ids
        alive = rows[chosen]
        output.finish[alive] = states.append(slots[alive], token_ids[chosen])
        assert (output.finish[alive] == finish[chosen]).all(), "host and device disagree about who has finished"


def _raising(error: Exception) -> Callable[[], ModelRunnerOutput]:
    def finish() -> ModelRunnerOutput:
        raise error

    return finish
