"""Layer norm, alone or after adding to the residual stream; one program per row.

Statistics are taken in fp32 in two passes over registers (mean, then squares of the centred row), so GPT-2's outlier
channels lose nothing. A row's result depends on that row only.

Log
  one program per row, 4 warps, row in one tile of the next power of 2: predicted ~2.2 us at batch 1 (launch-bound);
  at 256 rows of 1280 bf16 the fused add moves 4 * 655 KB, ~1 us at 3 TB/s, so latency-bound as well.
  add fused with the norm: predicted one launch and one pass over the stream less per norm (-72 launches a step).
  sm_90 (compiler), bf16, E = 1280: add_layer_norm 48 registers, 360 instructions, 8 loads and 4 stores, all of 16
  bytes; layer_norm 48, 328, 6 and 2; fp32 add_layer_norm 48, 256, 12 and 6; no spills, on sm_80 and sm_100
  neither. Not measured.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.checks import require_dense_rows, require_floats, require_like, row_stride
from octavo_kernels.dependent_launch import follow, launch_options
from octavo_kernels.variant import Variant


@triton.jit
def norm_kernel(
    x_ptr,  # [T, E] rows; with a delta the residual stream, written back
    delta_ptr,  # [T, E] rows, or None
    weight_ptr,  # [E]
    bias_ptr,  # [E]
    out_ptr,  # [T, E] rows
    eps,
    stride_x,
    stride_delta,
    stride_out,
    WIDTH: tl.constexpr,  # E
    TILE: tl.constexpr,  # power of 2, at least E
    DEPENDENT_LAUNCH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, TILE)
    live = cols < WIDTH
    weight = tl.load(weight_ptr + cols, mask=live, other=0.0).to(tl.float32)  # early: they wait for nothing
    bias = tl.load(bias_ptr + cols, mask=live, other=0.0).to(tl.float32)
    if DEPENDENT_LAUNCH:
        follow()
    x = tl.load(x_ptr + row * stride_x + cols, mask=live, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        x += tl.load(delta_ptr + row * stride_delta + cols, mask=live, other=0.0).to(tl.float32)
        rounded = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * stride_x + cols, rounded, mask=live)
        x = rounded.to(tl.float32)  # the norm of what the next reader of the stream sees
    mean = tl.sum(x, 0) / WIDTH
    centred = tl.where(live, x - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / WIDTH
    y = centred * (1.0 / tl.sqrt(variance + eps)) * weight + bias
    tl.store(out_ptr + row * stride_out + cols, y.to(out_ptr.dtype.element_ty), mask=live)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, *, dependent_launch: bool = False
) -> Tensor:
    """out = layer norm of x's rows, with biased variance, in fp32 inside.

    x, out: bf16, fp16 or fp32 [T, E], rows contiguous; out may be x. weight, bias: [E] contiguous of x's type, written
    by no kernel of a step. dependent_launch: see `octavo_kernels.dependent_launch`. Returns out. Raises ValueError
    naming the argument.
    """
    _check("x", x, weight, bias, out)
    _launch(x, None, weight, bias, eps, out, dependent_launch)
    return out


def add_layer_norm(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor,
    *,
    dependent_launch: bool = False,
) -> Tensor:
    """residual += delta in place, rounded to its type; out = layer norm of the sum.

    residual, delta, out: bf16, fp16 or fp32 [T, E] of one type, rows contiguous; out may be delta, not residual.
    weight, bias, dependent_launch: as in `layer_norm`. Returns out. Raises ValueError naming the argument.
    """
    _check("residual", residual, weight, bias, out)
    require_like("delta", delta, tuple(residual.shape), residual)
    if out.data_ptr() == residual.data_ptr() and out.numel():
        raise ValueError("out: is residual, which keeps the sum")
    _launch(residual, delta, weight, bias, eps, out, dependent_launch)
    return out


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    require_floats(name, x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: shape {tuple(x.shape)} is not [tokens, width]")
    require_dense_rows(name, x)
    require_like("weight", weight, (x.shape[1],), x)
    require_like("bias", bias, (x.shape[1],), x)
    require_like("out", out, tuple(x.shape), x)


def _launch(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor, dependent_launch: bool
) -> None:
    num_rows, width = x.shape
    if num_rows == 0:
        return
    norm_kernel[(num_rows,)](
        x,
        delta,
        weight,
        bias,
        out,
        eps,
        row_stride(x),
        0 if delta is None else row_stride(delta),
        row_stride(out),
        WIDTH=width,
        TILE=triton.next_power_of_2(width),
        num_warps=4,
        enable_fp_fusion=False,
        **launch_options(dependent_launch),
    )


def compile_variants() -> list[Variant]:
    """What the engine launches: both norms of gpt2-large in its types, and a narrow model's in fp32."""
    variants = []
    for kind, width in (("bf16", 1280), ("fp16", 1280), ("fp32", 1280), ("fp32", 768)):
        for name in ("layer_norm", "add_layer_norm"):
            pointers = ["x_ptr", "weight_ptr", "bias_ptr", "out_ptr"]
            constants = {"WIDTH": width, "TILE": triton.next_power_of_2(width), "DEPENDENT_LAUNCH": False}
            if name == "add_layer_norm":
                pointers.append("delta_ptr")
            else:
                constants["delta_ptr"] = None
            strides = ("stride_x", "stride_delta", "stride_out")
            signature = dict.fromkeys(pointers, f"*{kind}") | {"eps": "fp32"}
            signature |= dict.fromkeys(strides, "i32") | dict.fromkeys(constants, "constexpr")
            variants.append(
                Variant(
                    name=f"norm/{name} {kind} {width}",
                    kernel=norm_kernel,
                    signature={argument: signature[argument] for argument in norm_kernel.arg_names},
                    constexprs=constants,
                    divisible=frozenset((*pointers, *strides)),
                    fp_fusion=False,
                    early_loads=4,  # weight and bias, as bf16
                )
            )
    return variants
