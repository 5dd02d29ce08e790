"""Compiles every kernel variant that the engine launches, without a GPU, and checks what came out.

    python -m octavo_kernels.compile_check                      sm_80, sm_90 and sm_100 against the baseline
    python -m octavo_kernels.compile_check --capabilities 90 --only paged_attention
    python -m octavo_kernels.compile_check --update             makes what came out the new baseline

Prints one line per variant and capability: registers, spills, shared memory, instruction kinds. Exits with 1 on

- a spill (a load or store of local memory in the machine code),
- a missing instruction that the variant names: tensor cores, 16-byte loads,
- a variant for dependent launch that touches global memory before it has waited, or could end without waiting,
- more registers or shared memory than in compile_baseline.json, beyond TOLERANCE, or a variant that it lacks or that
  is gone. Another version of Triton's compiler gives other numbers: then these are printed and not compared.

Registers and spills are read with the cuobjdump that Triton's wheel brings. Where that cannot read a cubin of some
capability they are "?", reported as not checked, and never count as passed.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from octavo_kernels.variant import Variant

FAMILIES = (
    "paged_attention",
    "kv_write",
    "embed",
    "norm",
    "linear",
    "inputs",
    "history",
    "sampling",
    "logprobs",
)
"""Modules of this package with a compile_variants()."""
CAPABILITIES = (80, 90, 100)
BASELINE = Path(__file__).with_name("compile_baseline.json")
TOLERANCE = {"registers": (8, 0.05), "shared": (1024, 0.05)}
"""What may be added to a value of the baseline: so much, or such a part of it, whichever is more."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the compiler made of one variant for one capability."""

    registers: int | None
    """Per thread; None where cuobjdump could not tell, as are spills and stack."""
    spills: int | None
    """Instructions that load or store local memory."""
    stack: int | None
    """Bytes per thread."""
    shared: int
    """Bytes per program, static and dynamic."""
    loads16: int
    """Loads from global memory of 16 bytes or more, cp.async included."""
    loads: int
    """All loads from global memory, cp.async included."""
    wgmma: int
    """Warp-group products of sm_90."""
    tcgen05: int
    """Products of sm_100's tensor memory."""
    mma: int
    """mma.sync: the tensor cores of every capability."""
    cp_async: int
    barriers: int
    shuffles: int
    waits: int = 0
    """For the kernel in front, of a dependent launch; on all paths, since one that a branch can miss does not count."""
    releases: int = 0
    """Of the next kernel."""
    early_loads: int = 0
    """From global memory before the wait; 0 without one."""
    early_writes: int = 0


JUDGED: Final = ("waits", "releases", "early_loads", "early_writes")
"""What is right or wrong by itself, hence not in the baseline."""


# ---------------------------------------------------------------------------------------------------------------------
# What is to be compiled
# ---------------------------------------------------------------------------------------------------------------------


def collect(families: Iterable[str] = FAMILIES) -> dict[str, Variant]:
    """Every variant by name. A family is a module of this package, or any module by its full name.

    Raises ModuleNotFoundError for a family that does not exist, ValueError for two variants of one name.
    """
    found: dict[str, Variant] = {}
    for family in families:
        module = importlib.import_module(family if "." in family else f"octavo_kernels.{family}")
        for variant in module.compile_variants():
            if variant.name in found:
                raise ValueError(f"{family}: two variants are named {variant.name!r}")
            found[variant.name] = variant
    return found | dependents(found)


def dependents(variants: Mapping[str, Variant]) -> dict[str, Variant]:
    """The first variant of every kernel that has one, and of every use of tensor cores, compiled for dependent launch.
    They are compiled for sm_90 alone: what is checked is the kernel's text."""
    first: dict[tuple[str, str | None], Variant] = {}
    for variant in variants.values():
        if "DEPENDENT_LAUNCH" in variant.constexprs:
            first.setdefault((_kernel_name(variant), variant.mma), variant)
    twins = [
        replace(one, name=f"{one.name} dependent", constexprs=one.constexprs | {"DEPENDENT_LAUNCH": True})
        for one in first.values()
    ]
    return {twin.name: twin for twin in twins}


