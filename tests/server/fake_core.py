"""An engine core without a model: the next token is a hash of all tokens before it. Steps are taken one by one.

It honours what the core is asked for by contract: lengths, EOS, stop ids, aborts, values for logprobs, failures on
demand. `hold` stops it after what it has done, so that a test decides when a step happens.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from octavo.errors import Reason
from octavo.frontend.failures import failure
from octavo.ipc import (
    AbortCause,
    EngineCoreOutputs,
    EngineCoreRequest,
    LoadReport,
    LogprobColumns,
    PromptStarted,
    SequenceFailed,
    ToFrontend,
)
from octavo.types import EngineInfo, EngineLoad, FinishReason

INFO = EngineInfo(
    model="demo",
    architecture="GPT2LMHeadModel",
    weights_sha256="00" * 32,
    dtype="float32",
    device="cpu",
    attention_backend="fake",
    kv_cache_dtype="float32",
    num_parameters=1,
    vocab_size=4096,
    n_positions=1024,
    block_size=16,
    num_blocks=4096,
    max_num_requests=256,
    max_num_batched_tokens=2048,
    max_model_len=1025,
    batch_invariant=True,
    start_time=1.0,
)


def next_token(tokens: list[int], row: int, vocab_size: int = 4000) -> int:
    """Below 4000, so never the demo model's EOS."""
    digest = hashlib.blake2b(struct.pack(f"<{len(tokens)}i", *tokens), digest_size=8, salt=bytes([row]))
    return int.from_bytes(digest.digest(), "little") % vocab_size


@dataclass
class Sequence:
    request: EngineCoreRequest
    key: int
    tokens: list[int]
    started: bool = False


@dataclass
class FakeCore:
    """The `EngineCoreClient` of one AsyncEngine."""

    running: dict[int, Sequence] = field(default_factory=dict)
    aborted: list[tuple[int, AbortCause]] = field(default_factory=list)
    added: list[EngineCoreRequest] = field(default_factory=list)
    num_steps: int = 0
    freed_by_reset: int = 7
    is_full: bool = False
    held: bool = False
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when requests were added."""
    on_message: Callable[[ToFrontend], None] = lambda message: None
    on_broken: Callable[[], None] = lambda: None
    _scheduled: bool = False

    def add(self, requests: list[EngineCoreRequest]) -> None:
        if self.is_full:
            raise failure(Reason.QUEUE_FULL)
        for request in requests:
            self.added.append(request)
            prompt = np.frombuffer(request.prompt_token_ids, "<i4").tolist()
            for row in range(request.num_sequences):
                self.running[request.key + row] = Sequence(request, request.key + row, list(prompt))
        self.arrived.set()
        self._go()

    def abort(self, keys: list[int], cause: AbortCause) -> None:
        for key in keys:
            self.running.pop(key, None)
            self.aborted.append((key, cause))

    async def reset_prefix_cache(self) -> int:
        return self.freed_by_reset

    def hold(self) -> None:
        self.held = True

    def release(self) -> None:
        self.held = False
        self._go()

    def fail(self, reason: Reason) -> None:
        """Everything that runs fails alone."""
        keys = list(self.running)
        self.running.clear()
        self._send(EngineCoreOutputs(self.num_steps, b"", b"", b"", failed=[SequenceFailed(k, reason) for k in keys]))

    def report_load(self, load: EngineLoad) -> None:
        self.on_message(LoadReport(load))

    def step(self) -> None:
        """One token for every running sequence."""
        self.num_steps += 1
        keys, token_ids, finish, started = [], [], [], []
        logprobs: list[tuple[int, EngineCoreRequest, int]] = []
        for key, sequence in list(self.running.items()):
            request = sequence.request
            if not sequence.started:
                sequence.started = True
                if key == request.key:
                    started.append(PromptStarted(request.key, request.arrival_time, 0))
            token = next_token(sequence.tokens, key - request.key if request.params.do_sample else 0)
            sequence.tokens.append(token)
            reason = self._finish_reason(sequence, token)
            if request.logprobs is not None:
                logprobs.append((len(keys), request, token))
            keys.append(key)
            token_ids.append(token)
            finish.append(int(reason))
            if reason:
                del self.running[key]
        self._send(
            EngineCoreOutputs(
                self.num_steps,
                np.asarray(keys, "<i8").tobytes(),
                np.asarray(token_ids, "<i4").tobytes(),
                bytes(finish),
                started=started,
                logprobs=_columns(logprobs) if logprobs else None,
            )
        )

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason:
        request = sequence.request
        if token in request.eos_token_ids:
            return FinishReason.EOS
        if token in request.stop_token_ids:
            return FinishReason.STOP_TOKEN
        if len(sequence.tokens) >= request.max_total_tokens:
            return FinishReason.CONTEXT if request.length_is_context else FinishReason.LENGTH
        return FinishReason.NONE

    def _go(self) -> None:
        if not self.held and not self._scheduled and self.running:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        if not self.held and self.running:
            self.step()
            self._go()

    def _send(self, message: EngineCoreOutputs) -> None:
        self.on_message(message)


def _columns(entries: list[tuple[int, EngineCoreRequest, int]]) -> LogprobColumns:
    top, requested, top_ids = [0], [0], []
    for _, request, token in entries:
        assert request.logprobs is not None
        top_ids += [(token + i) % 4096 for i in range(request.logprobs.num_top)]
        top.append(len(top_ids))
        requested.append(requested[-1] + len(request.logprobs.token_ids))
    return LogprobColumns(
        entries=np.asarray([entry for entry, _, _ in entries], "<i4").tobytes(),
        chosen=np.full(len(entries), -1.5, "<f4").tobytes(),
        ranks=np.ones(len(entries), "<i4").tobytes(),
        top_offsets=np.asarray(top, "<i4").tobytes(),
        top_token_ids=np.asarray(top_ids, "<i4").tobytes(),
        top_values=np.full(len(top_ids), -2.5, "<f4").tobytes(),
        requested_offsets=np.asarray(requested, "<i4").tobytes(),
        requested=np.full(requested[-1], -3.5, "<f4").tobytes(),
    )
