"""Linear layers on the CPU: weights packed once for the library that multiplies fastest by them.

Measured, gpt2-small's 49 matrices on 2 cores with AVX2 only (Zen 3), ms per pass with 1 thread at 1 / 16 / 64 rows:

    F.linear fp32            33.9 / 112 / 268        F.linear bf16       26.8 / 389 / 1542
    oneDNN fp32, packed      33.0 /  83 / 232        int8 dynamic        11.0 /  27 /  105
    fbgemm fp16 weights      16.7 /  57 / 202

Where the CPU multiplies bf16 itself (AVX512_BF16; Zen 4), ms per pass with 2 threads at 1 / 4 / 16 / 64 / 256 rows,
by bench/cpu_kernels.py:

    oneDNN bf16, packed     12.7 / 13.1 / 16.5 / 42.6 / 164      F.linear bf16    16.4 / 18.6 / 25.5 / 51.1 / 172
    native/linear.c          8.3 /  8.8 / 11.8 / 40.7 / 151      int8 dynamic      6.7 /  6.6 / 10.0 / 30.4 / 135

At 64 rows that is the rate of one large product (bench/step.py --parts), at one row what the memory gives, which varies
by the hour: the run before found 6.5 ms for native/linear.c.

Elsewhere 16-bit weights are kept as fp16 and multiplied in fp32: they fit, since bf16 has fewer mantissa bits, and
activations lose nothing. oneDNN's fp32 product gives a row the same bits whatever the number of rows, and so does
native/linear.c.
"""

from __future__ import annotations

import enum
import math
import warnings
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo_kernels.activations import ACTIVATIONS, Activation, gelu_tanh, identity
from octavo_kernels.cpu import memory, native

