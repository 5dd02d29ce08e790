"""The filters' paths: candidates in registers, whole rows in memory, and what decides between them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from kernels.sampling_bench import NUM_THREADS, Device
from octavo.types import ExponentialDecay
from octavo_kernels import reference
from octavo_kernels.sampling import sample
from octavo_kernels.state import Bitmap, Finish, Param
from reference.hf_pipeline import RowParams, process_row
from reference.philox import cuda_words, draw, exponential, race_noise, uniform
from worker.sampling import Row

SAMPLING = {"do_sample": True, "top_k": 0}


def normal(vocab_size: int, spread: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def check(row: Row, device: torch.device, *, keep: int = 1, beams: int = 1) -> Device:
    """The survivors are those of transformers' filters as intervals, and the winner is theirs."""
    bench = Device([row], device)
    bench.states.state.params[0, Param.MIN_KEEP] = keep
    results = bench.sample()
    params = RowParams(
        max_length=row.max_total_tokens, eos_token_ids=row.eos + row.stop, num_beams=beams, **row.transformers_names()
    )
    tokens = torch.tensor(row.token_ids)
    device_name = "cuda" if device.type == "cuda" else "cpu"
    expected = process_row(row.logits.float(), tokens, row.prompt_len, params, device_name, intervals=True)
    kept = expected > -math.inf
    assert torch.equal(bench.processed(0) > -math.inf, kept), (
        int((bench.processed(0) > -math.inf).sum()),
        int(kept.sum()),
    )
    noise = race_noise(row.seed, row.step, row.row, len(expected))
    assert results[0, 0] == draw(expected.softmax(-1).numpy(), noise)
    assert results[0, 2] == expected[results[0, 0]].numpy().view(np.int32)
    return bench


@pytest.mark.parametrize(
    ("vocab_size", "spread", "params"),
    [
        (5000, 3.0, {"top_p": 0.9}),  # the candidates hold what survives
        (5000, 0.3, {"top_p": 0.9}),  # they do not: a bracket of the whole row
        (5000, 0.3, {"top_p": 0.3, "min_p": 0.7, "eta_cutoff": 0.3}),
        (5000, 0.3, {"min_p": 0.2, "top_p": 0.7}),
        (5000, 3.0, {"min_p": 0.01, "typical_p": 0.5}),
        (5000, 0.3, {"epsilon_cutoff": 1e-4}),
        (5000, 3.0, {"typical_p": 0.4, "epsilon_cutoff": 1e-3}),
        (5000, 2.0, {"eta_cutoff": 0.01}),
        (5000, 2.0, {"top_k": 1500, "top_p": 0.6}),
        (5000, 2.0, {"top_k": 1024, "typical_p": 0.8}),
        (5000, 2.0, {"top_h": 0.5, "top_k": 40}),
        (300, 1.0, {"typical_p": 0.3, "eta_cutoff": 0.05, "top_p": 0.95, "min_p": 0.1}),
        (7, 1.0, {"top_k": 100, "top_p": 0.5}),
        (1, 1.0, {"top_k": 1, "top_p": 0.0, "typical_p": 0.1, "top_h": 0.1}),
    ],
)
def test_each_path_leaves_what_transformers_leaves(device: torch.device, vocab_size: int, spread: float, params: dict):
    check(Row(normal(vocab_size, spread), [0], 1, SAMPLING | params, seed=5), device)


@pytest.mark.parametrize("params", [{"top_k": 50}, {"top_k": 50, "top_h": 0.4}, {"top_p": 0.4}, {"min_p": 0.9}])
def test_more_ties_than_candidates_take_the_whole_row(device: torch.device, params: dict):
    logits = torch.zeros(4500)
    logits[[3, 4400]] = torch.tensor([0.5, 1.0])
    logits[2000:2100] = -0.0
    check(Row(logits, [0], 1, SAMPLING | params, seed=1), device)


def test_zeros_of_either_sign_are_one_value(device: torch.device):
    """The key that is bisected tells them apart; mass must not count twice."""
    logits = torch.zeros(40)
    logits[::2] = -0.0
    for tail in (0.3, 0.6, 0.97):
        check(Row(logits, [0], 1, SAMPLING | {"top_p": 1 - tail}), device)


@pytest.mark.parametrize("keep", [2, 5])
@pytest.mark.parametrize("vocab_size", [97, 4300])
def test_every_filter_leaves_the_least_number_of_tokens(device: torch.device, keep: int, vocab_size: int):
    logits = normal(vocab_size, 9.0, seed=keep)
    for params in (
        {"top_p": 0.1},
        {"min_p": 0.9},
        {"typical_p": 0.1},
        {"epsilon_cutoff": 0.9},
        {"eta_cutoff": 0.9, "top_k": 1},
        {"typical_p": 0.5, "top_p": 0.2, "epsilon_cutoff": 0.5},
    ):
        row = Row(logits, [0], 1, SAMPLING | params, eos=tuple(range(keep - 1)))
        bench = check(row, device, keep=keep, beams=4)
        assert int((bench.processed(0) > -math.inf).sum()) >= keep


def test_scores_of_a_plain_row_are_not_written(device: torch.device):
    row = Row(normal(97, 2.0), [0], 1, {"do_sample": True, "top_k": 5}, seed=3)
    bench = Device([row], device, shows_scores=False)
    bench.workspace.scores.fill_(math.nan)
    expected = Device([row], device).sample()
    assert np.array_equal(bench.sample(), expected)
    assert bench.workspace.scores.isnan().all()


