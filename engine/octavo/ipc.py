"""Messages between the processes: typed msgspec structs, never pickle.

Data path, msgpack over ZeroMQ ipc sockets in the run directory: each front-end pushes `ToCore` to the core's socket and
binds a socket of its own, to which the core pushes `ToFrontend`. One message per step and front-end, in columns.

Control path, one JSON struct a line over a socketpair between the supervisor and each child: `ToChild`, `FromChild`.
Its end of file means that the other side is gone.

A front-end's number is its index plus `frontend_processes` for each time it was replaced: late messages of a dead one
are never taken for its successor's. A sequence is named by (front-end, key); keys are int64, made by the front-end,
never reused while it lives. A prompt with n sequences has the keys key .. key + n - 1. Times are CLOCK_MONOTONIC
seconds, the same in all processes.
"""

from __future__ import annotations

import enum

import msgspec

from octavo.config import EngineConfig, ServerConfig
from octavo.errors import Reason
from octavo.step import LogprobSpec
from octavo.types import EngineInfo, EngineLoad, FinishReason, GenerationParams

MAX_FRAME = 8 << 20
"""Bytes of one message to the core; a front-end that sends more is disconnected."""

# --- front-end -> core ------------------------------------------------------------------------------------------------


class EngineCoreRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and its sequences, validated and resolved."""

    key: int
    """Of its first sequence."""
    num_sequences: int = 1
    """That are returned; a beam search has `params.num_beams` rows."""
    prompt_token_ids: bytes
    """int32, little-endian."""
    negative_prompt_token_ids: bytes = b""
    """The same, of the second branch of each sequence under guidance; empty without."""
    params: GenerationParams
    """Resolved."""
    max_total_tokens: int
    """Prompt plus output."""
    length_is_context: bool = False
    """The default length was cut by the context: the reason is CONTEXT instead of LENGTH."""
    eos_token_ids: list[int]
    stop_token_ids: list[int]
    seed: int
    priority: int = 0
    cache_salt: str = ""
    """Empty: the tenant's own; never what the client sent as it is."""
    bypass_prefix_cache: bool = False
    arrival_time: float
    deadline: float | None = None
    """The earlier of the client's and the server's."""
    deadline_is_client: bool = False
    logprobs: LogprobSpec | None = None
    prompt_logprobs: int | None = None


class AddRequests(msgspec.Struct, frozen=True, tag="add"):
    """The prompts of one client request: they enter the queue together."""

    frontend: int
    requests: list[EngineCoreRequest]


class AbortCause(enum.IntEnum):
    CLIENT = 0
    """Cancelled, disconnected, or deadline seen by the front-end: no answer is expected."""
    STOP_STRING = 1
    OPERATOR = 2


class AbortSequences(msgspec.Struct, frozen=True, tag="abort"):
    """Ends sequences before the next step. Unknown keys are fine: they may just have ended. No answer.

    A key of a beam search ends all of it."""

    frontend: int
    keys: list[int]
    cause: AbortCause


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset_prefix_cache"):
    frontend: int
    call_id: int


ToCore = AddRequests | AbortSequences | ResetPrefixCache

# --- core -> front-end ------------------------------------------------------------------------------------------------


class PromptStarted(msgspec.Struct, frozen=True, array_like=True):
    """A prompt's computation has finished; comes no later than its first token."""

    key: int
    """Of the prompt's first sequence."""
    scheduled_time: float
    """When its first step was scheduled."""
    cached_tokens: int


class SequenceFailed(msgspec.Struct, frozen=True, array_like=True):
    """A terminal event. QUEUE_TIMEOUT, CLIENT_DEADLINE, SERVER_MAX_DURATION, NON_FINITE_*, INTERNAL."""

    key: int
    reason: Reason


class SequenceLogprobColumns(msgspec.Struct, frozen=True, array_like=True):
    """Values of a whole sequence, as `step.SequenceLogprobs`; little-endian bytes."""

    num_top: int
    chosen: bytes
    ranks: bytes
    top_token_ids: bytes
    top_values: bytes
    requested: bytes


class BeamSequence(msgspec.Struct, frozen=True, array_like=True):
    """A terminal event: a whole sequence that a beam search found. All of a search's come in one message."""

    key: int
    token_ids: bytes
    """int32, little-endian, without the prompt. Empty if fewer were found than asked for."""
    finish: FinishReason
    score: float
    logprobs: SequenceLogprobColumns | None = None


class LogprobColumns(msgspec.Struct, frozen=True, array_like=True):
    """Values of the entries of an EngineCoreOutputs that asked, as `step.LogprobRows`; little-endian bytes."""

    entries: bytes
    """int32 [Q] indices into the message's entries."""
    chosen: bytes
    """float32 [Q]"""
    ranks: bytes
    """int32 [Q]"""
    top_offsets: bytes
    """int32 [Q + 1]"""
    top_token_ids: bytes
    top_values: bytes
    requested_offsets: bytes
    """int32 [Q + 1]"""
    requested: bytes


class PromptLogprobColumns(msgspec.Struct, frozen=True, array_like=True):
    """Chunk of a prompt's logprobs, as `step.PromptLogprobs`; chunks of a prompt come in order."""

    key: int
    start: int
    num_top: int
    chosen: bytes
    ranks: bytes
    top_token_ids: bytes
    top_values: bytes


