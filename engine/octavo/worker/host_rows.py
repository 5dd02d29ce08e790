"""Rows of the device path whose tokens the host chooses: what the fused sampler does not know, or has no room for.

Their logits are copied to the host and go through `HostSampler`, as all do on the CPU's path. What it chose is staged
for the device's state, which has it when the request is scheduled next: the scheduler waits for that (`needs_host`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from octavo_kernels.logprobs import MAX_TOP
from octavo_kernels.state import ListSizes
from torch import Tensor

from octavo.step import Int32s, LogprobSpec, ModelRunnerOutput, SchedulerOutput
from octavo.types import GenerationParams
from octavo.worker.beams import is_beam_search
from octavo.worker.device_logprobs import copy_to_host
from octavo.worker.device_states import DeviceStates
from octavo.worker.host_sampler import HostSampler
from octavo.worker.request_states import Int64s, RequestStates

SIZES: Final = ListSizes()


class HostRows:
    """Knows which slots they are; false while there are none."""

    def __init__(self, states: RequestStates, device_states: DeviceStates, sampler: HostSampler) -> None:
        self._states = states
        self._device_states = device_states
        self._sampler = sampler
        self.mask = np.zeros(states.num_slots + 1, np.bool_)
        """[S + 1]"""
        self._slots: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._slots)

    def apply(self, step: SchedulerOutput) -> None:
        """Before the step's changes are staged for the device."""
        self._slots.difference_update(step.freed_slots)
        self.mask[step.freed_slots] = False
        own = [r for r in step.new_requests if r.guides >= 0 or needs_host(r.params, r.logprobs)]
        self._slots.update(request.slot for request in own)
        self.mask[[request.slot for request in own]] = True
        self._sampler.apply(step, own)

    def stage(self, step: SchedulerOutput) -> None:
        """After them: a row of a search that shares its first tokens' blocks from now on has computed these tokens."""
        moved = np.flatnonzero(self._states.num_computed[step.slots] != step.num_computed)
        self._device_states.stage_num_computed(step.slots[moved], step.num_computed[moved])

    def fetch(self, logits: Tensor, step: SchedulerOutput, rows: Int64s) -> Callable[[ModelRunnerOutput], None]:
        """Starts the copy of the logits [S, V] of rows of a step.

        Returns what to call when it is complete: it chooses their tokens, and stages them for the device.
        """
        on_host = copy_to_host(logits)

        def choose(output: ModelRunnerOutput) -> None:
            slots = step.slots[rows]
            lengths = self._states.length[slots]
            with torch.inference_mode():
                self._sampler.choose(on_host, step, rows, output)
            self._stage_choices(slots, lengths)

        return choose

    def _stage_choices(self, slots: Int32s, lengths: Int32s) -> None:
        """lengths: of the slots [S] before the choice. Rows of a search take over all that their parents had."""
        states, device = self._states, self._device_states
        of_searches = self._sampler.of_searches(slots)
        for slot, start, is_beam in zip(slots.tolist(), lengths.tolist(), of_searches.tolist(), strict=True):
            length = int(states.length[slot])
            if length == start:  # it failed
                continue
            if is_beam:
                start = 0
                device.stage_table(slot, states.block_table[slot])
            device.stage_tokens(slot, start, states.hist[slot, start:length])


def needs_host(params: GenerationParams, logprobs: LogprobSpec | None) -> bool:
    """Whether the host chooses the request's tokens."""
    return (
        is_beam_search(params)
        or params.guidance_scale not in (None, 1.0)
        or params.watermarking_config is not None
        or params.structured_output is not None
        or not _has_room(params, logprobs)
    )


def _has_room(params: GenerationParams, logprobs: LogprobSpec | None) -> bool:
    """Whether the lists fit a slot of the device. The server's limits see to that, unless they were raised."""
    biased = [entry.token_ids for entry in params.sequence_bias]
    return (
        len(biased) + len(params.logit_bias) <= SIZES.biases
        and _sequences_fit(biased)
        and _sequences_fit(params.bad_words_ids)
        and (logprobs is None or (logprobs.num_top <= MAX_TOP and len(logprobs.token_ids) <= SIZES.requested))
    )


def _sequences_fit(sequences: Sequence[Sequence[int]]) -> bool:
    longer = [len(sequence) for sequence in sequences if len(sequence) > 1]
    return len(longer) <= SIZES.sequences and sum(longer) + 2 * len(longer) <= SIZES.sequence_words
