"""What depends on the tokens so far: n-gram bans, bad words and biased sequences, before the sampler.

Kernel A of the sampler: most rows use none of it and their programs end at once.

Log (variants tried, what they gave). No GPU was at hand: registers are the compiler's for sm_90 (Triton 3.7.1), times
are predictions, not measured.

- One launch; of a row's programs the first sets bans, each of the others has SEGMENT columns of the scores. A single
  program per row would take 49 turns of 1024 columns in series, ~35 us for one biased row; 13 programs of 4 turns take
  ~3 us. The price is that each adds up the biases by itself, and that rows without work start 14 programs that end at
  once (~2 us at 256 rows).
- Columns per turn (TILE) and biased tokens per turn (LIST), 4 warps: 2048 and 1024 take 120-128 registers, and on
  sm_100 16 bytes of stack; 1024 and 1024 96-128; 1024 and 512, chosen, 64-72 (sm_100: to 87), no stack. Each keeps
  one 16-byte load per thread and turn.
- Sums of biases are in registers, one lane per biased token, and sequences are visited in series: the order of the
  additions is that of the list, without float atomics. A list is walked by its lengths, ~0.3 us per sequence from L1;
  the last prefix token is compared alone first, so that nearly all sequences cost one load more than the walk. 128
  sequences, the server's limit, are ~40 us; the usual one to four ~1 us.
- n-gram windows: one lane per window, the suffix's tokens in series, no early end: its reduction costs more than the
  loads (L1) that it saves at the usual sizes of 2 to 5.
- Bans are atomic ORs: idempotent, so the result does not depend on their order.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.dependent_launch import follow, launch_options
from octavo_kernels.state import NUM_PARAMS, Bitmap, Feature, Param, SlotState
from octavo_kernels.variant import Variant
from octavo_kernels.workspace import SamplerWorkspace

SEGMENT: Final = 4096
"""Columns of the scores that one program writes."""

_TILE: Final = 1024
_WINDOWS: Final = 1024
_LIST: Final = 512
_WARPS: Final = 4

_FEATURES = tl.constexpr(int(Param.FEATURES))
_PROMPT_LEN = tl.constexpr(int(Param.PROMPT_LEN))
_NGRAM_SIZE = tl.constexpr(int(Param.NO_REPEAT_NGRAM_SIZE))
_PROMPT_NGRAM_SIZE = tl.constexpr(int(Param.ENCODER_NO_REPEAT_NGRAM_SIZE))
_NUM_BAD_WORDS = tl.constexpr(int(Param.NUM_BAD_WORDS))
_NUM_BIASES = tl.constexpr(int(Param.NUM_BIASES))
_NUM_BIAS_SEQUENCES = tl.constexpr(int(Param.NUM_BIAS_SEQUENCES))
_PROMPT_PENALTY = tl.constexpr(int(Param.ENCODER_REPETITION_PENALTY))
_PENALTY = tl.constexpr(int(Param.REPETITION_PENALTY))
_FREQUENCY = tl.constexpr(int(Param.FREQUENCY_PENALTY))
_PRESENCE = tl.constexpr(int(Param.PRESENCE_PENALTY))
_NUM_PARAMS = tl.constexpr(NUM_PARAMS)

_USES_NGRAM = tl.constexpr(int(Feature.NO_REPEAT_NGRAM))
_USES_PROMPT_NGRAM = tl.constexpr(int(Feature.ENCODER_NO_REPEAT_NGRAM))
_USES_BAD_WORDS = tl.constexpr(int(Feature.BAD_WORDS))
_USES_BANS = tl.constexpr(int(Feature.NO_REPEAT_NGRAM | Feature.ENCODER_NO_REPEAT_NGRAM | Feature.BAD_WORDS))
_USES_BIAS = tl.constexpr(int(Feature.BIAS))
_USES_PROMPT_PENALTY = tl.constexpr(int(Feature.ENCODER_REPETITION_PENALTY))
_USES_PENALTY = tl.constexpr(int(Feature.REPETITION_PENALTY))
_USES_OUTPUT_PENALTY = tl.constexpr(int(Feature.OUTPUT_PENALTY))
_USES_SCORES = tl.constexpr(int(Feature.BIAS | Feature.OUTPUT_PENALTY))

_SEEN = tl.constexpr(int(Bitmap.SEEN))
_PROMPT_SEEN = tl.constexpr(int(Bitmap.PROMPT_SEEN))
_NUM_BITMAPS = tl.constexpr(len(Bitmap))


@triton.jit
def _float_param(params_ptr, COLUMN: tl.constexpr):
    return tl.load(params_ptr + COLUMN).to(tl.float32, bitcast=True)


@triton.jit
def _ends_with(hist_ptr, length, prefix_ptr, size, TILE: tl.constexpr):
    """Whether the history ends with the `size` >= 1 tokens at prefix_ptr: 1 or 0. Longer than the history: 0."""
    fits = size <= length
    before = tl.load(hist_ptr + length - 1, mask=fits, other=0)
    matches = 0
    if fits & (tl.load(prefix_ptr + size - 1) == before):
        matches = 1
        for start in range(0, size, TILE):
            index = start + tl.arange(0, TILE)
            inside = index < size
            prefix = tl.load(prefix_ptr + index, mask=inside, other=0)
            token = tl.load(hist_ptr + length - size + index, mask=inside, other=0)
            matches = tl.minimum(matches, tl.min((prefix == token).to(tl.int32), 0))
    return matches


@triton.jit
def _ban_completions(banned_ptr, hist_ptr, source_len, length, size, vocab_size, TILE: tl.constexpr):
    """Bans what would complete an n-gram of the first source_len tokens whose first size - 1 tokens end the history."""
    if (size > 0) & (size <= source_len):
        num_windows = source_len - size + 1
        for start in range(0, num_windows, TILE):
            window = start + tl.arange(0, TILE)
            matches = window < num_windows
            for j in range(0, size - 1):
                suffix = tl.load(hist_ptr + length - size + 1 + j)
                matches &= tl.load(hist_ptr + window + j, mask=window < num_windows, other=-1) == suffix
            token = tl.load(hist_ptr + window + size - 1, mask=matches, other=-1)
            matches &= (token >= 0) & (token < vocab_size)
            tl.atomic_or(banned_ptr + (token >> 5), 1 << (token & 31), mask=matches, sem="relaxed")


@triton.jit
def _ban_bad_words(banned_ptr, list_ptr, list_words, num_bad_words, hist_ptr, length, vocab_size, TILE: tl.constexpr):
    """Bans the last token of each sequence whose other tokens end the history. A broken list ends the walk."""
    word = 0
    at = 0
    while (word < num_bad_words) & (at + 3 < list_words):
        size = tl.load(list_ptr + at)
        if (size >= 2) & (size <= list_words - at - 2):
            token = tl.load(list_ptr + at + 1)
            matches = _ends_with(hist_ptr, length, list_ptr + at + 3, size - 1, TILE)
            bans = (matches == 1) & (token >= 0) & (token < vocab_size)
            tl.atomic_or(banned_ptr + (token >> 5), 1 << (token & 31), mask=bans, sem="relaxed")
            at += size + 2
        else:
            at = list_words
        word += 1


@triton.jit
def _sums_of_biases(values_ptr, list_ptr, list_words, num_sequences, hist_ptr, length, index, mask, TILE: tl.constexpr):
    """fp32 of each index into the biased tokens: its own bias, then those of matching sequences in list order."""
    sums = tl.load(values_ptr + index, mask=mask, other=0).to(tl.float32, bitcast=True)
    sequence = 0
    at = 0
    while (sequence < num_sequences) & (at + 3 < list_words):
        size = tl.load(list_ptr + at)
        if (size >= 2) & (size <= list_words - at - 2):
            if _ends_with(hist_ptr, length, list_ptr + at + 3, size - 1, TILE) == 1:
                bias = tl.load(list_ptr + at + 2).to(tl.float32, bitcast=True)
                sums = tl.where(index == tl.load(list_ptr + at + 1), sums + bias, sums)
            at += size + 2
        else:
            at = list_words
        sequence += 1
    return sums


@triton.jit
def _penalize(scores, bitmap_ptr, token, mask, penalty, RECIPROCAL: tl.constexpr):
    """Negative scores of tokens in the bitmap times the penalty, the others over it, as PyTorch divides."""
    word = tl.load(bitmap_ptr + (token >> 5), mask=mask, other=0)
    if RECIPROCAL:
        divided = scores * tl.math.div_rn(1.0, penalty)
    else:
        divided = tl.math.div_rn(scores, penalty)
    penalized = tl.where(scores < 0, scores * penalty, divided)
    return tl.where(((word >> (token & 31)) & 1) == 1, penalized, scores)


@triton.jit
def _repetition_penalties(scores, features, params_ptr, bitmaps_ptr, words, token, mask, RECIPROCAL: tl.constexpr):
    """Steps 3 and 4: the prompt's tokens, then the history's."""
    if features & _USES_PROMPT_PENALTY:
        penalty = _float_param(params_ptr, _PROMPT_PENALTY)
        scores = _penalize(scores, bitmaps_ptr + _PROMPT_SEEN * words, token, mask, penalty, RECIPROCAL)
    if features & _USES_PENALTY:
        penalty = _float_param(params_ptr, _PENALTY)
        scores = _penalize(scores, bitmaps_ptr + _SEEN * words, token, mask, penalty, RECIPROCAL)
    return scores


@triton.jit
def _set_bans(
    banned_ptr, bad_words_ptr, slot, params_ptr, features, hist_ptr, length, vocab_size, bitmap_words, list_words,
    TILE: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """The row's bitmap of what its n-grams and bad words ban."""
    for start in range(0, bitmap_words, TILE):
        word = start + tl.arange(0, TILE)
        tl.store(banned_ptr + word, tl.zeros([TILE], tl.int32), mask=word < bitmap_words)
    tl.debug_barrier()  # zeros before bans
    if features & _USES_NGRAM:
        size = tl.load(params_ptr + _NGRAM_SIZE)
        _ban_completions(banned_ptr, hist_ptr, length, length, size, vocab_size, WINDOWS)
    if features & _USES_PROMPT_NGRAM:
        size = tl.load(params_ptr + _PROMPT_NGRAM_SIZE)
        prompt_len = tl.minimum(tl.load(params_ptr + _PROMPT_LEN), length)
        _ban_completions(banned_ptr, hist_ptr, prompt_len, length, size, vocab_size, WINDOWS)
    if features & _USES_BAD_WORDS:
        words_ptr = bad_words_ptr + slot * list_words
        num_bad_words = tl.load(params_ptr + _NUM_BAD_WORDS)
        _ban_bad_words(banned_ptr, words_ptr, list_words, num_bad_words, hist_ptr, length, vocab_size, 64)


