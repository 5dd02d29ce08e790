"""Watermarks of generated text: green lists (KGW) and SynthID, the last step of the pipeline that changes a choice.

Both are functions of a row's scores and its history alone. transformers' SynthID processor keeps a state between steps;
here what it would hold is computed from the history, so that a preempted request goes on as if nothing had happened.
Permutations and tables come from torch's generator of the model's kind of device, as in transformers, wherever the
scores are: who looks for the mark on that device finds it.

Sources: WatermarkLogitsProcessor and SynthIDTextWatermarkLogitsProcessor (huggingface/transformers,
src/transformers/generation/logits_process.py); Kirchenbauer et al. 2023, arXiv:2301.10226; Dathathri et al. 2024,
doi:10.1038/s41586-024-08025-4.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from octavo.step import Int32s
from octavo.types import GreenListWatermark, SeedingScheme, SynthIdWatermark, Watermark
from octavo.worker.request_states import Int64s

SELF_HASH_CANDIDATES = 40
"""Most likely tokens that self-hash looks at."""
HASH_TABLE_SIZE = 1_000_003
SEED_MODULUS = 2**64 - 1
LCG_MULTIPLIER = 6364136223846793005
LOWEST = torch.finfo(torch.float32).min


def watermarked(scores: Tensor, history: Int32s, prompt_len: int, watermark: Watermark, device: torch.device) -> Tensor:
    """The row with the mark put on it.

    Args:
        scores: float32 [V] processed, and filtered when sampling; not changed.
        history: int32 [L] prompt and output so far.
        watermark: resolved.
        device: whose generator is used.
    """
    if watermark.synth_id is not None:
        return mark_rows(scores[None], history[None, prompt_len:], watermark.synth_id, device)[0]
    assert watermark.green_list is not None
    return _green_list(scores, history, watermark.green_list, device)


def _green_list(scores: Tensor, history: Int32s, mark: GreenListWatermark, device: torch.device) -> Tensor:
    """Adds the bias to the green tokens. A history shorter than the context is not marked."""
    ratio, bias, key, width = mark.greenlist_ratio, mark.bias, mark.hashing_key, mark.context_width
    assert ratio is not None and bias is not None and key is not None and width is not None
    if len(history) < width:
        return scores
    size = int(scores.shape[0] * ratio)
    generator = torch.Generator(device)
    if mark.seeding_scheme is SeedingScheme.SELFHASH:
        green = _self_hashed(scores, history[-width:], key, size, generator)
    else:
        green = _permutation(scores, key * int(history[-1]), generator)[:size]
    scores = scores.clone()
    scores[green] += bias
    return scores


def _self_hashed(scores: Tensor, context: Int32s, key: int, size: int, generator: torch.Generator) -> Tensor:
    """The most likely tokens that are in the green list which they seed themselves, with `width` tokens up to them."""
    best = scores.sort(descending=True).indices[:SELF_HASH_CANDIDATES]
    table = _hash_table(key, str(generator.device))
    green = []
    for token in best.tolist():
        window = np.append(context, token)[-len(context) :]
        hashes = table[torch.from_numpy(window % HASH_TABLE_SIZE).long()] + 1
        seed = int((key * hashes * hashes[-1]).min())
        if (_permutation(scores, seed, generator)[:size] == token).any():
            green.append(token)
    return torch.tensor(green, dtype=torch.int64, device=scores.device)


def _permutation(scores: Tensor, seed: int, generator: torch.Generator) -> Tensor:
    generator.manual_seed(seed % SEED_MODULUS)
    return torch.randperm(scores.shape[0], generator=generator, device=generator.device).to(scores.device)


@functools.lru_cache(maxsize=4)
def _hash_table(key: int, device: str) -> Tensor:
    """int64 [HASH_TABLE_SIZE] a permutation, on the host; 8 MB."""
    return torch.randperm(HASH_TABLE_SIZE, generator=torch.Generator(device).manual_seed(key), device=device).cpu()


def mark_rows(scores: Tensor, outputs: Int32s, mark: SynthIdWatermark, device: torch.device) -> Tensor:
    """Raises, layer by layer, the probability of tokens with a 1 in the table. A context seen before is not marked.

    Args:
        scores: float32 [R, V]; not changed.
        outputs: int32 [R, L] tokens generated so far.
        mark: resolved.
        device: whose generator is used.
    """
    size, seed, num_remembered = mark.sampling_table_size, mark.sampling_table_seed, mark.context_history_size
    assert size is not None and seed is not None and num_remembered is not None
    first = mark.ngram_len - 1 if mark.skip_first_ngram_calls else 0
    if outputs.shape[1] < first:
        return scores
    contexts = _context_hashes(outputs, mark.ngram_len - 1)
    seen, newest = contexts[:, first:-1][:, -num_remembered:], contexts[:, -1]
    repeated = (seen == newest[:, None]).any(axis=1)
    if seen.shape[1] < num_remembered:  # transformers' ring begins as zeros
        repeated |= newest == 0
    if repeated.all():
        return scores
    table = _sampling_table(size, seed, str(device)).to(scores.device)
    tokens = torch.arange(scores.shape[1], device=scores.device)
    hashes = _accumulate(torch.from_numpy(newest)[:, None].to(scores.device), tokens)
    probs = scores.softmax(1)
    for key in mark.keys:
        values = table[_accumulate(hashes, torch.tensor(key, device=scores.device)) % size]
        mass = (values * probs).sum(1, keepdim=True)
        probs = probs * (1 + values - mass)
    log_probs = probs.log()
    marked = torch.where(log_probs.isfinite(), log_probs, LOWEST)
    return torch.where(torch.from_numpy(repeated)[:, None].to(scores.device), scores, marked)


def _context_hashes(outputs: Int32s, width: int) -> Int64s:
    """int64 [R, L + 1] hash of the last `width` tokens of each output, zeros before it, when it had 0 to L tokens."""
    padded = np.pad(outputs.astype(np.int64), ((0, 0), (width, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)
    hashes = np.ones(windows.shape[:2], np.int64)
    for column in range(width):
        hashes = (hashes + windows[..., column]) * np.int64(LCG_MULTIPLIER) + np.int64(1)  # wraps, as it should
    return hashes


def _accumulate(hashes: Tensor, data: Tensor) -> Tensor:
    """One step of the linear congruential generator, modulo 2^64."""
    return (hashes + data) * LCG_MULTIPLIER + 1


@functools.lru_cache(maxsize=8)
def _sampling_table(size: int, seed: int, device: str) -> Tensor:
    """int64 [size] of zeros and ones, on the host."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, 2, (size,), generator=generator, device=device).cpu()
