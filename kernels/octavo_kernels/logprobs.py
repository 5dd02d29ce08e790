"""Logprobs and logits that requests ask to see: of the chosen, the most likely and the requested tokens, with the rank.

Log (Triton 3.7.1; no GPU was at hand: times are predictions, not measured)
  one program per row that asks, two passes for the sum, one for the rank and one per top token: 5 to 23 passes over L2,
  ~2 us each for a row. A partial sort would save passes; few rows ask.
  loads masked by the padded width: masked by 50257 they are 2 bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.checks import require_device
from octavo_kernels.sampling import check_arguments
from octavo_kernels.state import NUM_PARAMS, Feature, LogprobKind, Param, SlotState
from octavo_kernels.variant import Variant
from octavo_kernels.workspace import SamplerWorkspace

MAX_TOP: Final = 20
"""Most likely tokens that a row may ask for."""
TILE: Final = 2048

_NUM_PARAMS = tl.constexpr(NUM_PARAMS)
_FEATURES = tl.constexpr(int(Param.FEATURES))
_KIND = tl.constexpr(int(Param.LOGPROB_KIND))
_NUM_TOP = tl.constexpr(int(Param.NUM_TOP))
_NUM_REQUESTED = tl.constexpr(int(Param.NUM_REQUESTED))
_LOGPROBS = tl.constexpr(int(Feature.LOGPROBS))
_SAMPLE = tl.constexpr(int(Feature.SAMPLE))
_RAW_LOGPROB = tl.constexpr(int(LogprobKind.RAW_LOGPROB))
_RAW_LOGIT = tl.constexpr(int(LogprobKind.RAW_LOGIT))
_PROCESSED_LOGPROB = tl.constexpr(int(LogprobKind.PROCESSED_LOGPROB))
_MAX_TOP = tl.constexpr(MAX_TOP)
_NO_TOKEN = tl.constexpr(2**31 - 1)


@dataclass(frozen=True, slots=True)
class LogprobBuffers:
    """What `gather_logprobs` writes, for the rows that ask."""

    chosen: Tensor
    """fp32 [R]"""
    ranks: Tensor
    """int32 [R] 1 is the largest; tied tokens share the best."""
    top_ids: Tensor
    """int32 [R, MAX_TOP] falling, the lowest token first on ties."""
    top_values: Tensor
    """fp32 [R, MAX_TOP]"""
    requested: Tensor
    """fp32 [R, requested]"""

    @staticmethod
    def allocate(max_rows: int, device: torch.device, requested: int = 128) -> LogprobBuffers:
        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return LogprobBuffers(
            floats(max_rows), ints(max_rows), ints(max_rows, MAX_TOP), floats(max_rows, MAX_TOP),
            floats(max_rows, requested),
        )  # fmt: skip


@triton.jit
def _values(logits_ptr, scores_ptr, token, num_columns, vocab_size, raw, lo, hi):
    """Raw logits, or processed scores, -inf where a filter dropped them and for what is no token."""
    inside = (token >= 0) & (token < num_columns)
    if raw:
        x = tl.load(logits_ptr + token, mask=inside, other=-float("inf")).to(tl.float32)
    else:
        x = tl.load(scores_ptr + token, mask=inside, other=-float("inf"))
        x = tl.where((x >= lo) & (x <= hi), x, -float("inf"))
    return tl.where(token < vocab_size, x, -float("inf"))


@triton.jit
def _normalizer(logits, scores, kind, num_columns, vocab_size, raw, lo, hi, TILE_V: tl.constexpr):
    """What makes a value of the row a logprob: value - shift - log_total; both are 0 where plain values are asked."""
    offsets = tl.arange(0, TILE_V)
    peak = -float("inf")
    for start in range(0, num_columns, TILE_V):
        index = start + offsets
        peak = tl.maximum(peak, tl.max(_values(logits, scores, index, num_columns, vocab_size, raw, lo, hi), 0))
    log_total = 0.0
    shift = 0.0
    if (kind == _RAW_LOGPROB) | (kind == _PROCESSED_LOGPROB):
        total = 0.0
        for start in range(0, num_columns, TILE_V):
            index = start + offsets
            total += tl.sum(tl.exp(_values(logits, scores, index, num_columns, vocab_size, raw, lo, hi) - peak), 0)
        log_total = tl.log(total)
        shift = peak
    return shift, log_total


@triton.jit
def _rank(logits, scores, chosen, shift, log_total, num_columns, vocab_size, raw, lo, hi, TILE_V: tl.constexpr):
    """1 + how many tokens have more than `chosen`."""
    rank = 1
    for start in range(0, num_columns, TILE_V):
        index = start + tl.arange(0, TILE_V)
        x = _values(logits, scores, index, num_columns, vocab_size, raw, lo, hi)
        rank += tl.sum((x - shift - log_total > chosen).to(tl.int32), 0)
    return rank


@triton.jit
def _next_largest(logits, scores, last, last_id, num_columns, vocab_size, raw, lo, hi, TILE_V: tl.constexpr):
    """(value, token) that comes after (last, last_id) where values fall, the lowest token first on ties."""
    best = -float("inf")
    best_id = _NO_TOKEN
    for start in range(0, num_columns, TILE_V):
        index = start + tl.arange(0, TILE_V)
        live = index < vocab_size
        x = _values(logits, scores, index, num_columns, vocab_size, raw, lo, hi)
        after = live & ((x < last) | ((x == last) & (index > last_id)))
        tile_best = tl.max(tl.where(after, x, -float("inf")), 0)
        tile_id = tl.min(tl.where(after & (x == tile_best), index, _NO_TOKEN), 0)
        better = (tile_best > best) | ((tile_best == best) & (tile_id < best_id))
        best = tl.where(better, tile_best, best)
        best_id = tl.where(better, tile_id, best_id)
    return best, best_id


@triton.jit(do_not_specialize=["padding_slot", "max_requested", "vocab_size"])
def logprobs_kernel(
    logits_ptr, row_slots_ptr, results_ptr, params_ptr, requested_ids_ptr, scores_ptr, interval_ptr,
    chosen_ptr, ranks_ptr, top_ids_ptr, top_values_ptr, requested_ptr,
    vocab_size, num_columns, stride_logits, stride_scores, padding_slot, max_requested,
    TILE_V: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    token = tl.load(results_ptr + row * 4)
    if (slot < 0) | (slot >= padding_slot) | (token < 0) | (token >= vocab_size):
        return
    params = params_ptr + slot * _NUM_PARAMS
    features = tl.load(params + _FEATURES)
    if (features & _LOGPROBS) == 0:
        return
    kind = tl.load(params + _KIND)
    raw = (kind == _RAW_LOGPROB) | (kind == _RAW_LOGIT)
    logits = logits_ptr + row * stride_logits
    scores = scores_ptr + row * stride_scores
    lo = -float("inf")
    hi = float("inf")
    if (features & _SAMPLE) != 0:
        lo = tl.load(interval_ptr + row * 2)
        hi = tl.load(interval_ptr + row * 2 + 1)
    shift, log_total = _normalizer(logits, scores, kind, num_columns, vocab_size, raw, lo, hi, TILE_V)
    chosen = _values(logits, scores, token, num_columns, vocab_size, raw, lo, hi)
    chosen = chosen - shift - log_total
    rank = _rank(logits, scores, chosen, shift, log_total, num_columns, vocab_size, raw, lo, hi, TILE_V)
    tl.store(chosen_ptr + row, chosen)
    tl.store(ranks_ptr + row, rank)
    last = float("inf")
    last_id = -1
    for place in range(0, tl.minimum(tl.load(params + _NUM_TOP), _MAX_TOP)):
        last, last_id = _next_largest(logits, scores, last, last_id, num_columns, vocab_size, raw, lo, hi, TILE_V)
        tl.store(top_ids_ptr + row * _MAX_TOP + place, last_id)
        tl.store(top_values_ptr + row * _MAX_TOP + place, last - shift - log_total)
    asked = tl.arange(0, TILE_R)
    live = asked < tl.minimum(tl.load(params + _NUM_REQUESTED), max_requested)
    name = tl.load(requested_ids_ptr + slot * max_requested + asked, mask=live, other=0)
    live = live & (name >= 0) & (name < vocab_size)
    x = _values(logits, scores, name, num_columns, vocab_size, raw, lo, hi)
    tl.store(requested_ptr + row * max_requested + asked, x - shift - log_total, mask=live)


def gather_logprobs(
    logits: Tensor,
    state: SlotState,
    row_slots: Tensor,
    workspace: SamplerWorkspace,
    results: Tensor,
    out: LogprobBuffers,
) -> LogprobBuffers:
    """Values of the rows whose requests ask, after `sample`: raw ones from the logits, processed ones from what it
    left.

    logits, row_slots, results: as in `sample`. Writes the first R rows of out where a row asks and has a token; the
    first NUM_TOP and NUM_REQUESTED columns. Returns out. Raises ValueError naming the argument.
    """
    num_rows = row_slots.numel()
    check_arguments(logits, state, row_slots, workspace, results)
    if out.chosen.shape[0] < num_rows:
        raise ValueError(f"out: {out.chosen.shape[0]} rows, {num_rows} needed")
    if out.requested.shape[1] != state.requested_ids.shape[1]:
        raise ValueError(f"out: requested has {out.requested.shape[1]} columns, not {state.requested_ids.shape[1]}")
    require_device("out", out.chosen, state.arena)
    if num_rows == 0:
        return out
    max_requested = state.requested_ids.shape[1]
    logprobs_kernel[(num_rows,)](
        logits,
        row_slots,
        results,
        state.params,
        state.requested_ids,
        workspace.scores,
        workspace.interval,
        out.chosen,
        out.ranks,
        out.top_ids,
        out.top_values,
        out.requested,
        state.vocab_size,
        min(logits.shape[1], workspace.scores.shape[1]),
        logits.stride(0),
        workspace.scores.stride(0),
        state.padding_slot,
        max_requested,
        TILE_V=TILE,
        TILE_R=triton.next_power_of_2(max_requested),
        num_warps=8,
        enable_fp_fusion=False,
    )
    return out


def compile_variants() -> list[Variant]:
    ints = ("row_slots_ptr", "results_ptr", "params_ptr", "requested_ids_ptr", "ranks_ptr", "top_ids_ptr")
    floats = ("scores_ptr", "interval_ptr", "chosen_ptr", "top_values_ptr", "requested_ptr")
    numbers = ("vocab_size", "num_columns", "stride_logits", "stride_scores", "padding_slot", "max_requested")
    return [
        Variant(
            name=f"logprobs/{dtype}",
            kernel=logprobs_kernel,
            signature={
                "logits_ptr": f"*{dtype}",
                **dict.fromkeys(ints, "*i32"),
                **dict.fromkeys(floats, "*fp32"),
                **dict.fromkeys(numbers, "i32"),
                **dict.fromkeys(("TILE_V", "TILE_R"), "constexpr"),
            },
            constexprs={"TILE_V": TILE, "TILE_R": 128},
            divisible=frozenset((*ints, *floats, "logits_ptr", "num_columns", "stride_logits", "stride_scores")),
            num_warps=8,
            fp_fusion=False,
        )
        for dtype in ("bf16", "fp32")
    ]
