"""bench/parameters.py runs, on a tiny model, and records what each parameter costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_parameter_gets_a_ratio_beside_plain_requests(tmp_path: Path) -> None:
    out = tmp_path / "parameters.jsonl"
    command = [sys.executable, "bench/parameters.py", "--shape", "tiny", "--batch", "4"]
    command += ["--rounds", "1", "--steps", "2", "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run, *records = [json.loads(line) for line in out.read_text().splitlines()]
    assert run["cpu"] and run["batch"] == 4
    assert len(records) > 30 and records[0]["parameter"] == "nothing"
    assert all(record["all"]["median"] > 0 and record["one"]["median"] > 0 for record in records)
    assert all(record["others"]["interval"][0] <= record["others"]["median"] for record in records)
    assert str(ROOT) not in out.read_text()
