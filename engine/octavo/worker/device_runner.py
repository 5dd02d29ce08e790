"""Runs the steps that the scheduler decides on the kernels: embedding to sampled token without the host.

A step is what changed since the last one, copied to the device if anything did, the launches of its shape
(`step_program`, as a CUDA graph where there is one), and a small record per row back. Tokens, lengths and finished
flags stay on the device and feed the next step; the host keeps a mirror of them in `RequestStates`, one step late, for
what only it does. Random numbers are a function of seed, step and token (`octavo_kernels.philox`). Of requests that the
fused sampler does not serve the host chooses the tokens, see `host_rows`; a step without them does nothing more for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from octavo_kernels.inputs import apply_diffs, copy_blocks
from octavo_kernels.logprobs import LogprobBuffers, gather_logprobs
from octavo_kernels.state import Feature

from octavo.config import EngineConfig, shares_prefixes
from octavo.step import Bools, Int32s, LogprobSpec, ModelRunnerOutput, SchedulerOutput
from octavo.types import DraftLimits, GenerationParams
from octavo.worker.constraints import Constraints
from octavo.worker.device_logprobs import copy_to_host, logprob_rows
from octavo.worker.device_results import Choices, ResultReader
from octavo.worker.device_states import DeviceStates
from octavo.worker.gpt2_triton import TritonGPT2
from octavo.worker.host_rows import HostRows, needs_host
from octavo.worker.host_sampler import HostSampler
from octavo.worker.input_batch import num_leading_ones, upload
from octavo.worker.kv_cache import PADDING_ROWS
from octavo.worker.model_loader import load_model
from octavo.worker.philox_noise import PhiloxNoise
from octavo.worker.prompt_logprobs import add_prompt_logprobs
from octavo.worker.request_states import Int64s, RequestStates
from octavo.worker.shared_prefixes import PrefixFinder
from octavo.worker.step_graphs import StepGraphs, capture_graphs
from octavo.worker.step_layout import (
    MAX_DRAFT,
    StepLayout,
    exact_shape,
    largest_drafts,
    lay_out,
    max_shared_tiles,
    parts_of,
)
from octavo.worker.step_program import StepProgram, StepTensors
from octavo.worker.warm_up import warm_up

HISTORY = (
    Feature.NO_REPEAT_NGRAM
    | Feature.ENCODER_NO_REPEAT_NGRAM
    | Feature.BAD_WORDS
    | Feature.BIAS
    | Feature.OUTPUT_PENALTY
)
"""What `apply_history` is launched for."""

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


@dataclass(frozen=True, slots=True)
class _DecodeLayout:
    """Of a step all of whose rows decode."""

    slots: Int32s
    sampled: Bools
    layout: StepLayout

    def is_of(self, slots: Int32s, sampled: Bools) -> bool:
        return np.array_equal(slots, self.slots) and np.array_equal(sampled, self.sampled)


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
        self._kv_cache = loaded.kv_cache
        self.num_blocks = loaded.num_blocks
        path = Path(config.model.path)
        self._states = RequestStates(*shape, Constraints(path, spec.vocab_size))
        self._device_states = DeviceStates(*shape, device)
        self._program = StepProgram(
            loaded.model,
            loaded.kv_cache,
            self._device_states.state,
            max_rows=rows + PADDING_ROWS,
            max_tokens=rows + config.scheduler.max_num_batched_tokens,
        )
        self._graphs = StepGraphs(self._program)
        self._prefixes = PrefixFinder(self._states) if shares_prefixes(config.model) else None
        self._last: _DecodeLayout | None = None
        self._logprobs = LogprobBuffers.allocate(self._program.max_places, device)
        self._reader = ResultReader(self._states, self._device_states)
        sampler = HostSampler(self._states, PhiloxNoise(spec.vocab_size, device, self._program.num_threads), path)
        self._host_rows = HostRows(self._states, self._device_states, sampler)
        warm_up(self, spec, config.cache)
        self._states.free(0)
        capture_graphs(self._graphs, config, device, progress)
        drafts = largest_drafts(rows).draft_rows
        limits = DraftLimits(max_rows=drafts, max_tokens_of_row=MAX_DRAFT, beside_prompts=False)
        self.info = msgspec.structs.replace(loaded.info(), drafts=limits)

    def submit(self, step: SchedulerOutput) -> LaunchedStep:
        """Launches a step; steps take effect in the order of the calls. What goes wrong is raised by its result."""
        self._states.apply(step)
        if self._prefixes is not None:
            self._prefixes.apply(step)
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
        del self._model, self._kv_cache, self._device_states, self._program, self._graphs

    @torch.inference_mode()
    def _launch(self, step: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        states, slots = self._states, step.slots
        samples = step.samples & (states.finished[slots] == 0)
        on_host = samples & self._host_rows.mask[slots] if self._host_rows else None
        sampled = samples if on_host is None else samples & ~on_host
        layout = self._lay_out(step, sampled)
        self._write_changes(step)
        self._program.write(layout)
        tensors = self._graphs.run(layout.shape)
        states.num_computed[slots] = step.num_computed + step.num_scheduled
        output = ModelRunnerOutput(np.full(len(slots), -1, np.int32), np.zeros(len(slots), np.uint8))
        if states.prompt_logprobs:
            starts = parts_of(layout.words, layout.shape).query_start_loc[layout.places]
            add_prompt_logprobs(states, self._model, step, starts, tensors.hidden, output)
            samples = samples & (states.finished[slots] == 0)
        reads = self._start_reading(step, layout, tensors, samples, on_host)
        event = self._recorded_event()

        def finish() -> ModelRunnerOutput:
            if event is not None:
                event.synchronize()
            for read in reads:
                read(output)
            return output

        return finish

    def _lay_out(self, step: SchedulerOutput, sampled: Bools) -> StepLayout:
        """The step in a shape for which there is a graph, if one holds it. sampled: [R] rows of the fused sampler.

        That of the step before, if the same rows decode: then nothing has to be uploaded.
        """
        decodes = num_leading_ones(step.num_scheduled)
        steady = decodes == len(step.slots) and not step.new_requests
        if steady and self._last is not None and self._last.is_of(step.slots, sampled):
            return self._last.layout
        used = np.bitwise_or.reduce(self._states.sampling.features[step.slots[sampled]], initial=0)
        prefixes = None
        if self._prefixes is not None:
            prefixes = self._prefixes.find(step.slots[:decodes], step.num_computed[:decodes], max_shared_tiles(decodes))
        history, shared = bool(used & HISTORY), prefixes is not None
        exact = exact_shape(step.num_scheduled, decodes, history=history, shared=shared, drafts=step.drafts)
        shape, padding = self._graphs.shape_for(exact), self._device_states.state.padding_slot
        layout = lay_out(shape, step.slots, step.num_scheduled, decodes, sampled, padding, prefixes, step.drafts)
        self._last = _DecodeLayout(step.slots, sampled, layout) if decodes == len(step.slots) else None
        return layout

    def _write_changes(self, step: SchedulerOutput) -> None:
        """Brings the step's diff to the state, and copies blocks."""
        offsets, values = self._device_states.take()
        if len(offsets):
            count = np.array([len(offsets)], np.int32)
            apply_diffs(self._device_states.state, *upload([offsets, values, count], self._device))
        if step.block_copies:
            pairs = np.array(step.block_copies, np.int32)
            copy_blocks(self._kv_cache.data, *upload([pairs[:, 0].copy(), pairs[:, 1].copy()], self._device))

    def _start_reading(
        self, step: SchedulerOutput, layout: StepLayout, tensors: StepTensors, samples: Bools, on_host: Bools | None
    ) -> list[Read]:
        """Starts the copies of what the step gave. samples, on_host: [R] rows that want a token, from the host."""
        reads: list[Read] = []
        rows = np.flatnonzero(samples if on_host is None else samples & ~on_host)
        if len(rows):
            reads.append(self._read_later(step, rows, layout, tensors))
        if on_host is not None and (samples & on_host).any():
            own = np.flatnonzero(samples & on_host)
            index = torch.from_numpy(layout.places[own]).to(self._device)
            logits = tensors.logits[index, : self._states.vocab_size]  # the device pads the vocabulary
            reads.append(self._host_rows.fetch(logits, step, own))
        return reads

    def _read_later(self, step: SchedulerOutput, rows: Int64s, layout: StepLayout, tensors: StepTensors) -> Read:
        """Starts the copy of what was sampled for a step's rows [S]."""
        choices = Choices.of(step, layout, rows)
        places, slots = choices.places, step.slots[choices.rows]
        wants = self._states.sampling.features[slots] & Feature.LOGPROBS != 0
        values = None
        if wants.any():
            sample_slots = self._program.sample_slots(layout.shape)
            state, workspace = self._device_states.state, self._program.workspace
            gather_logprobs(tensors.logits, state, sample_slots, workspace, tensors.results, self._logprobs)
            values = logprob_rows(self._logprobs, self._states, slots, places, wants)
        record = copy_to_host(tensors.results)
        return lambda output: self._reader.read(step, choices, record.numpy()[places], values, output)

    def _recorded_event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event


def _raising(error: Exception) -> Callable[[], ModelRunnerOutput]:
    def finish() -> ModelRunnerOutput:
        raise error

    return finish
