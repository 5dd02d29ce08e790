"""The filters of sampling (transformers' logits warpers) as intervals of scores, without a sort of the row.

Each filter looks at the survivors lo <= x <= hi of those before it and moves lo up or hi down; tokens tied at a bound
all stay (docs/generation.md says where that differs from transformers). Bounds are found by masked passes over a row's
values: the k-th largest by four passes of a radix select, cumulative masses by bisection on a key whose unsigned order
is the order of the values (at most 32 passes). Where top_k or top_h leave few candidates they are copied out first, and
all later passes are one tile of registers.

Log
  passes over L2 against a sort of the row: a sort of 50257 is ~10 passes with shared-memory exchanges and needs 400 KB.
  Predicted: k-th largest 4 passes ~8 us, bisection ~32 passes ~60 us for a whole row (top_p without top_k), nothing for
  candidates. Not measured.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.state import Feature, Param
from octavo_kernels.workspace import WINDOW

_TOP_H = tl.constexpr(int(Feature.TOP_H))
_TOP_K = tl.constexpr(int(Feature.TOP_K))
_TOP_P = tl.constexpr(int(Feature.TOP_P))
_MIN_P = tl.constexpr(int(Feature.MIN_P))
_TYPICAL = tl.constexpr(int(Feature.TYPICAL_P))
_EPSILON = tl.constexpr(int(Feature.EPSILON_CUTOFF))
_ETA = tl.constexpr(int(Feature.ETA_CUTOFF))
_ANY = tl.constexpr(
    int(
        Feature.TOP_H
        | Feature.TOP_K
        | Feature.TOP_P
        | Feature.MIN_P
        | Feature.TYPICAL_P
        | Feature.EPSILON_CUTOFF
        | Feature.ETA_CUTOFF
    )
)
_TOP_K_VALUE = tl.constexpr(int(Param.TOP_K))
_TOP_P_TAIL = tl.constexpr(int(Param.TOP_P_TAIL))
_MIN_P_VALUE = tl.constexpr(int(Param.MIN_P))
_TYPICAL_P = tl.constexpr(int(Param.TYPICAL_P))
_TOP_H_VALUE = tl.constexpr(int(Param.TOP_H))
_EPSILON_CUTOFF = tl.constexpr(int(Param.EPSILON_CUTOFF))
_ETA_CUTOFF = tl.constexpr(int(Param.ETA_CUTOFF))
_MIN_KEEP = tl.constexpr(int(Param.MIN_KEEP))
_TOP_H_CANDIDATES = tl.constexpr(100)  # TopHLogitsWarper looks at no more
_WINDOW = tl.constexpr(WINDOW)


@triton.jit
def _param(params, column):
    return tl.load(params + column).to(tl.float32, bitcast=True)


@triton.jit
def ordered_key(x):
    """uint32 whose unsigned order is that of the fp32 values."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def value_of_key(key):
    bits = tl.where((key >> 31) != 0, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _survivors(values, start, width, lo, hi, TILE_V: tl.constexpr):
    """A tile of values, -inf where dropped."""
    index = start + tl.arange(0, TILE_V)
    x = tl.load(values + index, mask=index < width, other=-float("inf"))
    return tl.where((x >= lo) & (x <= hi), x, -float("inf"))


@triton.jit
def _peak_and_total(values, width, lo, hi, TILE_V: tl.constexpr):
    """The largest survivor and the sum of exp(x - largest): softmax's denominator."""
    peak = -float("inf")
    for start in range(0, width, TILE_V):
        peak = tl.maximum(peak, tl.max(_survivors(values, start, width, lo, hi, TILE_V), 0))
    total = 0.0
    for start in range(0, width, TILE_V):
        total += tl.sum(tl.exp(_survivors(values, start, width, lo, hi, TILE_V) - peak), 0)
    return peak, total


@triton.jit
def _entropy(values, width, lo, hi, peak, total, TILE_V: tl.constexpr):
    """-sum p ln p of the survivors."""
    log_total = tl.log(total)
    entropy = 0.0
    for start in range(0, width, TILE_V):
        x = _survivors(values, start, width, lo, hi, TILE_V)
        log_p = x - peak - log_total
        entropy -= tl.sum(tl.where(x > -float("inf"), log_p * tl.exp(log_p), 0.0), 0)
    return entropy


@triton.jit
def _kth_largest(values, width, lo, hi, k, TILE_V: tl.constexpr):
    """The k-th largest survivor; -inf if there are fewer."""
    found = tl.full([], 0, tl.uint32)
    wanted = k
    bins = tl.arange(0, 256)
    for level in tl.static_range(4):
        shift: tl.constexpr = 24 - 8 * level
        counts = tl.zeros([256], tl.int32)
        for start in range(0, width, TILE_V):
            x = _survivors(values, start, width, lo, hi, TILE_V)
            key = ordered_key(x)
            live = x > -float("inf")
            if level > 0:
                live = live & ((key >> (shift + 8)) == (found >> (shift + 8)))
            digits = tl.where(live, ((key >> shift) & 255).to(tl.int32), 0)
            counts += tl.histogram(digits, 256) - tl.where(bins == 0, tl.sum((~live).to(tl.int32), 0), 0)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.max(tl.where(at_least >= wanted, bins, -1), 0)
        if digit >= 0:
            wanted -= tl.sum(tl.where(bins > digit, counts, 0), 0)
            found = found | (digit.to(tl.uint32) << shift)
        else:
            wanted = 2147483647 + wanted * 0
    return tl.where(wanted == 2147483647, -float("inf"), value_of_key(found))


@triton.jit
def _compact(values, width, lo, hi, out_values, out_ids, TILE_V: tl.constexpr):
    """Copies the survivors of a row, in order of their tokens, if there are at most WINDOW; their number, else -1."""
    count = 0
    for start in range(0, width, TILE_V):
        count += tl.sum((_survivors(values, start, width, lo, hi, TILE_V) > -float("inf")).to(tl.int32), 0)
    if count > _WINDOW:
        count = -1 + count * 0
    else:
        place = 0
        for start in range(0, width, TILE_V):
            x = _survivors(values, start, width, lo, hi, TILE_V)
            live = x > -float("inf")
            number = tl.sum(live.to(tl.int32), 0)
            if number > 0:
                where = place + tl.cumsum(live.to(tl.int32), 0) - 1
                tl.store(out_values + where, x, mask=live)
                tl.store(out_ids + where, start + tl.arange(0, TILE_V), mask=live)
                place += number
    return count


@triton.jit
def _mass_up_to(values, width, lo, hi, bound, peak, TILE_V: tl.constexpr):
    mass = 0.0
    for start in range(0, width, TILE_V):
        x = _survivors(values, start, width, lo, hi, TILE_V)
        mass += tl.sum(tl.where(x <= bound, tl.exp(x - peak), 0.0), 0)
    return mass


@triton.jit
def _top_p(values, width, lo, hi, tail, TILE_V: tl.constexpr):
    """The smallest survivor whose cumulative probability, from below, exceeds tail."""
    peak, total = _peak_and_total(values, width, lo, hi, TILE_V)
    low_key = tl.full([], 0, tl.uint32)
    high_key = ordered_key(peak)
    while low_key < high_key:
        middle = low_key + (high_key - low_key) // 2
        mass = _mass_up_to(values, width, lo, hi, value_of_key(middle), peak, TILE_V) / total
        if mass > tail:
            high_key = middle
        else:
            low_key = middle + 1
    return value_of_key(low_key)


@triton.jit
def _likely(values, width, lo, hi, floor, peak, total, TILE_V: tl.constexpr):
    """The smallest survivor whose probability is at least floor; the largest if none is."""
    bound = peak
    for start in range(0, width, TILE_V):
        x = _survivors(values, start, width, lo, hi, TILE_V)
        enough = (x > -float("inf")) & (tl.exp(x - peak) / total >= floor)
        bound = tl.minimum(bound, tl.min(tl.where(enough, x, float("inf")), 0))
    return bound


@triton.jit
def _distance(x, peak, log_total, entropy):
    """How far a token's surprise is from the entropy; +inf for dropped ones."""
    return tl.where(x > -float("inf"), tl.abs(peak + log_total - x - entropy), float("inf"))


@triton.jit
def _typical(values, width, lo, hi, mass, keep, TILE_V: tl.constexpr):
    """Bounds of the tokens nearest to the entropy, until they have `mass`, but at least `keep` of them."""
    peak, total = _peak_and_total(values, width, lo, hi, TILE_V)
    entropy = _entropy(values, width, lo, hi, peak, total, TILE_V)
    log_total = tl.log(total)
    low_key = tl.full([], 0, tl.uint32)
    high_key = tl.full([], 0x7F800000, tl.uint32)
    while low_key < high_key:
        middle = low_key + (high_key - low_key) // 2
        radius = middle.to(tl.float32, bitcast=True)
        inside_mass = 0.0
        count = 0
        for start in range(0, width, TILE_V):
            x = _survivors(values, start, width, lo, hi, TILE_V)
            inside = _distance(x, peak, log_total, entropy) <= radius
            inside_mass += tl.sum(tl.where(inside, tl.exp(x - peak), 0.0), 0)
            count += tl.sum(inside.to(tl.int32), 0)
        if (inside_mass / total >= mass) & (count >= keep):
            high_key = middle
        else:
            low_key = middle + 1
    radius = low_key.to(tl.float32, bitcast=True)
    least = float("inf")
    greatest = -float("inf")
    for start in range(0, width, TILE_V):
        x = _survivors(values, start, width, lo, hi, TILE_V)
        inside = (x > -float("inf")) & (_distance(x, peak, log_total, entropy) <= radius)
        least = tl.minimum(least, tl.min(tl.where(inside, x, float("inf")), 0))
        greatest = tl.maximum(greatest, tl.max(tl.where(inside, x, -float("inf")), 0))
    return least, greatest


@triton.jit
def _top_h(values, count, lo, top_h):
    """The last of the 100 largest, falling, at which the sum of the entropy terms is at most top_h of that of all 100.

    values: at most WINDOW of them, the survivors among which the 100 largest are.
    """
    index = tl.arange(0, _WINDOW)
    x = tl.load(values + index, mask=index < count, other=-float("inf"))
    x = tl.sort(tl.where(x >= lo, x, -float("inf")), descending=True)
    x = tl.where(index < _TOP_H_CANDIDATES, x, -float("inf"))
    peak = tl.max(x, 0)
    log_p = x - peak - tl.log(tl.sum(tl.exp(x - peak), 0))
    terms = tl.where(x > -float("inf"), -log_p * tl.exp(log_p), 0.0)
    kept = (tl.cumsum(terms, 0) <= tl.sum(terms, 0) * top_h) | (index == 0)
    return tl.min(tl.where(kept & (x > -float("inf")), x, float("inf")), 0)


@triton.jit
def _at_least(values, width, lo, hi, bound, keep, TILE_V: tl.constexpr):
    """bound, but no higher than the keep-th largest survivor."""
    if keep > 1:
        bound = tl.minimum(bound, _kth_largest(values, width, lo, hi, keep, TILE_V))
    return bound


@triton.jit
def _after_top_k(values, width, lo, hi, params, features, TILE_V: tl.constexpr):
    """(lo, hi) after top_p, min_p, typical_p, epsilon and eta."""
    keep = tl.load(params + _MIN_KEEP)
    if (features & _TOP_P) != 0:
        bound = _top_p(values, width, lo, hi, _param(params, _TOP_P_TAIL), TILE_V)
        lo = tl.maximum(lo, _at_least(values, width, lo, hi, bound, keep, TILE_V))
    if (features & _MIN_P) != 0:
        peak, total = _peak_and_total(values, width, lo, hi, TILE_V)
        floor = _param(params, _MIN_P_VALUE) * (1.0 / total)
        bound = _likely(values, width, lo, hi, floor, peak, total, TILE_V)
        lo = tl.maximum(lo, _at_least(values, width, lo, hi, bound, keep, TILE_V))
    if (features & _TYPICAL) != 0:
        least, greatest = _typical(values, width, lo, hi, _param(params, _TYPICAL_P), keep, TILE_V)
        lo = tl.maximum(lo, least)
        hi = tl.minimum(hi, greatest)
    if (features & _EPSILON) != 0:
        peak, total = _peak_and_total(values, width, lo, hi, TILE_V)
        bound = _likely(values, width, lo, hi, _param(params, _EPSILON_CUTOFF), peak, total, TILE_V)
        lo = tl.maximum(lo, _at_least(values, width, lo, hi, bound, keep, TILE_V))
    if (features & _ETA) != 0:
        peak, total = _peak_and_total(values, width, lo, hi, TILE_V)
        epsilon = _param(params, _ETA_CUTOFF)
        entropy = _entropy(values, width, lo, hi, peak, total, TILE_V)
        floor = tl.minimum(epsilon, tl.sqrt_rn(epsilon) * tl.exp(-entropy))
        bound = _likely(values, width, lo, hi, floor, peak, total, TILE_V)
        lo = tl.maximum(lo, _at_least(values, width, lo, hi, bound, keep, TILE_V))
    return lo, hi


@triton.jit
def filter_row(scores, values, ids, params, features, vocab_size, peak, TILE_V: tl.constexpr):
    """(lo, hi, width) of a row of scores over the temperature, the largest of which is `peak`.

    width: how many candidates were copied to `values` and `ids`, the survivors among them; -1: none were.
    """
    lo = -float("inf")
    hi = peak
    width = -1
    if (features & _ANY) == 0:
        return lo, hi, width
    if (features & _TOP_H) != 0:
        lo = _kth_largest(scores, vocab_size, lo, hi, _TOP_H_CANDIDATES, TILE_V)
        width = _compact(scores, vocab_size, lo, hi, values, ids, TILE_V)
        tl.debug_barrier()
        if width >= 0:
            lo = tl.maximum(lo, _top_h(values, width, lo, _param(params, _TOP_H_VALUE)))
        width = -1 + width * 0
    if (features & _TOP_K) != 0:
        k = tl.maximum(tl.load(params + _TOP_K_VALUE), tl.load(params + _MIN_KEEP))
        if k < vocab_size:
            lo = tl.maximum(lo, _kth_largest(scores, vocab_size, lo, hi, k, TILE_V))
    if (features & (_TOP_H | _TOP_K)) != 0:
        width = _compact(scores, vocab_size, lo, hi, values, ids, TILE_V)
        tl.debug_barrier()
    if width >= 0:
        lo, hi = _after_top_k(values, width, lo, hi, params, features, _WINDOW)
    else:
        lo, hi = _after_top_k(scores, vocab_size, lo, hi, params, features, TILE_V)
    return lo, hi, width
