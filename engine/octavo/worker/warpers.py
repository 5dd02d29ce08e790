"""Logits warpers: the filters of sampling, in transformers' order, each as an interval of scores that survive.

Every warper sees the survivors of the one before, renormalised: dropped tokens are -inf in the row. Its own survivors
are those with lo <= x <= hi, so all tokens tied at a bound stay; TopPLogitsWarper keeps those that its unstable sort
happens to put on the right side. Everything is a function of the row alone: sums run in an order (or in a precision)
that does not depend on the other rows.

The fast path sees the W largest scores of a row only. That changes no sum: what it leaves out is dropped by top_k
already and adds zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.step import Int32s
from octavo.worker.features import Feature
from octavo.worker.logits import divide
from octavo.worker.request_states import TOP_H_CANDIDATES, SamplingParamArrays

Bound = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From scores [F, K] and a parameter [F, 1] to (lo, hi) [F, 1]: what survives."""
VECTOR_WIDTH = 64
"""A multiple of the lanes of any CPU's softmax. A window keeps its columns' places modulo this, so that its sums are
those of the whole sorted row, bit for bit."""


def scale(scores: Tensor, slots: Int32s, features: npt.NDArray[np.uint32], params: SamplingParamArrays) -> Tensor:
    """TemperatureLogitsWarper: [F, K] scores over each row's temperature. The same tensor if all are 1."""
    if not (features & Feature.TEMPERATURE).any():
        return scores
    return divide(scores, torch.from_numpy(params.temperature[slots][:, None]).to(scores.device))


