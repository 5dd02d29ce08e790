"""GPT-2 on the kernels against GPT-2 on the CPU path: the same weights, batches and cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from octavo.checkpoint import ModelSpec
from octavo.worker.gpt2 import GPT2
from octavo.worker.gpt2_triton import DeviceBatch, TritonGPT2
from octavo.worker.kv_cache import KVCache
from octavo.worker.weights import expected_shapes
from octavo_kernels.checks import FP8
from octavo_kernels.paged_attention import prefill_tiles
from worker.paged import make_batch

BLOCK_SIZE = 16
CPU = torch.device("cpu")
SPEC = ModelSpec(n_embd=64, n_layer=2, n_head=2, vocab_size=301, n_positions=96)
VARIANTS = {
    "plain": SPEC,
    "head size 20, untied scale": ModelSpec(
        n_embd=40, n_layer=2, n_head=2, vocab_size=301, n_positions=96, scale_attn_by_inverse_layer_idx=True
    ),
    "upcast, relu": ModelSpec(
        n_embd=64,
        n_layer=2,
        n_head=2,
        vocab_size=301,
        n_positions=96,
        reorder_and_upcast_attn=True,
        activation_function="relu",
    ),
}


def random_weights(spec: ModelSpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for name, shape in expected_shapes(spec).items() if name != "lm_head.weight"}
    weights = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    return {name: weight + (name.endswith(("ln_1.weight", "ln_2.weight"))) for name, weight in weights.items()}


def on_kernels(batch, num_draft_rows: int = 0) -> DeviceBatch:
    """The last rows are drafts, which have tiles of their own."""
    num_prompts = len(batch.query_start_loc_np) - num_draft_rows
    rows, starts = prefill_tiles(batch.query_start_loc_np[:num_prompts], batch.num_decode_rows)
    return DeviceBatch(
        input_ids=batch.input_ids.int(),
        positions=batch.positions.int(),
        slot_mapping=batch.slot_mapping,
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        block_tables=batch.block_tables,
        num_decode_rows=batch.num_decode_rows,
        tile_rows=torch.from_numpy(rows) if len(rows) else None,
        tile_starts=torch.from_numpy(starts) if len(rows) else None,
        num_draft_rows=num_draft_rows,
    )


@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS.keys())
def test_prefill_chunks_decode_rows_and_drafts_give_the_logits_of_the_cpu_path(spec: ModelSpec):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu = torch.device("cpu")
    expected_model = GPT2(spec, random_weights(spec), device=cpu, dtype=torch.float32)
    model = TritonGPT2(spec, random_weights(spec), device=device, dtype=torch.float32)
    model.reserve(4, 2)
    expected_cache = KVCache(spec, 30, BLOCK_SIZE, dtype=torch.float32, device=cpu)
    cache = KVCache(spec, 30, BLOCK_SIZE, dtype=torch.float32, device=device)
    cache.data[:, :, 1:] = float("nan")
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, spec.vocab_size, (90,), generator=generator) for _ in range(3)]
    tables = [np.arange(1 + 6 * i, 7 + 6 * i, dtype=np.int32)[::-1].copy() for i in range(3)]
    steps = [
        [(0, 0, 40), (1, 0, 17)],
        [(0, 40, 41), (1, 17, 33), (2, 0, 80)],
        [(0, 41, 42), (2, 80, 81), (1, 33, 34)],
        [(0, 42, 43), (1, 34, 38), (2, 81, 90)],
    ]
    for step, drafts in zip(steps, (0, 0, 0, 2), strict=True):
        rows = [(tokens[i][start:end], start, tables[i]) for i, start, end in step]
        batch = make_batch(rows, BLOCK_SIZE)
        expected = expected_model.logits(expected_model.forward(batch, expected_cache))
        moved = on_kernels(make_batch(rows, BLOCK_SIZE, device), drafts)
        found = model.logits(model.forward(moved, cache))
        assert found.shape[1] == 320
        torch.testing.assert_close(found[:, : spec.vocab_size].cpu(), expected, rtol=1e-4, atol=1e-4)


def test_an_fp8_cache_gives_the_logits_of_the_cpu_path():
    """One layer: what is rounded to three bits in one is not to be multiplied in the next. Keys and values are far from
    1 unless they are scaled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = ModelSpec(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=64)
    weights = random_weights(spec)
    for part, factor in ((slice(64, 128), 8.0), (slice(128, 192), 2.0**-8)):
        weights["h.0.attn.c_attn.weight"][:, part] *= factor
        weights["h.0.attn.c_attn.bias"][part] *= factor
    weights["h.0.attn.c_proj.weight"] *= 2.0**8
    expected_model = GPT2(spec, dict(weights), device=CPU, dtype=torch.float32, cache_dtype=FP8)
    model = TritonGPT2(spec, dict(weights), device=device, dtype=torch.float32, cache_dtype=FP8)
    unscaled = GPT2(spec, dict(weights), device=CPU, dtype=torch.float32)
    model.reserve(4, 1)
    caches = [KVCache(spec, 8, BLOCK_SIZE, dtype=dtype, device=where) for dtype, where in ((FP8, CPU), (FP8, device))]
    exact = KVCache(spec, 8, BLOCK_SIZE, dtype=torch.float32, device=CPU)
    tokens = torch.randint(0, 64, (40,), generator=torch.Generator().manual_seed(1))
    tables = [np.array([3, 1, 4], np.int32), np.array([6, 5, 2], np.int32)]
    steps = ([(0, 0, 20)], [(0, 20, 21), (1, 0, 17)], [(1, 17, 18), (0, 21, 33)], [(1, 18, 19), (0, 33, 40)])
    for step, drafts in zip(steps, (0, 0, 0, 1), strict=True):
        rows = [(tokens[start:end], start, tables[i]) for i, start, end in step]
        batch = make_batch(rows, BLOCK_SIZE)
        expected = expected_model.logits(expected_model.forward(batch, caches[0]))
        moved = on_kernels(make_batch(rows, BLOCK_SIZE, device), drafts)
        found = model.logits(model.forward(moved, caches[1])).cpu()
        truth = unscaled.logits(unscaled.forward(batch, exact))
        assert (found - expected).abs().mean() < 1e-3, "a number between two of fp8 may go either way"
        assert (expected - truth).abs().mean() < 0.05 * truth.std()


