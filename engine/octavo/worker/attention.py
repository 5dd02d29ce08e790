"""Attention as the model calls it: a plan once per step, then one call per layer. One class per kind of device."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from octavo_kernels import reference
from octavo_kernels.cpu import native_attention
from octavo_kernels.cpu.attention import AttentionPlan, PagedAttention
from octavo_kernels.cpu.native_attention import NativeAttention, NativePlan
from torch import Tensor

from octavo.checkpoint import ModelSpec
from octavo.worker.input_batch import InputBatch
from octavo.worker.kv_cache import KVCache
from octavo.worker.kv_scales import KVScales


class Attention(Protocol):
    @property
    def name(self) -> str:
        """For EngineInfo.attention_backend."""

    def plan(self, batch: InputBatch, kv_cache: KVCache) -> Any:
        """Whatever `run` needs to know about the batch and can share among layers."""

    def run(self, plan: Any, qkv: Tensor, layer_cache: Tensor, scale: float, kv_scales: KVScales) -> Tensor:
        """Writes the step's keys and values to the cache, then attends. qkv: [T, 3 * E]; returns [T, E]."""


class CpuAttention:
    """By the C kernels, where the machine has a compiler; else by torch's operators."""

    def __init__(self, spec: ModelSpec, hidden_dtype: torch.dtype) -> None:
        self._spec = spec
        self._hidden_dtype = hidden_dtype
        self._kernel: PagedAttention | NativeAttention | None = None  # made at the first step, for the cache it has

    @property
    def name(self) -> str:
        return "cpu-native" if native_attention.supports(torch.float32, self._spec.head_size) else "cpu-paged-flash"

    def plan(self, batch: InputBatch, kv_cache: KVCache) -> AttentionPlan | NativePlan:
        kernel = self._kernel
        if kernel is None or (kernel.block_size, kernel.cache_dtype) != (kv_cache.block_size, kv_cache.dtype):
            kernel = self._kernel = self._kernel_for(kv_cache)
        return kernel.plan(
            kv_cache.num_blocks + 1,
            batch.slot_mapping.numpy(),
            batch.query_start_loc_np,
            batch.seq_lens_np,
            batch.block_tables_np,
            batch.num_decode_rows,
        )

    def _kernel_for(self, kv_cache: KVCache) -> PagedAttention | NativeAttention:
        spec = self._spec
        shape = (spec.n_head, spec.head_size, kv_cache.block_size, kv_cache.dtype)
        if native_attention.supports(kv_cache.dtype, spec.head_size):
            return NativeAttention(*shape, self._hidden_dtype)
        return PagedAttention(*shape)

    def run(self, plan: Any, qkv: Tensor, layer_cache: Tensor, scale: float, kv_scales: KVScales) -> Tensor:
        assert self._kernel is not None
        k_scale, v_scale = kv_scales.key, kv_scales.value
        self._kernel.write(plan, qkv, layer_cache, k_scale=k_scale, v_scale=v_scale)
        return self._kernel.attend(plan, qkv, layer_cache, scale, k_scale=k_scale, v_scale=v_scale)


class TorchAttention:
    """The reference ops, on any device."""

    name: str = "torch"

    def __init__(self, spec: ModelSpec) -> None:
        self._upcast = spec.reorder_and_upcast_attn

    def plan(self, batch: InputBatch, kv_cache: KVCache) -> tuple[InputBatch, list[int], list[int]]:
        return batch, batch.query_start_loc_np.tolist(), batch.seq_lens_np.tolist()

    def run(
        self,
        plan: tuple[InputBatch, list[int], list[int]],
        qkv: Tensor,
        layer_cache: Tensor,
        scale: float,
        kv_scales: KVScales,
    ) -> Tensor:
        batch, query_start_loc, seq_lens = plan
        k_scale, v_scale = kv_scales.key, kv_scales.value
        reference.kv_write(qkv, layer_cache, batch.slot_mapping, k_scale=k_scale, v_scale=v_scale)
        return reference.paged_attention(
            qkv,
            layer_cache,
            batch.block_tables,
            batch.positions,
            query_start_loc,
            seq_lens,
            batch.num_decode_rows,
            scale=scale,
            k_scale=k_scale,
            v_scale=v_scale,
            upcast=self._upcast,
        )


def attention_for(spec: ModelSpec, device: torch.device, hidden_dtype: torch.dtype) -> Attention:
    return CpuAttention(spec, hidden_dtype) if device.type == "cpu" else TorchAttention(spec)
