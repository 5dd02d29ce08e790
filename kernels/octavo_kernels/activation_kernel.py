"""The activations of activations.py inside Triton kernels, in fp32.

Log
  tanh forms as x * sigmoid: one exp2, no cancellation at large negative x, ~8 instructions an element. All are fused in
  the linear's epilogue, which at batch 1 of gpt2-large is 5,120 elements a layer: no measurable cost predicted.
  Not measured.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

FUSED: Final[dict[str, str]] = {
    "gelu": "gelu",
    "gelu_10": "gelu_10",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "hardswish": "hardswish",
    "laplace": "laplace",
    "leaky_relu": "leaky_relu",
    "linear": "none",
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "sqrtsoftplus": "sqrtsoftplus",
    "swish": "silu",
    "tanh": "tanh",
}
"""Name in config.json -> what `activate` calls it."""


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    """log(1 + e^x), and x from 20 on as torch has it; exact where e^x is lost beside 1."""
    power = tl.exp(tl.minimum(x, 20.0))
    above_one = 1.0 + power
    lost = above_one - 1.0
    small = tl.where(lost == 0.0, power, tl.log(above_one) * (power / tl.where(lost == 0.0, 1.0, lost)))
    return tl.where(x > 20.0, x, small)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """x: fp32 of any shape. KIND: a value of FUSED."""
    tl.static_assert(x.dtype == tl.float32)
    if KIND == "gelu_tanh":  # 0.5 * (1 + tanh(u)) = sigmoid(2 * u)
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_10":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        y = tl.where(y > 10.0, 10.0, y)
    elif KIND == "quick_gelu":
        y = x * _sigmoid(1.702 * x)
    elif KIND == "silu":
        y = x * _sigmoid(x)
    elif KIND == "sigmoid":
        y = _sigmoid(x)
    elif KIND == "tanh":
        power = tl.exp(-2.0 * tl.abs(x))
        y = (1.0 - power) / (1.0 + power)
        y = tl.where(x < 0.0, -y, y)
    elif KIND == "relu":
        y = tl.where(x < 0.0, 0.0, x)  # NaN stays
    elif KIND == "relu2":
        y = tl.where(x < 0.0, 0.0, x * x)
    elif KIND == "relu6":
        y = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif KIND == "leaky_relu":
        y = tl.where(x < 0.0, 0.01 * x, x)
    elif KIND == "hardswish":
        gate = x + 3.0
        y = x * tl.where(gate < 0.0, 0.0, tl.where(gate > 6.0, 6.0, gate)) / 6.0
    elif KIND == "laplace":  # sigma * sqrt(2) with the constants of activations.py
        y = 0.5 * (1.0 + tl.erf((x - 0.707107) / 0.39894257487763823))
    elif KIND == "sqrtsoftplus":
        y = tl.sqrt(_softplus(x))
    elif KIND == "mish":  # tanh(log(1 + p)) = (p * p + 2 * p) / (p * p + 2 * p + 2)
        power = tl.exp(tl.minimum(x, 20.0))
        ratio = power * (power + 2.0)
        y = x * (ratio / (ratio + 2.0))
    else:
        tl.static_assert(KIND == "none", "no such activation")
        y = x
    return y
