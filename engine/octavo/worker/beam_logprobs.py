"""Logprobs of a beam search: values along each beam's ancestry, where transformers' `beam_indices` lead through scores.

A beam's values are a list that it shares with the beams that go on from the same ancestor, so that a step adds one
entry to each candidate and moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.step import Float32s, Int32s, LogprobSpec, SequenceLogprobs
from octavo.types import LogprobKind
from octavo.worker.logprobs import NORMALIZED, RAW, chosen_and_ranks, most_likely


@dataclass(frozen=True, slots=True, eq=False)
class Trail:
    """Values of a sequence's last token, and where those of the tokens before it are."""

    before: Trail | None
    chosen: float
    rank: int
    top_token_ids: Int32s
    """[num_top]"""
    top_values: Float32s
    requested: Float32s
    """[number of requested ids]"""


def shown_values(logits: Tensor, scores: Tensor, kind: LogprobKind) -> Tensor:
    """[k, V] what a request wants to see, from the rows as the model left them and as the pipeline did."""
    values = logits if kind in RAW else scores
    return values.log_softmax(-1) if kind in NORMALIZED else values


def extended(
    trails: list[Trail | None], values: Tensor, parents: Int32s, token_ids: Int32s, spec: LogprobSpec
) -> list[Trail | None]:
    """The trails of a step's candidates.

    Args:
        trails: of the k rows.
        values: [k, V] from `shown_values`.
        parents: int32 [C] the row that each candidate goes on from.
        token_ids: int32 [C] the token that it appends.
    """
    chosen, ranks = chosen_and_ranks(values[torch.from_numpy(parents)], token_ids)
    top_ids, top_values = most_likely(values, spec.num_top)
    requested = values[:, spec.token_ids].numpy()
    return [
        Trail(trails[parent], value, rank, top_ids[parent], top_values[parent], requested[parent])
        for parent, value, rank in zip(parents.tolist(), chosen.tolist(), ranks.tolist(), strict=True)
    ]


def columns(trail: Trail | None, spec: LogprobSpec) -> SequenceLogprobs:
    """The values of a whole sequence, first token first; of none, if there is no trail."""
    entries: list[Trail] = []
    while trail is not None:
        entries.append(trail)
        trail = trail.before
    entries.reverse()
    size = len(entries)
    return SequenceLogprobs(
        num_top=spec.num_top,
        chosen=np.array([entry.chosen for entry in entries], np.float32),
        ranks=np.array([entry.rank for entry in entries], np.int32),
        top_token_ids=np.array([entry.top_token_ids for entry in entries], np.int32).reshape(size, spec.num_top),
        top_values=np.array([entry.top_values for entry in entries], np.float32).reshape(size, spec.num_top),
        requested=np.array([entry.requested for entry in entries], np.float32).reshape(size, len(spec.token_ids)),
    )
