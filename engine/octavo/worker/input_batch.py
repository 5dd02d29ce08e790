"""What one forward pass works on: flat tokens of all rows, and where each row's keys and values are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.step import SchedulerOutput
from octavo.worker.request_states import RequestStates

Ints = npt.NDArray[np.int32] | npt.NDArray[np.int64]


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
    """int64 [S] flat index of the last token of each row that samples, ascending; of one with a draft, of the token
    before the draft."""
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
        input_ids = states.hist[slots[rows], positions].astype(np.int64)
        slot_mapping = blocks * block_size + positions % block_size
        ends = starts[1:]
        if step.drafts:
            ends = ends.copy()
            for row, draft in enumerate(step.drafts, len(slots) - len(step.drafts)):
                ends[row] -= len(draft)
                input_ids[ends[row] : starts[row + 1]] = draft
        logits_indices = ends[sampling_rows].astype(np.int64) - 1
        tensors = upload(
            [input_ids, positions.astype(np.int64), slot_mapping, logits_indices, starts, seq_lens, block_tables],
            self._device,
        )
        return InputBatch(
            input_ids=tensors[0],
            positions=tensors[1],
            slot_mapping=tensors[2],
            logits_indices=tensors[3],
            query_start_loc=tensors[4],
            seq_lens=tensors[5],
            block_tables=tensors[6],
            num_decode_rows=num_leading_ones(lengths),
            query_start_loc_np=starts,
            seq_lens_np=seq_lens,
            block_tables_np=block_tables,
        )


def num_leading_ones(lengths: npt.NDArray[np.int32]) -> int:
    """Rows with one token that come first: with tiny chunks also prefill rows, which are computed the same way."""
    longer = lengths != 1
    return int(longer.argmax()) if longer.any() else len(lengths)


def upload(arrays: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """The arrays on the device; on the CPU as they are, sharing memory."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    packed = pack(arrays, pinned=device.type == "cuda")  # from torch's pool of pinned memory, which waits for the copy
    return unpack(packed.to(device, non_blocking=True), arrays)


def pack(arrays: Sequence[Ints], *, pinned: bool) -> Tensor:
    """One buffer of bytes for one copy to the device: each array at a multiple of 8 bytes."""
    packed = torch.empty(sum(map(_padded_size, arrays)), dtype=torch.uint8, pin_memory=pinned)
    for part, array in zip(packed.split_with_sizes([_padded_size(array) for array in arrays]), arrays, strict=True):
        part.numpy()[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return packed


def unpack(packed: Tensor, arrays: Sequence[Ints]) -> list[Tensor]:
    """Views of the packed buffer with the shapes and types of the arrays."""
    return [
        part[: array.nbytes].view(torch.int64 if array.dtype == np.int64 else torch.int32).view(array.shape)
        for part, array in zip(packed.split_with_sizes([_padded_size(array) for array in arrays]), arrays, strict=True)
    ]


def _padded_size(array: Ints) -> int:
    return -(-array.nbytes // 8) * 8
