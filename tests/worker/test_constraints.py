"""Structured outputs in the sampler: the mask follows the output, forwards and backwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from llguidance import LLParserLimits
from octavo import grammars
from octavo.checkpoint import resolve
from octavo.errors import Reason
from octavo.tokenizer import Tokenizer
from octavo.types import Choice, StructuredOutput
from octavo.worker.constraints import ConstraintError, Constraints
from octavo.worker.noise import Noise
from octavo.worker.request_states import RequestStates
from octavo.worker.sampler import Sampler
from worker.sampling import Row, every_processed_logit, step_with

V = 4096
EOS = np.array([4095])


@pytest.fixture
def path() -> Path:
    return resolve("demo")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve("demo"), V)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode([text])[0]


def test_the_mask_follows_the_output_wherever_it_goes(path: Path, tokenizer: Tokenizer):
    constraint = StructuredOutput(json_schema=json.dumps({"type": "array", "items": {"enum": ["ab", 12, None]}}))
    output = ids_of(tokenizer, '["ab", 12, null, "ab"]')
    constraints = Constraints(path, V)
    constraints.add(0, constraint)
    forwards = [constraints.allowed(0, output[:i], EOS).tolist() for i in range(len(output) + 1)]
    for i, token in enumerate(output):
        assert token in forwards[i] and 4095 not in forwards[i]
    assert forwards[-1] == [4095]
    backwards = [constraints.allowed(0, output[:i], EOS).tolist() for i in reversed(range(len(output) + 1))]
    assert backwards[::-1] == forwards
    constraints.add(0, constraint)  # another request in this slot
    for i in (3, 1, len(output), 2):
        assert constraints.allowed(0, output[:i], EOS).tolist() == forwards[i]
    constraints.remove(0)
    constraints.remove(0)


def test_the_requests_own_end_is_allowed_where_the_text_is_complete_and_nowhere_else(path: Path, tokenizer: Tokenizer):
    constraints = Constraints(path, V)
    constraints.add(0, StructuredOutput(regex="a+"))
    a, b = (tokenizer.token_bytes.index(text) for text in (b"a", b"b"))
    ends = np.array([b, 4095])
    assert not set(constraints.allowed(0, [], ends).tolist()) & {b, 4095}
    assert {a, b, 4095} <= set(constraints.allowed(0, [a], ends).tolist())
    assert 4095 not in constraints.allowed(0, [a], np.array([b]))
    assert a not in constraints.allowed(0, [], np.array([a])), "a token that ends the sequence is not text"


def test_rows_with_a_structured_output_choose_its_tokens_and_others_are_not_touched(path: Path, tokenizer: Tokenizer):
    states = RequestStates(3, 128, 16, V, Constraints(path, V))
    sampler = Sampler(states, Noise(V, torch.device("cpu")))
    spec = every_processed_logit(V)
    logits = torch.linspace(0, 1, V)
    constraint = StructuredOutput(choice=Choice(["yes", "no"]))
    start = [token for token in (b"y", b"ye", b"yes", b"n", b"no") if token in tokenizer.token_bytes]
    expected = sorted(tokenizer.token_bytes.index(token) for token in start)
    rows = [
        Row(logits, [1], 1, {"structured_output": constraint}, eos=(4095,), logprobs=spec),
        Row(logits, [1], 1, {}, eos=(4095,), logprobs=spec),
        Row(
            logits,
            [1],
            1,
            {"structured_output": constraint, "allowed_token_ids": [7, expected[0]]},
            eos=(4095,),
            logprobs=spec,
        ),
    ]
    states.apply(step_with(new_requests=[row.request(slot) for slot, row in enumerate(rows)]))
    output = sampler.sample(torch.stack([row.logits for row in rows]), np.arange(3, dtype=np.int32))
    assert output.token_ids.tolist() == [expected[-1], V - 1, expected[0]]
    values = output.logprobs.requested.reshape(3, V)
    assert np.flatnonzero(np.isfinite(values[0])).tolist() == expected
    assert np.isfinite(values[1]).all()


def test_a_constraint_that_takes_too_much_fails_its_row_alone(path: Path, tokenizer: Tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(grammars, "LIMITS", LLParserLimits(max_lexer_states=60, verbose_errors=False))
    states = RequestStates(2, 128, 16, V, Constraints(path, V))
    sampler = Sampler(states, Noise(V, torch.device("cpu")))
    text = [tokenizer.token_bytes.index(b"a")] * 60
    bad = Row(torch.zeros(V), [1, *text], 1, {"structured_output": StructuredOutput(regex="(a|b)*a(a|b){200}")})
    states.apply(step_with(new_requests=[bad.request(0), Row(torch.linspace(0, 1, V), [1], 1).request(1)]))
    output = sampler.sample(torch.stack([torch.zeros(V), torch.linspace(0, 1, V)]), np.arange(2, dtype=np.int32))
    assert output.failed == [(0, Reason.CONSTRAINT_TOO_COMPLEX)]
    assert output.token_ids.tolist() == [-1, V - 1]
    assert not caplog.records
    with pytest.raises(ConstraintError):
        states.allowed_ids(0)
