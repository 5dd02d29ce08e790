"""Lists of cores, as `--cpu-cores` has them: which cores they are, and whether this process may use them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from octavo.errors import StartupError

NONE = "none"
AUTO = "auto"
_PART = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def resolve(text: str, *, num_threads: int = 0, device: str = "cpu") -> list[int]:
    """The cores that `text` names, in its order; none for "none". Raises StartupError (USAGE).

    Args:
        num_threads: of `--num-threads`; 0 if there are to be as many as cores.
        device: of `--device`.
    """
    if text == NONE:
        return []
    if device not in ("auto", "cpu"):
        raise _wrong(f"must be none with device {device}: only the CPU path's threads can be bound, not {text!r}")
    if not hasattr(os, "sched_setaffinity"):
        raise _wrong(f"must be none on this platform, which cannot bind threads to cores, not {text!r}")
    usable = sorted(os.sched_getaffinity(0))
    cores = _one_of_each_core(usable) if text == AUTO else _parse(text)
    foreign = [core for core in cores if core not in usable]
    if foreign:
        raise _wrong(f"must be of {describe(usable)}, which this process may use: {foreign[0]} is not, in {text!r}")
    if num_threads not in (0, len(cores)):
        raise StartupError(
            StartupError.USAGE,
            f"num_threads must be the number of cores in cpu_cores {text!r}, which is {len(cores)}, or 0, "
            f"not {num_threads}",
        )
    return cores


def others(cores: Iterable[int]) -> list[int]:
    """Cores that this process may use beside these; all of them where these are all."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return sorted(usable - set(cores) or usable)


def describe(cores: Sequence[int]) -> str:
    """As `resolve` reads them: "0-3,8"."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _parse(text: str) -> list[int]:
    cores: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise _wrong(f'must be "auto", "none" or cores and ranges of them as "0-3,8", not {text!r}')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise _wrong(f"must have ranges from the lower to the higher core, not {part.strip()} in {text!r}")
        cores += range(first, last + 1)
    seen: set[int] = set()
    for core in cores:
        if core in seen:
            raise _wrong(f"must name each core once: {core} is there twice, in {text!r}")
        seen.add(core)
    return cores


def _one_of_each_core(usable: Sequence[int]) -> list[int]:
    """One of the hardware threads that share a core: two of them would share its arithmetic, too."""
    chosen: dict[str, int] = {}
    for core in usable:
        try:
            siblings = (_TOPOLOGY / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
        except OSError:
            siblings = str(core)
        chosen.setdefault(siblings, core)
    return list(chosen.values())


def _wrong(text: str) -> StartupError:
    return StartupError(StartupError.USAGE, f"cpu_cores {text}")
