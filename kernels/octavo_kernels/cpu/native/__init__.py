"""The CPU's own kernels, in C: compiled at first use by the machine's C compiler, as Triton does it with its launchers.

    library() -> the functions of the .c files, or None where they cannot be had; `why_not()` says why

The compiler is $CC, else gcc, clang or cc. What it made is kept in $OCTAVO_CACHE_DIR, else $XDG_CACHE_HOME/octavo, else
~/.cache/octavo, under a name made of sources, flags, compiler and processor; where nothing may be kept, it is made anew
by every process. OCTAVO_NATIVE=0 does without. Threads are torch's own, see threads.c.
"""

from __future__ import annotations

import contextlib
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

FLAGS: Final = ["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared"]
FLAGS_FOR_MACHINE: Final = [["-march=native"], ["-mcpu=native"], []]
"""Not every compiler knows the first, or the second: the first of them that it takes."""
TIMEOUT: Final = 120.0
"""Seconds for the compiler; it takes about 3."""
TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, FP8: 2}
"""`enum type` of floats.h."""
ACTIVATIONS: Final = {None: 0, "gelu_tanh": 1}
"""`enum activation` of linear.c."""
SOURCES: Final = sorted(Path(__file__).parent.glob("*.[ch]"))

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
SIGNATURES: Final[dict[str, list[type]]] = {
    "octavo_use_threads": [_P, _P, _P],
    "octavo_bind": [_P, _I, _L, _I],
    "octavo_attend": [_P, _P, _I, _P, _I, _L, _I, _I, _I, _P, _P, _P, _L, _P, _L, _F, _F, _P, _L, _I],
    "octavo_scratch_bytes": [_L, _L],
    "octavo_attend_chunks": [_P, _P, _P, _I, _L, _I, _I, _I, _P, _P, _P, _P, _L, _P, _L, _P, _L, _F, _F, _I],
    "octavo_write": [_P, _I, _P, _I, _L, _I, _I, _I, _P, _L, _F, _F, _I],
    "octavo_has_linear": [],
    "octavo_packed_size": [_L, _L],
    "octavo_pack": [_P, _P, _L, _L],
    "octavo_argmax": [_P, _P, _P, _L, _L, _I, _I],
    "octavo_norm": [_P, _P, _P, _P, _L, _L, _F, _I],
    "octavo_blocks": [_P],
    "octavo_linear": [_P, _P, _P, _L, _P, _P, _L, _L, _I, _I],
}

log = logging.getLogger(__name__)


class BuildError(Exception):
    """There is no compiler, or it refused, or torch's threads cannot be had."""


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


def must_compile() -> bool:
    """Whether `library()` is about to take the seconds of a compilation."""
    if os.environ.get("OCTAVO_NATIVE") == "0" or _outcome.cache_info().currsize:
        return False
    try:
        name = _name(_compiler())
    except (BuildError, OSError):
        return False
    return not any(_is_kept(place / name) for place in _folders())


@functools.cache
def _outcome() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("OCTAVO_NATIVE") == "0":
        return None, "OCTAVO_NATIVE=0"
    try:
        return _obtain(_folders()), ""
    except (BuildError, OSError) as error:
        log.warning("the CPU's own kernels cannot be compiled, slower ones are used: %s", error)
        return None, str(error)


def _obtain(places: list[Path]) -> ctypes.CDLL:
    """What one of the folders `places` holds; else compiled, and kept in the first of them that can hold it.

    Raises BuildError, and OSError if it can be loaded from nowhere.
    """
    compiler = _compiler()
    name = _name(compiler)
    for place in places:
        if _is_kept(place / name):
            with contextlib.suppress(OSError):  # mounted noexec since, or of another architecture
                return _load(place / name)
    with tempfile.TemporaryDirectory(prefix="octavo-") as scratch:
        made = Path(scratch) / name
        _compile(compiler, made)
        _seal(made)
        for place in places:
            try:
                return _load(_keep(made, place))
            except OSError as error:  # not allowed, read-only, full, someone else's
                log.info("compiled kernels are not kept in %s: %s", place, error)
        return _load(made)


