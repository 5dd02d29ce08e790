"""Sends one request and records when what came back."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any, Self

from octavo.client import AsyncClient, OctavoError, Response, Session
from octavo.loadtest.job import Job
from octavo.loadtest.measure import OK, Record

READY_TIMEOUT = 10.0
"""Seconds that the server gets to accept a connection."""


class Sender:
    """The connections of a process. State: belongs to its event loop; `async with` opens and closes them."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._stack = contextlib.AsyncExitStack()
        self._next = itertools.count()
        self._openers: list[AsyncClient | Session] = []

    async def __aenter__(self) -> Self:
        """Raises OctavoError when the server is not ready."""
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(self._job.connections):
                client = await stack.enter_async_context(self._job.connection.open())
                await client.wait_until_ready(READY_TIMEOUT)
                session = self._job.transport == "session"
                self._openers.append(await stack.enter_async_context(client.multiplex()) if session else client)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def send(self, record: Record, prompt: str | list[int], now: Callable[[], float] = time.monotonic) -> None:
        """Fills the record by the clock `now`. A failure is noted, not raised; cancelling leaves it UNFINISHED."""
        opener = self._openers[next(self._next) % len(self._openers)]
        keywords: dict[str, Any] = {**self._job.params, "max_new_tokens": record.wanted}
        if self._job.timeout is not None:
            keywords["timeout"] = self._job.timeout
        record.sent = now()
        try:
            if self._job.transport == "unary":
                response = await opener.generate_all([prompt], **keywords)
                runs = [output for outputs in response.outputs for output in outputs]
                record.runs = [[(now(), len(output.token_ids))] for output in runs if output.token_ids]
            else:
                response = await _stream(opener, record, prompt, keywords, now)
            record.prompt_tokens = response.usage.prompt_tokens
            record.cached_tokens = response.usage.cached_tokens
            record.code = OK
        except OctavoError as error:
            record.code, record.reason, record.message = error.code, error.reason, error.message
        finally:
            record.ended = now()


async def _stream(
    opener: AsyncClient | Session,
    record: Record,
    prompt: str | list[int],
    keywords: dict[str, Any],
    now: Callable[[], float],
) -> Response:
    runs: dict[tuple[int, int], list[tuple[float, int]]] = {}
    try:
        async with opener.stream([prompt], **keywords) as stream:
            async for delta in stream:
                if delta.token_ids:
                    run = runs.setdefault((delta.prompt_index, delta.output_index), [])
                    run.append((now(), len(delta.token_ids)))
            return await stream.response()
    finally:
        record.runs = list(runs.values())
