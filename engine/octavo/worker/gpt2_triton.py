"""GPT-2 on the Triton kernels: the same equations as `gpt2.py`, in seven launches per layer.

norm (with the residual that came before it), qkv, attention (decode rows also write their keys and values), proj,
norm, fc with its activation, proj. The residual stream is added where it is normalised next. Prompts' rows take another
two launches, and so do rows with drafts; what decode rows share takes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from octavo_kernels.embed import embed
from octavo_kernels.kv_write import kv_write
from octavo_kernels.linear import linear
from octavo_kernels.norm import add_layer_norm, layer_norm
from octavo_kernels.paged_attention import (
    VERIFY_TILE,
    AttentionWorkspace,
    decode_attention,
    prefill_attention,
    shared_attention,
    verify_attention,
)
from torch import Tensor

from octavo.checkpoint import ModelSpec
from octavo.worker.gpt2 import WeightSource, attention_scale, check_activation
from octavo.worker.kv_cache import KVCache
from octavo.worker.kv_scales import KVScales, kv_scales

COLUMN_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this, so that rows of logits are read 16 bytes at a time."""


@dataclass(frozen=True, slots=True)
class Affine:
    """A linear layer, or a layer norm."""

    weight: Tensor
    """[out, in], or [E]"""
    bias: Tensor
    """[out], or [E]"""


@dataclass(frozen=True, slots=True)
class Block:
    ln_1: Affine
    c_attn: Affine
    attn_proj: Affine
    ln_2: Affine
    c_fc: Affine
    mlp_proj: Affine
    attn_scale: float
    kv_scales: KVScales


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """T tokens in R rows on the device; decode rows (one token each) come first."""

    input_ids: Tensor
    """int32 [T]"""
    positions: Tensor
    """int32 [T]"""
    slot_mapping: Tensor
    """int64 [T] cache slots; -1: not written."""
    query_start_loc: Tensor
    """int32 [R + 1]"""
    seq_lens: Tensor
    """int32 [R] context with this step's tokens; 0: a row that is muted."""
    block_tables: Tensor
    """int32 [R, B]"""
    num_decode_rows: int
    tile_rows: Tensor | None = None
    """int32 tiles of the other rows' queries, see `prefill_tiles`; None: there are none."""
    tile_starts: Tensor | None = None
    shared_tiles: Tensor | None = None
    """int32 [tiles, SHARED_TILE] decode rows that share splits of their context; None: none do."""
    shared_splits: Tensor | None = None
    """int32 [num_decode_rows]"""
    num_draft_rows: int = 0
    """The last rows, of at most VERIFY_TILE tokens each."""


