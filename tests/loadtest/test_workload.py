"""Lengths and prompts: what is drawn has the means that are documented, fits the model, and follows from the seed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from octavo.client import TLS
from octavo.loadtest.job import Connection, Job
from octavo.loadtest.workload import FIXED, SHAREGPT_LIKE, SIGMAS, Entry, Workload, read_entries


def workload(**changes: Any) -> Workload:
    return dataclasses.replace(Workload(FIXED, 16, 8, context=1024, vocab_size=100), **changes)


SHAREGPT = workload(dataset=SHAREGPT_LIKE, input_len=161, output_len=338)


def test_drawn_lengths_have_the_documented_means_before_the_cut() -> None:
    lengths = np.array([dataclasses.replace(SHAREGPT, context=10**9).lengths(index) for index in range(20_000)])
    assert lengths.mean(axis=0) == pytest.approx([161, 338], rel=0.05)
    assert np.log(lengths[:, 1]).std() == pytest.approx(SIGMAS[1], rel=0.03)
    assert np.log(lengths[lengths[:, 0] > 3, 0]).mean() == pytest.approx(np.log(161) - SIGMAS[0] ** 2 / 2, rel=0.03)
    assert np.corrcoef(lengths.T)[0, 1] == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("prefix_len", [0, 100])
def test_drawn_lengths_fit_the_context(prefix_len: int) -> None:
    cut = dataclasses.replace(SHAREGPT, context=256, prefix_len=prefix_len)
    lengths = np.array([cut.lengths(index) for index in range(2_000)])
    assert lengths.min() >= 1
    assert lengths[:, 0].max() == (256 - prefix_len) * 3 // 4
    assert lengths.sum(axis=1).max() == 256 - prefix_len


def test_prompts_follow_from_seed_point_and_index_and_lengths_not_from_the_point() -> None:
    one = workload()
    assert one.prompt(1, 3) == workload().prompt(1, 3)
    others = [one.prompt(2, 3), one.prompt(1, 4), workload(seed=1).prompt(1, 3)]
    assert all(other != one.prompt(1, 3) for other in others)
    prompt = workload(input_len=5000).prompt(1, 0)
    assert len(prompt) == 5000
    assert set(prompt) == set(range(100))
    assert SHAREGPT.lengths(5) == SHAREGPT.lengths(5) != SHAREGPT.lengths(6)


def test_the_prefix_is_the_same_for_all_and_comes_in_addition() -> None:
    prompts = [workload(prefix_len=10).prompt(point, index) for point in (0, 1) for index in range(3)]
    assert {len(prompt) for prompt in prompts} == {26}
    assert len({tuple(prompt[:10]) for prompt in prompts}) == 1
    assert len({tuple(prompt[10:]) for prompt in prompts}) == 6


def test_a_file_gives_texts_and_lengths_in_order_and_again() -> None:
    lines = ['{"prompt": "one"}', "", '{"input_len": 3, "output_len": 4}', '{"prompt": "x", "output_tokens": 9}']
    from_file = workload(dataset="f.jsonl", entries=read_entries(lines, "f.jsonl"))
    from_file.check()
    assert [from_file.lengths(index) for index in range(4)] == [(0, 8), (3, 4), (0, 9), (0, 8)]
    prompts = [from_file.prompt(1, index) for index in range(4)]
    assert (prompts[0], len(prompts[1]), prompts[2], prompts[3]) == ("one", 3, "x", "one")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is no JSON"),
        ("[]", "line 1: has to be an object"),
        ("{}", "line 1: has to be an object"),
        ('{"text": "a"}', "line 1: has to be an object"),
        ('{"prompt": ""}', "line 1: prompt"),
        ('{"prompt": "a", "input_len": 3}', "line 1: prompt and input_len"),
        ('{"output_len": 0}', "line 1: output_len has to be a whole number of at least 1, got 0"),
        ('{"input_len": true}', "line 1: input_len"),
        ("", "has no lines"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_entries([line], "f")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_len": 1000, "output_len": 100}, "1000 in and 100 out do not fit into the context of 1024"),
        ({"prefix_len": 1023}, "--prefix-len: leaves no room"),
        ({"prefix_len": 1010}, "less a prefix of 1010"),
        ({"prefix_len": 1, "entries": (Entry("a"),)}, "--prefix-len: random tokens"),
        ({"vocab_size": 0}, "vocabulary"),
        ({"entries": (Entry("a"), Entry("a", None, 2000))}, "1 in and 2000 out"),
    ],
)
def test_lengths_that_the_model_cannot_have_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload(**changes).check()


def test_a_job_survives_json() -> None:
    full = workload(entries=(Entry("a", None, 3), Entry(None, 2)), sigmas=(1.0, 0.5))
    job = Job(Connection(("a:1", "b:2"), TLS("ca"), "key"), full, {"top_p": 0.5}, "session", 2, 3, 4.5)
    assert Job.from_json(job.to_json()) == job
    plain = Job(Connection(("a:1",)), workload(), {})
    assert Job.from_json(plain.to_json()) == plain
