"""Choosing the next token of every row in one launch: processors, filters, the draw, and the state that moves on.

One program per row, which always walks its row in the same tiles: a row's result has the same bits whatever else is in
the batch. The order of steps and their numbers are those of transformers' generate(); `reference/sampling.py` says the
same in plain torch.

B  process: logits to scores (`processors.py`), over the temperature, with the largest of each lane of a tile. Greedy
rows end here. C  filter: each filter keeps an interval of scores, so a row carries two numbers and no mask
(`filters.py`); the largest scores are copied out once, and the filters work on them in registers. D  draw:
argmax(softmax(x) / q) over the interval, q by `philox.py`, the lowest token on ties.

Log (variants, what they gave; Triton 3.7.1; no GPU was at hand: times are predictions, not measured)
  two passes over the row with top_k, top_h or, mostly, another filter first: maxima of the lanes of a tile, then the
  candidates (`filters.py`). Predicted ~12 us for a row, two rows at a time on a multiprocessor. A radix select of the
  k-th largest and a compaction that counts first were 8 passes.
  maxima and their tokens per lane, reduced once: a reduction per tile costs ~100 cycles, 25 tiles a row.
  loads masked by the padded width, columns beyond the vocabulary replaced after: masked by 50257 no load has 16 bytes;
  now 79 of 250 in the code have, all those of whole tiles.
  rows without processors keep no scores: two passes over bf16 logits; fp32 scores of 256 rows (51 MB) leave L2.
  noise for survivors only: a full row is ~65 instructions for each of 50257, ~15 us; after top_k 50 it is nothing. Of a
  whole row, a tile whose largest probability cannot win whatever its noise is skipped.
  registers, bf16, sm_90: 4096 columns a tile 255; 2048 and 8 warps 164; a limit of 128 costs no spill and lets two
  programs share a multiprocessor. It does if divisions are by a reciprocal where a filter only compares: correctly
  rounded ones call a subroutine, which spilled 23 words. 16 warps: 128 registers and one spill, no more rows at a time.
  draw in tiles of 1024: the race needs 4 words of noise per column. Code is 15,000 instructions, half of them the slow
  path of the filters, which most rows never fetch.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.checks import FLOATS, require_contiguous, require_dense_rows, require_device, require_floats
from octavo_kernels.dependent_launch import follow, launch_options
from octavo_kernels.filters import (
    FILTERS,
    MOST_RANKED,
    filter_row,
    float_param,
    is_guess,
    num_candidates,
    threshold_of_lanes,
    total_of,
)
from octavo_kernels.philox import LARGEST_RATIO, exponentials, random_words
from octavo_kernels.processors import KEEPS_SCORES, USES_SCORES, has_bit, process_tile
from octavo_kernels.state import NUM_PARAMS, Bitmap, Feature, Finish, Param, SlotState
from octavo_kernels.variant import Variant
from octavo_kernels.workspace import WINDOW, SamplerWorkspace

TILE: Final = 2048
"""Columns of a row that are worked on at a time."""
NUM_WARPS: Final = 8
MAX_REGISTERS: Final = 128
"""Per thread: two programs fit a multiprocessor."""

_FEATURES = tl.constexpr(int(Param.FEATURES))
_SEED_LOW = tl.constexpr(int(Param.SEED_LOW))
_SEED_HIGH = tl.constexpr(int(Param.SEED_HIGH))
_ROW = tl.constexpr(int(Param.ROW))
_NUM_ROWS = tl.constexpr(int(Param.NUM_ROWS))
_PROMPT_LEN = tl.constexpr(int(Param.PROMPT_LEN))
_MAX_TOTAL = tl.constexpr(int(Param.MAX_TOTAL))
_TEMPERATURE_VALUE = tl.constexpr(int(Param.TEMPERATURE))
_NUM_PARAMS = tl.constexpr(NUM_PARAMS)
_SAMPLE = tl.constexpr(int(Feature.SAMPLE))
_TEMPERATURE = tl.constexpr(int(Feature.TEMPERATURE))
_ALLOWED = tl.constexpr(int(Feature.ALLOWED))
_REPETITION = tl.constexpr(int(Feature.REPETITION_PENALTY))
_OUTPUT_PENALTY = tl.constexpr(int(Feature.OUTPUT_PENALTY))
_SEEN = tl.constexpr(int(Bitmap.SEEN))
_EOS = tl.constexpr(int(Bitmap.EOS))
_END = tl.constexpr(int(Bitmap.END))
_NUM_BITMAPS = tl.constexpr(len(Bitmap))
_BY_EOS = tl.constexpr(int(Finish.EOS))
_BY_STOP_TOKEN = tl.constexpr(int(Finish.STOP_TOKEN))
_BY_LENGTH = tl.constexpr(int(Finish.LENGTH))
_BAD_LOGITS = tl.constexpr(int(Finish.NON_FINITE_LOGITS))
_BAD_SCORES = tl.constexpr(int(Finish.NON_FINITE_SCORES))
_WINDOW = tl.constexpr(WINDOW)
_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def scaled(x, params_ptr, features, RECIPROCAL: tl.constexpr):
    """Step 18 of rows that sample: scores over the temperature, as PyTorch divides by a Python number."""
    if (features & (_SAMPLE | _TEMPERATURE)) == (_SAMPLE | _TEMPERATURE):
        temperature = float_param(params_ptr, _TEMPERATURE_VALUE)
        if RECIPROCAL:
            x = x * tl.math.div_rn(1.0, temperature)
        else:
            x = tl.math.div_rn(x, temperature)
    return x


@triton.jit
def _is_bad(logits_ptr, num_columns, vocab_size, TILE: tl.constexpr):
    """1 if the model gave NaN or +inf, else 0."""
    bad = tl.zeros([TILE], tl.int32)
    for start in range(0, num_columns, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + token, mask=token < num_columns, other=0.0).to(tl.float32)
        bad |= ((token < vocab_size) & ((x < float("inf")) == 0)).to(tl.int32)
    return tl.max(bad, 0)


@triton.jit
def _process(
    logits_ptr,
    scores_ptr,
    bitmaps_ptr,
    banned_ptr,
    words,
    params_ptr,
    features,
    length,
    num_columns,
    vocab_size,
    RECIPROCAL: tl.constexpr,
    TILE: tl.constexpr,
):
    """B. Of each lane of a tile: the largest score, its first token, 1 if it met a NaN.

    Writes the scores of rows that keep them, -inf from vocab_size on.
    """
    best = tl.full([TILE], -float("inf"), tl.float32)
    where = tl.full([TILE], _NO_TOKEN, tl.int32)
    flags = tl.zeros([TILE], tl.int32)
    if (features & KEEPS_SCORES) == 0:
        for start in range(0, num_columns, TILE):
            token = start + tl.arange(0, TILE)
            x = tl.load(logits_ptr + token, mask=token < num_columns, other=-float("inf")).to(tl.float32)
            x = tl.where(token < vocab_size, scaled(x, params_ptr, features, RECIPROCAL), -float("inf"))
            flags |= (x != x).to(tl.int32)
            better = x > best
            best = tl.where(better, x, best)
            where = tl.where(better, token, where)
    else:
        none_allowed = 0
        turn = 0
        while turn < 2:
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
                    x,
                    token,
                    live,
                    bitmaps_ptr,
                    banned_ptr,
                    words,
                    params_ptr,
                    features,
                    length,
                    none_allowed,
                    RECIPROCAL,
                )
                x = tl.where(live, scaled(x, params_ptr, features, RECIPROCAL), -float("inf"))
                tl.store(scores_ptr + token, x, mask=inside)
                flags |= (x != x).to(tl.int32) | (candidates << 1)
                better = x > best
                best = tl.where(better, x, best)
                where = tl.where(better, token, where)
            turn += 1
            if ((features & _ALLOWED) == 0) | (tl.max(flags & 2, 0) != 0):
                turn = 2
            none_allowed = 1
    return best, where, flags & 1


@triton.jit
def _tile_of_scores(
    logits_ptr, scores_ptr, token, params_ptr, features, num_columns, vocab_size, RECIPROCAL: tl.constexpr
):
    """What `_process` saw: of rows that keep no scores it is computed again."""
    inside = token < num_columns
    if (features & KEEPS_SCORES) != 0:
        x = tl.load(scores_ptr + token, mask=inside, other=-float("inf"))
    else:
        x = tl.load(logits_ptr + token, mask=inside, other=-float("inf")).to(tl.float32)
        x = tl.where(token < vocab_size, scaled(x, params_ptr, features, RECIPROCAL), -float("inf"))
    return x


@triton.jit
def _copy_candidates(
    logits_ptr,
    scores_ptr,
    values_ptr,
    ids_ptr,
    params_ptr,
    features,
    peak,
    threshold,
    num_columns,
    vocab_size,
    RECIPROCAL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copies the finite scores from threshold on, in order of their tokens, as many as fit.

    Returns their number and the sum of exp(x - peak) of the others, 0 unless the candidates are a guess.
    """
    count = 0
    rest = 0.0
    for start in range(0, num_columns, TILE):
        token = start + tl.arange(0, TILE)
        x = _tile_of_scores(logits_ptr, scores_ptr, token, params_ptr, features, num_columns, vocab_size, RECIPROCAL)
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


