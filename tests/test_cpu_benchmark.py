"""bench/cpu.py on a tiny model: it runs with what is installed, says what is not, and records what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_systems_take_turns_and_the_absent_ones_are_named(tmp_path: Path) -> None:
    out = tmp_path / "cpu.jsonl"
    command = [sys.executable, "bench/cpu.py", "--shape", "tiny", "--contenders", "octavo,octavo-stream,vllm"]
    command += ["--batches", "2", "--repeats", "1", "--new-tokens", "8", "--threads", "1"]
    command += ["--peers", str(tmp_path), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run, *records = [json.loads(line) for line in out.read_text().splitlines()]
    assert run["cpu"] and run["cores"] and run["contenders"]["octavo"]["versions"]["torch"]
    assert list(run["absent"]) == ["vllm"]
    cells = {record["contender"]: record for record in records if record["record"] == "cell"}
    assert sorted(cells) == ["octavo", "octavo-stream"]
    assert all(len(cell["seconds"]) == 1 for cell in cells.values())
    assert [(r["first"], r["second"]) for r in records if r["record"] == "ratio"] == [("octavo-stream", "octavo")]
    assert str(ROOT) not in out.read_text()
