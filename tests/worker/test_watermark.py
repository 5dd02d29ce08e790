"""Watermarks against transformers' own processors, step by step and from the history alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from octavo.step import LogprobSpec
from octavo.types import GreenListWatermark, LogprobKind, SeedingScheme, SynthIdWatermark, Watermark
from octavo.worker.watermark import watermarked
from worker.sampling import Row, every_processed_logit, random_row, sample_together

VOCAB_SIZE = 997
CPU = torch.device("cpu")


def green(scheme: SeedingScheme = SeedingScheme.LEFTHASH, **fields) -> Watermark:
    defaults = {"greenlist_ratio": 0.25, "bias": 2.0, "hashing_key": 15485863, "context_width": 1}
    return Watermark(green_list=GreenListWatermark(seeding_scheme=scheme, **{**defaults, **fields}))


def synth(**fields) -> Watermark:
    defaults = {
        "ngram_len": 5,
        "keys": [654, 400, -836, 2**62 + 123, 340],
        "context_history_size": 1024,
        "sampling_table_seed": 0,
        "sampling_table_size": 2**16,
        "skip_first_ngram_calls": False,
    }
    return Watermark(synth_id=SynthIdWatermark(**{**defaults, **fields}))


MARKS = {
    "left-hash": green(),
    "left-hash, wide context, huge key": green(context_width=4, hashing_key=2**63 - 1, greenlist_ratio=0.9),
    "self-hash": green(SeedingScheme.SELFHASH),
    "self-hash, three tokens": green(SeedingScheme.SELFHASH, context_width=3, bias=-1.5, hashing_key=2**62 + 1),
    "SynthID": synth(),
    "SynthID, short memory": synth(ngram_len=2, context_history_size=3),
    "SynthID, first ones unmarked": synth(ngram_len=4, skip_first_ngram_calls=True, sampling_table_seed=-3),
}


def transformers_processor(mark: Watermark):
    from transformers.generation.configuration_utils import SynthIDTextWatermarkingConfig, WatermarkingConfig

    if mark.synth_id is not None:
        names = ("keys", "ngram_len", "context_history_size", "sampling_table_seed", "sampling_table_size")
        config = SynthIDTextWatermarkingConfig(
            skip_first_ngram_calls=bool(mark.synth_id.skip_first_ngram_calls),
            **{name: getattr(mark.synth_id, name) for name in names},
        )
    else:
        assert mark.green_list is not None
        names = ("greenlist_ratio", "bias", "hashing_key", "context_width")
        config = WatermarkingConfig(
            seeding_scheme=mark.green_list.seeding_scheme.name.lower(),
            **{name: getattr(mark.green_list, name) for name in names},
        )
    return config.construct_processor(VOCAB_SIZE, "cpu")


@pytest.mark.parametrize("mark", MARKS.values(), ids=MARKS)
def test_every_step_equals_transformers(mark: Watermark):
    processor = transformers_processor(mark)
    generator = torch.Generator().manual_seed(4)
    prompt = [3, 9, 4]
    output = torch.randint(0, 3, (30,), generator=generator).tolist()  # contexts recur
    marked = 0
    for step in range(len(output) + 1):
        history = prompt + output[:step]
        scores = torch.randn(VOCAB_SIZE, generator=generator) * 4
        if step % 2:
            scores[scores < 3.0] = -torch.inf
        expected = processor(torch.tensor([history]), scores[None])[0]
        before = scores.clone()
        actual = watermarked(scores, np.array(history, np.int32), len(prompt), mark, CPU)
        assert torch.equal(actual, expected)
        assert torch.equal(scores, before)
        marked += not torch.equal(actual, scores)
    assert marked > 3
    if mark.synth_id is not None:
        assert marked < len(output)


def marked_rows(count: int) -> list[Row]:
    rng = random.Random(3)
    rows = []
    for i in range(count):
        row = random_row(rng, VOCAB_SIZE)
        if i % 3 == 0:
            row.params = {"do_sample": i % 2 == 0, "top_k": 20}
        if i % 4:
            row.params["watermarking_config"] = rng.choice(list(MARKS.values()))
        rows.append(row)
    return rows


def test_marks_come_after_all_filters_and_leave_other_rows_alone():
    rows = marked_rows(48)
    marks = [row.params.pop("watermarking_config", None) for row in rows]
    plain = sample_together(rows)
    for row, mark in zip(rows, marks, strict=True):
        if mark is not None:
            row.params["watermarking_config"] = mark
    together = sample_together(rows)
    unmarked_scores = torch.from_numpy(plain.logprobs.requested).view(-1, VOCAB_SIZE)
    scores = torch.from_numpy(together.logprobs.requested).view(-1, VOCAB_SIZE)
    for i, (row, mark) in enumerate(zip(rows, marks, strict=True)):
        expected = unmarked_scores[i]
        if mark is not None:
            expected = watermarked(expected, np.array(row.token_ids, np.int32), row.prompt_len, mark, CPU)
        assert torch.equal(scores[i], expected)
        assert together.token_ids[i] == row.expected_token(expected)
    assert (together.token_ids != plain.token_ids).sum() > 5


def test_a_row_without_a_number_fails_whatever_its_watermark_makes_of_it():
    logits = torch.linspace(0, 1, VOCAB_SIZE)
    logits[4] = torch.nan
    rows = [
        Row(logits, [1], 1, {"do_sample": sample, "top_k": 0, "watermarking_config": mark})
        for sample in (False, True)
        for mark in MARKS.values()
    ]
    output = sample_together(rows)
    assert [row for row, _ in output.failed] == list(range(len(rows)))
    assert output.token_ids.tolist() == [-1] * len(rows)


def test_logprobs_of_marked_rows_are_processed_ones():
    rows = [Row(torch.linspace(0, 1, VOCAB_SIZE), [1], 1, {"watermarking_config": green(bias=30.0)})]
    rows[0].logprobs = every_processed_logit(VOCAB_SIZE)
    processed = sample_together(rows).logprobs.requested
    rows[0].logprobs = LogprobSpec(0, LogprobKind.RAW_LOGIT, list(range(VOCAB_SIZE)))
    raw = sample_together(rows).logprobs.requested
    assert raw.max() <= 1.0
    assert (processed > 25.0).sum() == VOCAB_SIZE // 4