@triton.jit
def _store_scores(
    logits_ptr, scores_ptr, params_ptr, features, num_columns, vocab_size, RECIPROCAL: tl.constexpr, TILE: tl.constexpr
):
    for start in range(0, num_columns, TILE):
        token = start + tl.arange(0, TILE)
        x = _tile_of_scores(logits_ptr, scores_ptr, token, params_ptr, features, num_columns, vocab_size, RECIPROCAL)
        tl.store(scores_ptr + token, x, mask=token < num_columns)


@triton.jit
def _draw(
    row_ptr,
    ids_ptr,
    width,
    lo,
    hi,
    params_ptr,
    step,
    vocab_size,
    num_threads,
    NATIVE_LOG: tl.constexpr,
    TILE: tl.constexpr,
    COMPACT: tl.constexpr,
):
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
def _choose(
    logits_ptr,
    scores_ptr,
    values_ptr,
    ids_ptr,
    interval_ptr,
    params_ptr,
    features,
    lanes,
    peak,
    step,
    num_columns,
    vocab_size,
    num_threads,
    RECIPROCAL: tl.constexpr,
    NATIVE_LOG: tl.constexpr,
    TILE: tl.constexpr,
):
    """C and D of a row that samples: its token and that one's score."""
    token = _NO_TOKEN
    score = peak
    lo = -float("inf")
    hi = peak
    valid = 0
    wanted = num_candidates(params_ptr, features)
    if ((features & FILTERS) != 0) & (wanted <= MOST_RANKED):
        threshold = threshold_of_lanes(lanes, wanted)
        count, rest = _copy_candidates(
            logits_ptr,
            scores_ptr,
            values_ptr,
            ids_ptr,
            params_ptr,
            features,
            peak,
            threshold,
            num_columns,
            vocab_size,
            RECIPROCAL,
            TILE,
        )
        if count <= _WINDOW:
            tl.debug_barrier()  # candidates are read by other threads than wrote them
            place = tl.arange(0, _WINDOW)
            x = tl.load(values_ptr + place, mask=place < count, other=-float("inf"))
            lo, hi, valid = filter_row(
                values_ptr, x, _WINDOW, params_ptr, features, peak, rest, threshold, values_ptr, _WINDOW, True, _WINDOW
            )
            if valid != 0:
                token, score = _draw(
                    values_ptr,
                    ids_ptr,
                    count,
                    lo,
                    hi,
                    params_ptr,
                    step,
                    vocab_size,
                    num_threads,
                    NATIVE_LOG,
                    TILE // 2,
                    True,
                )
    if valid == 0:
        if (features & KEEPS_SCORES) == 0:
            _store_scores(logits_ptr, scores_ptr, params_ptr, features, num_columns, vocab_size, RECIPROCAL, TILE)
        tl.debug_barrier()
        lo = -float("inf")
        hi = peak
        if (features & FILTERS) != 0:
            lo, hi, valid = filter_row(
                scores_ptr,
                lanes,
                num_columns,
                params_ptr,
                features,
                peak,
                peak * 0.0,
                peak,
                values_ptr,
                TILE,
                False,
                _WINDOW,
            )
        token, score = _draw(
            scores_ptr,
            ids_ptr,
            num_columns,
            lo,
            hi,
            params_ptr,
            step,
            vocab_size,
            num_threads,
            NATIVE_LOG,
            TILE // 2,
            False,
        )
    tl.store(interval_ptr, lo)
    tl.store(interval_ptr + 1, hi)
    return token, score


