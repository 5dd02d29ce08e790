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
from octavo.worker.step_layout import (
    ROUND_MULTIPLE,
    StepLayout,
    StepShape,
    StepWords,
    largest_drafts,
    most_words,
    multiple_of,
    parts_of,
)

THREADS_PER_SM = 2048
INTERPRETED_SMS = 132
"""As many multiprocessors as an H100: how many rows of random numbers one fill has, see `octavo_kernels.philox`."""


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What a step leaves on the device, until the next one. T tokens, P places of its shape."""

    hidden: Tensor
    """[T, E] after ln_f."""
    logits: Tensor
    """[P, num_columns]"""
    results: Tensor
    """int32 [P, 4], see `octavo_kernels.sampling.sample`."""


class StepProgram:
    """Owns the fixed memory of a step."""

    def __init__(
        self, model: TritonGPT2, kv_cache: KVCache, state: SlotState, *, max_rows: int, max_tokens: int
    ) -> None:
        """max_rows, max_tokens: of the largest shape, before drafts are added."""
        device = model.device
        drafts = largest_drafts(max_rows)
        self.max_places = multiple_of(ROUND_MULTIPLE, max_rows + drafts.draft_rows) + drafts.num_places
        self.model = model
        self.device = device
        self._kv_cache = kv_cache
        self._state = state
        self.padding_slot = state.padding_slot
        self._words = torch.zeros(most_words(max_rows, max_tokens), dtype=torch.int32, device=device)
        self._on_device: StepLayout | None = None
        """What `_words` holds."""
        self._inputs = StepInputs.allocate(
            max_tokens + drafts.num_tokens, max_rows + drafts.num_rows, state.block_table.shape[1], device
        )
        self.workspace = SamplerWorkspace.allocate(self.max_places, state.vocab_size, device)
        self._results = torch.empty(self.max_places, 4, dtype=torch.int32, device=device)
        self.num_threads = THREADS_PER_SM * (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED_SMS
        )
        model.reserve(max_rows, drafts.draft_rows)

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
        """int32 [P] of the step whose words were written last."""
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
        if shape.draft_rows:  # the state ends with the token before the draft: 0 is what is there of it
            others = inputs.input_ids[shape.decode_rows :]
            torch.maximum(others, parts.draft_ids, out=others)
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
            num_draft_rows=shape.draft_rows,
        )
        hidden = self.model.forward(batch, self._kv_cache)
        each = shape.num_rows == shape.decode_rows
        logits = self.model.logits(hidden if each else hidden.index_select(0, parts.logits_indices))
        first = slice(0, shape.first_places)
        self._sample(logits[first], parts.sample_slots[first], first, history=shape.history)
        if shape.draft_rows:
            self._choose_on(logits, parts, shape)
        return StepTensors(hidden, logits, self._results[: shape.num_places])

    def _choose_on(self, logits: Tensor, parts: StepWords[Tensor], shape: StepShape) -> None:
        """The rounds behind the first: rows whose draft was right so far choose on, each as in a step of its own, for
        the state has moved on with every round."""
        before = slice(shape.num_rows - shape.draft_rows, shape.num_rows)
        drafted = parts.drafted.view(-1, shape.draft_rows)
        for number in range(shape.draft_rounds):
            places = shape.round_places(number)
            wrong = self._results[before, 0] != drafted[number]
            slots = parts.sample_slots[places].masked_fill(wrong, self.padding_slot)
            self._sample(logits[places], slots, places, history=shape.history)
            before = places

    def _sample(self, logits: Tensor, slots: Tensor, places: slice, *, history: bool) -> None:
        reciprocal, dependent_launch = self.device.type == "cuda", self.model.dependent_launch
        workspace = self.workspace.narrow(places)
        if history:
            apply_history(
                logits,
                self._state,
                slots,
                workspace,
                reciprocal=reciprocal,
                dependent_launch=dependent_launch,
            )
        sample(
            logits,
            self._state,
            slots,
            workspace,
            self._results[places],
            reciprocal=reciprocal,
            num_threads=self.num_threads,
            dependent_launch=dependent_launch,
        )
