"""bench/speculation.py runs, on a tiny model, and records a ratio for each kind of text and batch size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_turns_with_and_without_drafts_give_the_same_tokens(tmp_path: Path) -> None:
    out = tmp_path / "speculation.jsonl"
    command = [sys.executable, "bench/speculation.py", "--shape", "tiny", "--batch", "1", "2", "--rounds", "2"]
    command += ["--new-tokens", "12", "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run, *records = [json.loads(line) for line in out.read_text().splitlines()]
    assert run["cpu"] and run["drafts"] == 8
    assert [(record["kind"], record["batch"]) for record in records] == [
        ("repetitive", 1), ("repetitive", 2), ("sampled", 1), ("sampled", 2),
    ]  # fmt: skip
    assert all(record["ratio"] > 0 and 0 <= record["acceptance"] <= 1 for record in records)