def covering(variants: Mapping[str, Variant]) -> list[str]:
    """The first variant of every kernel, and of every use of tensor cores."""
    first: dict[tuple[str, str | None], str] = {}
    for name, variant in variants.items():
        first.setdefault((_kernel_name(variant), variant.mma), name)
    return list(first.values())


def _kernel_name(variant: Variant) -> str:
    return str(getattr(variant.kernel, "__name__", variant.kernel))


# ---------------------------------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------------------------------


def measure(variant: Variant, capability: int) -> Measured:
    """Compiles for compute capability 80, 90 or 100. Raises whatever Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sorted(variant.divisible)},
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fp_fusion,
        "maxnreg": variant.max_registers,
        "launch_pdl": variant.dependent,
    }
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = resources(built.asm["cubin"])
    ptx = built.asm["ptx"]
    return Measured(shared=int(built.metadata.shared), **usage, **instructions(ptx), **dependence(ptx))


def instructions(ptx: str) -> dict[str, int]:
    """How often PTX code names the instructions that matter."""
    loads = re.findall(r"\bld\.global\S*", ptx)
    wide = re.compile(r"\.(v4\.[buf]32|v2\.[buf]64|v8\.[buf]32|v4\.[buf]64|b128)$")
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(\w+)", ptx)
    return {
        "loads": len(loads) + len(copies),
        "loads16": sum(bool(wide.search(load)) for load in loads) + sum(int(size, 0) >= 16 for size in copies),
        "wgmma": len(re.findall(r"\bwgmma\.mma_async", ptx)),
        "tcgen05": len(re.findall(r"\btcgen05\.mma", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "cp_async": len(copies),
        "barriers": len(re.findall(r"\b(?:bar|barrier)\.\S*sync", ptx)),
        "shuffles": len(re.findall(r"\bshfl\.sync", ptx)),
    }


def dependence(ptx: str) -> dict[str, int]:
    """The fields in JUDGED. Up to the wait the code has to run straight: else some program could miss it."""
    entry = re.sub(r"//.*", "", ptx[max(ptx.find(".entry"), 0) :])
    before, wait, _ = entry.partition("griddepcontrol.wait")
    straight = bool(wait) and not re.search(r"\bbra\b|\bret\b|\bexit\b|\bcall\b", before)
    return {
        "waits": int(straight),
        "releases": len(re.findall(r"\bgriddepcontrol\.launch_dependents", entry)),
        "early_loads": len(re.findall(r"\b(?:ld|cp\.async)\.(?:[\w:]+\.)*global", before)) if wait else 0,
        "early_writes": len(re.findall(r"\b(?:st|atom|red)\.(?:\w+\.)*global", before)) if wait else 0,
    }


def resources(cubin: bytes) -> dict[str, int | None]:
    """Registers, stack and spills of machine code, None each where cuobjdump is missing or cannot read it."""
    tool = cuobjdump()
    unknown: dict[str, int | None] = {"registers": None, "stack": None, "spills": None}
    if tool is None:
        return unknown
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=False).stdout
            for what in ("--dump-resource-usage", "-sass")
        ]
    registers, stack = re.search(r"REG:(\d+)", dump[0]), re.search(r"STACK:(\d+)", dump[0])
    if registers and stack:
        unknown |= {"registers": int(registers[1]), "stack": int(stack[1])}
    if re.search(r"\bEXIT\b", dump[1]):  # there is a disassembly at all
        unknown["spills"] = len(re.findall(r"\b(?:STL|LDL)\b", dump[1]))
    return unknown


def cuobjdump() -> str | None:
    """Triton's own, else that of the path."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


_variants: dict[str, Variant] = {}
"""Of a worker process."""


def _begin_worker(families: Sequence[str], paths: Sequence[str]) -> None:
    sys.path[:] = paths
    _variants.update(collect(families))


