"""Choosing the next token of every row in one launch: processors, filters, the draw, and the state that moves on.

One program per row, which always walks its row in the same tiles: a row's result has the same bits whatever else is in
the batch. The order of steps and their numbers are those of transformers' generate(); `reference/sampling.py` says the
same in plain torch.

B  process: logits, rounded to the model's type, to scores (`processors.py`), over the temperature. Greedy rows end
here. C  filter: each filter keeps an interval of scores, of what the one before left, so a row carries two numbers and
no mask (`filters.py`). With top_k the candidates are copied out once and the rest works on them. D  draw:
argmax(softmax(x) / q) over the interval, q by `philox.py`, the lowest token on ties.

Log
  one program per row: 50257 columns are 201 KB, which each pass reads from L2 again. Predicted: greedy 3 us, top_k 50
  ~20 us (four passes of the radix select, one of compaction), top_p over a whole row ~80 us (32 passes). Not measured.
  filters written one after another, each with passes of its own: 255 registers at 4096 columns a tile, over 10 minutes
  of compilation for everything inlined. One loop over the filters, each pass once: 255 registers, 56 s. 2048 columns a
  tile, 8 warps (now): 212 registers, no spills, 16 KB of shared memory, 11 s (sm_90, Triton 3.7).
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.filters import filter_row
from octavo_kernels.philox import exponentials, random_words
from octavo_kernels.processors import allowed_peak, process_tile
from octavo_kernels.state import NUM_PARAMS, Bitmap, Feature, Finish, Param, SlotState
from octavo_kernels.variant import Variant
from octavo_kernels.workspace import WINDOW, SamplerWorkspace

TILE: Final = 2048
RESULT_COLUMNS: Final = 4

_FEATURES = tl.constexpr(int(Param.FEATURES))
_SEED_LOW = tl.constexpr(int(Param.SEED_LOW))
_SEED_HIGH = tl.constexpr(int(Param.SEED_HIGH))
_ROW = tl.constexpr(int(Param.ROW))
_NUM_ROWS = tl.constexpr(int(Param.NUM_ROWS))
_PROMPT_LEN = tl.constexpr(int(Param.PROMPT_LEN))
_MAX_TOTAL = tl.constexpr(int(Param.MAX_TOTAL))
_TEMPERATURE = tl.constexpr(int(Param.TEMPERATURE))
_NUM_PARAMS = tl.constexpr(NUM_PARAMS)
_SAMPLE = tl.constexpr(int(Feature.SAMPLE))
_HAS_TEMPERATURE = tl.constexpr(int(Feature.TEMPERATURE))
_ALLOWED = tl.constexpr(int(Feature.ALLOWED))
_REPETITION = tl.constexpr(int(Feature.REPETITION_PENALTY))
_OUTPUT_PENALTY = tl.constexpr(int(Feature.OUTPUT_PENALTY))
_LOGPROBS = tl.constexpr(int(Feature.LOGPROBS))
_ADJUSTED = tl.constexpr(int(Feature.BIAS | Feature.OUTPUT_PENALTY))
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
def _has_bit(bitmap_ptr, token):
    return ((tl.load(bitmap_ptr + token // 32) >> (token % 32)) & 1) != 0


@triton.jit
def _load_float(params, column):
    return tl.load(params + column).to(tl.float32, bitcast=True)


@triton.jit
def _count_token(num_counts_ptr, ids, counts, token, capacity, TILE_C: tl.constexpr):
    """One more of `token` in a slot's list of distinct output tokens."""
    known = tl.minimum(tl.load(num_counts_ptr), capacity)
    place = known
    for start in range(0, known, TILE_C):
        index = start + tl.arange(0, TILE_C)
        match = (tl.load(ids + index, mask=index < known, other=-1) == token) & (index < known)
        place = tl.minimum(place, tl.min(tl.where(match, index, capacity), 0))
    if place < known:
        tl.store(counts + place, tl.load(counts + place) + 1)
    elif known < capacity:
        tl.store(ids + known, token)
        tl.store(counts + known, 1)
        tl.store(num_counts_ptr, known + 1)


