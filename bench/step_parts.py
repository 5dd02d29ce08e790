"""The parts of a decode step on the CPU: time of each, and its floor on this machine.

A floor is the greater of two times: what the part must read (weights, cached keys and values) at the rate at which one
large array is read, and what it must multiply at the rate of one large product in the type of the activations, both
measured at the start with the engine's threads. int8 linears are given the first alone. Norms, sampling and the host's
parts have no floor of that kind. Where a step's layers are one call of C, they are called one by one here: the step
takes longer than it does otherwise.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from octavo.engine_core.engine_core import EngineCore
from octavo.worker.gpt2 import GPT2
from octavo.worker.model_runner import ModelRunner
from octavo_kernels.cpu.linear import LinearKind

PARTS = (
    "schedule",
    "prepare",
    "norm",
    "qkv",
    "attention",
    "attention out",
    "mlp in",
    "mlp out",
    "lm head",
    "sampling",
    "update",
)
"""In the order of a step. `rest` is what is between them: embedding, Python."""
WEIGHT_BYTES = {LinearKind.FP16: 2.0, LinearKind.INT8: 1.0}
READ_BYTES = 256 << 20
MATRIX = 1536


@dataclass(frozen=True)
class Rates:
    bytes_per_ms: float
    flops_per_ms: float

    def floor(self, num_bytes: float, flops: float) -> float:
        """ms"""
        return max(num_bytes / self.bytes_per_ms, flops / self.flops_per_ms)


@dataclass(frozen=True)
class Part:
    """Medians over steps."""

    name: str
    ms: float
    share: float
    """Of the step."""
    floor: float | None


class PartTimes:
    """Times of the parts of each step, from wrappers around the functions that do them."""

    def __init__(self, core: EngineCore) -> None:
        """Raises ValueError for an engine that is not the CPU path's."""
        runner = _cpu_runner(core)
        self._model = runner._model
        self._itemsize = runner._kv_cache.dtype.itemsize
        self._current = dict.fromkeys(PARTS, 0.0)
        self._steps: list[dict[str, float]] = []
        self._wrap(core, runner)

    def _wrap(self, core: EngineCore, runner: ModelRunner) -> None:
        model, timed = self._model, self._timed
        model._whole = None  # else all layers are one call
        model._blocks = [
            dataclasses.replace(
                block,
                ln_1=timed("norm", block.ln_1),
                c_attn=timed("qkv", block.c_attn),
                attn_proj=timed("attention out", block.attn_proj),
                ln_2=timed("norm", block.ln_2),
                c_fc=timed("mlp in", block.c_fc),
                mlp_proj=timed("mlp out", block.mlp_proj),
            )
            for block in model._blocks
        ]
        model._ln_f = timed("norm", model._ln_f)
        model._lm_head = timed("lm head", model._lm_head)
        for part, owner, name in (
            ("schedule", core.scheduler, "schedule"),
            ("prepare", runner._states, "apply"),
            ("prepare", runner._host, "apply"),
            ("prepare", runner._batches, "build"),
            ("prepare", model.attention, "plan"),
            ("attention", model.attention, "run"),
            ("sampling", runner._host, "choose"),
            ("update", core.scheduler, "update"),
        ):
            setattr(owner, name, timed(part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Any:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self._current[part] += (time.perf_counter() - begin) * 1e3

        return call

    def clear(self) -> None:
        self._steps.clear()
        self._current = dict.fromkeys(PARTS, 0.0)

    def end_step(self, ms: float) -> None:
        """ms: of the whole step."""
        self._steps.append(self._current | {"rest": ms - sum(self._current.values()), "step": ms})
        self._current = dict.fromkeys(PARTS, 0.0)

    def parts(self, batch: int, context: int, rates: Rates) -> list[Part]:
        """Of the steps since `clear`. context: cached tokens of a request."""
        work = self._work(batch, context)
        return [
            Part(
                name=name,
                ms=statistics.median(step[name] for step in self._steps),
                share=statistics.median(step[name] / step["step"] for step in self._steps),
                floor=rates.floor(*work[name]) if name in work else None,
            )
            for name in (*PARTS, "rest")
        ]

    def _work(self, batch: int, context: int) -> dict[str, tuple[float, float]]:
        """Bytes and floating-point operations of the parts that have a floor."""
        model: GPT2 = self._model
        spec = model.spec
        layers, width, inner = spec.n_layer, spec.n_embd, spec.n_inner or 4 * spec.n_embd
        weight = WEIGHT_BYTES.get(model.linear_kind, float(self._itemsize))
        numbers = {
            "qkv": layers * 3 * width * width,
            "attention out": layers * width * width,
            "mlp in": layers * inner * width,
            "mlp out": layers * inner * width,
            "lm head": spec.vocab_size * width,
        }
        cached = 2 * layers * width * context * batch
        return {name: (count * weight, 2 * count * batch) for name, count in numbers.items()} | {
            "attention": (cached * self._itemsize, 2 * cached)
        }


def measure_rates(core: EngineCore, rounds: int = 5) -> Rates:
    """Raises ValueError for an engine that is not the CPU path's."""
    model = _cpu_runner(core)._model
    large = torch.ones(READ_BYTES // 4)
    a, b = (torch.randn(MATRIX, MATRIX).to(model.hidden_dtype) for _ in range(2))
    read, product = (min(_ms(run) for _ in range(rounds)) for run in (large.sum, lambda: a @ b))
    flops = math.inf if model.linear_kind is LinearKind.INT8 else 2 * MATRIX**3 / product
    return Rates(READ_BYTES / read, flops)


def _cpu_runner(core: EngineCore) -> ModelRunner:
    if not isinstance(core.runner, ModelRunner):
        raise ValueError("--parts: of the CPU path only; on a GPU --profile and bench/kernels.py tell more")
    return core.runner


def _ms(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def print_parts(parts: list[Part]) -> None:
    for part in parts:
        floor = "" if part.floor is None else f"floor {part.floor:>8.3f}{part.floor / part.ms:>6.0%}"
        print(f"{'':>14}{part.name:<16}{part.ms:>9.3f}{part.share:>8.1%}   {floor}", flush=True)
