"""The systems that cpu.py, offline.py and serve.py put side by side, and the processes in which they live."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "bench"
START_TIMEOUT = 420.0
RUN_TIMEOUT = 300.0
END_TIMEOUT = 20.0


@dataclass(frozen=True)
class Contender:
    """One row of the table: a system, its arithmetic, and how it is called."""

    worker: str
    """Script in bench/peers, without .py."""
    dtype: str
    mode: str = ""
    """Passed to the worker with every batch; see its docstring."""
    environment: str = ""
    """Folder below .peers whose Python runs the worker; empty: this one."""


@dataclass(frozen=True)
class Settings:
    """What a worker is started with beside its contender."""

    threads: int = 0
    """OpenMP threads; 0: the system's own choice."""
    device: str = "cpu"
    max_requests: int = 0
    """Sequences at once; 0: the system's own choice."""
    kv_gib: int = 0
    """GiB of each system's KV-cache; 0: its own choice."""


CONTENDERS = {
    "octavo": Contender("octavo_llm", "bfloat16"),
    "octavo-stream": Contender("octavo_server", "bfloat16", "stream"),
    "octavo-unary": Contender("octavo_server", "bfloat16", "unary"),
    "octavo-batch": Contender("octavo_server", "bfloat16", "batch"),
    "octavo-session": Contender("octavo_server", "bfloat16", "session"),
    "octavo-bound": Contender("octavo_llm", "bound"),
    "octavo-bound-stream": Contender("octavo_server", "bound", "stream"),
    "octavo-fp8-cache": Contender("octavo_llm", "fp8-cache"),
    "vllm": Contender("vllm_llm", "bfloat16", environment="vllm"),
    "vllm-stream": Contender("vllm_server", "bfloat16", "stream", environment="vllm"),
    "vllm-unary": Contender("vllm_server", "bfloat16", "unary", environment="vllm"),
    "octavo-fp32": Contender("octavo_llm", "float32"),
    "vllm-fp32": Contender("vllm_llm", "float32", environment="vllm"),
    "vllm-fp32-stream": Contender("vllm_server", "float32", "stream", environment="vllm"),
    "transformers": Contender("transformers_generate", "bfloat16"),
    "transformers-fp32": Contender("transformers_generate", "float32"),
    "transformers-continuous": Contender("transformers_continuous", "bfloat16"),
    "ctranslate2": Contender("ctranslate2_generator", "bfloat16", environment="ct2"),
    "octavo-int8": Contender("octavo_llm", "int8"),
    "octavo-int8-stream": Contender("octavo_server", "int8", "stream"),
    "ctranslate2-int8": Contender("ctranslate2_generator", "int8", environment="ct2"),
}
DEFAULT = [
    "octavo",
    "octavo-stream",
    "vllm",
    "vllm-stream",
    "transformers",
    "octavo-int8",
    "octavo-int8-stream",
    "ctranslate2-int8",
]
SLOW_BF16 = ["vllm-fp32"]
"""Also by default where oneDNN has no bf16 products: vLLM's own are slow there from a few rows on."""
COMPARISONS = [
    ("octavo", "vllm"),
    ("octavo", "vllm-fp32"),
    ("octavo", "transformers"),
    ("octavo-stream", "vllm-stream"),
    ("octavo-stream", "vllm-fp32-stream"),
    ("octavo-unary", "vllm-unary"),
    ("octavo-fp32", "vllm-fp32"),
    ("octavo-stream", "octavo"),
    ("octavo-unary", "octavo"),
    ("octavo-batch", "octavo"),
    ("octavo-session", "octavo"),
    ("octavo-bound", "octavo"),
    ("octavo-bound-stream", "octavo-stream"),
    ("octavo-int8", "ctranslate2-int8"),
    ("octavo-int8", "vllm"),
    ("octavo-int8-stream", "octavo-int8"),
]
"""Pairs whose ratio of tokens per second is reported, first over second."""


class WorkerError(Exception):
    """A worker could not start, failed or did not answer in time."""