def test_batch_invariant_logits_have_the_same_bits_alone_and_among_others():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = ModelSpec(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(0, spec.vocab_size, (30,), generator=generator) for _ in range(3)]
    tables = [np.arange(1 + 2 * i, 3 + 2 * i, dtype=np.int32) for i in range(3)]

    def logits_of_first(others: list[tuple[int, int, int]], after: int) -> torch.Tensor:
        """A chunk, then a decode step: of request 0 alone, or among others."""
        model = TritonGPT2(spec, random_weights(spec), device=device, dtype=torch.float32, batch_invariant=True)
        model.reserve(4)
        cache = KVCache(spec, 7, BLOCK_SIZE, dtype=torch.float32, device=device)
        found = []
        for step in ([(0, 0, 9), *others], [(0, 9, 10), *((i, end, end + after) for i, _, end in others)]):
            rows = [(tokens[i][start:end], start, tables[i]) for i, start, end in step]
            hidden = model.forward(on_kernels(make_batch(rows, BLOCK_SIZE, device)), cache)
            found.append(model.logits(hidden)[: step[0][2] - step[0][1]])
        return torch.cat(found)

    alone = logits_of_first([], 1)
    assert torch.equal(logits_of_first([(1, 0, 21), (2, 0, 4)], 1), alone)
    assert torch.equal(logits_of_first([(2, 0, 17)], 3), alone)


def test_batch_invariant_logits_have_the_same_bits_behind_drafts():
    """Each token's, whether it decodes alone or is checked with others."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = ModelSpec(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    tokens = torch.randint(0, spec.vocab_size, (30,), generator=torch.Generator().manual_seed(2))
    table = np.array([2, 1], np.int32)
    found = []
    for steps in ([(0, 12), (12, 13), (13, 14), (14, 15)], [(0, 12), (12, 15)]):
        model = TritonGPT2(spec, random_weights(spec), device=device, dtype=torch.float32, batch_invariant=True)
        model.reserve(4, 4)
        cache = KVCache(spec, 2, BLOCK_SIZE, dtype=torch.float32, device=device)
        logits = []
        for start, end in steps:
            batch = make_batch([(tokens[start:end], start, table)], BLOCK_SIZE, device)
            logits.append(model.logits(model.forward(on_kernels(batch, int(end == 15 > start + 1)), cache)))
        found.append(torch.cat(logits))
    assert torch.equal(*found)
