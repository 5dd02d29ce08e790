"""guidance_scale and negative_prompt through octavo.LLM, preempted and not: the tokens of generate() on each alone."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.checkpoint import resolve
from octavo.llm import LLM
from parity.cases import random_cases

NUM_CASES = 36


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve("demo")


@pytest.fixture(scope="module")
def requests(path: Path) -> list[dict[str, Any]]:
    rng = random.Random(9)
    made = []
    for i, case in enumerate(random_cases(path, NUM_CASES, seed=9)):
        request: dict[str, Any] = {
            "prompt": case.prompt,
            "seed": case.seed,
            "max_new_tokens": case.max_new_tokens,
            "num_return_sequences": case.num_sequences,
            "do_sample": case.params["do_sample"],
        }
        if case.params["do_sample"]:
            request.update(top_k=case.params["top_k"], temperature=case.params.get("temperature", 1.0))
        if i % 4:
            request["guidance_scale"] = rng.choice([1.5, 0.4, 3, -1.0])
            if rng.random() < 0.7:
                length = rng.choice([1, 5, 40])
                request["negative_prompt_ids"] = [rng.randrange(4000) for _ in range(length)]
        if rng.random() < 0.3:
            request.update(repetition_penalty=1.3)
        made.append(request)
    return made


def transformers_tokens(model: Any, request: dict[str, Any]) -> list[list[int]]:
    kwargs = {name: value for name, value in request.items() if name not in ("prompt", "seed", "negative_prompt_ids")}
    prompt, n = torch.tensor([request["prompt"]]), request["num_return_sequences"]
    if "negative_prompt_ids" in request:
        kwargs["negative_prompt_ids"] = torch.tensor([request["negative_prompt_ids"]]).expand(n, -1)
    torch.manual_seed(request["seed"])
    rows = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **kwargs)
    found = rows[:, prompt.shape[1] :].tolist()
    return [row[: row.index(4095) + 1] if 4095 in row else row for row in found]


@pytest.fixture(scope="module")
def expected(path: Path, requests) -> list[list[list[int]]]:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [transformers_tokens(model, request) for request in requests]


@pytest.mark.parametrize(
    ("num_blocks", "chunk", "depth"), [(0, 0, 1), (27, 7, 1), (24, 0, 0)], ids=["all fit", "chunks, few blocks", "few"]
)
def test_every_token_of_guided_requests_equals_transformers_alone(
    requests, expected, num_blocks: int, chunk: int, depth: int
):
    options = {"max_model_len": 145, "max_num_requests": 16, "block_size": 16, "device": "cpu", "dtype": "float32"}
    with LLM("demo", num_blocks=num_blocks, max_chunk_tokens=chunk, pipeline_depth=depth, **options) as llm:
        results = llm.generate_each(requests)
        llm.core.scheduler.check()
        preemptions = llm.core.scheduler.load(time.monotonic()).preemptions
    for request, result, tokens in zip(requests, results, expected, strict=True):
        outputs = result if isinstance(result, list) else [result]
        assert [output.token_ids for output in outputs] == tokens, request
    assert (preemptions > 0) == (num_blocks > 0)


def test_a_negative_prompt_may_be_a_text_and_is_tokenized_like_the_prompt():
    with LLM("demo", device="cpu", dtype="float32") as llm:
        tokenizer = llm._model.tokenizer
        ask = {"guidance_scale": 2.0, "max_new_tokens": 6}
        as_text = llm.generate("It was the", negative_prompt="the worst of", bad_words=["king"], **ask)
        as_ids = llm.generate(
            "It was the", negative_prompt_ids=tokenizer.encode(["the worst of"])[0], bad_words=["king"], **ask
        )
        default = llm.generate("It was the", bad_words=["king"], **ask)
    assert as_text.token_ids == as_ids.token_ids != default.token_ids
