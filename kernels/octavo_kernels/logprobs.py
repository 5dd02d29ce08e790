"""Logprobs and logits that requests ask to see: of the chosen, the most likely and the requested tokens, with the rank.

Log
  one program per row that asks, two passes for the sum and one per top token: at most 20 + 3 passes over L2, ~40 us for
  the rows that ask for 20. A partial sort would save passes; few rows ask. Not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def _values(logits, scores, index, live, raw, lo, hi):
    """Raw logits, or processed scores, -inf where a filter dropped them."""
    if raw:
        x = tl.load(logits + index, mask=live, other=-float("inf")).to(tl.float32)
    else:
        x = tl.load(scores + index, mask=live, other=-float("inf"))
        x = tl.where((x >= lo) & (x <= hi), x, -float("inf"))
    return x


@triton.jit(do_not_specialize=["padding_slot", "max_requested"])
def logprobs_kernel(
    logits_ptr, row_slots_ptr, results_ptr, params_ptr, requested_ids_ptr, scores_ptr, interval_ptr,
    chosen_ptr, ranks_ptr, top_ids_ptr, top_values_ptr, requested_ptr,
    vocab_size, stride_logits, stride_scores, padding_slot, max_requested,
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
    offsets = tl.arange(0, TILE_V)
    peak = -float("inf")
    for start in range(0, vocab_size, TILE_V):
        index = start + offsets
        peak = tl.maximum(peak, tl.max(_values(logits, scores, index, index < vocab_size, raw, lo, hi), 0))
    shift = 0.0
    if (kind == _RAW_LOGPROB) | (kind == _PROCESSED_LOGPROB):
        total = 0.0
        for start in range(0, vocab_size, TILE_V):
            index = start + offsets
            total += tl.sum(tl.exp(_values(logits, scores, index, index < vocab_size, raw, lo, hi) - peak), 0)
        shift = peak + tl.log(total)
    chosen = tl.max(_values(logits, scores, token + tl.arange(0, 2) * 0, tl.arange(0, 2) < 2, raw, lo, hi), 0)
    rank = 1
    for start in range(0, vocab_size, TILE_V):
        index = start + offsets
        x = _values(logits, scores, index, index < vocab_size, raw, lo, hi)
        rank += tl.sum(((x > chosen) & (index < vocab_size)).to(tl.int32), 0)
    tl.store(chosen_ptr + row, chosen - shift)
    tl.store(ranks_ptr + row, rank)
    last = float("inf")
    last_id = -1
    for place in range(0, tl.minimum(tl.load(params + _NUM_TOP), _MAX_TOP)):
        best = -float("inf")
        best_id = _NO_TOKEN
        for start in range(0, vocab_size, TILE_V):
            index = start + offsets
            live = index < vocab_size
            x = _values(logits, scores, index, live, raw, lo, hi)
            after = live & ((x < last) | ((x == last) & (index > last_id)))
            tile_best = tl.max(tl.where(after, x, -float("inf")), 0)
            tile_id = tl.min(tl.where(after & (x == tile_best), index, _NO_TOKEN), 0)
            better = (tile_best > best) | ((tile_best == best) & (tile_id < best_id))
            best = tl.where(better, tile_best, best)
            best_id = tl.where(better, tile_id, best_id)
        tl.store(top_ids_ptr + row * _MAX_TOP + place, best_id)
        tl.store(top_values_ptr + row * _MAX_TOP + place, best - shift)
        last = best
        last_id = best_id
    asked = tl.arange(0, TILE_R)
    live = asked < tl.minimum(tl.load(params + _NUM_REQUESTED), max_requested)
    name = tl.load(requested_ids_ptr + slot * max_requested + asked, mask=live, other=0)
    live = live & (name >= 0) & (name < vocab_size)
    x = _values(logits, scores, name, live, raw, lo, hi)
    tl.store(requested_ptr + row * max_requested + asked, x - shift, mask=live)


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
    num_rows, device = row_slots.shape[0], state.arena.device
    if logits.dim() != 2 or logits.shape[0] != num_rows or logits.shape[1] < state.vocab_size or logits.stride(1) != 1:
        raise ValueError(f"logits: must be [{num_rows}, at least {state.vocab_size}], rows contiguous")
    if results.dtype != torch.int32 or results.shape != (num_rows, 4) or not results.is_contiguous():
        raise ValueError(f"results: must be contiguous int32 [{num_rows}, 4]")
    if workspace.max_rows < num_rows or out.chosen.shape[0] < num_rows:
        raise ValueError(f"workspace, out: room for fewer than {num_rows} rows")
    if out.requested.shape[1] != state.requested_ids.shape[1]:
        raise ValueError(f"out: requested has {out.requested.shape[1]} columns, not {state.requested_ids.shape[1]}")
    for name, tensor in (("logits", logits), ("row_slots", row_slots), ("results", results), ("out", out.chosen)):
        if tensor.device != device:
            raise ValueError(f"{name}: must be on {device}")
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
        logits.stride(0),
        workspace.scores.stride(0),
        state.padding_slot,
        max_requested,
        TILE_V=min(TILE, triton.next_power_of_2(state.vocab_size)),
        TILE_R=triton.next_power_of_2(max_requested),
        num_warps=8,
        enable_fp_fusion=False,
    )
    return out


def compile_variants() -> list[Variant]:
    ints = ("row_slots_ptr", "results_ptr", "params_ptr", "requested_ids_ptr", "ranks_ptr", "top_ids_ptr")
    floats = ("scores_ptr", "interval_ptr", "chosen_ptr", "top_values_ptr", "requested_ptr")
    numbers = ("vocab_size", "stride_logits", "stride_scores", "padding_slot", "max_requested")
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
            divisible=frozenset((*ints, *floats, "logits_ptr", "stride_logits", "stride_scores")),
            num_warps=8,
            fp_fusion=False,
            wide_loads=False,
        )
        for dtype in ("bf16", "fp32")
    ]