@triton.jit
def _count(num_counts_ptr, ids_ptr, counts_ptr, token, capacity, TILE: tl.constexpr):
    """One more of token in a slot's list of distinct output tokens."""
    known = tl.minimum(tl.maximum(tl.load(num_counts_ptr), 0), capacity)
    place = known
    for start in range(0, known, TILE):
        index = start + tl.arange(0, TILE)
        found = (tl.load(ids_ptr + index, mask=index < known, other=-1) == token) & (index < known)
        place = tl.minimum(place, tl.min(tl.where(found, index, known), 0))
    if place < known:
        tl.store(counts_ptr + place, tl.load(counts_ptr + place) + 1)
    elif known < capacity:
        tl.store(ids_ptr + known, token)
        tl.store(counts_ptr + known, 1)
        tl.store(num_counts_ptr, known + 1)


@triton.jit(do_not_specialize=["padding_slot", "num_threads", "vocab_size"])
def _sample_kernel(
    logits_ptr,
    row_slots_ptr,
    results_ptr,
    length_ptr,
    finished_ptr,
    params_ptr,
    hist_ptr,
    bitmaps_ptr,
    num_counts_ptr,
    count_ids_ptr,
    counts_ptr,
    scores_ptr,
    banned_ptr,
    interval_ptr,
    values_ptr,
    ids_ptr,
    stride_logits,
    stride_scores,
    num_columns,  # of logits and scores
    vocab_size,
    bitmap_words,
    hist_width,
    padding_slot,
    num_threads,
    RECIPROCAL: tl.constexpr,
    NATIVE_LOG: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    if DEPENDENT_LAUNCH:
        follow()
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    running = (slot >= 0) & (slot < padding_slot)
    running &= tl.load(finished_ptr + slot, mask=running, other=1) == 0
    length = tl.load(length_ptr + slot, mask=running, other=-1)
    token = -1
    finish = 0
    score = 0.0
    if (length >= 0) & (length < hist_width):
        params_ptr += slot * _NUM_PARAMS
        features = tl.load(params_ptr + _FEATURES)
        logits_ptr += row * stride_logits
        scores_ptr += row * stride_scores
        bitmaps_ptr += slot * _NUM_BITMAPS * bitmap_words
        lanes, where, broken = _process(
            logits_ptr,
            scores_ptr,
            bitmaps_ptr,
            banned_ptr + row * bitmap_words,
            bitmap_words,
            params_ptr,
            features,
            length,
            num_columns,
            vocab_size,
            RECIPROCAL,
            TILE,
        )
        score = tl.max(lanes, 0)
        samples = (features & _SAMPLE) != 0
        failed = (tl.max(broken, 0) != 0) | (score == -float("inf")) | (samples & (score == float("inf")))
        if failed:
            bad_logits = _is_bad(logits_ptr, num_columns, vocab_size, TILE)
            finish = tl.where(bad_logits != 0, _BAD_LOGITS, _BAD_SCORES)
            tl.store(finished_ptr + slot, finish)
        else:
            if samples:
                token, score = _choose(
                    logits_ptr,
                    scores_ptr,
                    values_ptr + row * _WINDOW,
                    ids_ptr + row * _WINDOW,
                    interval_ptr + row * 2,
                    params_ptr,
                    features,
                    lanes,
                    score,
                    length - tl.load(params_ptr + _PROMPT_LEN),
                    num_columns,
                    vocab_size,
                    num_threads,
                    RECIPROCAL,
                    NATIVE_LOG,
                    TILE,
                )
            else:
                token = tl.min(tl.where(lanes == score, where, _NO_TOKEN), 0)
            tl.store(hist_ptr + slot * hist_width + length, token)
            tl.store(length_ptr + slot, length + 1)
            if (features & _REPETITION) != 0:
                word_ptr = bitmaps_ptr + _SEEN * bitmap_words + (token >> 5)
                tl.store(word_ptr, tl.load(word_ptr) | (1 << (token & 31)))
            if (features & _OUTPUT_PENALTY) != 0:
                lists = slot * hist_width
                _count(num_counts_ptr + slot, count_ids_ptr + lists, counts_ptr + lists, token, hist_width, 1024)
            if has_bit(bitmaps_ptr + _EOS * bitmap_words, token, True):
                finish = _BY_EOS
            elif has_bit(bitmaps_ptr + _END * bitmap_words, token, True):
                finish = _BY_STOP_TOKEN
            elif length + 1 >= tl.load(params_ptr + _MAX_TOTAL):
                finish = _BY_LENGTH
            if finish != 0:
                tl.store(finished_ptr + slot, finish)
    result_ptr = results_ptr + row * 4
    tl.store(result_ptr, token)
    tl.store(result_ptr + 1, finish)
    tl.store(result_ptr + 2, score.to(tl.int32, bitcast=True))
    tl.store(result_ptr + 3, 0)


def sample(
    logits: Tensor,
    state: SlotState,
    row_slots: Tensor,
    workspace: SamplerWorkspace,
    results: Tensor,
    *,
    reciprocal: bool,
    num_threads: int,
    dependent_launch: bool = False,
) -> Tensor:
    """Chooses a token for each row and moves its slot on: hist, length, finished; seen tokens and counts where used.

    logits: [R, Vp] bf16, fp16 or fp32, Vp >= V, columns dense, those from V on do not count; widths and row strides
    that are multiples of 16 give wide loads. row_slots: int32 [R] contiguous, no running slot twice. workspace: of R
    rows or more; `apply_history` came before for rows with BIAS, OUTPUT_PENALTY, n-gram bans or bad words. results:
    int32 [R, 4] contiguous: token, `Finish`, the token's score over the temperature by its bits, 0. reciprocal: scores
    are divided by multiplying with the fp32 reciprocal, as CUDA does. num_threads: of `philox.random_words`, a multiple
    of 256. dependent_launch: see `octavo_kernels.dependent_launch`.

    Token -1: rows of the padding slot, of slots out of range or finished and of slots whose length is none (finish 0,
    nothing else is written); rows without a choice (finish NON_FINITE_LOGITS or NON_FINITE_SCORES, also in the state).
    Leaves in the workspace what its fields say. Returns results. Raises ValueError naming an argument of another type,
    shape, stride or device.
    """
    check_arguments(logits, state, row_slots, workspace, results)
    if num_threads < 256 or num_threads % 256 != 0:
        raise ValueError(f"num_threads: {num_threads} is not a positive multiple of 256")
    num_rows = row_slots.numel()
    if num_rows == 0:
        return results
    _sample_kernel[(num_rows,)](
        logits,
        row_slots,
        results,
        state.length,
        state.finished,
        state.params,
        state.hist,
        state.bitmaps,
        state.num_counts,
        state.count_ids,
        state.counts,
        workspace.scores,
        workspace.banned,
        workspace.interval,
        workspace.candidate_values,
        workspace.candidate_ids,
        logits.stride(0),
        workspace.scores.stride(0),
        min(logits.shape[1], workspace.scores.shape[1]),
        state.vocab_size,
        state.bitmaps.shape[2],
        state.hist.shape[1],
        state.padding_slot,
        num_threads,
        RECIPROCAL=reciprocal,
        NATIVE_LOG=logits.is_cuda,
        TILE=TILE,
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
        enable_fp_fusion=False,
        **launch_options(dependent_launch),
    )
    return results


def check_arguments(
    logits: Tensor, state: SlotState, row_slots: Tensor, workspace: SamplerWorkspace, results: Tensor
) -> None:
    """Raises ValueError naming the argument that does not fit the others."""
    num_rows, vocab_size = row_slots.numel(), state.vocab_size
    if row_slots.dtype != torch.int32 or row_slots.dim() != 1 or not row_slots.is_contiguous():
        raise ValueError(f"row_slots: {row_slots.dtype} {tuple(row_slots.shape)}, not contiguous int32 [R]")
    require_floats("logits", logits, FLOATS)
    if logits.dim() != 2 or logits.shape[0] != num_rows or logits.shape[1] < vocab_size:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, not [{num_rows}, {vocab_size} or more]")
    require_dense_rows("logits", logits)
    if results.dtype != torch.int32 or tuple(results.shape) != (num_rows, 4):
        raise ValueError(f"results: {results.dtype} {tuple(results.shape)}, not int32 [{num_rows}, 4]")
    require_contiguous("results", results)
    if workspace.vocab_size != vocab_size:
        raise ValueError(f"workspace: of {workspace.vocab_size} tokens, the state has {vocab_size}")
    if workspace.max_rows < num_rows:
        raise ValueError(f"workspace: {workspace.max_rows} rows, {num_rows} needed")
    for name, tensor in (
        ("row_slots", row_slots),
        ("logits", logits),
        ("workspace", workspace.scores),
        ("results", results),
    ):
        require_device(name, tensor, state.arena)


def compile_variants() -> list[Variant]:
    """Every form that the engine launches: on a GPU it divides as CUDA does."""
    return [_variant(dtype) for dtype in ("bf16", "fp16", "fp32")]


def _variant(dtype: str) -> Variant:
    constants: dict[str, Any] = {"RECIPROCAL": True, "NATIVE_LOG": True, "TILE": TILE, "DEPENDENT_LAUNCH": False}
    pointers = {argument: "*i32" for argument in _sample_kernel.arg_names if argument.endswith("_ptr")}
    pointers |= {"logits_ptr": f"*{dtype}", "scores_ptr": "*fp32", "interval_ptr": "*fp32", "values_ptr": "*fp32"}
    signature = dict.fromkeys(_sample_kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    return Variant(
        name=f"sampling/sample {dtype}",
        kernel=_sample_kernel,
        signature=signature,
        constexprs=constants,
        divisible=frozenset({*pointers, "stride_logits", "stride_scores", "num_columns"}),
        num_warps=NUM_WARPS,
        max_registers=MAX_REGISTERS,
        fp_fusion=False,
    )
