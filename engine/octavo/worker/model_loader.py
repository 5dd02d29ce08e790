"""From a checkpoint's folder to a model with its cache on a device: what every runner begins with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from octavo_kernels.cpu import native
from torch import Tensor

from octavo.checkpoint import ModelSpec, read_spec
from octavo.config import EngineConfig
from octavo.errors import StartupError
from octavo.types import EngineInfo
from octavo.worker.compute_threads import ComputeThreads
from octavo.worker.device import (
    choose_cache_dtype,
    choose_device,
    choose_dtype,
    choose_load_dtype,
    describe_device,
    resolve_budget,
    uses_dependent_launch,
    uses_kernels,
)
from octavo.worker.gpt2 import GPT2
from octavo.worker.kv_cache import KVCache, num_blocks_that_fit
from octavo.worker.memory import FrugalWeights, give_back_heap
from octavo.worker.weights import load_weights


class Model(Protocol):
    """What a runner needs of a model beside its forward pass."""

    @property
    def num_layers_computed(self) -> int:
        """Since the start."""

    @property
    def attention_backend(self) -> str: ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, E] after ln_f. Returns [rows, V], or more columns than V, which do not count."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    config: EngineConfig
    """With what was left to the device filled in."""
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    model: Model
    kv_cache: KVCache
    weights_sha256: str
    num_parameters: int
    threads: ComputeThreads
    """Whoever has the model releases them when it ends."""

    @property
    def num_blocks(self) -> int:
        return self.kv_cache.num_blocks

    def info(self) -> EngineInfo:
        """To be called when the engine is ready: it holds the time."""
        config = self.config
        return EngineInfo(
            model=config.model.name,
            architecture="GPT2LMHeadModel",
            weights_sha256=self.weights_sha256,
            dtype=_name(self.dtype),
            device=describe_device(self.device, config.model.device),
            attention_backend=self.model.attention_backend,
            kv_cache_dtype=_name(self.kv_cache.dtype),
            num_parameters=self.num_parameters,
            vocab_size=self.spec.vocab_size,
            n_positions=self.spec.n_positions,
            block_size=config.cache.block_size,
            num_blocks=self.num_blocks,
            max_num_requests=config.scheduler.max_num_requests,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=_max_model_len(config, self.spec),
            batch_invariant=config.model.batch_invariant,
            start_time=time.time(),
            cpu_cores=self.threads.cores,
        )


def load_model(config: EngineConfig, progress: Callable[[str], None]) -> LoadedModel:
    """Loads the weights and allocates the cache. Raises StartupError.

    Args:
        progress: told of each stage, one line for people.
    """
    spec = read_spec(Path(config.model.path))
    device = choose_device(config.model.device)
    config = resolve_budget(config, device)
    dtype = choose_dtype(config.model, spec, device)
    cache_dtype = choose_cache_dtype(config.cache, dtype)
    progress(f"device: {describe_device(device, config.model.device)}, dtype {_name(dtype)}")
    if device.type == "cpu" and not uses_kernels(config.model.device, device) and native.must_compile():
        progress("compiling the CPU's kernels, which takes some seconds")
    threads = ComputeThreads(config.model, device)
    try:
        if threads.cores:
            progress(f"compute threads are bound to cores {threads.cores}")
        return _load(config, spec, device, dtype, cache_dtype, threads, progress)
    except BaseException:
        threads.release()
        raise


def _load(
    config: EngineConfig,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    threads: ComputeThreads,
    progress: Callable[[str], None],
) -> LoadedModel:
    path = Path(config.model.path)
    if device.type == "cpu":  # what cannot work is said before the weights are read; a GPU's memory is known after
        _num_blocks(config, spec, device, dtype, cache_dtype)
    load_dtype = choose_load_dtype(config.model, spec, device, dtype)
    weights = load_weights(path, spec, device=device, dtype=load_dtype, progress=progress)
    model = _make_model(config, spec, FrugalWeights(weights.tensors), device, dtype, cache_dtype)
    give_back_heap()
    num_blocks = _num_blocks(config, spec, device, dtype, cache_dtype)
    kv_cache = KVCache(spec, num_blocks, config.cache.block_size, dtype=cache_dtype, device=device)
    progress(f"KV-cache: {num_blocks} blocks of {config.cache.block_size} tokens, {_name(cache_dtype)}")
    loaded = LoadedModel(config, spec, device, dtype, model, kv_cache, weights.sha256, weights.num_parameters, threads)
    weights.tensors.close()
    return loaded


def _make_model(
    config: EngineConfig,
    spec: ModelSpec,
    weights: FrugalWeights,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
) -> Model:
    dependent_launch = uses_dependent_launch(config.model, device)
    if not uses_kernels(config.model.device, device):
        if config.model.batch_invariant:
            raise StartupError(StartupError.USAGE, "batch-invariant works on the kernels only, not with --device cpu")
        quantization = config.model.quantization
        return GPT2(spec, weights, device=device, dtype=dtype, quantization=quantization, cache_dtype=cache_dtype)
    if config.model.quantization is not None:
        raise StartupError(
            StartupError.USAGE, f"quantization {config.model.quantization!r} works on the CPU only (--device cpu)"
        )
    from octavo.worker.gpt2_triton import TritonGPT2  # Triton reads its environment when it is imported

    return TritonGPT2(
        spec,
        weights,
        device=device,
        dtype=dtype,
        batch_invariant=config.model.batch_invariant,
        dependent_launch=dependent_launch,
        cache_dtype=cache_dtype,
    )


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    longest = spec.n_positions + 1
    asked = config.scheduler.max_model_len or longest
    if not 2 <= asked <= longest:
        raise StartupError(StartupError.USAGE, f"max-model-len {asked}: must be from 2 to {longest} for this model")
    return asked


def _num_blocks(
    config: EngineConfig, spec: ModelSpec, device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype
) -> int:
    """Usable blocks of the cache. Raises StartupError for sizes that cannot work."""
    block_size = config.cache.block_size
    if block_size not in (16, 32, 64):
        raise StartupError(StartupError.USAGE, f"block-size {block_size}: must be 16, 32 or 64")
    return num_blocks_that_fit(
        spec,
        config.cache,
        config.scheduler,
        max_model_len=_max_model_len(config, spec),
        dtype=dtype,
        cache_dtype=cache_dtype,
        device=device,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
