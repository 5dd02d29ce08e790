"""The grid of beam searches through a real server, all in flight together: transformers' sequences and scores."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from chaos.server_under_test import ServerUnderTest
from octavo.client import AsyncClient
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.types import FinishReason
from parity.beams import EOS, VOCAB_SIZE, beam_cases, differences, save_tiny_model, transformers_beams
from parity.cases import Answer, Case, client_keywords


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer of single characters."""
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path)
    characters = [*map(chr, range(33, 127)), "Ġ", "Ċ", "<|endoftext|>"]
    assert len(characters) == VOCAB_SIZE and characters[EOS] == "<|endoftext|>"
    (path / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(characters)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    return path


async def served(address: str, cases: list[Case]) -> tuple[list[Answer], int]:
    """Half of the cases as calls of their own, half over one session; and how often sequences were preempted."""
    async with AsyncClient(address) as client, client.multiplex() as session:
        calls = [
            (client if i % 2 else session).generate_all(case.prompt, **client_keywords(case))
            for i, case in enumerate(cases)
        ]
        responses = await asyncio.gather(*calls)
        preemptions = (await client.load()).preemptions
    answers = []
    for response in responses:
        (outputs,) = response.outputs
        answers.append(
            Answer(
                [output.token_ids for output in outputs],
                [FinishReason[output.finish_reason.name] for output in outputs],
                [output.sequence_score for output in outputs],
            )
        )
    return answers, preemptions


def test_searches_in_flight_together_find_what_transformers_finds_alone(path: Path):
    config = EngineConfig(
        model=ModelConfig(path=str(path), name="tiny", device="cpu", dtype="float32", num_threads=1),
        cache=CacheConfig(block_size=16, num_blocks=32),
        scheduler=SchedulerConfig(max_num_requests=48, max_chunk_tokens=16),
    )
    server = ServerUnderTest(config)
    try:
        cases = beam_cases(seed=2)
        expected = transformers_beams(path, cases)  # while the server starts
        server.wait_until_ready()
        answers, preemptions = asyncio.run(served(server.address, cases))
    finally:
        server.close()
    wrong = [
        f"{case}: {problem}"
        for case, found, right in zip(cases, answers, expected, strict=True)
        for problem in differences(case, found, right)
    ]
    assert wrong == [], f"{len(wrong)} differences, first: {wrong[0]}"
    assert preemptions > 0
