"""Bad requests are refused with every violation by name; good ones resolve to what generate() would do."""

from __future__ import annotations

import time
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from frontend.fakes import demo, engine_info, ids_of, request
from octavo.config import Limits
from octavo.errors import Reason, RequestError
from octavo.frontend.input_processor import InputProcessor
from octavo.frontend.requests import ProcessedRequest
from octavo.types import (
    CacheOptions,
    EarlyStopping,
    GenerateRequest,
    GenerationParams,
    OutputOptions,
    Prompt,
    PromptOptions,
)

N, V = 1024, 4096


def processor(**limits: Any) -> InputProcessor:
    return InputProcessor(demo(), Limits(**limits), cache_secret=b"secret")


def process(bad: GenerateRequest, **options: Any) -> ProcessedRequest:
    return processor().process(bad, **({"arrival_time": 1.0} | options))


def refusal(bad: GenerateRequest, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        process(bad, **options)
    return caught.value


def fields(error: RequestError) -> list[str]:
    return [violation.field for violation in error.violations]


BAD_NUMBERS = {
    "temperature": [-0.1, nan, inf, -inf],
    "top_k": [-1],
    "top_p": [1.0001, -0.1, nan, inf, -inf],
    "min_p": [-0.1, 1.1, nan, inf],
    "typical_p": [0, -0.5, 1.5, nan],
    "repetition_penalty": [0, -1, nan, inf],
    "frequency_penalty": [2.01, -2.01, nan],
    "presence_penalty": [2.01, -2.01, -inf],
    "max_time": [-1, nan, inf, 86_401],
    "seed": [-1, 2**64],
    "num_return_sequences": [0, 17, 10**6, 2**31 - 1],
    "max_new_tokens": [0],
    "max_length": [0],
    "min_new_tokens": [-1],
    "bos_token_id": [V, 2**31],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD_NUMBERS.items() for value in values]
)
def test_number_out_of_range_is_named_with_rule_and_value(field: str, value: float) -> None:
    error = refusal(request(do_sample=True, **{field: value}))
    assert error.reason is Reason.INVALID_FIELD
    assert fields(error) == [f"params.{field}"]
    assert repr(value) in error.violations[0].description
    assert "must be" in error.violations[0].description


GOOD_NUMBERS = {
    "temperature": [1e-9, 1e-320, 2.01, 1e30, 1],
    "top_k": [0, 1, V, V + 1, 2**31 - 1],
    "top_p": [0, 1e-12, 1, -0.0],
    "min_p": [0, 1],
    "typical_p": [1e-9, 1],
    "repetition_penalty": [1e-30, 1e30, 2],
    "frequency_penalty": [-2, 2],
    "max_time": [0, 86_400],
    "seed": [0, 2**64 - 1, 2**63],
    "num_return_sequences": [1, 16],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in GOOD_NUMBERS.items() for value in values]
)
def test_number_in_range_reaches_the_core_as_it_is(field: str, value: float) -> None:
    core = process(request(do_sample=True, **{field: value})).core_requests[0]
    assert getattr(core.params, field) == value


def text_prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text=text) for text in texts]


