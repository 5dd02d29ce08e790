"""Classifier-free guidance: logits of a sequence's two branches become one row, the first step of the pipeline.

As UnbatchedClassifierFreeGuidanceLogitsProcessor (huggingface/transformers,
src/transformers/generation/logits_process.py), which rounds the negative branch's log-probabilities to the model's
dtype; Sanchez et al. 2023, arXiv:2306.17806.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.step import Bools, Int32s
from octavo.worker.request_states import Int64s, RequestStates


@dataclass(frozen=True, slots=True)
class Guided:
    """Rows whose scores do not begin with their logits."""

    rows: Int64s
    """[G] ascending."""
    scores: Tensor
    """float32 [G, V]"""

    def alone(self, row: int) -> Guided | None:
        """As `guided` of a batch of this row only; None if it is not among `rows`."""
        index = int(np.searchsorted(self.rows, row))
        if index == len(self.rows) or self.rows[index] != row:
            return None
        return Guided(np.zeros(1, np.int64), self.scores[index : index + 1])

    def among(self, rows: Int64s) -> Guided:
        """As `guided` of a batch of these rows, ascending, of which all guided ones are."""
        return Guided(np.searchsorted(rows, self.rows), self.scores)


def guide(logits: Tensor, slots: Int32s, states: RequestStates) -> tuple[Bools, Guided | None]:
    """Takes the negative branches out of a step's rows.

    Args:
        logits: [S, V] of all sampling rows.
        slots: int32 [S] theirs.

    Returns:
        [S] which rows choose a token, and what guided ones among these choose from.
    """
    kept = ~states.is_negative[slots]
    place = np.full(states.num_slots + 1, -1, np.int64)
    place[slots] = np.arange(len(slots))
    own = np.flatnonzero(states.negative_slot[slots] >= 0)
    if len(own) == 0:
        return kept, None
    negative = place[states.negative_slot[slots[own]]]
    assert (negative >= 0).all(), "a branch does not sample with its sequence"
    scale = torch.from_numpy(states.sampling.guidance_scale[slots[own]][:, None]).to(logits.device)
    conditional = logits[torch.from_numpy(own).to(logits.device)].float().log_softmax(-1)
    unconditional = logits[torch.from_numpy(negative).to(logits.device)].log_softmax(-1)
    scores = scale * (conditional - unconditional) + unconditional
    return kept, Guided(np.cumsum(kept)[own] - 1, scores)