@triton.jit
def _score_segment(
    logits_ptr, scores_ptr, first, features, params_ptr, bitmaps_ptr, vocab_size, num_columns, bitmap_words,
    RECIPROCAL: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Steps 3 and 4 of all tokens of the segment, as if none had a bias."""
    for start in range(first, tl.minimum(first + SEGMENT, num_columns), TILE):
        token = start + tl.arange(0, TILE)
        inside = token < num_columns  # vocab_size here would cost the wide loads
        x = tl.load(logits_ptr + token, mask=inside, other=0.0).to(tl.float32)
        x = _repetition_penalties(
            x, features, params_ptr, bitmaps_ptr, bitmap_words, token, token < vocab_size, RECIPROCAL
        )
        tl.store(scores_ptr + token, x, mask=inside)


@triton.jit
def _score_biased(
    logits_ptr, scores_ptr, first, last, slot, features, params_ptr, bitmaps_ptr, bias_ids_ptr, bias_values_ptr,
    sequences_ptr, hist_ptr, length, bitmap_words, max_biases, list_words,
    RECIPROCAL: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Steps 2 to 4 of the biased tokens of the segment, which are written once more."""
    num_biases = tl.minimum(tl.load(params_ptr + _NUM_BIASES), max_biases)
    num_sequences = tl.load(params_ptr + _NUM_BIAS_SEQUENCES)
    for start in range(0, num_biases, LIST):
        index = start + tl.arange(0, LIST)
        mask = index < num_biases
        token = tl.load(bias_ids_ptr + slot * max_biases + index, mask=mask, other=-1)
        sums = _sums_of_biases(
            bias_values_ptr + slot * max_biases, sequences_ptr + slot * list_words, list_words, num_sequences,
            hist_ptr, length, index, mask, 64,
        )  # fmt: skip
        mine = (token >= first) & (token < last)
        x = tl.load(logits_ptr + token, mask=mine, other=0.0).to(tl.float32) + sums
        x = _repetition_penalties(x, features, params_ptr, bitmaps_ptr, bitmap_words, token, mine, RECIPROCAL)
        tl.store(scores_ptr + token, x, mask=mine)


@triton.jit
def _subtract_output_penalties(
    scores_ptr, first, last, slot, params_ptr, num_counts_ptr, count_ids_ptr, counts_ptr, hist_width, LIST: tl.constexpr
):
    """Step 4a of the segment's tokens that the output has."""
    frequency = _float_param(params_ptr, _FREQUENCY)
    presence = _float_param(params_ptr, _PRESENCE)
    num_counts = tl.minimum(tl.load(num_counts_ptr + slot), hist_width)
    for start in range(0, num_counts, LIST):
        index = start + tl.arange(0, LIST)
        mask = index < num_counts
        token = tl.load(count_ids_ptr + slot * hist_width + index, mask=mask, other=-1)
        count = tl.load(counts_ptr + slot * hist_width + index, mask=mask, other=0)
        mine = (token >= first) & (token < last) & (count > 0)
        x = tl.load(scores_ptr + token, mask=mine, other=0.0)
        x = x - frequency * count.to(tl.float32) - presence
        tl.store(scores_ptr + token, x, mask=mine)


@triton.jit(do_not_specialize=["padding_slot", "vocab_size"])
def _history_kernel(
    logits_ptr, row_slots_ptr,
    length_ptr, finished_ptr, params_ptr, hist_ptr, bitmaps_ptr, num_counts_ptr, count_ids_ptr, counts_ptr,
    bias_ids_ptr, bias_values_ptr, bias_sequences_ptr, bad_words_ptr,
    scores_ptr, banned_ptr,
    stride_logits, stride_scores, padding_slot, vocab_size,
    num_columns,  # of logits and scores
    hist_width, bitmap_words, max_biases, list_words,
    RECIPROCAL: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr, WINDOWS: tl.constexpr, LIST: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):  # fmt: skip
    """Program (row, 0) sets the row's bans, program (row, 1 + s) writes segment s of its scores."""
    if DEPENDENT_LAUNCH:
        follow()
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    live = (slot >= 0) & (slot < padding_slot)
    live &= tl.load(finished_ptr + slot, mask=live, other=1) == 0
    features = tl.load(params_ptr + slot * _NUM_PARAMS + _FEATURES, mask=live, other=0)
    part = tl.program_id(1)
    needed = _USES_BANS if part == 0 else _USES_SCORES
    if (features & needed) != 0:
        params_ptr += slot * _NUM_PARAMS
        hist_ptr += slot * hist_width
        length = tl.minimum(tl.maximum(tl.load(length_ptr + slot), 0), hist_width)

        if part == 0:
            _set_bans(
                banned_ptr + row * bitmap_words, bad_words_ptr, slot, params_ptr, features, hist_ptr, length,
                vocab_size, bitmap_words, list_words, TILE, WINDOWS,
            )  # fmt: skip
        else:
            first = (part - 1) * SEGMENT
            last = tl.minimum(first + SEGMENT, vocab_size)
            logits_ptr += row * stride_logits
            scores_ptr += row * stride_scores
            bitmaps_ptr += slot * _NUM_BITMAPS * bitmap_words
            _score_segment(
                logits_ptr, scores_ptr, first, features, params_ptr, bitmaps_ptr, vocab_size, num_columns, bitmap_words,
                RECIPROCAL, SEGMENT, TILE,
            )  # fmt: skip
            if features & _USES_BIAS:
                tl.debug_barrier()
                _score_biased(
                    logits_ptr, scores_ptr, first, last, slot, features, params_ptr, bitmaps_ptr, bias_ids_ptr,
                    bias_values_ptr, bias_sequences_ptr, hist_ptr, length, bitmap_words, max_biases, list_words,
                    RECIPROCAL, LIST,
                )  # fmt: skip
            if features & _USES_OUTPUT_PENALTY:
                tl.debug_barrier()
                _subtract_output_penalties(
                    scores_ptr, first, last, slot, params_ptr, num_counts_ptr, count_ids_ptr, counts_ptr, hist_width,
                    LIST,
                )  # fmt: skip


def apply_history(
    logits: Tensor,
    state: SlotState,
    row_slots: Tensor,
    workspace: SamplerWorkspace,
    *,
    reciprocal: bool,
    dependent_launch: bool = False,
) -> None:
    """What the history bans and the sparse steps of the processors, for the rows that use them.

    logits: [R, Vp] bf16, fp16 or fp32, Vp >= V, columns dense; a row stride that is a multiple of 16 gives wide loads.
    row_slots: int32 [R] contiguous. workspace: of R rows or more. reciprocal: positive scores are multiplied by the
    penalty's fp32 reciprocal, as CUDA does, else divided. dependent_launch: see `octavo_kernels.dependent_launch`.

    Of each row whose slot runs (neither the padding slot, nor out of range, nor finished):
    - with NO_REPEAT_NGRAM, ENCODER_NO_REPEAT_NGRAM or BAD_WORDS: workspace.banned[row] is the set of tokens that these
      ban now (NoRepeatNGramLogitsProcessor, EncoderNoRepeatNGramLogitsProcessor and, for words of several tokens,
      NoBadWordsLogitsProcessor of transformers);
    - with BIAS or OUTPUT_PENALTY: workspace.scores[row, :V] are the logits in fp32 after steps 2 (sequence bias), 3, 4
      (repetition penalties of prompt and history) and 4a (frequency and presence). The fp32 sum of a token's biases is
      taken in list order and added once.
    All other rows of the workspace stay as they are. Token ids outside the vocabulary, sizes and counts beyond what the
    state holds have no effect. Raises ValueError naming an argument of another type, shape or stride.
    """
    _check(logits, state, row_slots, workspace)
    num_rows = row_slots.numel()
    if num_rows == 0:
        return
    num_columns = min(logits.shape[1], workspace.scores.shape[1])
    grid = (num_rows, 1 + triton.cdiv(state.vocab_size, SEGMENT))
    _history_kernel[grid](
        logits, row_slots,
        state.length, state.finished, state.params, state.hist, state.bitmaps,
        state.num_counts, state.count_ids, state.counts,
        state.bias_ids, state.bias_values, state.bias_sequences, state.bad_words,
        workspace.scores, workspace.banned,
        logits.stride(0), workspace.scores.stride(0), state.padding_slot, state.vocab_size, num_columns,
        state.hist.shape[1], state.bitmaps.shape[2], state.bias_ids.shape[1], state.bias_sequences.shape[1],
        **_constants(reciprocal),
        num_warps=_WARPS,
        enable_fp_fusion=False,
        **launch_options(dependent_launch),
    )  # fmt: skip


def _constants(reciprocal: bool) -> dict[str, Any]:
    """constexprs of the kernel but the launch's."""
    return {"RECIPROCAL": reciprocal, "SEGMENT": SEGMENT, "TILE": _TILE, "WINDOWS": _WINDOWS, "LIST": _LIST}


def _check(logits: Tensor, state: SlotState, row_slots: Tensor, workspace: SamplerWorkspace) -> None:
    num_rows, vocab_size = row_slots.numel(), state.vocab_size
    if row_slots.dtype != torch.int32 or row_slots.dim() != 1 or not row_slots.is_contiguous():
        raise ValueError(f"row_slots: {row_slots.dtype} {tuple(row_slots.shape)}, not contiguous int32 [R]")
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"logits: {logits.dtype}, not bf16, fp16 or fp32")
    if logits.dim() != 2 or logits.shape[0] != num_rows or logits.shape[1] < vocab_size:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, not [{num_rows}, {vocab_size} or more]")
    if logits.stride(1) != 1:
        raise ValueError(f"logits: column stride {logits.stride(1)}, not 1")
    if workspace.vocab_size != vocab_size:
        raise ValueError(f"workspace: of {workspace.vocab_size} tokens, the state has {vocab_size}")
    if workspace.max_rows < num_rows:
        raise ValueError(f"workspace: {workspace.max_rows} rows, {num_rows} needed")
    for name, tensor in (("row_slots", row_slots), ("logits", logits), ("workspace", workspace.scores)):
        if tensor.device != state.arena.device:
            raise ValueError(f"{name}: on {tensor.device}, the state is on {state.arena.device}")


def compile_variants() -> list[Variant]:
    """Every form that the engine launches for gpt2-large; both kinds of division, as tests launch both."""
    return [
        _variant(f"history/{dtype} {'reciprocal' if reciprocal else 'divide'}", dtype, reciprocal)
        for dtype, reciprocal in (("bf16", True), ("fp16", True), ("fp32", True), ("bf16", False))
    ]


def _variant(name: str, dtype: str, reciprocal: bool) -> Variant:
    constants = _constants(reciprocal) | {"DEPENDENT_LAUNCH": False}
    pointers = {argument: "*i32" for argument in _history_kernel.arg_names if argument.endswith("_ptr")}
    pointers |= {"logits_ptr": f"*{dtype}", "scores_ptr": "*fp32"}
    signature = dict.fromkeys(_history_kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    return Variant(
        name=name,
        kernel=_history_kernel,
        signature=signature,
        constexprs=constants,
        divisible=frozenset({*pointers, "stride_logits", "stride_scores", "num_columns", "max_biases", "list_words"}),
        num_warps=_WARPS,
        fp_fusion=False,
    )
