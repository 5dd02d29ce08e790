"""What the filters ask of the scores of a row: sums over those from some value on, and values found by bisection.

Two sources, one set of functions: `resident` scores of a row in registers (RESIDENT, of TILE values), or the `width`
scores at row_ptr, in tiles. Survivors are the scores lo <= x <= hi, peak is the largest of all.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_of(x):
    """int32 whose order is that of the fp32 values; its own inverse, but for the type."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def mean_of(low, high):
    """The mean of two int32, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def mean_up(low, high):
    return mean_of(low, high) + ((low ^ high) & 1)


@triton.jit
def survivors(row_ptr, resident, start, width, lo, hi, TILE: tl.constexpr, RESIDENT: tl.constexpr):
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
        sums += tl.exp(survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT) - peak)
    return tl.sum(sums, 0)


@triton.jit
def term(x, peak, inverse, log_total):
    """-p ln p, 0 where p is."""
    p = tl.exp(x - peak) * inverse
    return tl.where(p > 0, p * (log_total - (x - peak)), 0.0)


@triton.jit
def entropy_of(row_ptr, resident, width, lo, hi, peak, total, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    inverse = tl.math.div_rn(1.0, total)
    log_total = tl.log(total)
    sums = tl.zeros([TILE], tl.float32)
    for start in range(0, width, TILE):
        x = survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
        sums += term(x, peak, inverse, log_total)
    return tl.sum(sums, 0)


@triton.jit
def count_from(row_ptr, resident, width, lo, hi, value, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """How many survivors are value or more; value: finite."""
    counts = tl.zeros([TILE], tl.int32)
    for start in range(0, width, TILE):
        x = survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
        counts += (x >= value).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def least_of(row_ptr, resident, width, lo, hi, peak, inverse, floor, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """The least survivor with a probability of floor or more, +inf if there is none."""
    least = tl.full([TILE], float("inf"), tl.float32)
    for start in range(0, width, TILE):
        x = survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
        p = tl.exp(x - peak) * inverse
        least = tl.minimum(least, tl.where((p >= floor) & (x > -float("inf")), x, float("inf")))
    return tl.min(least, 0)


@triton.jit
def kth_largest(row_ptr, resident, width, lo, hi, peak, k, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    """A value from which on there are k survivors, or more where ties do not allow it; -inf if there are fewer."""
    least = least_of(row_ptr, resident, width, lo, hi, peak, 1.0, 0.0, TILE, RESIDENT)
    low = key_of(least)
    high = key_of(peak)
    found = count_from(row_ptr, resident, width, lo, hi, least, TILE, RESIDENT)
    enough = found >= k
    while (low < high) & (found > k):
        middle = mean_up(low, high)
        count = count_from(row_ptr, resident, width, lo, hi, value_of(middle), TILE, RESIDENT)
        if count >= k:
            low = middle
            found = count
        else:
            high = middle - 1
    return tl.where(enough, value_of(low), -float("inf"))


@triton.jit
def terms_from(
    row_ptr, resident, width, lo, hi, value, peak, inverse, log_total, TILE: tl.constexpr, RESIDENT: tl.constexpr
):
    sums = tl.zeros([TILE], tl.float32)
    for start in range(0, width, TILE):
        x = survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
        sums += tl.where(x >= value, term(x, peak, inverse, log_total), 0.0)
    return tl.sum(sums, 0)


@triton.jit
def largest_below(row_ptr, resident, width, lo, hi, value, TILE: tl.constexpr, RESIDENT: tl.constexpr):
    largest = tl.full([TILE], -float("inf"), tl.float32)
    for start in range(0, width, TILE):
        x = survivors(row_ptr, resident, start, width, lo, hi, TILE, RESIDENT)
        largest = tl.maximum(largest, tl.where(x < value, x, -float("inf")))
    return tl.max(largest, 0)
