"""bench/parameters.py runs, on a tiny model, and records a ratio for each parameter and number of users."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_parameter_gets_a_ratio_beside_plain_requests(tmp_path: Path) -> None:
    out = tmp_path / "parameters.jsonl"
    command = [sys.executable, "bench/parameters.py", "--shape", "tiny", "--batch", "4", "--users", "4", "1"]
    command += ["--rounds", "1", "--steps", "2", "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run, *records = [json.loads(line) for line in out.read_text().splitlines()]
    assert run["cpu"] and run["batch"] == 4
    assert len(records) > 60 and all(record["ratio"] > 0 for record in records)
    assert [record["users"] for record in records[:2]] == [4, 1]
    assert str(ROOT) not in out.read_text()
