"""The requests that have not ended: how they come, and all the ways in which they end.

What a request had is given back when it ends, or, if a launched step contains it, when the results of that step are
here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from octavo.core.beams import BeamScheduler
from octavo.core.drafts import Drafts
from octavo.core.groups import PromptShares
from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.outputs import Events
from octavo.core.request import Group, Request, RequestStatus
from octavo.core.running_batch import RunningBatch, Slots
from octavo.core.waiting_queue import Timers, WaitingQueue
from octavo.errors import Reason
from octavo.ipc import EngineCoreRequest
from octavo.step import SchedulerOutput
from octavo.types import FinishReason


class RequestTable:
    """Owns the requests by front-end and key, their clocks, and what the worker has to hear of ended ones."""

    def __init__(
        self,
        batch: RunningBatch,
        kv: KVCacheManager,
        waiting: WaitingQueue,
        events: Events,
        *,
        shares: PromptShares,
        beams: BeamScheduler,
        drafts: Drafts,
        max_queue_time: float,
    ) -> None:
        self._batch = batch
        self._kv = kv
        self._waiting = waiting
        self._events = events
        self._shares = shares
        self._beams = beams
        self._drafts = drafts
        self._max_queue_time = max_queue_time
        self._requests: dict[tuple[int, int], Request] = {}
        self._deadlines, self._queue_timeouts, self._time_limits = Timers(), Timers(), Timers()
        self._group_ids, self._arrivals = itertools.count(1), itertools.count(1)
        self._freed_slots: list[int] = []
        self._released_groups: list[int] = []
        self._ended_rows: list[tuple[int, int]] = []

    def __bool__(self) -> bool:
        return bool(self._requests)

    def all(self) -> list[Request]:
        return list(dict.fromkeys(self._requests.values()))

    def get(self, frontend: int, key: int) -> Request | None:
        return self._requests.get((frontend, key))

    def keys_of(self, frontend: int) -> list[int]:
        return [key for owner, key in self._requests if owner == frontend]

    def members(self, request: Request) -> list[Request]:
        """It and its siblings, as far as they have not ended."""
        spec = request.spec
        found = (self.get(request.frontend, key) for key in range(spec.key, spec.key + spec.num_sequences))
        return [member for member in dict.fromkeys(found) if member is not None]

    # --- they come ----------------------------------------------------------------------------------------------------

    def add(self, frontend: int, spec: EngineCoreRequest) -> None:
        """Queues a prompt; one that could never fit fails with REQUEST_TOO_LARGE."""
        group = Group(next(self._group_ids), spec)
        members = [Request(frontend, group, row, next(self._arrivals)) for row in range(group.num_alive)]
        if not self._can_ever_fit(members[0]):
            for key in range(spec.key, spec.key + spec.num_sequences):
                self._events.fail(frontend, key, Reason.REQUEST_TOO_LARGE)
            return
        for member in members:
            for key in member.keys:
                assert (frontend, key) not in self._requests, "a key is used twice"
                self._requests[frontend, key] = member
            if spec.deadline is not None:
                self._deadlines.add(spec.deadline, member)
        self._queue_timeouts.add(spec.arrival_time + self._max_queue_time, members[0])
        if not group.is_guided:
            group.hold(members[1:])
        for member in members if group.is_guided else members[:1]:
            self._waiting.add(member)

    def _can_ever_fit(self, request: Request) -> bool:
        """Alone, with rows of a search that have nothing in common but the prompt."""
        kv = self._kv
        if request.beams is None:
            return request.spec.max_total_tokens - 1 <= kv.pool.num_blocks * kv.block_size
        shared = (request.num_tokens - 1) // kv.block_size if request.is_search else 0
        blocks = shared + sum(kv.blocks_for(length - 1) - shared for length in request.beams.max_totals)
        return blocks <= kv.pool.num_blocks and request.num_rows <= len(self._batch.requests)

    # --- clocks -------------------------------------------------------------------------------------------------------

    def end_waiting_at(self, end_time: float, request: Request) -> None:
        """If the request waits then with tokens of its own, its max_time ends it. One that runs ends in update()."""
        self._time_limits.add(end_time, request)

    def expire(self, now: float) -> None:
        """Ends those whose time is over."""
        for request in self._deadlines.due(now):
            if request.status is not RequestStatus.ENDED:
                client = request.spec.deadline_is_client
                self.fail(request, Reason.CLIENT_DEADLINE if client else Reason.SERVER_MAX_DURATION)
        for request in self._queue_timeouts.due(now):
            if request.group.start_time is None:
                for member in self.members(request):
                    self.fail(member, Reason.QUEUE_TIMEOUT)
        for request in self._time_limits.due(now):
            if request.status is RequestStatus.WAITING and request.num_tokens > len(request.group.prompt):
                self._events.of(request.frontend).ended_waiting.append((request.key, FinishReason.TIME))
                self.end([request])

    # --- they end -----------------------------------------------------------------------------------------------------

    def fail(self, request: Request, reason: Reason, *, forget: bool = False) -> None:
        """`forget`: what it wrote is not to be trusted."""
        for key in request.keys:
            self._events.fail(request.frontend, key, reason)
        self.end([request], forget=forget)

    def end(self, requests: Sequence[Request], *, forget: bool = False) -> None:
        """Ends requests whose terminal events go to their front-ends."""
        for request in requests:
            if request.num_preemptions:
                self._events.of(request.frontend).preempted.append((request.key, request.num_preemptions))
        self.drop(requests, forget=forget)

    def drop(self, requests: Sequence[Request], *, forget: bool = False) -> None:
        """Ends requests without a word: they give up all that they have."""
        slots: list[int] = []
        for request in requests:
            if request.slot >= 0:
                slots += request.slots
            self._sign_off(request, forget=forget)
        if slots:
            self._stop(np.array(slots, np.intp))
        self._release_gone(request.group for request in requests)

    def _sign_off(self, request: Request, *, forget: bool) -> None:
        group = request.group
        if request.status is RequestStatus.HELD:
            group.held_members.remove(request)
        elif group.held_members:  # it was to compute the prompt
            self._waiting.add(group.held_members.pop(0))
        request.status = RequestStatus.ENDED
        for key in request.keys:
            del self._requests[request.frontend, key]
        if request.forks:
            self._shares.note_fork(request)
        if request.beams is not None:
            self._beams.remove(request)
        if self._batch.evicting:
            self._batch.evicting.pop(request.slot, None)
        if forget and request.slot >= 0:
            self._shares.drop(group)
            self._kv.forget(request.slots)
        group.num_alive -= 1
        if group.num_alive:
            self._ended_rows.append((group.group_id, request.row))

    def _stop(self, slots: Slots) -> None:
        """Slots of ended requests."""
        batch = self._batch
        batch.live[slots] = False
        for slot in slots.tolist():
            batch.stop(slot)
        self.vacate(slots[batch.in_flight[slots] == 0])

    def _release_gone(self, groups: Iterable[Group]) -> None:
        for group in dict.fromkeys(groups):
            if not group.num_alive and not group.num_slots:
                self._released_groups.append(group.group_id)

    def vacate_landed(self, slots: Slots) -> None:
        """Empties slots of ended requests that were only waiting for the step that has just ended."""
        batch = self._batch
        slots = slots[(batch.in_flight[slots] == 0) & ~batch.live[slots]]
        ended = {slot: request for slot in slots.tolist() if (request := batch.requests[slot]) is not None}
        if ended:
            self.vacate(np.array(list(ended), np.intp))
            self._release_gone(request.group for request in ended.values())

    def vacate(self, slots: Slots) -> None:
        """Empties slots, which no launched step contains."""
        self._kv.free(slots)
        self._batch.remove(slots)
        self._drafts.remove(slots)
        self._freed_slots += slots.tolist()

    def attach(self, step: SchedulerOutput) -> None:
        """Tells the worker what has ended since the last step."""
        step.freed_slots, self._freed_slots = self._freed_slots, []
        step.released_groups, self._released_groups = self._released_groups, []
        step.ended_rows, self._ended_rows = self._ended_rows, []
