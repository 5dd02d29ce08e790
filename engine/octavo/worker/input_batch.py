"""What one forward pass works on: flat tokens of all rows, and where each row's keys and values are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor


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
