"""The scores of a row: its logits after the processors and over the temperature, and the largest of each lane.

Log (Triton 3.7.1; no GPU was at hand: not measured)
  maxima and their tokens per lane, reduced once: a reduction per tile costs ~100 cycles, 25 tiles a row.
  loads masked by the padded width, columns beyond the vocabulary replaced after: masked by 50257 no load has 16 bytes;
  now 79 of 250 in the code have, all those of whole tiles.
  rows without processors keep no scores: two passes over bf16 logits; fp32 scores of 256 rows (51 MB) leave L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.filters import float_param
from octavo_kernels.processors import KEEPS_SCORES, USES_SCORES, process_tile
from octavo_kernels.state import Feature, Param

_TEMPERATURE_VALUE = tl.constexpr(int(Param.TEMPERATURE))
_SAMPLE = tl.constexpr(int(Feature.SAMPLE))
_TEMPERATURE = tl.constexpr(int(Feature.TEMPERATURE))
_ALLOWED = tl.constexpr(int(Feature.ALLOWED))
_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def _scaled(x, params_ptr, features, RECIPROCAL: tl.constexpr):
    """Step 18 of rows that sample: scores over the temperature, as PyTorch divides by a Python number."""
    if (features & (_SAMPLE | _TEMPERATURE)) == (_SAMPLE | _TEMPERATURE):
        temperature = float_param(params_ptr, _TEMPERATURE_VALUE)
        if RECIPROCAL:
            x = x * tl.math.div_rn(1.0, temperature)
        else:
            x = tl.math.div_rn(x, temperature)
    return x


@triton.jit
def is_bad(logits_ptr, num_columns, vocab_size, TILE: tl.constexpr):
    """1 if the model gave NaN or +inf, else 0."""
    bad = tl.zeros([TILE], tl.int32)
    for start in range(0, num_columns, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + token, mask=token < num_columns, other=0.0).to(tl.float32)
        bad |= ((token < vocab_size) & ((x < float("inf")) == 0)).to(tl.int32)
    return tl.max(bad, 0)


@triton.jit
def _scale_logits(
    logits_ptr, params_ptr, features, num_columns, vocab_size, RECIPROCAL: tl.constexpr, TILE: tl.constexpr
):
    """Of a row without processors: what `process_row` returns."""
    best = tl.full([TILE], -float("inf"), tl.float32)
    where = tl.full([TILE], _NO_TOKEN, tl.int32)
    flags = tl.zeros([TILE], tl.int32)
    for start in range(0, num_columns, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + token, mask=token < num_columns, other=-float("inf")).to(tl.float32)
        x = tl.where(token < vocab_size, _scaled(x, params_ptr, features, RECIPROCAL), -float("inf"))
        flags |= (x != x).to(tl.int32)
        better = x > best
        best = tl.where(better, x, best)
        where = tl.where(better, token, where)
    return best, where, flags


@triton.jit
def _process_and_keep(
    logits_ptr, scores_ptr, bitmaps_ptr, banned_ptr, words, params_ptr, features, length, none_allowed, num_columns,
    vocab_size, RECIPROCAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of a row that keeps its scores: what `process_row` returns, with 2 in the flag of lanes that met an allowed token
    above -inf. none_allowed: 1 if there is none."""
    best = tl.full([TILE], -float("inf"), tl.float32)
    where = tl.full([TILE], _NO_TOKEN, tl.int32)
    flags = tl.zeros([TILE], tl.int32)
    for start in range(0, num_columns, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < num_columns
        live = token < vocab_size
        if (features & USES_SCORES) != 0:
            x = tl.load(scores_ptr + token, mask=inside, other=-float("inf"))
        else:
            x = tl.load(logits_ptr + token, mask=inside, other=-float("inf")).to(tl.float32)
        x, candidates = process_tile(
            x, token, live, bitmaps_ptr, banned_ptr, words, params_ptr, features, length, none_allowed, RECIPROCAL
        )
        x = tl.where(live, _scaled(x, params_ptr, features, RECIPROCAL), -float("inf"))
        tl.store(scores_ptr + token, x, mask=inside)
        flags |= (x != x).to(tl.int32) | (candidates << 1)
        better = x > best
        best = tl.where(better, x, best)
        where = tl.where(better, token, where)
    return best, where, flags


@triton.jit
def process_row(
    logits_ptr, scores_ptr, bitmaps_ptr, banned_ptr, words, params_ptr, features, length, num_columns, vocab_size,
    RECIPROCAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """B. Of each lane of a tile: the largest score, its first token, 1 if it met a NaN.

    Writes the scores of rows that keep them, -inf from vocab_size on.
    """
    best = tl.full([TILE], -float("inf"), tl.float32)
    where = tl.full([TILE], _NO_TOKEN, tl.int32)
    flags = tl.zeros([TILE], tl.int32)
    if (features & KEEPS_SCORES) == 0:
        best, where, flags = _scale_logits(logits_ptr, params_ptr, features, num_columns, vocab_size, RECIPROCAL, TILE)
    else:
        none_allowed = 0
        turn = 0
        while turn < 2:
            best, where, flags = _process_and_keep(
                logits_ptr, scores_ptr, bitmaps_ptr, banned_ptr, words, params_ptr, features, length, none_allowed,
                num_columns, vocab_size, RECIPROCAL, TILE,
            )  # fmt: skip
            turn += 1
            if ((features & _ALLOWED) == 0) | (tl.max(flags & 2, 0) != 0):
                turn = 2
            none_allowed = 1
    return best, where, flags & 1


@triton.jit
def tile_of_scores(
    logits_ptr, scores_ptr, token, params_ptr, features, num_columns, vocab_size, RECIPROCAL: tl.constexpr
):
    """What `process_row` saw: of rows that keep no scores it is computed again."""
    inside = token < num_columns
    if (features & KEEPS_SCORES) != 0:
        x = tl.load(scores_ptr + token, mask=inside, other=-float("inf"))
    else:
        x = tl.load(logits_ptr + token, mask=inside, other=-float("inf")).to(tl.float32)
        x = tl.where(token < vocab_size, _scaled(x, params_ptr, features, RECIPROCAL), -float("inf"))
    return x


@triton.jit
def store_scores(
    logits_ptr, scores_ptr, params_ptr, features, num_columns, vocab_size, RECIPROCAL: tl.constexpr, TILE: tl.constexpr
):
    for start in range(0, num_columns, TILE):
        token = start + tl.arange(0, TILE)
        x = tile_of_scores(logits_ptr, scores_ptr, token, params_ptr, features, num_columns, vocab_size, RECIPROCAL)
        tl.store(scores_ptr + token, x, mask=token < num_columns)