INVALID = [
    (GenerateRequest(prompts=[]), ["prompts"]),
    (GenerateRequest(prompts=[Prompt()]), ["prompts[0]"]),
    (GenerateRequest(prompts=[Prompt(text="a", token_ids=[1])]), ["prompts[0]"]),
    (GenerateRequest(prompts=[Prompt(text="a"), Prompt(token_ids=[])]), ["prompts[1].token_ids"]),
    (GenerateRequest(prompts=text_prompts(*["a"] * 129)), ["prompts"]),
    (GenerateRequest(prompts=text_prompts("a", "b" * 131_073)), ["prompts[1].text"]),
    (GenerateRequest(prompts=text_prompts("\ud800")), ["prompts[0].text"]),
    (GenerateRequest(prompts=[Prompt(token_ids=[1, V])]), ["prompts[0].token_ids[1]"]),
    (GenerateRequest(prompts=[Prompt(token_ids=[2**31])]), ["prompts[0].token_ids[0]"]),
    (GenerateRequest(prompts=[Prompt(token_ids=[2**70, -1])]), ["prompts[0].token_ids[0]"]),
    (GenerateRequest(prompts=[Prompt(token_ids=[1, -1])]), ["prompts[0].token_ids[1]"]),
    (GenerateRequest(prompts=text_prompts("a"), request_id="x" * 129), ["request_id"]),
    (GenerateRequest(prompts=text_prompts("a"), request_id="a\nb"), ["request_id"]),
    (GenerateRequest(prompts=text_prompts("a"), request_id="a\n"), ["request_id"]),
    (GenerateRequest(prompts=text_prompts("a"), request_id="\x1b[31m"), ["request_id"]),
    (GenerateRequest(prompts=text_prompts("a"), request_id="../x"), ["request_id"]),
    (GenerateRequest(prompts=text_prompts("a"), priority=101), ["priority"]),
    (GenerateRequest(prompts=text_prompts("a"), cache=CacheOptions(cache_salt="a/b")), ["cache.cache_salt"]),
    (GenerateRequest(prompts=text_prompts("a"), cache=CacheOptions(cache_salt="x" * 129)), ["cache.cache_salt"]),
    (request(max_new_tokens=3, max_length=30), ["params.max_length"]),
    (request(min_new_tokens=3, min_length=30), ["params.min_length"]),
    (request(min_new_tokens=6, max_new_tokens=5), ["params.min_new_tokens"]),
    (request(min_new_tokens=21), ["params.min_new_tokens"]),
    (request(min_length=31, max_length=30), ["params.min_length"]),
    (request(min_length=500), ["params.min_length"]),
    (request(max_length=1), ["params.max_length"]),
    (request(eos_token_id=[]), ["params.eos_token_id"]),
    (request(eos_token_id=[V]), ["params.eos_token_id[0]"]),
    (request(eos_token_id=[1], ignore_eos=True), ["params.ignore_eos"]),
    (request(stop_token_ids=[1] * 129), ["params.stop_token_ids"]),
    (request(stop_token_ids=list(range(V))), ["params.stop_token_ids"]),
    (request(stop_token_ids=[0, V]), ["params.stop_token_ids[1]"]),
    (request(stop_strings=[""]), ["params.stop_strings[0]"]),
    (request(stop_strings=["a"] * 17), ["params.stop_strings"]),
    (request(stop_strings=["a", "b" * 257]), ["params.stop_strings[1]"]),
    (request(stop_strings=["é" * 129]), ["params.stop_strings[0]"]),
    (request(stop_strings=["b" * 1_000_000]), ["params.stop_strings[0]"]),
    (request(logit_bias=dict.fromkeys(range(1025), 1.0)), ["params.logit_bias"]),
    (request(logit_bias={5: nan}), ["params.logit_bias[5]"]),
    (request(logit_bias={5: 100.5}), ["params.logit_bias[5]"]),
    (request(logit_bias={V: 1.0}), ["params.logit_bias[0]"]),
    (request(num_return_sequences=2), ["params.num_return_sequences"]),
    (request(num_return_sequences=2, do_sample=True, temperature=0), ["params.num_return_sequences"]),
    (request(temperature=0.7), ["params.temperature"]),
    (request(top_p=0.9, top_k=5, min_p=0.1), ["params.top_k", "params.top_p", "params.min_p"]),
    (request(do_sample="yes"), ["params.do_sample"]),
    (request(output=OutputOptions(logprobs=21)), ["output.logprobs"]),
    (request(output=OutputOptions(prompt_logprobs=V)), ["output.prompt_logprobs"]),
    (request(output=OutputOptions(logprobs=1, return_token_ids=False)), ["output.logprobs"]),
    (request(output=OutputOptions(logprob_token_ids=[1])), ["output.logprob_token_ids"]),
    (request(output=OutputOptions(logprobs=0, logprob_token_ids=[V])), ["output.logprob_token_ids[0]"]),
    (request(output=OutputOptions(logprobs=0, logprob_token_ids=[1] * 129)), ["output.logprob_token_ids"]),
    (request(output=OutputOptions(stream_min_tokens=0)), ["output.stream_min_tokens"]),
    (request(output=OutputOptions(stream_min_tokens=257)), ["output.stream_min_tokens"]),
    (request(output=OutputOptions(stream_max_delay=11)), ["output.stream_max_delay"]),
    (request(output=OutputOptions(stream_max_delay=nan)), ["output.stream_max_delay"]),
    (request(output=OutputOptions(include_prompt=True, return_text=False)), ["output.include_prompt"]),
    (
        GenerateRequest(
            prompts=text_prompts("a"), prompt_options=PromptOptions(truncate_to_fit=True, truncate_to_last=5)
        ),
        ["prompt_options.truncate_to_fit"],
    ),
    (
        GenerateRequest(prompts=text_prompts("a"), prompt_options=PromptOptions(truncate_to_last=N + 1)),
        ["prompt_options.truncate_to_last"],
    ),
]


