"""The processors of generate() on one tile of a row: steps 2 to 16 of docs/generation.md, bitmaps and scalars only.

What looks at the history (n-grams, sequences, counts) was done by `history.py`: it left bans in a bitmap, and scores in
the place of logits where biases or output penalties act. A step that no bit asks for costs one scalar branch.

Log
  branches on the row's bits inside the tile loop: bits are uniform in a program, so the branch is too. Not measured.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.state import Bitmap, Feature, Param

_ADJUSTED = tl.constexpr(int(Feature.BIAS | Feature.OUTPUT_PENALTY))
_DYNAMIC = tl.constexpr(int(Feature.NO_REPEAT_NGRAM | Feature.ENCODER_NO_REPEAT_NGRAM | Feature.BAD_WORDS))
_ENCODER_REPETITION = tl.constexpr(int(Feature.ENCODER_REPETITION_PENALTY))
_REPETITION = tl.constexpr(int(Feature.REPETITION_PENALTY))
_BAN = tl.constexpr(int(Feature.BAN))
_MIN_LENGTH = tl.constexpr(int(Feature.MIN_LENGTH))
_ALLOWED = tl.constexpr(int(Feature.ALLOWED))
_FORCED_BOS = tl.constexpr(int(Feature.FORCED_BOS))
_FORCED_EOS = tl.constexpr(int(Feature.FORCED_EOS))
_REMOVE_INVALID = tl.constexpr(int(Feature.REMOVE_INVALID))
_DECAY = tl.constexpr(int(Feature.DECAY))
_SUPPRESS = tl.constexpr(int(Feature.SUPPRESS))
_BEGIN_SUPPRESS = tl.constexpr(int(Feature.BEGIN_SUPPRESS))

_BIT_SEEN = tl.constexpr(int(Bitmap.SEEN))
_BIT_PROMPT_SEEN = tl.constexpr(int(Bitmap.PROMPT_SEEN))
_BIT_BAN = tl.constexpr(int(Bitmap.BAN))
_BIT_END = tl.constexpr(int(Bitmap.END))
_BIT_EOS = tl.constexpr(int(Bitmap.EOS))
_BIT_ALLOWED = tl.constexpr(int(Bitmap.ALLOWED))
_BIT_FORCED_EOS = tl.constexpr(int(Bitmap.FORCED_EOS))
_BIT_SUPPRESS = tl.constexpr(int(Bitmap.SUPPRESS))
_BIT_BEGIN_SUPPRESS = tl.constexpr(int(Bitmap.BEGIN_SUPPRESS))

_PROMPT_LEN = tl.constexpr(int(Param.PROMPT_LEN))
_MIN_TOTAL = tl.constexpr(int(Param.MIN_TOTAL))
_MAX_LENGTH = tl.constexpr(int(Param.MAX_LENGTH))
_REPETITION_PENALTY = tl.constexpr(int(Param.REPETITION_PENALTY))
_ENCODER_REPETITION_PENALTY = tl.constexpr(int(Param.ENCODER_REPETITION_PENALTY))
_FORCED_BOS_ID = tl.constexpr(int(Param.FORCED_BOS))
_DECAY_START = tl.constexpr(int(Param.DECAY_START))
_DECAY_FACTOR = tl.constexpr(int(Param.DECAY_FACTOR))
_DECAY_FACTOR_HIGH = tl.constexpr(int(Param.DECAY_FACTOR_HIGH))
_BEGIN_LENGTH = tl.constexpr(int(Param.BEGIN_LENGTH))
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def bits_of(bitmap, index, live):
    """Whether the tokens `index` are in a bitmap."""
    return ((tl.load(bitmap + index // 32, mask=live, other=0) >> (index % 32)) & 1) != 0


@triton.jit
def _param(params, column):
    return tl.load(params + column).to(tl.float32, bitcast=True)


@triton.jit
def _penalize(x, seen, penalty, RECIPROCAL: tl.constexpr):
    if RECIPROCAL:
        divided = x * tl.math.div_rn(1.0, penalty)
    else:
        divided = tl.math.div_rn(x, penalty + x * 0.0)
        divided = tl.where(x == x, divided, x)
    return tl.where(seen, tl.where(x < 0, x * penalty, divided), x)


@triton.jit
def _decay_growth(params, steps):
    """factor ** steps - 1, computed in double as transformers does, rounded to fp32."""
    low = tl.load(params + _DECAY_FACTOR).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(params + _DECAY_FACTOR_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    base = ((high << 32) | low).to(tl.float64, bitcast=True)
    power = base * 0.0 + 1.0
    left = steps
    while left > 0:
        if left % 2 == 1:
            power = power * base
        base = base * base
        left = left // 2
    return (power - 1.0).to(tl.float32)


@triton.jit
def process_tile(
    x, index, live, bitmaps, banned, params, features, length, num_words, peak_allowed,
    RECIPROCAL: tl.constexpr, BEFORE_ALLOWED: tl.constexpr,
):  # fmt: skip
    """Scores of the tokens `index`, fp32 of their shape, after all processors; BEFORE_ALLOWED: those of steps 2 to 9.

    x: logits, or the scores that `history.py` left. bitmaps: of the row's slot. peak_allowed: the largest score of an
    allowed token, for ALLOWED.
    """
    if (features & _ADJUSTED) == 0:
        if (features & _ENCODER_REPETITION) != 0:
            seen = bits_of(bitmaps + _BIT_PROMPT_SEEN * num_words, index, live)
            x = _penalize(x, seen, _param(params, _ENCODER_REPETITION_PENALTY), RECIPROCAL)
        if (features & _REPETITION) != 0:
            seen = bits_of(bitmaps + _BIT_SEEN * num_words, index, live)
            x = _penalize(x, seen, _param(params, _REPETITION_PENALTY), RECIPROCAL)
    if (features & _DYNAMIC) != 0:
        x = tl.where(bits_of(banned, index, live), -float("inf"), x)
    if (features & _BAN) != 0:
        x = tl.where(bits_of(bitmaps + _BIT_BAN * num_words, index, live), x + -float("inf"), x)
    if ((features & _MIN_LENGTH) != 0) & (length < tl.load(params + _MIN_TOTAL)):
        x = tl.where(bits_of(bitmaps + _BIT_END * num_words, index, live), -float("inf"), x)
    if BEFORE_ALLOWED:
        return x
    if (features & _ALLOWED) != 0:
        kept = tl.where(peak_allowed == -float("inf"), 0.0, x)
        x = tl.where(bits_of(bitmaps + _BIT_ALLOWED * num_words, index, live), kept, -float("inf"))
    if ((features & _FORCED_BOS) != 0) & (length == 1):
        x = tl.where(index == tl.load(params + _FORCED_BOS_ID), 0.0, -float("inf"))
    if ((features & _FORCED_EOS) != 0) & (length == tl.load(params + _MAX_LENGTH) - 1):
        x = tl.where(bits_of(bitmaps + _BIT_FORCED_EOS * num_words, index, live), 0.0, -float("inf"))
    if (features & _REMOVE_INVALID) != 0:
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST), 0.0)
    if (features & _DECAY) != 0:
        steps = length - tl.load(params + _PROMPT_LEN) - tl.load(params + _DECAY_START)
        if steps > 0:
            growth = _decay_growth(params, steps)
            grows = bits_of(bitmaps + _BIT_EOS * num_words, index, live) & (tl.abs(x) <= _LARGEST)
            x = tl.where(grows, x + tl.abs(x) * growth, x)
    if (features & _SUPPRESS) != 0:
        x = tl.where(bits_of(bitmaps + _BIT_SUPPRESS * num_words, index, live), -float("inf"), x)
    if ((features & _BEGIN_SUPPRESS) != 0) & (length == tl.load(params + _BEGIN_LENGTH)):
        x = tl.where(bits_of(bitmaps + _BIT_BEGIN_SUPPRESS * num_words, index, live), -float("inf"), x)
    return x


@triton.jit
def allowed_peak(
    logits, scores, bitmaps, banned, params, features, length, vocab_size, num_words,
    RECIPROCAL: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """The largest score of an allowed token before ALLOWED acts: if it is -inf, all allowed tokens get 0 instead."""
    peak = -float("inf")
    for start in range(0, vocab_size, TILE_V):
        index = start + tl.arange(0, TILE_V)
        live = index < vocab_size
        x = tl.load(logits + index, mask=live, other=0.0).to(tl.float32)
        if (features & _ADJUSTED) != 0:
            x = tl.load(scores + index, mask=live, other=0.0)
        x = process_tile(x, index, live, bitmaps, banned, params, features, length, num_words, 0.0, RECIPROCAL, True)
        allowed = live & bits_of(bitmaps + _BIT_ALLOWED * num_words, index, live)
        x = tl.where(allowed, tl.where(x == x, x, 0.0), -float("inf"))
        peak = tl.maximum(peak, tl.max(x, 0))
    return peak
