"""Choosing the next token of every row in one launch: processors, filters, the draw, and the state that moves on.

One program per row, which always walks its row in the same tiles: a row's result has the same bits whatever else is in
the batch. The order of steps and their numbers are those of transformers' generate(); `reference/sampling.py` says the
same in plain torch.

B  process: logits to scores (`processors.py`), over the temperature, with the largest of each lane of a tile
(`row_scores.py`). Greedy rows end here. C  filter: each filter keeps an interval of scores, so a row carries two
numbers and no mask (`filters.py`); the largest scores are copied out once (`candidates.py`), and the filters work on
them in registers. D  draw: argmax(softmax(x) / q) over the interval (`draw.py`), q by `philox.py`, the lowest token on
ties.

Log (variants, what they gave; Triton 3.7.1; no GPU was at hand: times are predictions, not measured)
  two passes over the row with top_k, top_h or, mostly, another filter first: maxima of the lanes of a tile, then the
  candidates. Predicted ~12 us for a row, two rows at a time on a multiprocessor. A radix select of the k-th largest and
  a compaction that counts first were 8 passes.
  registers, bf16, sm_90: 4096 columns a tile 255; 2048 and 8 warps 164; a limit of 128 costs no spill and lets two
  programs share a multiprocessor. It does if divisions are by a reciprocal where a filter only compares: correctly
  rounded ones call a subroutine, which spilled 23 words. 16 warps: 128 registers and one spill, no more rows at a time.
  code is 15,000 instructions, half of them the slow path of the filters, which most rows never fetch.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.checks import FLOATS, require_contiguous, require_dense_rows, require_device, require_floats
from octavo_kernels.dependent_launch import follow, launch_options
from octavo_kernels.draw import choose
from octavo_kernels.processors import has_bit
from octavo_kernels.row_scores import is_bad, process_row
from octavo_kernels.state import NUM_PARAMS, Bitmap, Feature, Finish, Param, SlotState
from octavo_kernels.variant import Variant
from octavo_kernels.workspace import WINDOW, SamplerWorkspace

TILE: Final = 2048
"""Columns of a row that are worked on at a time."""
NUM_WARPS: Final = 8
MAX_REGISTERS: Final = 128
"""Per thread: two programs fit a multiprocessor."""

_FEATURES = tl.constexpr(int(Param.FEATURES))
_PROMPT_LEN = tl.constexpr(int(Param.PROMPT_LEN))
_MAX_TOTAL = tl.constexpr(int(Param.MAX_TOTAL))
_NUM_PARAMS = tl.constexpr(NUM_PARAMS)
_SAMPLE = tl.constexpr(int(Feature.SAMPLE))
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


@triton.jit
def _move_on(
    token, slot, length, features, params_ptr, bitmaps_ptr, hist_ptr, length_ptr, finished_ptr,
    num_counts_ptr, count_ids_ptr, counts_ptr, bitmap_words, hist_width,
):  # fmt: skip
    """Takes the token into the slot's state. Returns why the sequence ends, 0 where it goes on."""
    finish = 0
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
    return finish


@triton.jit(do_not_specialize=["padding_slot", "num_threads", "vocab_size"])
def _sample_kernel(
    logits_ptr, row_slots_ptr, results_ptr,
    length_ptr, finished_ptr, params_ptr, hist_ptr, bitmaps_ptr, num_counts_ptr, count_ids_ptr, counts_ptr,
    scores_ptr, banned_ptr, interval_ptr, values_ptr, ids_ptr,
    stride_logits, stride_scores,
    num_columns,  # of logits and scores
    vocab_size, bitmap_words, hist_width, padding_slot, num_threads,
    RECIPROCAL: tl.constexpr, NATIVE_LOG: tl.constexpr, TILE: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr,
):  # fmt: skip
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
        lanes, where, broken = process_row(
            logits_ptr, scores_ptr, bitmaps_ptr, banned_ptr + row * bitmap_words, bitmap_words, params_ptr, features,
            length, num_columns, vocab_size, RECIPROCAL, TILE,
        )  # fmt: skip
        score = tl.max(lanes, 0)
        samples = (features & _SAMPLE) != 0
        failed = (tl.max(broken, 0) != 0) | (score == -float("inf")) | (samples & (score == float("inf")))
        if failed:
            bad_logits = is_bad(logits_ptr, num_columns, vocab_size, TILE)
            finish = tl.where(bad_logits != 0, _BAD_LOGITS, _BAD_SCORES)
            tl.store(finished_ptr + slot, finish)
        else:
            if samples:
                token, score = choose(
                    logits_ptr, scores_ptr, values_ptr + row * _WINDOW, ids_ptr + row * _WINDOW,
                    interval_ptr + row * 2, params_ptr, features, lanes, score,
                    length - tl.load(params_ptr + _PROMPT_LEN), num_columns, vocab_size, num_threads,
                    RECIPROCAL, NATIVE_LOG, TILE,
                )  # fmt: skip
            else:
                token = tl.min(tl.where(lanes == score, where, _NO_TOKEN), 0)
            finish = _move_on(
                token, slot, length, features, params_ptr, bitmaps_ptr, hist_ptr, length_ptr, finished_ptr,
                num_counts_ptr, count_ids_ptr, counts_ptr, bitmap_words, hist_width,
            )  # fmt: skip
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
        logits, row_slots, results,
        state.length, state.finished, state.params, state.hist, state.bitmaps,
        state.num_counts, state.count_ids, state.counts,
        workspace.scores, workspace.banned, workspace.interval, workspace.candidate_values, workspace.candidate_ids,
        logits.stride(0), workspace.scores.stride(0), min(logits.shape[1], workspace.scores.shape[1]),
        state.vocab_size, state.bitmaps.shape[2], state.hist.shape[1], state.padding_slot, num_threads,
        RECIPROCAL=reciprocal,
        NATIVE_LOG=logits.is_cuda,
        TILE=TILE,
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
        enable_fp_fusion=False,
        **launch_options(dependent_launch),
    )  # fmt: skip
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
