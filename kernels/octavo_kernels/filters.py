"""The filters of sampling (transformers' logits warpers) as intervals of scores, without a sort of the row.

Each filter sees the survivors lo <= x <= hi of those before it, renormalised, and moves lo up or hi down; tokens tied
at a bound all stay. A bound need not be the score of a token: only who is inside counts. What a filter asks of a row
are sums over scores from some value on, so a bound is found by bisection on an int32 key that orders fp32 values.

The same functions work on two sources: WINDOW candidates of a row in registers (RESIDENT), or a whole row in memory.

Log (variants, what they gave; sm_90, Triton 3.7.1; no GPU was at hand: times are predictions, not measured)
  sort of the candidates: 66 exchange steps of 2048 values, half of them through shared memory, and 250 kB of code;
  bisection is ~25 sums of 8 values per thread for a filter that ranks and nothing for those with a floor. ~1.5 us each.
  radix select of the k-th largest, four histograms of the row: 4 passes and shared atomics, ~10 us. Here the first pass
  over the row leaves the maximum of each of TILE lanes: the k-th largest of those is at most the row's k-th, and barely
  less, so the next pass copies little more than k candidates. Two passes in all.
  top_p, min_p and epsilon first: 1024 candidates nearly always hold what survives. The mass outside is summed on the
  way; if it is larger than what top_p drops, or might survive a floor, the row takes the slow path.
  slow path: at most 32 passes for a filter that ranks, ~2 us each from L2; of top_p about 6, until the bracket fits the
  registers. For flat rows without top_k, typical_p without top_k, constant rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.state import Feature, Param

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
_TOP_H_CANDIDATES = tl.constexpr(100)  # TopHLogitsWarper looks at no more
_GUESS = tl.constexpr(1024)

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
MOST_RANKED = tl.constexpr(1024)
"""The largest top_k whose candidates are looked for."""


@triton.jit
def float_param(params_ptr, COLUMN: tl.constexpr):
    return tl.load(params_ptr + COLUMN).to(tl.float32, bitcast=True)


@triton.jit
def key_of(x):
    """int32 whose order is that of the fp32 values; its own inverse, but for the type."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    """The mean of two int32, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _middle_up(low, high):
    return _middle(low, high) + ((low ^ high) & 1)


