"""Runs token sequences through GPT2 as the engine would: staggered, in chunks, over shuffled and poisoned blocks."""

import math

import numpy as np
import torch
from octavo.checkpoint import ModelSpec
from octavo.worker.gpt2 import GPT2
from octavo.worker.input_batch import InputBatch
from octavo.worker.kv_cache import KVCache
from torch import Tensor

CPU = torch.device("cpu")


def make_batch(rows: list[tuple[Tensor, int, np.ndarray]], block_size: int, device: torch.device = CPU) -> InputBatch:
    """rows: (new tokens, position of the first, block table); rows of one token come first and count as decode rows."""
    lens = [len(tokens) for tokens, _, _ in rows]
    query_start_loc = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    seq_lens = np.array([start + n for n, (_, start, _) in zip(lens, rows, strict=True)], np.int32)
    tables = np.zeros((len(rows), max(-(-int(n) // block_size) for n in seq_lens)), np.int32)
    positions, slots = [], []
    for r, (_, start, table) in enumerate(rows):
        used = -(-int(seq_lens[r]) // block_size)
        tables[r, :used] = table[:used]
        position = np.arange(start, seq_lens[r], dtype=np.int64)
        positions.append(position)
        slots.append(tables[r, position // block_size].astype(np.int64) * block_size + position % block_size)
    num_decode_rows = next((r for r, n in enumerate(lens) if n != 1), len(lens))

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return InputBatch(
        input_ids=torch.cat([tokens for tokens, _, _ in rows]).to(device),
        positions=put(np.concatenate(positions)),
        slot_mapping=put(np.concatenate(slots)),
        query_start_loc=put(query_start_loc),
        seq_lens=put(seq_lens),
        block_tables=put(tables),
        num_decode_rows=num_decode_rows,
        logits_indices=put(query_start_loc[1:].astype(np.int64) - 1),
        query_start_loc_np=query_start_loc,
        seq_lens_np=seq_lens,
        block_tables_np=tables,
    )


def poisoned_cache(spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device=CPU) -> KVCache:
    """Every slot holds NaN, as if its last owner had left the worst."""
    cache = KVCache(spec, num_blocks, block_size, dtype=dtype, device=device)
    cache.data.fill_(math.nan)
    return cache


def all_logits(
    model: GPT2,
    sequences: list[Tensor],
    prompt_lens: list[int],
    *,
    chunk: int,
    block_size: int,
    cache_dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Logits of every position of every sequence. Sequence i enters at step i; its prompt goes in chunks, the rest
    token by token, so that steps mix prefill and decode."""
    rng = np.random.default_rng(0)
    per_sequence = [-(-len(tokens) // block_size) for tokens in sequences]
    num_blocks = sum(per_sequence) + 3
    free = rng.permutation(num_blocks) + 1
    tables = np.split(free, np.cumsum(per_sequence))[: len(sequences)]
    cache = poisoned_cache(model.spec, num_blocks, block_size, cache_dtype, model.device)
    done = [0] * len(sequences)
    logits: list[list[Tensor]] = [[] for _ in sequences]
    step = 0
    while any(n < len(tokens) for n, tokens in zip(done, sequences, strict=True)):
        sizes = {}
        for i, tokens in enumerate(sequences):
            if i <= step and done[i] < len(tokens):
                sizes[i] = min(chunk, prompt_lens[i] - done[i]) if done[i] < prompt_lens[i] else 1
        order = sorted(sizes, key=lambda i: sizes[i] > 1)
        rows = [(sequences[i][done[i] : done[i] + sizes[i]], done[i], tables[i]) for i in order]
        batch = make_batch(rows, block_size, model.device)
        found = model.logits(model.forward(batch, cache)).float().cpu()
        for i, part in zip(order, found.split([sizes[i] for i in order]), strict=True):
            logits[i].append(part)
            done[i] += sizes[i]
        step += 1
    return [torch.cat(parts) for parts in logits]
