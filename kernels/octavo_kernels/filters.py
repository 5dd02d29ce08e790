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

# The filters' bits follow each other, in their order.
_FIRST = tl.constexpr(int(Feature.TOP_H).bit_length() - 1)
_NUM_FILTERS = tl.constexpr(7)
_TOP_H = tl.constexpr(0)
_TOP_K = tl.constexpr(1)
_TOP_P = tl.constexpr(2)
_MIN_P = tl.constexpr(3)
_TYPICAL = tl.constexpr(4)
_ETA = tl.constexpr(6)
_TOP_K_VALUE = tl.constexpr(int(Param.TOP_K))
_TOP_P_TAIL = tl.constexpr(int(Param.TOP_P_TAIL))
_MIN_P_VALUE = tl.constexpr(int(Param.MIN_P))
_TYPICAL_P = tl.constexpr(int(Param.TYPICAL_P))
_TOP_H_VALUE = tl.constexpr(int(Param.TOP_H))
_EPSILON_CUTOFF = tl.constexpr(int(Param.EPSILON_CUTOFF))
_ETA_CUTOFF = tl.constexpr(int(Param.ETA_CUTOFF))
_MIN_KEEP = tl.constexpr(int(Param.MIN_KEEP))
_TOP_H_CANDIDATES = tl.constexpr(100)  # TopHLogitsWarper looks at no more
_TOP_H_TILE = tl.constexpr(128)
_WINDOW = tl.constexpr(WINDOW)

assert [Feature.TOP_H << i for i in range(7)] == [
    Feature.TOP_H,
    Feature.TOP_K,
    Feature.TOP_P,
    Feature.MIN_P,
    Feature.TYPICAL_P,
    Feature.EPSILON_CUTOFF,
    Feature.ETA_CUTOFF,
]


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
    """The k-th largest survivor; -inf if there are fewer. A radix select: 8 bits of the key per pass."""
    found = tl.full([], 0, tl.uint32)
    known = tl.full([], 0, tl.uint32)  # mask of the key's bits that are found
    wanted = tl.full([], 0, tl.int32) + k
    bins = tl.arange(0, 256)
    for level in range(0, 4):
        shift = (tl.full([], 24, tl.int32) - 8 * level).to(tl.uint32)
        counts = tl.zeros([256], tl.int32)
        for start in range(0, width, TILE_V):
            x = _survivors(values, start, width, lo, hi, TILE_V)
            key = ordered_key(x)
            live = (x > -float("inf")) & ((key & known) == found)
            digits = tl.where(live, ((key >> shift) & 255).to(tl.int32), 0)
            counts += tl.histogram(digits, 256) - tl.where(bins == 0, tl.sum((~live).to(tl.int32), 0), 0)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.max(tl.where(at_least >= wanted, bins, -1), 0)
        enough = digit >= 0
        above = tl.sum(tl.where(bins > digit, counts, 0), 0)
        wanted = tl.where(enough, wanted - above, 2147483647)
        found = found | (tl.maximum(digit, 0).to(tl.uint32) << shift)
        known = known | (tl.full([], 255, tl.uint32) << shift)
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
def _distance(x, peak, log_total, entropy):
    """How far a token's surprise is from the entropy; +inf for dropped ones."""
    return tl.where(x > -float("inf"), tl.abs(peak + log_total - x - entropy), float("inf"))


@triton.jit
def _least_rank(values, width, lo, hi, typical, wanted, keep, peak, total, entropy, TILE_V: tl.constexpr):
    """Of the survivors in order of a rank, the rank at which their probabilities, added up, are enough.

    Typical: the rank is the distance from the entropy, enough is `wanted`, for at least `keep` tokens. Otherwise
    (top_p): the rank is the score, enough is more than `wanted`. By bisection on the key of the rank.
    """
    log_total = tl.log(total)
    low_key = tl.full([], 0, tl.uint32)
    high_key = ordered_key(tl.where(typical, float("inf"), peak))
    while low_key < high_key:
        middle = low_key + (high_key - low_key) // 2
        mass = 0.0
        count = 0
        for start in range(0, width, TILE_V):
            x = _survivors(values, start, width, lo, hi, TILE_V)
            rank = tl.where(typical, _distance(x, peak, log_total, entropy), x)
            inside = (ordered_key(rank) <= middle) & (x > -float("inf"))
            mass += tl.sum(tl.where(inside, tl.exp(x - peak), 0.0), 0)
            count += tl.sum(inside.to(tl.int32), 0)
        share = mass / total
        enough = tl.where(typical, (share >= wanted) & (count >= keep), share > wanted)
        high_key = tl.where(enough, middle, high_key)
        low_key = tl.where(enough, low_key, middle + 1)
    return value_of_key(low_key)


