"""Which requests' tokens the host chooses on the device path."""

from __future__ import annotations

from typing import Any

import pytest
from octavo.config import Limits
from octavo.step import LogprobSpec
from octavo.types import (
    GenerationParams,
    GreenListWatermark,
    LogprobKind,
    SequenceBias,
    StructuredOutput,
    Watermark,
)
from octavo.worker.host_rows import needs_host

LIMITS = Limits()


@pytest.mark.parametrize(
    "params",
    [
        {"num_beams": 2},
        {"guidance_scale": 1.5},
        {"watermarking_config": Watermark(green_list=GreenListWatermark())},
        {"structured_output": StructuredOutput(regex="a*")},
        {"logit_bias": dict.fromkeys(range(1153), 1.0)},
        {"sequence_bias": [SequenceBias([token, 1], 1.0) for token in range(129)]},
        {"bad_words_ids": [[token, 1] for token in range(129)]},
        {"bad_words_ids": [[1] * 100] * 100},
    ],
    ids=lambda params: next(iter(params)),
)
def test_the_fused_sampler_does_not_serve(params: dict[str, Any]):
    assert needs_host(GenerationParams(**params), None)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"num_beams": 1, "guidance_scale": 1.0},
        {"do_sample": True, "top_h": 0.3, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
        {
            "logit_bias": dict.fromkeys(range(LIMITS.max_token_list), 1.0),
            "sequence_bias": [SequenceBias([1] * LIMITS.max_token_sequence_length, 1.0)] * LIMITS.max_token_sequences,
            "bad_words_ids": [[1] * LIMITS.max_token_sequence_length] * LIMITS.max_token_sequences,
        },
    ],
    ids=["nothing", "neutral values", "processors and filters", "the longest lists of the server's limits"],
)
def test_the_fused_sampler_serves(params: dict[str, Any]):
    asked = LogprobSpec(LIMITS.max_logprobs, LogprobKind.RAW_LOGPROB, [1] * LIMITS.max_logprob_token_ids)
    assert not needs_host(GenerationParams(**params), asked)


def test_more_logprobs_than_a_slot_holds():
    assert needs_host(GenerationParams(), LogprobSpec(21, LogprobKind.RAW_LOGPROB, []))
    assert needs_host(GenerationParams(), LogprobSpec(0, LogprobKind.RAW_LOGPROB, [1] * 129))
