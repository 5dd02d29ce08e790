"""Brings the logprobs that `octavo_kernels.logprobs` gathered to the host, as the core takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from octavo_kernels.logprobs import LogprobBuffers
from torch import Tensor

from octavo.step import Bools, Int32s, LogprobRows
from octavo.worker.request_states import Int64s, RequestStates

ReadLogprobs = Callable[[Sequence[int]], LogprobRows | None]


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, complete when the stream has come this far; on the CPU a plain copy."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def logprob_rows(
    buffers: LogprobBuffers, states: RequestStates, slots: Int32s, places: Int64s, wants: Bools
) -> ReadLogprobs:
    """Starts the copy of a step's values. slots: [S] of its sampling rows; places: [S] their rows in the buffers;
    wants: [S] which of them asked.

    Returns what to call when the copy is complete, with the rows that chose a token, ascending: their values, by row.
    """
    count = int(places.max()) + 1
    parts = (buffers.chosen, buffers.ranks, buffers.top_ids, buffers.top_values, buffers.requested)
    chosen, ranks, top_ids, top_values, requested = (copy_to_host(part[:count]).numpy() for part in parts)
    specs = {row: states.logprobs[int(slots[row])] for row in np.flatnonzero(wants).tolist()}

    def read(alive: Sequence[int]) -> LogprobRows | None:
        rows = [row for row in alive if row in specs]
        if not rows:
            return None
        tops = [specs[row].num_top for row in rows]
        asked = [len(specs[row].token_ids) for row in rows]
        return LogprobRows(
            rows=np.array(rows, np.int32),
            chosen=chosen[places[rows]],
            ranks=ranks[places[rows]],
            top_offsets=np.cumsum([0, *tops], dtype=np.int32),
            top_token_ids=np.concatenate([top_ids[places[row], :top] for row, top in zip(rows, tops, strict=True)]),
            top_values=np.concatenate([top_values[places[row], :top] for row, top in zip(rows, tops, strict=True)]),
            requested_offsets=np.cumsum([0, *asked], dtype=np.int32),
            requested=np.concatenate([requested[places[row], :n] for row, n in zip(rows, asked, strict=True)]),
        )

    return read
