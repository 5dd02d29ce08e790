"""Prompts with mixes of parameters, and what transformers' generate() makes of each when run alone."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from octavo.types import ExponentialDecay, FinishReason, SequenceBias

TEXT = """I met a traveller from an antique land, Who said "Two vast and trunkless legs of stone
Stand in the desert. Near them, on the sand, Half sunk a shattered visage lies, whose frown,
And wrinkled lip, and sneer of cold command, Tell that its sculptor well those passions read
Which yet survive, stamped on these lifeless things, The hand that mocked them, and the heart that fed;
And on the pedestal, these words appear: My name is Ozymandias, King of Kings; Look on my Works, ye Mighty, and despair!
Nothing beside remains. Round the decay Of that colossal Wreck, boundless and bare
The lone and level sands stretch far away."

It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it was the
epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness, it was the
spring of hope, it was the winter of despair, we had everything before us, we had nothing before us, we were all going
direct to Heaven, we were all going direct the other way.

Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and nothing
particular to interest me on shore, I thought I would sail about a little and see the watery part of the world.

Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice
she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what is the use
of a book," thought Alice, "without pictures or conversations?"
"""


COMMON = [11, 13, 198, 259, 270]
"""Tokens of the bundled model that occur often: comma, full stop, newline, " the", " and"."""


@dataclass(frozen=True)
class Case:
    """One prompt and its sequences, by generate()'s names."""

    prompt: list[int]
    seed: int
    num_sequences: int
    max_new_tokens: int
    params: dict[str, Any]
    """As GenerationParams takes them. transformers gets `logit_bias` as single-token sequence_bias and
    `allowed_token_ids` as a prefix_allowed_tokens_fn."""
    eos: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    negative: tuple[int, ...] = ()
    """The negative prompt of a guided case, for the engine only."""


@dataclass
class Answer:
    """The sequences of one case."""

    token_ids: list[list[int]] = field(default_factory=list)
    finish: list[FinishReason] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """Of the sequences of a beam search."""


def random_cases(path: Path, count: int, seed: int, *, every_parameter: bool = False) -> list[Case]:
    """`count` cases over the checkpoint's own tokenizer; many share a prefix. Half of them use the processors and
    warpers that are rare in practice, if `every_parameter`."""
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(path / "tokenizer.json")).encode(TEXT).ids
    rng = random.Random(seed)
    cases = [_random_case(rng, text, eos=4095) for _ in range(count)]
    if every_parameter:
        return [_with_rare_parameters(rng, case, text) if rng.random() < 0.6 else case for case in cases]
    return cases


def _with_rare_parameters(rng: random.Random, case: Case, text: list[int]) -> Case:
    params, prompt = dict(case.params), case.prompt
    ends = {*case.eos, *case.stop}
    others = [token for token in [*text[:300], *COMMON] if token not in ends]

    def some(count: int) -> list[int]:
        return [rng.choice(others) for _ in range(count)]

    def sometimes(probability: float, name: str, *choices: object) -> None:
        if rng.random() < probability:
            params[name] = rng.choice(choices)

    if params["do_sample"]:
        sometimes(0.3, "top_h", 0.3, 0.7)
        sometimes(0.3, "epsilon_cutoff", 3e-4, 0.02)
        sometimes(0.3, "eta_cutoff", 3e-4, 0.02)
    sometimes(0.3, "encoder_repetition_penalty", 0.8, 1.4)
    sometimes(0.3, "no_repeat_ngram_size", 1, 2, 3)
    sometimes(0.2, "encoder_no_repeat_ngram_size", 1, 2, 4)
    pair = rng.randrange(len(text) - 1)
    if "logit_bias" not in params:
        singles = [SequenceBias([token], rng.uniform(-3, 3)) for token in [*some(3), *ends]]
        longer = [SequenceBias([prompt[-1], rng.choice(COMMON)], 3.0), SequenceBias(text[pair : pair + 2], -8.0)]
        sometimes(0.4, "sequence_bias", singles, [*longer, *singles], [*singles, *longer, SequenceBias(some(3), 2.0)])
    sometimes(
        0.3, "bad_words_ids", [[token] for token in some(6)], [text[pair : pair + 2], [prompt[-1], *some(1)], some(1)]
    )
    sometimes(0.3, "suppress_tokens", some(8), [])
    sometimes(0.2, "begin_suppress_tokens", [*some(8), text[pair]])
    if params.get("no_repeat_ngram_size") != 1:  # which in time bans all of a short list: a row of equal scores
        sometimes(0.15, "allowed_token_ids", sorted({*text[:400], *COMMON, *ends}))
    sometimes(0.7 if len(prompt) == 1 else 0.1, "forced_bos_token_id", rng.choice(others))
    if params.get("forced_bos_token_id") in params.get("suppress_tokens", []):
        del params["suppress_tokens"]
    cuts_ties = params.keys() & {"top_h", "top_p", "typical_p"}  # transformers, not octavo: of tokens equal by force
    sometimes(0.3, "forced_eos_token_id", [4095] if cuts_ties else list(case.eos or (4095,)))
    sometimes(0.15, "remove_invalid_values", True)
    if ends and "remove_invalid_values" not in params:  # a ban made finite would grow beyond all others
        sometimes(0.3, "exponential_decay_length_penalty", ExponentialDecay(0, 1.3), ExponentialDecay(4, 1.1))
    sometimes(0.2, "renormalize_logits", True)
    return replace(case, params=params)


