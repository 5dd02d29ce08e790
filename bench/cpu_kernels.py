"""The CPU's kernels beside the operators of torch that they took the place of, at gpt2's shape.

    python bench/cpu_kernels.py [--threads 2] [--repeats 15]

linear      all 49 matrices once, by the kinds of `octavo_kernels.cpu.linear`; bf16 products need AVX512_BF16
attention   decode rows of 12 layers: `NativeAttention` in C, `PagedAttention` of torch's operators; by the cache's type
argmax      the largest of 50,257 bf16 logits a row

The contenders of a case take turns; milliseconds are medians, beside the least and the most. Records go to the end of
bench/results/cpu_kernels.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import environment
import numpy as np
import torch
import turns
from octavo_kernels.checks import FP8
from octavo_kernels.cpu import native
from octavo_kernels.cpu.argmax import argmax
from octavo_kernels.cpu.attention import PagedAttention
from octavo_kernels.cpu.linear import LinearKind, pack
from octavo_kernels.cpu.native_attention import NativeAttention

OUT = Path(__file__).resolve().parent / "results" / "cpu_kernels.jsonl"
LAYERS, HEADS, SIZE, BLOCK, VOCABULARY = 12, 12, 64, 32, 50257
WIDTH = HEADS * SIZE
MATRICES = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)] * LAYERS + [(VOCABULARY, WIDTH)]
KINDS = {
    LinearKind.NATIVE: torch.bfloat16,
    LinearKind.ONEDNN: torch.bfloat16,
    LinearKind.PLAIN: torch.bfloat16,
    LinearKind.FP16: torch.float32,
    LinearKind.INT8: torch.float32,
}
"""Kind -> type of its activations."""
Contenders = Mapping[str, Callable[[], object]]


def linears() -> dict[str, Contenders]:
    library = native.library()
    kinds = dict(KINDS)
    if library is None or not library.octavo_has_linear():
        del kinds[LinearKind.NATIVE], kinds[LinearKind.ONEDNN]
    weights = [torch.randn(shape) * 0.02 for shape in MATRICES]
    layers = {kind: [pack(weight.to(kinds[kind]), None, kind) for weight in weights] for kind in kinds}

    def one_pass(kind: LinearKind, rows: int) -> Callable[[], object]:
        x = {width: torch.randn(rows, width).to(kinds[kind]) for width in (WIDTH, 4 * WIDTH)}
        calls = [(layer, x[inputs]) for layer, (_, inputs) in zip(layers[kind], MATRICES, strict=True)]
        return lambda: [layer(rows) for layer, rows in calls]

    return {
        f"linear, {rows} rows": {kind.value: one_pass(kind, rows) for kind in kinds} for rows in (1, 4, 16, 64, 256)
    }


def attentions() -> dict[str, Contenders]:
    cases: dict[str, Contenders] = {}
    for rows, context in ((1, 64), (16, 64), (64, 64), (16, 300), (64, 300)):
        kinds: dict[str, tuple[Any, torch.dtype]] = {"torch, bf16": (PagedAttention, torch.bfloat16)}
        if native.library() is not None:
            kinds |= {"C, bf16": (NativeAttention, torch.bfloat16), "C, fp8": (NativeAttention, FP8)}
        cases[f"attention, {rows} x {context}"] = {
            name: one_step(kind, dtype, rows, context) for name, (kind, dtype) in kinds.items()
        }
    return cases


def one_step(kind: Any, dtype: torch.dtype, rows: int, context: int) -> Callable[[], object]:
    blocks = -(-context // BLOCK)
    num_blocks = rows * blocks + 1
    caches = [torch.randn(2, num_blocks, HEADS, BLOCK, SIZE).to(dtype) for _ in range(LAYERS)]
    qkv = torch.randn(rows, 3 * WIDTH).bfloat16()
    tables = np.random.default_rng(0).permutation(np.arange(1, num_blocks)).reshape(rows, blocks).astype(np.int32)
    lengths, starts = np.full(rows, context, np.int32), np.arange(rows + 1, dtype=np.int32)
    slots = tables[:, -1].astype(np.int64) * BLOCK + (context - 1) % BLOCK
    kernel = kind(HEADS, SIZE, BLOCK, dtype)
    plan = kernel.plan(num_blocks, slots, starts, lengths, tables, rows)
    return lambda: [kernel.attend(plan, qkv, cache, SIZE**-0.5) for cache in caches]


def argmaxes() -> dict[str, Contenders]:
    cases: dict[str, Contenders] = {}
    for rows in (1, 16, 64):
        logits = torch.randn(rows, VOCABULARY).bfloat16()
        cases[f"argmax, {rows} rows"] = {
            "numpy": lambda x=logits: x.float().numpy().argmax(axis=1),  # type: ignore[misc]
            "C": lambda x=logits: argmax(x),  # type: ignore[misc]
        }
    return cases


def measure(case: str, contenders: Contenders, repeats: int) -> list[dict[str, Any]]:
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-2, repeats):
        for name, call in contenders.items():
            began = time.perf_counter()
            call()
            if turn >= 0:
                taken[name].append(1e3 * (time.perf_counter() - began))
    lines = []
    for name, ms in taken.items():
        spread = {"median": statistics.median(ms), "least": min(ms), "most": max(ms)}
        print(
            f"{case:<22}{name:<14}{spread['median']:>9.3f} ms ({spread['least']:.3f} to {spread['most']:.3f})",
            flush=True,
        )
        lines.append({"record": "case", "case": case, "contender": name, **spread})
    return lines


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=["linear", "attention", "argmax"], help="default: all")
    parser.add_argument("--out", default=str(OUT), help='"" to write nothing')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines: list[dict[str, Any]] = []
    for name, cases in {"linear": linears, "attention": attentions, "argmax": argmaxes}.items():
        if options.only in (None, name):
            for case, contenders in cases().items():
                lines += measure(case, contenders, options.repeats)
    turns.append(options.out, environment.describe() | {"threads": options.threads, "repeats": options.repeats}, lines)


if __name__ == "__main__":
    main()
