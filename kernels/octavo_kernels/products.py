"""Products of tiles: tl.dot on a GPU, and what stands for it where the interpreter's is not good enough."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def product(a, b, acc, FORM: tl.constexpr):
    """acc + a @ b in fp32. `FORM` is "dot" on a GPU; see `product_form` for the others."""
    if FORM == "dot":
        return tl.dot(a, b, acc, input_precision="ieee")
    elif FORM == "widened dot":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        tl.static_assert(FORM == "sum")
        return acc + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)


def product_form(x: Tensor, fixed_order: bool) -> str:
    """How tiles are multiplied. In the interpreter tl.dot is NumPy's product, which takes bf16 for integers, and whose
    sums may depend on a row's place among the others: bf16 is widened there, and a fixed order needs plain sums."""
    if x.device.type != "cpu":
        return "dot"
    if fixed_order:
        return "sum"
    return "widened dot" if x.dtype == torch.bfloat16 else "dot"
