"""Token healing plans what transformers' heal_tokens does."""

from __future__ import annotations

import asyncio
import random
import types

import numpy as np
import pytest
import torch
from frontend.fakes import FakeCore, demo, engine_info, reference_tokenizer, request
from octavo.config import Limits, ServerConfig
from octavo.errors import Reason, RequestError
from octavo.frontend.async_engine import AsyncEngine
from octavo.frontend.healing import HealingPlan, TokenHealer
from octavo.types import FinishReason, PromptOptions
from parity.cases import TEXT

V = 4096


def transformers_plan(tokenizer, token_ids: list[int], monkeypatch) -> tuple[list[int], dict[int, float] | None]:
    """The retokenized prompt, and the biases that heal_tokens gives to generate() if it calls it."""
    from transformers.generation.utils import GenerationMixin

    called: list[dict[int, float]] = []

    def generate(ids, generation_config):
        called.append({key[0]: bias for key, bias in generation_config.sequence_bias.items()})
        return torch.cat([ids, torch.tensor([[V + 7]])], dim=1)

    model = types.SimpleNamespace(generate=generate)
    healed = GenerationMixin.heal_tokens(model, torch.tensor([token_ids]), tokenizer)[0].tolist()
    assert (healed[-1:] == [V + 7]) == bool(called)
    return healed, called[0] if called else None


@pytest.fixture(scope="module")
def padded():
    tokenizer = reference_tokenizer()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def prompts(padded) -> list[list[int]]:
    rng = random.Random(2)
    texts = [
        'The link is <a href="http:',
        "a",
        "  a  ",
        "café",
        "In été",
        "It's",
        "12",
        "x =",
        "end.\n",
        "über<|endoftext|>",
    ]
    for _ in range(150):
        start = rng.randrange(len(TEXT))
        texts.append(TEXT[start : start + rng.randint(1, 60)])
    lists = [padded(text).input_ids for text in texts]
    lists += [[rng.randrange(V) for _ in range(rng.randint(1, 12))] for _ in range(100)]
    return [ids for ids in lists if ids and padded.decode(ids, skip_special_tokens=True).strip()]


def test_plans_are_those_of_transformers(padded, monkeypatch):
    healer = TokenHealer(demo().tokenizer)
    num_healed = 0
    for token_ids in prompts(padded):
        plan = healer.plan(token_ids, PromptOptions())
        try:
            expected, biases = transformers_plan(padded, token_ids, monkeypatch)
        except KeyError:  # transformers finds extensions of another spelling, and not the token itself
            assert plan.candidates == []
            continue
        if biases is None:
            assert plan == HealingPlan(expected, [], plan.text)
        else:
            num_healed += 1
            assert plan.token_ids[:-1] == expected[:-1]
            assert plan.biases == biases
    assert num_healed > 20


def test_blanks_are_left_as_they_are():
    assert TokenHealer(demo().tokenizer).plan([220, 198], PromptOptions()) == HealingPlan([220, 198], [], "")


def test_the_extension_is_what_the_chosen_token_adds():
    tokenizer = demo().tokenizer
    healer = TokenHealer(tokenizer)
    plan = healer.plan(tokenizer.encode(["I met a trav"])[0], PromptOptions())
    assert plan.candidates
    for chosen in plan.candidates:
        extension = healer.extension(plan, plan.healed(chosen))
        assert tokenizer.decode(plan.healed(chosen)) == "I met a trav" + extension
    assert healer.extension(plan, plan.healed(None)) == ""


async def test_a_request_waits_for_its_healed_prompts_and_streams_what_they_add():
    core = FakeCore()
    config = ServerConfig(frontend_processes=1, limits=Limits(max_inflight_requests=2))
    engine = AsyncEngine(demo(), core, config, cache_secret=b"")
    engine.engine_up(engine_info(), restarts=0)
    tokenizer = demo().tokenizer
    plan = TokenHealer(tokenizer).plan(tokenizer.encode(["I met a trav"])[0], PromptOptions())
    submitting = asyncio.ensure_future(
        engine.submit(request("I met a trav ", "x", token_healing=True, do_sample=True), streaming=True)
    )
    async with asyncio.timeout(5):
        while not core.requests:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    (step,) = core.requests  # the other prompt has nothing to choose
    assert np.frombuffer(step.prompt_token_ids, "<i4").tolist() == plan.token_ids[:-1]
    assert step.params.logit_bias == plan.biases
    assert (step.params.do_sample, step.max_total_tokens) == (False, len(plan.token_ids))
    chosen = next(token for token in plan.candidates if token != plan.token_ids[-1])
    core.send((step.key, chosen, FinishReason.LENGTH), started=[step.key])
    handle = await submitting
    healed, other = core.requests[1:]
    assert np.frombuffer(healed.prompt_token_ids, "<i4").tolist() == [*plan.token_ids[:-1], chosen]
    assert np.frombuffer(other.prompt_token_ids, "<i4").tolist() == tokenizer.encode(["x"])[0]
    token = tokenizer.encode([" the"])[0][0]
    core.send((healed.key, token, FinishReason.LENGTH), started=[healed.key])
    update = await handle.next()
    assert update is not None
    assert "I met a trav" + update.deltas[0].text == tokenizer.decode([*plan.token_ids[:-1], chosen, token])
    assert update.deltas[0].token_ids == [token]
    handle.close()
    assert engine.num_inflight == 0
    refused = [await outcome(engine.submit(request("x", "y"), streaming=True)) for _ in range(2)]
    assert refused[0] is None and refused[1] is Reason.QUEUE_FULL, "places are given back once, and only once"


async def outcome(submitting) -> Reason | None:
    try:
        await submitting
    except RequestError as error:
        return error.reason
    return None
