"""bench/kernels.py in Triton's interpreter: every case of every bench runs, agrees with its peers, and is recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ["decode", "shared", "sampling", "norm", "linear", "layer", "prefill"]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench") / "kernels.jsonl"
    command = [sys.executable, "bench/kernels.py", "--interpret", "--seconds", "1000", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert str(ROOT) not in out.read_text()
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_bench_runs_every_contender_of_ours(records: list[dict[str, Any]]) -> None:
    rest, end = records[1:], records[-1]
    assert end["record"] == "end" and end["faults"] == end["wrong"] == end["left_out"] == []
    ours = {(r["bench"], r["contender"]) for r in rest if r["record"] == "time" and r["contender"].startswith("octavo")}
    assert {bench for bench, _ in ours} == set(BENCHES)
    assert {name for bench, name in ours if bench == "decode"} == {
        "octavo",
        "octavo dot",
        "octavo block 16",
        "octavo block 64",
        "octavo fp8 cache",
    }


def test_results_agree_with_torch(records: list[dict[str, Any]]) -> None:
    compared = [r for r in records if r["record"] == "time" and r["differs"] is not None]
    assert {r["bench"] for r in compared} == {"decode", "shared", "sampling", "norm", "linear", "prefill"}
    assert max(r["differs"] for r in compared) < 5e-3


def test_records_name_machine_versions_and_that_times_are_invented(records: list[dict[str, Any]]) -> None:
    run = records[0]
    assert run["record"] == "run" and run["device"] == "interpreter"
    assert run["torch"] and run["triton"] and run["commit"]
    times = [r for r in records if r["record"] == "time"]
    assert times and all(r["invented"] and r["of_ceiling"] > 0 and r["bytes"] > 0 for r in times)


def test_torch_takes_part_wherever_it_is_asked(records: list[dict[str, Any]]) -> None:
    """Its result is what ours is compared with."""
    assert not [r for r in records if r["record"] == "absent" and r["contender"].startswith(("torch", "flex"))]


def test_peers_that_need_a_gpu_are_recorded_as_absent(records: list[dict[str, Any]]) -> None:
    absent = {r["contender"] for r in records if r["record"] == "absent"}
    assert absent >= {"FlashInfer", "vLLM Triton unified"}


def test_without_a_gpu_nothing_is_measured() -> None:
    command = [sys.executable, "bench/kernels.py", "norm", "--out", ""]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no CUDA device" in done.stderr