class TritonGPT2:
    """Weights ready for use, and the scratch memory of attention. Holds no state of requests."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightSource,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_invariant: bool = False,
        dependent_launch: bool = False,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """As `gpt2.GPT2`. batch_invariant: a row's logits have the same bits whatever the other rows are.
        dependent_launch: of all of a step's kernels, see `octavo_kernels.dependent_launch`."""
        check_activation(spec)
        self.dependent_launch = dependent_launch
        self._linear = partial(linear, batch_invariant=batch_invariant, dependent_launch=dependent_launch)
        self._embed = partial(embed, dependent_launch=dependent_launch)
        self._layer_norm = partial(layer_norm, dependent_launch=dependent_launch)
        self._add_layer_norm = partial(add_layer_norm, dependent_launch=dependent_launch)
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self._cache_dtype = cache_dtype or dtype
        self.num_layers_computed = 0
        """Launched since the start: tells a slow step from one that hangs."""
        self._wte = self._padded(weights.pop("wte.weight"))
        self._wpe = weights.pop("wpe.weight").to(device, dtype)
        self._blocks = [self._block(weights, layer) for layer in range(spec.n_layer)]
        self._ln_f = self._affine(weights, "ln_f")
        tied = "lm_head.weight" not in weights
        self._lm_head = self._wte if tied else self._padded(weights.pop("lm_head.weight"))
        self._decode_form = "dot" if batch_invariant else "fma"
        """With drafts tokens are to have the same bits as without: `verify_attention` has that of "dot"."""
        self._workspace: AttentionWorkspace | None = None
        self._draft_workspace: AttentionWorkspace | None = None

    @property
    def attention_backend(self) -> str:
        """For EngineInfo."""
        return "triton"

    @property
    def num_columns(self) -> int:
        """Columns of the logits: vocab_size and the padding."""
        return self._lm_head.shape[0]

    def reserve(self, max_rows: int, max_draft_rows: int = 0) -> None:
        """Allocates what decode rows need, for at most max_rows of them, and what rows with drafts do."""
        spec = self.spec
        sizes = (spec.n_head, spec.head_size, spec.n_positions, self.device)
        self._workspace = AttentionWorkspace.allocate(max_rows, *sizes)
        if max_draft_rows:
            self._draft_workspace = AttentionWorkspace.allocate(max_draft_rows, *sizes, num_queries=VERIFY_TILE)

    @torch.inference_mode()
    def forward(self, batch: DeviceBatch, kv_cache: KVCache) -> Tensor:
        """Computes all tokens of the batch; their keys and values are in the cache afterwards.

        Returns hidden states after ln_f, `dtype` [T, E].
        """
        eps = self.spec.layer_norm_epsilon
        hidden = torch.empty(len(batch.input_ids), self.spec.n_embd, dtype=self.dtype, device=self.device)
        self._embed(batch.input_ids, batch.positions, self._wte, self._wpe, hidden)
        normed = torch.empty_like(hidden)
        first = self._blocks[0].ln_1
        self._layer_norm(hidden, first.weight, first.bias, eps, normed)
        next_norms = [block.ln_1 for block in self._blocks[1:]] + [self._ln_f]
        for block, layer_cache, next_norm in zip(self._blocks, kv_cache.data, next_norms, strict=True):
            qkv = self._linear(normed, block.c_attn.weight, block.c_attn.bias)
            attended = self._attend(batch, qkv, layer_cache, block)
            delta = self._linear(attended, block.attn_proj.weight, block.attn_proj.bias)
            self._add_layer_norm(hidden, delta, block.ln_2.weight, block.ln_2.bias, eps, normed)
            inner = self._linear(normed, block.c_fc.weight, block.c_fc.bias, activation=self.spec.activation_function)
            delta = self._linear(inner, block.mlp_proj.weight, block.mlp_proj.bias)
            self._add_layer_norm(hidden, delta, next_norm.weight, next_norm.bias, eps, normed)
            self.num_layers_computed += 1
        return normed

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, E] after ln_f. Returns [rows, num_columns]; columns past vocab_size do not count."""
        return self._linear(hidden, self._lm_head, None)

    def _attend(self, batch: DeviceBatch, qkv: Tensor, layer_cache: Tensor, block: Block) -> Tensor:
        assert self._workspace is not None, "reserve was not called"
        out = torch.empty(qkv.shape[0], self.spec.n_embd, dtype=qkv.dtype, device=qkv.device)
        decodes = batch.num_decode_rows
        write: dict[str, Any] = {
            "k_scale": block.kv_scales.key,
            "v_scale": block.kv_scales.value,
            "dependent_launch": self.dependent_launch,
        }
        how = write | {"scale": block.attn_scale, "upcast": self.spec.reorder_and_upcast_attn}
        if batch.tile_rows is not None or batch.num_draft_rows:
            kv_write(qkv[decodes:], layer_cache, batch.slot_mapping[decodes:], **write)
            self._attend_chunks(batch, qkv, layer_cache, out, how)
        if decodes:
            rows = (qkv[:decodes], layer_cache, batch.block_tables[:decodes], batch.seq_lens[:decodes])
            workspace, tiles, shared = self._workspace, batch.shared_tiles, batch.shared_splits
            if tiles is not None and shared is not None:
                shared_attention(*rows, tiles, shared, workspace, **how)
            how["form"] = self._decode_form
            decode_attention(*rows, out[:decodes], workspace, shared_splits=shared, **how)
        return out

    def _attend_chunks(
        self, batch: DeviceBatch, qkv: Tensor, layer_cache: Tensor, out: Tensor, how: dict[str, Any]
    ) -> None:
        """Rows of several tokens, whose keys and values are in the cache: prompts, and drafts."""
        tables, starts, lengths = batch.block_tables, batch.query_start_loc, batch.seq_lens
        if batch.tile_rows is not None and batch.tile_starts is not None:
            tiles = (batch.tile_rows, batch.tile_starts)
            prefill_attention(qkv, layer_cache, tables, starts, lengths, *tiles, out, **how)
        if batch.num_draft_rows:
            assert self._draft_workspace is not None, "reserve was not told of drafts"
            first = len(lengths) - batch.num_draft_rows
            rows = (tables[first:], starts[first:], lengths[first:])
            verify_attention(qkv, layer_cache, *rows, out, self._draft_workspace, **how)

    def _block(self, weights: WeightSource, layer: int) -> Block:
        spec, name = self.spec, f"h.{layer}"
        ln_1, c_attn = self._affine(weights, f"{name}.ln_1"), self._affine(weights, f"{name}.attn.c_attn")
        return Block(
            ln_1=ln_1,
            c_attn=c_attn,
            kv_scales=kv_scales(self._cache_dtype, ln_1.weight, ln_1.bias, c_attn.weight, c_attn.bias),
            attn_proj=self._affine(weights, f"{name}.attn.c_proj"),
            ln_2=self._affine(weights, f"{name}.ln_2"),
            c_fc=self._affine(weights, f"{name}.mlp.c_fc"),
            mlp_proj=self._affine(weights, f"{name}.mlp.c_proj"),
            attn_scale=attention_scale(spec, layer),
        )

    def _affine(self, weights: WeightSource, name: str) -> Affine:
        weight = weights.pop(f"{name}.weight").to(self.device, self.dtype).t().contiguous()
        return Affine(weight, weights.pop(f"{name}.bias").to(self.device, self.dtype))

    def _padded(self, embedding: Tensor) -> Tensor:
        """[vocab_size, E] with rows of zeros up to a multiple of COLUMN_MULTIPLE."""
        rows = -(-embedding.shape[0] // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        padded = torch.zeros(rows, embedding.shape[1], dtype=self.dtype, device=self.device)
        padded[: embedding.shape[0]] = embedding
        return padded
