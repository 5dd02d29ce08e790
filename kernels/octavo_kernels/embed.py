"""Token plus position embedding, one program per token.

Log
  one program per token, the whole row in one tile, 4 warps: predicted 2 launches less than two lookups and a sum;
  bound by latency below ~1,000 tokens. sm_90 (compiler): 32 registers, 80 instructions,
  4 + 2 loads (4 of 16 bytes, 2 of ids) and 2 stores of 16 bytes, no spills. Not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.checks import (
    FLOATS,
    require_contiguous,
    require_dense_rows,
    require_device,
    require_floats,
    row_stride,
)
from octavo_kernels.dependent_launch import follow, launch_options
from octavo_kernels.variant import Variant


@triton.jit
def embed_kernel(
    input_ids_ptr,  # int32 or int64 [T]
    positions_ptr,  # int32 or int64 [T]
    wte_ptr,  # [vocab_size, E] rows
    wpe_ptr,  # [n_positions, E] rows
    out_ptr,  # [T, E] rows
    vocab_size,
    n_positions,
    stride_wte,
    stride_wpe,
    stride_out,
    WIDTH: tl.constexpr,  # E
    TILE: tl.constexpr,  # power of 2, at least E
    DEPENDENT_LAUNCH: tl.constexpr,
):
    if DEPENDENT_LAUNCH:
        follow()
    token = tl.program_id(0).to(tl.int64)
    input_id = tl.load(input_ids_ptr + token).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    known = (input_id >= 0) & (input_id < vocab_size) & (position >= 0) & (position < n_positions)
    cols = tl.arange(0, TILE)
    live = cols < WIDTH
    embedding = tl.load(wte_ptr + input_id * stride_wte + cols, mask=live & known, other=0.0)
    place = tl.load(wpe_ptr + position * stride_wpe + cols, mask=live & known, other=0.0)
    embedding = embedding.to(out_ptr.dtype.element_ty).to(tl.float32)  # as the reference: rounded before the sum
    total = embedding + place.to(tl.float32)
    tl.store(out_ptr + token * stride_out + cols, total.to(out_ptr.dtype.element_ty), mask=live)


def embed(
    input_ids: Tensor,
    positions: Tensor,
    wte: Tensor,
    wpe: Tensor,
    out: Tensor,
    *,
    dependent_launch: bool = False,
) -> Tensor:
    """out[t] = wte[input_ids[t]] + wpe[positions[t]]; zeros where an id or a position is out of range.

    input_ids, positions: int32 or int64 [T] contiguous. wte: [vocab_size, E]; wpe: [n_positions, E]; out: [T, E]; each
    bf16, fp16 or fp32 with rows contiguous. wte is rounded to out's type, then the sum.
    dependent_launch: see `octavo_kernels.dependent_launch`. Returns out. Raises ValueError naming the argument.
    """
    _check(input_ids, positions, wte, wpe, out)
    num_tokens, width = out.shape
    if num_tokens == 0:
        return out
    embed_kernel[(num_tokens,)](
        input_ids,
        positions,
        wte,
        wpe,
        out,
        wte.shape[0],
        wpe.shape[0],
        row_stride(wte),
        row_stride(wpe),
        row_stride(out),
        WIDTH=width,
        TILE=triton.next_power_of_2(width),
        num_warps=4,
        enable_fp_fusion=False,
        **launch_options(dependent_launch),
    )
    return out


def _check(input_ids: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor, out: Tensor) -> None:
    for name, matrix in (("wte", wte), ("wpe", wpe), ("out", out)):
        require_floats(name, matrix, FLOATS)
        require_device(name, matrix, wte)
        if matrix.dim() != 2 or matrix.shape[1] != wte.shape[-1]:
            raise ValueError(f"{name}: shape {tuple(matrix.shape)} is not [rows, {wte.shape[-1]}]")
        require_dense_rows(name, matrix)
    for name, tokens in (("input_ids", input_ids), ("positions", positions)):
        require_floats(name, tokens, (torch.int32, torch.int64))
        require_device(name, tokens, wte)
        if tokens.shape != (out.shape[0],):
            raise ValueError(f"{name}: shape {tuple(tokens.shape)} is not ({out.shape[0]},)")
        require_contiguous(name, tokens)


def compile_variants() -> list[Variant]:
    """What the engine launches: gpt2-large in bf16, and the demo model's width in fp32."""
    pointers = ("input_ids_ptr", "positions_ptr", "wte_ptr", "wpe_ptr", "out_ptr")
    strides = ("stride_wte", "stride_wpe", "stride_out")
    variants = []
    for kind, width in (("bf16", 1280), ("fp16", 1280), ("fp32", 768)):
        signature = dict.fromkeys(pointers[:2], "*i32") | dict.fromkeys(pointers[2:], f"*{kind}")
        signature |= dict.fromkeys(("vocab_size", "n_positions", *strides), "i32")
        constants = {"WIDTH": width, "TILE": triton.next_power_of_2(width), "DEPENDENT_LAUNCH": False}
        variants.append(
            Variant(
                name=f"embed {kind} {width}",
                kernel=embed_kernel,
                signature=signature | dict.fromkeys(constants, "constexpr"),
                constexprs=constants,
                divisible=frozenset((*pointers, *strides)),
                fp_fusion=False,
            )
        )
    return variants
