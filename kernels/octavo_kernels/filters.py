"""The filters of sampling (transformers' logits warpers) as intervals of scores, without a sort of the row.

Each filter sees the survivors lo <= x <= hi of those before it, renormalised, and moves lo up or hi down; tokens tied
at a bound all stay. A bound need not be the score of a token: only who is inside counts. What a filter asks of a row
are sums over scores from some value on, so a bound is found by bisection on an int32 key that orders fp32 values.

The same functions work on two sources (`survivors.py`): WINDOW candidates of a row in registers (`candidates.py`), or a
whole row in memory.

Log (variants, what they gave; sm_90, Triton 3.7.1; no GPU was at hand: times are predictions, not measured)
  sort of the candidates: 66 exchange steps of 2048 values, half of them through shared memory, and 250 kB of code;
  bisection is ~25 sums of 8 values per thread for a filter that ranks and nothing for those with a floor. ~1.5 us each.
  slow path: at most 32 passes for a filter that ranks, ~2 us each from L2; of top_p about 6, until the bracket fits the
  registers. For flat rows without top_k, typical_p without top_k, constant rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.state import Feature, Param
from octavo_kernels.survivors import (
    count_from,
    entropy_of,
    key_of,
    kth_largest,
    largest_below,
    least_of,
    mean_of,
    survivors,
    term,
    terms_from,
    total_of,
    value_of,
)

_TOP_H = tl.constexpr(int(Feature.TOP_H))
_TOP_K = tl.constexpr(int(Feature.TOP_K))
_TOP_P = tl.constexpr(int(Feature.TOP_P))
_MIN_P = tl.constexpr(int(Feature.MIN_P))
_TYPICAL_P = tl.constexpr(int(Feature.TYPICAL_P))
_EPSILON = tl.constexpr(int(Feature.EPSILON_CUTOFF))
_ETA = tl.constexpr(int(Feature.ETA_CUTOFF))
_TOP_H_VALUE = tl.constexpr(int(Param.TOP_H))
_TOP_K_VALUE = tl.constexpr(int(Param.TOP_K))
_TOP_P_TAIL = tl.constexpr(int(Param.TOP_P_TAIL))
_MIN_P_VALUE = tl.constexpr(int(Param.MIN_P))
_TYPICAL_P_VALUE = tl.constexpr(int(Param.TYPICAL_P))
_EPSILON_VALUE = tl.constexpr(int(Param.EPSILON_CUTOFF))
_ETA_VALUE = tl.constexpr(int(Param.ETA_CUTOFF))
_MIN_KEEP = tl.constexpr(int(Param.MIN_KEEP))

TOP_H_CANDIDATES = tl.constexpr(100)
"""TopHLogitsWarper looks at no more."""

FILTERS = tl.constexpr(
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


@triton.jit
def float_param(params_ptr, COLUMN: tl.constexpr):
    return tl.load(params_ptr + COLUMN).to(tl.float32, bitcast=True)


@triton.jit
def _keep_bound(row_ptr, resident, width, lo, hi, keep, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """The highest bound that leaves `keep` survivors to filters that move lo; hi is the largest survivor."""
    bound = hi
    if keep > 1:
        bound = kth_largest(row_ptr, resident, width, lo, hi, hi, keep, TILE, RESIDENT)
    return bound


@triton.jit
def _top_h(row_ptr, resident, width, lo, hi, peak, top_h, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """Of the 100 largest, falling, those whose entropy terms add up to at most top_h of all 100's; always the first.

    Of the tokens tied with the hundredth, as many count for the entropy as make 100.
    """
    hundredth = kth_largest(row_ptr, resident, width, lo, hi, peak, TOP_H_CANDIDATES, TILE, RESIDENT)
    above = value_of(key_of(tl.maximum(hundredth, lo)) + 1)  # the next value
    if hundredth == -float("inf"):
        above = lo
    copies = TOP_H_CANDIDATES - count_from(
        row_ptr, resident, width, above, hi, tl.maximum(above, -3.4028234663852886e38), TILE, RESIDENT
    )
    last = copies.to(tl.float32) * tl.exp(hundredth - peak)
    total = total_of(row_ptr, resident, width, above, hi, peak, TILE, RESIDENT) + last
    inverse = tl.math.div_rn(1.0, total)
    log_total = tl.log(total)
    entropy = entropy_of(row_ptr, resident, width, above, hi, peak, total, TILE, RESIDENT)
    entropy += copies.to(tl.float32) * term(hundredth, peak, inverse, log_total)
    limit = entropy * top_h
    lo = tl.maximum(lo, hundredth)
    # A probability of 0 gives transformers a NaN, which ends its prefix.
    least = least_of(row_ptr, resident, width, lo, hi, peak, inverse, 1e-45, TILE, RESIDENT)
    low = key_of(least)
    high = key_of(peak) + 1
    while low < high:
        middle = mean_of(low, high)
        sum_of_terms = terms_from(
            row_ptr, resident, width, lo, hi, value_of(middle), peak, inverse, log_total, TILE, RESIDENT
        )
        if sum_of_terms <= limit:
            high = middle
        else:
            low = middle + 1
    bound = value_of(low)
    if low > key_of(least):  # of those tied next below, one may fit where all do not
        below = largest_below(row_ptr, resident, width, lo, hi, bound, TILE, RESIDENT)
        sum_of_terms = terms_from(row_ptr, resident, width, lo, hi, bound, peak, inverse, log_total, TILE, RESIDENT)
        fits = sum_of_terms + term(below, peak, inverse, log_total) <= limit
        bound = tl.where(fits | (below == peak), below, bound)
    return bound


@triton.jit
def _narrow(
    row_ptr, resident, width, low, high, before, tail, peak, inverse, few, TILE: tl.constexpr, RESIDENT: tl.constexpr
):
    """Keys (low, high) between which the first score is at which the probabilities so far exceed tail.

    before: the mass below low, also what is returned third. Ends when at most `few` scores are from low to high.
    """
    inside = few + 1
    while (low < high) & (inside > few):
        middle = mean_of(low, high)
        sums = tl.zeros([TILE], tl.float32)
        counts = tl.zeros([TILE], tl.int32)
        for start in range(0, width, TILE):
            x = survivors(row_ptr, resident, start, width, -float("inf"), float("inf"), TILE, RESIDENT)
            key = key_of(x)  # which tells -0 from 0, so that none counts twice
            within = (key >= low) & (key <= high)
            sums += tl.where(within & (key <= middle), tl.exp(x - peak) * inverse, 0.0)
            if not RESIDENT:
                counts += (within & (key > middle)).to(tl.int32) + (within.to(tl.int32) << 16)
        mass = tl.sum(sums, 0)
        exceeds = before + mass > tail
        if not RESIDENT:
            above = tl.sum(counts & 0xFFFF, 0)
            inside = tl.where(exceeds, tl.sum(counts >> 16, 0) - above, above)
        if exceeds:
            high = middle
        else:
            low = middle + 1
            before += mass
    return low, high, before


@triton.jit
def _copy_between(row_ptr, width, low, high, values_ptr, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Copies the scores with keys from low to high, at most WINDOW; returns them, -inf behind, fp32 [WINDOW]."""
    count = 0
    for start in range(0, width, TILE):
        x = survivors(row_ptr, low, start, width, -float("inf"), float("inf"), TILE, False)
        chosen = ((key_of(x) >= low) & (key_of(x) <= high)).to(tl.int32)
        place = count + tl.cumsum(chosen, 0) - 1
        tl.store(values_ptr + place, x, mask=(chosen != 0) & (place < WINDOW))
        count += tl.sum(chosen, 0)
    tl.debug_barrier()
    place = tl.arange(0, WINDOW)
    return tl.load(values_ptr + place, mask=place < count, other=-float("inf"))


