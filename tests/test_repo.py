"""Promises about the repository itself: its generated code, its imports, what its files may not hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["engine/octavo", "kernels/octavo_kernels", "proto/octavo_proto"]
TORCH_FREE = ["octavo.core", "octavo.frontend", "octavo.server", "octavo.client", "octavo.cli", "octavo.supervisor"]
TORCH_FREE += ["octavo.cli_bench", "octavo.loadtest"]
SERIALISERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, stdin=subprocess.DEVNULL, check=False)


def repo_files() -> list[Path]:
    """Files that are, or would be, committed."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    assert listed.returncode == 0, listed.stderr
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def python_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_generated_code_is_that_of_the_proto_files() -> None:
    """Runs the pinned generator; make prepares it in .cache/protoc when it is missing."""
    done = run("make", "proto-fresh")
    assert done.returncode == 0, done.stdout + done.stderr


def test_wire_contract_is_lint_clean_and_formatted() -> None:
    buf = str(Path(sys.executable).with_name("buf"))
    for arguments in (["lint"], ["format", "--diff", "--exit-code"]):
        done = run(buf, *arguments, cwd=ROOT / "proto")
        assert done.returncode == 0, done.stdout + done.stderr


def unsafe_loads(source: str) -> list[str]:
    """What in `source` could run code that a file brings along: pickle and its kin, torch.load, allow_pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in SERIALISERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in SERIALISERS:
            found.append(str(node.module))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save", "torch.hub"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append(node.arg)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec"):
            found.append(ast.unparse(node.func))
    return found


def test_no_package_unpickles() -> None:
    found = {str(path.relative_to(ROOT)): unsafe_loads(path.read_text()) for path in python_files()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from cloudpickle import loads", "torch.load(f)", "np.load(f, allow_pickle=True)", "eval(text)"],
)
def test_unsafe_loads_are_seen(source: str) -> None:
    assert unsafe_loads(source)


def test_no_file_names_a_path_of_a_developers_machine_or_a_package_mirror() -> None:
    folders = "|".join(["root", "work", "home/[a-z]+", "Users/[a-z]+", "opt/(pypi|wheels)[a-z-]*"])
    hosts = "|".join(["artifactory", "nexus", "pypi", "pythonhosted"])
    forbidden = re.compile(rf"(?<![\w.~}}/-])/({folders})/|https?://[\w.-]*({hosts})[\w.-]*".encode())
    found = []
    for path in repo_files():
        data = path.read_bytes()
        if b"\0" not in data[:4096] and path.name not in ("vocab.json", "merges.txt", "tokenizer.json"):
            found += [f"{path.relative_to(ROOT)}: {match[0].decode()}" for match in forbidden.finditer(data)]
    assert found == []


def test_packages_of_the_front_end_do_not_load_torch() -> None:
    program = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for info in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
print(sorted({"torch", "triton", "transformers", "octavo_kernels"} & set(sys.modules)))
"""
    done = run(sys.executable, "-c", program, *TORCH_FREE)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_client_loads_nothing_of_the_engine() -> None:
    program = """
import sys, octavo.client
own = ("octavo.client", "octavo.generation_table")  # the table is plain data that imports nothing of octavo
print([n for n in sys.modules if n.startswith("octavo.") and n not in own and "octavo.client." not in n])
"""
    done = run(sys.executable, "-c", program)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("folder", ["engine", "kernels", "proto", "tests", "bench"])
def test_import_roots_are_not_packages(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_every_requirement_is_pinned() -> None:
    """A pin for each package that pyproject.toml names, as `name==version`, and nothing else in the file."""
    import tomllib

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["dependency-groups"]["dev"],
    ]

    def name(requirement: str) -> str:
        return re.sub(r"[_.]+", "-", re.split(r"[ =<>;\[]", requirement)[0]).lower()

    assert {name(line) for line in wanted} - {name(line) for line in lines} == set()
