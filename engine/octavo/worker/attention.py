"""Attention as the model calls it: a plan once per step, then one call per layer. One class per kind of device."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from octavo_kernels import reference
from octavo_kernels.cpu.attention import AttentionPlan, PagedAttention
from torch import Tensor

from octavo.checkpoint import ModelSpec
from octavo.worker.input_batch import InputBatch
from octavo.worker.kv_cache import KVCache
from octavo.worker.kv_scales import KVScales


class Attention(Protocol):
    name: str
    """For EngineInfo.attention_backend."""

    def plan(self, batch: InputBatch, kv_cache: KVCache) -> Any:
        """Whatever `run` needs to know about the batch and can share among layers."""

    def run(self, plan: Any, qkv: Tensor, layer_cache: Tensor, scale: float, kv_scales: KVScales) -> Tensor:
        """Writes the step's keys and values to the cache, then attends. qkv: [T, 3 * E]; returns [T, E]."""


class CpuAttention:
    name = "cpu-paged-flash"

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._kernel: PagedAttention | None = None  # made at the first step: only the cache knows its block size

    def plan(self, batch: InputBatch, kv_cache: KVCache) -> AttentionPlan:
        kernel = self._kernel
        if kernel is None or (kernel.block_size, kernel.cache_dtype) != (kv_cache.block_size, kv_cache.dtype):
            kernel = PagedAttention(self._spec.n_head, self._spec.head_size, kv_cache.block_size, kv_cache.dtype)
            self._kernel = kernel
        return kernel.plan(
            kv_cache.num_blocks + 1,
            batch.slot_mapping.numpy(),
            batch.query_start_loc_np,
            batch.seq_lens_np,
            batch.block_tables_np,
            batch.num_decode_rows,
        )

    def run(self, plan: AttentionPlan, qkv: Tensor, layer_cache: Tensor, scale: float, kv_scales: KVScales) -> Tensor:
        assert self._kernel is not None
        k_scale, v_scale = kv_scales.key, kv_scales.value
        self._kernel.write(plan, qkv, layer_cache, k_scale=k_scale, v_scale=v_scale)
        return self._kernel.attend(plan, qkv, layer_cache, scale, k_scale=k_scale, v_scale=v_scale).to(qkv.dtype)


class TorchAttention:
    """The reference ops, on any device."""

    name = "torch"

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


def attention_for(spec: ModelSpec, device: torch.device) -> Attention:
    return CpuAttention(spec) if device.type == "cpu" else TorchAttention(spec)