class EngineCoreOutputs(msgspec.Struct, frozen=True, tag="outputs"):
    """What one step brought to the sequences of one front-end. Little-endian columns of equal length T."""

    step_id: int
    keys: bytes
    """int64 [T]"""
    token_ids: bytes
    """int32 [T]. -1 where an entry ends its sequence without a token (TIME)."""
    finish: bytes
    """uint8 [T] FinishReason, 0 while the sequence goes on. Exactly one nonzero entry, or one of `failed` or `beams`,
    per sequence that was not aborted."""
    started: list[PromptStarted] = []
    failed: list[SequenceFailed] = []
    preempted: list[tuple[int, int]] = []
    """(key, times) of sequences that end in this message and were preempted."""
    logprobs: LogprobColumns | None = None
    prompt_logprobs: list[PromptLogprobColumns] = []
    beams: list[BeamSequence] = []


class LoadReport(msgspec.Struct, frozen=True, tag="load"):
    """Sent when the load changed, at most ten times a second, and once when the core turns idle."""

    load: EngineLoad


class PrefixCacheReset(msgspec.Struct, frozen=True, tag="prefix_cache_reset"):
    call_id: int
    freed_blocks: int


ToFrontend = EngineCoreOutputs | LoadReport | PrefixCacheReset

# --- supervisor -> child ----------------------------------------------------------------------------------------------


class StartCore(msgspec.Struct, frozen=True, tag="start_core"):
    """First message to an engine core."""

    config: EngineConfig
    address: str
    """ipc:// address to bind for ToCore."""


class FrontendUp(msgspec.Struct, frozen=True, tag="frontend_up"):
    """To the core: a front-end listens for ToFrontend at this address."""

    frontend: int
    address: str


class FrontendDown(msgspec.Struct, frozen=True, tag="frontend_down"):
    """To the core: abort everything of this front-end."""

    frontend: int


class StartFrontend(msgspec.Struct, frozen=True, tag="start_frontend"):
    """First message to a front-end."""

    frontend: int
    config: ServerConfig
    model_path: str
    model_name: str
    """Name under which the model is served."""
    address: str
    """ipc:// address to bind for ToFrontend."""
    instance_id: str
    cache_secret: str
    """Hex key of the cache salts' HMAC."""
    max_model_len: int
    """0: n_positions + 1."""
    start_time: float
    cpu_cores: list[int] = []
    """Cores that it keeps to; empty: any."""


class EngineUp(msgspec.Struct, frozen=True, tag="engine_up"):
    """To a front-end: an engine core is warm and listens for ToCore at this address."""

    address: str
    info: EngineInfo
    restarts: int


class EngineDown(msgspec.Struct, frozen=True, tag="engine_down"):
    """To a front-end: the core is gone, with everything that was in it."""


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """To a core: exit now. To a front-end: drain (as configured), then exit with status 0."""

    drain: bool


class FrontendCall(msgspec.Struct, frozen=True, tag="frontend_call"):
    """To a front-end, on behalf of another one: `method` of `frontend.cluster` with a JSON payload."""

    call_id: int
    method: str
    payload: str


class ClusterReply(msgspec.Struct, frozen=True, tag="cluster_reply"):
    """To a front-end: the answers to its ClusterCall, one per living front-end."""

    call_id: int
    payloads: list[str]


ToChild = (
    StartCore
    | FrontendUp
    | FrontendDown
    | StartFrontend
    | EngineUp
    | EngineDown
    | Shutdown
    | FrontendCall
    | ClusterReply
)

# --- child -> supervisor ----------------------------------------------------------------------------------------------


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """A line about starting, for people."""

    text: str


class CoreReady(msgspec.Struct, frozen=True, tag="core_ready"):
    info: EngineInfo


class StartFailed(msgspec.Struct, frozen=True, tag="start_failed"):
    """The child cannot start and exits. Ends a server that was never ready; later it counts as a death."""

    exit_code: int
    message: str


class FrontendReady(msgspec.Struct, frozen=True, tag="frontend_ready"):
    """The front-end listens."""

    address: str
    """host:port with the port in use."""


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Once a second. A core's `steps` must grow while it is `busy`."""

    steps: int = 0
    """Steps made, plus layers computed: grows within a slow step too."""
    busy: bool = False
    inflight: int = 0
    """Requests in a front-end."""


class ClusterCall(msgspec.Struct, frozen=True, tag="cluster_call"):
    """From a front-end: run `method` in every front-end (itself included) and gather the answers."""

    call_id: int
    method: str
    payload: str


class FrontendReply(msgspec.Struct, frozen=True, tag="frontend_reply"):
    """From a front-end: the answer to a FrontendCall."""

    call_id: int
    payload: str


class FrontendStalled(msgspec.Struct, frozen=True, tag="frontend_stalled"):
    """From the core: this front-end did not take its messages, so its sequences were aborted; it has to be replaced."""

    frontend: int


class StopServer(msgspec.Struct, frozen=True, tag="stop_server"):
    """From a front-end: an operator asked for drain and shutdown."""


FromChild = (
    Progress
    | CoreReady
    | StartFailed
    | FrontendReady
    | Heartbeat
    | ClusterCall
    | FrontendReply
    | FrontendStalled
    | StopServer
)
