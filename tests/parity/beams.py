"""Beam searches over generate()'s keywords, and what transformers finds for each when run alone."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from octavo.types import EarlyStopping, ExponentialDecay, FinishReason, SequenceBias
from parity.cases import Answer, Case

VOCAB_SIZE, EOS, SECOND_EOS = 97, 96, 5
EARLY_STOPPING = {False: EarlyStopping.FALSE, True: EarlyStopping.TRUE, "never": EarlyStopping.NEVER}
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9}
GREEDY = {"do_sample": False, "top_k": 50}


def save_tiny_model(path: Path) -> None:
    """A two-layer GPT-2 with random weights and logits far apart."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=48, n_head=4, vocab_size=VOCAB_SIZE, n_positions=96, bos_token_id=EOS, eos_token_id=EOS
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(4.0)
    model.save_pretrained(path)


def beam_cases(seed: int) -> list[Case]:
    """The grid of generation.md's reference, then wide searches, several ends, and every kind of processor."""
    rng = random.Random(seed)
    return [*_grid(rng), *_ends(rng), *_pipelines(rng)]


def _grid(rng: random.Random) -> Iterator[Case]:
    constraints: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 4, "bad_words_ids": [[5], [6, 7]]},
    ]
    stopping = [(penalty, early) for penalty in (-1.0, 0.0, 1.0, 2.0) for early in EARLY_STOPPING]
    for (penalty, early), sampling in itertools.product(stopping, (GREEDY, SAMPLED)):
        beams = rng.choice([2, 4])
        params = {"length_penalty": penalty, "early_stopping": early, **sampling, **rng.choice(constraints)}
        yield _case(rng, beams, rng.choice([1, beams]), params, eos_bias=rng.choice([2.0, 6.0]))
    for beams in (2, 3, 5, 6, 7, 8):
        yield _case(rng, beams, rng.randint(1, beams), dict(SAMPLED), eos_bias=4.0)


def _ends(rng: random.Random) -> Iterator[Case]:
    for early, sampling in itertools.product(EARLY_STOPPING, (GREEDY, SAMPLED)):
        yield _case(rng, 8, 3, {"early_stopping": early, **sampling}, eos_bias=4.0)
        ends = {"eos": (EOS, SECOND_EOS)} if early else {"stop": (SECOND_EOS,)}
        yield _case(rng, 3, 2, {"length_penalty": 0.7, "early_stopping": early, **sampling}, eos_bias=3.0, **ends)
        yield _case(rng, 4, 4, {"early_stopping": early, **sampling}, eos_bias=0.0, eos=())


def _pipelines(rng: random.Random) -> Iterator[Case]:
    warpers: list[dict[str, Any]] = [
        {"top_k": 2},  # fewer than min_tokens_to_keep of a search with two ends
        {"top_p": 0.01},
        {"min_p": 0.9},
        {"typical_p": 0.05},
        {"typical_p": 0.9, "min_p": 0.02},
        {"epsilon_cutoff": 0.3},
        {"eta_cutoff": 0.3},
        {"top_h": 0.3},
        {"temperature": 0.4, "renormalize_logits": True},
    ]
    for warper in warpers:
        ends = rng.choice([(EOS,), (EOS, SECOND_EOS)])
        yield _case(rng, rng.choice([2, 4]), 2, {"do_sample": True, "top_k": 0, **warper}, eos_bias=3.0, eos=ends)
    processors: list[dict[str, Any]] = [
        {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2},
        {"forced_eos_token_id": [EOS], "suppress_tokens": [1, 2, 3]},
        {"begin_suppress_tokens": list(range(40)), "remove_invalid_values": True},
        {"exponential_decay_length_penalty": ExponentialDecay(2, 1.2)},
        {"renormalize_logits": True, "repetition_penalty": 0.7},
    ]
    for processor, sampling in itertools.product(processors, (GREEDY, SAMPLED)):
        yield _case(rng, 3, 3, {**sampling, **processor}, eos_bias=2.0)


def _case(
    rng: random.Random,
    beams: int,
    num_sequences: int,
    params: dict[str, Any],
    *,
    eos_bias: float,
    eos: tuple[int, ...] = (EOS,),
    stop: tuple[int, ...] = (),
) -> Case:
    length = rng.choice([1, 2, 6, 15, 16, 17, 32, rng.randint(3, 60)])
    common = [(7 * i) % EOS for i in range(length)]
    split = rng.choice([0, length])
    return Case(
        prompt=[*common[:split], *(rng.randrange(EOS) for _ in range(length - split))],
        seed=rng.randrange(2**63),
        num_sequences=num_sequences,
        max_new_tokens=rng.choice([1, 5, 12, 20]),
        params={"num_beams": beams, "sequence_bias": {(EOS,): eos_bias}, **params},
        eos=eos,
        stop=stop,
    )


def engine_params(params: dict[str, Any]) -> dict[str, Any]:
    """A case's keywords as fields of GenerationParams."""
    fields = dict(params)
    fields["sequence_bias"] = [SequenceBias(list(key), bias) for key, bias in params["sequence_bias"].items()]
    fields["early_stopping"] = EARLY_STOPPING[params.get("early_stopping", False)]
    return fields


def transformers_beams(path: Path, cases: list[Case]) -> list[Answer]:
    """generate() on each case alone; sequences as it returns them, padded with EOS."""
    return [answer_of(case, found) for case, found in zip(cases, transformers_searches(path, cases), strict=True)]


def answer_of(case: Case, found: Any) -> Answer:
    """What transformers found."""
    return Answer(found.sequences[:, len(case.prompt) :].tolist(), scores=found.sequences_scores.tolist())


def transformers_searches(path: Path, cases: list[Case]) -> list[Any]:
    """What generate() in fp32 returns for each case alone, seeded anew each time, with scores and logits."""
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [_search(model, case) for case in cases]


@torch.inference_mode()
def _search(model: Any, case: Case) -> Any:
    kwargs = dict(case.params)
    if not kwargs["do_sample"]:
        del kwargs["top_k"]
    if decay := kwargs.get("exponential_decay_length_penalty"):
        kwargs["exponential_decay_length_penalty"] = (decay.start_index, decay.factor)
    prompt = torch.tensor([case.prompt])
    torch.manual_seed(case.seed)
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=case.max_new_tokens,
        num_return_sequences=case.num_sequences,
        eos_token_id=list(case.eos + case.stop) or None,
        pad_token_id=EOS,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **kwargs,
    )


def differences(case: Case, found: Answer, expected: Answer) -> list[str]:
    """What is wrong with an engine's answer."""
    wrong = []
    width = len(expected.token_ids[0])
    if [(ids + [EOS] * width)[:width] for ids in found.token_ids] != expected.token_ids:
        wrong.append(f"tokens {found.token_ids}, not {expected.token_ids}")
    if any(abs(a - b) > 1e-4 * max(1.0, abs(b)) for a, b in zip(found.scores, expected.scores, strict=True)):
        wrong.append(f"scores {found.scores}, not {expected.scores}")
    for ids, reason in zip(found.token_ids, found.finish, strict=True):
        last = ids[-1] if ids else None
        right = (
            FinishReason.EOS
            if last in case.eos
            else FinishReason.STOP_TOKEN
            if last in case.stop
            else FinishReason.LENGTH
        )
        if reason is not right:
            wrong.append(f"finish {reason} of {ids}")
        if reason is FinishReason.LENGTH and len(ids) not in (0, case.max_new_tokens):
            wrong.append(f"{len(ids)} tokens end by length, not {case.max_new_tokens}")
    return wrong
