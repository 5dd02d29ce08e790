"""Linear layers: a Triton GEMM with the weights on the M side of the MMA, or cuBLAS, whichever the plan says.

A batch of 16 rows fills the MMA's N side, so reading the weights, which bounds a decode step, wastes nothing. bias,
activation and residual are epilogues in fp32. Sums are in fp32 and in a fixed order: K upwards within a part, then the
parts in index order.

Log
  Device: none yet. Compiler's output for sm_90 (Triton 3.7.1, bf16, M x O x K of a tile, 4 warps); nothing is measured.
  Loads of both operands are 16-byte cp.async and nothing spills in any of them; those in use spill nowhere on sm_80 and
  sm_100 either.
    tile          stages  registers  shared  instructions  MMA                  use
    16x16x128     4       40          24 KB  308           8 mma.sync           tried
    16x16x256     3       48          32 KB  383           16 mma.sync          1280 outputs, K 1280: 80 programs
    16x32x128     4       40          36 KB  348           8 mma.sync           qkv (120 programs), fc (160)
    16x32x256     3       56          48 KB  431           16 mma.sync          tried
    16x64x64      4       38          40 KB  304           4 wgmma              tried
    16x64x128     4       48          80 KB  360           8 wgmma              lm_head, 786 programs
    8x32x128      4       40          30 KB  308           8 mma.sync           tried: masked rows of x cost no traffic
    32x32x64      4       42          24 KB  300           8 mma.sync           tried
    64x64x64      4       72          64 KB  456           4 wgmma              batch-invariant mode
    64x64x128     4       96         128 KB  608           8 wgmma              tried: one program per multiprocessor
    128x64x64     4       128         96 KB  656           4 wgmma              tried
    128x128x64    3       103         96 KB  563           4 wgmma (8 warps)    tried: too few programs at M = 1
    fp32 16x32x64 4       56          36 KB  628           256 FFMA             ieee, as parity runs need
  epilogue bias + gelu_tanh: +64 instructions at 16x32, +512 at 64x64, no register more.
  weights on the M side: predicted 0 waste at M = 16 where x on the M side wastes 3/4 of a wgmma.
  K split (proj2: 40 tiles x 3 = 120 programs, 40 registers; sum: 28 registers): predicted 5.5 us + 2.2 us of a second
    launch against 7.3 us unsplit at 80 programs (H100, 13.1 MB, time as programs / 132): a draw; `candidates` has both.
  M tiles first in the grid: programs that share a weight tile run together, so lm_head's 129 MB are read once for
    any M; with O tiles first, once per M tile (predicted).
  x masked (not clamped) rows: at M = 1 a program reads 2.5 KB of x, not 40 KB (computed; over
    qkv's 120 programs 4.6 MB less from L2).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

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
from octavo_kernels.dependent_launch import follow, launch_options, prefetch
from octavo_kernels.gemm_plan import GemmPlan, choose, invariant_plan, skinny_plan
from octavo_kernels.products import product, product_form
from octavo_kernels.variant import Variant

_SUM_TILE: Final = 512
"""Outputs of one program of the kernel that adds the parts of K."""
_PREFETCHED = tl.constexpr(4)
"""Tiles of a weight that are asked for before the wait of a dependent launch."""


@triton.jit(do_not_specialize=["m"])
def gemm_kernel(
    x_ptr,  # [M, K] rows
    weight_ptr,  # [O, K]
    bias_ptr,  # [O] or None
    residual_ptr,  # [M, O] rows or None
    out_ptr,  # [M, O] rows; fp32 [SPLITS, M, O] with SPLITS > 1, and then no epilogue
    m, o, k, stride_x, stride_residual, stride_out,
    TILE_M: tl.constexpr, TILE_O: tl.constexpr, TILE_K: tl.constexpr, SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr,  # TILE_K divides K
    ACTIVATION: tl.constexpr,
    FORM: tl.constexpr,  # how the tiles are multiplied, see `product_form`
    DEPENDENT_LAUNCH: tl.constexpr,
):  # fmt: skip
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
    if DEPENDENT_LAUNCH:
        PER_LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
        lines = tl.minimum(begin + tl.arange(0, _PREFETCHED * TILE_K // PER_LINE) * PER_LINE, k - 1)
        prefetch(weight_ptr + weight_rows[:, None] * k + lines[None, :])
        follow()
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
        acc = product(weight, x, acc, FORM)
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
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Adds the parts in index order, then the epilogue. Grid (M, O tiles)."""
    if DEPENDENT_LAUNCH:
        follow()
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
    dependent_launch: bool = False,
) -> Tensor:
    """activation(x @ weight.T + bias) + residual; at most one of `activation` and `residual`.

    x: bf16, fp16 or fp32 [M, K], rows contiguous; weight: [O, K] contiguous; bias: [O] contiguous or None; residual and
    out: [M, O], rows contiguous; all of one type; out may be residual. Sums in fp32. activation: a name of ACTIVATIONS.
    batch_invariant: a row's result has the same bits whatever M is and whatever the other rows are. plan: the Triton
    GEMM with these tiles (for measuring), else `gemm_plan` chooses. workspace: fp32, contiguous, at least
    `workspace_size` numbers, for plans that split K; allocated where None. dependent_launch: see
    `octavo_kernels.dependent_launch`; weight is then written by no kernel of a step. Returns out, or a new contiguous
    [M, O]. Raises ValueError naming the argument.
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
        form = product_form(x, fixed_order=batch_invariant)
        options = launch_options(dependent_launch)
        _launch(x, weight, bias, activation, residual, out, plan, workspace, form, options)
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
    form: str,
    options: dict[str, Any],
) -> None:
    """The GEMM, and the sum of its parts where the plan splits K. options: of both launches."""
    (m, k), o = x.shape, weight.shape[0]
    split = plan.splits > 1
    kind = FUSED[activation or "linear"]
    stride_residual = 0 if residual is None else row_stride(residual)
    if split:
        workspace = _partial_sums(workspace, plan.splits * m * o, x)
    gemm_kernel[(triton.cdiv(m, plan.tile_m), triton.cdiv(o, plan.tile_o), plan.splits)](
        x, weight, None if split else bias, None if split else residual, workspace if split else out, m, o, k,
        row_stride(x), 0 if split else stride_residual, o if split else row_stride(out),
        **_tile_constants(plan, k),
        ACTIVATION="none" if split else kind,
        FORM=form,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        enable_fp_fusion=True,
        **options,
    )  # fmt: skip
    if split:
        sum_splits_kernel[(m, triton.cdiv(o, _SUM_TILE))](
            workspace, bias, residual, out, m, o, stride_residual, row_stride(out),
            TILE=_SUM_TILE,
            SPLITS=plan.splits,
            ACTIVATION=kind,
            num_warps=4,
            enable_fp_fusion=True,
            **options,
        )  # fmt: skip


def _partial_sums(workspace: Tensor | None, size: int, x: Tensor) -> Tensor:
    """The caller's, or one of `size` numbers. Raises ValueError where the caller's has fewer."""
    if workspace is None:
        return torch.empty(size, dtype=torch.float32, device=x.device)
    if workspace.numel() < size:
        raise ValueError(f"workspace: {workspace.numel()} numbers, {size} needed")
    return workspace


def _tile_constants(plan: GemmPlan, k: int) -> dict[str, Any]:
    """constexprs of `gemm_kernel` that follow from the plan."""
    tiles = {"TILE_M": plan.tile_m, "TILE_O": plan.tile_o, "TILE_K": plan.tile_k, "SPLITS": plan.splits}
    return tiles | {"EVEN_K": k % plan.tile_k == 0}


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


def compile_variants() -> list[Variant]:
    """What the engine launches: gpt2-large's linears of a decode step, the demo model's, and batch-invariant mode's."""
    shapes = {"qkv": (3840, 1280), "fc": (5120, 1280), "proj2": (1280, 5120), "proj": (1280, 1280)}
    shapes["lm_head"] = (50304, 1280)
    demo = {"demo qkv": (768, 256), "demo fc": (1024, 256), "demo lm_head": (4096, 256)}
    variants = []
    for kind, dtype, sizes in (
        ("bf16", torch.bfloat16, shapes | demo),
        ("fp16", torch.float16, shapes),
        ("fp32", torch.float32, shapes),
    ):
        for name, (o, k) in sizes.items():
            bias = not name.endswith("lm_head")
            activation = "gelu_tanh" if name.endswith("fc") else "none"
            skinny, invariant = skinny_plan(o, k, dtype), invariant_plan(o, k, dtype)
            variants += _variants(f"skinny {name}", kind, k, skinny, bias, activation)
            if name in ("qkv", "fc", "lm_head"):
                variants += _variants(f"invariant {name}", kind, k, invariant, bias, activation)
        variants += _variants("residual", kind, 1280, skinny_plan(1280, 1280, dtype), True, "none", residual=True)
    return variants


