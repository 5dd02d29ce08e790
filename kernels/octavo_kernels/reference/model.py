"""The specification of the forward pass.

Each docstring states shapes, types and strides; faster versions (the Triton kernels, `cpu/`) must give the same
numbers.

Names of sizes: T tokens in R rows, E = n_embd, H heads of D numbers (E = H * D), N blocks of S slots.
A layer's cache is [2, N, H, S, D], keys then values, contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo_kernels.activations import ACTIVATIONS
from octavo_kernels.checks import FP8

ATTENTION_WORKSPACE: Final = 256 << 20
"""Bytes that decode rows of one call of `paged_attention` may take beside its arguments and result."""
FP8_MAX: Final = 448.0


def embed(input_ids: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor, dtype: torch.dtype) -> Tensor:
    """Token plus position embedding.

    input_ids, positions: int64 [T]. wte: [vocab, E]; wpe: [n_positions, E]; any float type, rows contiguous.
    Returns `dtype` [T, E] contiguous; the sum is taken in `dtype`.
    """
    return F.embedding(input_ids, wte).to(dtype).add_(F.embedding(positions, wpe))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension, with biased variance, in fp32 inside.

    x: [T, E], rows contiguous; weight, bias: [E] of x's type. Returns x's type, [T, E] contiguous.
    """
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """residual += delta in place, rounded to its type; returns `layer_norm` of the sum.

    residual, delta: [T, E], rows contiguous, of one type; weight, bias: [E] of that type. Returns [T, E] contiguous.
    """
    return layer_norm(residual.add_(delta), weight, bias, eps)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """activation(x @ weight.T + bias) + residual; at most one of `activation` and `residual`.

    x: [M, K], rows contiguous; weight: [O, K] contiguous; bias: [O] or None; all of one type, sums in fp32.
    residual: [M, O]. Returns [M, O] contiguous, x's type.
    """
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else y.add_(residual)


def kv_write(
    qkv: Tensor, layer_cache: Tensor, slot_mapping: Tensor, *, k_scale: float = 1.0, v_scale: float = 1.0
) -> None:
    """Puts the tokens' keys and values into their slots.

    qkv: [T, 3 * E] contiguous: queries, keys, values. layer_cache: [2, N, H, S, D], written in place, converted to its
    type. slot_mapping: int64 [T], block * S + slot; no slot twice. An fp8 cache gets key / k_scale and value / v_scale,
    limited to +-448, see `to_fp8`; other types take no scale.
    """
    _, _, num_heads, block_size, head_size = layer_cache.shape
    _, key, value = qkv.view(-1, 3, num_heads, head_size).unbind(1)
    block, slot = slot_mapping // block_size, slot_mapping % block_size
    for half, numbers, factor in ((0, key, k_scale), (1, value, v_scale)):
        stored = to_fp8(numbers, factor) if layer_cache.dtype == FP8 else numbers.to(layer_cache.dtype)
        layer_cache[half][block, :, slot] = stored


