"""The KV-cache: one tensor of blocks, and how many of them fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from octavo_kernels import reference
from octavo_kernels.cpu import memory
from octavo_kernels.state import SlotState

from octavo.checkpoint import ModelSpec
from octavo.config import CacheConfig, SchedulerConfig
from octavo.errors import StartupError

CPU_MEMORY = 1 << 30
"""Default size on the CPU, bytes."""
SPLIT_TOKENS = 256
"""Context of one program of decode attention: each leaves a partial result in fp32."""
GPU_SHARE = 0.92
"""Part of the card's memory that octavo may use in all; the rest is the driver's and the allocator's slack."""

SAMPLER_BYTES = 8
"""Per logit: the model's, in at most fp32, and the sampler's scores."""
ROW_BYTES = 32 << 10
"""Per request, about: candidates, partial results of attention, tables and records of a step."""

PADDING_ROWS = 64
"""Most rows that a step is padded by, where prompts run beside decodes, see `step_graphs`."""
DRAFT_PLACES = 256
"""Most places behind drafts at which a step chooses tokens, see `step_layout.largest_drafts`."""


class KVCache:
    """Keys and values of all sequences. Owned by the model runner; blocks are handed out by the core's BlockPool."""

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """num_blocks: usable blocks; the null block comes on top. Zeroed: recycled values must be finite."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (spec.n_layer, 2, num_blocks + 1, spec.n_head, block_size, spec.head_size)
        on_cpu = device.type == "cpu"
        self.data = memory.zeros(shape, dtype) if on_cpu else torch.zeros(shape, dtype=dtype, device=device)
        """[layer, keys/values, block, head, slot, head_size]; block 0 is the null block."""

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
        return spec.n_layer * 2 * spec.n_embd * block_size * dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies block `source` to block `destination` in all layers, for each pair; none reads another's result."""
        if pairs:
            sources, destinations = torch.tensor(pairs, device=self.data.device).unbind(1)
            reference.copy_blocks(self.data, sources, destinations)


def num_blocks_that_fit(
    spec: ModelSpec,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    *,
    max_model_len: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Usable blocks of the cache, from the configuration and, on CUDA, the memory that is free now. dtype: the model's.

    Call it after the weights are loaded. Raises StartupError when not even one sequence of full length fits; an
    explicit `cache.num_blocks` is taken as it is.
    """
    if cache.num_blocks:
        return cache.num_blocks
    per_block = KVCache.bytes_per_block(spec, cache.block_size, cache_dtype)
    per_sequence = -(-(max_model_len - 1) // cache.block_size)  # nobody attends to the last token
    memory = cache.memory
    if not memory:
        memory = _free_gpu_memory(spec, cache, scheduler, dtype, device) if device.type == "cuda" else CPU_MEMORY
    # More could never be used; the factor leaves room for cached prefixes of requests that have ended.
    num_blocks = min(memory // per_block - 1, 2 * scheduler.max_num_requests * per_sequence)
    if num_blocks < per_sequence:
        raise StartupError(
            StartupError.USAGE if cache.memory or device.type == "cpu" else StartupError.DEVICE,
            f"the KV-cache of {memory >> 20} MiB has {max(num_blocks, 0)} blocks of {cache.block_size} tokens; one "
            f"sequence of {max_model_len} tokens needs {per_sequence} ({(per_sequence + 1) * per_block >> 20} MiB)",
        )
    return num_blocks


def _free_gpu_memory(
    spec: ModelSpec, cache: CacheConfig, scheduler: SchedulerConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes left for the cache: what is free less what a step needs beside it."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - int((1 - GPU_SHARE) * total) - step_memory(spec, scheduler, cache.block_size, dtype))


def step_memory(spec: ModelSpec, config: SchedulerConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that the runner allocates beside weights and cache, on a GPU.

    Per token of a step: residual, its norm, qkv, attention, what is added, and the MLP's inner state. Per request, and
    per row of padding: the sampler's rows and the request's state; behind drafts the sampler's rows alone. Twice the
    activations: CUDA graphs have their own.
    """
    rows = config.max_num_requests + PADDING_ROWS
    tokens = 2 * (config.max_num_batched_tokens + rows)
    activations = tokens * (7 * spec.n_embd + 2 * spec.inner_size) * dtype.itemsize
    splits = -(-spec.n_positions // SPLIT_TOKENS) * spec.n_embd * 4
    state = SlotState.bytes_per_slot(spec.n_positions, block_size, spec.vocab_size)
    per_place = spec.vocab_size * SAMPLER_BYTES + splits + ROW_BYTES
    return activations + rows * (per_place + state) + DRAFT_PLACES * per_place
