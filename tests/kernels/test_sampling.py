"""The sampling kernel against transformers' pipeline, PyTorch's Philox numbers and the state that it should leave.

Rows, parameters and the state's words come from the engine's side, so that what the host writes is tested with it.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from kernels.sampling_bench import EVERY_SCORE, NUM_THREADS, Device
from octavo.step import LogprobSpec
from octavo.types import LogprobKind
from octavo.worker.device_states import DeviceStates
from octavo_kernels import reference
from octavo_kernels.history import apply_history
from octavo_kernels.logprobs import LogprobBuffers, gather_logprobs
from octavo_kernels.sampling import sample
from octavo_kernels.state import Bitmap, Feature, Finish, Param
from octavo_kernels.workspace import SamplerWorkspace
from reference.philox import draw, race_noise
from worker.sampling import N_POSITIONS, Row, random_row

DYNAMIC = Feature.NO_REPEAT_NGRAM | Feature.ENCODER_NO_REPEAT_NGRAM | Feature.BAD_WORDS


@pytest.mark.parametrize(("vocab_size", "bf16", "count"), [(97, False, 8), (97, True, 6), (5000, False, 2)])
def test_survivors_values_and_tokens_equal_the_reference(vocab_size: int, bf16: bool, count: int, device):
    rng = random.Random(vocab_size + bf16)
    rows = [random_row(rng, vocab_size, bf16=bf16) for _ in range(count)]
    for row in rows:
        row.logprobs = EVERY_SCORE
    bench = Device(rows, device)
    results = bench.sample()
    for i, row in enumerate(rows):
        expected, actual = row.expected_scores(intervals=True), bench.processed(i)
        if not row.params["do_sample"]:
            actual = bench.workspace.scores[i, :vocab_size].cpu()
        assert torch.equal(actual > -math.inf, expected > -math.inf), row.params
        kept = expected > -math.inf
        torch.testing.assert_close(actual[kept], expected[kept], rtol=3e-7, atol=0.0)
        if row.params["do_sample"]:
            noise = race_noise(row.seed, row.step, row.row, vocab_size)
            assert results[i, 0] == draw(expected.softmax(-1).numpy(), noise), row.params
        else:
            assert results[i, 0] == int(expected.argmax())


def test_the_kernel_equals_its_specification(device):
    rng = random.Random(21)
    rows = [random_row(rng, 97) for _ in range(5)]
    bench = Device(rows, device)
    before = DeviceStates(len(rows), N_POSITIONS, 16, 97, device)
    before.state.arena.copy_(bench.states.state.arena)
    results = bench.sample()
    for i, row in enumerate(rows):
        uses = Feature(int(before.state.params[i, Param.FEATURES]))
        slot = torch.tensor([i], dtype=torch.int32, device=device)
        workspace = SamplerWorkspace.allocate(1, 97, device)
        apply_history(bench.logits[i : i + 1], before.state, slot, workspace, reciprocal=bench.logits.is_cuda)
        adjusted, banned = workspace.scores[0, :97], workspace.banned[0]
        token = torch.arange(97, device=device)
        scores = reference.process_row(
            bench.logits[i, :97],
            before.state,
            i,
            adjusted if uses & (Feature.BIAS | Feature.OUTPUT_PENALTY) else None,
            (banned[token // 32] >> (token % 32) & 1) != 0 if uses & DYNAMIC else None,
            reciprocal=bench.logits.is_cuda,
        )
        interval = reference.filter_row(scores, before.state, i)
        samples = bool(uses & Feature.SAMPLE)
        noise = torch.from_numpy(race_noise(row.seed, row.step, row.row, 97)).to(device) if samples else None
        assert results[i, 0] == reference.choose(scores, interval, noise)
        kept = (scores >= interval[0]) & (scores <= interval[1])
        if samples:
            assert torch.equal(bench.processed(i) > -math.inf, (kept & (scores > -math.inf)).cpu())


def test_the_state_moves_on_with_the_chosen_token(device):
    logits = torch.full((97,), -5.0)
    logits[[9, 40]] = torch.tensor([3.0, 2.0])
    penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.25}
    rows = [
        Row(logits, [3, 9, 4], 1, penalties),
        Row(logits, [3, 4], 1, penalties, eos=(9,), stop=(40,)),
        Row(logits, [3, 4], 1, {}, eos=(7,), stop=(9,)),
        Row(logits, [3, 4], 1, {}, max_total_tokens=3),
    ]
    bench = Device(rows, device)
    results, state = bench.sample(), bench.states.state
    assert results[:, :2].tolist() == [[9, Finish.RUNNING], [9, Finish.EOS], [9, Finish.STOP_TOKEN], [9, Finish.LENGTH]]
    assert state.finished[:4].tolist() == [0, Finish.EOS, Finish.STOP_TOKEN, Finish.LENGTH]
    assert state.length[:4].tolist() == [4, 3, 3, 3]
    assert state.hist[0, :4].tolist() == [3, 9, 4, 9]
    assert state.count_ids[0, :2].tolist() == [9, 4] and state.counts[0, :2].tolist() == [2, 1]
    assert state.count_ids[1, :2].tolist() == [4, 9] and state.num_counts[:2].tolist() == [2, 2]
    assert int(state.bitmaps[0, Bitmap.SEEN, 0]) == (1 << 3) | (1 << 9) | (1 << 4)
    before = state.arena.clone()
    muted = bench.sample()
    assert muted[1:, 0].tolist() == [-1, -1, -1]
    assert torch.equal(
        state.hist[1:], before[bench.states._base["hist"] :][: state.hist.numel()].view_as(state.hist)[1:]
    )


def test_bad_rows_fail_alone_and_say_whose_fault_it_is(device):
    good = torch.linspace(0, 1, 97)
    nan, inf = good.clone(), good.clone()
    nan[5], inf[6] = math.nan, math.inf
    ban_all = {"logit_bias": dict.fromkeys(range(97), -math.inf)}
    rows = [
        Row(good, [1], 1),
        Row(nan, [1], 1),
        Row(good, [1], 1, ban_all),
        Row(inf, [1], 1, {"do_sample": True}),
        Row(inf, [1], 1),
        Row(good, [1], 1, {"do_sample": True, "temperature": 1e-45}),
        Row(nan, [1], 1, {"remove_invalid_values": True}),
    ]
    bench = Device(rows, device)
    results = bench.sample()
    assert results[:, 0].tolist() == [96, -1, -1, -1, 6, -1, 96]
    logits, scores = Finish.NON_FINITE_LOGITS, Finish.NON_FINITE_SCORES
    assert results[[1, 2, 3, 5], 1].tolist() == [logits, scores, logits, scores]
    assert bench.states.state.length[:7].tolist() == [2, 1, 1, 1, 2, 1, 2]


def test_greedy_takes_the_first_of_equal_logits_and_padding_rows_nothing(device):
    logits = torch.zeros(300)
    logits[[17, 40, 299]] = 3.0
    bench = Device([Row(logits, [1], 1), Row(logits, [1], 1)], device)
    bench.slots = torch.tensor([1, 2], dtype=torch.int32, device=device)
    before = bench.states.state.length.clone()
    assert bench.sample()[:, 0].tolist() == [17, -1]
    assert (bench.states.state.length - before).tolist() == [0, 1, 0]


def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch(device):
    rng = random.Random(11)
    rows = [random_row(rng, 97) for _ in range(4)]
    together = Device(rows, device)
    results = together.sample()
    for i in (1, 3):
        alone = Device([rows[i]], device)
        assert np.array_equal(alone.sample()[0], results[i])
        assert torch.equal(alone.workspace.interval[0], together.workspace.interval[i])


def test_slots_and_lengths_out_of_range_touch_nothing_and_poisoned_neighbours_do_not_matter(device):
    """Rows of a slot that no state has, of one whose length is none, and a good row between them."""
    rng = random.Random(5)
    rows = [random_row(rng, 97) for _ in range(4)]
    expected = Device(rows, device).sample()[1]
    bench = Device(rows, device)
    memory = torch.full((6, 4 * bench.logits.shape[1]), math.inf, device=device)
    width = bench.logits.shape[1]
    memory[1:5, width : 2 * width] = bench.logits
    bench.logits = memory[1:5, width : 2 * width]
    state = bench.states.state
    state.length[0], state.length[2], state.length[3] = N_POSITIONS + 2, -1, 10**9
    before = state.arena.clone()
    bench.slots = torch.tensor([0, 1, 2, 3], dtype=torch.int32, device=device)
    assert np.array_equal(bench.sample(), [[-1, 0, 0, 0], expected, [-1, 0, 0, 0], [-1, 0, 0, 0]])
    changed = state.arena != before
    for name in ("length", "finished", "hist", "bitmaps", "counts", "count_ids", "num_counts"):
        view = getattr(state, name)
        base = view.storage_offset() - state.arena.storage_offset()
        rest = changed[base : base + view.numel()].view(view.shape)
        assert not rest[torch.arange(len(rest)) != 1].any(), name
        rest[1] = False
    assert not changed.any()
    bench.slots = torch.tensor([-1, 4, 5, 2**31 - 1], dtype=torch.int32, device=device)
    before = state.arena.clone()
    assert bench.sample()[:, 0].tolist() == [-1] * 4
    assert torch.equal(state.arena, before)


def test_draws_follow_the_distribution(device):
    """Chi-square over seeds with 7 degrees of freedom; 1e-4 is at 29.9."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, generator=generator) * 1.5
    count = 120
    rows = [Row(logits, [1], 1, {"do_sample": True, "top_k": 0}, seed=seed) for seed in range(count)]
    drawn = np.bincount(Device(rows, device).sample()[:, 0], minlength=8)
    expected = logits.softmax(-1).numpy() * count
    assert ((drawn - expected) ** 2 / expected).sum() < 29.9


