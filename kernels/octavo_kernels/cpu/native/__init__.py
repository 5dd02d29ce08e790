"""The CPU's own kernels, in C: compiled at first use by the machine's C compiler, as Triton does it with its launchers.

    library() -> the functions of the .c files, or None where they cannot be had; `why_not()` says why

The compiler is $CC, else gcc, clang or cc. What it made is kept in $OCTAVO_CACHE_DIR, else $XDG_CACHE_HOME/octavo, else
~/.cache/octavo, under a name made of sources, flags, compiler and processor. OCTAVO_NATIVE=0 does without. Threads are
those of torch's own OpenMP library: two pools would spin against each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import torch

from octavo_kernels.checks import FP8

FLAGS: Final = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
BUILD: Final = ["-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi"]
TIMEOUT: Final = 120.0
"""Seconds for the compiler; it takes about 3."""
TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, FP8: 3}
"""`enum type` of floats.h."""
ACTIVATIONS: Final = {None: 0, "gelu_tanh": 1}
"""`enum activation` of linear.c."""
SOURCES: Final = sorted(Path(__file__).parent.glob("*.[ch]"))

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
SIGNATURES: Final[dict[str, list[type]]] = {
    "octavo_attend": [_P, _P, _I, _P, _I, _L, _I, _I, _I, _P, _P, _P, _I, _P, _L, _F, _F, _P, _L, _I],
    "octavo_write": [_P, _I, _P, _I, _L, _I, _I, _I, _P, _L, _F, _F, _I],
    "octavo_has_linear": [],
    "octavo_packed_size": [_L, _L],
    "octavo_pack": [_P, _P, _L, _L],
    "octavo_argmax": [_P, _P, _L, _L, _I, _I],
    "octavo_linear": [_P, _P, _P, _L, _P, _P, _L, _L, _I, _I],
}

log = logging.getLogger(__name__)


class BuildError(Exception):
    """There is no compiler, or it refused."""


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there is no compiler, or it fails, or OCTAVO_NATIVE=0."""
    return _outcome()[0]


def why_not() -> str:
    """Why `library()` is None; "" if it is not."""
    return _outcome()[1]


def loaded() -> ctypes.CDLL:
    """`library()` where it is known to be there."""
    found = library()
    assert found is not None, why_not()
    return found


@functools.cache
def _outcome() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("OCTAVO_NATIVE") == "0":
        return None, "OCTAVO_NATIVE=0"
    try:
        return _load(build()), ""
    except (BuildError, OSError, AttributeError, RuntimeError) as error:
        log.warning("the CPU's own kernels cannot be compiled, slower ones are used: %s", error)
        return None, str(error)


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for name, arguments in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = None
    loaded.octavo_has_linear.restype = _I
    loaded.octavo_packed_size.restype = _L
    return loaded


def build(folder: Path | None = None) -> Path:
    """Compiles what is not there yet. Returns the library's path in `folder`, or in the cache. Raises BuildError."""
    compiler = _compiler()
    name = f"native-{_fingerprint(compiler)}.so"
    for place in [folder] if folder else _folders():
        path = place / name
        if path.exists() and _is_ours(path):
            return path
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not _is_ours(place):
                continue
            with tempfile.TemporaryDirectory(dir=place) as scratch:
                made = Path(scratch) / name
                _compile(compiler, made)
                made.chmod(0o700)
                made.replace(path)  # whole or not at all, whoever else builds at the same time
        except OSError:  # not allowed, or read-only
            continue
        return path
    raise BuildError("no folder of ours to keep the compiled kernels in; set OCTAVO_CACHE_DIR")


def _folders() -> list[Path]:
    own = os.environ.get("OCTAVO_CACHE_DIR")
    if own:
        return [Path(own)]
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base else Path("~/.cache").expanduser()
    return [home / "octavo", Path(tempfile.gettempdir()) / f"octavo-{os.getuid()}"]


def _is_ours(path: Path) -> bool:
    """Nobody else can have written it: code from here runs in this process."""
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _compiler() -> str:
    named = os.environ.get("CC")
    for name in [named] if named else ["gcc", "clang", "cc"]:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"no C compiler: {named or 'gcc, clang, cc'} not found")


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    parts = [version.stdout, *FLAGS, *BUILD, _processor(), torch.__version__]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _compile(compiler: str, output: Path) -> None:
    inputs = [str(source) for source in SOURCES if source.suffix == ".c"]
    command = [compiler, *FLAGS, *BUILD, "-o", str(output), *inputs, *_openmp()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{compiler} took more than {TIMEOUT:.0f} s") from error
    if done.returncode:
        raise BuildError(f"{Path(compiler).name} failed: {done.stderr.strip()[-500:]}")


def _openmp() -> list[str]:
    """torch's library, where it brings one: linked by its path, it is found as the one that is loaded already."""
    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]]
