"""watermarking_config: refused by the entry at fault, resolved to transformers' defaults."""

from __future__ import annotations

from typing import Any

import pytest
from frontend.fakes import demo, request
from octavo.config import Limits
from octavo.errors import Reason, RequestError, StartupError
from octavo.frontend.defaults import checkpoint_params, resolve_params
from octavo.frontend.input_processor import InputProcessor
from octavo.types import GenerationParams, GreenListWatermark, SeedingScheme, SynthIdWatermark, Watermark


def green(**fields: Any) -> Watermark:
    return Watermark(green_list=GreenListWatermark(**fields))


def synth(**fields: Any) -> Watermark:
    return Watermark(synth_id=SynthIdWatermark(**({"ngram_len": 5, "keys": [1, -2]} | fields)))


@pytest.mark.parametrize(
    ("mark", "field"),
    [
        (Watermark(), ""),
        (Watermark(green_list=GreenListWatermark(), synth_id=SynthIdWatermark(ngram_len=2, keys=[1])), ""),
        (green(greenlist_ratio=0.0), ".green_list.greenlist_ratio"),
        (green(greenlist_ratio=1), ".green_list.greenlist_ratio"),
        (green(bias=float("nan")), ".green_list.bias"),
        (green(hashing_key=2**63), ".green_list.hashing_key"),
        (green(context_width=0), ".green_list.context_width"),
        (green(context_width=65), ".green_list.context_width"),
        (green(seeding_scheme="lefthash"), ".green_list.seeding_scheme"),
        (synth(ngram_len=1), ".synth_id.ngram_len"),
        (synth(ngram_len=0), ".synth_id.ngram_len"),
        (synth(keys=[]), ".synth_id.keys"),
        (synth(keys=[1] * 65), ".synth_id.keys"),
        (synth(keys=[1, 2**63]), ".synth_id.keys[1]"),
        (synth(context_history_size=0), ".synth_id.context_history_size"),
        (synth(sampling_table_size=2**24 + 1), ".synth_id.sampling_table_size"),
        (synth(sampling_table_size=0), ".synth_id.sampling_table_size"),
        (synth(skip_first_ngram_calls=1), ".synth_id.skip_first_ngram_calls"),
    ],
)
def test_what_is_wrong_with_a_watermark_is_told_by_its_path(mark: Watermark, field: str):
    inputs = InputProcessor(demo(), Limits(), cache_secret=b"secret")
    with pytest.raises(RequestError) as caught:
        inputs.process(request(watermarking_config=mark), arrival_time=1.0)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in caught.value.violations] == [f"params.watermarking_config{field}"]


def test_defaults_are_those_of_transformers():
    from transformers.generation.configuration_utils import SynthIDTextWatermarkingConfig, WatermarkingConfig

    def resolved(mark: Watermark) -> Watermark:
        params = resolve_params(GenerationParams(watermarking_config=mark), GenerationParams())
        assert params.watermarking_config is not None
        return params.watermarking_config

    found: Any = resolved(green()).green_list
    expected = WatermarkingConfig()
    for name in ("greenlist_ratio", "bias", "hashing_key", "context_width"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.seeding_scheme.name.lower() == expected.seeding_scheme
    found = resolved(synth()).synth_id
    for name, value in vars(SynthIDTextWatermarkingConfig(ngram_len=5, keys=[1, -2])).items():
        if name != "debug_mode":
            assert getattr(found, name) == value
    assert resolved(green(bias=1.5, context_width=3)).green_list.bias == 1.5


def test_a_checkpoint_may_set_a_watermark_and_a_wrong_one_stops_the_load():
    raw = {"greenlist_ratio": 0.5, "seeding_scheme": "selfhash"}
    params = checkpoint_params({"watermarking_config": raw}, 100)
    assert params.watermarking_config == green(greenlist_ratio=0.5, seeding_scheme=SeedingScheme.SELFHASH)
    assert resolve_params(GenerationParams(watermarking_config=synth()), params).watermarking_config.green_list is None
    assert checkpoint_params({"watermarking_config": {"ngram_len": 3, "keys": [1]}}, 100).watermarking_config.synth_id
    assert checkpoint_params({"watermarking_config": None}, 100) == GenerationParams()
    for wrong in ({"bias": "x"}, {"seeding_scheme": "x"}, 3, {"ngram_len": 3}, {"greenlist_ratio": 2}):
        with pytest.raises(StartupError, match="watermarking_config"):
            checkpoint_params({"watermarking_config": wrong}, 100)