def _work(job: tuple[str, int]) -> tuple[str, int, Measured | str, float]:
    """Name, capability, what was measured or why not, seconds."""
    name, capability = job
    begin = time.perf_counter()
    try:
        outcome: Measured | str = measure(_variants[name], capability)
    except Exception as error:
        outcome = f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return name, capability, outcome, time.perf_counter() - begin


def measure_all(
    families: Sequence[str], jobs: Sequence[tuple[str, int]], processes: int
) -> Iterable[tuple[str, int, Measured | str, float]]:
    """In the order of `jobs`, by processes of their own: kernels cannot be sent to them, they import the families."""
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(processes, len(jobs)))
    with ProcessPoolExecutor(workers, context, _begin_worker, (list(families), list(sys.path))) as pool:
        yield from pool.map(_work, jobs, chunksize=1)


# ---------------------------------------------------------------------------------------------------------------------
# Judging
# ---------------------------------------------------------------------------------------------------------------------


def failures(variant: Variant, capability: int, measured: Measured) -> list[str]:
    """What is wrong with it, whatever the baseline says."""
    found = []
    if measured.spills:
        found.append(f"{measured.spills} spill instructions")
    if variant.wide_loads and not measured.loads16:
        found.append(f"none of {measured.loads} loads is 16 bytes wide")
    if variant.mma == "wgmma" and capability == 90 and not measured.wgmma:
        found.append("no wgmma")
    if variant.mma and not measured.wgmma + measured.tcgen05 + measured.mma:
        found.append("no tensor core instruction")
    if variant.dependent:
        if not measured.waits or not measured.releases:
            found.append("does not wait on every path, or does not let the next kernel start")
        if measured.early_writes or measured.early_loads > variant.early_loads:
            early = f"{measured.early_loads} loads and {measured.early_writes} writes"
            found.append(f"{early} before the wait, {variant.early_loads} loads of weights expected")
    elif measured.waits:
        found.append("waits for another kernel, without dependent launch")
    return found


def regressions(measured: Measured, before: Mapping[str, Any]) -> list[str]:
    """Where it needs more than the baseline and its tolerance."""
    found = []
    for field, (absolute, relative) in TOLERANCE.items():
        now, then = getattr(measured, field), before.get(field)
        if now is not None and then is not None and now > then + max(absolute, relative * then):
            found.append(f"{field} {then} -> {now}")
    for field in ("spills", "stack"):
        now, then = getattr(measured, field), before.get(field)
        if now is not None and then is not None and now > then:
            found.append(f"{field} {then} -> {now}")
    return found


def read_baseline(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"compiler": "", "variants": {}}


def write_baseline(path: Path, variants: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """One line per variant and capability, so that a change can be read."""
    lines = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"    {json.dumps(key)}: {json.dumps(dict(row))}" for key, row in sorted(rows.items()))
        + "\n  }"
        for name, rows in variants.items()
    ]
    head = f'{{\n"compiler": {json.dumps(compiler())},\n"variants": {{\n'
    path.write_text(head + ",\n".join(lines) + "\n}\n}\n")


def compiler() -> str:
    import triton

    return f"triton {triton.__version__}"


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it", file=sys.stderr)
        return 2
    try:
        variants = collect(options.families)
    except ImportError as error:
        print(f"a family of kernels cannot be imported: {error}", file=sys.stderr)
        return 1
    wanted = [name for name in variants if fnmatch.fnmatch(name, f"*{options.only}*")]
    few = covering({name: variants[name] for name in wanted}) if options.covering else wanted
    jobs = [(name, cap) for cap in options.capabilities for name in (wanted if cap == 90 else few)]
    jobs = [(name, cap) for name, cap in jobs if cap >= variants[name].min_capability]
    jobs = [(name, cap) for name, cap in jobs if cap == 90 or not variants[name].dependent]
    if not jobs:
        print(f"no variant's name contains {options.only!r}", file=sys.stderr)
        return 2
    return check(options, variants, jobs)


