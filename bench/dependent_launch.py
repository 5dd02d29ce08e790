"""Decode steps with dependent launch and without, in turns in one process, and whether their tokens are equal.

    python bench/dependent_launch.py                      gpt2-large in bf16, CUDA graphs; on a GPU of capability 9.0 on
    python bench/dependent_launch.py --no-graphs

Two engine cores on one card, `dependent_launch` "off" and "auto", see `octavo_kernels.dependent_launch`. For each batch
they take turns, A B, B A, ...: the same prompts, then timed decode steps. A ratio is that of the device's time of a
turn without over that with. Where the device cannot launch so both are the same, and the ratio says what is noise.
Records go to the end of bench/results/dependent_launch.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import environment
import numpy as np
import step
import torch
from octavo.engine_core.engine_core import EngineCore
from octavo.ipc import EngineCoreOutputs

MODES = ("off", "auto")


class Contender:
    """An engine core, its clock, and all tokens that it gave."""

    def __init__(self, options: argparse.Namespace, mode: str) -> None:
        self.core: EngineCore = step.make_core(options, dependent_launch=mode)
        self.clock = step.Clock()
        self.clock.wrap(self.core)
        self.tokens: list[tuple[int, int]] = []
        self._step = self.core.step
        self.core.step = self._and_keep_tokens  # type: ignore[method-assign]

    def _and_keep_tokens(self) -> Any:
        messages = self._step()
        for message in messages.get(0, []):
            if isinstance(message, EngineCoreOutputs):
                keys = np.frombuffer(message.keys, np.int64).tolist()
                self.tokens += zip(keys, np.frombuffer(message.token_ids, np.int32).tolist(), strict=False)
        return messages


def main() -> int:
    options = parse()
    contenders = {mode: Contender(options, mode) for mode in MODES}
    info = contenders["off"].core.info
    print(f"{info.device}, {info.dtype}, {options.shape}; ms of the device, without and with dependent launch")
    lines = [measure(contenders, batch, options) for batch in options.batches]
    equal = contenders["off"].tokens == contenders["auto"].tokens
    print(f"{len(contenders['off'].tokens)} tokens, {'all equal' if equal else 'NOT EQUAL'}")
    if options.out:
        record(options, contenders["off"].core, lines, equal)
    return 0 if equal else 1


def parse() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batches", type=step.numbers, default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "auto")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--shape", default="gpt2-large" if on_gpu else "gpt2", help="as peers/random_checkpoint.py has")
    parser.add_argument("--no-graphs", action="store_true", help="launch kernel by kernel")
    parser.add_argument("--out", default=str(step.RESULTS / "dependent_launch.jsonl"), help='"" to write nothing')
    options = parser.parse_args()
    options.contexts = [options.context]
    return options


def measure(contenders: dict[str, Contender], batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Turns at one batch size; the first, in which kernels may still be compiled, does not count."""
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(options.rounds + 1):
        for mode in MODES if turn % 2 else reversed(MODES):
            one = contenders[mode]
            cell = step.measure(one.core, one.clock, batch, options.context, options.steps, bandwidth=1.0)
            times[mode].append(cell.device)
    off, auto = times["off"][1:], times["auto"][1:]
    ratios = [without / with_it for without, with_it in zip(off, auto, strict=True)]
    ratio = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios), "turns": len(ratios)}
    medians = {"off": statistics.median(off), "auto": statistics.median(auto)}
    print(
        f"batch {batch:>4}: {medians['off']:.3f} {medians['auto']:.3f}, ratio {ratio['median']:.3f} "
        f"({ratio['least']:.3f} to {ratio['most']:.3f})",
        flush=True,
    )
    return {"record": "ratio", "batch": batch, "context": options.context, "device_ms": medians, **ratio}


def record(options: argparse.Namespace, core: EngineCore, lines: list[dict[str, Any]], equal: bool) -> None:
    header = environment.describe() | step.facts(options, core) | {"equal_tokens": equal}
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        for line in [{"record": "run", **header}, *({**step.rounded(one), "run": header["time"]} for one in lines)]:
            out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
