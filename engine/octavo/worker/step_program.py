"""The launches of a step, from the rows' slots to sampled tokens: everything between reads and writes fixed memory.

A steady decode step uploads nothing: its rows are those of the step before, tokens and lengths are in the state, and
what the host has to say comes as diffs before the launches. The same launches serve the warm-up, eager steps and CUDA
graphs (`step_graphs`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from octavo_kernels.history import apply_history
from octavo_kernels.inputs import StepInputs, prepare
from octavo_kernels.sampling import sample
from octavo_kernels.shared_attention import SHARED_TILE
from octavo_kernels.state import SlotState
from octavo_kernels.workspace import SamplerWorkspace
from torch import Tensor

from octavo.worker.gpt2_triton import DeviceBatch, TritonGPT2
from octavo.worker.kv_cache import KVCache
from octavo.worker.step_layout import StepLayout, StepShape, most_words, parts_of

THREADS_PER_SM = 2048
INTERPRETED_SMS = 132
"""As many multiprocessors as an H100: how many rows of random numbers one fill has, see `octavo_kernels.philox`."""


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What a step leaves on the device, until the next one. R rows, T tokens of its shape."""

    hidden: Tensor
    """[T, E] after ln_f."""
    logits: Tensor
    """[R, num_columns] of each row's last token."""
    results: Tensor
    """int32 [R, 4], see `octavo_kernels.sampling.sample`."""


class StepProgram:
    """Owns the fixed memory of a step."""

    def __init__(
        self, model: TritonGPT2, kv_cache: KVCache, state: SlotState, *, max_rows: int, max_tokens: int
    ) -> None:
        """max_rows, max_tokens: of the largest shape."""
        device = model.device
        self.model = model
        self.device = device
        self._kv_cache = kv_cache
        self._state = state
        self.padding_slot = state.padding_slot
        self._words = torch.zeros(most_words(max_rows, max_tokens), dtype=torch.int32, device=device)
        self._on_device: StepLayout | None = None
        """What `_words` holds."""
        self._inputs = StepInputs.allocate(max_tokens, max_rows, state.block_table.shape[1], device)
        self.workspace = SamplerWorkspace.allocate(max_rows, state.vocab_size, device)
        self._results = torch.empty(max_rows, 4, dtype=torch.int32, device=device)
        self.num_threads = THREADS_PER_SM * (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED_SMS
        )
        model.reserve(max_rows)

    def write(self, layout: StepLayout) -> None:
        """Brings the words to the device, unless they are there."""
        words, before = layout.words, self._on_device
        if before is layout:
            return
        if before is not None and before.shape == layout.shape and np.array_equal(before.words, words):
            return
        source = torch.from_numpy(words)
        if self.device.type == "cuda":
            source = source.pin_memory()
        self._words[: len(words)].copy_(source, non_blocking=True)
        self._on_device = layout

    def sample_slots(self, shape: StepShape) -> Tensor:
        """int32 [R] of the step whose words were written last."""
        return parts_of(self._words, shape).sample_slots

    @torch.inference_mode()
    def launch(self, shape: StepShape) -> StepTensors:
        """Computes the step whose words were written: keys, values, tokens and the state move on."""
        parts = parts_of(self._words, shape)
        inputs = self._inputs.narrow(shape.num_tokens, shape.num_rows)
        prepare(
            self._state,
            parts.row_slots,
            parts.query_start_loc,
            inputs,
            block_size=self._kv_cache.block_size,
            num_blocks=self._kv_cache.data.shape[2],
            dependent_launch=self.model.dependent_launch,
        )
        batch = DeviceBatch(
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            query_start_loc=parts.query_start_loc,
            seq_lens=inputs.seq_lens,
            block_tables=inputs.block_tables,
            num_decode_rows=shape.decode_rows,
            tile_rows=parts.tile_rows if shape.num_tiles else None,
            tile_starts=parts.tile_starts if shape.num_tiles else None,
            shared_tiles=parts.shared_tiles.view(-1, SHARED_TILE) if shape.shared else None,
            shared_splits=parts.shared_splits if shape.shared else None,
        )
        hidden = self.model.forward(batch, self._kv_cache)
        last = hidden if shape.prefill_rows == 0 else hidden.index_select(0, parts.last_tokens)
        logits = self.model.logits(last)
        self._sample(logits, parts.sample_slots, history=shape.history)
        return StepTensors(hidden, logits, self._results[: shape.num_rows])

    def _sample(self, logits: Tensor, slots: Tensor, *, history: bool) -> None:
        reciprocal, dependent_launch = self.device.type == "cuda", self.model.dependent_launch
        if history:
            apply_history(
                logits,
                self._state,
                slots,
                self.workspace,
                reciprocal=reciprocal,
                dependent_launch=dependent_launch,
            )
        sample(
            logits,
            self._state,
            slots,
            self.workspace,
            self._results[: len(slots)],
            reciprocal=reciprocal,
            num_threads=self.num_threads,
            dependent_launch=dependent_launch,
        )
