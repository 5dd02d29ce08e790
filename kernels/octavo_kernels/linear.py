"""Linear layers: a Triton GEMM with the weights on the M side of the MMA, or cuBLAS, whichever the plan says.

A batch of 16 rows fills the MMA's N side, so reading the weights, which bounds a decode step, wastes nothing. bias,
activation and residual are epilogues in fp32. Sums are in fp32 and in a fixed order: K upwards within a part, then the
parts in index order.

Log
@LOG@
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.activation_kernel import FUSED, activate
from octavo_kernels.activations import ACTIVATIONS
from octavo_kernels.checks import (
    require_contiguous,
    require_dense_rows,
    require_floats,
    require_like,
    row_stride,
)
from octavo_kernels.gemm_plan import GemmPlan, choose, invariant_plan, skinny_plan
from octavo_kernels.variant import Variant

_SUM_TILE = 512


@triton.jit(do_not_specialize=["m"])
def gemm_kernel(
    x_ptr,  # [M, K] rows
    weight_ptr,  # [O, K]
    bias_ptr,  # [O] or None
    residual_ptr,  # [M, O] rows or None
    out_ptr,  # [M, O] rows; fp32 [SPLITS, M, O] with SPLITS > 1, and then no epilogue
    m,
    o,
    k,
    stride_x,
    stride_residual,
    stride_out,
    TILE_M: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_K: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr,  # TILE_K divides K
    ACTIVATION: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in fp32: the interpreter cannot multiply bf16
):
    """Grid (M tiles, O tiles, SPLITS): programs that share weights run together, and x stays in L2."""
    first_m = tl.program_id(0) * TILE_M
    first_o = tl.program_id(1) * TILE_O
    split = tl.program_id(2)
    rows = tl.arange(0, TILE_M)
    cols = tl.arange(0, TILE_O)
    depth = tl.arange(0, TILE_K)
    live = first_m + rows < m
    x_ptr += first_m.to(tl.int64) * stride_x
    weight_ptr += first_o.to(tl.int64) * k
    weight_rows = tl.minimum(cols, o - 1 - first_o)  # past the end the last row again: no mask in the loop
    part = tl.cdiv(tl.cdiv(k, TILE_K), SPLITS) * TILE_K
    begin = split * part
    acc = tl.zeros([TILE_O, TILE_M], tl.float32)
    for start in tl.range(begin, tl.minimum(begin + part, k), TILE_K):
        at = start + depth
        if EVEN_K:
            weight = tl.load(weight_ptr + weight_rows[:, None] * k + at[None, :])
            x = tl.load(x_ptr + rows[None, :] * stride_x + at[:, None], mask=live[None, :], other=0.0)
        else:
            within = at < k
            weight = tl.load(weight_ptr + weight_rows[:, None] * k + at[None, :], mask=within[None, :], other=0.0)
            mask = live[None, :] & within[:, None]
            x = tl.load(x_ptr + rows[None, :] * stride_x + at[:, None], mask=mask, other=0.0)
        if WIDEN:
            weight = weight.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(weight, x, acc, input_precision="ieee")
    y = tl.trans(acc)  # [TILE_M, TILE_O]
    known = first_o + cols < o
    mask = live[:, None] & known[None, :]
    if SPLITS > 1:
        out_ptr += (split.to(tl.int64) * m + first_m) * stride_out + first_o
    else:
        out_ptr += first_m.to(tl.int64) * stride_out + first_o
        if bias_ptr is not None:
            y += tl.load(bias_ptr + first_o + cols, mask=known, other=0.0).to(tl.float32)[None, :]
        y = activate(y, ACTIVATION)
        if residual_ptr is not None:
            residual_ptr += first_m.to(tl.int64) * stride_residual + first_o
            where = rows[:, None] * stride_residual + cols[None, :]
            y += tl.load(residual_ptr + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * stride_out + cols[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def sum_splits_kernel(
    partial_ptr,  # fp32 [SPLITS, M, O]
    bias_ptr,  # [O] or None
    residual_ptr,  # [M, O] rows or None
    out_ptr,  # [M, O] rows
    m,
    o,
    stride_residual,
    stride_out,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Adds the parts in index order, then the epilogue. Grid (M, O tiles)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = cols < o
    y = tl.load(partial_ptr + row * o + cols, mask=live, other=0.0)
    for split in tl.static_range(1, SPLITS):
        y += tl.load(partial_ptr + (split * m + row) * o + cols, mask=live, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=live, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + row * stride_residual + cols, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_out + cols, y.to(out_ptr.dtype.element_ty), mask=live)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
    plan: GemmPlan | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) + residual; at most one of `activation` and `residual`.

    x: bf16, fp16 or fp32 [M, K], rows contiguous; weight: [O, K] contiguous; bias: [O] contiguous or None; residual and
    out: [M, O], rows contiguous; all of one type; out may be residual. Sums in fp32. activation: a name of ACTIVATIONS.
    batch_invariant: a row's result has the same bits whatever M is and whatever the other rows are. plan: the Triton
    GEMM with these tiles (for measuring), else `gemm_plan` chooses. workspace: fp32, contiguous, at least
    `workspace_size` numbers, for plans that split K; allocated where None. Returns out, or a new contiguous [M, O].
    Raises ValueError naming the argument.
    """
    _check(x, weight, bias, activation, residual, out, workspace)
    m, k = x.shape
    o = weight.shape[0]
    if plan is not None and batch_invariant:
        raise ValueError("plan: batch_invariant has a plan of its own")
    if batch_invariant:
        plan = invariant_plan(o, k, x.dtype)
    elif plan is None:
        plan = choose(m, o, k, x.dtype, _device_name(x.device))
    if plan is None:
        return _cublas(x, weight, bias, activation, residual, out)
    if out is None:
        out = torch.empty(m, o, dtype=x.dtype, device=x.device)
    if m and o:
        _launch(x, weight, bias, activation, residual, out, plan, workspace)
    return out


