"""Which parts of the sampler a request uses: one bit each, so that a step touches only the rows that ask.

The bits are the kernels': CPU and GPU read the same word.
"""

from __future__ import annotations

import functools
import operator
from typing import Final

from octavo_kernels.state import Feature

from octavo.step import NewRequest


def _union(*features: Feature) -> Feature:
    return functools.reduce(operator.or_, features, Feature.NONE)


PROCESSORS: Final = _union(Feature.BIAS, Feature.REPETITION_PENALTY, Feature.OUTPUT_PENALTY, Feature.MIN_LENGTH)
WARPERS: Final = _union(Feature.TEMPERATURE, Feature.TOP_K, Feature.TOP_P, Feature.MIN_P, Feature.TYPICAL_P)
RANKED: Final = Feature.TOP_K | Feature.TOP_P
"""Warpers that look at tokens in order of their logits."""
FILTERS: Final = RANKED | Feature.MIN_P | Feature.TYPICAL_P
"""Warpers that drop tokens."""


def features_of(request: NewRequest) -> Feature:
    """The bits of a request with resolved parameters; neutral values set none."""
    params = request.params
    uses = Feature.NONE
    if params.logit_bias:
        uses |= Feature.BIAS
    if (params.repetition_penalty or 1.0) != 1.0:
        uses |= Feature.REPETITION_PENALTY
    if params.frequency_penalty or params.presence_penalty:
        uses |= Feature.OUTPUT_PENALTY
    if (params.min_length or params.min_new_tokens) and (request.eos_token_ids or request.stop_token_ids):
        uses |= Feature.MIN_LENGTH
    if request.logprobs is not None:
        uses |= Feature.LOGPROBS
    if params.do_sample and params.temperature != 0.0:
        uses |= Feature.SAMPLE | _warpers_of(request)
    return uses


def _warpers_of(request: NewRequest) -> Feature:
    params = request.params
    uses = Feature.NONE
    if params.temperature is not None and params.temperature != 1.0:
        uses |= Feature.TEMPERATURE
    if params.top_k:
        uses |= Feature.TOP_K
    if params.top_p is not None and params.top_p < 1.0:
        uses |= Feature.TOP_P
    if params.min_p:
        uses |= Feature.MIN_P
    if params.typical_p is not None and params.typical_p < 1.0:
        uses |= Feature.TYPICAL_P
    return uses