def test_a_fill_wider_than_the_card_takes_its_words(device: torch.device):
    vocab_size, num_rows, row_index = 97, 7, 5
    row = Row(normal(vocab_size, 2.0), [3, 4, 5], 1, SAMPLING, seed=2**63 + 7, row=row_index, num_rows=num_rows)
    bench = Device([row], device)
    sample(
        bench.logits, bench.states.state, bench.slots, bench.workspace, bench.results, reciprocal=False, num_threads=512
    )
    words = cuda_words(row.seed, num_rows * vocab_size, 4 * 2, num_sms=1, threads_per_sm=512)
    noise = exponential(uniform(words)).reshape(num_rows, vocab_size)[row_index]
    assert bench.results[0, 0] == draw(row.logits.softmax(-1).numpy(), noise)


def test_a_tile_that_cannot_win_is_skipped_without_a_trace(device: torch.device):
    """The last tile of a long row is so unlikely that no noise makes it win; the one before holds the largest."""
    logits = normal(5000, 1.0)
    logits[4096:] -= 40.0
    for seed in range(3):
        check(Row(logits, [0], 1, SAMPLING, seed=seed), device)


def test_the_decay_raises_stop_tokens_as_it_does_eos(device: torch.device):
    params = SAMPLING | {"do_sample": False, "top_k": 50, "exponential_decay_length_penalty": ExponentialDecay(0, 1.5)}
    row = Row(normal(97, 1.0), [1, 2, 3, 4], 1, params, eos=(9,), stop=(11,))
    bench = Device([row], device)
    bench.sample()
    grown = torch.nonzero(bench.workspace.scores[0, :97].cpu() != row.logits).flatten().tolist()
    assert grown == [9, 11]
    assert bench.workspace.scores[0, 9] == row.logits[9] + row.logits[9].abs() * (1.5**3 - 1)


def test_allowed_tokens_that_are_all_banned_get_zero(device: torch.device):
    logits = normal(97, 1.0)
    params = {
        "allowed_token_ids": [5, 6, 90],
        "suppress_tokens": [6],
        "logit_bias": dict.fromkeys([5, 6, 90], -math.inf),
    }
    bench = Device([Row(logits, [1], 1, params)], device)
    assert bench.sample()[0, 0] == 5
    scores = bench.workspace.scores[0, :97].cpu()
    assert scores[[5, 90]].tolist() == [0.0, 0.0] and torch.isneginf(scores).sum() == 95


@pytest.mark.parametrize("length", [-1, -(2**31), 2**31 - 1])
def test_a_length_that_is_none_chooses_nothing_and_writes_nothing(device: torch.device, length: int):
    bench = Device([Row(normal(97, 1.0), [1], 1)] * 3, device)
    state = bench.states.state
    state.length[1] = length
    before = state.arena.clone()
    results = bench.sample()
    assert results[1].tolist()[:2] == [-1, Finish.RUNNING] and (results[[0, 2], 0] >= 0).all()
    assert state.length[1] == length
    for name in ("hist", "bitmaps", "finished", "num_counts", "count_ids", "counts"):
        part = getattr(state, name)
        offset = part.storage_offset()
        old = before[offset : offset + part.numel()].view(part.shape)
        assert torch.equal(part[1], old[1]), name


def test_neighbours_of_a_row_are_left_alone(device: torch.device):
    """Slots, workspace and results on both sides hold poison."""
    row = Row(normal(97, 2.0), [3, 9], 1, SAMPLING | {"frequency_penalty": 0.5, "repetition_penalty": 1.2, "top_k": 9})
    bench = Device([row] * 3, device)
    state, poison = bench.states.state, 0x5A5A5A5A
    whole = {}
    views = {}
    for name in ("scores", "interval", "candidate_values", "candidate_ids", "banned"):
        tensor = getattr(bench.workspace, name)
        big = torch.full((tensor.numel() + 128,), poison, dtype=torch.int32, device=device).view(tensor.dtype)
        whole[name], views[name] = big, big[64:-64].view(tensor.shape)
    bench.workspace = dataclasses.replace(bench.workspace, **views)
    bench.slots = torch.tensor([-7, 1, 2**31 - 1], dtype=torch.int32, device=device)
    before = state.arena.clone()
    assert bench.sample()[:, 0].tolist()[::2] == [-1, -1]
    changed = torch.nonzero(state.arena != before).flatten().tolist()
    for name in ("length", "hist", "bitmaps", "num_counts", "count_ids", "counts", "finished"):
        part = getattr(state, name)
        start = part.storage_offset() + part.stride(0)
        changed = [word for word in changed if not start <= word < start + part.stride(0)]
    assert changed == []
    for name, big in whole.items():
        bits, width = big.view(torch.int32), views[name].stride(0)
        assert (bits[: 64 + width] == poison).all() and (bits[64 + 2 * width :] == poison).all(), name
    seen = state.bitmaps[1, Bitmap.SEEN]
    assert int(sum(bin(int(word) & 0xFFFFFFFF).count("1") for word in seen)) in (2, 3)


def test_the_specification_chooses_the_same(device: torch.device):
    row = Row(normal(97, 2.0), [3, 9], 1, SAMPLING | {"top_h": 0.6, "top_p": 0.8, "typical_p": 0.9}, seed=8)
    bench = Device([row], device)
    reciprocal = device.type == "cuda"
    scores = reference.process_row(bench.logits[0, :97], bench.states.state, 0, None, None, reciprocal=reciprocal)
    interval = reference.filter_row(scores, bench.states.state, 0)
    noise = torch.from_numpy(race_noise(8, 1, 0, 97)).to(device)
    assert bench.sample()[0, 0] == reference.choose(scores, interval, noise)
    assert NUM_THREADS > 97
