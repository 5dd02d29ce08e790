"""A step while the scheduler decides it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from octavo.core.running_batch import Slots
from octavo.step import Int32s, NewRequest, SchedulerOutput

_NONE: Slots = np.empty(0, np.intp)


@dataclass(slots=True)
class Plan:
    """Which slots take part with how many tokens, and what changed for the worker."""

    budget: int
    """Tokens left."""
    decode: Slots = field(default_factory=lambda: _NONE)
    """Running slots with one token to compute, which samples."""
    prefill: list[tuple[int, int]] = field(default_factory=list)
    """(slot, tokens) of running slots that catch up."""
    admitted: list[tuple[int, int]] = field(default_factory=list)
    """(slot, tokens) of requests that enter."""
    beams: list[tuple[int, int]] = field(default_factory=list)
    """(slot, tokens) of rows of beam searches."""
    drafts: list[tuple[int, Int32s]] = field(default_factory=list)
    """(slot, draft) of running slots with one token to compute, and a guess of what follows."""
    expired_groups: list[int] = field(default_factory=list)
    """Beam searches whose time is over with this step."""
    grown: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """(slot, first column, blocks) written to tables of running slots."""
    stalled: set[int] = field(default_factory=set)
    """Running slots that wait for blocks of a victim that is still in flight."""
    preempted: bool = False
    promised_blocks: int = 0
    """Of those that victims in flight will give back."""
    new_requests: list[NewRequest] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    """(slot, source, destination) of blocks."""

    @property
    def has_prompts(self) -> bool:
        """Whether some row computes several tokens that are known."""
        return any(count > 1 for _, count in self.prefill + self.admitted + self.beams)

    def attach(self, step: SchedulerOutput) -> None:
        """Puts the changes that the worker has to apply into the step."""
        step.new_requests = self.new_requests
        step.block_copies = [(source, destination) for _, source, destination in self.copies]
        step.expired_groups = self.expired_groups
        step.drafts = [draft for _, draft in self.drafts]
        if self.grown:
            slots: list[int] = []
            columns: list[int] = []
            block_ids: list[int] = []
            for slot, first, blocks in self.grown:
                slots += [slot] * len(blocks)
                columns += range(first, first + len(blocks))
                block_ids += blocks
            step.block_slots = np.array(slots, np.int32)
            step.block_columns = np.array(columns, np.int32)
            step.block_ids = np.array(block_ids, np.int32)
