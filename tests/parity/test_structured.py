"""Structured outputs among plain requests, preempted and not: generate() with a prefix_allowed_tokens_fn, and texts
that belong to their language."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from octavo.checkpoint import resolve
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.grammars import Grammars
from octavo.tokenizer import Tokenizer
from octavo.types import Choice, FinishReason, StructuredOutput
from parity.cases import Case, random_cases, transformers_answers
from parity.engine import engine_answers

NUM_CASES = 32
EOS = 4095
SCHEMA = {
    "type": "object",
    "properties": {"who": {"enum": ["king", "queen"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["who", "n"],
    "additionalProperties": False,
}
CONSTRAINTS = [
    StructuredOutput(regex=r" [A-Z][a-z]{2,5}(, [a-z]{1,4})*\."),
    StructuredOutput(choice=Choice([" yes", " no", " no one knows"])),
    StructuredOutput(grammar='root ::= "(" [a-z0-9 ]{1,6} ")" root | "!"'),
    StructuredOutput(json_schema=json.dumps(SCHEMA)),
]


def is_whole(constraint: StructuredOutput, text: str) -> bool:
    if constraint.regex is not None:
        return re.fullmatch(constraint.regex, text) is not None
    if constraint.choice is not None:
        return text in constraint.choice.values
    if constraint.grammar is not None:
        return re.fullmatch(r"(\([a-z0-9 ]{1,6}\))*!", text) is not None
    value = json.loads(text)
    return list(value) == ["who", "n"] and value["who"] in ("king", "queen") and 0 <= value["n"] <= 99


class AllowedTokens:
    """prefix_allowed_tokens_fn: a matcher of its own for every step."""

    def __init__(self, grammars: Grammars, constraint: StructuredOutput, prompt_len: int) -> None:
        self._grammars, self._constraint, self._prompt_len = grammars, constraint, prompt_len

    def __call__(self, batch_id: int, token_ids) -> list[int]:
        output = token_ids[self._prompt_len :].tolist()
        if EOS in output:  # the row has ended, others have not
            return [EOS]
        matcher = self._grammars.matcher(self._constraint)
        assert matcher.consume_tokens(output)
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        bits[EOS] = bits[4096]
        return np.flatnonzero(bits[:4096]).tolist()


@pytest.fixture(scope="module")
def cases() -> tuple[list[Case], list[Case]]:
    """Ours and transformers'."""
    grammars = Grammars(Tokenizer.load(resolve("demo"), 4096))
    rng = random.Random(5)
    ours, theirs = [], []
    for i, case in enumerate(random_cases(resolve("demo"), NUM_CASES, seed=5)):
        if i % 4 == 0:
            ours.append(case)
            theirs.append(case)
            continue
        case = replace(case, eos=(EOS,), stop=(), max_new_tokens=20)
        constraint = rng.choice(CONSTRAINTS)
        ours.append(replace(case, params={**case.params, "structured_output": constraint}))
        allowed = AllowedTokens(grammars, constraint, len(case.prompt))
        theirs.append(replace(case, params={**case.params, "prefix_allowed_tokens_fn": allowed}))
    return ours, theirs


def test_every_token_of_structured_outputs_equals_transformers_alone(cases):
    ours, theirs = cases
    path = resolve("demo")
    config = EngineConfig(
        model=ModelConfig(path=str(path), name="demo", device="cpu", dtype="float32"),
        cache=CacheConfig(block_size=16, num_blocks=27),
        scheduler=SchedulerConfig(max_num_requests=24, max_chunk_tokens=7, max_model_len=145, max_queue_time=3600.0),
    )
    answers, load = engine_answers(config, ours, order_seed=1)
    expected = transformers_answers(path, theirs)
    wrong = [i for i in range(len(ours)) if answers[i] != expected[i]]
    assert wrong == [], f"{ours[wrong[0]]}\n{answers[wrong[0]]}\n{expected[wrong[0]]}"
    assert load.preemptions > 0
    tokenizer = Tokenizer.load(path, 4096)
    whole = 0
    for case, answer in zip(ours, answers, strict=True):
        constraint = case.params.get("structured_output")
        for token_ids, finish in zip(answer.token_ids, answer.finish, strict=True):
            if constraint is not None and finish is FinishReason.EOS:
                assert is_whole(constraint, tokenizer.decode(token_ids, skip_special_tokens=True))
                whole += 1
    assert whole > NUM_CASES // 4