def largest(scores: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The `window` largest of each row, ascending, behind a margin of -inf.

    Returns:
        scores float32 [F, window + V % 64] and token ids int64 of the same shape (0 in the margin).
    """
    vocab_size = scores.shape[1]
    margin = vocab_size % VECTOR_WIDTH
    values = torch.full((scores.shape[0], margin + window), -math.inf, device=scores.device)
    token_ids = torch.zeros(values.shape, dtype=torch.int64, device=scores.device)
    if scores.is_cpu:  # several times faster than torch.topk
        numpy_scores = scores.numpy()
        for row in range(scores.shape[0]):
            found = np.argpartition(numpy_scores[row], vocab_size - window)[vocab_size - window :]
            found = found[np.argsort(numpy_scores[row, found], kind="stable")]
            token_ids[row, margin:] = torch.from_numpy(found)
        values[:, margin:] = scores.gather(1, token_ids[:, margin:])
        return values, token_ids
    top = torch.topk(scores, window)
    values[:, margin:] = top.values.flip(1)
    token_ids[:, margin:] = top.indices.flip(1)
    return values, token_ids


def spills(scores: Tensor, window: int, top_k: Int32s) -> npt.NDArray[np.bool_]:
    """[F] whether tokens outside the window may be tied with the top_k-th largest, in scaled scores from `largest`."""
    column = torch.from_numpy(scores.shape[1] - top_k.astype(np.int64))[:, None].to(scores.device)
    kth = scores.gather(1, column)[:, 0]
    tied: npt.NDArray[np.bool_] = ((kth == scores[:, scores.shape[1] - window]) & (kth > -math.inf)).cpu().numpy()
    return tied


def filter_scores(
    scores: Tensor, slots: Int32s, features: npt.NDArray[np.uint32], params: SamplingParamArrays, min_keep: int = 1
) -> Tensor:
    """Runs all filters in order: [F, K] with the dropped tokens at -inf.

    Args:
        scores: [F, K] scaled; ascending in each row when a row uses top_k or top_p.
        min_keep: tokens that every filter but top_h leaves, if there are as many.
    """
    for feature, bound, values in (
        (Feature.TOP_H, _top_h, params.top_h),
        (Feature.TOP_K, _top_k, params.top_k),
        (Feature.TOP_P, _top_p, params.top_p_tail),
        (Feature.MIN_P, _min_p, params.min_p),
        (Feature.TYPICAL_P, _typical_p, params.typical_p),
        (Feature.EPSILON_CUTOFF, _epsilon_cutoff, params.epsilon_cutoff),
        (Feature.ETA_CUTOFF, _eta_cutoff, params.eta_cutoff),
    ):
        rows = np.flatnonzero(features & feature)
        if len(rows) == 0:
            continue
        parameter = torch.from_numpy(values[slots[rows]][:, None]).to(scores.device)
        if min_keep > 1:
            assert len(rows) == scores.shape[0], "the rows of one beam search have the same filters"
            scores = keep_interval(scores, *_wide_enough(feature, bound, scores, parameter, min_keep))
        elif len(rows) == scores.shape[0]:
            scores = keep_interval(scores, *bound(scores, parameter))
        else:
            index = torch.from_numpy(rows).to(scores.device)
            subset = scores[index]
            scores = scores.index_copy(0, index, keep_interval(subset, *bound(subset, parameter)))
    return scores


def ranked_interval(
    scores: Tensor, slots: Int32s, features: npt.NDArray[np.uint32], params: SamplingParamArrays, min_keep: int = 1
) -> tuple[Tensor, Tensor]:
    """(lo, hi), each [F, 1], of what all filters leave of whole rows [F, V] of scaled scores in any order."""
    if scores.is_cpu:  # an order of magnitude faster than torch.sort, which carries indices
        ascending = torch.from_numpy(np.sort(scores.numpy(), axis=1))
    else:
        ascending = scores.sort(-1).values
    kept = filter_scores(ascending, slots, features, params, min_keep)
    return torch.where(kept > -math.inf, kept, math.inf).amin(-1, keepdim=True), kept.amax(-1, keepdim=True)


def keep_interval(scores: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """[F, K] with what lies outside [lo, hi] (each [F, 1]) at -inf."""
    return scores.masked_fill((scores < lo) | (scores > hi), -math.inf)


def _wide_enough(
    feature: Feature, bound: Bound, scores: Tensor, parameter: Tensor, min_keep: int
) -> tuple[Tensor, Tensor]:
    """The bounds of a filter that leaves at least `min_keep` tokens (transformers' min_tokens_to_keep)."""
    if feature == Feature.TYPICAL_P:
        return _typical_p(scores, parameter, min_keep)
    lo, hi = bound(scores, parameter)
    if feature == Feature.TOP_H:
        return lo, hi
    return torch.minimum(lo, torch.topk(scores, min(min_keep, scores.shape[1])).values[:, -1:]), hi


def _infinite(like: Tensor) -> Tensor:
    return torch.full_like(like, math.inf)


def _smallest(scores: Tensor, kept: Tensor) -> Tensor:
    """[F, 1] the smallest of the kept scores, but at most the largest of all, which always survives."""
    return torch.minimum(torch.where(kept, scores, math.inf).amin(-1, keepdim=True), scores.amax(-1, keepdim=True))


def _top_h(scores: Tensor, top_h: Tensor) -> tuple[Tensor, Tensor]:
    """TopHLogitsWarper: of the 100 largest, falling, those whose entropy terms add up to at most top_h of all 100's."""
    best = scores[:, -min(TOP_H_CANDIDATES, scores.shape[1]) :].flip(1)
    distribution = torch.distributions.Categorical(logits=best, validate_args=False)
    terms = -distribution.probs * torch.log(distribution.probs)
    kept = terms.cumsum(-1) <= _entropy(distribution) * top_h
    kept[:, 0] = True
    lo = torch.where(kept, best, math.inf).amin(-1, keepdim=True)
    return lo, _infinite(lo)


def _top_k(scores: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """TopKLogitsWarper: from the k-th largest up."""
    lo = scores.gather(1, scores.shape[1] - top_k.long())
    return lo, _infinite(lo)


def _top_p(scores: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """TopPLogitsWarper: drops from below while the cumulative probability is at most 1 - top_p."""
    lo = _smallest(scores, scores.softmax(-1).cumsum(-1) > tail)
    return lo, _infinite(lo)


def _min_p(scores: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """MinPLogitsWarper: drops tokens less likely than min_p times the most likely one."""
    probs = scores.softmax(-1)
    lo = _smallest(scores, probs >= min_p * probs.amax(-1, keepdim=True))
    return lo, _infinite(lo)


def _typical_p(scores: Tensor, mass: Tensor, min_keep: int = 1) -> tuple[Tensor, Tensor]:
    """TypicalLogitsWarper: the tokens whose surprise is closest to the entropy, until they have `mass`."""
    log_probs = scores.log_softmax(-1)
    # The sum is in double, since the order of a float32 sum depends on the batch's shape.
    entropy = -(log_probs * log_probs.exp()).nan_to_num_(0.0).sum(-1, keepdim=True, dtype=torch.float64).float()
    distance = (-log_probs - entropy).abs()
    nearest = distance.sort(-1)
    cumulative = scores.gather(1, nearest.indices).softmax(-1).cumsum(-1)
    last = (cumulative < mass).sum(-1, keepdim=True).clamp_(min=min_keep - 1).clamp_(max=scores.shape[1] - 1)
    inside = distance <= nearest.values.gather(1, last)
    lo = torch.where(inside, scores, math.inf).amin(-1, keepdim=True)
    hi = torch.where(inside, scores, -math.inf).amax(-1, keepdim=True)
    return lo, hi


def _epsilon_cutoff(scores: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """EpsilonLogitsWarper: drops tokens less likely than the cut-off."""
    return _above(scores, floor)


def _eta_cutoff(scores: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """EtaLogitsWarper: the cut-off falls with the entropy."""
    entropy = _entropy(torch.distributions.Categorical(logits=scores, validate_args=False))
    return _above(scores, torch.minimum(epsilon, epsilon.sqrt() * torch.exp(-entropy)))


def _entropy(distribution: torch.distributions.Categorical) -> Tensor:
    """[F, 1]"""
    entropy: Tensor = distribution.entropy()  # type: ignore[no-untyped-call]
    return entropy[:, None]


def _above(scores: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    lo = _smallest(scores, (scores.softmax(-1) >= floor) & (scores > -math.inf))
    return lo, _infinite(lo)
