"""Counters of the scheduler and their rates over the last ten seconds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

WINDOW = 10.0
RESOLUTION = 0.5


@dataclass(slots=True)
class Counters:
    """Since the engine core started."""

    prompt_tokens: int = 0
    """Computed, not found in the cache."""
    generation_tokens: int = 0
    cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    cache_hits: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    """Guessed and computed."""
    accepted_tokens: int = 0
    """Of these, right ones."""
    steps: int = 0


class LoadMeter:
    """Keeps `total` and, every half second, a copy of it, from which the rates come."""

    def __init__(self) -> None:
        self.total = Counters()
        self._history: deque[tuple[float, int, int, int, int]] = deque()

    def tick(self, now: float) -> None:
        """Call once a step."""
        self.total.steps += 1
        if self._history and now - self._history[-1][0] < RESOLUTION:
            return
        total = self.total
        self._history.append((now, total.prompt_tokens, total.generation_tokens, total.cache_queries, total.cache_hits))
        while now - self._history[0][0] > WINDOW:
            self._history.popleft()

    def rates(self, now: float) -> tuple[float, float, float]:
        """Generated and computed prompt tokens per second, and the part of looked-up tokens that were found."""
        while self._history and now - self._history[0][0] > WINDOW:
            self._history.popleft()
        if not self._history:
            return 0.0, 0.0, 0.0
        start, prompt, generated, queries, hits = self._history[0]
        seconds = max(now - start, RESOLUTION)
        looked_up = self.total.cache_queries - queries
        return (
            (self.total.generation_tokens - generated) / seconds,
            (self.total.prompt_tokens - prompt) / seconds,
            (self.total.cache_hits - hits) / looked_up if looked_up else 0.0,
        )
