"""The largest scores of a row that samples, few enough for registers: all that its filters and its draw look at.

Which they are follows from the maxima of the lanes of a tile, which processing the row has left (`row_scores.py`).

Log (variants, what they gave; sm_90, Triton 3.7.1; no GPU was at hand: times are predictions, not measured)
  radix select of the k-th largest, four histograms of the row: 4 passes and shared atomics, ~10 us. Here the first pass
  over the row leaves the maximum of each of TILE lanes: the k-th largest of those is at most the row's k-th, and barely
  less, so the next pass copies little more than k candidates. Two passes in all.
  top_p, min_p and epsilon first: 1024 candidates nearly always hold what survives. The mass outside is summed on the
  way; if it is larger than what top_p drops, or might survive a floor, the row takes the slow path.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.filters import TOP_H_CANDIDATES
from octavo_kernels.row_scores import tile_of_scores
from octavo_kernels.state import Feature, Param
from octavo_kernels.survivors import key_of, mean_up, value_of
from octavo_kernels.workspace import WINDOW

_TOP_H = tl.constexpr(int(Feature.TOP_H))
_TOP_K = tl.constexpr(int(Feature.TOP_K))
_TOP_K_VALUE = tl.constexpr(int(Param.TOP_K))
_MIN_KEEP = tl.constexpr(int(Param.MIN_KEEP))
_GUESS = tl.constexpr(1024)
_WINDOW = tl.constexpr(WINDOW)

MOST_RANKED = tl.constexpr(1024)
"""The largest top_k whose candidates are looked for."""


@triton.jit
def num_candidates(params_ptr, features):
    """How many of the largest scores hold what survives the first filter; more than MOST_RANKED: unknown."""
    count = _GUESS
    if (features & _TOP_K) != 0:
        count = tl.maximum(tl.load(params_ptr + _TOP_K_VALUE), tl.load(params_ptr + _MIN_KEEP))
    if (features & _TOP_H) != 0:
        count = TOP_H_CANDIDATES
    return count


@triton.jit
def is_guess(features):
    """Whether num_candidates is only likely to be enough."""
    return (features & (_TOP_H | _TOP_K)) == 0


@triton.jit
def threshold_of_lanes(lanes, k):
    """A value that at least k of the lanes' maxima reach, and few more; -inf if fewer are finite.

    At least as many scores reach it, so the k-th largest score does too.
    """
    finite = lanes > -float("inf")
    found = tl.sum(finite.to(tl.int32), 0)
    enough = found >= k
    low = key_of(tl.min(tl.where(finite, lanes, float("inf")), 0))
    high = key_of(tl.max(lanes, 0))
    while (low < high) & (found > k + k // 8):
        middle = mean_up(low, high)
        count = tl.sum((lanes >= value_of(middle)).to(tl.int32), 0)
        if count >= k:
            low = middle
            found = count
        else:
            high = middle - 1
    return tl.where(enough, value_of(low), -float("inf"))


@triton.jit
def copy_candidates(
    logits_ptr, scores_ptr, values_ptr, ids_ptr, params_ptr, features, peak, threshold, num_columns, vocab_size,
    RECIPROCAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Copies the finite scores from threshold on, in order of their tokens, as many as fit.

    Returns their number and the sum of exp(x - peak) of the others, 0 unless the candidates are a guess.
    """
    count = 0
    rest = 0.0
    for start in range(0, num_columns, TILE):
        token = start + tl.arange(0, TILE)
        x = tile_of_scores(logits_ptr, scores_ptr, token, params_ptr, features, num_columns, vocab_size, RECIPROCAL)
        chosen = (x >= threshold) & (x > -float("inf"))
        if is_guess(features):
            rest += tl.sum(tl.where(chosen, 0.0, tl.exp(x - peak)), 0)
        number = tl.sum(chosen.to(tl.int32), 0)
        if number > 0:
            place = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
            fits = chosen & (place < _WINDOW)
            tl.store(values_ptr + place, x, mask=fits)
            tl.store(ids_ptr + place, token, mask=fits)
        count += number
    return count, rest
