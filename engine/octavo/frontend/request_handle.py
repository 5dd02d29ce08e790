"""The reader's end of one request: waits for updates, knows its deadline, and sees a reader that stalls.

A reader awaits `next`, or is called when there is something (`when_ready`) and calls `take`: so one reader of many
requests needs no task for each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from math import inf
from typing import Final, Protocol

from octavo.errors import Reason, RequestError
from octavo.frontend.failures import again, failure
from octavo.frontend.request_state import RequestState
from octavo.types import GenerateUpdate, ResolvedOptions

STALL_BYTES: Final = 1 << 20
"""Estimated bytes that may wait for a reader that makes no progress ..."""
STALL_SECONDS: Final = 30.0
"""... for this long; then the request fails with SLOW_READER."""


class HandleOwner(Protocol):
    """What a handle needs of AsyncEngine."""

    def fail(self, handle: RequestHandle, error: RequestError) -> None: ...

    def forget(self, handle: RequestHandle) -> None: ...


class RequestHandle:
    """One request, for one reader on the engine's event loop. Call `close` in a `finally`."""

    def __init__(self, owner: HandleOwner, state: RequestState, *, model: str, streaming: bool) -> None:
        self.request_id = state.request.request_id
        self.model = model
        self.resolved: ResolvedOptions | None = state.request.resolved
        self.tenant = state.request.tenant
        self.state = state
        self.num_places = state.request.num_rows
        """Of the admission limits, held now. Owned by AsyncEngine."""
        self._owner = owner
        self._can_stall = streaming and state.max_bytes > STALL_BYTES
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._waits_for_end = False
        self._wake_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._on_failure: Callable[[RequestError], None] | None = None
        self._on_ready: Callable[[], None] | None = None
        self._is_told = False
        """`_on_ready` was called, and nothing was taken since."""
        self._closed = False
        if state.request.deadline is not None:
            delay = max(0.0, state.request.deadline - time.monotonic())
            self._deadline_timer = self._loop.call_later(delay, self._expire)

    def on_failure(self, callback: Callable[[RequestError], None]) -> None:
        """`callback` is called if the request fails while its reader is busy elsewhere, perhaps stuck in a write."""
        self._on_failure = callback

    def when_ready(self, callback: Callable[[], None]) -> None:
        """`callback` is called when there may be something to take, once until `take`. Instead of `next`."""
        self._on_ready = callback
        self.notify()

    async def next(self) -> GenerateUpdate | None:
        """What happened since the last call, merged; waits for something to happen. None after the last update.

        Raises RequestError when the request failed, after what was generated before has been returned.
        """
        while (update := self.take()) is None and not self.state.taken:
            await self.wait()
        return update

    def take(self) -> GenerateUpdate | None:
        """What is due, merged; None where nothing is, as after the last update, when `state.taken` is true.

        Raises RequestError when the request failed, after what was generated before has been returned.
        """
        self._begin_to_take()
        state, update = self.state, None
        now = time.monotonic()
        if (delay := state.due(now)) <= 0:
            update = state.take(now)
            delay = state.due(now) if state.holds_back and not state.ended else inf
        if update is None and state.taken and state.error is not None:
            raise again(state.error)
        if self._on_ready is not None:
            self._wake_after(delay)
        return update

    def take_plain(self) -> tuple[str, list[int]] | None:
        """`RequestState.take_plain`: to be tried before `take`."""
        self._is_told = False
        if self._stall_timer is not None:
            self._begin_to_take()
        return self.state.take_plain()

    async def wait(self) -> None:
        """Returns when `take` may have something, or the last was taken."""
        if (delay := self.state.due(time.monotonic())) > 0 and not self.state.taken:
            await self._wait(delay)

    async def collect(self) -> GenerateUpdate:
        """The whole answer: prompts in order, one delta per sequence, sorted by prompt and output.

        Raises RequestError when the request failed.
        """
        self._begin_to_take()
        self._waits_for_end = True
        while not self.state.ended:
            await self._wait(inf)
        if self.state.error is not None:
            raise again(self.state.error)
        update = self.state.take(time.monotonic())
        assert update is not None, "a request that succeeded ends with an update"
        return update

    def close(self) -> None:
        """Idempotent. Aborts in the core what still runs, and gives the request's places back."""
        if self._closed:
            return
        self._closed = True
        self._on_failure = self._on_ready = None
        if not self.state.ended:
            self._owner.fail(self, failure(Reason.CLIENT_CANCELLED))
        self._begin_to_take()
        self._cancel_wake_timer()
        self._cancel_deadline()
        self._wake()
        self._owner.forget(self)

    def notify(self) -> None:
        """The state changed. Called by AsyncEngine."""
        state = self.state
        if state.ended:
            self._cancel_deadline()
        elif self._on_ready is not None and not self._is_told and not state.holds_back:
            self._is_told = True
            self._on_ready()
            return
        if self._is_told or (self._waiter is None and self._on_ready is None):
            self._check_reader()
        elif state.ended:
            self._wake()
        elif not self._waits_for_end:
            self._wake_after(state.due(time.monotonic() if state.holds_back else 0.0))

    def _check_reader(self) -> None:
        """The reader is busy with an earlier update, or stuck."""
        if self.state.error is not None:
            if self._on_failure is not None:
                self._on_failure(self.state.error)
        elif self._can_stall and self._stall_timer is None and self.state.num_pending_bytes > STALL_BYTES:
            self._stall_timer = self._loop.call_later(STALL_SECONDS, self._stalled)

    def _stalled(self) -> None:
        self._stall_timer = None
        if not self.state.ended:
            self._owner.fail(self, failure(Reason.SLOW_READER))

    def _expire(self) -> None:
        self._deadline_timer = None
        if not self.state.ended:
            is_client = self.state.request.deadline_is_client
            self._owner.fail(self, failure(Reason.CLIENT_DEADLINE if is_client else Reason.SERVER_MAX_DURATION))

    async def _wait(self, delay: float) -> None:
        assert self._waiter is None, "a request has one reader"
        self._waiter = self._loop.create_future()
        try:
            if delay < inf:
                self._wake_after(delay)
            await self._waiter
        finally:
            self._waiter = None
            self._cancel_wake_timer()

    def _wake_after(self, delay: float) -> None:
        if delay <= 0:
            self._wake()
        elif delay < inf and self._wake_timer is None:
            self._wake_timer = self._loop.call_later(delay, self._wake)

    def _wake(self) -> None:
        if self._on_ready is not None:
            if self._wake_timer is not None:
                self._cancel_wake_timer()
            if not self._is_told:
                self._is_told = True
                self._on_ready()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _begin_to_take(self) -> None:
        self._is_told = False
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _cancel_wake_timer(self) -> None:
        if self._wake_timer is not None:
            self._wake_timer.cancel()
            self._wake_timer = None

    def _cancel_deadline(self) -> None:
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None
