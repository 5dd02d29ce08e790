"""bench/cpu_kernels.py runs and records every contender of a case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_contenders_of_a_case_are_measured_and_recorded(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    command = [sys.executable, "bench/cpu_kernels.py", "--only", "argmax", "--repeats", "1", "--threads", "1"]
    subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, check=True)
    run, *cases = [json.loads(line) for line in out.read_text().splitlines()]
    assert run["cpu"] and {case["case"] for case in cases} == {f"argmax, {rows} rows" for rows in (1, 16, 64)}
    assert {case["contender"] for case in cases} == {"numpy", "C"}
    assert all(0 < case["least"] <= case["median"] <= case["most"] for case in cases)


def test_without_the_kernels_there_are_no_layers_to_measure() -> None:
    command = [sys.executable, "bench/cpu_kernels.py", "--only", "layers", "--repeats", "1", "--out", ""]
    environment = os.environ | {"OCTAVO_NATIVE": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "layers" not in done.stdout
