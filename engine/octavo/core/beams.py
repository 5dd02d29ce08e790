"""Beam searches: the k rows of one prompt, in k slots, that are admitted, scheduled, preempted and ended together.

Row 0 computes the prompt, all but its last token. The others then share its blocks, and all rows compute the last token
in one step, in which the worker chooses k pairs of a parent and a token. `advance` applies them: row i continues its
parent's blocks, tokens and counters. From then on each step is that step. Blocks are shared until a row is about to
write into one that another row has too: it gets a copy (`KVCacheManager.extend`).

A preempted search loses all blocks but keeps each row's tokens. When it comes back, row 0 computes its tokens, the
others share as many of its blocks as they have tokens in common, compute the rest, and the search goes on.

Nothing runs ahead here: the tokens of a step have to be known before the next one, so a search in flight pauses.

The two rows of a guided sequence (`core.guidance`) are scheduled here too: they share nothing, so they count as forked
from the beginning, and both have room for all of their tokens when they are admitted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.plan import Plan
from octavo.core.request import Request
from octavo.core.running_batch import RunningBatch
from octavo.step import Int32s

MakeRoom = Callable[[Plan, Request, int], bool]
"""Sees to that many free blocks at the expense of others; False: the request has to wait, or was preempted itself."""


class BeamScheduler:
    """Owns the `Request.beams` of the searches and guided sequences that run."""

    def __init__(self, batch: RunningBatch, kv: KVCacheManager, max_chunk_tokens: int, make_room: MakeRoom) -> None:
        self._batch = batch
        self._kv = kv
        self._max_chunk_tokens = max_chunk_tokens
        self._make_room = make_room
        self._running: dict[tuple[int, int], Request] = {}  # by group id and row, in order of admission

    def __bool__(self) -> bool:
        return bool(self._running)

    def fits(self, request: Request, shared: list[int], *, keep_watermark: bool) -> bool:
        """Whether all rows fit, those after the first beside the blocks that they will share with it."""
        assert request.beams is not None
        length = len(request.beams.rows[0])
        return self._kv.can_admit(shared, length, keep_watermark, self._num_of_others(request))

    def _num_of_others(self, request: Request) -> int:
        """Blocks of the rows after the first, without those that they share with it."""
        assert request.beams is not None
        first, *others = request.beams.rows
        common = [_num_common(first, row) if request.is_search else 0 for row in others]
        kv = self._kv
        return sum(kv.blocks_for(len(row)) - n // kv.block_size for row, n in zip(others, common, strict=True))

    def admit(self, request: Request, shared: list[int], num_cached: int) -> None:
        """Gives the rows their slots, and those that are on their own blocks for all of their tokens."""
        beams, kv = request.beams, self._kv
        assert beams is not None
        beams.forked = not request.is_search
        beams.unsent.clear()
        beams.slots = [
            self._batch.add(request, 0 if i else num_cached, token_ids) for i, token_ids in enumerate(beams.rows)
        ]
        request.slot = beams.slots[0]
        self._batch.is_beam[beams.slots] = True
        self._batch.max_total[beams.slots] = beams.max_totals
        kv.admit(request.slot, shared, len(beams.rows[0]))
        for slot in beams.slots[1:]:
            kv.never_index(slot)
            if beams.forked:
                assert kv.allocate_slots(slot, int(self._batch.num_tokens[slot])) is not None
        if not beams.forked:
            beams.num_reserved = self._num_of_others(request)
            kv.num_reserved += beams.num_reserved
        self._running[request.group.group_id, request.row] = request

    def remove(self, request: Request) -> None:
        """The search has ended or was preempted: it is not scheduled any more."""
        if self._running.pop((request.group.group_id, request.row), None) is not None:
            self._unreserve(request)

    def _unreserve(self, request: Request) -> None:
        assert request.beams is not None
        self._kv.num_reserved -= request.beams.num_reserved
        request.beams.num_reserved = 0

    def save(self, request: Request) -> None:
        """Keeps the tokens that are known, before a preempted search loses its slots."""
        assert request.beams is not None
        request.beams.rows = [self._batch.known_tokens(slot) for slot in request.beams.slots]

    # --- scheduling ---------------------------------------------------------------------------------------------------

    def schedule(self, plan: Plan, now: float) -> None:
        """Every running search whose rows are ready takes its next step."""
        for request in list(self._running.values()):
            if self._batch.is_running(request.slot):
                self.take_step(plan, request, now)

    def take_step(self, plan: Plan, request: Request, now: float) -> None:
        """The search's next step, if all of its rows have just one token left to compute and there is room."""
        beams, batch = request.beams, self._batch
        assert beams is not None
        slots = np.array(beams.slots)
        left = batch.num_tokens[slots] - batch.num_computed[slots]
        if not beams.forked and left[0] == 1:
            self._fork(request)
            left = batch.num_tokens[slots] - batch.num_computed[slots]
        if not beams.forked or (left != 1).any():
            return
        reached = (batch.num_computed[slots] + 1).tolist()
        if self._make_room(plan, request, self._kv.num_missing(beams.slots, batch.num_computed[slots], reached)):
            for slot, count in zip(beams.slots, reached, strict=True):
                self._extend(plan, request, slot, count)
                plan.beams.append((slot, 1))
            plan.budget -= len(beams.slots)
            if request.is_search and batch.end_time[request.slot] <= now:
                plan.expired_groups.append(request.group.group_id)

    def catch_up(self, plan: Plan) -> None:
        """Gives what is left of the step's budget to rows that have more than one token left."""
        for request in list(self._running.values()):
            if self._batch.is_running(request.slot):
                self.compute_rows(plan, request)

    def compute_rows(self, plan: Plan, request: Request) -> None:
        """Chunks of the first row, or, once they have forked from it, of all."""
        beams, batch = request.beams, self._batch
        assert beams is not None
        for slot in beams.slots if beams.forked else beams.slots[:1]:
            computed = int(batch.num_computed[slot])
            missing = int(batch.num_tokens[slot]) - 1 - computed
            count = min(missing, plan.budget, self._max_chunk_tokens or missing)
            if count <= 0:
                continue
            if not self._make_room(plan, request, self._kv.num_missing([slot], [computed], [computed + count])):
                return
            self._extend(plan, request, slot, computed + count)
            plan.beams.append((slot, count))
            plan.budget -= count

    def _fork(self, request: Request) -> None:
        """The other rows share the first one's blocks as far as their tokens are the same."""
        beams, batch, kv = request.beams, self._batch, self._kv
        assert beams is not None
        beams.forked = True
        self._unreserve(request)
        blocks = kv.blocks_of(request.slot)
        for slot, token_ids in zip(beams.slots[1:], beams.rows[1:], strict=True):
            count = _num_common(beams.rows[0], token_ids)
            kv.share(slot, blocks[: kv.blocks_for(count)])
            batch.num_computed[slot] = count
            beams.unsent.add(slot)

    def _extend(self, plan: Plan, request: Request, slot: int, num_tokens: int) -> None:
        """Room to write up to `num_tokens`, in blocks of the slot's own; tells the worker what it does not know."""
        beams, kv = request.beams, self._kv
        assert beams is not None
        first, blocks, copies = kv.extend(slot, int(self._batch.num_computed[slot]), num_tokens)
        plan.copies += [(slot, *copy) for copy in copies]
        if slot in beams.unsent:
            beams.unsent.remove(slot)
            first, blocks = 0, kv.blocks_of(slot)
        if blocks:
            plan.grown.append((slot, first, blocks))

    # --- results ------------------------------------------------------------------------------------------------------

    def advance(self, request: Request, parents: Int32s, token_ids: Int32s) -> None:
        """Row i goes on as row parents[i] did, with one more token."""
        beams, batch = request.beams, self._batch
        assert beams is not None
        slots = np.array(beams.slots)
        length = int(batch.num_known[request.slot])
        batch.token_ids[slots, :length] = batch.token_ids[slots[parents], :length]
        batch.token_ids[slots, length] = token_ids
        batch.num_known[slots] = batch.num_tokens[slots] = length + 1
        self._kv.gather(slots, parents)


def _num_common(one: Int32s, other: Int32s) -> int:
    """Leading tokens that are the same, up to the last but one: a row computes its last token itself."""
    different = np.flatnonzero(one[:-1] != other[:-1])
    return int(different[0]) if len(different) else len(one) - 1