@pytest.mark.parametrize("kind", list(LogprobKind))
def test_logprobs_are_those_of_log_softmax(kind: LogprobKind, device):
    rng = random.Random(kind)
    rows = [random_row(rng, 97) for _ in range(3)]
    for i, row in enumerate(rows):
        row.logprobs = LogprobSpec(4 * i, kind, [3, 96, 40][: i + 1])
    bench = Device(rows, device)
    results = bench.sample()
    out = LogprobBuffers.allocate(len(rows), device)
    gather_logprobs(bench.logits, bench.states.state, bench.slots, bench.workspace, bench.results, out)
    for i, row in enumerate(rows):
        raw = kind in (LogprobKind.RAW_LOGPROB, LogprobKind.RAW_LOGIT)
        values = row.logits.float() if raw else row.expected_scores(intervals=True)
        if kind in (LogprobKind.RAW_LOGPROB, LogprobKind.PROCESSED_LOGPROB):
            values = values.log_softmax(-1)
        token = int(results[i, 0])
        assert float(out.chosen[i]) == pytest.approx(float(values[token]), abs=1e-5)
        assert int(out.ranks[i]) == int((values > values[token]).sum()) + 1
        top = torch.sort(values, descending=True, stable=True)
        assert out.top_ids[i, : 4 * i].tolist() == top.indices[: 4 * i].tolist()
        assert out.top_values[i, : 4 * i].tolist() == pytest.approx(top.values[: 4 * i].tolist(), abs=1e-5)
        assert out.requested[i, : i + 1].tolist() == pytest.approx(values[[3, 96, 40][: i + 1]].tolist(), abs=1e-5)


def test_wrappers_name_the_argument_that_is_wrong(device):
    bench = Device([Row(torch.zeros(97), [1], 1)], device)
    state, workspace = bench.states.state, bench.workspace

    def call(logits=bench.logits, slots=bench.slots, results=bench.results, room=workspace):
        sample(logits, state, slots, room, results, reciprocal=False, num_threads=NUM_THREADS)

    with pytest.raises(ValueError, match="logits"):
        call(logits=bench.logits[:, :50])
    with pytest.raises(ValueError, match="row_slots"):
        call(slots=bench.slots.long())
    with pytest.raises(ValueError, match="results"):
        call(results=bench.results[:, :3])
    with pytest.raises(ValueError, match="workspace"):
        call(room=SamplerWorkspace.allocate(1, 98, device))
