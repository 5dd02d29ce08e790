"""A request as the scheduler sees it: one sequence (of two rows under guidance), or a beam search. The sequences of
one prompt form a group."""

from __future__ import annotations

import enum
import hashlib

import numpy as np

from octavo.core.guidance import branches, max_totals
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
        "announced", "cached_tokens", "group_id", "held_blocks", "held_members", "is_guided", "is_search", "num_alive",
        "num_prompt_logprobs", "num_rows", "num_slots", "num_unforked", "prompt", "spec", "start_time",
    )  # fmt: skip

    def __init__(self, group_id: int, spec: EngineCoreRequest) -> None:
        self.group_id = group_id
        self.spec = spec
        self.prompt: Int32s = np.frombuffer(spec.prompt_token_ids, np.int32)
        num_beams = spec.params.num_beams or 1
        self.is_search = num_beams > 1
        self.is_guided = bool(spec.negative_prompt_token_ids)
        self.num_rows = max(spec.num_sequences, num_beams)
        """Sequences that it decodes at once: rows of random numbers."""
        self.num_alive = 1 if self.is_search else spec.num_sequences
        """Requests that have not ended."""
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

    def hold(self, members: list[Request]) -> None:
        """These wait for another one to compute the prompt."""
        for member in members:
            member.status = RequestStatus.HELD
        self.held_members = members


class Beams:
    """The rows of a beam search, or the two of a guided sequence. Owned by the BeamScheduler."""

    __slots__ = ("forked", "max_totals", "num_reserved", "rows", "slots", "unsent")

    def __init__(self, rows: list[Int32s], max_totals: list[int]) -> None:
        self.rows = rows
        """Each row's prompt and output as of the last time it was not running; equally long in a search."""
        self.max_totals = max_totals
        """Most tokens of each row."""
        self.slots: list[int] = []
        """Of each row, the last ones if it does not run."""
        self.forked = False
        """Every row is on its own: since a search's rows share the first one's blocks, or from the beginning."""
        self.num_reserved = 0
        """Blocks that are kept free for the rows after the first, until they fork from it."""
        self.unsent: set[int] = set()
        """Slots whose block tables the worker does not know yet."""


class Request:
    """One sequence, or a whole beam search. Owned by the scheduler; while it runs, its tokens and counters live in the
    RunningBatch."""

    __slots__ = (
        "_hasher", "beams", "block_hashes", "forks", "frontend", "group", "is_search", "key", "keys", "num_preemptions",
        "rank", "row", "slot", "spec", "status", "token_ids",
    )  # fmt: skip

    def __init__(self, frontend: int, group: Group, row: int, arrival: int) -> None:
        """`arrival`: number in order of arrival."""
        spec = group.spec
        self.frontend = frontend
        self.key = spec.key + row
        """The first of a beam search."""
        self.group = group
        self.spec = spec
        self.row = row
        self.rank = (-spec.priority, arrival)
        """Smaller is scheduled earlier and preempted later: priority, then order of arrival."""
        self.status = RequestStatus.WAITING
        self.slot = -1
        """The first row's, if there are several."""
        self.is_search = group.is_search
        self.keys = range(self.key, self.key + (spec.num_sequences if self.is_search else 1))
        """Of the sequences that it answers."""
        self.beams = _beams_of(group)
        self.forks = False
        """Counts in its group's `num_unforked`."""
        self.token_ids: Int32s = group.prompt
        """Prompt and output so far, as of the last time it was not running; of a beam search the prompt."""
        self.block_hashes: list[bytes] = []
        """Of its leading full blocks, as far as they were needed."""
        self._hasher: hashlib._Hash | None = None
        """Has seen the tokens of these blocks."""
        self.num_preemptions = 0

    @property
    def num_rows(self) -> int:
        return 1 if self.beams is None else len(self.beams.rows)

    @property
    def slots(self) -> list[int]:
        """Of its rows, while it runs."""
        return [self.slot] if self.beams is None else self.beams.slots

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def hashes(self, token_ids: Int32s, count: int, block_size: int) -> list[bytes]:
        """Of the first `count` full blocks of `token_ids`: SHA-256 of the salt and all tokens up to the block's end."""
        known = len(self.block_hashes)
        if known < count:
            if self._hasher is None:
                salt = self.spec.cache_salt
                self._hasher = hashlib.sha256(f"{len(salt)}:{salt}".encode())
            tokens = token_ids.data
            for start in range(known * block_size, count * block_size, block_size):
                self._hasher.update(tokens[start : start + block_size])
                self.block_hashes.append(self._hasher.digest())
        return self.block_hashes[:count]


def _beams_of(group: Group) -> Beams | None:
    if group.is_search:
        return Beams([group.prompt] * group.num_rows, [group.spec.max_total_tokens] * group.num_rows)
    if group.is_guided:
        return Beams(branches(group.spec), max_totals(group.spec))
    return None
