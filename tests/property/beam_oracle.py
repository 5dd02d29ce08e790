"""Beam searches of the fake model: their choices are a function of the rows' tags, so that any mistake in a row's
tokens, parents or cache changes all that follows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from octavo.types import FinishReason
from property.oracle import TagChain, finish_of, mix, next_token


@dataclass(frozen=True)
class Choice:
    """Of one step."""

    parents: list[int]
    tokens: list[int]
    finish: FinishReason
    """Why the search ends here, if it does."""


def choose(
    tags: list[int], seed: int, total: int, max_total: int, eos: tuple[int, ...], stop: tuple[int, ...]
) -> Choice:
    """What follows rows whose last positions have these tags; then they have `total` tokens."""
    beams = range(len(tags))
    state = 0
    for tag in tags:
        state = mix(state ^ tag)
    parents = [mix(state + i) % len(tags) for i in beams]
    tokens = [next_token(tags[parent], seed, i) for i, parent in enumerate(parents)]
    return Choice(parents, tokens, finish_of(tokens[0], total, max_total, eos, stop))


@dataclass(frozen=True)
class BeamAnswer:
    """A search from its beginning to its end."""

    outputs: list[list[list[int]]]
    """[steps][beams] each beam's output after each step."""
    finish: FinishReason


def beam_answer(
    prompt: list[int],
    *,
    domain: int,
    seed: int,
    num_beams: int,
    max_total_tokens: int,
    eos: tuple[int, ...],
    stop: tuple[int, ...],
) -> BeamAnswer:
    chain = TagChain(domain)
    for token_id in prompt:
        chain.append(token_id)
    chains = [copy.deepcopy(chain) for _ in range(num_beams)]
    outputs: list[list[int]] = [[] for _ in range(num_beams)]
    steps = []
    while True:
        total = len(prompt) + len(steps) + 1
        choice = choose([chain.tags[-1] for chain in chains], seed, total, max_total_tokens, eos, stop)
        outputs = [[*outputs[p], token] for p, token in zip(choice.parents, choice.tokens, strict=True)]
        steps.append(outputs)
        if choice.finish:
            return BeamAnswer(steps, choice.finish)
        chains = [copy.deepcopy(chains[parent]) for parent in choice.parents]
        for chain, token in zip(chains, choice.tokens, strict=True):
            chain.append(token)
