"""The reader's end of one request: waits for updates, knows its deadline, and sees a reader that stalls."""

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
        self._streaming = streaming
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._waits_for_end = False
        self._wake_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._on_failure: Callable[[RequestError], None] | None = None
        self._closed = False
        if state.request.deadline is not None:
            delay = max(0.0, state.request.deadline - time.monotonic())
            self._deadline_timer = self._loop.call_later(delay, self._expire)

    def on_failure(self, callback: Callable[[RequestError], None]) -> None:
        """`callback` is called if the request fails while its reader is busy elsewhere, perhaps stuck in a write."""
        self._on_failure = callback

    async def next(self) -> GenerateUpdate | None:
        """What happened since the last call, merged; waits for something to happen. None after the last update.

        Raises RequestError when the request failed, after what was generated before has been returned.
        """
        self._cancel_stall_timer()
        while True:
            now = time.monotonic()
            delay = self.state.due(now)
            if delay <= 0:
                update = self.state.take(now)
                if update is not None:
                    return update
            elif self.state.taken:
                if self.state.error is not None:
                    raise again(self.state.error)
                return None
            else:
                await self._wait(delay)

    async def collect(self) -> GenerateUpdate:
        """The whole answer: prompts in order, one delta per sequence, sorted by prompt and output.

        Raises RequestError when the request failed.
        """
        self._cancel_stall_timer()
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
        self._on_failure = None
        if not self.state.ended:
            self._owner.fail(self, failure(Reason.CLIENT_CANCELLED))
        self._cancel_stall_timer()
        self._cancel_deadline()
        self._wake()
        self._owner.forget(self)

    def notify(self) -> None:
        """The state changed. Called by AsyncEngine."""
        if self.state.ended:
            self._cancel_deadline()
        if self._waiter is None:
            self._check_reader()
        elif self.state.ended:
            self._wake()
        elif not self._waits_for_end:
            self._wake_after(self.state.due(time.monotonic()))

    def _check_reader(self) -> None:
        """The reader is busy with an earlier update, or stuck."""
        if self.state.error is not None:
            if self._on_failure is not None:
                self._on_failure(self.state.error)
        elif self._streaming and self._stall_timer is None and self.state.num_pending_bytes > STALL_BYTES:
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
            if self._wake_timer is not None:
                self._wake_timer.cancel()
                self._wake_timer = None

    def _wake_after(self, delay: float) -> None:
        if delay <= 0:
            self._wake()
        elif delay < inf and self._wake_timer is None:
            self._wake_timer = self._loop.call_later(delay, self._wake)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _cancel_deadline(self) -> None:
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None
