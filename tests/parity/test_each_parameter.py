"""Each parameter of generate() alone, by generate()'s own keywords, from the Python call down to the tokens.

All requests run in one batch of one engine; transformers runs each alone with the same seed. Every setting changes the
tokens of at least one prompt, so that a parameter which is accepted and ignored fails.
"""

from __future__ import annotations

import ast
import functools
import json
import warnings
from typing import Any

import pytest
import torch
from octavo.checkpoint import resolve
from octavo.llm import LLM
from parity.cases import COMMON, TEXT

Settings = dict[str, Any]
EOS = 4095
SEED = 7
SAMPLED = {"do_sample": True, "top_k": 0}
BEAMS = {"num_beams": 3}
LONG = {"max_new_tokens": 16}

PARAMETERS: dict[str, list[Settings]] = {
    "max_new_tokens": [{"max_new_tokens": 3}, {"max_new_tokens": 40}],
    "max_length": [{"max_length": 45}, {"max_length": 70}],
    "min_new_tokens": [{"eos_token_id": COMMON, "min_new_tokens": 9}],
    "min_length": [{"eos_token_id": COMMON, "min_length": 43}],
    "eos_token_id": [
        {"eos_token_id": 11},
        {"eos_token_id": COMMON},
        {"eos_token_id": None, "sequence_bias": {(EOS,): 20.0}},
    ],
    "stop_strings": [{"stop_strings": [" the", ","]}, {"stop_strings": "e"}],
    "max_time": [{"max_time": 0}],
    "do_sample": [{"do_sample": True}],
    "temperature": [{**SAMPLED, "temperature": 0.5}, {**SAMPLED, "temperature": 2}],
    "top_k": [{**SAMPLED, "top_k": 3}, {**SAMPLED, "top_k": 1}],
    "top_p": [{**SAMPLED, "top_p": 0.5}, {**SAMPLED, "top_p": 0}],
    "min_p": [{**SAMPLED, "min_p": 0.3}],
    "typical_p": [{**SAMPLED, "typical_p": 0.3}],
    "top_h": [{**SAMPLED, "top_h": 0.3}],
    "epsilon_cutoff": [{**SAMPLED, "epsilon_cutoff": 0.05}],
    "eta_cutoff": [{**SAMPLED, "eta_cutoff": 0.1}],
    "num_return_sequences": [{**SAMPLED, "num_return_sequences": 3}],
    "num_beams": [{**BEAMS, "num_return_sequences": 2}, {**SAMPLED, **BEAMS}],
    "length_penalty": [{**BEAMS, "eos_token_id": COMMON, "length_penalty": -2.0}],
    "early_stopping": [{"num_beams": 2, "eos_token_id": COMMON, "early_stopping": stop} for stop in (True, "never")],
    "repetition_penalty": [{"repetition_penalty": 1.4}, {"repetition_penalty": 0.7}],
    "encoder_repetition_penalty": [{"encoder_repetition_penalty": 1.6}],
    "no_repeat_ngram_size": [{"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2, "max_new_tokens": 40}],
    "encoder_no_repeat_ngram_size": [{"encoder_no_repeat_ngram_size": 1}],
    "sequence_bias": [
        {"sequence_bias": {(11,): -5.0, (259,): 3.0}},
        {"sequence_bias": [[[259, 344], 8.0], [[11, 198], 9.0], [[344], -2.0]]},
    ],
    "bad_words_ids": [{"bad_words_ids": [[11], [259]]}, {"bad_words_ids": [[11, 198], [259, 344], [13]]}],
    "suppress_tokens": [{"suppress_tokens": [11, 198, 259, 13]}],
    "begin_suppress_tokens": [{"begin_suppress_tokens": [11, 341, 66]}],
    "forced_bos_token_id": [{"forced_bos_token_id": 270}],
    "forced_eos_token_id": [{"forced_eos_token_id": EOS}, {**SAMPLED, "forced_eos_token_id": [EOS, 198]}],
    "exponential_decay_length_penalty": [{"exponential_decay_length_penalty": (2, 1.6)}],
    "remove_invalid_values": [{"remove_invalid_values": True, "suppress_tokens": [11, 198]}],
    "renormalize_logits": [{"renormalize_logits": True, **BEAMS, "repetition_penalty": 1.3}],
    "guidance_scale": [{"guidance_scale": 1.6}],
    "prompt_lookup_num_tokens": [{"prompt_lookup_num_tokens": 4, "max_new_tokens": 30}],
    "max_matching_ngram_size": [{"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3, "max_new_tokens": 30}],
    "watermarking_config": [
        {"watermarking_config": {"bias": 5.0, "greenlist_ratio": 0.3}},
        {**SAMPLED, "watermarking_config": {"ngram_len": 3, "keys": [654, 400, 836]}},
    ],
}
"""Field of GenerationConfig -> keywords in which it matters."""
UNCHANGED = frozenset(
    {"remove_invalid_values", "renormalize_logits", "prompt_lookup_num_tokens", "max_matching_ngram_size"}
)
"""Fields that by their meaning do not change which token is chosen here."""
CASES = [(name, index) for name, settings in PARAMETERS.items() for index, keywords in enumerate(settings)]


@functools.cache
def prompts() -> list[list[int]]:
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(resolve("demo") / "tokenizer.json")).encode(TEXT).ids
    return [text[:40], text[300:301], text[100:106]]


def keywords_of(name: str, index: int) -> Settings:
    keywords = PARAMETERS[name][index]
    return keywords if keywords.keys() & {"max_length", "max_new_tokens"} else {**LONG, **keywords}


def longest(keywords: Settings, prompt: list[int]) -> Settings:
    """A minimum or maximum of the total is moved along with the prompt, which the first one has 40 tokens."""
    moved = {key: keywords[key] - 40 + len(prompt) for key in ("min_length", "max_length") if key in keywords}
    return keywords | moved


@pytest.fixture(scope="module")
def ours() -> dict[tuple[str, int], list[list[list[int]]]]:
    """Case -> for each prompt, the tokens of its sequences."""
    requests = [
        {"prompt": prompt, "seed": SEED, **longest(keywords_of(*case), prompt)}
        for case in CASES
        for prompt in prompts()
    ]
    with LLM("demo", dtype="float32", block_size=16, max_num_requests=48) as llm:
        results = llm.generate_each(requests)
    tokens = [[out.token_ids for out in (result if isinstance(result, list) else [result])] for result in results]
    count = len(prompts())
    return {case: tokens[i * count : (i + 1) * count] for i, case in enumerate(CASES)}


@functools.cache
def model() -> Any:
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    return GPT2LMHeadModel.from_pretrained(resolve("demo"), dtype=torch.float32).eval()


@functools.cache
def tokenizer() -> Any:
    from transformers import GPT2Tokenizer

    return GPT2Tokenizer.from_pretrained(str(resolve("demo")))


def watermark(settings: dict[str, Any]) -> Any:
    from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig

    return (SynthIDTextWatermarkingConfig if "ngram_len" in settings else WatermarkingConfig)(**settings)


def generate(prompt: list[int], settings: Settings) -> Any:
    row = torch.tensor([prompt])
    torch.manual_seed(SEED)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        return model().generate(
            row,
            attention_mask=torch.ones_like(row),
            pad_token_id=EOS,
            return_dict_in_generate="output_scores" in settings,
            **settings,
        )


@functools.cache
def theirs(keywords: str, prompt: tuple[int, ...]) -> list[list[int]]:
    """generate() alone, seeded; `keywords` as repr."""
    settings = ast.literal_eval(keywords)
    ends = settings.get("eos_token_id", EOS)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    if settings.get("temperature"):
        settings["temperature"] = float(settings["temperature"])
    if "watermarking_config" in settings:
        settings["watermarking_config"] = watermark(settings["watermarking_config"])
    if "stop_strings" in settings:
        settings["tokenizer"] = tokenizer()
    rows = generate(list(prompt), settings)
    found = []
    for ids in rows[:, len(prompt) :].tolist():
        end = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
        found.append(ids[: end + 1])
    return found


@pytest.mark.parametrize(("name", "index"), CASES, ids=[f"{name}-{index}" for name, index in CASES])
def test_parameter_alone_gives_the_tokens_of_generate(name: str, index: int, ours) -> None:
    keywords = keywords_of(name, index)
    expected = [theirs(repr(longest(keywords, prompt)), tuple(prompt)) for prompt in prompts()]
    assert ours[name, index] == expected, json.dumps(keywords, default=str)
    if name not in UNCHANGED:
        without = {key: value for key, value in keywords.items() if key != name} or LONG
        without = without if without.keys() & {"max_length", "max_new_tokens"} else LONG | without
        if name in ("num_beams", "do_sample"):
            without = LONG
        plain = [theirs(repr(longest(without, prompt)), tuple(prompt)) for prompt in prompts()]
        assert expected != plain, "the setting has no effect on any of the prompts"


ALIKE: dict[str, tuple[Settings, Settings]] = {
    "stop_token_ids": ({"stop_token_ids": [11, 13]}, {"eos_token_id": [EOS, 11, 13]}),
    "ignore_eos": ({"ignore_eos": True, "logit_bias": {EOS: 20}}, PARAMETERS["eos_token_id"][2]),
    "logit_bias": ({"logit_bias": {11: -5, 259: 3.5}}, {"sequence_bias": {(11,): -5.0, (259,): 3.5}}),
    "bad_words": ({"bad_words": ["the", ","]}, {}),
    "allowed_token_ids": ({"allowed_token_ids": [11, 13, 259, 270, 341]}, {}),
}
"""Parameter that generate() does not have -> keywords with it, and what makes generate() do the same."""


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", dtype="float32", block_size=16) as llm:
        yield llm


@pytest.mark.parametrize("name", ALIKE)
def test_extension_gives_the_tokens_of_generate_by_other_means(name: str, llm: LLM) -> None:
    own, other = ALIKE[name]
    if name == "bad_words":
        words = [text for word in own["bad_words"] for text in (word, " " + word)]
        other = {"bad_words_ids": [tokenizer()(text).input_ids for text in words]}
    for prompt in prompts():
        if name == "allowed_token_ids":
            rows = generate(prompt, LONG | {"prefix_allowed_tokens_fn": lambda batch, ids: own[name]})
            expected = [rows[0, len(prompt) :].tolist()]
        else:
            expected = theirs(repr(LONG | other), tuple(prompt))
        assert llm.generate(prompt, **LONG, **own).token_ids == expected[0]


def test_empty_prompt_starts_from_bos_as_in_generate(llm: LLM) -> None:
    for bos in (11, 259):
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            row = model().generate(bos_token_id=bos, pad_token_id=EOS, **LONG)[0]
        assert llm.generate("", bos_token_id=bos, **LONG).token_ids == row[1:].tolist()


VALUES = {"repetition_penalty": 1.3, "do_sample": True, "top_k": 30, "temperature": 0.8}


def test_values_of_chosen_tokens_are_those_of_generate(llm: LLM) -> None:
    for prompt in prompts():
        found = generate(prompt, LONG | VALUES | dict.fromkeys(("output_scores", "output_logits"), True))
        logits, scores = torch.cat(found.logits), torch.cat(found.scores)
        transitions = model().compute_transition_scores(found.sequences, found.scores, normalize_logits=True)[0]
        token_ids = found.sequences[0, len(prompt) :]
        chosen = torch.arange(len(token_ids)), token_ids
        expected = {
            "output_logits": logits[chosen],
            "output_scores": scores[chosen],
            "raw_logprob": logits.log_softmax(-1)[chosen],
            "processed_logprob": transitions,
        }
        for name, values in expected.items():
            asked = {name: True} if name.startswith("output") else {"logprobs": 2, "logprob_kind": name}
            out = llm.generate(prompt, seed=SEED, **LONG, **VALUES, **asked)
            assert out.token_ids == token_ids.tolist()
            close = {
                "rtol": 2e-6,
                "atol": 3e-5 if "output" in name else 1e-5,
            }  # both are 9e-6 from fp64, see test_logprobs
            torch.testing.assert_close(torch.tensor(out.logprobs.chosen), values, **close)
