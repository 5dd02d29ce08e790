"""GPT-2 over a paged cache: one flat batch of tokens in, hidden states and logits out.

The equations of transformers' GPT2LMHeadModel (modeling_gpt2.py). The model is written in the few ops that
`octavo_kernels.reference` specifies; on the CPU the linears are packed and attention is `octavo_kernels.cpu`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from octavo_kernels import reference
from octavo_kernels.activations import ACTIVATIONS
from octavo_kernels.cpu import linear as cpu_linear
from octavo_kernels.cpu.linear import Linear, LinearKind
from octavo_kernels.cpu.native_blocks import BlockParts, NativeBlocks
from octavo_kernels.cpu.norm import layer_norm as cpu_norm
from torch import Tensor

from octavo.checkpoint import ModelSpec
from octavo.errors import StartupError
from octavo.worker.attention import attention_for
from octavo.worker.input_batch import InputBatch
from octavo.worker.kv_cache import KVCache
from octavo.worker.kv_scales import KVScales, kv_scales


class WeightSource(Protocol):
    """A dict of tensors, or `weights.WeightReader`, which reads each when it is taken."""

    def pop(self, name: str, /) -> Tensor: ...

    def __contains__(self, name: object, /) -> bool: ...


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor
    """[E]"""
    bias: Tensor
    """[E]"""
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        function = cpu_norm if x.is_cpu else reference.layer_norm
        return function(x, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class Block:
    ln_1: Norm
    c_attn: Linear
    """E -> 3 * E"""
    attn_proj: Linear
    """E -> E, adds the residual."""
    ln_2: Norm
    c_fc: Linear
    """E -> n_inner, with the activation."""
    mlp_proj: Linear
    """n_inner -> E, adds the residual."""
    attn_scale: float
    kv_scales: KVScales


class GPT2:
    """Weights ready for use. Holds no state of requests."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightSource,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """Takes every tensor out of `weights` (names without "transformer.", linears [in, out] as in the checkpoint;
        no "lm_head.weight" when it is tied), in `dtype`, on any device. cache_dtype: of the caches it is to work on;
        None: `dtype`.

        Raises StartupError for an activation function that needs weights of its own or that nobody knows, and for
        quantization anywhere but on the CPU.
        """
        check_activation(spec)
        if quantization is not None and device.type != "cpu":
            raise StartupError(StartupError.USAGE, f"quantization {quantization!r} works on the CPU only")
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self.linear_kind = cpu_linear.choose_kind(dtype, quantization) if device.type == "cpu" else LinearKind.PLAIN
        self.hidden_dtype = cpu_linear.activation_dtype(self.linear_kind, dtype)
        """Type of the residual stream and of the logits."""
        self._cache_dtype = cache_dtype or dtype
        self.attention = attention_for(spec, device, self.hidden_dtype)
        self._wte = weights.pop("wte.weight").to(device)  # [vocab_size, E]
        self._wpe = weights.pop("wpe.weight").to(device, self.hidden_dtype)  # [n_positions, E]
        self._blocks = [self._block(weights, layer) for layer in range(spec.n_layer)]
        self._ln_f = self._norm(weights, "ln_f")
        self._whole = self._in_one_call() if device.type == "cpu" else None
        self._num_layers_computed = 0
        head = weights.pop("lm_head.weight") if "lm_head.weight" in weights else self._wte
        self._lm_head = self._pack(head, None, None)

    @property
    def attention_backend(self) -> str:
        """For EngineInfo."""
        return self.attention.name

    @property
    def num_layers_computed(self) -> int:
        """Since the start, within a step too: tells a slow step from one that hangs."""
        return self._num_layers_computed + (self._whole.num_computed if self._whole is not None else 0)

    def _in_one_call(self) -> NativeBlocks | None:
        """The layers for steps without long chunks, where they are all of the kind that C computes."""
        parts = [
            BlockParts(
                norm_1=(block.ln_1.weight, block.ln_1.bias),
                qkv=block.c_attn,
                attention_out=block.attn_proj,
                norm_2=(block.ln_2.weight, block.ln_2.bias),
                mlp_in=block.c_fc,
                mlp_out=block.mlp_proj,
                scale=block.attn_scale,
                k_scale=block.kv_scales.key,
                v_scale=block.kv_scales.value,
            )
            for block in self._blocks
        ]
        return NativeBlocks.of(parts, self.spec.layer_norm_epsilon)

    def _block(self, weights: WeightSource, layer: int) -> Block:
        spec, name = self.spec, f"h.{layer}"
        ln_1 = self._norm(weights, f"{name}.ln_1")
        weight, bias = weights.pop(f"{name}.attn.c_attn.weight").t(), weights.pop(f"{name}.attn.c_attn.bias")
        return Block(
            ln_1=ln_1,
            kv_scales=kv_scales(self._cache_dtype, ln_1.weight, ln_1.bias, weight, bias),
            c_attn=self._pack(weight, bias, None),
            attn_proj=self._linear(weights, f"{name}.attn.c_proj"),
            ln_2=self._norm(weights, f"{name}.ln_2"),
            c_fc=self._linear(weights, f"{name}.mlp.c_fc", spec.activation_function),
            mlp_proj=self._linear(weights, f"{name}.mlp.c_proj"),
            attn_scale=attention_scale(spec, layer),
        )

    def _norm(self, weights: WeightSource, name: str) -> Norm:
        weight = weights.pop(f"{name}.weight").to(self.device, self.hidden_dtype)
        bias = weights.pop(f"{name}.bias").to(self.device, self.hidden_dtype)
        return Norm(weight, bias, self.spec.layer_norm_epsilon)

    def _linear(self, weights: WeightSource, name: str, activation: str | None = None) -> Linear:
        return self._pack(weights.pop(f"{name}.weight").t(), weights.pop(f"{name}.bias"), activation)

    def _pack(self, weight: Tensor, bias: Tensor | None, activation: str | None) -> Linear:
        """weight: [out, in]."""
        if self.device.type == "cpu":
            return cpu_linear.pack(weight, bias, self.linear_kind, activation)
        weight = weight.to(self.device).contiguous()
        bias = None if bias is None else bias.to(self.device)
        return partial(_reference_linear, weight, bias, activation)

    @torch.inference_mode()
    def forward(self, batch: InputBatch, kv_cache: KVCache) -> Tensor:
        """Computes all tokens of the batch; their keys and values are in the cache afterwards.

        Returns hidden states after ln_f, `hidden_dtype` [T, E].
        """
        hidden = reference.embed(batch.input_ids, batch.positions, self._wte, self._wpe, self.hidden_dtype)
        plan = self.attention.plan(batch, kv_cache)
        if self._whole is not None and self._whole.computes(plan):
            return self._ln_f(self._whole(hidden, plan, kv_cache.data))
        for block, layer_cache in zip(self._blocks, kv_cache.data, strict=True):
            qkv = block.c_attn(block.ln_1(hidden))
            attended = self.attention.run(plan, qkv, layer_cache, block.attn_scale, block.kv_scales)
            hidden = block.attn_proj(attended, hidden)
            hidden = block.mlp_proj(block.c_fc(block.ln_2(hidden)), hidden)
            self._num_layers_computed += 1
        return self._ln_f(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, E] after ln_f. Returns [rows, vocab_size] in `hidden_dtype`."""
        return self._lm_head(hidden)


def check_activation(spec: ModelSpec) -> None:
    """Raises StartupError for an activation function that needs weights of its own or that nobody knows."""
    if spec.activation_function not in ACTIVATIONS:
        raise StartupError(
            StartupError.CHECKPOINT,
            f"config.json: activation_function {spec.activation_function!r} is not one of {', '.join(ACTIVATIONS)}",
        )


def attention_scale(spec: ModelSpec, layer: int) -> float:
    """What queries are multiplied with in one layer."""
    scale = spec.head_size**-0.5 if spec.scale_attn_weights else 1.0
    return scale / (layer + 1) if spec.scale_attn_by_inverse_layer_idx else scale


def _reference_linear(
    weight: Tensor, bias: Tensor | None, activation: str | None, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    return reference.linear(x, weight, bias, activation=activation, residual=residual)
