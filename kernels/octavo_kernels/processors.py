"""The processors of generate() on one tile of a row: steps 2 to 16 of docs/generation.md, bitmaps and scalars only.

What looks at the history (n-grams, sequences, counts) was done by `history.py`: it left bans in a bitmap, and scores in
the place of logits where biases or output penalties act. A step that no bit asks for costs one scalar branch.

Log (Triton 3.7.1; no GPU was at hand: not measured)
  branches on the row's bits inside the tile loop: bits are uniform in a program, so the branch is too. Parameters are
  read again by each tile; they are one line of L1, and kept in registers they would cost 12 of every thread.
  ALLOWED replaces all allowed tokens by 0 if none is above -inf: known after a pass. That pass assumes that there is
  one, and the row is done again if there was not, rather than that every row with ALLOWED takes two passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.filters import float_param
from octavo_kernels.state import Bitmap, Feature, Param

_NGRAMS = tl.constexpr(int(Feature.NO_REPEAT_NGRAM | Feature.ENCODER_NO_REPEAT_NGRAM))
_BAD_WORDS = tl.constexpr(int(Feature.BAD_WORDS))
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

USES_SCORES = tl.constexpr(int(Feature.BIAS | Feature.OUTPUT_PENALTY))
"""What makes `history.py` leave scores after step 4a in the workspace."""
KEEPS_SCORES = tl.constexpr((int(Feature.SAMPLE) - 1) | int(Feature.LOGPROBS))
"""Rows whose scores are written to the workspace: those with processors, and those that want to see them."""


@triton.jit
def has_bit(bitmap_ptr, token, mask):
    """Whether tokens are in a bitmap."""
    return ((tl.load(bitmap_ptr + (token >> 5), mask=mask, other=0) >> (token & 31)) & 1) != 0


@triton.jit
def _penalize(x, seen, penalty, RECIPROCAL: tl.constexpr):
    if RECIPROCAL:
        divided = x * tl.math.div_rn(1.0, penalty)
    else:
        divided = tl.math.div_rn(x, penalty)
    return tl.where(seen, tl.where(x < 0, x * penalty, divided), x)


@triton.jit
def _decay_growth(params_ptr, steps):
    """factor ** steps - 1, computed in double as transformers does, rounded to fp32."""
    low = tl.load(params_ptr + _DECAY_FACTOR).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(params_ptr + _DECAY_FACTOR_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    base = ((high << 32) | low).to(tl.float64, bitcast=True)
    power = base * 0.0 + 1.0
    while steps > 0:
        if (steps & 1) == 1:
            power = power * base
        base = base * base
        steps = steps >> 1
    return (power - 1.0).to(tl.float32)


@triton.jit
def _repetition_penalties(x, token, live, bitmaps_ptr, words, params_ptr, features, RECIPROCAL: tl.constexpr):
    """Steps 3 and 4, where `history.py` has not done them."""
    if (features & _ENCODER_REPETITION) != 0:
        seen = has_bit(bitmaps_ptr + _BIT_PROMPT_SEEN * words, token, live)
        x = _penalize(x, seen, float_param(params_ptr, _ENCODER_REPETITION_PENALTY), RECIPROCAL)
    if (features & _REPETITION) != 0:
        seen = has_bit(bitmaps_ptr + _BIT_SEEN * words, token, live)
        x = _penalize(x, seen, float_param(params_ptr, _REPETITION_PENALTY), RECIPROCAL)
    return x


@triton.jit
def _bans(x, token, live, bitmaps_ptr, banned_ptr, words, params_ptr, features, length):
    """Steps 5 to 9. A ban by bad words is a bias of -inf, which leaves NaN and makes NaN of +inf; n-grams overwrite.

    Which of the two banned a token is not known where a row uses both: then it is overwritten.
    """
    if (features & _NGRAMS) != 0:
        x = tl.where(has_bit(banned_ptr, token, live), -float("inf"), x)
    elif (features & _BAD_WORDS) != 0:
        x = tl.where(has_bit(banned_ptr, token, live), x + -float("inf"), x)
    if (features & _BAN) != 0:
        x = tl.where(has_bit(bitmaps_ptr + _BIT_BAN * words, token, live), x + -float("inf"), x)
    if ((features & _MIN_LENGTH) != 0) & (length < tl.load(params_ptr + _MIN_TOTAL)):
        x = tl.where(has_bit(bitmaps_ptr + _BIT_END * words, token, live), -float("inf"), x)
    return x


@triton.jit
def process_tile(
    x, token, live, bitmaps_ptr, banned_ptr, words, params_ptr, features, length, none_allowed, RECIPROCAL: tl.constexpr
):
    """(scores fp32 [TILE] after steps 2 to 16, int32 [TILE] whether the token is allowed and was not -inf before).

    x: logits, or the scores that `history.py` left. bitmaps_ptr: the slot's, of `words` words each. none_allowed: 1 if
    no token was, so that all allowed ones get 0.
    """
    if (features & USES_SCORES) == 0:
        x = _repetition_penalties(x, token, live, bitmaps_ptr, words, params_ptr, features, RECIPROCAL)
    x = _bans(x, token, live, bitmaps_ptr, banned_ptr, words, params_ptr, features, length)
    candidates = live.to(tl.int32)
    if (features & _ALLOWED) != 0:
        allowed = has_bit(bitmaps_ptr + _BIT_ALLOWED * words, token, live)
        candidates = (allowed & (x != -float("inf"))).to(tl.int32)
        x = tl.where(allowed, tl.where(none_allowed != 0, 0.0, x), -float("inf"))
    if ((features & _FORCED_BOS) != 0) & (length == 1):
        x = tl.where(token == tl.load(params_ptr + _FORCED_BOS_ID), 0.0, -float("inf"))
    if ((features & _FORCED_EOS) != 0) & (length == tl.load(params_ptr + _MAX_LENGTH) - 1):
        x = tl.where(has_bit(bitmaps_ptr + _BIT_FORCED_EOS * words, token, live), 0.0, -float("inf"))
    if (features & _REMOVE_INVALID) != 0:
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST), 0.0)
    if (features & _DECAY) != 0:
        steps = length - tl.load(params_ptr + _PROMPT_LEN) - tl.load(params_ptr + _DECAY_START)
        if steps > 0:
            grows = has_bit(bitmaps_ptr + _BIT_END * words, token, live) & (tl.abs(x) <= _LARGEST)
            x = tl.where(grows, x + tl.abs(x) * _decay_growth(params_ptr, steps), x)
    if (features & _SUPPRESS) != 0:
        x = tl.where(has_bit(bitmaps_ptr + _BIT_SUPPRESS * words, token, live), -float("inf"), x)
    if ((features & _BEGIN_SUPPRESS) != 0) & (length == tl.load(params_ptr + _BEGIN_LENGTH)):
        x = tl.where(has_bit(bitmaps_ptr + _BIT_BEGIN_SUPPRESS * words, token, live), -float("inf"), x)
    return x, candidates