@triton.jit
def _draw(
    values,
    ids,
    width,
    compacted,
    lo,
    hi,
    params,
    length,
    vocab_size,
    num_threads,
    FAST_LOG: tl.constexpr,
    TILE_V: tl.constexpr,
):
    """The token that wins the race over lo <= x <= hi of `width` values, and its score."""
    low = tl.load(params + _SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(params + _SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    seed = (high << 32) | low
    first = tl.load(params + _ROW) * vocab_size
    num_elements = tl.load(params + _NUM_ROWS) * vocab_size
    step = length - tl.load(params + _PROMPT_LEN)
    offsets = tl.arange(0, TILE_V)
    peak = -float("inf")
    total = 0.0
    for start in range(0, width, TILE_V):
        index = start + offsets
        x = tl.load(values + index, mask=index < width, other=-float("inf"))
        x = tl.where((x >= lo) & (x <= hi), x, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(x, 0))
        safe = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        total = total * tl.exp(peak - safe) + tl.sum(tl.exp(x - safe), 0)
        peak = new_peak
    best = -float("inf")
    token = _NO_TOKEN
    score = -float("inf")
    for start in range(0, width, TILE_V):
        index = start + offsets
        live = index < width
        x = tl.load(values + index, mask=live, other=-float("inf"))
        inside = live & (x >= lo) & (x <= hi) & (x > -float("inf"))
        if tl.max(inside.to(tl.int32), 0) != 0:
            name = index
            if compacted:
                name = tl.load(ids + index, mask=live, other=0)
            words = random_words(seed, step, first + name, num_elements, num_threads)
            noise = exponentials(words, FAST_LOG)
            ratio = tl.where(inside, tl.math.div_rn(tl.math.div_rn(tl.exp(x - peak), total), noise), -1.0)
            tile_best = tl.max(ratio, 0)
            tile_token = tl.min(tl.where(ratio == tile_best, name, _NO_TOKEN), 0)
            tile_score = tl.max(tl.where((ratio == tile_best) & (name == tile_token), x, -float("inf")), 0)
            better = (tile_best > best) | ((tile_best == best) & (tile_token < token))
            best = tl.where(better, tile_best, best)
            token = tl.where(better, tile_token, token)
            score = tl.where(better, tile_score, score)
    return token, score


@triton.jit(do_not_specialize=["padding_slot", "num_threads"])
def sample_kernel(
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
    candidate_values_ptr,
    candidate_ids_ptr,
    vocab_size,
    num_words,
    stride_logits,
    stride_scores,
    stride_hist,
    padding_slot,
    num_threads,
    RECIPROCAL: tl.constexpr,
    FAST_LOG: tl.constexpr,
    TILE_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    result = results_ptr + row * 4
    known = (slot >= 0) & (slot < padding_slot)
    if known:
        known = tl.load(finished_ptr + slot) == 0
    if not known:
        tl.store(result, -1)
        tl.store(result + 1, 0)
        return
    params = params_ptr + slot * _NUM_PARAMS
    features = tl.load(params + _FEATURES)
    length = tl.load(length_ptr + slot)
    logits = logits_ptr + row * stride_logits
    scores = scores_ptr + row * stride_scores
    bitmaps = bitmaps_ptr + slot * num_words * _NUM_BITMAPS
    banned = banned_ptr + row * num_words
    samples = (features & _SAMPLE) != 0
    offsets = tl.arange(0, TILE_V)

    peak_allowed = 0.0
    if (features & _ALLOWED) != 0:
        peak_allowed = allowed_peak(
            logits, scores, bitmaps, banned, params, features, length, vocab_size, num_words, RECIPROCAL, TILE_V
        )
    temperature = 1.0
    if samples & ((features & _HAS_TEMPERATURE) != 0):
        temperature = _load_float(params, _TEMPERATURE)
    keeps = samples | ((features & _LOGPROBS) != 0)
    best = -float("inf")
    token = 0
    bad_logits = 0
    bad_scores = 0
    for start in range(0, vocab_size, TILE_V):
        index = start + offsets
        live = index < vocab_size
        raw = tl.load(logits + index, mask=live, other=0.0).to(tl.float32)
        bad_logits |= tl.max((live & ((raw != raw) | (raw == float("inf")))).to(tl.int32), 0)
        x = raw
        if (features & _ADJUSTED) != 0:
            x = tl.load(scores + index, mask=live, other=0.0)
        x = process_tile(
            x, index, live, bitmaps, banned, params, features, length, num_words, peak_allowed, RECIPROCAL, False
        )
        if temperature != 1.0:
            if RECIPROCAL:
                x = x * tl.math.div_rn(1.0, temperature)
            else:
                x = tl.math.div_rn(x, temperature + tl.zeros([TILE_V], tl.float32))
        if keeps:
            tl.store(scores + index, x, mask=live)
        bad_scores |= tl.max((live & (x != x)).to(tl.int32), 0)
        x = tl.where(live & (x == x), x, -float("inf"))
        tile_best = tl.max(x, 0)
        tile_token = tl.min(tl.where((x == tile_best) & live, index, _NO_TOKEN), 0)
        better = tile_best > best
        best = tl.where(better, tile_best, best)
        token = tl.where(better, tile_token, token)
    failed = (bad_scores != 0) | (best == -float("inf")) | (samples & (best == float("inf")))
    if failed:
        reason = tl.where(bad_logits != 0, _BAD_LOGITS, _BAD_SCORES)
        tl.store(result, -1)
        tl.store(result + 1, reason)
        tl.store(finished_ptr + slot, reason)
        return
    score = best
    lo = -float("inf")
    hi = float("inf")
    if samples:
        tl.debug_barrier()
        candidates = candidate_values_ptr + row * _WINDOW
        ids = candidate_ids_ptr + row * _WINDOW
        lo, hi, count = filter_row(scores, candidates, ids, params, features, vocab_size, best, TILE_V)
        tl.debug_barrier()
        values = scores
        width = vocab_size
        if count >= 0:
            values = candidates
            width = count
        token, score = _draw(
            values, ids, width, count >= 0, lo, hi, params, length, vocab_size, num_threads, FAST_LOG, TILE_V
        )
    tl.store(interval_ptr + row * 2, lo)
    tl.store(interval_ptr + row * 2 + 1, hi)

    capacity = stride_hist
    tl.store(hist_ptr + slot * stride_hist + length, token, mask=length < capacity)
    tl.store(length_ptr + slot, length + 1)
    if (features & _REPETITION) != 0:
        word = bitmaps + _SEEN * num_words + token // 32
        tl.store(word, tl.load(word) | (1 << (token % 32)))
    if (features & _OUTPUT_PENALTY) != 0:
        _count_token(
            num_counts_ptr + slot,
            count_ids_ptr + slot * stride_hist,
            counts_ptr + slot * stride_hist,
            token,
            capacity,
            256,
        )
    finish = tl.where(length + 1 >= tl.load(params + _MAX_TOTAL), _BY_LENGTH, 0)
    if _has_bit(bitmaps + _END * num_words, token):
        finish = _BY_STOP_TOKEN + finish * 0
    if _has_bit(bitmaps + _EOS * num_words, token):
        finish = _BY_EOS + finish * 0
    tl.store(finished_ptr + slot, finish)
    tl.store(result, token)
    tl.store(result + 1, finish)
    tl.store(result + 2, score.to(tl.int32, bitcast=True))
    tl.store(result + 3, 0)


def sample(
    logits: Tensor,
    state: SlotState,
    row_slots: Tensor,
    workspace: SamplerWorkspace,
    results: Tensor,
    *,
    reciprocal: bool,
    num_threads: int,
) -> Tensor:
    """Chooses a token for each row and moves its slot's state on: hist, length, seen tokens, counts, finished.

    logits: [R, at least V] in the model's type, rows contiguous; columns from V on do not count. row_slots: int32 [R];
    no slot twice, but the padding slot, whose rows, like those of slots that have finished, get the result -1. Rows
    with BIAS or OUTPUT_PENALTY start from `workspace.scores`, those with dynamic bans use `workspace.banned`:
    `apply_history` came before. results: int32 [R, 4] contiguous: token or -1, `Finish`, the chosen score's bits, 0.
    reciprocal: numbers are divided as CUDA's PyTorch does it, by multiplying with the reciprocal. num_threads: see
    `random_words`. Leaves scores and interval of rows that sample or report logprobs in the workspace. Returns results.
    Raises ValueError naming the argument.
    """
    num_rows = row_slots.shape[0]
    _check(logits, state, row_slots, workspace, results)
    if num_rows == 0:
        return results
    sample_kernel[(num_rows,)](
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
        state.vocab_size,
        state.bitmaps.shape[2],
        logits.stride(0),
        workspace.scores.stride(0),
        state.hist.stride(0),
        state.padding_slot,
        num_threads,
        RECIPROCAL=reciprocal,
        FAST_LOG=logits.is_cuda,
        TILE_V=min(TILE, triton.next_power_of_2(state.vocab_size)),
        num_warps=8,
        enable_fp_fusion=False,
    )
    return results


def _check(logits: Tensor, state: SlotState, row_slots: Tensor, workspace: SamplerWorkspace, results: Tensor) -> None:
    num_rows, device = row_slots.shape[0], state.arena.device
    if row_slots.dtype != torch.int32 or row_slots.dim() != 1 or not row_slots.is_contiguous():
        raise ValueError("row_slots: must be contiguous int32 [R]")
    if logits.dim() != 2 or logits.shape[0] != num_rows or logits.shape[1] < state.vocab_size:
        raise ValueError(f"logits: must be [{num_rows}, at least {state.vocab_size}], not {list(logits.shape)}")
    if logits.stride(1) != 1 or not logits.is_floating_point():
        raise ValueError("logits: must be of a float type, rows contiguous")
    if results.dtype != torch.int32 or results.shape != (num_rows, RESULT_COLUMNS) or not results.is_contiguous():
        raise ValueError(f"results: must be contiguous int32 [{num_rows}, {RESULT_COLUMNS}]")
    if workspace.vocab_size != state.vocab_size or workspace.max_rows < num_rows:
        raise ValueError(f"workspace: is for {workspace.max_rows} rows of {workspace.vocab_size} tokens")
    for name, tensor in (("logits", logits), ("row_slots", row_slots), ("results", results)):
        if tensor.device != device:
            raise ValueError(f"{name}: must be on {device}")


def compile_variants() -> list[Variant]:
    """GPT-2's vocabulary, and the demo model's in fp32."""
    return [_variant("bf16", True), _variant("fp16", True), _variant("fp32", True)]


def _variant(dtype: str, reciprocal: bool) -> Variant:
    ints = (
        "row_slots_ptr",
        "results_ptr",
        "length_ptr",
        "finished_ptr",
        "params_ptr",
        "hist_ptr",
        "bitmaps_ptr",
        "num_counts_ptr",
        "count_ids_ptr",
        "counts_ptr",
        "banned_ptr",
        "candidate_ids_ptr",
    )
    floats = ("scores_ptr", "interval_ptr", "candidate_values_ptr")
    numbers = (
        "vocab_size",
        "num_words",
        "stride_logits",
        "stride_scores",
        "stride_hist",
        "padding_slot",
        "num_threads",
    )
    return Variant(
        name=f"sampling/sample {dtype}",
        kernel=sample_kernel,
        signature={
            "logits_ptr": f"*{dtype}",
            **dict.fromkeys(ints, "*i32"),
            **dict.fromkeys(floats, "*fp32"),
            **dict.fromkeys(numbers, "i32"),
            **dict.fromkeys(("RECIPROCAL", "FAST_LOG", "TILE_V"), "constexpr"),
        },
        constexprs={"RECIPROCAL": reciprocal, "FAST_LOG": True, "TILE_V": TILE},
        divisible=frozenset((*ints, *floats, "logits_ptr", "stride_logits", "stride_scores")),
        num_warps=8,
        fp_fusion=False,
        wide_loads=False,
    )
