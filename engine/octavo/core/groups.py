"""How the sequences of one prompt share its blocks.

The first sequence computes the prompt; the others are HELD. When its last chunk is launched, the group takes a share in
the prompt's blocks, so that they outlive that sequence, and the others enter the queue. Each forks from the share when
it is admitted: full blocks shared, the last one copied, the last prompt token computed once more for its logits. The
share goes when all have forked, or earlier under memory pressure: the rest then find the prompt in the prefix cache or
compute it.
"""

from __future__ import annotations

from octavo.core.block_pool import BlockPool
from octavo.core.request import Group, Request


class PromptShares:
    """Owns `Group.held_blocks` and `num_unforked`."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._groups: dict[int, Group] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def take(self, group: Group, blocks: list[int]) -> list[Request]:
        """A share in the prompt's blocks for the held members, which may fork from now on and are returned."""
        members, group.held_members = group.held_members, []
        group.num_unforked = len(members)
        for member in members:
            member.forks = True
        if blocks:
            self._pool.acquire(blocks)
            group.held_blocks = blocks
            self._groups[group.group_id] = group
        return members

    def note_fork(self, request: Request) -> None:
        """The request has forked, or never will."""
        if request.forks:
            request.forks = False
            request.group.num_unforked -= 1
            if not request.group.num_unforked and request.group.held_blocks:
                self._drop(request.group)

    def drop_one(self) -> None:
        """Gives up the oldest share, to make room."""
        self._drop(next(iter(self._groups.values())))

    def drop(self, group: Group) -> None:
        """What the group's blocks hold is not to be trusted."""
        if group.held_blocks:
            self._drop(group)

    def _drop(self, group: Group) -> None:
        blocks, group.held_blocks = group.held_blocks, []
        self._pool.release(blocks)
        del self._groups[group.group_id]

    def held_blocks(self) -> list[int]:
        """One entry per share and block."""
        return [block for group in self._groups.values() for block in group.held_blocks]
