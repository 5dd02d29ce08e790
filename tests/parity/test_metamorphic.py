"""However a request is run, its tokens are the same and their logprobs within 1e-5: fp32, the bundled model.

That is 1e-5 of 1 + |logprob|: a prompt computed in chunks of 7 moves a logprob of -4.6 by 1.1e-5.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from octavo.checkpoint import resolve
from octavo.client.results import Output
from octavo.llm import LLM
from parity.cases import client_keywords, random_cases

NUM_REQUESTS = 64
ENGINE = {"dtype": "float32", "device": "cpu", "block_size": 16, "max_model_len": 145}
Request = dict[str, Any]
Outputs = list[Output]


@dataclass(frozen=True)
class Way:
    """To run the requests other than one after the other without a cache."""

    engine: dict[str, Any] = field(default_factory=dict)
    """Options of LLM."""
    keywords: dict[str, Any] = field(default_factory=dict)
    """That every request gets, and that by their meaning change nothing."""
    runs: int = 1
    """How often all requests are run; the last run counts."""
    preempts: bool = False
    hits: bool = False
    speculates: bool = False


NO_CACHE = {"enable_prefix_caching": False}
WAYS = {
    "in a batch of 64": Way({"max_num_requests": 64, "num_blocks": 1000, **NO_CACHE}),
    "preempted": Way({"max_num_requests": 64, "num_blocks": 40, **NO_CACHE}, preempts=True),
    "in chunks": Way({"max_num_requests": 64, "max_chunk_tokens": 7, "pipeline_depth": 0, **NO_CACHE}),
    "found in the cache": Way({"max_num_requests": 64, "num_blocks": 1000}, runs=2, hits=True),
    "speculated": Way(
        {"max_num_requests": 64, "num_blocks": 1000, **NO_CACHE}, {"prompt_lookup_num_tokens": 4}, speculates=True
    ),
    "all of these": Way({"max_num_requests": 64, "num_blocks": 60, "max_chunk_tokens": 7}, preempts=True, hits=True),
}


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Mixes of parameters, each with one kind of logprobs."""
    rng = random.Random(3)
    cases = random_cases(resolve("demo"), NUM_REQUESTS, seed=3, every_parameter=True)
    return [
        {
            "prompt": case.prompt,
            "logprobs": rng.choice([0, 3]),
            "logprob_kind": rng.choice(["raw_logprob", "processed_logprob"]),
            **client_keywords(case),
        }
        for case in cases
    ]


@contextmanager
def engine(**options: Any) -> Iterator[LLM]:
    with LLM("demo", **ENGINE, **options) as llm:
        yield llm
        llm.core.scheduler.check()


def run(llm: LLM, requests: list[Request]) -> list[Outputs]:
    results = llm.generate_each(requests)
    return [result if isinstance(result, list) else [result] for result in results]


@pytest.fixture(scope="module")
def alone(requests: list[Request]) -> list[Outputs]:
    with engine(**NO_CACHE) as llm:
        return [run(llm, [request])[0] for request in requests]


@pytest.mark.parametrize("name", WAYS)
def test_tokens_and_logprobs_are_those_of_the_request_alone(name: str, requests, alone) -> None:
    way = WAYS[name]
    with engine(**way.engine) as llm:
        for _ in range(way.runs):
            found = run(llm, [request | way.keywords for request in requests])
        load = llm.core.scheduler.load(0.0)
    for request, outputs, expected in zip(requests, found, alone, strict=True):
        for output, right in zip(outputs, expected, strict=True):
            assert (output.token_ids, output.finish_reason) == (right.token_ids, right.finish_reason), request
            assert output.logprobs is not None and right.logprobs is not None
            for column in ("chosen", "top_values"):
                values = np.array(getattr(output.logprobs, column)), np.array(getattr(right.logprobs, column))
                np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-5, err_msg=str(request))
    assert (load.preemptions > 0) == way.preempts
    assert (load.prefix_cache_hits > 0) == way.hits
    assert (load.accepted_tokens > 0) == way.speculates


def test_the_requests_are_not_vacuous(requests, alone) -> None:
    assert sum(len(output.token_ids) for outputs in alone for output in outputs) > 600
    assert len({name for request in requests for name in request}) > 25
    logprobs = np.array([value for outputs in alone for output in outputs for value in output.logprobs.chosen])
    assert (logprobs < -0.01).mean() > 0.5
