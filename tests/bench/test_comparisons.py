"""quality.py, ab.py, and the parts that the benches share: lengths, static batches, intervals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "peers"))
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


def run(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"bench/{program}.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def test_quality_sees_what_int8_costs(tmp_path: Path) -> None:
    out = tmp_path / "quality.jsonl"
    settings = ["--a", "device=cpu,dtype=float32", "--b", "device=cpu,dtype=bfloat16,quantization=int8"]
    done = run("quality", *settings, "--window", "64", "--windows", "2", "--new", "8", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    run_, first, _, comparison = [json.loads(line) for line in out.read_text().splitlines()]
    assert run_["settings"]["model"] == "demo" and comparison["tokens"] == 2 * 63
    assert 5 < first["perplexity"] < 500
    assert abs(comparison["perplexity_ratio"] - 1) < 0.05 and 0 < comparison["logprob_difference_mean"] < 0.5


def test_ab_takes_turns_and_names_a_difference(tmp_path: Path) -> None:
    for name, value in (("a", 2.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "number.py").write_text(f"import sys\nprint('said')\nprint({value}, *sys.argv[1:])\n")
    out = tmp_path / "ab.jsonl"
    sides = [str(tmp_path / "a"), str(tmp_path / "b")]
    done = run("ab", "--repeats", "6", "--out", str(out), *sides, "number.py")
    assert done.returncode == 0, done.stdout + done.stderr
    _, line = [json.loads(line) for line in out.read_text().splitlines()]
    assert line["ratio"] == 1.5 and line["interval"] == [1.5, 1.5] and line["noise"] is False
    assert run("ab", "--repeats", "1", *sides, "number.py", "more").returncode == 1, "the last line is no number"
    assert "neither" in run("ab", "no-such-commit", sides[0], "number.py").stderr


def test_ab_calls_equal_versions_noise(capsys: pytest.CaptureFixture[str]) -> None:
    import ab

    times = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02]
    [line] = ab.compare([{"": value} for value in times], [{"": value} for value in times[::-1]])
    assert line["noise"] is True and "noise" in capsys.readouterr().out
    [line] = ab.compare([{"": 1.0}] * 5, [{"": 2.0}] * 5)
    assert line["noise"] is None


def test_chat_lengths_are_those_of_their_seed_and_fit_the_model() -> None:
    import workloads

    committed = json.loads(workloads.CHAT_LENGTHS.read_text())["lengths"]
    assert committed == [list(pair) for pair in workloads.make_chat_lengths()]
    assert max(map(sum, committed)) <= 1024 and len(committed) == 1024
    for workload in workloads.WORKLOADS.values():
        assert all(prompt + new <= 1024 for prompt, new in workload.lengths(0.1))
    assert len(workloads.WORKLOADS["single"].lengths(100)) == 1


def test_static_batches_hold_every_prompt_once_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    worker_loop: ModuleType = __import__("worker_loop")
    monkeypatch.setattr(worker_loop, "STATIC_BATCH_TOKENS", 100)
    prompts: list[list[int]] = [[0] * size for size in (5, 30, 7, 60, 5, 9)]
    wanted = [10, 20, 5, 90, 10, 3]
    batches: list[list[int]] = worker_loop.static_batches(prompts, wanted)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        size = len(batch) * (max(len(prompts[i]) for i in batch) + wanted[batch[0]])
        assert size <= 100 or len(batch) == 1
        assert wanted[batch[0]] == max(wanted[i] for i in batch)


def test_intervals_of_the_median_hold_it_and_are_reproducible() -> None:
    import turns

    values: list[Any] = [1.0, 1.2, 1.1, 0.9, 1.3]
    low, high = turns.interval(values)
    assert 0.9 <= low <= 1.1 <= high <= 1.3 and turns.interval(values) == (low, high)
