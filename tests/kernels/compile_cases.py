"""Kernels with one fault each, for test_compile_check.py; compiled in a process of their own, never run."""

from __future__ import annotations

import triton
import triton.language as tl
from octavo_kernels.dependent_launch import follow
from octavo_kernels.variant import Variant


@triton.jit
def copy(x_ptr, y_ptr, stride, TILE: tl.constexpr):
    offsets = tl.program_id(0) * stride + tl.arange(0, TILE)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))


@triton.jit
def product(x_ptr, y_ptr, z_ptr, TILE: tl.constexpr, DOT: tl.constexpr):
    rows, columns = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    x = tl.load(x_ptr + rows * TILE + columns)
    y = tl.load(y_ptr + rows * TILE + columns)
    if DOT:
        z = tl.dot(x, y)
    else:
        z = x.to(tl.float32) * y
    tl.store(z_ptr + rows * TILE + columns, z)


@triton.jit
def transposed(x_ptr, y_ptr, TILE: tl.constexpr):
    """Keeps its whole tile across a loop that needs it twice: more than a thread's registers."""
    rows, columns = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    x = tl.load(x_ptr + rows * TILE + columns)
    total = tl.zeros((TILE, TILE), tl.float32)
    for turn in range(4):
        total += x * tl.sum(x + turn, 0)[None, :]
        total *= tl.sum(total, 1)[:, None]
    tl.store(y_ptr + rows * TILE + columns, total)


@triton.jit
def hurry(x_ptr, y_ptr, TILE: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr):
    """Reads, and half of its programs end, before the kernel in front has ended."""
    offsets = tl.arange(0, TILE)
    x = tl.load(x_ptr + offsets)
    if tl.program_id(0) % 2 == 0:
        return
    if DEPENDENT_LAUNCH:
        follow()
    tl.store(y_ptr + offsets, x)


def compile_variants() -> list[Variant]:
    copying = {"x_ptr": "*bf16", "y_ptr": "*bf16", "stride": "i32", "TILE": "constexpr"}
    pointers = frozenset({"x_ptr", "y_ptr", "z_ptr"})
    product_types = {"x_ptr": "*fp16", "y_ptr": "*fp16", "z_ptr": "*fp32", "TILE": "constexpr", "DOT": "constexpr"}
    return [
        Variant("case/good", copy, copying, {"TILE": 1024}, frozenset({"x_ptr", "y_ptr", "stride"})),
        Variant("case/unknown stride", copy, copying, {"TILE": 1024}, frozenset({"x_ptr", "y_ptr"})),
        Variant("case/dot", product, product_types, {"TILE": 64, "DOT": True}, pointers, mma="wgmma"),
        Variant("case/small dot", product, product_types, {"TILE": 16, "DOT": True}, pointers, mma="wgmma"),
        Variant("case/no dot", product, product_types, {"TILE": 64, "DOT": False}, pointers, mma="mma"),
        Variant(
            "case/spills",
            transposed,
            {"x_ptr": "*fp32", "y_ptr": "*fp32", "TILE": "constexpr"},
            {"TILE": 64},
            frozenset({"x_ptr", "y_ptr"}),
            num_warps=1,
        ),
        Variant(
            "case/hurry",
            hurry,
            {"x_ptr": "*bf16", "y_ptr": "*bf16", "TILE": "constexpr", "DEPENDENT_LAUNCH": "constexpr"},
            {"TILE": 1024, "DEPENDENT_LAUNCH": False},
            frozenset({"x_ptr", "y_ptr"}),
        ),
    ]
