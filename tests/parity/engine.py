"""Runs cases through an engine core, many at once, in the order in which a busy server would get them."""

from __future__ import annotations

import random
import time

import numpy as np
from octavo.config import EngineConfig
from octavo.engine_core.engine_core import EngineCore, Runner
from octavo.ipc import AddRequests, EngineCoreOutputs, EngineCoreRequest
from octavo.types import EngineLoad, FinishReason, GenerationParams
from parity.cases import Answer, Case

STRIDE = 100
"""Keys from one case to the next."""


def engine_request(case: Case, key: int) -> EngineCoreRequest:
    return EngineCoreRequest(
        key=key,
        num_sequences=case.num_sequences,
        prompt_token_ids=np.array(case.prompt, np.int32).tobytes(),
        params=GenerationParams(
            max_new_tokens=case.max_new_tokens, num_return_sequences=case.num_sequences, **case.params
        ),
        max_total_tokens=len(case.prompt) + case.max_new_tokens,
        eos_token_ids=list(case.eos),
        stop_token_ids=list(case.stop),
        negative_prompt_token_ids=np.array(case.negative, np.int32).tobytes(),
        seed=case.seed,
        arrival_time=time.monotonic(),
    )


def engine_answers(
    config: EngineConfig, cases: list[Case], order_seed: int, runner: Runner | None = None
) -> tuple[list[Answer], EngineLoad]:
    """Submits the cases in random order, half of them at once and the rest while the engine runs."""
    core = EngineCore(config, runner=runner)
    rng = random.Random(order_seed)
    order = list(range(len(cases)))
    rng.shuffle(order)
    requests = [engine_request(cases[i], i * STRIDE) for i in order]
    half = len(requests) // 2
    core.handle(AddRequests(0, requests[:half]))
    later = requests[half:]
    answers = [Answer([[] for _ in range(c.num_sequences)], [FinishReason.NONE] * c.num_sequences) for c in cases]
    while core.has_work or later:
        if later and rng.random() < 0.7:
            core.handle(AddRequests(0, [later.pop() for _ in range(min(len(later), rng.randint(1, 8)))]))
        for message in core.step().get(0, []):
            if isinstance(message, EngineCoreOutputs):
                _collect(message, answers)
    core.scheduler.check()
    load = core.scheduler.load(time.monotonic())
    core.close()
    return answers, load


def _collect(message: EngineCoreOutputs, answers: list[Answer]) -> None:
    assert not message.failed, message.failed
    for found in message.beams:
        answer, sequence = answers[found.key // STRIDE], found.key % STRIDE
        assert answer.finish[sequence] is FinishReason.NONE, "a sequence ends twice"
        answer.token_ids[sequence] = np.frombuffer(found.token_ids, np.int32).tolist()
        answer.finish[sequence] = found.finish
        answer.scores.append(found.score)
    keys = np.frombuffer(message.keys, np.int64).tolist()
    tokens = np.frombuffer(message.token_ids, np.int32).tolist()
    finish = np.frombuffer(message.finish, np.uint8).tolist()
    for key, token, reason in zip(keys, tokens, finish, strict=True):
        answer, sequence = answers[key // STRIDE], key % STRIDE
        assert answer.finish[sequence] is FinishReason.NONE, "a token after the end"
        answer.token_ids[sequence].append(token)
        answer.finish[sequence] = FinishReason(reason)
