"""From a GenerateRequest to what the engine core takes: validation, tokenization, defaults.

Three steps, so that a server can run the middle one in a thread: `check` needs no tokens and costs well under 5 ms
whatever the request holds; `tokenize` is pure; `finish` checks lengths and builds the core's requests.
"""

from __future__ import annotations

import msgspec

from octavo.config import Limits
from octavo.frontend.model import FrontendModel
from octavo.ipc import EngineCoreRequest
from octavo.types import EngineInfo, GenerateRequest, OutputOptions, ResolvedOptions


class ProcessedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, ready for the core."""

    index: int
    """Position in the request."""
    token_ids: list[int]
    """After truncation."""
    text: str | None
    """What stands before the generated text with include_prompt; None without."""
    core_request: EngineCoreRequest

    @property
    def keys(self) -> range:
        return range(self.core_request.key, self.core_request.key + self.core_request.num_sequences)


class ProcessedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that passed all checks."""

    request_id: str
    """The client's, or one made up."""
    tenant: str
    prompts: list[ProcessedPrompt]
    output: OutputOptions
    """Resolved."""
    resolved: ResolvedOptions | None
    """Set if the request asked for it."""
    arrival_time: float
    deadline: float | None
    deadline_is_client: bool

    @property
    def core_requests(self) -> list[EngineCoreRequest]:
        return [prompt.core_request for prompt in self.prompts]

    @property
    def num_sequences(self) -> int: ...

    @property
    def num_prompt_tokens(self) -> int: ...


class InputProcessor:
    """Validates and resolves requests. Owns the keys of this front-end's sequences."""

    def __init__(self, model: FrontendModel, limits: Limits, *, cache_secret: bytes) -> None: ...

    def process(
        self,
        request: GenerateRequest,
        *,
        arrival_time: float,
        tenant: str = "",
        deadline: float | None = None,
        deadline_is_client: bool = False,
        streaming: bool = True,
        info: EngineInfo | None = None,
    ) -> ProcessedRequest:
        """All three steps at once. Times are monotonic seconds.

        `streaming` false also estimates the size of the whole answer; `info` lets requests be refused that no empty
        KV-cache could hold. Raises RequestError with every violation that the failing step found.
        """
        ...