def to_fp8(x: Tensor, scale: float) -> Tensor:
    """x / scale, in fp32, to the nearest e4m3 number, ties to even; limited to +-448. NaN stays NaN."""
    return (x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def paged_attention(
    qkv: Tensor,
    layer_cache: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    num_decode_rows: int,
    *,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    upcast: bool = False,
    workspace: int = ATTENTION_WORKSPACE,
) -> Tensor:
    """Causal attention of each row's tokens over its cached context, this step's keys and values included.

    qkv: [T, 3 * E] contiguous; only the queries are read. layer_cache: [2, N, H, S, D]. block_tables: integer [R, B];
    entries beyond a row's need point to any block. positions: int64 [T] of each token in its sequence. query_start_loc:
    R + 1 host ints; row r has the tokens query_start_loc[r] .. query_start_loc[r + 1] - 1, the last of which is at
    position seq_lens[r] - 1 (host ints too: nothing is copied to the device here). Rows before
    num_decode_rows have one token. Slots past a row's end may hold anything, NaN too. `upcast`: queries and keys are
    multiplied in fp32, else in qkv's type. Queries are scaled in fp32 first; softmax in fp32. k_scale, v_scale:
    of an fp8 cache, as for `kv_write`; the first is applied to the queries, the second to the result. `workspace`: as
    many decode rows are computed together as fit these bytes. Returns [T, E] contiguous, qkv's type.
    """
    scale *= k_scale
    output = torch.empty(qkv.shape[0], qkv.shape[1] // 3, dtype=qkv.dtype, device=qkv.device)
    num_heads, block_size, head_size = layer_cache.shape[2:]
    itemsize = max(qkv.itemsize, layer_cache.itemsize, 4 if upcast else 0)
    longest = block_tables.shape[1] * block_size
    group_size = max(1, workspace // attention_bytes(num_heads, head_size, 1, longest, itemsize))
    for start in range(0, num_decode_rows, group_size):
        rows = slice(start, min(start + group_size, num_decode_rows))
        table = block_tables[rows, : -(-max(seq_lens[rows]) // block_size)]
        output[rows] = _attend(
            qkv[rows].unsqueeze(1), layer_cache, table, positions[rows, None], scale, upcast
        ).squeeze(1)
    for r in range(num_decode_rows, len(seq_lens)):
        tokens = slice(query_start_loc[r], query_start_loc[r + 1])
        table = block_tables[r : r + 1, : -(-seq_lens[r] // block_size)]
        output[tokens] = _attend(
            qkv[tokens].unsqueeze(0), layer_cache, table, positions[None, tokens], scale, upcast
        ).squeeze(0)
    return output if v_scale == 1 else output.mul_(v_scale)


def shared_attention(
    qkv: Tensor, layer_cache: Tensor, block_tables: Tensor, shared_splits: Sequence[int], split: int, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of R rows of one token each over the first splits of their context, each split by itself.

    qkv: [R, 3 * E]; only the queries are read. shared_splits: of each row, R host ints; splits have `split` tokens, all
    of them before the row's own. Returns fp32 [R, H, P, D] results and [R, H, P] base-2 logarithms of the splits' sums
    of exponentials, P the most of shared_splits; NaN where a row has fewer.
    """
    num_heads, block_size, head_size = layer_cache.shape[2:]
    query = qkv.view(len(qkv), 3, num_heads, head_size)[:, 0].float() * scale
    most = max(shared_splits, default=0)
    results = query.new_full((len(qkv), num_heads, most, head_size), math.nan)
    logarithms = query.new_full((len(qkv), num_heads, most), math.nan)
    for r, count in enumerate(shared_splits):
        table = block_tables[r, : count * split // block_size].long()
        keys, values = layer_cache[:, table].float().transpose(1, 2).reshape(2, num_heads, count, split, head_size)
        scores = (keys @ query[r, :, None, :, None]).squeeze(-1)  # [H, count, split]
        results[r, :, :count] = (scores.softmax(-1).unsqueeze(-2) @ values).squeeze(-2)
        logarithms[r, :, :count] = scores.logsumexp(-1) / math.log(2)
    return results, logarithms


def attention_bytes(num_heads: int, head_size: int, num_queries: int, context: int, itemsize: int) -> int:
    """What one row of `paged_attention` takes at most while it is computed.

    Of each key and value seven halves: as gathered, converted, masked, and laid out for the products; of each score
    four fp32 numbers. `itemsize`: bytes of the widest type among queries, cache and products.
    """
    return context * (7 * num_heads * head_size * itemsize + 16 * num_heads * num_queries)


def _attend(qkv: Tensor, layer_cache: Tensor, block_tables: Tensor, last: Tensor, scale: float, upcast: bool) -> Tensor:
    """G rows of Q tokens each: qkv [G, Q, 3 * E], block_tables [G, B]. last [G, Q]: positions of the tokens, each the
    last that its token sees. Returns [G, Q, E]."""
    num_heads, head_size = layer_cache.shape[2], layer_cache.shape[4]
    num_rows, num_queries = qkv.shape[:2]
    query = qkv.view(num_rows, num_queries, 3, num_heads, head_size)[:, :, 0].transpose(1, 2)  # [G, H, Q, D]
    context = layer_cache[:, block_tables.long()].transpose(3, 4)  # [2, G, B, S, H, D]
    context = context.reshape(2, num_rows, -1, num_heads, head_size).transpose(2, 3)  # [2, G, H, L, D]
    position = torch.arange(context.shape[3], device=qkv.device)  # [L]
    hidden = (position > last[:, :, None]).unsqueeze(1)  # [G, 1, Q, L]
    unwritten = (position > last[:, -1:])[:, None, :, None]  # [G, 1, L, 1]
    key = context[0].to(torch.float32 if upcast else qkv.dtype)
    value = context[1].to(qkv.dtype).masked_fill(unwritten, 0)  # 0 * NaN would be NaN
    query = (query.float() * scale).to(key.dtype)  # before the product, which could leave fp16's range
    scores = (query @ key.transpose(2, 3)).float()
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).to(value.dtype)  # [G, H, Q, L]
    return (weights @ value).transpose(1, 2).reshape(num_rows, num_queries, -1)


def copy_blocks(cache: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Copies whole blocks in all layers, keys and values, as if all were read before any is written.

    cache: [layers, 2, N, H, S, D], in place. sources, destinations: int64 [C]; destinations differ from each other.
    """
    cache[:, :, destinations] = cache[:, :, sources]
