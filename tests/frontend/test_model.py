"""What a checkpoint's generation_config.json does to requests that leave fields unset."""

from __future__ import annotations

from typing import Any

import pytest
from frontend.fakes import demo
from octavo.checkpoint import resolve
from octavo.errors import StartupError
from octavo.frontend.defaults import checkpoint_params, default_params, resolve_params
from octavo.frontend.model import FrontendModel
from octavo.types import PARAM_NAMES, ExponentialDecay, GenerationParams, SequenceBias


def test_demo_resolves_to_the_defaults_of_generate() -> None:
    defaults = demo().default_params
    assert (defaults.max_new_tokens, defaults.do_sample, defaults.top_k) == (20, False, 50)
    assert (defaults.temperature, defaults.top_p, defaults.repetition_penalty) == (1, 1, 1)
    assert demo().eos_token_ids == [4095]
    assert demo().bos_token_id == 4095
    assert demo().max_model_len == 1025


def test_request_wins_over_the_file_and_the_file_over_the_global_default() -> None:
    checkpoint = checkpoint_params({"do_sample": True, "top_k": 7, "eos_token_id": 3, "max_new_tokens": 9}, 100)
    resolved = resolve_params(GenerationParams(top_k=5, max_length=30), checkpoint)
    assert (resolved.do_sample, resolved.top_k, resolved.temperature, resolved.eos_token_id) == (True, 5, 1.0, [3])
    assert (resolved.max_length, resolved.max_new_tokens) == (30, None), "one of a pair replaces the other"
    assert default_params(checkpoint).max_new_tokens == 9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("no_repeat_ngram_size", -1),
        ("encoder_repetition_penalty", 0),
        ("epsilon_cutoff", 1.0),
        ("suppress_tokens", [100]),
        ("suppress_tokens", 5),
        ("bad_words_ids", [3]),
        ("bad_words_ids", [[]]),
        ("sequence_bias", {"3": 1.0}),
        ("sequence_bias", [[3, 1.0]]),
        ("sequence_bias", [[[3], "x"]]),
        ("exponential_decay_length_penalty", [1]),
        ("exponential_decay_length_penalty", [1, 0]),
        ("forced_eos_token_id", 100),
        ("remove_invalid_values", 1),
        ("early_stopping", "sometimes"),
        ("penalty_alpha", 0.6),
        ("watermarking_config", {"greenlist": 1}),
        ("output_hidden_states", True),
        ("temperature", -1),
        ("top_p", 1.5),
        ("do_sample", 1),
        ("eos_token_id", 100),
        ("stop_strings", [""]),
        ("something_else", 1),
    ],
)
def test_value_that_cannot_be_honoured_stops_the_load_with_its_name(field: str, value: Any) -> None:
    with pytest.raises(StartupError, match=field) as caught:
        checkpoint_params({field: value}, 100)
    assert caught.value.exit_code == StartupError.CHECKPOINT


def test_every_list_of_the_file_is_taken_in_transformers_form() -> None:
    raw = {
        "sequence_bias": [[[1, 2], 0.5], [[3], -1]],
        "bad_words_ids": [[4, 5], [7]],
        "suppress_tokens": [8],
        "begin_suppress_tokens": [9],
        "forced_eos_token_id": 7,
        "exponential_decay_length_penalty": [5, 1.5],
        "eos_token_id": 7,
        "top_h": None,
    }
    assert checkpoint_params(raw, 100) == GenerationParams(
        sequence_bias=[SequenceBias([1, 2], 0.5), SequenceBias([3], -1)],
        bad_words_ids=[[4, 5], [7]],
        suppress_tokens=[8],
        begin_suppress_tokens=[9],
        forced_eos_token_id=[7],
        exponential_decay_length_penalty=ExponentialDecay(5, 1.5),
        eos_token_id=[7],
    )


def test_empty_list_of_a_request_clears_that_of_the_file() -> None:
    checkpoint = checkpoint_params({"suppress_tokens": [8], "forced_eos_token_id": [7], "sequence_bias": [[[1], 1]]}, 9)
    resolved = resolve_params(GenerationParams(suppress_tokens=[], forced_eos_token_id=[]), checkpoint)
    assert (resolved.suppress_tokens, resolved.forced_eos_token_id) == ([], [])
    assert resolved.sequence_bias == [SequenceBias([1], 1)]


def test_a_file_that_forces_only_what_it_suppresses_stops_the_load() -> None:
    with pytest.raises(StartupError, match="forced_bos_token_id"):
        checkpoint_params({"suppress_tokens": [8], "forced_bos_token_id": 8}, 100)


def test_neutral_values_and_fields_without_effect_are_accepted() -> None:
    raw = {
        "num_beams": 1,
        "length_penalty": 1.0,
        "early_stopping": False,
        "suppress_tokens": [],
        "use_cache": False,
        "pad_token_id": 0,
        "decoder_start_token_id": 5,
        "transformers_version": "5",
        "num_assistant_tokens": 20,
    }
    params = checkpoint_params(raw, 100)
    assert default_params(params) == default_params(GenerationParams(suppress_tokens=[]))


def test_every_generation_config_field_of_transformers_is_known() -> None:
    from transformers import GenerationConfig

    for name, value in GenerationConfig._get_default_generation_params().items():
        if value is not None:
            checkpoint_params({name: value}, 50257)
    for name in vars(GenerationConfig()):
        if name.startswith("_") or name in PARAM_NAMES:
            continue
        assert is_known(name)


def is_known(name: str) -> bool:
    """A null-like value passes, anything else is named or has no effect."""
    try:
        checkpoint_params({name: []}, 50257)
    except StartupError:
        return False
    return True


def test_max_model_len_out_of_range_is_a_usage_error() -> None:
    with pytest.raises(StartupError, match="1025") as caught:
        FrontendModel.load(resolve("demo"), "demo", 1026)
    assert caught.value.exit_code == StartupError.USAGE
