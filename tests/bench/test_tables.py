"""bench/tables.py: the documents are what it would write, and every kind of table is made of records as they are."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADER = {"time": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "cpu": "CPU", "cores": 2}
RATIO = {"record": "ratio", "median": 1.5, "least": 1.0, "most": 2.0, "turns": 5}
RUNS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "offline": (
        [
            {"record": "cell", "contender": "octavo", "workload": "11/64", "output_tokens_per_second": 99.6},
            {"record": "cell", "contender": "octavo", "workload": "prefill", "output_tokens_per_second": 2.0}
            | {"total_tokens_per_second": 1802.0},
            RATIO | {"first": "octavo", "second": "vllm", "workload": "11/64"},
        ],
        "| output tokens/s; ratios | 11/64 | prefill (all tokens) |\n| --- | --- | --- |\n"
        "| octavo | 100 | 1802 |\n| octavo / vllm | 1.50 (1.00 to 2.00) | - |",
    ),
    "step": (
        [
            {"record": "cell", "batch": 4, "context": 64, "step": 2.0, "p10": 1.9, "p90": 2.5, "device": 1.5}
            | {"bubble": 0.25, "floor": 1.0, "tokens_per_second": 2000.0}
        ],
        "| 4 | 64 | 2.000 (1.900 to 2.500) | 1.500 | 25.0% | 1.000 | 50% | 2000 |",
    ),
    "prefix": (
        [
            {"record": "cell", "cache": "on", "output_tokens_per_second": 50.2, "first_token_p50_ms": 3.2}
            | {"first_token_p99_ms": 9.9, "hit_rate": 0.876},
            RATIO | {"first": "on", "second": "off"},
        ],
        "| on | 50 | 3 / 10 | 0.88 |\n| on / off | 1.50 (1.00 to 2.00) |  |  |",
    ),
    "quality": (
        [
            {"record": "setting", "name": "A", "setting": "dtype=float32", "perplexity": 75.2},
            {"record": "comparison", "greedy_agreement": 0.5, "greedy_tokens": 64}
            | {"greedy_tokens_before_difference": 21.3, "perplexity_ratio": 1.001, "perplexity_ratio_error": 0.002},
        ],
        "| A | dtype=float32 | 75.200 |\n"
        "| B / A | 50% equal greedy tokens, 21 of 64 before the first other one | 1.0010 ± 0.0020 |",
    ),
}


PART = {"record": "part", "batch": 16, "context": 64, "ms": 4.0, "share": 0.25}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import tables

    return tables


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Two runs, of which the first is to be ignored."""
    text = ""
    for time in ("2025-01-01T00:00:00+00:00", HEADER["time"]):
        rows = [{"record": "run", **HEADER, "time": time}, *(line | {"run": time} for line in lines)]
        text += "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)


def test_documents_are_what_their_records_say(tables: ModuleType) -> None:
    for path in tables.DOCUMENTS:
        text = path.read_text()
        assert tables.SECTION.search(text), f"{path.name} has no table"
        assert text == tables.rewritten(text, tables.RESULTS), "run: python bench/tables.py"


def test_parts_of_a_step_are_shares_and_parts_of_their_floors(tables: ModuleType, tmp_path: Path) -> None:
    write(tmp_path / "step.jsonl", [PART | {"name": "qkv", "floor": 3.0}, PART | {"name": "update", "floor": None}])
    with (tmp_path / "step.jsonl").open("a") as later:  # a run without parts, as on a GPU
        later.write(json.dumps({"record": "run", **HEADER, "commit": "later"}) + "\n")
    text = tables.step_parts(tmp_path)
    assert "later" not in text
    assert "| part | share, batch 16, context 64 | of floor |" in text
    assert "| qkv | 25.0% | 75% |\n| update | 25.0% |  |" in text


@pytest.mark.parametrize("name", RUNS)
def test_table_of_the_newest_run(tables: ModuleType, tmp_path: Path, name: str) -> None:
    lines, expected = RUNS[name]
    write(tmp_path / f"{name}.jsonl", lines)
    text = tables.rewritten(f"before\n<!-- table:{name} -->\nold\n<!-- end -->\nafter", tmp_path)
    assert expected in text and "old" not in text and text.startswith("before\n") and text.endswith("\nafter")
    assert "CPU, 2 cores, commit 0123456789ab, 2026-01-02." in text
    assert tables.rewritten(text, tmp_path) == text


def test_table_of_the_scheduler(tables: ModuleType, tmp_path: Path) -> None:
    cell = {"scenario": "steady", "requests": 256, "median": 134.2, "p10": 125.0, "p90": 415.0}
    line = {"bench": "scheduler", **HEADER, "results": [cell, cell | {"scenario": "churn"}]}
    (tmp_path / "scheduler.jsonl").write_text(json.dumps(line) + "\n")
    assert "| steady | 134 (125 to 415) |\n| churn |" in tables.scheduler(tmp_path)
    assert "| `scheduler.jsonl` | `python bench/scheduler.py` | CPU | 2 | 0123456789ab |" in tables.runs(tmp_path)
