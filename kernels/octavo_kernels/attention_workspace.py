"""Scratch memory of the attention kernels that split the context: allocated once, so that a step allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from octavo_kernels.checks import require_device

SPLIT: Final = 256
"""Tokens of a split; splits begin at multiples of it."""


@dataclass(frozen=True, slots=True)
class AttentionWorkspace:
    """For R rows (or tiles) of Q queries each, with P splits of their context; all contiguous, on one device.

    Calls that may run at the same time need a workspace each.
    """

    partial: Tensor
    """fp32 [R, H, P, Q, D] attention of a split alone."""
    lse: Tensor
    """fp32 [R, H, P, Q] base-2 logarithm of the split's sum of exponentials."""
    tickets: Tensor
    """int32 [R, H] splits that have arrived; 0 between launches."""

    @property
    def max_rows(self) -> int:
        return self.partial.shape[0]

    @property
    def max_splits(self) -> int:
        return self.partial.shape[2]

    @property
    def num_queries(self) -> int:
        return self.partial.shape[3]

    def arguments(self) -> dict[str, Any]:
        """Of the kernels that leave results of splits here, by name."""
        return {
            "partial_ptr": self.partial,
            "lse_ptr": self.lse,
            "max_splits": self.max_splits,
            "QUERIES": self.num_queries,
        }

    @staticmethod
    def allocate(
        max_rows: int, num_heads: int, head_size: int, max_context: int, device: torch.device, num_queries: int = 1
    ) -> AttentionWorkspace:
        """max_context: tokens of the longest row. num_queries: 1 for `decode_attention` alone, VERIFY_TILE where
        `verify_attention` uses it too, whose rows are tiles. Raises ValueError naming what is not positive."""
        sizes = {"max_rows": max_rows, "num_heads": num_heads, "head_size": head_size}
        for name, size in (sizes | {"max_context": max_context, "num_queries": num_queries}).items():
            if size < 1:
                raise ValueError(f"{name}: {size} is not positive")
        shape = (max_rows, num_heads, -(-max_context // SPLIT), num_queries)
        return AttentionWorkspace(
            partial=torch.empty(*shape, head_size, dtype=torch.float32, device=device),
            lse=torch.empty(shape, dtype=torch.float32, device=device),
            tickets=torch.zeros(max_rows, num_heads, dtype=torch.int32, device=device),
        )

    def check(self, num_rows: int, num_heads: int, head_size: int, context: int, num_queries: int, like: Tensor) -> int:
        """How many splits a context has. Raises ValueError where the call needs more than there is."""
        _, heads, splits, queries, size = self.partial.shape
        needed = -(-context // SPLIT)
        if (heads, size) != (num_heads, head_size):
            raise ValueError(f"workspace: for {heads} heads of {size}, not {num_heads} of {head_size}")
        if num_rows > self.max_rows or needed > splits or num_queries > queries:
            raise ValueError(
                f"workspace: for {self.max_rows} rows of {queries} queries and {splits} splits, "
                f"{num_rows} of {num_queries} and {needed} needed"
            )
        require_device("workspace", self.partial, like)
        return needed
