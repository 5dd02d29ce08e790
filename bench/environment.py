"""What a record has to say about the machine and the software that made its numbers."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_CPU_FLAGS = ["avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"]


def describe() -> dict[str, Any]:
    """CPU, cores, memory, kernel, Python, commit and time. No path and no name of the machine."""
    cpu = _key_values("/proc/cpuinfo")
    memory = _key_values("/proc/meminfo").get("MemTotal", "0 kB").split()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": cpu.get("model name", platform.processor()).strip(),
        "cpu_flags": cpu_flags(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def cpu_flags() -> list[str]:
    """Those of the CPU's instruction sets that matter to matrix products."""
    found = _key_values("/proc/cpuinfo").get("flags", "").split()
    return [flag for flag in _CPU_FLAGS if flag in found]


def gpu_state() -> str:
    """Driver, clocks and power limit as found, and other processes' use of the GPU; empty where nvidia-smi is not."""
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,utilization.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def accelerator(device: str) -> dict[str, str]:
    """Name of the card as "device", with `gpu_state` as "gpu"; "cpu" where `device` is not CUDA. Asks no torch."""
    if not device.startswith("cuda"):
        return {"device": device, "gpu": ""}
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {"device": device, "gpu": ""}
    return {"device": found.splitlines()[0].strip(), "gpu": gpu_state()}


def busy_seconds() -> float:
    """CPU seconds that the whole machine has spent on anything but idling, since it started."""
    fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _key_values(path: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


def _commit() -> str:
    """Abbreviated hash, with "+" when tracked files differ from it; empty outside a repository."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