def check(options: argparse.Namespace, variants: Mapping[str, Variant], jobs: Sequence[tuple[str, int]]) -> int:
    """Compiles, prints, judges, and rewrites the baseline if asked. Returns the exit status."""
    begin = time.monotonic()
    baseline = read_baseline(options.baseline)
    same_compiler = baseline["compiler"] == compiler()
    bad: list[str] = []
    unknown = 0
    found: dict[str, dict[str, dict[str, Any]]] = {}
    print(_row("", *COLUMNS))
    for name, capability, measured, seconds in measure_all(options.families, jobs, options.jobs):
        key = f"sm_{capability}"
        if isinstance(measured, str):
            problems = [measured]
        else:
            numbers = asdict(measured)
            found.setdefault(name, {})[key] = {field: numbers[field] for field in numbers if field not in JUDGED}
            unknown += measured.spills is None
            problems = failures(variants[name], capability, measured)
            before = baseline["variants"].get(name, {}).get(key)
            if before is not None and same_compiler and not options.update:
                problems += regressions(measured, before)
            if before is None and not options.update:
                problems.append("not in the baseline: look at it, then --update")
            print(_line(name, key, measured, seconds), flush=True)
        bad += [f"{name} {key}: {problem}" for problem in problems]
    gone = [name for name in baseline["variants"] if name not in variants and options.families == list(FAMILIES)]
    if not options.update:
        bad += [f"{name}: in the baseline, but no family has it any more: --update" for name in gone]
    print(f"\n{len(jobs)} compiled in {time.monotonic() - begin:.0f} s with {compiler()}")
    if unknown:
        print(f"{unknown} of them NOT checked for registers and spills: no cuobjdump here can read them")
    if not same_compiler and not options.update:
        print(f"registers and shared memory not compared: the baseline is of {baseline['compiler'] or 'nothing yet'}")
    for line in bad:
        print(f"FAILED {line}")
    if options.update:
        update(options.baseline, baseline, found, gone)
    return 1 if bad else 0


def update(
    path: Path,
    baseline: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Mapping[str, Any]]],
    gone: Collection[str],
) -> None:
    """Keeps what was not compiled this time, unless its variant is gone or it is of another compiler."""
    kept = baseline["variants"] if baseline["compiler"] == compiler() else {}
    merged = {name: {**kept.get(name, {}), **found.get(name, {})} for name in [*kept, *found] if name not in gone}
    write_baseline(path, merged)
    print(f"wrote {path.name}: {len(merged)} variants")


COLUMNS = ("regs", "spills", "shared", "ld16", "loads", "wgmma", "tcgen05", "mma", "cp.async", "bar", "shfl", "s")


def _line(name: str, key: str, m: Measured, seconds: float) -> str:
    cells = (m.registers, m.spills, m.shared, m.loads16, m.loads, m.wgmma, m.tcgen05, m.mma, m.cp_async, m.barriers)
    return _row(f"{key:<7}{name}", *("?" if cell is None else cell for cell in cells), m.shuffles, f"{seconds:.1f}")


def _row(name: str, *cells: object) -> str:
    widths = [max(len(column), 3) + 2 for column in COLUMNS]
    return f"{name:<66}" + "".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m octavo_kernels.compile_check", description=(__doc__ or "").split("\n")[0]
    )
    numbers = [int(capability) for capability in CAPABILITIES]
    parser.add_argument("--capabilities", type=_numbers, default=numbers, metavar="80,90", help="default: 80,90,100")
    parser.add_argument("--only", default="", metavar="PART", help="variants whose name contains this; * matches any")
    parser.add_argument("--covering", action="store_true", help="but for sm_90, one variant of each kernel")
    parser.add_argument("--families", type=lambda text: text.split(","), default=list(FAMILIES), metavar="A,B")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one per core")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--update", action="store_true", help="write the baseline instead of comparing with it")
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