@pytest.mark.parametrize(("bad", "expected"), INVALID)
def test_invalid_field_is_named(bad: GenerateRequest, expected: list[str]) -> None:
    error = refusal(bad)
    assert error.reason is Reason.INVALID_FIELD
    assert fields(error) == expected


def test_all_violations_come_at_once_and_never_repeat_the_prompt() -> None:
    canary = "canary" * 30_000
    bad = GenerateRequest(
        prompts=[Prompt(text=canary), Prompt(token_ids=[V])],
        params=GenerationParams(top_p=nan, temperature=-1, num_beams=9, max_length=3, max_new_tokens=5),
        output=OutputOptions(logprobs=99),
        request_id="not good",
    )
    error = refusal(bad)
    assert error.reason is Reason.INVALID_FIELD
    assert sorted(fields(error)) == sorted(
        [
            "request_id",
            "prompts[0].text",
            "prompts[1].token_ids[0]",
            "params.top_p",
            "params.temperature",
            "params.num_beams",
            "params.max_length",
            "output.logprobs",
        ]
    )
    assert "canary" not in str(error) + str(error.violations)


def test_neutral_values_are_accepted() -> None:
    process(
        request(
            num_beams=1,
            length_penalty=1.0,
            early_stopping=EarlyStopping.FALSE,
            guidance_scale=1.0,
            token_healing=False,
            prompt_lookup_num_tokens=0,
            max_matching_ngram_size=2,
        )
    )


def test_sampling_fields_at_neutral_or_default_values_pass_without_do_sample() -> None:
    process(request(temperature=1.0, top_k=50, top_p=1.0, min_p=0.0, typical_p=1))
    process(request(top_k=0))


def test_temperature_zero_is_greedy_whatever_do_sample_is() -> None:
    for do_sample in (None, False, True):
        processed = process(request(do_sample=do_sample, temperature=0, top_k=5, top_p=0.5))
        assert processed.core_requests[0].params.do_sample is False
        assert processed.prompts[0].seed is None


@pytest.mark.parametrize(
    ("prompt_len", "params", "total"),
    [
        (1023, {"max_new_tokens": 1}, 1024),
        (1024, {"max_new_tokens": 1}, 1025),
        (1000, {"max_new_tokens": 25}, 1025),
        (1000, {"max_length": 1025}, 1025),
        (5, {}, 25),
        (1010, {}, 1024),
        (1004, {}, 1024),
        (1, {"max_length": 2}, 2),
    ],
)
def test_length_that_fits_is_exactly_that_of_generate(prompt_len: int, params: dict[str, int], total: int) -> None:
    core = process(
        GenerateRequest(prompts=[Prompt(token_ids=[5] * prompt_len)], params=GenerationParams(**params))
    ).core_requests[0]
    assert core.max_total_tokens == total
    assert core.length_is_context == (not params and total < prompt_len + 20)


