"""Where the model runs, and in which number format. Nothing is papered over: what was asked for is had, or an error."""

from __future__ import annotations

import os
import sys

import msgspec
import torch
from octavo_kernels.checks import FP8
from octavo_kernels.cpu.linear import LinearKind, choose_kind

from octavo.checkpoint import ModelSpec
from octavo.config import CacheConfig, EngineConfig, ModelConfig
from octavo.errors import StartupError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DEPENDENT_LAUNCH_CAPABILITY = (9, 0)


def choose_device(name: str) -> torch.device:
    """The device of `--device`: "auto", "cpu", "cuda" or "interpreter" (the kernels, on the CPU). Raises StartupError
    (DEVICE, USAGE)."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "interpreter":
        _interpret_kernels()
    if name in ("cpu", "interpreter"):
        return torch.device("cpu")
    if name != "cuda":
        raise StartupError(StartupError.USAGE, f'device {name!r}: must be "auto", "cpu", "cuda" or "interpreter"')
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    cause = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no GPU or no driver"
    raise StartupError(StartupError.DEVICE, f"device cuda: {cause}; --device cpu, or auto, runs on the CPU")


def _interpret_kernels() -> None:
    """Makes Triton run kernels in its interpreter, which it decides when it is imported. Raises StartupError."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise StartupError(
            StartupError.USAGE, "device interpreter: Triton has been imported to compile in this process"
        )
    os.environ["TRITON_INTERPRET"] = "1"


def uses_kernels(name: str, device: torch.device) -> bool:
    """Whether the model runs on the Triton kernels. name: of `--device`."""
    return device.type == "cuda" or name == "interpreter"


def uses_dependent_launch(config: ModelConfig, device: torch.device) -> bool:
    """Whether a step's kernels are launched as `octavo_kernels.dependent_launch` says: if it is asked for and the GPU
    can. Raises StartupError (USAGE)."""
    if config.dependent_launch not in ("auto", "off"):
        raise StartupError(StartupError.USAGE, f'dependent-launch {config.dependent_launch!r}: must be "auto" or "off"')
    if config.dependent_launch == "off" or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= DEPENDENT_LAUNCH_CAPABILITY


def choose_dtype(config: ModelConfig, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations. Raises StartupError (USAGE)."""
    name = config.dtype
    if config.device == "interpreter":
        if name not in ("auto", "float32"):
            raise StartupError(StartupError.USAGE, f"dtype {name}: the interpreter computes in float32 only")
        return torch.float32
    if name == "auto":
        dtype = _stored_dtype(spec)
        return torch.bfloat16 if device.type == "cpu" and dtype is torch.float16 else dtype
    if name not in DTYPES:
        raise StartupError(StartupError.USAGE, f"dtype {name!r}: must be auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type == "cpu":
        raise StartupError(StartupError.USAGE, "dtype float16: not on the CPU; bfloat16 is as small, and fast there")
    return DTYPES[name]


def choose_cache_dtype(config: CacheConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of keys and values in the cache of a model of `dtype`. Raises StartupError (USAGE)."""
    if config.kv_cache_dtype not in ("auto", "fp8"):
        raise StartupError(StartupError.USAGE, f"kv_cache_dtype {config.kv_cache_dtype!r}: must be auto or fp8")
    return FP8 if config.kv_cache_dtype == "fp8" else dtype


def choose_load_dtype(config: ModelConfig, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a model of `dtype` gets its weights.

    A CPU turns an fp16 checkpoint into a bfloat16 model; where that keeps 16-bit weights as fp16, or quantizes them,
    they need not lose bits on the way.
    """
    if uses_kernels(config.device, device) or config.dtype != "auto" or _stored_dtype(spec) is not torch.float16:
        return dtype
    kind = choose_kind(dtype, config.quantization)
    return torch.float16 if kind in (LinearKind.FP16, LinearKind.INT8) else dtype


def _stored_dtype(spec: ModelSpec) -> torch.dtype:
    """As config.json says."""
    return DTYPES.get(spec.dtype or spec.torch_dtype or "float32", torch.float32)


def resolve_budget(config: EngineConfig, device: torch.device) -> EngineConfig:
    """Fills in max_num_batched_tokens if it is left to the device. A step must stay short, since all requests wait for
    it: 512 tokens of gpt2-large are seconds on a CPU, 2048 a few milliseconds on an H100."""
    scheduler = config.scheduler
    if scheduler.max_num_batched_tokens:
        return config
    budget = max(512 if device.type == "cpu" else 2048, scheduler.max_num_requests)
    scheduler = msgspec.structs.replace(scheduler, max_num_batched_tokens=budget)
    return msgspec.structs.replace(config, scheduler=scheduler)


def describe_device(device: torch.device, name: str) -> str:
    """ "cpu", "cpu (interpreter)" or "cuda:0 (NVIDIA H100 ...)". name: of `--device`."""
    if device.type == "cpu":
        return "cpu (interpreter)" if name == "interpreter" else "cpu"
    return f"{device} ({torch.cuda.get_device_name(device)})"
