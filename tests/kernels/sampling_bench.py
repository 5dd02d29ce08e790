"""Rows of random requests on the device, for the sampling kernels' tests.

What the host writes into the state is the engine's, so that it is tested too.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from octavo.step import LogprobSpec
from octavo.types import LogprobKind
from octavo.worker.device_states import DeviceStates
from octavo_kernels.history import apply_history
from octavo_kernels.sampling import sample
from octavo_kernels.workspace import SamplerWorkspace
from worker.sampling import N_POSITIONS, Row, step_with

NUM_THREADS = 132 * 2048
EVERY_SCORE = LogprobSpec(0, LogprobKind.PROCESSED_LOGIT, [])


class Device:
    """One slot per row, everything on the device."""

    def __init__(self, rows: list[Row], device: torch.device, *, shows_scores: bool = True) -> None:
        """shows_scores: the kernel writes every row's scores, as it does for requests that want to see them."""
        if shows_scores:
            rows = [row if row.logprobs else dataclasses.replace(row, logprobs=EVERY_SCORE) for row in rows]
        self.rows = rows
        self.vocab_size = rows[0].logits.numel()
        self.states = DeviceStates(len(rows), N_POSITIONS, 16, self.vocab_size, device)
        step = step_with(new_requests=[row.request(slot) for slot, row in enumerate(rows)])
        self.states.stage(step, on_host=np.zeros(len(rows) + 1, np.bool_))
        offsets, values = self.states.take()
        self.states.state.arena[torch.from_numpy(offsets).long().to(device)] = torch.from_numpy(values).to(device)
        self.workspace = SamplerWorkspace.allocate(len(rows), self.vocab_size, device)
        self.results = torch.full((len(rows), 4), 77, dtype=torch.int32, device=device)
        padded = -(-self.vocab_size // 64) * 64
        self.logits = torch.full((len(rows), padded), math.nan, dtype=rows[0].logits.dtype, device=device)
        self.logits[:, : self.vocab_size] = torch.stack([row.logits for row in rows]).to(device)
        self.slots = torch.arange(len(rows), dtype=torch.int32, device=device)

    def sample(self) -> np.ndarray:
        state, reciprocal = self.states.state, self.logits.is_cuda
        apply_history(self.logits, state, self.slots, self.workspace, reciprocal=reciprocal)
        sample(
            self.logits, state, self.slots, self.workspace, self.results, reciprocal=reciprocal, num_threads=NUM_THREADS
        )
        return self.results.cpu().numpy()

    def processed(self, row: int) -> torch.Tensor:
        """[V] scores, -inf where a filter dropped them."""
        scores = self.workspace.scores[row, : self.vocab_size].cpu()
        lo, hi = self.workspace.interval[row].tolist()
        return torch.where((scores >= lo) & (scores <= hi), scores, -math.inf)
