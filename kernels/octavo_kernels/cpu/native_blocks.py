"""All layers of a step in one call of C, where all their parts are C's.

Layer by layer, Python and the beginning and end of threads around each of 8 parts take 0.06 to 0.16 ms a layer: what
Python needs is no longer in the processor's caches after so many weights. Measured by bench/cpu_kernels.py, ms for
gpt2's 12 layers at 1 / 4 / 16 / 64 rows, one after the other and in one call: 6.0 / 6.0 / 9.8 / 32.4 and
5.3 / 5.2 / 8.6 / 30.5.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from octavo_kernels.cpu import native
from octavo_kernels.cpu.linear import Linear, NativeLinear
from octavo_kernels.cpu.native_attention import NativePlan

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


@dataclass(frozen=True, slots=True)
class BlockParts:
    """One layer. Norms: weight and bias, [E] each."""

    norm_1: tuple[Tensor, Tensor]
    qkv: Linear
    attention_out: Linear
    norm_2: tuple[Tensor, Tensor]
    mlp_in: Linear
    mlp_out: Linear
    scale: float
    """Of scores."""
    k_scale: float
    v_scale: float


class _Layer(ctypes.Structure):
    _fields_ = [("weight", _P), ("bias", _P), ("outputs", _L), ("inputs", _L), ("activation", _I)]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("norm_1_weight", "norm_1_bias", "norm_2_weight", "norm_2_bias")),
        *((name, _Layer) for name in ("qkv", "attention_out", "mlp_in", "mlp_out")),
        *((name, _F) for name in ("scale", "k_scale", "v_scale")),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        *(("data", _P), ("type", _I), ("num_blocks", _L)),
        *(("heads", _I), ("block_size", _I), ("head_size", _I)),
    ]


class _Queries(ctypes.Structure):
    _fields_ = [
        *(("tokens", _P), ("rows", _P), ("lengths", _P), ("count", _L)),
        *(("tables", _P), ("table_width", _L)),
    ]


class _Chunks(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("starts", "ends", "lengths", "rows")),
        *(("count", _L), ("tables", _P), ("table_width", _L), ("scratch", _P), ("width", _L)),
    ]


class _Step(ctypes.Structure):
    """`struct step` of blocks.c."""

    _fields_ = [
        *(("blocks", _P), ("num_layers", _L), ("eps", _F)),
        *((name, _P) for name in ("hidden", "narrow", "wide", "inner")),
        *(("num_tokens", _L), ("cache", _Cache), ("layer_bytes", _L), ("slots", _P), ("queries", _Queries)),
        *(("scores", _P), ("scores_width", _L), ("chunks", _Chunks), ("num_computed", _P), ("num_threads", _I)),
    ]


class NativeBlocks:
    """The layers of a model whose linears are all `NativeLinear`s."""

    def __init__(self, blocks: Sequence[BlockParts], eps: float) -> None:
        self._parts = blocks  # keeps the memory
        self._blocks = (_Block * len(blocks))(*(_described(block) for block in blocks))
        self._eps = eps
        self._inner_size = _native(blocks[0].mlp_in).outputs
        self._num_computed = ctypes.c_int64(0)

    @classmethod
    def of(cls, blocks: Sequence[BlockParts], eps: float) -> Self | None:
        """None if a linear is of another kind, or has an activation that is not computed within it."""
        linears = [linear for b in blocks for linear in (b.qkv, b.attention_out, b.mlp_in, b.mlp_out)]
        norms = [tensor for b in blocks for tensor in (*b.norm_1, *b.norm_2)]
        if not all(isinstance(linear, NativeLinear) and linear.is_whole for linear in linears):
            return None
        assert all(tensor.dtype == torch.bfloat16 and tensor.is_contiguous() for tensor in norms)
        return cls(blocks, eps)

    @property
    def num_computed(self) -> int:
        """Layers since the start; grows while a step is computed, as other threads can see."""
        return self._num_computed.value

    def computes(self, plan: Any) -> bool:
        return isinstance(plan, NativePlan) and not plan.prefill_rows

    def __call__(self, hidden: Tensor, plan: NativePlan, cache: Tensor) -> Tensor:
        """hidden: bf16 [T, E], the embeddings; becomes the last layer's result and is returned. cache: all layers',
        [L, 2, N, H, S, D]; gets the tokens' keys and values."""
        tokens, width = hidden.shape
        layers, _, num_blocks, heads, block_size, head_size = cache.shape
        slots, num_slots = plan.slots_for_c
        assert hidden.dtype == torch.bfloat16 and hidden.is_contiguous() and cache.is_contiguous()
        assert layers == len(self._blocks) and width == heads * head_size and tokens == num_slots
        assert num_blocks == plan.num_blocks and self.computes(plan)
        narrow, wide, inner = (hidden.new_empty(tokens, size) for size in (width, 3 * width, self._inner_size))
        step = _Step(
            *(ctypes.addressof(self._blocks), layers, self._eps),
            *(tensor.data_ptr() for tensor in (hidden, narrow, wide, inner)),
            tokens,
            _Cache(cache.data_ptr(), native.TYPES[cache.dtype], num_blocks, heads, block_size, head_size),
            cache.stride(0) * cache.itemsize,
            slots,
            _Queries(*plan.queries_for_c),
            *(plan.scores.data_ptr(), plan.scores.shape[2]),
            _Chunks(*plan.chunks_for_c),
            ctypes.addressof(self._num_computed),
            min(torch.get_num_threads(), plan.num_threads),
        )
        native.loaded().octavo_blocks(ctypes.addressof(step))
        return hidden


def _described(block: BlockParts) -> _Block:
    norms = [tensor.data_ptr() for tensor in (*block.norm_1, *block.norm_2)]
    linears = [_native(linear) for linear in (block.qkv, block.attention_out, block.mlp_in, block.mlp_out)]
    layers = [_Layer(*linear.described) for linear in linears]
    return _Block(*norms, *layers, block.scale * block.k_scale, block.k_scale, block.v_scale)


def _native(linear: Linear) -> NativeLinear:
    assert isinstance(linear, NativeLinear)
    return linear
