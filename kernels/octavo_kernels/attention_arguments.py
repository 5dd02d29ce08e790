"""What the wrappers of the attention kernels share: the checks of their arguments, and those that every kernel has."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import triton
from torch import Tensor

from octavo_kernels.attention_tiles import fp8_form
from octavo_kernels.attention_workspace import SPLIT
from octavo_kernels.checks import (
    FLOATS,
    FP8,
    require_contiguous,
    require_dense_rows,
    require_device,
    require_floats,
    require_like,
    row_stride,
)
from octavo_kernels.kv_write import BLOCK_SIZES

_LOG2_E: Final = math.log2(math.e)


def common_arguments(
    qkv: Tensor,
    layer_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: float,
    v_scale: float,
) -> dict[str, Any]:
    """Arguments of every attention kernel by name, and its rounding. An fp8 cache goes as bytes."""
    return {
        "qkv_ptr": qkv,
        "cache_ptr": layer_cache.view(torch.uint8) if layer_cache.dtype == FP8 else layer_cache,
        "table_ptr": block_tables,
        "lens_ptr": seq_lens,
        "stride_qkv": row_stride(qkv),
        "stride_half": layer_cache.stride(0),
        "stride_block": layer_cache.stride(1),
        "stride_table": row_stride(block_tables),
        "num_blocks": layer_cache.shape[1],
        "max_blocks": block_tables.shape[1],
        "scale": scale * _LOG2_E * k_scale,
        "v_scale": float(v_scale),
        "FP8_FORM": fp8_form(layer_cache),
        "enable_fp_fusion": True,
    }


def head_constants(head_size: int, block_size: int) -> dict[str, int]:
    """constexprs of every attention kernel."""
    return {"D": head_size, "TILE_D": triton.next_power_of_2(head_size), "BLOCK": block_size}


def split_constants(
    num_heads: int, head_size: int, block_size: int, itemsize: int, tile_m: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """constexprs of the kernels that multiply tiles of tile_m queries in a split of the context, and their launch
    options. itemsize: bytes of what is multiplied."""
    constants = {
        "HEADS": num_heads,
        **head_constants(head_size, block_size),
        "TILE_M": tile_m,
        "TILE_N": 64 if itemsize == 2 else 32,
        "SPLIT_LEN": SPLIT,
        "STAGES": 2,
    }
    return constants, {"num_warps": 4, "num_stages": 2}


def needs_upcast(upcast: bool, qkv: Tensor, layer_cache: Tensor) -> bool:
    """Whether multiplying in fp32 differs: where keys would be rounded to qkv's type."""
    return upcast and qkv.dtype != torch.float32 and layer_cache.itemsize > 1 and layer_cache.dtype != qkv.dtype


def check_attention(
    qkv: Tensor,
    layer_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    out: Tensor | None,
    scale: float,
    k_scale: float,
    v_scale: float,
) -> None:
    """What all the wrappers ask of their arguments; some have no out. Raises ValueError naming the argument."""
    require_floats("qkv", qkv)
    require_floats("layer_cache", layer_cache, (*FLOATS, FP8))
    if layer_cache.dim() != 5 or layer_cache.shape[0] != 2 or layer_cache.shape[1] == 0:
        raise ValueError(f"layer_cache: shape {tuple(layer_cache.shape)} is not [2, blocks, heads, slots, size]")
    _, _, num_heads, block_size, head_size = layer_cache.shape
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"layer_cache: block size {block_size} is not one of {BLOCK_SIZES}")
    if layer_cache.stride()[2:] != (block_size * head_size, head_size, 1):
        raise ValueError(f"layer_cache: strides {layer_cache.stride()}: heads, slots and numbers are not contiguous")
    require_device("layer_cache", layer_cache, qkv)
    if qkv.dim() != 2 or qkv.shape[1] != 3 * num_heads * head_size:
        raise ValueError(f"qkv: shape {tuple(qkv.shape)} is not [tokens, 3 * {num_heads} * {head_size}]")
    require_dense_rows("qkv", qkv)
    if out is not None:
        require_like("out", out, (qkv.shape[0], num_heads * head_size), qkv)
    require_ints("seq_lens", seq_lens, (seq_lens.shape[0] if seq_lens.dim() else 0,), qkv)
    if block_tables.dim() != 2 or block_tables.shape[0] != seq_lens.shape[0] or block_tables.shape[1] == 0:
        raise ValueError(f"block_tables: shape {tuple(block_tables.shape)} is not [{seq_lens.shape[0]}, blocks]")
    require_floats("block_tables", block_tables, (torch.int32,))
    require_device("block_tables", block_tables, qkv)
    require_dense_rows("block_tables", block_tables)
    if not math.isfinite(scale):
        raise ValueError(f"scale: {scale} is not finite")
    for name, factor in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not 0 < factor < math.inf:
            raise ValueError(f"{name}: {factor} is not positive and finite")
        if factor != 1 and layer_cache.dtype != FP8:
            raise ValueError(f"{name}: {factor} for a cache of {layer_cache.dtype}; only fp8 is scaled")


def require_ints(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises ValueError naming the tensor unless it is int32, contiguous, of this shape and on `like`'s device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} is not {shape}")
    require_floats(name, tensor, (torch.int32,))
    require_device(name, tensor, like)
    require_contiguous(name, tensor)