def workspace_size(m: int, o: int, k: int, dtype: torch.dtype, device: torch.device) -> int:
    """fp32 numbers that `linear` needs for these sizes: 0 unless its plan splits K."""
    plan = choose(m, o, k, dtype, _device_name(device))
    return 0 if plan is None or plan.splits == 1 else plan.splits * m * o


@lru_cache(maxsize=16)
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    out: Tensor,
    plan: GemmPlan,
    workspace: Tensor | None,
) -> None:
    m, k = x.shape
    o = weight.shape[0]
    split = plan.splits > 1
    kind = FUSED[activation or "linear"]
    stride_residual = 0 if residual is None else row_stride(residual)
    if split:
        size = plan.splits * m * o
        if workspace is None:
            workspace = torch.empty(size, dtype=torch.float32, device=x.device)
        elif workspace.numel() < size:
            raise ValueError(f"workspace: {workspace.numel()} numbers, {size} needed")
    gemm_kernel[(triton.cdiv(m, plan.tile_m), triton.cdiv(o, plan.tile_o), plan.splits)](
        x,
        weight,
        None if split else bias,
        None if split else residual,
        workspace if split else out,
        m,
        o,
        k,
        row_stride(x),
        0 if split else stride_residual,
        o if split else row_stride(out),
        TILE_M=plan.tile_m,
        TILE_O=plan.tile_o,
        TILE_K=plan.tile_k,
        SPLITS=plan.splits,
        EVEN_K=k % plan.tile_k == 0,
        ACTIVATION="none" if split else kind,
        WIDEN=x.device.type == "cpu" and x.dtype == torch.bfloat16,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        enable_fp_fusion=True,
    )
    if split:
        sum_splits_kernel[(m, triton.cdiv(o, _SUM_TILE))](
            workspace,
            bias,
            residual,
            out,
            m,
            o,
            stride_residual,
            row_stride(out),
            TILE=_SUM_TILE,
            SPLITS=plan.splits,
            ACTIVATION=kind,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _cublas(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """The library's GEMM; the tanh gelu is its epilogue on CUDA, everything else a pass of its own."""
    kind = FUSED[activation or "linear"]
    if kind == "gelu_tanh" and bias is not None and x.is_cuda:  # on the CPU this gelu is the erf form
        if out is None:
            return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True, out=out)
    separate = activation is not None and kind != "none"
    if out is None or separate or residual is not None:
        y = F.linear(x, weight, bias)
        if separate:
            y = ACTIVATIONS[activation](y)
        if residual is not None:
            return torch.add(y, residual, out=out)
        return y if out is None else out.copy_(y)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    out: Tensor | None,
    workspace: Tensor | None,
) -> None:
    require_floats("x", x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)} is not [rows, inputs]")
    require_dense_rows("x", x)
    if weight.dim() != 2:
        raise ValueError(f"weight: shape {tuple(weight.shape)} is not [outputs, inputs]")
    require_like("weight", weight, (weight.shape[0], x.shape[1]), x)
    require_contiguous("weight", weight)
    if bias is not None:
        require_like("bias", bias, (weight.shape[0],), x)
    if activation is not None and activation not in FUSED:
        raise ValueError(f"activation: {activation!r} is not one of {', '.join(FUSED)}")
    if activation is not None and residual is not None:
        raise ValueError("residual: not together with an activation")
    shape = (x.shape[0], weight.shape[0])
    for name, matrix in (("residual", residual), ("out", out)):
        if matrix is not None:
            require_like(name, matrix, shape, x)
    if workspace is not None:
        require_floats("workspace", workspace, (torch.float32,))
        require_contiguous("workspace", workspace)
        if workspace.device != x.device:
            raise ValueError(f"workspace: on {workspace.device}, not on {x.device}")