def _variants(
    name: str, kind: str, k: int, plan: GemmPlan, bias: bool, activation: str, residual: bool = False
) -> list[Variant]:
    """The GEMM and, for a plan that splits K, the kernel that adds the parts."""
    split = plan.splits > 1
    tiles = _tile_constants(plan, k) | {"ACTIVATION": "none" if split else activation, "FORM": "dot"}
    out = "fp32" if split else kind
    epilogue = {"bias_ptr": bias and not split, "residual_ptr": residual and not split}
    wgmma = plan.tile_o >= 64 and kind != "fp32"
    variants = [
        _variant(
            f"linear/{name} {kind} {plan.tile_m}x{plan.tile_o}x{plan.tile_k}",
            gemm_kernel,
            {"x_ptr": kind, "weight_ptr": kind, "bias_ptr": kind, "residual_ptr": kind, "out_ptr": out},
            epilogue,
            tiles,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
            mma=None if kind == "fp32" else "wgmma" if wgmma else "mma",
        )
    ]
    if split:
        variants.append(
            _variant(
                f"linear/{name} {kind} sum of {plan.splits}",
                sum_splits_kernel,
                {"partial_ptr": "fp32", "bias_ptr": kind, "residual_ptr": kind, "out_ptr": kind},
                {"bias_ptr": bias, "residual_ptr": residual},
                {"TILE": _SUM_TILE, "SPLITS": plan.splits, "ACTIVATION": activation},
            )
        )
    return variants


def _variant(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    optional: dict[str, bool],
    constants: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    mma: str | None = None,
) -> Variant:
    """pointers: argument -> type; optional: which of them may be None -> whether they are there. The other arguments
    are integers, all but m multiples of 16."""
    absent = {argument: None for argument, there in optional.items() if not there}
    constants = constants | absent | {"DEPENDENT_LAUNCH": False}
    kinds = {argument: f"*{kind}" for argument, kind in pointers.items()} | dict.fromkeys(constants, "constexpr")
    return Variant(
        name=name,
        kernel=kernel,
        signature={argument: kinds.get(argument, "i32") for argument in kernel.arg_names},
        constexprs=constants,
        divisible=frozenset(set(kernel.arg_names) - set(constants) - {"m"}),
        num_warps=num_warps,
        num_stages=num_stages,
        fp_fusion=True,
        mma=mma,
    )
