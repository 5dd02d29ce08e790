"""Parts of the fake runner's output while they grow."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from octavo.step import FurtherTokens, LogprobRows, ModelRunnerOutput, NewRequest
from octavo.types import FinishReason
from property.oracle import VOCAB_SIZE


@dataclass
class LogprobTable:
    rows: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    top_offsets: list[int] = field(default_factory=lambda: [0])
    top_token_ids: list[int] = field(default_factory=list)
    top_values: list[float] = field(default_factory=list)
    requested_offsets: list[int] = field(default_factory=lambda: [0])
    requested: list[float] = field(default_factory=list)

    def add(self, row: int, token_id: int, num_top: int, token_ids: list[int]) -> None:
        """Values that can be checked from the token alone."""
        self.rows.append(row)
        self.chosen.append(-float(token_id))
        self.ranks.append(token_id + 1)
        self.top_token_ids += [(token_id + i) % VOCAB_SIZE for i in range(num_top)]
        self.top_values += [-float(i) for i in range(num_top)]
        self.top_offsets.append(len(self.top_token_ids))
        self.requested += [float(token_id + other) for other in token_ids]
        self.requested_offsets.append(len(self.requested))

    def finish(self) -> LogprobRows | None:
        if not self.rows:
            return None
        return LogprobRows(
            rows=np.array(self.rows, np.int32),
            chosen=np.array(self.chosen, np.float32),
            ranks=np.array(self.ranks, np.int32),
            top_offsets=np.array(self.top_offsets, np.int32),
            top_token_ids=np.array(self.top_token_ids, np.int32),
            top_values=np.array(self.top_values, np.float32),
            requested_offsets=np.array(self.requested_offsets, np.int32),
            requested=np.array(self.requested, np.float32),
        )


@dataclass
class FurtherTable:
    """FurtherTokens while they grow."""

    num_rows: int
    entries: list[tuple[int, int, FinishReason]] = field(default_factory=list)
    """(row, token, finish)"""

    def finish(self, output: ModelRunnerOutput, logprobs: LogprobTable, requests: list[NewRequest]) -> None:
        """Puts them into the output, and their values behind those of the first tokens."""
        for index, (row, token_id, _) in enumerate(self.entries, self.num_rows):
            if (spec := requests[row].logprobs) is not None:
                logprobs.add(index, token_id, spec.num_top, spec.token_ids)
        if self.entries:
            rows, token_ids, finish = zip(*self.entries, strict=True)
            output.further = FurtherTokens(
                np.array(rows, np.int32), np.array(token_ids, np.int32), np.array(finish, np.uint8)
            )
