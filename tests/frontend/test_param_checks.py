"""What generate() refuses of processors and warpers is refused by name, and what it accepts is accepted."""

from __future__ import annotations

import dataclasses
from math import inf, nan
from typing import Any

import pytest
from frontend.fakes import demo, request
from octavo.config import Limits
from octavo.errors import Reason, RequestError
from octavo.frontend.defaults import checkpoint_params
from octavo.frontend.input_processor import InputProcessor
from octavo.types import ExponentialDecay, GenerateRequest, GenerationParams, SequenceBias

V, EOS = 4096, 4095


def params_of(good: GenerateRequest, checkpoint: dict[str, Any] | None = None) -> GenerationParams:
    """What reaches the core."""
    model = demo()
    if checkpoint is not None:
        model = dataclasses.replace(model, checkpoint_params=checkpoint_params(checkpoint, V))
    processor = InputProcessor(model, Limits(), cache_secret=b"secret")
    return processor.process(good, arrival_time=1.0).core_requests[0].params


def refused(bad: GenerateRequest, checkpoint: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(RequestError) as caught:
        params_of(bad, checkpoint)
    assert caught.value.reason is Reason.INVALID_FIELD
    return [violation.field for violation in caught.value.violations]


def bias(*token_ids: int, value: float = 1.0) -> SequenceBias:
    return SequenceBias(list(token_ids), value)


REFUSED: dict[str, list[tuple[Any, str]]] = {
    "top_h": [(0, ""), (1.1, ""), (-0.5, ""), (nan, ""), (inf, ""), (True, "")],
    "epsilon_cutoff": [(1, ""), (-0.1, ""), (1.5, ""), (nan, "")],
    "eta_cutoff": [(1.0, ""), (-1e-9, ""), (inf, "")],
    "encoder_repetition_penalty": [(0, ""), (-1, ""), (nan, ""), (inf, "")],
    "no_repeat_ngram_size": [(-1, ""), (1.5, "")],
    "encoder_no_repeat_ngram_size": [(-1, ""), (2.0, "")],
    "forced_bos_token_id": [(V, ""), (-1, ""), ([1], "")],
    "forced_eos_token_id": [([V], "[0]"), ([1, -1], "[1]"), ([1] * 129, "")],
    "suppress_tokens": [([V], "[0]"), ([1] * 1025, ""), ([1, 2.5], "[1]")],
    "begin_suppress_tokens": [([2**32 - 1], "[0]"), ([1] * 1025, "")],
    "allowed_token_ids": [([], ""), ([V], "[0]"), ([1] * 1025, "")],
    "sequence_bias": [
        ([bias()], "[0].token_ids"),
        ([bias(1), bias(V)], "[1].token_ids[0]"),
        ([bias(*[1] * 65)], "[0].token_ids"),
        ([bias(1, value=nan)], "[0].bias"),
        ([bias(1, value=-inf)], "[0].bias"),
        ([bias(1)] * 1025, ""),
        ([bias(1, 2)] * 129, ""),
    ],
    "bad_words_ids": [
        ([[]], "[0]"),
        ([[1], [V]], "[1][0]"),
        ([[1] * 65], "[0]"),
        ([[1]] * 129, ""),
        ([[1], [EOS]], "[1]"),
    ],
    "bad_words": [
        ([""], "[0]"),
        (["x"] * 65, ""),
        (["x" * 257], "[0]"),
        (["a", "\udc00"], "[1]"),
        (["<|endoftext|>"], "[0]"),
        (["~^`" * 80], "[0]"),
    ],
    "exponential_decay_length_penalty": [
        (ExponentialDecay(1025, 1.1), ".start_index"),
        (ExponentialDecay(-1, 1.1), ".start_index"),
        (ExponentialDecay(1, 0.0), ".factor"),
        (ExponentialDecay(1, nan), ".factor"),
    ],
    "remove_invalid_values": [(1, ""), ("yes", "")],
    "renormalize_logits": [(0, "")],
    "prompt_lookup_num_tokens": [(-1, ""), (33, ""), (2.5, "")],
    "max_matching_ngram_size": [(0, ""), (17, "")],
}


@pytest.mark.parametrize(("name", "value", "suffix"), [(name, *row) for name, rows in REFUSED.items() for row in rows])
def test_value_that_generate_refuses_is_named(name: str, value: Any, suffix: str) -> None:
    found = refused(request(do_sample=True, **{name: value}))
    assert set(found) == {f"params.{name}{suffix}"}


ACCEPTED: dict[str, list[Any]] = {
    "top_h": [1, 1e-12, 0.4],
    "epsilon_cutoff": [0, 0.0, 3e-4, 0.999],
    "eta_cutoff": [0, 3e-4],
    "encoder_repetition_penalty": [2, 0.5, 1e-30, 1e30],
    "no_repeat_ngram_size": [0, 1, 1000, 2**32 - 1],
    "encoder_no_repeat_ngram_size": [0, 3, 2**32 - 1],
    "forced_bos_token_id": [0, V - 1],
    "forced_eos_token_id": [[], [5], [EOS, 5]],
    "suppress_tokens": [[], [0, EOS], list(range(1024))],
    "begin_suppress_tokens": [[], [5, 5]],
    "allowed_token_ids": [[5], list(range(1024))],
    "sequence_bias": [[bias(1, value=-1e9), bias(1, 2, value=3)], [bias(*[1] * 64)] * 128 + [bias(5)] * 896],
    "bad_words_ids": [[[1]], [[1] * 64] * 128, [[EOS, 1]]],
    "bad_words": [["rain"], ["x"] * 64, [" "], ["\n"]],
    "exponential_decay_length_penalty": [ExponentialDecay(0, 1), ExponentialDecay(1024, 0.5), ExponentialDecay(3, 1e9)],
    "remove_invalid_values": [True, False],
    "renormalize_logits": [True, False],
    "prompt_lookup_num_tokens": [0, 1, 32],
    "max_matching_ngram_size": [1, 2, 16],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ACCEPTED.items() for value in values])
