"""Classifier-free guidance: a sequence with two rows, one after the prompt and one after the negative prompt.

Both are in slots of their own and get the same tokens, which the worker chooses from the logits of both.
`BeamScheduler` schedules them like the rows of a search, so that they take each sampling step together and nothing runs
ahead; but their tokens differ from the start, so they share no blocks. The first row is the one that the world sees:
tokens, ends and time limits are its own, as for any other sequence, and `follow` gives its token to the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from octavo.ipc import EngineCoreRequest
from octavo.step import Int32s, NewRequest
from octavo.types import GenerationParams

if TYPE_CHECKING:
    from octavo.core.request import Request
    from octavo.core.running_batch import RunningBatch, Slots


def branches(spec: EngineCoreRequest) -> list[Int32s]:
    """What the rows begin with."""
    return [np.frombuffer(ids, np.int32) for ids in (spec.prompt_token_ids, spec.negative_prompt_token_ids)]


def max_totals(spec: EngineCoreRequest) -> list[int]:
    """How long the rows can become."""
    prompt, negative = branches(spec)
    return [spec.max_total_tokens, len(negative) + spec.max_total_tokens - len(prompt)]


def negative_branch(request: Request, block_ids: Int32s) -> NewRequest:
    """What the worker is told of the second row."""
    group, beams = request.group, request.beams
    assert beams is not None
    return NewRequest(
        slot=beams.slots[1],
        group_id=group.group_id,
        row=request.row,
        num_rows=group.num_rows,
        token_ids=beams.rows[1],
        prompt_len=len(group.spec.negative_prompt_token_ids) // 4,
        num_computed_tokens=0,
        block_ids=block_ids,
        params=GenerationParams(),
        max_total_tokens=beams.max_totals[1],
        eos_token_ids=(),
        stop_token_ids=(),
        seed=0,
        guides=beams.slots[0],
    )


def follow(batch: RunningBatch, slots: Slots) -> None:
    """The last known token of those of these slots that are first rows is their second rows', too."""
    for slot in slots[batch.is_beam[slots]].tolist():
        own, other = batch.request_at(slot).slots
        assert slot == own
        batch.token_ids[other, batch.num_known[other]] = batch.token_ids[own, batch.num_known[own] - 1]
        batch.num_known[other] += 1
        batch.num_tokens[[own, other]] += 1
