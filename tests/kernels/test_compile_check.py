"""The compile check, on kernels with one fault each (`compile_cases.py`): it sees every fault and every regression."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from octavo_kernels import compile_check
from octavo_kernels.compile_check import (
    JUDGED,
    Measured,
    collect,
    dependence,
    dependents,
    failures,
    instructions,
    read_baseline,
    regressions,
    write_baseline,
)
from octavo_kernels.variant import Variant

TESTS = Path(__file__).resolve().parents[1]
MEASURED = Measured(
    registers=100,
    spills=0,
    stack=0,
    shared=4096,
    loads16=4,
    loads=4,
    wgmma=0,
    tcgen05=0,
    mma=8,
    cp_async=0,
    barriers=1,
    shuffles=0,
)


def run(*arguments: object, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    """The command, in a process where kernels are compiled, not interpreted."""
    command = [sys.executable, "-m", "octavo_kernels.compile_check", "--families", "kernels.compile_cases", "--jobs=1"]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": path}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )


def variant(**fields: Any) -> Variant:
    return Variant("case", None, {"x_ptr": "*bf16"}, **fields)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """All cases for sm_90, and the baseline that the run wrote."""
    baseline = tmp_path_factory.mktemp("compile") / "baseline.json"
    return run("--capabilities", 90, "--baseline", baseline, "--update"), baseline


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("unknown stride", "none of 8 loads is 16 bytes wide"),
        ("small dot", "no wgmma"),
        ("no dot", "no tensor core instruction"),
        ("spills", "spill instructions"),
        ("hurry dependent", "does not wait on every path, or does not let the next kernel start"),
        ("hurry dependent", "1 loads and 0 writes before the wait, 0 loads of weights expected"),
    ],
)
def test_each_fault_is_named_and_fails(
    checked: tuple[subprocess.CompletedProcess[str], Path], name: str, fault: str
) -> None:
    done, _ = checked
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(
        line.startswith(f"FAILED case/{name} sm_90: ") and line.endswith(fault) for line in done.stdout.splitlines()
    )


def test_sound_kernels_pass_and_are_counted(checked: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, baseline = checked
    assert "FAILED case/good" not in done.stdout and "FAILED case/dot" not in done.stdout
    rows = read_baseline(baseline)["variants"]
    assert rows["case/dot"]["sm_90"]["wgmma"] > 0
    assert rows["case/good"]["sm_90"]["loads16"] == rows["case/good"]["sm_90"]["loads"] == 1
    assert rows["case/good"]["sm_90"]["registers"] > 0


def test_a_regression_against_the_baseline_fails(
    checked: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    record = read_baseline(checked[1])
    same, fewer = tmp_path / "same.json", tmp_path / "fewer.json"
    same.write_text(json.dumps(record))
    record["variants"]["case/good"]["sm_90"]["registers"] = 1
    fewer.write_text(json.dumps(record))
    assert run("--capabilities", 90, "--only", "good", "--baseline", same).returncode == 0
    done = run("--capabilities", 90, "--only", "good", "--baseline", fewer)
    assert done.returncode == 1 and "FAILED case/good sm_90: registers 1 -> " in done.stdout


def test_a_variant_that_the_baseline_lacks_fails(tmp_path: Path) -> None:
    done = run("--capabilities", 90, "--only", "good", "--baseline", tmp_path / "none.json")
    assert done.returncode == 1 and "FAILED case/good sm_90: not in the baseline" in done.stdout


def test_interpreted_kernels_are_refused() -> None:
    done = run(interpret="1")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr


def test_tolerance_lets_small_differences_pass() -> None:
    assert regressions(replace(MEASURED, registers=108), {"registers": 100}) == []
    assert regressions(replace(MEASURED, registers=109), {"registers": 100}) == ["registers 100 -> 109"]
    assert regressions(replace(MEASURED, shared=5121), {"shared": 4096}) == ["shared 4096 -> 5121"]
    assert regressions(replace(MEASURED, spills=1), {"spills": 0}) == ["spills 0 -> 1"]
    assert regressions(replace(MEASURED, registers=90), {"registers": 100}) == []


def test_what_no_tool_could_read_is_not_compared() -> None:
    unread = replace(MEASURED, registers=None, spills=None, stack=None)
    assert regressions(unread, {"registers": 100, "spills": 0}) == []
    assert failures(variant(), 90, unread) == []


def test_tensor_cores_of_each_capability_count() -> None:
    for capability, field in ((80, "mma"), (90, "wgmma"), (100, "tcgen05"), (100, "mma")):
        measured = replace(MEASURED, **({"mma": 0, field: 4}))
        assert failures(variant(mma="wgmma"), capability, measured) == []
    assert failures(variant(mma="wgmma"), 90, MEASURED) == ["no wgmma"]
    assert failures(variant(mma="mma"), 80, replace(MEASURED, mma=0)) == ["no tensor core instruction"]


def test_instructions_are_counted_by_width() -> None:
    ptx = """
        ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v8.b32 { %r1 }, [ %rd1 + 0 ];
        ld.global.b32 { %r1 }, [ %rd1 + 0 ];
        ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r9;
        cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4;
        wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 ...
    """
    counted = instructions(ptx)
    assert (counted["loads"], counted["loads16"], counted["cp_async"], counted["wgmma"]) == (6, 3, 2, 1)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mov; griddepcontrol.wait; griddepcontrol.launch_dependents; ld.global.b32; ret;", (1, 1, 0, 0)),
        ("ld.param.b64; prefetch.global.L2 [a]; griddepcontrol.wait; st.global.b32;", (1, 0, 0, 0)),
        ("ld.global.L1::evict_last.v4.b32; cp.async.cg.shared.global [a]; griddepcontrol.wait;", (1, 0, 2, 0)),
        ("st.global.b32; atom.acq_rel.gpu.global.add; griddepcontrol.wait;", (1, 0, 0, 2)),
        ("@%p1 bra $L1; griddepcontrol.wait;", (0, 0, 0, 0)),
        ("@%p1 ret; griddepcontrol.wait;", (0, 0, 0, 0)),
        ("ld.global.b32; st.global.b32; ret;", (0, 0, 0, 0)),
    ],
)
def test_what_comes_before_the_wait_is_counted(body: str, expected: tuple[int, ...]) -> None:
    assert tuple(dependence(f".entry kernel() {{ {body} }}")[field] for field in JUDGED) == expected


def test_every_kernel_of_a_step_has_one_variant_for_dependent_launch() -> None:
    """But for those with tensor cores of two kinds."""
    names = [name.removesuffix(" dependent") for name in dependents(collect())]
    families = {name.split("/")[0].split()[0] for name in names}
    assert families == {"embed", "history", "inputs", "kv_write", "linear", "norm", "paged_attention", "sampling"}
    assert len(names) <= 20


def test_baseline_survives_writing_and_reading(tmp_path: Path) -> None:
    rows = {"a": {"sm_80": {"registers": 1}, "sm_100": {"registers": 2}}, "b": {"sm_90": {"registers": None}}}
    write_baseline(tmp_path / "b.json", rows)
    assert read_baseline(tmp_path / "b.json") == {"compiler": compile_check.compiler(), "variants": rows}


def test_an_update_of_one_family_keeps_the_rows_of_others(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    write_baseline(path, {"a": {"sm_80": {"registers": 1}}, "b": {"sm_90": {"registers": 2}}, "old": {"sm_90": {}}})
    compile_check.update(path, read_baseline(path), {"b": {"sm_80": {"registers": 3}}, "c": {"sm_90": {}}}, ["old"])
    assert read_baseline(path)["variants"] == {
        "a": {"sm_80": {"registers": 1}},
        "b": {"sm_90": {"registers": 2}, "sm_80": {"registers": 3}},
        "c": {"sm_90": {}},
    }


def test_committed_baseline_has_no_spill() -> None:
    rows = read_baseline(compile_check.BASELINE)["variants"]
    assert rows
    spilling = [name for name, row in rows.items() if any(measured["spills"] != 0 for measured in row.values())]
    assert spilling == []
