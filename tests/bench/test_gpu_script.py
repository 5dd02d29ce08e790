"""bench/gpu.sh without a GPU: every part's command is right, and its limits hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PYTHON": sys.executable, "OUT": str(out), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", "bench/gpu.sh", *arguments],
        cwd=ROOT,
        env=os.environ | variables | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


BENCHMARKS = ["step", "dependent-launch", "offline", "serve", "prefix", "speculation", "quality", "kernels"]
OTHERS = ["tests", "model", "gpu-tests", "gate", "ceilings"]


@pytest.mark.parametrize("parts", [BENCHMARKS, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["bench", "others"])
def test_dry_run_of_every_part(parts: list[str], tmp_path: Path) -> None:
    done = run("--dry", *parts, out=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    marks = done.stdout.count("\n== ") + done.stdout.startswith("== ")
    assert marks == 2 * len(parts), "each part has a beginning and a time"
    written = {path.stem.replace("_", "-") for path in tmp_path.iterdir()}
    assert written == set(parts) & set(BENCHMARKS)


def test_no_part_is_forgotten() -> None:
    default = re.search(r"parts=\((tests .*)\)", (ROOT / "bench" / "gpu.sh").read_text())
    assert default and set(default.group(1).split()) == {*BENCHMARKS, *OTHERS}


def test_a_wrong_part_is_named_and_nothing_runs_without_a_gpu(tmp_path: Path) -> None:
    done = run("--dry", "no-such", out=tmp_path)
    assert done.returncode == 1 and "no part no-such" in done.stdout
    assert run("step", out=tmp_path).returncode == 2


@pytest.mark.slow
def test_gate_passes_on_the_cpu_with_larger_batches() -> None:
    command = [sys.executable, "bench/gate.py", "--device", "cpu", "--shape", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "32 of 32" in done.stdout and "passed" in done.stdout