class Worker:
    """A system's process, kept warm from `start` to `close`. Contenders that differ in `mode` only share one."""

    def __init__(
        self, contender: Contender, *, checkpoint: Path, scratch: Path, peers: Path, settings: Settings
    ) -> None:
        python = peers / contender.environment / "bin" / "python" if contender.environment else Path(sys.executable)
        if not python.exists():
            raise WorkerError(f"not installed here (no {contender.environment} in .peers, see bench/README.md)")
        scratch.mkdir(parents=True, exist_ok=True)
        self.versions: dict[str, str] = {}
        self.dtype = contender.dtype
        self._log = scratch / f"{contender.worker}-{contender.dtype}.log"
        self.settings = settings
        command = [python, HERE / "peers" / f"{contender.worker}.py", "--dtype", contender.dtype]
        command += ["--checkpoint", checkpoint, "--scratch", scratch, "--threads", str(settings.threads)]
        command += ["--device", settings.device, "--max-requests", str(settings.max_requests)]
        command += ["--kv-gib", str(settings.kv_gib)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=scratch,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        if self.versions:
            return
        answer = self._read(START_TIMEOUT)
        self.versions, self.dtype = answer["versions"], answer["dtype"]

    def run(self, prompts: list[list[int]], new_tokens: int | list[int], mode: str) -> tuple[float, list[list[int]]]:
        """Seconds and new token ids of one batch. `new_tokens`: of all prompts, or one number for each."""
        assert self._process.stdin is not None
        message = {"prompts": prompts, "new_tokens": new_tokens, "mode": mode}
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"ended; see {self._log.name} in .cache/bench/scratch") from error
        answer = self._read(RUN_TIMEOUT)
        return answer["seconds"], answer["token_ids"]

    def cpu_seconds(self) -> float:
        """CPU time of the worker and of every process it started that still lives."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self._process.pid:  # the session: see start_new_session
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _read(self, timeout: float) -> dict[str, Any]:
        """One line. The worker writes a whole line at once and only when asked, so that select() can be trusted."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise WorkerError(f"no answer within {timeout:.0f} s; see {self._log.name} in .cache/bench/scratch")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"ended; see {self._log.name} in .cache/bench/scratch")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def ask_to_end(self) -> None:
        """Ends the worker's input: it ends when it has done what it was at."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """Lets the worker end by itself, then ends whatever is left of its process group."""
        self.ask_to_end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@dataclass
class Entry:
    """A contender that takes part."""

    contender: Contender
    worker: Worker


def prepare_checkpoint(shape: str) -> Path:
    """Folder of a checkpoint of that shape with random weights; made when it is not there."""
    folder = CACHE / shape
    if not (folder / "config.json").exists():
        print(f"making a checkpoint of shape {shape} with random weights", flush=True)
        script = HERE / "peers" / "random_checkpoint.py"
        subprocess.run([sys.executable, script, folder, shape], check=True, stderr=subprocess.DEVNULL)
    return folder


def start(
    names: list[str], settings: Settings, *, checkpoint: Path, peers: Path
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Starts all workers at once and waits for them. Returns those that are ready, and why the others are not."""
    print("starting (vLLM takes a minute or two) ...", flush=True)
    workers: dict[tuple[str, str, int], Worker] = {}
    entries: dict[str, Entry] = {}
    absent: dict[str, str] = {}
    for name in names:
        base, _, threads = name.partition("@")
        contender = CONTENDERS[base]
        own = replace(settings, threads=int(threads or settings.threads))
        key = (contender.worker, contender.dtype, own.threads)
        try:
            if key not in workers:
                workers[key] = Worker(
                    contender, checkpoint=checkpoint, scratch=CACHE / "scratch", peers=peers, settings=own
                )
            entries[name] = Entry(contender, workers[key])
        except WorkerError as error:
            absent[name] = str(error)
    for name, entry in list(entries.items()):
        try:
            entry.worker.wait_until_ready()
        except WorkerError as error:
            entry.worker.close()
            absent[name] = str(error)
            del entries[name]
    return entries, absent


def announce(entries: dict[str, Entry], absent: dict[str, str]) -> None:
    for name, entry in entries.items():
        versions = [f"{package} {version}" for package, version in entry.worker.versions.items()]
        print(f"  {name:<24} {', '.join([entry.worker.dtype, *versions])}", flush=True)
    for name, why in absent.items():
        print(f"  {name:<24} absent: {why}", flush=True)


def end(entries: dict[str, Entry]) -> None:
    for entry in entries.values():
        entry.worker.ask_to_end()
    for entry in entries.values():
        entry.worker.close()


def described(entries: dict[str, Entry]) -> dict[str, Any]:
    """For the header of a record."""
    return {
        name: {"dtype": entry.worker.dtype, "mode": entry.contender.mode, "versions": entry.worker.versions}
        for name, entry in entries.items()
    }


def names(text: str) -> list[str]:
    """An option's value: contenders by commas."""
    for name in text.split(","):
        if name.split("@")[0] not in CONTENDERS:
            raise argparse.ArgumentTypeError(
                f"no contender {name}; there are {', '.join(CONTENDERS)}, each also as NAME@THREADS"
            )
    return text.split(",")


def agreement(answer: list[list[int]], reference: list[list[int]]) -> float:
    """Part of the tokens that are the same. Random weights make near ties, where rounding decides."""
    same = [a == b for ours, theirs in zip(answer, reference, strict=True) for a, b in zip(ours, theirs, strict=True)]
    return sum(same) / len(same)