def _load(path: Path) -> ctypes.CDLL:
    """Raises OSError for what is not our library, BuildError if torch has no OpenMP library."""
    loaded = ctypes.CDLL(str(path.absolute()))  # a bare name would be looked for elsewhere
    try:
        for name, arguments in SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes = arguments
            function.restype = None
    except AttributeError as error:
        raise OSError(str(error)) from error
    loaded.octavo_bind.restype = _I
    loaded.octavo_has_linear.restype = _I
    loaded.octavo_packed_size.restype = _L
    loaded.octavo_scratch_bytes.restype = _L
    loaded.octavo_use_threads(*_threads())
    return loaded


def _threads() -> list[int | None]:
    """For octavo_use_threads: addresses in the OpenMP library that torch itself has loaded, whichever that is."""
    try:
        openmp = ctypes.CDLL("libtorch_cpu.so")
        functions = (openmp.GOMP_parallel, openmp.GOMP_barrier, openmp.omp_get_thread_num)
        return [ctypes.cast(function, _P).value for function in functions]
    except (OSError, AttributeError) as error:
        raise BuildError(f"no OpenMP threads of torch's: {error}") from error


def _is_kept(path: Path) -> bool:
    try:
        _check_ours(path.parent)
        _check_ours(path)
        return _is_whole(path)
    except OSError:
        return False


def _keep(made: Path, place: Path) -> Path:
    """A copy in `place`. Raises OSError if it cannot hold one."""
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_ours(place)
    if os.statvfs(place).f_flag & os.ST_NOEXEC:
        raise PermissionError(f"{place} is mounted noexec")
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        copy = shutil.copyfile(made, Path(scratch) / made.name)
        copy.chmod(0o700)
        copy.replace(place / made.name)  # at once, whoever else does it at the same time
    return place / made.name


def _seal(path: Path) -> None:
    """Adds a checksum, which the loader does not mind."""
    path.write_bytes(path.read_bytes() + hashlib.sha256(path.read_bytes()).digest())


def _is_whole(path: Path) -> bool:
    """Not cut off by a full disk or a power failure: loading it would end the process, again at every start."""
    content = path.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _folders() -> list[Path]:
    own = os.environ.get("OCTAVO_CACHE_DIR")
    if own:
        return [Path(own)]
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = [Path(base) / "octavo"] if os.path.isabs(base) else []  # there may be no home
    return [*home, Path(tempfile.gettempdir()) / f"octavo-{os.getuid()}"]


def _check_ours(path: Path) -> None:
    """Raises PermissionError if anybody but us and root can have written it: code from here runs in this process."""
    status = path.stat()
    if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
        raise PermissionError(f"others may write to {path}")


def _compiler() -> list[str]:
    """Its path, and the arguments that $CC may have. Raises BuildError."""
    named = os.environ.get("CC", "").split()
    for name in named[:1] or ["gcc", "clang", "cc"]:
        found = shutil.which(name)
        if found:
            return [found, *named[1:]]
    raise BuildError(f"no C compiler: {' '.join(named) or 'gcc, clang, cc'} not found")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {TIMEOUT:.0f} s") from error


def _name(compiler: list[str]) -> str:
    version = _run([*compiler, "--version"]).stdout
    digest = hashlib.sha256(repr([compiler, version, FLAGS, FLAGS_FOR_MACHINE, _processor()]).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    return f"native-{digest.hexdigest()[:20]}.so"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _compile(compiler: list[str], output: Path) -> None:
    """Raises BuildError."""
    inputs = [str(source) for source in SOURCES if source.suffix == ".c"]
    for machine in FLAGS_FOR_MACHINE:
        done = _run([*compiler, *FLAGS, *machine, "-o", str(output), *inputs])
        if done.returncode == 0:
            return
        if machine and machine[0].split("=")[0] not in done.stderr:
            break  # that was not it
    lines = done.stderr.strip().splitlines()
    cause = next((line for line in lines if "error" in line), lines[-1] if lines else f"status {done.returncode}")
    raise BuildError(f"{Path(compiler[0]).name} failed: {cause[:300]}")
