"""Scratch memory of the sampler's kernels: allocated once, so that a step allocates nothing.

`history` writes `scores` and `banned` of the rows that it acts on, `sample` reads them and leaves the processed scores
and the interval of what survived the filters, `gather_logprobs` reads those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW = 2048
"""Candidates of a row that the sampler holds in registers: enough for a top_k of 1024."""


@dataclass(frozen=True, slots=True)
class SamplerWorkspace:
    """R rows, V tokens, Vp = V rounded up to 64, W = ceil(V / 32); every tensor contiguous, on one device."""

    vocab_size: int
    scores: Tensor
    """fp32 [R, Vp] scores of a row: from `history` those after step 4a; `sample` leaves those after all processors and
    the temperature, of rows with processors or LOGPROBS."""
    banned: Tensor
    """int32 [R, W] bitmap of tokens that n-grams and bad words ban at this step."""
    interval: Tensor
    """fp32 [R, 2] bounds of the scores, after the temperature, that the filters kept; of rows that sample."""
    candidate_values: Tensor
    """fp32 [R, WINDOW] the largest scores of a row, in order of their tokens."""
    candidate_ids: Tensor
    """int32 [R, WINDOW] their tokens."""

    @property
    def max_rows(self) -> int:
        return self.scores.shape[0]

    def narrow(self, rows: slice) -> SamplerWorkspace:
        """Views of some of the rows."""
        return SamplerWorkspace(
            vocab_size=self.vocab_size,
            scores=self.scores[rows],
            banned=self.banned[rows],
            interval=self.interval[rows],
            candidate_values=self.candidate_values[rows],
            candidate_ids=self.candidate_ids[rows],
        )

    @staticmethod
    def allocate(max_rows: int, vocab_size: int, device: torch.device) -> SamplerWorkspace:
        """Zeroed. Raises ValueError naming the argument that is not positive."""
        if max_rows < 1:
            raise ValueError(f"max_rows: {max_rows} is not positive")
        if vocab_size < 1:
            raise ValueError(f"vocab_size: {vocab_size} is not positive")
        padded, words = -(-vocab_size // 64) * 64, -(-vocab_size // 32)

        def floats(columns: int) -> Tensor:
            return torch.zeros(max_rows, columns, dtype=torch.float32, device=device)

        def ints(columns: int) -> Tensor:
            return torch.zeros(max_rows, columns, dtype=torch.int32, device=device)

        return SamplerWorkspace(
            vocab_size=vocab_size,
            scores=floats(padded),
            banned=ints(words),
            interval=floats(2),
            candidate_values=floats(WINDOW),
            candidate_ids=ints(WINDOW),
        )
