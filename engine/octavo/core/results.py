"""The tokens that a step brought, on their way into the batch."""

from __future__ import annotations

import numpy as np

from octavo.core.outputs import StepTokens
from octavo.core.running_batch import RunningBatch, Slots
from octavo.step import FurtherTokens, ModelRunnerOutput, SchedulerOutput
from octavo.types import FinishReason

_LENGTH, _CONTEXT = int(FinishReason.LENGTH), int(FinishReason.CONTEXT)
"""numpy is slow to see that a member of an IntEnum is a number."""


def take_tokens(
    batch: RunningBatch, step: SchedulerOutput, step_slots: Slots, output: ModelRunnerOutput, now: float
) -> StepTokens:
    """Appends the tokens to the sequences that still want them. Those whose time is over end with the first."""
    rows = (step.samples & (output.token_ids >= 0) & batch.live[step_slots]).nonzero()[0]
    slots, token_ids, finish = step_slots[rows], output.token_ids[rows], output.finish[rows]
    known = batch.num_known[slots]
    batch.token_ids[slots, known.astype(np.intp)] = token_ids
    batch.num_known[slots] = known + 1
    if batch.num_timed:
        finish[(finish == 0) & (batch.end_time[slots] <= now)] = FinishReason.TIME
    if output.further is not None:
        ended = slots[finish != 0]
        further = _take_further(batch, step_slots, output.further, ended)
        rows = np.concatenate([rows, step.num_rows + further])
        slots = np.concatenate([slots, step_slots[output.further.rows[further]]])
        token_ids = np.concatenate([token_ids, output.further.token_ids[further]])
        finish = np.concatenate([finish, output.further.finish[further]])
    if len(finish.nonzero()[0]):
        finish[(finish == _LENGTH) & batch.length_is_context[slots]] = _CONTEXT
    return StepTokens(
        rows.astype(np.int32), slots, batch.frontend[slots], batch.key[slots], token_ids, finish, output.logprobs
    )


def _take_further(batch: RunningBatch, step_slots: Slots, further: FurtherTokens, ended: Slots) -> Slots:
    """Moves the counters past drafts as far as they were right. Which of the tokens count."""
    slots = step_slots[further.rows]
    taken = np.flatnonzero(batch.live[slots] & ~np.isin(slots, ended))
    for slot, token_id in zip(slots[taken].tolist(), further.token_ids[taken].tolist(), strict=True):
        batch.token_ids[slot, batch.num_known[slot]] = token_id
        batch.num_known[slot] += 1
        batch.num_tokens[slot] += 1
        batch.num_computed[slot] += 1
    return taken
