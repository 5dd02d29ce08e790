"""fp8 e4m3 (torch.float8_e4m3fn) in Triton kernels: 4 bits of exponent, 3 of mantissa, largest number 448, no infinity.

Log
  encoded by integer arithmetic, ~14 instructions a number: sm_80 has no conversion, and the interpreter's (Triton 3.7)
  truncates subnormals and loses the carry into the exponent. The hardware's `cvt.rn.satfinite.e4m3x2` does two numbers
  in one instruction, but writing keys and values is bound by memory: no cost predicted. Not measured.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MAX = tl.constexpr(448.0)
_SMALLEST_NORMAL = tl.constexpr(0x3C800000)  # bits of the fp32 number 2**-6
_SUBNORMAL_UNIT = tl.constexpr(16384.0)  # 2**14, whose neighbours in fp32 are e4m3's subnormal step 2**-9 apart
_SUBNORMAL_BITS = tl.constexpr(0x46800000)  # bits of 2**14
_REBIAS = tl.constexpr((127 - 7) << 3)


@triton.jit
def encode_e4m3(x):
    """fp32 of any shape -> uint8 bits of the nearest e4m3 number, ties to even; limited to +-448, NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.abs(x)
    magnitude = tl.where(magnitude > _MAX, _MAX, magnitude)
    above = magnitude.to(tl.int32, bitcast=True)
    normal = ((above + 0x7FFFF + ((above >> 20) & 1)) >> 20) - _REBIAS
    subnormal = (magnitude + _SUBNORMAL_UNIT).to(tl.int32, bitcast=True) - _SUBNORMAL_BITS
    code = tl.where(above < _SMALLEST_NORMAL, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