@triton.jit
def _top_p(
    row_ptr, resident, width, lo, hi, total, before, tail, values_ptr,
    TILE: tl.constexpr, RESIDENT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """From the first survivor, rising, at which the probabilities so far exceed tail; `before` comes first.

    Of a whole row, first to a bracket that fits the registers.
    """
    inverse = tl.math.div_rn(1.0, total)
    low = key_of(least_of(row_ptr, resident, width, lo, hi, hi, 1.0, 0.0, TILE, RESIDENT))
    high = key_of(hi)
    if RESIDENT:
        low, high, before = _narrow(row_ptr, resident, width, low, high, before, tail, hi, inverse, 0, TILE, RESIDENT)
    else:
        low, high, before = _narrow(
            row_ptr, resident, width, low, high, before, tail, hi, inverse, WINDOW, TILE, RESIDENT
        )
        if low < high:
            bracket = _copy_between(row_ptr, width, low, high, values_ptr, TILE, WINDOW)
            low, high, before = _narrow(
                values_ptr, bracket, WINDOW, low, high, before, tail, hi, inverse, 0, WINDOW, True
            )
    return value_of(low)


@triton.jit
def _distance(x, peak, log_total, entropy):
    """How far a token's surprise is from the entropy; +inf for dropped ones."""
    return tl.abs((log_total - (x - peak)) - entropy)


@triton.jit
def _typical_p(row_ptr, resident, width, lo, hi, mass, keep, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """Bounds of the tokens whose surprise is nearest to the entropy, until they have `mass`, but of `keep` at least."""
    total = total_of(row_ptr, resident, width, lo, hi, hi, TILE, RESIDENT)
    entropy = entropy_of(row_ptr, resident, width, lo, hi, hi, total, TILE, RESIDENT)
    inverse = tl.math.div_rn(1.0, total)
    log_total = tl.log(total)
    low = key_of(0.0 * total)
    high = key_of(0.0 * total + float("inf"))
    while low < high:
        middle = mean_of(low, high)
        radius = value_of(middle)
        sums = tl.zeros([TILE], tl.float32)
        counts = tl.zeros([TILE], tl.int32)
        for start in range(0, width, TILE):
            x = survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
            inside = _distance(x, hi, log_total, entropy) <= radius
            sums += tl.where(inside, tl.exp(x - hi) * inverse, 0.0)
            counts += inside.to(tl.int32)
        if (tl.sum(sums, 0) >= mass) & (tl.sum(counts, 0) >= keep):
            high = middle
        else:
            low = middle + 1
    radius = value_of(low)
    least = tl.full([TILE], float("inf"), tl.float32)
    greatest = tl.full([TILE], -float("inf"), tl.float32)
    for start in range(0, width, TILE):
        x = survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
        inside = (_distance(x, hi, log_total, entropy) <= radius) & (x > -float("inf"))
        least = tl.minimum(least, tl.where(inside, x, float("inf")))
        greatest = tl.maximum(greatest, tl.where(inside, x, -float("inf")))
    return tl.min(least, 0), tl.max(greatest, 0)


@triton.jit
def _ranked(row_ptr, resident, width, params_ptr, features, peak, keep, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """lo after top_h and top_k."""
    lo = -float("inf")
    hi = peak
    if (features & _TOP_H) != 0:
        top_h = float_param(params_ptr, _TOP_H_VALUE)
        lo = _top_h(row_ptr, resident, width, lo, hi, peak, top_h, TILE, RESIDENT)
    if (features & _TOP_K) != 0:
        k = tl.maximum(tl.load(params_ptr + _TOP_K_VALUE), keep)
        lo = tl.maximum(lo, kth_largest(row_ptr, resident, width, lo, hi, peak, k, TILE, RESIDENT))
    return lo


@triton.jit
def _above_floor(
    row_ptr, resident, width, lo, hi, total, floor, most, rest, outside, TILE: tl.constexpr, RESIDENT: tl.constexpr
):
    """(lo, valid) after a filter that drops what is less likely than floor; hi is the largest survivor."""
    valid = 1
    inverse = tl.math.div_rn(1.0, total)
    if RESIDENT:
        valid = tl.where((rest > 0) & (tl.exp(outside - hi) * inverse >= floor), 0, 1)
    bound = least_of(row_ptr, resident, width, lo, hi, hi, inverse, floor, TILE, RESIDENT)
    return tl.maximum(lo, tl.minimum(bound, most)), valid


@triton.jit
def filter_row(
    row_ptr, resident, width, params_ptr, features, peak, rest, outside, values_ptr,
    TILE: tl.constexpr, RESIDENT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """(lo, hi, valid) after all filters of a row whose largest score is `peak`; hi is the score of a survivor.

    rest: the sum of exp(x - peak) of the tokens that the source leaves out although no filter has dropped them yet, all
    less than `outside`; 0 for a whole row. valid: 0 where some of these might survive, so that the bounds mean nothing.
    values_ptr: WINDOW words of scratch.
    """
    keep = tl.load(params_ptr + _MIN_KEEP)
    hi = peak
    lo = _ranked(row_ptr, resident, width, params_ptr, features, peak, keep, TILE, RESIDENT)
    most = _keep_bound(row_ptr, resident, width, lo, hi, keep, TILE, RESIDENT)
    valid = 1
    if (features & _TOP_P) != 0:
        tail = float_param(params_ptr, _TOP_P_TAIL)
        total = total_of(row_ptr, resident, width, lo, hi, hi, TILE, RESIDENT) + rest
        before = tl.math.div_rn(rest, total)
        valid = tl.where(before > tail, 0, 1)
        bound = _top_p(row_ptr, resident, width, lo, hi, total, before, tail, values_ptr, TILE, RESIDENT, WINDOW)
        lo = tl.maximum(lo, tl.minimum(bound, most))
        rest = rest * 0.0
    if (features & _MIN_P) != 0:
        total = total_of(row_ptr, resident, width, lo, hi, hi, TILE, RESIDENT) + rest
        floor = float_param(params_ptr, _MIN_P_VALUE) * tl.math.div_rn(1.0, total)
        lo, enough = _above_floor(row_ptr, resident, width, lo, hi, total, floor, most, rest, outside, TILE, RESIDENT)
        valid = valid & enough
        rest = rest * 0.0
    if (features & _TYPICAL_P) != 0:
        valid = tl.where(rest > 0, 0, valid)
        mass = float_param(params_ptr, _TYPICAL_P_VALUE)
        least, greatest = _typical_p(row_ptr, resident, width, lo, hi, mass, keep, TILE, RESIDENT)
        lo = tl.maximum(lo, least)
        hi = tl.minimum(hi, greatest)
        most = _keep_bound(row_ptr, resident, width, lo, hi, keep, TILE, RESIDENT)
    if (features & (_EPSILON | _ETA)) != 0:
        total = total_of(row_ptr, resident, width, lo, hi, hi, TILE, RESIDENT) + rest
        if (features & _EPSILON) != 0:
            floor = float_param(params_ptr, _EPSILON_VALUE)
            lo, enough = _above_floor(
                row_ptr, resident, width, lo, hi, total, floor, most, rest, outside, TILE, RESIDENT
            )
            valid = valid & enough
            rest = rest * 0.0
            total = total_of(row_ptr, resident, width, lo, hi, hi, TILE, RESIDENT)
        if (features & _ETA) != 0:
            valid = tl.where(rest > 0, 0, valid)
            entropy = entropy_of(row_ptr, resident, width, lo, hi, hi, total, TILE, RESIDENT)
            epsilon = float_param(params_ptr, _ETA_VALUE)
            floor = tl.minimum(epsilon, tl.sqrt_rn(epsilon) * tl.exp(-entropy))
            lo, _ = _above_floor(row_ptr, resident, width, lo, hi, total, floor, most, rest, outside, TILE, RESIDENT)
    return lo, hi, valid