@pytest.mark.parametrize(
    ("prompt_len", "params", "field", "limit", "got"),
    [
        (1024, {"max_new_tokens": 2}, "params.max_new_tokens", 1025, 1026),
        (1024, {}, "prompts[1].token_ids", 1024, 1025),
        (1025, {}, "prompts[1].token_ids", 1024, 1025),
        (1025, {"max_new_tokens": 1}, "prompts[1].token_ids", 1024, 1025),
        (1000, {"max_new_tokens": 26}, "params.max_new_tokens", 1025, 1026),
        (1000, {"max_new_tokens": 2**31 - 1}, "params.max_new_tokens", 1025, 1025 + 2**31 - 26),
        (1000, {"max_length": 1026}, "params.max_length", 1025, 1026),
    ],
)
def test_length_that_does_not_fit_tells_limit_and_size(
    prompt_len: int, params: dict[str, int], field: str, limit: int, got: int
) -> None:
    prompts = [Prompt(token_ids=[5]), Prompt(token_ids=[5] * prompt_len)]
    error = refusal(GenerateRequest(prompts=prompts[1:] + prompts[:1], params=GenerationParams(**params)))
    assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    assert fields(error)[0] == field.replace("prompts[1]", "prompts[0]")
    assert error.metadata == {"max": str(limit), "got": str(got), "prompt_index": "0"}


def test_text_too_long_is_told_by_prompt() -> None:
    error = refusal(request("short", "word " * 3000))
    assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    assert fields(error) == ["prompts[1].text"]
    assert error.metadata["prompt_index"] == "1"


@pytest.mark.parametrize(
    ("options", "params", "kept"),
    [
        (PromptOptions(truncate_to_fit=True), {"max_new_tokens": 24}, 1000),
        (PromptOptions(truncate_to_fit=True), {}, 1004),
        (PromptOptions(truncate_to_last=7), {}, 7),
    ],
)
def test_truncation_drops_from_the_left(options: PromptOptions, params: dict[str, int], kept: int) -> None:
    ids = [i % V for i in range(3000)]
    processed = process(
        GenerateRequest(prompts=[Prompt(token_ids=ids)], prompt_options=options, params=GenerationParams(**params))
    )
    assert processed.prompts[0].token_ids == ids[-kept:]


def test_empty_text_starts_from_bos() -> None:
    assert process(request("", "a")).prompts[0].token_ids == [4095]
    assert process(request("", bos_token_id=9)).prompts[0].token_ids == [9]


def test_prompt_reaches_the_core_as_int32_with_fresh_keys() -> None:
    inputs = processor()
    first = inputs.process(request("a b", "c", do_sample=True, num_return_sequences=3), arrival_time=1.0)
    second = inputs.process(request("d"), arrival_time=1.0)
    assert np.frombuffer(first.core_requests[0].prompt_token_ids, "<i4").tolist() == ids_of("a b")
    keys = [key for prompt in first.prompts + second.prompts for key in prompt.keys]
    assert len(keys) == len(set(keys)) == 7
    assert first.num_sequences == 6
    assert first.num_prompt_tokens == len(ids_of("a b")) + len(ids_of("c"))


def test_seed_is_the_clients_or_drawn_per_prompt_and_absent_when_greedy() -> None:
    sampled = process(request("a", "b", do_sample=True))
    assert sampled.prompts[0].seed != sampled.prompts[1].seed
    assert [core.seed for core in sampled.core_requests] == [prompt.seed for prompt in sampled.prompts]
    seeded = process(request("a", "b", do_sample=True, seed=2**64 - 1))
    assert [prompt.seed for prompt in seeded.prompts] == [2**64 - 1] * 2
    assert process(request("a", seed=3)).prompts[0].seed is None


