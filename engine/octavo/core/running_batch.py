"""The running requests as a structure of arrays indexed by slot: what a steady decode step touches is numpy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from octavo.core.request import Request
from octavo.step import Bools, Int32s

Slots = npt.NDArray[np.intp]
"""Slots to index arrays with: numpy takes these as they are, and copies any other integers first, at ten times the
cost."""


class RunningBatch:
    """Counters and tokens by slot. Owned by the scheduler.

    The counters run ahead of what is known: launching a row moves `num_computed`, and `num_tokens` too when the row
    samples, so that the next step can be scheduled before the token is there; `num_known` follows in `update`.
    """

    def __init__(self, max_num_requests: int, max_model_len: int) -> None:
        size = max_num_requests
        self.requests: list[Request | None] = [None] * size
        self.token_ids: Int32s = np.zeros((size, max_model_len), np.int32)
        self.num_tokens: Int32s = np.zeros(size, np.int32)
        """Tokens known or launched."""
        self.num_known: Int32s = np.zeros(size, np.int32)
        self.num_computed: Int32s = np.zeros(size, np.int32)
        """Tokens whose keys and values are in the cache, or will be when what is launched is done."""
        self.max_total: Int32s = np.zeros(size, np.int32)
        self.in_flight: Int32s = np.zeros(size, np.int32)
        """Launched steps that contain the slot."""
        self.live: Bools = np.zeros(size, np.bool_)
        """Still wants tokens; false once it ended."""
        self.announces: Bools = np.zeros(size, np.bool_)
        """May be the one whose first token tells that its prompt is computed."""
        self.frontend: Int32s = np.zeros(size, np.int32)
        self.key: npt.NDArray[np.int64] = np.zeros(size, np.int64)
        self.end_time: npt.NDArray[np.float64] = np.full(size, np.inf)
        """When max_time is over."""
        self.num_timed = 0
        """Slots with an end_time."""
        self.length_is_context: Bools = np.zeros(size, np.bool_)
        self.is_beam: Bools = np.zeros(size, np.bool_)
        """A row of a beam search: scheduled with its siblings, its tokens known only from `BeamScheduler.advance`."""
        self.waits: Bools = np.zeros(size, np.bool_)
        """Not scheduled while a token of it is in flight."""
        self.num_waiting = 0
        """Slots for which that is so."""
        self.evicting: dict[int, None] = {}
        """Slots of preempted requests that a launched step contains; of several rows the first."""
        self._free_slots = list(range(size - 1, -1, -1))
        self._running: dict[int, None] = {}  # slots that may be scheduled, in order of admission
        self._order: Slots | None = None

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def order(self) -> Slots:
        """[N] slots that may be scheduled, in order of admission."""
        if self._order is None:
            self._order = np.fromiter(self._running, np.intp, len(self._running))
        return self._order

    def occupied_slots(self) -> list[int]:
        return [slot for slot, request in enumerate(self.requests) if request is not None]

    def request_at(self, slot: int) -> Request:
        request = self.requests[slot]
        assert request is not None, f"slot {slot} is empty"
        return request

    def add(self, request: Request, num_computed: int, token_ids: Int32s | None = None) -> int:
        """Gives the request, or a row of it with these tokens, a slot, which becomes the last in order."""
        slot = self._free_slots.pop()
        token_ids = request.token_ids if token_ids is None else token_ids
        spec, length = request.spec, len(token_ids)
        self.requests[slot] = request
        self.token_ids[slot, :length] = token_ids
        self.num_tokens[slot] = self.num_known[slot] = length
        self.num_computed[slot] = num_computed
        self.max_total[slot] = spec.max_total_tokens
        self.live[slot] = True
        self.announces[slot] = not request.group.announced
        self.frontend[slot] = request.frontend
        self.key[slot] = request.key
        self.length_is_context[slot] = spec.length_is_context
        request.slot = slot
        request.group.num_slots += 1
        self._running[slot] = None
        self._order = None
        return slot

    def limit_time(self, slot: int, end_time: float) -> None:
        """Ends the slot with the first token after `end_time` (finite, once per `add`)."""
        self.end_time[slot] = end_time
        self.num_timed += 1

    def wait_for_tokens(self, slot: int) -> None:
        """The slot's next step waits for the result of the last one."""
        self.num_waiting += not self.waits[slot]
        self.waits[slot] = True

    def stop(self, slot: int) -> None:
        """The slot is not scheduled any more; it stays occupied until `remove`."""
        if self._running.pop(slot, -1) is None:
            self._order = None

    def is_running(self, slot: int) -> bool:
        return slot in self._running

    def remove(self, slots: Slots) -> None:
        """Empties these slots, which were stopped. No launched step may contain them."""
        assert not self.in_flight[slots].any(), f"one of the slots {slots} is in flight"
        emptied = slots.tolist()
        for slot in emptied:
            request = self.request_at(slot)
            request.slot = -1
            request.group.num_slots -= 1
            self.requests[slot] = None
        self._free_slots += emptied
        self.live[slots] = self.is_beam[slots] = False
        if self.num_waiting:
            self.num_waiting -= int(np.count_nonzero(self.waits[slots]))
            self.waits[slots] = False
        if self.num_timed:
            self.num_timed -= int(np.count_nonzero(self.end_time[slots] < np.inf))
            self.end_time[slots] = np.inf

    def known_tokens(self, slot: int) -> Int32s:
        """A copy of prompt and output so far."""
        tokens: Int32s = self.token_ids[slot, : self.num_known[slot]].copy()
        return tokens
