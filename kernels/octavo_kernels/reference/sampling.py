"""The specification of `sampling.py`: one row at a time, in plain torch, over the device's state.

Steps and their order are those of transformers' generate(); filters are intervals, ties at a bound kept. Random numbers
are the caller's: argmax(softmax(x) / q).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from octavo_kernels.state import Bitmap, Feature, Param, SlotState

TOP_H_CANDIDATES = 100


def process_row(
    logits: Tensor, state: SlotState, slot: int, adjusted: Tensor | None, banned: Tensor | None, *, reciprocal: bool
) -> Tensor:
    """Steps 2 to 16, and 18 where the row samples: fp32 [V].

    logits: [V] in the model's type. adjusted: fp32 [V] scores after step 4a where BIAS or OUTPUT_PENALTY is set.
    banned: bool [V] where an n-gram or bad-word bit is set: the bans of this step.
    """
    row = _Row(state, slot)
    x = logits.float().clone() if adjusted is None else adjusted.clone()
    if adjusted is None and row.uses(Feature.ENCODER_REPETITION_PENALTY):
        x = _penalize(x, row.bits(Bitmap.PROMPT_SEEN), row.number(Param.ENCODER_REPETITION_PENALTY), reciprocal)
    if adjusted is None and row.uses(Feature.REPETITION_PENALTY):
        x = _penalize(x, row.bits(Bitmap.SEEN), row.number(Param.REPETITION_PENALTY), reciprocal)
    if banned is not None:
        x[banned] = -math.inf
    if row.uses(Feature.BAN):
        x[row.bits(Bitmap.BAN)] += -math.inf
    if row.uses(Feature.MIN_LENGTH) and row.length < row.integer(Param.MIN_TOTAL):
        x[row.bits(Bitmap.END)] = -math.inf
    if row.uses(Feature.ALLOWED):
        allowed = row.bits(Bitmap.ALLOWED)
        kept = torch.zeros_like(x) if bool((x[allowed] == -math.inf).all()) else x
        x = torch.where(allowed, kept, -math.inf)
    if row.uses(Feature.FORCED_BOS) and row.length == 1:
        x = torch.full_like(x, -math.inf)
        x[row.integer(Param.FORCED_BOS)] = 0.0
    if row.uses(Feature.FORCED_EOS) and row.length == row.integer(Param.MAX_LENGTH) - 1:
        x = torch.where(row.bits(Bitmap.FORCED_EOS), 0.0, torch.full_like(x, -math.inf))
    if row.uses(Feature.REMOVE_INVALID):
        limits = torch.finfo(x.dtype)
        x = torch.nan_to_num(x, nan=0.0, posinf=limits.max, neginf=limits.min)
    steps = row.length - row.integer(Param.PROMPT_LEN) - row.integer(Param.DECAY_START)
    if row.uses(Feature.DECAY) and steps > 0:
        grows = row.bits(Bitmap.END) & x.isfinite()
        x = torch.where(grows, x + x.abs() * (row.decay_factor() ** steps - 1), x)
    if row.uses(Feature.SUPPRESS):
        x[row.bits(Bitmap.SUPPRESS)] = -math.inf
    if row.uses(Feature.BEGIN_SUPPRESS) and row.length == row.integer(Param.BEGIN_LENGTH):
        x[row.bits(Bitmap.BEGIN_SUPPRESS)] = -math.inf
    if row.uses(Feature.SAMPLE) and row.uses(Feature.TEMPERATURE):
        x = _divide(x, row.number(Param.TEMPERATURE), reciprocal)
    return x


def filter_row(scores: Tensor, state: SlotState, slot: int) -> tuple[float, float]:
    """(lo, hi): the survivors of all filters are lo <= x <= hi. scores: fp32 [V] from `process_row`."""
    row = _Row(state, slot)
    keep, infinite = row.integer(Param.MIN_KEEP), math.inf
    lo, hi = -infinite, infinite
    filters: tuple[tuple[Feature, Callable[[Tensor], tuple[float, float]]], ...] = (
        (Feature.TOP_H, lambda x: (_top_h(x, row.number(Param.TOP_H)), infinite)),
        (Feature.TOP_K, lambda x: (_kth_largest(x, max(row.integer(Param.TOP_K), keep)), infinite)),
        (Feature.TOP_P, lambda x: (min(_top_p(x, row.number(Param.TOP_P_TAIL)), _kth_largest(x, keep)), infinite)),
        (Feature.MIN_P, lambda x: (min(_min_p(x, row.number(Param.MIN_P)), _kth_largest(x, keep)), infinite)),
        (Feature.TYPICAL_P, lambda x: _typical_p(x, row.number(Param.TYPICAL_P), keep)),
        (
            Feature.EPSILON_CUTOFF,
            lambda x: (min(_likely(x, row.number(Param.EPSILON_CUTOFF)), _kth_largest(x, keep)), infinite),
        ),
        (Feature.ETA_CUTOFF, lambda x: (min(_eta(x, row.number(Param.ETA_CUTOFF)), _kth_largest(x, keep)), infinite)),
    )
    for feature, bounds in filters:
        if row.uses(feature):
            least, greatest = bounds(torch.where((scores >= lo) & (scores <= hi), scores, -infinite))
            lo, hi = max(lo, least), min(hi, greatest)
    return lo, hi


def choose(scores: Tensor, interval: tuple[float, float], noise: Tensor | None) -> int:
    """The first largest score, or with noise (fp32 [V]) the winner of the race over the interval."""
    if noise is None:
        return int(scores.argmax())
    kept = torch.where((scores >= interval[0]) & (scores <= interval[1]), scores, -math.inf)
    return int((kept.softmax(-1) / noise).argmax())


class _Row:
    """A slot's words, as numbers."""

    def __init__(self, state: SlotState, slot: int) -> None:
        self._state, self._slot = state, slot
        self._params = state.params[slot].cpu()
        self.length = int(state.length[slot])

    def integer(self, param: Param) -> int:
        return int(self._params[param])

    def number(self, param: Param) -> float:
        return float(self._params[param : param + 1].view(torch.float32))

    def decay_factor(self) -> float:
        words = self._params[[Param.DECAY_FACTOR, Param.DECAY_FACTOR_HIGH]].contiguous()
        return float(words.view(torch.float64))

    def uses(self, feature: Feature) -> bool:
        return bool(self.integer(Param.FEATURES) & feature)

    def bits(self, bitmap: Bitmap) -> Tensor:
        words = self._state.bitmaps[self._slot, bitmap]
        token = torch.arange(self._state.vocab_size, device=words.device)
        return (words[token // 32] >> (token % 32) & 1) != 0


def _divide(x: Tensor, divisor: float, reciprocal: bool) -> Tensor:
    number = torch.tensor(divisor, dtype=torch.float32, device=x.device)
    return x * number.reciprocal() if reciprocal else x / number


def _penalize(x: Tensor, seen: Tensor, penalty: float, reciprocal: bool) -> Tensor:
    return torch.where(seen, torch.where(x < 0, x * penalty, _divide(x, penalty, reciprocal)), x)


def _smallest(x: Tensor, kept: Tensor) -> float:
    """Of the kept scores, but at most the largest of all, which always survives."""
    return min(float(torch.where(kept, x, math.inf).amin()), float(x.amax()))


def _kth_largest(x: Tensor, k: int) -> float:
    return float(torch.topk(x, min(k, x.numel())).values[-1])


def _top_h(x: Tensor, top_h: float) -> float:
    best = torch.topk(x, min(TOP_H_CANDIDATES, x.numel())).values
    probs = best.softmax(-1)
    terms = -(probs * probs.log()).nan_to_num(0.0)
    kept = terms.cumsum(-1) <= terms.sum() * top_h
    kept[0] = True
    return float(best[kept].amin())


def _top_p(x: Tensor, tail: float) -> float:
    ascending = x.sort().values
    return _smallest(ascending, ascending.softmax(-1).cumsum(-1) > tail)


def _min_p(x: Tensor, min_p: float) -> float:
    probs = x.softmax(-1)
    return _smallest(x, probs >= min_p * probs.amax())


def _typical_p(x: Tensor, mass: float, keep: int) -> tuple[float, float]:
    log_probs = x.log_softmax(-1)
    distance = (-log_probs + (log_probs * log_probs.exp()).nansum()).abs()
    nearest = distance.sort()
    last = min(int((x[nearest.indices].softmax(-1).cumsum(-1) < mass).sum()), x.numel() - 1)
    inside = distance <= nearest.values[max(last, min(keep, x.numel()) - 1)]
    return float(x[inside].amin()), float(x[inside].amax())


def _likely(x: Tensor, floor: float) -> float:
    return _smallest(x, (x.softmax(-1) >= floor) & (x > -math.inf))


def _eta(x: Tensor, epsilon: float) -> float:
    probs = x.softmax(-1)
    entropy = -(probs * probs.log()).nansum()
    limit = torch.tensor(epsilon, device=x.device)
    return _likely(x, float(torch.minimum(limit, limit.sqrt() * torch.exp(-entropy))))
