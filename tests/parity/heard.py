"""What a client hears of each sequence, step by step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from octavo.engine_core.engine_core import EngineCore
from octavo.errors import Reason
from octavo.ipc import AddRequests, EngineCoreOutputs, EngineCoreRequest
from octavo.step import LogprobSpec
from octavo.types import FinishReason, GenerationParams
from parity.cases import Case


@dataclass
class Heard:
    """One sequence."""

    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | Reason = FinishReason.NONE
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)


def answers(core: EngineCore, requests: list[EngineCoreRequest]) -> dict[int, Heard]:
    """All sequences by key; the engine gets the requests little by little, and is closed."""
    heard: dict[int, Heard] = {}
    waiting = list(reversed(requests))
    while core.has_work or waiting:
        if waiting:
            core.handle(AddRequests(0, [waiting.pop() for _ in range(min(len(waiting), 3))]))
        for message in core.step().get(0, []):
            if isinstance(message, EngineCoreOutputs):
                listen(message, heard)
    core.scheduler.check()
    core.close()
    return heard


def listen(message: EngineCoreOutputs, heard: dict[int, Heard]) -> None:
    entries = zip(
        np.frombuffer(message.keys, np.int64).tolist(),
        np.frombuffer(message.token_ids, np.int32).tolist(),
        message.finish,
        strict=True,
    )
    table = message.logprobs
    row_of = {} if table is None else {e: i for i, e in enumerate(np.frombuffer(table.entries, np.int32).tolist())}
    for entry, (key, token_id, finish) in enumerate(entries):
        sequence = heard.setdefault(key, Heard())
        assert sequence.finish is FinishReason.NONE, "a token after the end"
        sequence.token_ids.append(token_id)
        sequence.finish = FinishReason(finish)
        if table is not None and entry in row_of:
            row = row_of[entry]
            part = slice(*np.frombuffer(table.top_offsets, np.int32)[row : row + 2])
            sequence.logprobs.append(float(np.frombuffer(table.chosen, np.float32)[row]))
            tops = np.frombuffer(table.top_token_ids, np.int32)[part], np.frombuffer(table.top_values, np.float32)[part]
            sequence.top.append((tops[0].tolist(), tops[1].tolist()))
    for failed in message.failed:
        heard.setdefault(failed.key, Heard()).finish = failed.reason


def engine_request(key: int, case: Case, logprobs: LogprobSpec | None, lookup: dict[str, Any]) -> EngineCoreRequest:
    return EngineCoreRequest(
        key=key,
        num_sequences=case.num_sequences,
        prompt_token_ids=np.array(case.prompt, np.int32).tobytes(),
        params=GenerationParams(
            max_new_tokens=case.max_new_tokens, num_return_sequences=case.num_sequences, **case.params, **lookup
        ),
        max_total_tokens=len(case.prompt) + case.max_new_tokens,
        eos_token_ids=list(case.eos),
        stop_token_ids=list(case.stop),
        seed=case.seed,
        arrival_time=time.monotonic(),
        logprobs=logprobs,
    )
