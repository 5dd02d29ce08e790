"""Raw logprobs of prompt tokens, for the requests that ask: chunk by chunk, as the prompts are computed."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from octavo.errors import Reason
from octavo.step import Int32s, ModelRunnerOutput, SchedulerOutput
from octavo.worker.logprobs import gather_prompt_logprobs, join_prompt_logprobs
from octavo.worker.model_loader import Model
from octavo.worker.request_states import Float32s, RequestStates

log = logging.getLogger(__name__)

PROMPT_LOGPROB_ROWS = 64
"""Positions whose whole rows of logits are held at once: 26 MB at GPT-2's vocabulary."""


def add_prompt_logprobs(
    states: RequestStates,
    model: Model,
    step: SchedulerOutput,
    query_start_loc: Int32s,
    hidden: Tensor,
    output: ModelRunnerOutput,
) -> None:
    """Values of the prompt tokens that follow this step's positions, for the requests that asked. One whose
    computation raises fails alone."""
    for row in np.flatnonzero(np.isin(step.slots, list(states.prompt_logprobs))).tolist():
        slot = int(step.slots[row])
        num_top = states.prompt_logprobs[slot]
        first = int(step.num_computed[row])
        count = min(int(step.num_scheduled[row]), int(states.prompt_len[slot]) - 1 - first)
        if first + count == int(states.prompt_len[slot]) - 1:
            del states.prompt_logprobs[slot]
        if count <= 0:
            continue
        begin = int(query_start_loc[row])
        next_ids = states.hist[slot, first + 1 : first + count + 1]
        try:
            parts = _values(model, states.vocab_size, hidden[begin : begin + count], next_ids, num_top)
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("prompt logprobs for slot %d failed; its request fails with them", slot)
            output.failed.append((row, Reason.INTERNAL))
            states.fail(step.slots[[row]])
            states.prompt_logprobs.pop(slot, None)
        else:
            output.prompt_logprobs.append(join_prompt_logprobs(row, first + 1, parts))


def _values(
    model: Model, vocab_size: int, hidden: Tensor, next_ids: Int32s, num_top: int
) -> list[tuple[Float32s, Int32s, Int32s, Float32s]]:
    """In parts: hidden [T, E] of consecutive positions, next_ids [T]."""
    parts = []
    for start in range(0, len(next_ids), PROMPT_LOGPROB_ROWS):
        part = slice(start, start + PROMPT_LOGPROB_ROWS)
        logits = model.logits(hidden[part])[:, :vocab_size]  # the device pads the vocabulary
        parts.append(gather_prompt_logprobs(logits, next_ids[part], num_top))
    return parts
