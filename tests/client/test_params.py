"""The mapping from generate()'s keywords to the wire, as tables."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from octavo.client.params import GROUP_OF_FIELD, GROUPS, TOP_LEVEL, build
from octavo.client.tables import ALIASES, NEUTRAL, OFF, REJECTED
from transformers import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig


def sent(prompts: Any = "x", **keywords: Any) -> dict[str, Any]:
    """The request as a dict, without its made-up id and, if it is "x", its prompt."""
    keywords.setdefault("request_id", "r")
    message = MessageToDict(build(prompts, keywords).message, preserving_proto_field_name=True)
    del message["request_id"]
    if message["prompts"] == [{"text": "x"}]:
        del message["prompts"]
    return message


def params(**fields: Any) -> dict[str, Any]:
    return {"params": fields}


MAPPED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"max_new_tokens": 5, "top_p": 0.5, "do_sample": True}, params(max_new_tokens=5, top_p=0.5, do_sample=True)),
    ({"response_length": 64}, params(max_new_tokens=64)),
    ({"max_tokens": 64}, params(max_new_tokens=64)),
    ({"response_length": 64, "max_new_tokens": 64, "max_tokens": 64}, params(max_new_tokens=64)),
    ({"n": 3}, params(num_return_sequences=3)),
    ({"stop": "a"}, params(stop_strings=["a"])),
    ({"stop": ["a", "b"]}, params(stop_strings=["a", "b"])),
    ({"stop_strings": "a", "stop": ["a"]}, params(stop_strings=["a"])),
    ({"stop_sequence": "\n"}, params(stop_strings=["\n"])),
    ({"remove_input": True}, {"output": {"include_prompt": False}}),
    ({"remove_input": False}, {"output": {"include_prompt": True}}),
    ({"return_full_text": True}, {"output": {"include_prompt": True}}),
    ({"return_full_text": True, "remove_input": False}, {"output": {"include_prompt": True}}),
    ({"return_tensors": True}, {"output": {"return_text": False}}),
    ({"skip_special_tokens": False}, {"output": {"skip_special_tokens": False}}),
    ({"handle_long_generation": "hole"}, {"prompt_options": {"truncate_to_fit": True}}),
    ({"prefix": "once "}, {"prompts": [{"text": "once x"}]}),
    ({"output_logits": True}, {"output": {"logprobs": 0, "logprob_kind": "LOGPROB_KIND_RAW_LOGIT"}}),
    ({"output_scores": True}, {"output": {"logprobs": 0, "logprob_kind": "LOGPROB_KIND_PROCESSED_LOGIT"}}),
    (
        {"output_scores": True, "logprobs": 5},
        {"output": {"logprobs": 5, "logprob_kind": "LOGPROB_KIND_PROCESSED_LOGIT"}},
    ),
    ({"output_scores": False, "output_logits": None}, {}),
    (
        {"logprob_kind": "raw_logit", "logprob_token_ids": [1]},
        {"output": {"logprob_kind": "LOGPROB_KIND_RAW_LOGIT", "logprob_token_ids": [1]}},
    ),
    (
        {"stream_max_delay": 0.25, "stream_min_tokens": 4},
        {"output": {"stream_max_delay": "0.250s", "stream_min_tokens": 4}},
    ),
    ({"eos_token_id": 7}, params(eos_token_id={"ids": [7]})),
    ({"eos_token_id": [7, 8]}, params(eos_token_id={"ids": [7, 8]})),
    ({"eos_token_id": None}, params(ignore_eos=True)),
    ({"forced_eos_token_id": 7}, params(forced_eos_token_id={"ids": [7]})),
    ({"suppress_tokens": []}, params(suppress_tokens={})),
    ({"suppress_tokens": None}, params(suppress_tokens={})),
    ({"top_k": None}, params(top_k=0)),
    ({"temperature": None, "top_p": None}, params(temperature=1.0, top_p=1.0)),
    ({"max_new_tokens": None, "seed": None, "stop": None}, {}),
    ({"temperature": 2}, params(temperature=2.0)),
    ({"seed": 0}, params(seed="0")),
    ({"seed": -1}, params(seed=str(2**64 - 1))),
    ({"seed": -(2**63)}, params(seed=str(2**63))),
    ({"seed": 2**64 - 1}, params(seed=str(2**64 - 1))),
    ({"early_stopping": True}, params(early_stopping="EARLY_STOPPING_TRUE")),
    ({"early_stopping": False}, params(early_stopping="EARLY_STOPPING_FALSE")),
    ({"early_stopping": "never"}, params(early_stopping="EARLY_STOPPING_NEVER")),
    ({"stop_string_output": "exclude"}, params(stop_string_output="STOP_STRING_OUTPUT_EXCLUDE")),
    (
        {"exponential_decay_length_penalty": (5, 1.5)},
        params(exponential_decay_length_penalty={"start_index": 5, "factor": 1.5}),
    ),
    ({"sequence_bias": {(1, 2): -1.0}}, params(sequence_bias=[{"token_ids": [1, 2], "bias": -1.0}])),
    ({"sequence_bias": [[[1, 2], -1.0]]}, params(sequence_bias=[{"token_ids": [1, 2], "bias": -1.0}])),
    ({"logit_bias": {5: 1, "6": -1}}, params(logit_bias={"5": 1.0, "6": -1.0})),
    ({"bad_words_ids": [[1, 2], [3]]}, params(bad_words_ids=[{"ids": [1, 2]}, {"ids": [3]}])),
    ({"bad_words": "no"}, params(bad_words=["no"])),
    (
        {"guidance_scale": 1.5, "negative_prompt_ids": [1, 2]},
        params(guidance_scale=1.5, negative_prompt={"token_ids": {"ids": [1, 2]}}),
    ),
    ({"negative_prompt": "no"}, params(negative_prompt={"text": "no"})),
    ({"structured_output": {"regex": "a+"}}, params(structured_output={"regex": "a+"})),
    ({"structured_output": {"json_schema": {}}}, params(structured_output={"json_schema": "{}"})),
    ({"structured_output": {"choice": ["a", "b"]}}, params(structured_output={"choice": {"values": ["a", "b"]}})),
    (
        {"watermarking_config": {"greenlist_ratio": 0.5, "seeding_scheme": "selfhash"}},
        params(
            watermarking_config={"green_list": {"greenlist_ratio": 0.5, "seeding_scheme": "SEEDING_SCHEME_SELFHASH"}}
        ),
    ),
    ({"cache_salt": "s", "bypass_prefix_cache": True}, {"cache": {"cache_salt": "s", "bypass_prefix_cache": True}}),
    ({"priority": -5, "model": "m"}, {"priority": -5, "model": "m"}),
    (
        {"truncate_to_last": 9, "add_special_tokens": False},
        {"prompt_options": {"truncate_to_last": 9, "add_special_tokens": False}},
    ),
    ({"pad_token_id": 50256, "use_cache": False, "attention_mask": [[1, 1]]}, {}),
    (
        {
            "num_beam_groups": 1,
            "diversity_penalty": 0.0,
            "trust_remote_code": False,
            "streamer": None,
            "num_assistant_tokens": 20,
        },
        {},
    ),
    ({"generation_config": {"top_k": 5, "top_p": None}}, params(top_k=5)),
    ({"generation_config": SimpleNamespace(top_k=5, top_p=None, _commit_hash="x")}, params(top_k=5)),
    (
        {"generation_config": {"top_k": 5, "max_new_tokens": 9}, "top_k": 6, "response_length": 8},
        params(top_k=6, max_new_tokens=8),
    ),
    ({"generation_config": {"eos_token_id": 3}, "eos_token_id": None}, params(ignore_eos=True)),
    (
        {"top_k": np.int64(5), "top_p": np.float32(0.5), "do_sample": np.bool_(True)},
        params(top_k=5, top_p=0.5, do_sample=True),
    ),
]


@pytest.mark.parametrize(("keywords", "expected"), MAPPED, ids=[str(list(row[0])) for row in MAPPED])
def test_keyword_reaches_the_wire_as_documented(keywords: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sent(**keywords) == expected


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_new_tokns": 5}, TypeError, "max_new_tokns; did you mean max_new_tokens"),
    ({"generation_config": {"foo": 1}}, TypeError, "generation_config.foo"),
    ({"generation_config": "foo"}, TypeError, "generation_config"),
    ({"response_length": 5, "max_new_tokens": 6}, TypeError, "contradicts"),
    ({"remove_input": True, "return_full_text": True}, TypeError, "contradicts"),
    ({"eos_token_id": None, "ignore_eos": False}, TypeError, "contradicts"),
    ({"output_logits": True, "output_scores": True}, ValueError, "output_logits"),
    ({"output_logits": True, "logprob_kind": "raw_logprob"}, TypeError, "contradicts"),
    ({"handle_long_generation": "cut"}, ValueError, "hole"),
    ({"attention_mask": [1, 0]}, ValueError, "attention_mask"),
    ({"max_new_tokens": -1}, ValueError, "max_new_tokens"),
    ({"max_new_tokens": 2**32}, ValueError, "max_new_tokens"),
    ({"max_new_tokens": True}, TypeError, "max_new_tokens"),
    ({"max_new_tokens": 5.0}, TypeError, "max_new_tokens"),
    ({"do_sample": 1}, TypeError, "do_sample"),
    ({"temperature": "hot"}, TypeError, "temperature"),
    ({"seed": 2**64}, ValueError, "seed"),
    ({"seed": -(2**63) - 1}, ValueError, "seed"),
    ({"top_k": -1}, ValueError, "top_k"),
    ({"eos_token_id": [-1]}, ValueError, "eos_token_id"),
    ({"stop": "\ud800"}, ValueError, "stop_strings"),
    ({"stop": [1]}, TypeError, "stop_strings"),
    ({"bad_words_ids": [1, 2]}, TypeError, "bad_words_ids"),
    ({"bad_words_ids": ["ab"]}, TypeError, "bad_words_ids"),
    ({"bad_words_ids": []}, ValueError, "bad_words_ids"),
    ({"sequence_bias": {}}, ValueError, "sequence_bias"),
    ({"sequence_bias": {5: 1.0}}, TypeError, "sequence_bias"),
    ({"sequence_bias": [5]}, TypeError, "sequence_bias"),
    ({"sequence_bias": [[[1], 1.0, 2]]}, TypeError, "sequence_bias"),
    ({"sequence_bias": {(-1,): 1.0}}, ValueError, "sequence_bias"),
    ({"sequence_bias": {(1,): "x"}}, TypeError, "sequence_bias"),
    ({"forced_eos_token_id": -1}, ValueError, "forced_eos_token_id"),
    ({"no_repeat_ngram_size": -1}, ValueError, "no_repeat_ngram_size"),
    ({"suppress_tokens": [1.5]}, TypeError, "suppress_tokens"),
    ({"remove_invalid_values": 1}, TypeError, "remove_invalid_values"),
    ({"logit_bias": [1]}, TypeError, "logit_bias"),
    ({"exponential_decay_length_penalty": 5}, TypeError, "pair"),
    ({"early_stopping": "soon"}, ValueError, "never"),
    ({"stop_string_output": "all"}, ValueError, "exclude"),
    ({"structured_output": {"regex": "a", "grammar": "b"}}, TypeError, "structured_output"),
    ({"watermarking_config": {"greenlist": 1}}, TypeError, "watermarking_config"),
    ({"timeout": 0}, ValueError, "timeout"),
    ({"timeout": float("inf")}, ValueError, "timeout"),
    ({"input_ids": [1]}, TypeError, "once"),
    ({"stream_max_delay": float("inf")}, ValueError, "stream_max_delay"),
]


@pytest.mark.parametrize(("keywords", "error", "text"), REFUSED, ids=[str(list(row[0])) for row in REFUSED])
def test_bad_keyword_is_refused_by_name_before_anything_is_sent(
    keywords: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        build("x", keywords)


@pytest.mark.parametrize("name", sorted(REJECTED))
def test_rejected_keyword_passes_at_its_default_and_is_refused_otherwise(name: str) -> None:
    assert sent(**{name: None}) == sent(**{name: False}) == sent(**{name: REJECTED[name][0]}) == {}
    with pytest.raises(ValueError, match=f"^{name}: not supported: "):
        build("x", {name: [object()] if name.endswith(("processor", "criteria")) else "something"})


def test_every_name_of_generation_config_is_mapped_neutral_or_rejected() -> None:
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    known = set(GROUP_OF_FIELD) | NEUTRAL | set(REJECTED) | {"output_scores", "output_logits"}
    assert names - known == set()


def test_tables_do_not_overlap_and_name_real_fields() -> None:
    assert len(GROUP_OF_FIELD) == sum(len(descriptor.fields) for descriptor in GROUPS.values())
    assert not set(GROUP_OF_FIELD) & (NEUTRAL | set(REJECTED) | set(ALIASES) | TOP_LEVEL)
    assert set(ALIASES.values()) | set(OFF) <= set(GROUP_OF_FIELD)


def test_every_generation_parameter_can_be_set_by_its_own_name() -> None:
    examples = {
        "seed": 1,
        "early_stopping": "never",
        "logit_bias": {1: 1.0},
        "bad_words_ids": [[1]],
        "negative_prompt": "n",
    }
    examples |= {"sequence_bias": {(1,): 1.0}, "exponential_decay_length_penalty": (1, 1.0), "do_sample": True}
    examples |= {"watermarking_config": {"bias": 1.0}, "structured_output": {"regex": "a"}, "stop_strings": ["s"]}
    examples |= {"stop_string_output": "tokens", "bad_words": ["b"], "token_healing": True}
    for name in GROUPS["params"].fields_by_name:
        for value in (examples.get(name, 1), True):
            try:
                message = build("x", {name: value}).message
                break
            except TypeError:
                continue
        assert len(message.params.ListFields()) == 1, name


def test_every_processor_of_a_real_generation_config_is_taken() -> None:
    settings = {
        "sequence_bias": {(1, 2): -1.0, (3,): 2},
        "bad_words_ids": [[4, 5]],
        "encoder_repetition_penalty": 2,
        "no_repeat_ngram_size": 3,
        "encoder_no_repeat_ngram_size": 4,
        "suppress_tokens": [6],
        "begin_suppress_tokens": [7],
        "forced_bos_token_id": 8,
        "forced_eos_token_id": [9],
        "exponential_decay_length_penalty": (5, 1.5),
        "remove_invalid_values": True,
        "renormalize_logits": True,
        "top_h": 0.5,
        "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.2,
        "do_sample": True,
    }
    assert sent(generation_config=GenerationConfig(**settings)) == sent(**settings)
    assert sent(generation_config=settings) == sent(**settings)
    assert len(sent(**settings)["params"]) == len(settings)


def test_real_generation_config_is_taken_without_its_unset_fields() -> None:
    config = GenerationConfig(max_new_tokens=9, top_p=0.5, do_sample=True, pad_token_id=3, eos_token_id=[1, 2])
    expected = params(max_new_tokens=9, top_p=0.5, do_sample=True, eos_token_id={"ids": [1, 2]})
    assert sent(generation_config=config) == expected
    with pytest.raises(ValueError, match=r"generation_config\.penalty_alpha"):
        sent(generation_config=GenerationConfig(penalty_alpha=0.6))


def test_watermarking_classes_of_transformers_are_taken() -> None:
    green = sent(watermarking_config=WatermarkingConfig(bias=3.0))["params"]["watermarking_config"]["green_list"]
    assert green["bias"] == 3.0
    assert green["seeding_scheme"] == "SEEDING_SCHEME_LEFTHASH"
    synth = SynthIDTextWatermarkingConfig(ngram_len=5, keys=[1, -2])
    assert sent(watermarking_config=synth)["params"]["watermarking_config"]["synth_id"]["keys"] == ["1", "-2"]


PROMPTS: list[tuple[Any, list[dict[str, Any]], bool]] = [
    ("a", [{"text": "a"}], True),
    ("", [{"text": ""}], True),
    ([1, 2], [{"token_ids": {"ids": [1, 2]}}], True),
    (np.array([1, 2]), [{"token_ids": {"ids": [1, 2]}}], True),
    (["a", "b"], [{"text": "a"}, {"text": "b"}], False),
    (["a"], [{"text": "a"}], False),
    ([[1], [2, 3]], [{"token_ids": {"ids": [1]}}, {"token_ids": {"ids": [2, 3]}}], False),
    (np.array([[1], [2]]), [{"token_ids": {"ids": [1]}}, {"token_ids": {"ids": [2]}}], False),
    (("a", [1]), [{"text": "a"}, {"token_ids": {"ids": [1]}}], False),
]


@pytest.mark.parametrize(("prompts", "expected", "single"), PROMPTS)
def test_prompts_may_be_text_ids_or_lists_of_either(prompts: Any, expected: list[Any], single: bool) -> None:
    call = build(prompts, {})
    assert MessageToDict(call.message, preserving_proto_field_name=True)["prompts"] == expected
    assert call.single is single


@pytest.mark.parametrize(
    ("prompts", "error"),
    [
        ([], ValueError),
        (None, TypeError),
        (5, TypeError),
        ([1, "a"], TypeError),
        ([1.5], TypeError),
        (b"a", TypeError),
        ({"a": 1}, TypeError),
        ("\udc00", ValueError),
        ([-1], ValueError),
        ([2**32], ValueError),
    ],
)
def test_bad_prompts_are_refused(prompts: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="prompts"):
        build(prompts, {})


@pytest.mark.parametrize("name", ["inputs", "input_ids", "text_inputs"])
def test_prompts_may_be_given_by_every_name_of_transformers(name: str) -> None:
    assert list(build(None, {name: [[1, 2]]}).message.prompts[0].token_ids.ids) == [1, 2]


def test_prefix_is_refused_before_token_ids() -> None:
    with pytest.raises(ValueError, match="prefix"):
        build([1, 2], {"prefix": "a"})


def test_every_request_gets_an_id_and_a_deadline() -> None:
    one, two = build("x", {}), build("x", {"timeout": 5})
    assert one.request_id != two.request_id
    assert len(one.request_id) == 32
    assert (one.timeout, two.timeout) == (300.0, 5.0)
