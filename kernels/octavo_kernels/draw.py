"""What a row that samples does with its scores: filters keep an interval of them, the race draws a token from it.

First on the candidates alone, which nearly always hold what survives the filters, else on the whole row.

Log (Triton 3.7.1; no GPU was at hand: times are predictions, not measured)
  noise for survivors only: a full row is ~65 instructions for each of 50257, ~15 us; after top_k 50 it is nothing. Of a
  whole row, a tile whose largest probability cannot win whatever its noise is skipped.
  draw in tiles of 1024: the race needs 4 words of noise per column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.candidates import MOST_RANKED, copy_candidates, num_candidates, threshold_of_lanes
from octavo_kernels.filters import FILTERS, filter_row
from octavo_kernels.philox import LARGEST_RATIO, exponentials, random_words
from octavo_kernels.processors import KEEPS_SCORES
from octavo_kernels.row_scores import store_scores
from octavo_kernels.state import Param
from octavo_kernels.survivors import total_of
from octavo_kernels.workspace import WINDOW

_SEED_LOW = tl.constexpr(int(Param.SEED_LOW))
_SEED_HIGH = tl.constexpr(int(Param.SEED_HIGH))
_ROW = tl.constexpr(int(Param.ROW))
_NUM_ROWS = tl.constexpr(int(Param.NUM_ROWS))
_WINDOW = tl.constexpr(WINDOW)
_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def _draw(
    row_ptr, ids_ptr, width, lo, hi, params_ptr, step, vocab_size, num_threads,
    NATIVE_LOG: tl.constexpr, TILE: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """D. The token that wins the race over lo <= x <= hi of width scores, and its own; hi is the largest of them.

    COMPACT: the tokens are those at ids_ptr, rising; else the places in the row.
    """
    low = tl.load(params_ptr + _SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(params_ptr + _SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    seed = (high << 32) | low
    first = tl.load(params_ptr + _ROW) * vocab_size
    num_elements = tl.load(params_ptr + _NUM_ROWS) * vocab_size
    total = total_of(row_ptr, hi, width, lo, hi, hi, TILE, False)
    best = 0.0
    winner = _NO_TOKEN
    score = hi
    for start in range(0, width, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < width
        x = tl.load(row_ptr + token, mask=inside, other=-float("inf"))
        if COMPACT:
            token = tl.load(ids_ptr + token, mask=inside, other=0)
        p = tl.math.div_rn(tl.exp(tl.where((x >= lo) & (x <= hi), x, -float("inf")) - hi), total)
        if tl.max(p, 0) * LARGEST_RATIO > best:
            words = random_words(seed, step, first + token, num_elements, num_threads)
            ratio = tl.math.div_rn(p, exponentials(words, NATIVE_LOG))
            largest = tl.max(ratio, 0)
            if largest > best:
                best = largest
                winner = tl.min(tl.where(ratio == largest, token, _NO_TOKEN), 0)
                score = tl.max(tl.where((ratio == largest) & (token == winner), x, -float("inf")), 0)
    return winner, score


@triton.jit
def _choose_of_candidates(
    values_ptr, ids_ptr, count, rest, threshold, params_ptr, features, peak, step, vocab_size, num_threads,
    NATIVE_LOG: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(token, its score, lo, hi, valid): all but valid mean nothing where that is 0.

    rest, threshold: as `copy_candidates` left and had them.
    """
    token = _NO_TOKEN
    score = peak
    tl.debug_barrier()  # candidates are read by other threads than wrote them
    place = tl.arange(0, _WINDOW)
    x = tl.load(values_ptr + place, mask=place < count, other=-float("inf"))
    lo, hi, valid = filter_row(
        values_ptr, x, _WINDOW, params_ptr, features, peak, rest, threshold, values_ptr, _WINDOW, True, _WINDOW
    )
    if valid != 0:
        token, score = _draw(
            values_ptr, ids_ptr, count, lo, hi, params_ptr, step, vocab_size, num_threads, NATIVE_LOG, TILE, True
        )
    return token, score, lo, hi, valid


@triton.jit
def _choose_of_row(
    scores_ptr, lanes, values_ptr, ids_ptr, params_ptr, features, peak, step, num_columns, vocab_size, num_threads,
    NATIVE_LOG: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(token, its score, lo, hi) from all scores, which are at scores_ptr. values_ptr: scratch."""
    tl.debug_barrier()
    lo = -float("inf")
    hi = peak
    if (features & FILTERS) != 0:
        lo, hi, _ = filter_row(
            scores_ptr, lanes, num_columns, params_ptr, features, peak, peak * 0.0, peak, values_ptr, TILE, False,
            _WINDOW,
        )  # fmt: skip
    token, score = _draw(
        scores_ptr, ids_ptr, num_columns, lo, hi, params_ptr, step, vocab_size, num_threads, NATIVE_LOG, TILE // 2,
        False,
    )  # fmt: skip
    return token, score, lo, hi


@triton.jit
def choose(
    logits_ptr, scores_ptr, values_ptr, ids_ptr, interval_ptr, params_ptr, features, lanes, peak, step, num_columns,
    vocab_size, num_threads,
    RECIPROCAL: tl.constexpr, NATIVE_LOG: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """C and D of a row that samples: its token and that one's score. lanes: as `process_row` left them."""
    token = _NO_TOKEN
    score = peak
    lo = -float("inf")
    hi = peak
    valid = 0
    wanted = num_candidates(params_ptr, features)
    if ((features & FILTERS) != 0) & (wanted <= MOST_RANKED):
        threshold = threshold_of_lanes(lanes, wanted)
        count, rest = copy_candidates(
            logits_ptr, scores_ptr, values_ptr, ids_ptr, params_ptr, features, peak, threshold, num_columns,
            vocab_size, RECIPROCAL, TILE,
        )  # fmt: skip
        if count <= _WINDOW:
            token, score, lo, hi, valid = _choose_of_candidates(
                values_ptr, ids_ptr, count, rest, threshold, params_ptr, features, peak, step, vocab_size,
                num_threads, NATIVE_LOG, TILE // 2,
            )  # fmt: skip
    if valid == 0:
        if (features & KEEPS_SCORES) == 0:
            store_scores(logits_ptr, scores_ptr, params_ptr, features, num_columns, vocab_size, RECIPROCAL, TILE)
        token, score, lo, hi = _choose_of_row(
            scores_ptr, lanes, values_ptr, ids_ptr, params_ptr, features, peak, step, num_columns, vocab_size,
            num_threads, NATIVE_LOG, TILE,
        )  # fmt: skip
    tl.store(interval_ptr, lo)
    tl.store(interval_ptr + 1, hi)
    return token, score
