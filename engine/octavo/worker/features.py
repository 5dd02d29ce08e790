"""Which parts of the sampler a request uses: one bit each, so that a step touches only the rows that ask.

The bits are the kernels': CPU and GPU read the same word.
"""

from __future__ import annotations

import functools
import operator
from typing import Final

from octavo_kernels.state import Feature as Feature

from octavo.step import NewRequest
from octavo.types import GenerationParams


def _union(*features: Feature) -> Feature:
    return functools.reduce(operator.or_, features, Feature.NONE)


PROCESSORS: Final = Feature(Feature.SAMPLE - 1)
"""The bits before SAMPLE: what acts on greedy rows too."""
RANKED: Final = Feature.TOP_H | Feature.TOP_K | Feature.TOP_P
"""Warpers that look at tokens in order of their logits."""
WATERMARK: Final = Feature(1 << 27)
"""Step 26: acts on greedy rows too, and after the filters when sampling. No kernel knows it."""
FILTERS: Final = RANKED | Feature.MIN_P | Feature.TYPICAL_P | Feature.EPSILON_CUTOFF | Feature.ETA_CUTOFF
"""Warpers that drop tokens."""


def features_of(request: NewRequest) -> Feature:
    """The bits of a request with resolved parameters; neutral values set none."""
    params = request.params
    words = bad_words_of(request)
    has_end = request.eos_token_ids or request.stop_token_ids
    uses = _union(
        *(
            feature
            for feature, is_used in (
                (Feature.BIAS, params.logit_bias or params.sequence_bias),
                (Feature.ENCODER_REPETITION_PENALTY, (params.encoder_repetition_penalty or 1.0) != 1.0),
                (Feature.REPETITION_PENALTY, (params.repetition_penalty or 1.0) != 1.0),
                (Feature.OUTPUT_PENALTY, params.frequency_penalty or params.presence_penalty),
                (Feature.NO_REPEAT_NGRAM, params.no_repeat_ngram_size),
                (Feature.ENCODER_NO_REPEAT_NGRAM, params.encoder_no_repeat_ngram_size),
                (Feature.BAD_WORDS, any(len(word) > 1 for word in words)),
                (Feature.BAN, any(len(word) == 1 for word in words)),
                (Feature.MIN_LENGTH, _has_minimum(request)),
                (Feature.ALLOWED, params.allowed_token_ids is not None or params.structured_output is not None),
                (Feature.FORCED_BOS, params.forced_bos_token_id is not None),
                (Feature.FORCED_EOS, params.forced_eos_token_id),
                (Feature.REMOVE_INVALID, params.remove_invalid_values),
                (Feature.DECAY, params.exponential_decay_length_penalty is not None and has_end),
                (Feature.SUPPRESS, params.suppress_tokens),
                (Feature.BEGIN_SUPPRESS, params.begin_suppress_tokens),
                (WATERMARK, params.watermarking_config is not None),
                (Feature.RENORMALIZE, params.renormalize_logits),
                (Feature.LOGPROBS, request.logprobs is not None),
            )
            if is_used
        )
    )
    if params.do_sample and params.temperature != 0.0:
        uses |= Feature.SAMPLE | _warpers_of(params)
    return uses


def bad_words_of(request: NewRequest) -> list[list[int]]:
    """Without those that are just EOS: a checkpoint may name one, and transformers drops it."""
    ends = {(token,) for token in (*request.eos_token_ids, *request.stop_token_ids)}
    return [word for word in request.params.bad_words_ids if tuple(word) not in ends]


def _has_minimum(request: NewRequest) -> bool:
    minimum = request.params.min_length or request.params.min_new_tokens
    return bool(minimum and (request.eos_token_ids or request.stop_token_ids))


def _warpers_of(params: GenerationParams) -> Feature:
    return _union(
        *(
            feature
            for feature, is_used in (
                (Feature.TEMPERATURE, params.temperature is not None and params.temperature != 1.0),
                (Feature.TOP_H, params.top_h is not None),
                (Feature.TOP_K, params.top_k),
                (Feature.TOP_P, params.top_p is not None and params.top_p < 1.0),
                (Feature.MIN_P, params.min_p),
                (Feature.TYPICAL_P, params.typical_p is not None and params.typical_p < 1.0),
                (Feature.EPSILON_CUTOFF, params.epsilon_cutoff),
                (Feature.ETA_CUTOFF, params.eta_cutoff),
            )
            if is_used
        )
    )
