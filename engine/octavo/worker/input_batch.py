"""What one forward pass works on: flat tokens of all rows, and where each row's keys and values are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.step import SchedulerOutput
from octavo.worker.request_states import RequestStates


@dataclass(slots=True)
class InputBatch:
    """T tokens in R rows; decode rows (one token each) come first. Tensors are on the model's device.

    The arrays named `*_np` are the same numbers on the host.
    """

    input_ids: Tensor
    """int64 [T] token ids, row after row."""
    positions: Tensor
    """int64 [T] position of each token in its sequence."""
    slot_mapping: Tensor
    """int64 [T] cache slot where a token's keys and values go: block_id * block_size + offset."""
    query_start_loc: Tensor
    """int32 [R + 1] row r has the tokens query_start_loc[r] .. query_start_loc[r + 1] - 1."""
    seq_lens: Tensor
    """int32 [R] context length with this step's tokens."""
    block_tables: Tensor
    """int32 [R, B] blocks of each row in order; B is what the longest row of the batch needs, the rest is 0."""
    num_decode_rows: int
    """Rows before this one have exactly one token."""
    logits_indices: Tensor
    """int64 [S] flat index of the last token of each row that samples, ascending."""
    query_start_loc_np: npt.NDArray[np.int32]
    seq_lens_np: npt.NDArray[np.int32]
    block_tables_np: npt.NDArray[np.int32]

    @property
    def num_rows(self) -> int:
        return len(self.seq_lens_np)

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_loc_np[-1])


class InputBatchBuilder:
    """Makes each step's batch from the scheduler's rows and the request states, with array operations only."""

    def __init__(self, states: RequestStates, device: torch.device) -> None:
        self._states = states
        self._device = device

    def build(self, step: SchedulerOutput, sampling_rows: npt.NDArray[np.int64]) -> InputBatch:
        """The batch of a step whose diff has been applied to the states; sampling_rows [S] get logits.

        A row whose request has ended (a step launched before that was known) is muted: it computes its tokens at
        position 0 of the null block, where nobody reads.
        """
        states = self._states
        slots, lengths, computed = step.slots, step.num_scheduled, step.num_computed
        starts = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        if step.num_decode_rows == len(slots):
            rows, positions = np.arange(len(slots)), computed
        else:
            rows = np.repeat(np.arange(len(slots)), lengths)
            positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - computed, lengths)
        seq_lens = computed + lengths
        muted = states.finished[slots] != 0
        if muted.any():
            seq_lens = np.where(muted, lengths, seq_lens)
            positions = np.where(muted[rows], np.arange(starts[-1]) - starts[rows], positions)
        block_size = states.block_size
        block_tables = states.block_table[slots, : -(-int(seq_lens.max()) // block_size)]
        block_tables[muted] = 0
        block_tables[np.arange(block_tables.shape[1]) * block_size >= seq_lens[:, None]] = 0
        blocks = block_tables[rows, positions // block_size].astype(np.int64)
        return InputBatch(
            input_ids=self._tensor(states.hist[slots[rows], positions].astype(np.int64)),
            positions=self._tensor(positions.astype(np.int64)),
            slot_mapping=self._tensor(blocks * block_size + positions % block_size),
            query_start_loc=self._tensor(starts),
            seq_lens=self._tensor(seq_lens),
            block_tables=self._tensor(block_tables),
            num_decode_rows=step.num_decode_rows,
            logits_indices=self._tensor(starts[1:][sampling_rows].astype(np.int64) - 1),
            query_start_loc_np=starts,
            seq_lens_np=seq_lens,
            block_tables_np=block_tables,
        )

    def _tensor(self, array: npt.NDArray[np.int64] | npt.NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