@triton.jit
def _bounds(
    values, width, lo, hi, typical, radius, floor, peak, total, entropy, TILE_V: tl.constexpr
):  # fmt: skip
    """Least and greatest of the survivors that are near enough to the entropy (typical) or likely enough.

    The peak is always likely enough.
    """
    log_total = tl.log(total)
    least = tl.where(typical, float("inf"), peak)
    greatest = tl.where(typical, -float("inf"), peak)
    for start in range(0, width, TILE_V):
        x = _survivors(values, start, width, lo, hi, TILE_V)
        near = _distance(x, peak, log_total, entropy) <= radius
        inside = tl.where(typical, near, tl.exp(x - peak) / total >= floor) & (x > -float("inf"))
        least = tl.minimum(least, tl.min(tl.where(inside, x, float("inf")), 0))
        greatest = tl.maximum(greatest, tl.max(tl.where(inside, x, -float("inf")), 0))
    return least, greatest


@triton.jit
def _top_h(values, count, hundredth, top_h):
    """The last of the 100 largest, falling, at which the sum of the entropy terms is at most top_h of that of all 100.

    values: the `count` that are larger than the hundredth; the others are equal to it.
    """
    index = tl.arange(0, _TOP_H_TILE)
    x = tl.load(values + index, mask=index < count, other=-float("inf"))
    x = tl.where((index >= count) & (index < _TOP_H_CANDIDATES), hundredth, x)
    x = tl.sort(x, descending=True)
    peak = tl.max(x, 0)
    log_p = x - peak - tl.log(tl.sum(tl.exp(x - peak), 0))
    terms = tl.where(x > -float("inf"), -log_p * tl.exp(log_p), 0.0)
    kept = (tl.cumsum(terms, 0) <= tl.sum(terms, 0) * top_h) | (index == 0)
    return tl.min(tl.where(kept & (x > -float("inf")), x, float("inf")), 0)


@triton.jit
def filter_row(scores, candidates, ids, params, features, vocab_size, peak, TILE_V: tl.constexpr):
    """(lo, hi, count) of a row of scores over the temperature, the largest of which is `peak`.

    count: how many candidates were copied to `candidates` and `ids`, the survivors among them; -1: none were.
    One loop over the filters, so that each pass over the row is compiled once.
    """
    lo = -float("inf")
    hi = peak
    copied = -1
    values = scores
    width = vocab_size
    keep = tl.load(params + _MIN_KEEP)
    for number in range(0, _NUM_FILTERS):
        stage = tl.full([], 0, tl.int32) + number
        if ((features >> (_FIRST + stage)) & 1) != 0:
            bound = -float("inf")
            k = tl.where(stage == _TOP_H, _TOP_H_CANDIDATES, keep)
            if stage == _TOP_K:
                k = tl.maximum(tl.load(params + _TOP_K_VALUE), keep)
            if (stage <= _TOP_K) | (keep > 1):
                bound = _kth_largest(values, width, lo, hi, k, TILE_V)
            if stage <= _TOP_K:
                least = tl.maximum(lo, bound)
                if stage == _TOP_H:
                    least = value_of_key(ordered_key(least) + 1)
                count = _compact(scores, vocab_size, least, hi, candidates, ids, TILE_V)
                tl.debug_barrier()
                if stage == _TOP_H:
                    lo = tl.maximum(lo, _top_h(candidates, count, bound, _param(params, _TOP_H_VALUE)))
                    tl.debug_barrier()
                else:
                    lo = least
                    if count >= 0:
                        values = candidates
                        width = count
                        copied = count
            else:
                top, total = _peak_and_total(values, width, lo, hi, TILE_V)
                entropy = 0.0
                if (stage == _TYPICAL) | (stage == _ETA):
                    entropy = _entropy(values, width, lo, hi, top, total, TILE_V)
                typical = stage == _TYPICAL
                rank = 0.0
                if (stage == _TOP_P) | typical:
                    wanted = _param(params, tl.where(typical, _TYPICAL_P, _TOP_P_TAIL))
                    rank = _least_rank(values, width, lo, hi, typical, wanted, keep, top, total, entropy, TILE_V)
                floor = _param(params, _EPSILON_CUTOFF)
                if stage == _MIN_P:
                    floor = _param(params, _MIN_P_VALUE) * tl.math.div_rn(1.0, total)
                if stage == _ETA:
                    epsilon = _param(params, _ETA_CUTOFF)
                    floor = tl.minimum(epsilon, tl.sqrt_rn(epsilon) * tl.exp(-entropy))
                least, greatest = _bounds(values, width, lo, hi, typical, rank, floor, top, total, entropy, TILE_V)
                least = tl.where(stage == _TOP_P, rank, least)
                if (keep > 1) & (stage != _TYPICAL):
                    least = tl.minimum(least, bound)
                lo = tl.maximum(lo, least)
                if typical:
                    hi = tl.minimum(hi, greatest)
    return lo, hi, copied