FP16_MAX: Final = 65504.0
ONEDNN_EPILOGUES: Final[dict[str, tuple[str, str]]] = {
    "gelu": ("gelu", "none"),
    "gelu_accurate": ("gelu", "tanh"),
    "gelu_fast": ("gelu", "tanh"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_python": ("gelu", "none"),
    "gelu_python_tanh": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "swish": ("swish", ""),
    "tanh": ("tanh", ""),
}
"""Activations that oneDNN applies inside the product: attribute and algorithm of `_linear_pointwise`."""


SIGMOID_GELU_ROWS: Final = 4
"""From this many rows on `gelu_tanh_by_sigmoid` beats F.gelu; 16 x 3072, 1 thread: 81 against 174 us."""


class LinearKind(enum.StrEnum):
    NATIVE = "native"
    """bf16 weights and activations, by octavo's own kernel."""
    ONEDNN = "onednn"
    """Packed by oneDNN in the model's type: fp32, or bf16."""
    FP16 = "fp16"
    """fp16 weights, fp32 activations (fbgemm)."""
    INT8 = "int8"
    """int8 weights with a scale per output, activations quantized on the fly."""
    PLAIN = "plain"
    """`F.linear`, where no packing library is built in."""


class Linear(Protocol):
    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(x @ weight.T + bias) + residual. x: [M, K]; residual: [M, O]; returns [M, O], x's type.

        May write into `residual` and return it. A layer has an activation or takes residuals, not both.
        """


def choose_kind(dtype: torch.dtype, quantization: str | None) -> LinearKind:
    """How this machine multiplies best by weights of `dtype`. Raises ValueError for an unknown quantization."""
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    if quantization is not None:
        if quantization != "int8":
            raise ValueError(f'quantization must be "int8" or None, not {quantization!r}')
        return LinearKind.INT8
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return LinearKind.ONEDNN
    if dtype == torch.bfloat16 and has_native_bf16():
        return LinearKind.NATIVE if native_multiplies_best() else LinearKind.ONEDNN
    return LinearKind.FP16 if dtype != torch.float32 and has_fbgemm else LinearKind.PLAIN


def has_native_bf16() -> bool:
    """Whether the CPU has bf16 multiplications and oneDNN uses them."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def native_multiplies_best() -> bool:
    """With AMX, which native/linear.c does not use, oneDNN multiplies many rows several times faster."""
    library = native.library()
    return library is not None and bool(library.octavo_has_linear()) and not torch.cpu._is_amx_tile_supported()


def activation_dtype(kind: LinearKind, dtype: torch.dtype) -> torch.dtype:
    """Type of the hidden states between linears of `kind` when the model's type is `dtype`."""
    return torch.float32 if kind in (LinearKind.FP16, LinearKind.INT8) else dtype


def pack(weight: Tensor, bias: Tensor | None, kind: LinearKind, activation: str | None = None) -> Linear:
    """Prepares a layer. weight: [O, K] of any float type and strides; bias: [O]. Nothing of `weight` is kept."""
    if kind == LinearKind.NATIVE and weight.shape[1] % 2 == 0:
        return NativeLinear(weight, bias, activation)
    if kind in (LinearKind.NATIVE, LinearKind.ONEDNN):
        return OnednnLinear(weight, bias, activation)
    if kind == LinearKind.INT8:
        return Int8Linear(weight, bias, activation)
    if kind == LinearKind.FP16:
        low, high = weight.aminmax()
        if max(-float(low), float(high)) <= FP16_MAX:
            return HalfLinear(weight, bias, activation)
        return OnednnLinear(weight.float(), None if bias is None else bias.float(), activation)
    return PlainLinear(weight, bias, activation)


def gelu_tanh_by_sigmoid(x: Tensor) -> Tensor:
    """The tanh form of gelu as x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x^3)): exp is cheaper than tanh."""
    if len(x) < SIGMOID_GELU_ROWS:
        return gelu_tanh(x)
    inner = (x * x).mul_(2 * 0.044715 * math.sqrt(2 / math.pi)).add_(2 * math.sqrt(2 / math.pi)).mul_(x)
    return inner.sigmoid_().mul_(x)


def unfused(activation: str | None) -> Activation:
    """The fastest form of an activation that stands alone, on fp32."""
    function = identity if activation is None else ACTIVATIONS[activation]
    return gelu_tanh_by_sigmoid if function is gelu_tanh else function


class OnednnLinear:
    """Weights in oneDNN's blocked layout; activation or residual inside the product."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
        self.bias = None if bias is None else bias.to(weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.attribute, self.algorithm = ONEDNN_EPILOGUES.get(activation or "", ("none", ""))
        fused = activation is None or activation in ONEDNN_EPILOGUES
        self.activation = identity if fused else unfused(activation)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.attribute, [], self.algorithm)
        return self.activation(y)


class NativeLinear:
    """bf16 weights in the strips of native/linear.c; bias, tanh gelu and residual inside the product. x: bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
        weight = weight.to(torch.bfloat16).contiguous()
        self._library = native.loaded()
        self.outputs, self.inputs = weight.shape
        self.weight = memory.zeros([self._library.octavo_packed_size(*weight.shape)], torch.bfloat16)
        self._library.octavo_pack(self.weight.data_ptr(), weight.data_ptr(), *weight.shape)
        self.bias = None if bias is None else bias.to(torch.bfloat16).contiguous()
        fused = activation is not None and ACTIVATIONS[activation] is gelu_tanh
        self._epilogue = native.ACTIVATIONS["gelu_tanh" if fused else None]
        self.activation = identity if fused else unfused(activation)
        self.is_whole = fused or activation is None
        """Nothing is left to do after the product."""

    @property
    def described(self) -> tuple[int | None, ...]:
        """Weight, bias, outputs, inputs, activation, as C takes them."""
        bias = None if self.bias is None else self.bias.data_ptr()
        return self.weight.data_ptr(), bias, self.outputs, self.inputs, self._epilogue

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.contiguous()
        rows, inputs = x.shape
        y = x.new_empty(rows, self.outputs)
        assert x.dtype == torch.bfloat16 and inputs == self.inputs
        if residual is not None:
            assert residual.dtype == x.dtype and residual.shape == y.shape and residual.is_contiguous()
        self._library.octavo_linear(
            y.data_ptr(),
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            rows,
            *self.described,
            torch.get_num_threads(),
        )
        return self.activation(y)


class HalfLinear:
    """fp16 weights, widened to fp32 inside the product; x in fp32. Weights above 65504 do not fit: see `pack`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
        fp32_bias = None if bias is None else bias.float()
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), fp32_bias)
        self.activation = unfused(activation)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.ops.quantized.linear_dynamic_fp16(x, self.weight)
        y = self.activation(y)
        return y if residual is None else residual.add_(y)


class Int8Linear:
    """int8 weights, symmetric, one scale per output; x in fp32, quantized with one scale for all its rows.

    That scale makes a row's result depend on the rows beside it, by up to the quantization error.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
        weight = weight.float().contiguous()
        scales = weight.abs().amax(1).clamp_(min=1e-12).div_(127).double()
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        fp32_bias = None if bias is None else bias.float()
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = self._engine()  # read by the packing op only
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch announces the move of these types to torchao
                quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self.weight = torch.ops.quantized.linear_prepack(quantized, fp32_bias)
        finally:
            torch.backends.quantized.engine = engine
        self.activation = unfused(activation)
        # Without VNNI pairs of products are summed in 16 bits: 8-bit activations would saturate them.
        self.reduce_range = not torch.cpu._is_vnni_supported()

    @staticmethod
    def _engine() -> str:
        engines = torch.backends.quantized.supported_engines
        return next(name for name in ("fbgemm", "onednn", "qnnpack") if name in engines)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.ops.quantized.linear_dynamic(x, self.weight, self.reduce_range)
        y = self.activation(y)
        return y if residual is None else residual.add_(y)


class PlainLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
        self.weight = weight.contiguous()
        self.bias = None if bias is None else bias.to(weight.dtype)
        self.activation = unfused(activation)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        y = self.activation(y)
        return y if residual is None else y.add_(residual)