def test_value_that_generate_accepts_reaches_the_core(name: str, value: Any) -> None:
    params = params_of(request(do_sample=True, **{name: value}))
    if name != "bad_words":
        assert getattr(params, name) == value


def test_unset_fields_have_the_values_at_which_they_do_nothing() -> None:
    params = params_of(request())
    assert (params.epsilon_cutoff, params.eta_cutoff, params.encoder_repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.no_repeat_ngram_size, params.encoder_no_repeat_ngram_size) == (0, 0)
    assert (params.remove_invalid_values, params.renormalize_logits) == (False, False)
    assert params.top_h is params.suppress_tokens is params.forced_bos_token_id is params.allowed_token_ids is None


@pytest.mark.parametrize(
    ("name", "value"), [("top_h", 0.5), ("top_h", 1), ("epsilon_cutoff", 0.1), ("eta_cutoff", 0.1)]
)
def test_warper_without_sampling_is_refused_unless_temperature_is_zero(name: str, value: float) -> None:
    assert refused(request(**{name: value})) == [f"params.{name}"]
    params_of(request(temperature=0, **{name: value}))
    params_of(request(), {name: value})  # of the checkpoint it lies dormant


def test_forcing_only_suppressed_tokens_is_refused() -> None:
    assert refused(request(forced_eos_token_id=[5, 6], suppress_tokens=[4, 5, 6])) == ["params.forced_eos_token_id"]
    assert refused(request(forced_bos_token_id=5, suppress_tokens=[5])) == ["params.forced_bos_token_id"]
    assert refused(request(suppress_tokens=[5]), {"forced_bos_token_id": 5}) == ["params.forced_bos_token_id"]
    params_of(request(forced_eos_token_id=[5, 6], suppress_tokens=[5]))


def test_allowing_only_suppressed_tokens_is_refused() -> None:
    assert refused(request(allowed_token_ids=[5], suppress_tokens=[5, 6])) == ["params.allowed_token_ids"]


def test_length_penalty_without_an_end_is_refused() -> None:
    decay = ExponentialDecay(1, 1.1)
    assert refused(request(exponential_decay_length_penalty=decay, ignore_eos=True)) == [
        "params.exponential_decay_length_penalty"
    ]
    params_of(request(exponential_decay_length_penalty=decay, ignore_eos=True, stop_token_ids=[5]))
    params_of(request(ignore_eos=True), {"exponential_decay_length_penalty": [1, 1.1], "eos_token_id": EOS})


def test_bad_word_that_is_an_end_is_refused_of_a_request_only() -> None:
    assert refused(request(bad_words_ids=[[5]], stop_token_ids=[5])) == ["params.bad_words_ids[0]"]
    params_of(request(bad_words_ids=[[EOS]], ignore_eos=True))
    params_of(request(), {"bad_words_ids": [[EOS]], "eos_token_id": EOS})


def test_bad_words_are_banned_as_written_and_after_a_space() -> None:
    encode = demo().tokenizer.encode
    params = params_of(request(bad_words=["rain", "the"], bad_words_ids=[[7, 8]]))
    assert params.bad_words == []
    assert params.bad_words_ids == [[7, 8], *encode(["rain", " rain", "the", " the"])]


def test_bad_words_and_bad_words_ids_share_a_limit() -> None:
    params_of(request(bad_words=["a"] * 32, bad_words_ids=[[1]] * 64))
    assert refused(request(bad_words=["a"] * 32, bad_words_ids=[[1]] * 65)) == ["params.bad_words"]


def test_huge_lists_are_refused_at_once() -> None:
    words = [[EOS]] * 100_000
    found = refused(request(bad_words_ids=words, stop_token_ids=[1] * 100_000, suppress_tokens=[1] * 100_000))
    assert set(found) == {"params.bad_words_ids", "params.stop_token_ids", "params.suppress_tokens"}
