"""Attention kernels of other projects, where they are installed: the same queries, keys and values as ours.

Each function returns the peer's work, or raises ImportError where there is no such peer. They read `Paged` of
attention_cases.py. What a peer computes on the host for each step (FlashInfer's plan) is not timed.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from gpu_timing import Work
from torch import Tensor

if TYPE_CHECKING:
    from attention_cases import Paged

WORKSPACE_BYTES = 256 << 20
SEGMENTS = 16
SEGMENTS_UP_TO = 128
"""vLLM's defaults: rows of up to so many divided by the heads of keys are split into so many segments."""


def flashinfer_decode(paged: Paged) -> Work:
    """On our cache: it has FlashInfer's layout "HND"."""
    flashinfer = _cuda_module("flashinfer", paged)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=paged.setting.device)
    wrappers = []
    for copy in range(paged.copies):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(*_pages(paged, copy), paged.heads, paged.heads, 64, paged.block, **_types(paged))
        wrappers.append(wrapper)
    return _run_wrappers(paged, wrappers)


def flashinfer_prefill(paged: Paged) -> Work:
    flashinfer = _cuda_module("flashinfer", paged)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=paged.setting.device)
    wrappers = []
    for copy in range(paged.copies):
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        pages = _pages(paged, copy)
        wrapper.plan(paged.starts, *pages, paged.heads, paged.heads, 64, paged.block, causal=True, **_types(paged))
        wrappers.append(wrapper)
    return _run_wrappers(paged, wrappers)


def vllm_unified(paged: Paged) -> Work:
    """vLLM's Triton attention for decode and prefill, on a cache in its own layout: tokens before heads."""
    module = None
    for name in ("vllm.v1.attention.ops.triton_unified_attention", "vllm.attention.ops.triton_unified_attention"):
        try:
            module = _cuda_module(name, paged)
            break
        except ModuleNotFoundError:
            continue
    if module is None:
        raise ImportError("no triton_unified_attention of vLLM")
    device = paged.setting.device
    keys, values = (half.transpose(1, 2).contiguous() for half in paged.cache)
    queries = paged.queries.contiguous()
    out = torch.empty_like(queries)
    rows = len(paged.contexts)
    parts = (rows, paged.heads, SEGMENTS)
    known = inspect.signature(module.unified_attention).parameters
    arguments: dict[str, Any] = {
        "q": queries,
        "k": keys,
        "v": values,
        "out": out,
        "cu_seqlens_q": paged.starts,
        "max_seqlen_q": max(paged.chunks),
        "seqused_k": paged.seq_lens,
        "max_seqlen_k": max(paged.contexts),
        "softmax_scale": paged.scale,
        "causal": True,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": None,
        "v_descale": None,
        "seq_threshold_3D": SEGMENTS_UP_TO // paged.heads,
        "num_par_softmax_segments": SEGMENTS,
        "softmax_segm_output": torch.empty(*parts, 64, device=device),
        "softmax_segm_max": torch.empty(parts, device=device),
        "softmax_segm_expsum": torch.empty(parts, device=device),
    }
    arguments = {name: value for name, value in arguments.items() if name in known}  # versions differ

    def run(copy: int) -> None:
        module.unified_attention(block_table=paged.tables[copy], **arguments)

    return Work(run, lambda: out.flatten(1))


def _cuda_module(name: str, paged: Paged) -> Any:
    if paged.setting.device.type != "cuda":
        raise ImportError(f"{name} is only run on a GPU")
    return importlib.import_module(name)


def _pages(paged: Paged, copy: int) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's page table: where rows begin in the list of pages, the list, tokens in each row's last page."""
    counts = [-(-context // paged.block) for context in paged.contexts]
    begins = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    pages = torch.cat([paged.tables[copy, row, :count] for row, count in enumerate(counts)])
    last = torch.tensor([(context - 1) % paged.block + 1 for context in paged.contexts], dtype=torch.int32)
    return begins.to(paged.setting.device), pages, last.to(paged.setting.device)


def _types(paged: Paged) -> dict[str, Any]:
    return {"q_data_type": paged.setting.dtype, "kv_data_type": paged.cache.dtype, "sm_scale": paged.scale}


def _run_wrappers(paged: Paged, wrappers: list[Any]) -> Work:
    queries = paged.queries.contiguous()
    out = torch.empty_like(queries)

    def run(copy: int) -> None:
        wrappers[copy].run(queries, (paged.cache[0], paged.cache[1]), out=out)

    return Work(run, lambda: out.flatten(1))