def _random_case(rng: random.Random, text: list[int], eos: int) -> Case:
    length = rng.choice([1, 2, rng.randint(3, 30), rng.randint(3, 30), rng.randint(30, 70), rng.randint(70, 120)])
    start = 0 if rng.random() < 0.4 else rng.randrange(len(text) - length)
    prompt = text[start : start + length]
    if rng.random() < 0.05:
        prompt = [eos, *prompt]
    params: dict[str, Any] = {"do_sample": rng.random() < 0.6, "top_k": 50}

    def sometimes(probability: float, name: str, *choices: object) -> None:
        if rng.random() < probability:
            params[name] = rng.choice(choices)

    if params["do_sample"]:
        params["top_k"] = rng.choice([0, 5, 50, 50, 200, 2000])
        sometimes(0.5, "temperature", 0.7, 1.3)
        sometimes(0.4, "top_p", 0.5, 0.9, 0.95)
        sometimes(0.25, "min_p", 0.05, 0.2)
        sometimes(0.25, "typical_p", 0.2, 0.9)
    sometimes(0.3, "repetition_penalty", 0.8, 1.3)
    sometimes(0.2, "logit_bias", {11: 2.5, 13: -3.0}, {text[7]: 4.0, eos: 6.0})
    stop = (rng.choice([*COMMON, text[3], text[9]]),) if rng.random() < 0.4 else ()
    sometimes(0.3, "min_new_tokens", 2, 6)
    if "min_new_tokens" not in params:
        sometimes(0.2, "min_length", len(prompt) + 3)
    return Case(
        prompt=prompt,
        seed=rng.randrange(2**63),
        num_sequences=rng.choice([1, 1, 1, 2, 3, 4]) if params["do_sample"] else 1,
        max_new_tokens=rng.choice([1, 6, 10, 14, 20]),
        params=params,
        eos=rng.choice([(eos,), (eos, rng.choice(COMMON)), (rng.choice(COMMON),), ()]),
        stop=stop,
    )


def transformers_answers(path: Path, cases: list[Case], device: str = "cpu") -> list[Answer]:
    """generate() in fp32 on each case alone, seeded anew each time."""
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval().to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [transformers_answer(model, case) for case in cases]


def transformers_names(params: dict[str, Any]) -> dict[str, Any]:
    """The same parameters as generate() takes them."""
    kwargs = dict(params)
    biases = {tuple(entry.token_ids): entry.bias for entry in kwargs.pop("sequence_bias", [])}
    biases |= {(token,): bias for token, bias in kwargs.pop("logit_bias", {}).items()}
    if biases:
        kwargs["sequence_bias"] = biases
    if (decay := kwargs.get("exponential_decay_length_penalty")) is not None:
        kwargs["exponential_decay_length_penalty"] = (decay.start_index, decay.factor)
    if (allowed := kwargs.pop("allowed_token_ids", None)) is not None:
        kwargs["prefix_allowed_tokens_fn"] = lambda batch, history: allowed
    if not kwargs.get("do_sample"):
        kwargs.pop("top_k", None)
    return kwargs


@torch.inference_mode()
def transformers_answer(model: Any, case: Case) -> Answer:
    kwargs = transformers_names(case.params)
    ends = list(case.eos + case.stop)
    prompt = torch.tensor([case.prompt], device=model.device)
    torch.manual_seed(case.seed)
    rows = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=case.max_new_tokens,
        num_return_sequences=case.num_sequences,
        eos_token_id=ends or None,
        pad_token_id=0,
        **kwargs,
    )
    answer = Answer()
    for row in rows[:, len(case.prompt) :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        answer.token_ids.append(row[: end + 1])
        if row[end] in case.eos:
            answer.finish.append(FinishReason.EOS)
        else:
            answer.finish.append(FinishReason.STOP_TOKEN if row[end] in case.stop else FinishReason.LENGTH)
    return answer
