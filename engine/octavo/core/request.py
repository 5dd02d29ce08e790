"""A request as the scheduler sees it: one sequence. The sequences of one prompt form a group."""

from __future__ import annotations

import enum
import hashlib

import numpy as np

from octavo.ipc import EngineCoreRequest
from octavo.step import Int32s


class RequestStatus(enum.Enum):
    HELD = enum.auto()
    """Waits for a sibling to compute their prompt; not in the queue."""
    WAITING = enum.auto()
    """In the queue, for the first time or after a preemption."""
    RUNNING = enum.auto()
    """Has a slot and blocks."""
    ENDED = enum.auto()
    """Its terminal event is out. It may keep slot and blocks until the step in flight is done."""


class Group:
    """The sequences of one prompt. Owned by the scheduler.

    The first sequence to run computes the prompt. When its last chunk is launched, the group takes a share in the
    prompt's blocks (`held_blocks`), from which the others fork: full blocks are shared, the last one is copied.
    """

    __slots__ = (
        "announced", "cached_tokens", "group_id", "held_blocks", "held_members", "num_alive",
        "num_prompt_logprobs", "num_slots", "num_unforked", "prompt", "spec", "start_time",
    )  # fmt: skip

    def __init__(self, group_id: int, spec: EngineCoreRequest) -> None:
        self.group_id = group_id
        self.spec = spec
        self.prompt: Int32s = np.frombuffer(spec.prompt_token_ids, np.int32)
        self.num_alive = spec.num_sequences
        self.num_slots = 0
        """Slots its sequences occupy, ended ones in flight included."""
        self.held_members: list[Request] = []
        """HELD sequences, in order."""
        self.held_blocks: list[int] = []
        self.num_unforked = 0
        """Sequences that may still fork from `held_blocks`."""
        self.start_time: float | None = None
        """When its first step was scheduled; None: still in the queue."""
        self.cached_tokens = 0
        """Prompt tokens that were found in the prefix cache."""
        self.announced = False
        """PromptStarted is out."""
        self.num_prompt_logprobs = 0
        """Prompt tokens whose logprobs were sent."""


class Request:
    """One sequence. Owned by the scheduler; while it runs, its tokens and counters live in the RunningBatch."""

    __slots__ = (
        "arrival", "block_hashes", "forks", "frontend", "group", "key", "num_preemptions", "row",
        "slot", "status", "token_ids",
    )  # fmt: skip

    def __init__(self, frontend: int, group: Group, row: int, arrival: int) -> None:
        self.frontend = frontend
        self.key = group.spec.key + row
        self.group = group
        self.row = row
        self.arrival = arrival
        """Number in order of arrival."""
        self.status = RequestStatus.WAITING
        self.slot = -1
        self.forks = False
        """Counts in its group's `num_unforked`."""
        self.token_ids: Int32s = group.prompt
        """Prompt and output so far, as of the last time it was not running."""
        self.block_hashes: list[bytes] = []
        """Chained hashes of its leading full blocks, as far as they were needed."""
        self.num_preemptions = 0

    @property
    def spec(self) -> EngineCoreRequest:
        return self.group.spec

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller is scheduled earlier and preempted later: priority, then order of arrival."""
        return (-self.spec.priority, self.arrival)

    def hashes(self, token_ids: Int32s, count: int, block_size: int) -> list[bytes]:
        """Chained SHA-256 hashes of the first `count` full blocks of `token_ids`, the salt at the chain's root."""
        while len(self.block_hashes) < count:
            index = len(self.block_hashes)
            parent = self.block_hashes[-1] if index else hashlib.sha256(self.spec.cache_salt.encode()).digest()
            tokens = token_ids[index * block_size : (index + 1) * block_size]
            self.block_hashes.append(hashlib.sha256(parent + tokens.tobytes()).digest())
        return self.block_hashes[:count]
