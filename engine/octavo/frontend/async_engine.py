"""AsyncEngine: what a servicer talks to. Admission, deadlines, cancellation, draining, and delivery of updates."""

from __future__ import annotations

import enum
from collections.abc import Callable

from octavo.config import Limits, ServerConfig
from octavo.errors import RequestError
from octavo.frontend.client import EngineCoreClient
from octavo.frontend.model import FrontendModel
from octavo.types import EngineInfo, EngineLoad, GenerateRequest, GenerateUpdate, PromptOptions, ResolvedOptions


class EngineState(enum.Enum):
    STARTING = "starting"
    """No core has been up yet."""
    READY = "ready"
    DRAINING = "draining"
    """New requests are refused, running ones finish. Lasts until undone, whatever the core does meanwhile."""
    RESTARTING = "restarting"
    """The core died; another one is on its way."""


class RequestHandle:
    """The reader's end of one request. One reader, on the engine's event loop. Call `close` in a `finally`."""

    request_id: str
    model: str
    resolved: ResolvedOptions | None

    async def next(self) -> GenerateUpdate | None:
        """What happened since the last call, merged; waits for something to happen. None after the last update.

        Raises RequestError when the request failed, after what was generated before has been returned.
        """
        ...

    async def collect(self) -> GenerateUpdate:
        """The whole answer: prompts in order, one delta per sequence, sorted by prompt and output."""
        ...

    def close(self) -> None:
        """Idempotent. Aborts in the core what still runs, and gives the request's places back."""
        ...


class AsyncEngine:
    """One front-end's view of the engine. All methods are called on its event loop."""

    state: EngineState
    info: EngineInfo | None
    """None until a core was up; that of the last one while restarting."""
    load: EngineLoad | None
    restarts: int
    model: FrontendModel
    limits: Limits

    def __init__(
        self,
        model: FrontendModel,
        client: EngineCoreClient,
        config: ServerConfig,
        *,
        frontend: int = 0,
        cache_secret: bytes,
    ) -> None: ...

    def on_state_change(self, callback: Callable[[EngineState], None]) -> None:
        """`callback` is called with each new state."""
        ...

    def on_load(self, callback: Callable[[EngineLoad], None]) -> None:
        """`callback` is called with each load report (for WatchLoad)."""
        ...

    def engine_up(self, info: EngineInfo, restarts: int) -> None:
        """A core is warm and the client is connected to it."""
        ...

    def engine_down(self) -> None:
        """The core is gone: every request in flight fails with UNAVAILABLE, ENGINE_RESTARTED."""
        ...

    async def submit(
        self, request: GenerateRequest, *, tenant: str = "", deadline: float | None = None, streaming: bool
    ) -> RequestHandle:
        """Validates, tokenizes, admits and sends a request. `deadline`: the client's, monotonic seconds.

        Raises RequestError: all violations at once, or why the request cannot be admitted now.
        """
        ...

    async def abort_requests(self, request_ids: list[str] | None, tenant: str | None) -> list[tuple[str, int]]:
        """Ends requests in this front-end with ABORTED. Returns (request_id, requests ended), each id once, those
        that were found only. None: all ids; None: of every tenant."""
        ...

    async def tokenize(self, texts: list[str], options: PromptOptions) -> list[list[int]]:
        """Exactly what `submit` would do with the texts. Raises RequestError with paths from TokenizeRequest."""
        ...

    async def detokenize(self, token_ids: list[list[int]], skip_special_tokens: bool = False) -> list[str]:
        """Raises RequestError with paths from DetokenizeRequest."""
        ...

    def start_draining(self) -> None: ...

    def stop_draining(self) -> None: ...

    @property
    def num_inflight(self) -> int:
        """Requests submitted and not closed."""
        ...

    async def wait_idle(self, timeout: float | None) -> bool:
        """Waits until nothing is in flight; False if that took longer than `timeout` seconds."""
        ...

    def fail_all(self, error: RequestError) -> None:
        """Ends every request in flight with this error."""
        ...

    async def reset_prefix_cache(self) -> int: ...
