"""offline.py, serve.py and prefix.py on a tiny model: they run with what is installed and record what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, *options: str, out: Path) -> list[dict[str, Any]]:
    """Its records."""
    command = [sys.executable, f"bench/{program}.py", "--shape", "tiny", "--threads", "1", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(ROOT) not in out.read_text()
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_offline_takes_turns_with_the_tokens_of_fp32(tmp_path: Path) -> None:
    contenders = ["--contenders", "octavo,octavo-fp32,vllm,transformers", "--peers", str(tmp_path)]
    options = ["--workloads", "chat", "--scale", "0.004", "--repeats", "1"]
    run_, *lines = run("offline", *contenders, *options, out=tmp_path / "offline.jsonl")
    assert run_["device"] == "cpu" and list(run_["absent"]) == ["vllm"]
    cells = {(line["contender"], line["workload"]): line for line in lines if line["record"] == "cell"}
    assert len(cells) == 3 and all(len(cell["seconds"]) == 1 for cell in cells.values())
    assert cells["octavo-fp32", "chat"]["agreement_with_fp32"] == 1, "the reference only answers for the check"
    ratios = {(line["first"], line["second"]) for line in lines if line["record"] == "ratio"}
    assert ratios == {("octavo", "transformers")}
    assert not [line for line in lines if line["record"] == "target"], "targets are for an H100"


def test_serve_compares_grpc_with_in_process(tmp_path: Path) -> None:
    contenders = ["--contenders", "octavo,octavo-stream,octavo-session,octavo-unary"]
    options = ["--workloads", "11/64", "--concurrency", "2", "--rounds", "2", "--repeats", "1", "--kv-gib", "1"]
    run_, *lines = run("serve", *contenders, *options, out=tmp_path / "serve.jsonl")
    assert run_["settings"]["concurrency"] == 2
    assert {line["requests"] for line in lines if line["record"] == "cell"} == {4}
    targets = {line["what"] for line in lines if line["record"] == "target"}
    assert targets == {"11/64, octavo-stream / octavo", "11/64, octavo-session / octavo"}


def test_prefix_finds_shared_prompts_and_changes_no_token(tmp_path: Path) -> None:
    options = ["--shared", "64", "--own", "8", "--new", "4", "--requests", "16", "--repeats", "2"]
    run_, *lines = run("prefix", *options, out=tmp_path / "prefix.jsonl")
    assert run_["dtype"] == "float32"
    cells = {line["cache"]: line for line in lines if line["record"] == "cell"}
    assert cells["on"]["hit_rate"] > 0.3 and cells["off"]["hit_rate"] == 0
    assert cells["on"]["first_token_p50_ms"] > 0
    assert [line["equal_tokens"] for line in lines if line["record"] == "ratio"] == [1]
