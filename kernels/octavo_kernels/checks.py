"""Checks of wrappers' arguments: attributes of tensors only, nothing is read from a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Types of activations and weights."""
FP8 = torch.float8_e4m3fn
"""The quantised cache's type: it holds value / scale, between -448 and 448."""


def require_floats(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Raises ValueError naming the tensor where its type is none of dtypes."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: {tensor.dtype} is not one of {', '.join(map(str, dtypes))}")


def require_like(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises ValueError naming the tensor unless it has this shape, `like`'s type and device, and dense last rows."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} is not {shape}")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name}: {tensor.dtype} is not {like.dtype}")
    require_device(name, tensor, like)
    require_dense_rows(name, tensor)


def require_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raises ValueError naming the tensor where it is on another device than `like`."""
    if tensor.device != like.device:
        raise ValueError(f"{name}: on {tensor.device}, not on {like.device}")


def require_dense_rows(name: str, tensor: Tensor) -> None:
    """Raises ValueError naming the tensor where neighbours in the last dimension are not neighbours in memory."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: stride {tensor.stride(-1)} of the last dimension is not 1")


def require_contiguous(name: str, tensor: Tensor) -> None:
    """Raises ValueError naming the tensor where it is not contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()} of shape {tuple(tensor.shape)} are not contiguous")


def row_stride(tensor: Tensor) -> int:
    """Elements between rows of a matrix; of one row its length, so that kernels see one value for it."""
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]