def test_ends_are_those_of_the_checkpoint_unless_the_request_says_otherwise() -> None:
    assert process(request()).core_requests[0].eos_token_ids == [4095]
    assert process(request(ignore_eos=True)).core_requests[0].eos_token_ids == []
    core = process(request(eos_token_id=[1, 2], stop_token_ids=[3])).core_requests[0]
    assert (core.eos_token_ids, core.stop_token_ids) == ([1, 2], [3])


def test_cache_salt_depends_on_tenant_and_secret_and_is_never_the_clients() -> None:
    salted = GenerateRequest(prompts=text_prompts("a"), cache=CacheOptions(cache_salt="mine"))
    salts = {process(salted, tenant=tenant).core_requests[0].cache_salt for tenant in ("", "a", "b")}
    salts |= {process(request(), tenant=tenant).core_requests[0].cache_salt for tenant in ("a", "b")}
    assert len(salts) == 5
    assert all("mine" not in salt and salt for salt in salts)
    other = InputProcessor(demo(), Limits(), cache_secret=b"other").process(salted, arrival_time=0)
    assert other.core_requests[0].cache_salt not in salts
    assert process(request()).core_requests[0].cache_salt == ""


def test_sequence_larger_than_the_cache_is_refused() -> None:
    info = engine_info(num_blocks=4, block_size=16)
    process(request(max_length=65), info=info)
    error = refusal(request(max_length=66), info=info)
    assert error.reason is Reason.REQUEST_TOO_LARGE
    assert error.metadata == {"max": "64", "got": "65"}


def test_too_many_sequences_are_refused() -> None:
    error = refusal(request(*["a"] * 17, do_sample=True, num_return_sequences=16))
    assert error.reason is Reason.REQUEST_TOO_LARGE
    assert error.metadata == {"max": "256", "got": "272"}


def test_unary_answer_too_large_is_refused_and_the_same_stream_is_not() -> None:
    big = request("a", output=OutputOptions(logprobs=20), do_sample=True, num_return_sequences=16, max_new_tokens=1000)
    for _ in range(3):
        big = GenerateRequest(prompts=big.prompts * 2, params=big.params, output=big.output)
    process(big, streaming=True)
    error = refusal(big, streaming=False)
    assert error.reason is Reason.RESPONSE_TOO_LARGE
    assert error.metadata["max"] == str(4 << 20)


def test_unknown_model_is_not_found() -> None:
    error = refusal(GenerateRequest(prompts=text_prompts("a"), model="gpt-5"))
    assert error.reason is Reason.MODEL_NOT_FOUND
    process(GenerateRequest(prompts=text_prompts("a"), model="demo"))


def test_resolved_options_are_complete() -> None:
    resolved = process(request("Hello", output=OutputOptions(return_resolved_options=True))).resolved
    assert resolved is not None
    assert (resolved.params.max_new_tokens, resolved.params.top_k, resolved.params.num_beams) == (20, 50, 1)
    assert resolved.output.return_text is True
    assert resolved.prompt_options.add_special_tokens is True
    assert process(request()).resolved is None
    two = process(
        request("a", "a b c d e f g h", max_length=100, output=OutputOptions(return_resolved_options=True))
    ).resolved
    assert two is not None
    assert (two.params.max_length, two.params.max_new_tokens) == (100, None)


@pytest.mark.parametrize(
    "bad",
    [
        request("a" * 10**6),
        request("🙂" * 250_000),
        request(num_return_sequences=10**6, do_sample=True),
        request(*["b" * 131_073] * 128),
        GenerateRequest(prompts=text_prompts(*["a"] * 100_000)),
        request(stop_strings=["x"] * 100_000),
        request(stop_token_ids=[1] * 300_000),
    ],
    ids=range(7),
)
def test_huge_input_is_refused_before_tokenization_in_milliseconds(bad: GenerateRequest) -> None:
    inputs = processor()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        with pytest.raises(RequestError):
            inputs.process(bad, arrival_time=0)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.005
