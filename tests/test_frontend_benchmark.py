"""bench/frontend.py runs: real front-ends over a mock core, the bare server, and every token arrives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_side_delivers_and_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "frontend.jsonl"
    command = [sys.executable, "bench/frontend.py", "--smoke", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run, *cells = [json.loads(line) for line in out.read_text().splitlines()]
    assert run["cpu"] and run["versions"]["grpcio"]
    sides = [(cell["shape"], cell["side"], cell["frontends"]) for cell in cells]
    assert sides == [("session", "octavo", 2), ("stream", "bare", 1), ("stream", "octavo", 1)]
    for cell in cells:
        assert cell["median"]["tokens_per_second"] > 0 and cell["median"]["server_us_per_message"] >= 0
    assert str(ROOT) not in out.read_text()