@triton.jit
def _survivors(row_ptr, resident, start, width, lo, hi, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """fp32 [TILE]: scores, -inf where dropped."""
    if RESIDENT:
        x = resident
    else:
        index = start + tl.arange(0, TILE)
        x = tl.load(row_ptr + index, mask=index < width, other=-float("inf"))
    return tl.where((x >= lo) & (x <= hi), x, -float("inf"))


@triton.jit
def total_of(row_ptr, resident, width, lo, hi, peak, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """The sum of exp(x - peak)."""
    sums = tl.zeros([TILE], tl.float32)
    for start in range(0, width, TILE):
        sums += tl.exp(_survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT) - peak)
    return tl.sum(sums, 0)


@triton.jit
def _term(x, peak, inverse, log_total):
    """-p ln p, 0 where p is."""
    p = tl.exp(x - peak) * inverse
    return tl.where(p > 0, p * (log_total - (x - peak)), 0.0)


@triton.jit
def _entropy(row_ptr, resident, width, lo, hi, peak, total, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    inverse = tl.math.div_rn(1.0, total)
    log_total = tl.log(total)
    sums = tl.zeros([TILE], tl.float32)
    for start in range(0, width, TILE):
        x = _survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
        sums += _term(x, peak, inverse, log_total)
    return tl.sum(sums, 0)


@triton.jit
def _count_from(row_ptr, resident, width, lo, hi, value, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """How many survivors are value or more; value: finite."""
    counts = tl.zeros([TILE], tl.int32)
    for start in range(0, width, TILE):
        x = _survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
        counts += (x >= value).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def _least(row_ptr, resident, width, lo, hi, peak, inverse, floor, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """The least survivor with a probability of floor or more, +inf if there is none."""
    least = tl.full([TILE], float("inf"), tl.float32)
    for start in range(0, width, TILE):
        x = _survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
        p = tl.exp(x - peak) * inverse
        least = tl.minimum(least, tl.where((p >= floor) & (x > -float("inf")), x, float("inf")))
    return tl.min(least, 0)


@triton.jit
def _kth_largest(row_ptr, resident, width, lo, hi, peak, k, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """A value from which on there are k survivors, or more where ties do not allow it; -inf if there are fewer."""
    least = _least(row_ptr, resident, width, lo, hi, peak, 1.0, 0.0, TILE, RESIDENT)
    low = key_of(least)
    high = key_of(peak)
    found = _count_from(row_ptr, resident, width, lo, hi, least, TILE, RESIDENT)
    enough = found >= k
    while (low < high) & (found > k):
        middle = _middle_up(low, high)
        count = _count_from(row_ptr, resident, width, lo, hi, value_of(middle), TILE, RESIDENT)
        if count >= k:
            low = middle
            found = count
        else:
            high = middle - 1
    return tl.where(enough, value_of(low), -float("inf"))


@triton.jit
def _keep_bound(row_ptr, resident, width, lo, hi, keep, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """The highest bound that leaves `keep` survivors to filters that move lo; hi is the largest survivor."""
    bound = hi
    if keep > 1:
        bound = _kth_largest(row_ptr, resident, width, lo, hi, hi, keep, TILE, RESIDENT)
    return bound


@triton.jit
def _terms_from(
    row_ptr, resident, width, lo, hi, value, peak, inverse, log_total, TILE: tl.constexpr, RESIDENT: tl.constexpr
):
    sums = tl.zeros([TILE], tl.float32)
    for start in range(0, width, TILE):
        x = _survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
        sums += tl.where(x >= value, _term(x, peak, inverse, log_total), 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _largest_below(row_ptr, resident, width, lo, hi, value, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    largest = tl.full([TILE], -float("inf"), tl.float32)
    for start in range(0, width, TILE):
        x = _survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
        largest = tl.maximum(largest, tl.where(x < value, x, -float("inf")))
    return tl.max(largest, 0)


@triton.jit
def _top_h(row_ptr, resident, width, lo, hi, peak, top_h, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """Of the 100 largest, falling, those whose entropy terms add up to at most top_h of all 100's; always the first.

    Of the tokens tied with the hundredth, as many count for the entropy as make 100.
    """
    hundredth = _kth_largest(row_ptr, resident, width, lo, hi, peak, _TOP_H_CANDIDATES, TILE, RESIDENT)
    above = value_of(key_of(tl.maximum(hundredth, lo)) + 1)  # the next value
    if hundredth == -float("inf"):
        above = lo
    copies = _TOP_H_CANDIDATES - _count_from(
        row_ptr, resident, width, above, hi, tl.maximum(above, -3.4028234663852886e38), TILE, RESIDENT
    )
    last = copies.to(tl.float32) * tl.exp(hundredth - peak)
    total = total_of(row_ptr, resident, width, above, hi, peak, TILE, RESIDENT) + last
    inverse = tl.math.div_rn(1.0, total)
    log_total = tl.log(total)
    entropy = _entropy(row_ptr, resident, width, above, hi, peak, total, TILE, RESIDENT)
    entropy += copies.to(tl.float32) * _term(hundredth, peak, inverse, log_total)
    limit = entropy * top_h
    lo = tl.maximum(lo, hundredth)
    # A probability of 0 gives transformers a NaN, which ends its prefix.
    least = _least(row_ptr, resident, width, lo, hi, peak, inverse, 1e-45, TILE, RESIDENT)
    low = key_of(least)
    high = key_of(peak) + 1
    while low < high:
        middle = _middle(low, high)
        sum_of_terms = _terms_from(
            row_ptr, resident, width, lo, hi, value_of(middle), peak, inverse, log_total, TILE, RESIDENT
        )
        if sum_of_terms <= limit:
            high = middle
        else:
            low = middle + 1
    bound = value_of(low)
    if low > key_of(least):  # of those tied next below, one may fit where all do not
        below = _largest_below(row_ptr, resident, width, lo, hi, bound, TILE, RESIDENT)
        sum_of_terms = _terms_from(row_ptr, resident, width, lo, hi, bound, peak, inverse, log_total, TILE, RESIDENT)
        fits = sum_of_terms + _term(below, peak, inverse, log_total) <= limit
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
        middle = _middle(low, high)
        sums = tl.zeros([TILE], tl.float32)
        counts = tl.zeros([TILE], tl.int32)
        for start in range(0, width, TILE):
            x = _survivors(row_ptr, resident, start, width, -float("inf"), float("inf"), TILE, RESIDENT)
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
        x = _survivors(row_ptr, low, start, width, -float("inf"), float("inf"), TILE, False)
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
    low = key_of(_least(row_ptr, resident, width, lo, hi, hi, 1.0, 0.0, TILE, RESIDENT))
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
    entropy = _entropy(row_ptr, resident, width, lo, hi, hi, total, TILE, RESIDENT)
    inverse = tl.math.div_rn(1.0, total)
    log_total = tl.log(total)
    low = key_of(0.0 * total)
    high = key_of(0.0 * total + float("inf"))
    while low < high:
        middle = _middle(low, high)
        radius = value_of(middle)
        sums = tl.zeros([TILE], tl.float32)
        counts = tl.zeros([TILE], tl.int32)
        for start in range(0, width, TILE):
            x = _survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
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
        x = _survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
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
        lo = tl.maximum(lo, _kth_largest(row_ptr, resident, width, lo, hi, peak, k, TILE, RESIDENT))
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
    bound = _least(row_ptr, resident, width, lo, hi, hi, inverse, floor, TILE, RESIDENT)
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
            entropy = _entropy(row_ptr, resident, width, lo, hi, hi, total, TILE, RESIDENT)
            epsilon = float_param(params_ptr, _ETA_VALUE)
            floor = tl.minimum(epsilon, tl.sqrt_rn(epsilon) * tl.exp(-entropy))
            lo, _ = _above_floor(row_ptr, resident, width, lo, hi, total, floor, most, rest, outside, TILE, RESIDENT)
    return lo, hi, valid


@triton.jit
def num_candidates(params_ptr, features):
    """How many of the largest scores hold what survives the first filter; more than MOST_RANKED: unknown."""
    count = _GUESS
    if (features & _TOP_K) != 0:
        count = tl.maximum(tl.load(params_ptr + _TOP_K_VALUE), tl.load(params_ptr + _MIN_KEEP))
    if (features & _TOP_H) != 0:
        count = _TOP_H_CANDIDATES
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
        middle = _middle_up(low, high)
        count = tl.sum((lanes >= value_of(middle)).to(tl.int32), 0)
        if count >= k:
            low = middle
            found = count
        else:
            high = middle - 1
    return tl.where(enough, value_of(low), -float("inf"))
