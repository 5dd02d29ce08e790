"""The CPU's kernels beside the operators of torch that they took the place of, at gpt2's shape.

    python bench/cpu_kernels.py [--threads 2] [--repeats 15]

linear      all 49 matrices once, by the kinds of `octavo_kernels.cpu.linear`; bf16 products need AVX512_BF16
attention   decode rows of 12 layers: `NativeAttention` in C, `PagedAttention` of torch's operators; by the cache's type
            (4 KiB pages: weights or cache outside of huge pages, see `octavo_kernels.cpu.memory`)
chunks      512 tokens of a prompt, after others: `NativeAttention` in C, and with torch's flash attention
layers      all of them: one after the other, and `NativeBlocks` in one call
argmax      the largest of 50,257 bf16 logits a row

The contenders of a case take turns; milliseconds are medians, beside the least and the most. Records go to the end of
bench/results/cpu_kernels.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import environment
import numpy as np
import torch
import turns
from octavo_kernels.checks import FP8
from octavo_kernels.cpu import memory, native
from octavo_kernels.cpu.argmax import argmax
from octavo_kernels.cpu.attention import PagedAttention
from octavo_kernels.cpu.linear import LinearKind, pack
from octavo_kernels.cpu.native_attention import NativeAttention, NativePlan
from octavo_kernels.cpu.native_blocks import BlockParts, NativeBlocks
from octavo_kernels.cpu.norm import layer_norm

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
SMALL = ", 4 KiB pages"


@contextmanager
def small_pages() -> Iterator[None]:
    before = memory.HUGE_PAGE
    memory.HUGE_PAGE = 1 << 60  # type: ignore[misc]
    try:
        yield
    finally:
        memory.HUGE_PAGE = before  # type: ignore[misc]


def linears() -> dict[str, Contenders]:
    library = native.library()
    kinds = dict(KINDS)
    if library is None or not library.octavo_has_linear():
        del kinds[LinearKind.NATIVE], kinds[LinearKind.ONEDNN]
    weights = [torch.randn(shape) * 0.02 for shape in MATRICES]
    layers = {kind.value: [pack(weight.to(kinds[kind]), None, kind) for weight in weights] for kind in kinds}
    if LinearKind.NATIVE in kinds:
        with small_pages():
            layers[LinearKind.NATIVE.value + SMALL] = [pack(w.bfloat16(), None, LinearKind.NATIVE) for w in weights]

    def one_pass(name: str, rows: int) -> Callable[[], object]:
        dtype = kinds[LinearKind(name.removesuffix(SMALL))]
        x = {width: torch.randn(rows, width).to(dtype) for width in (WIDTH, 4 * WIDTH)}
        calls = [(layer, x[inputs]) for layer, (_, inputs) in zip(layers[name], MATRICES, strict=True)]
        return lambda: [layer(rows) for layer, rows in calls]

    return {f"linear, {rows} rows": {name: one_pass(name, rows) for name in layers} for rows in (1, 4, 16, 64, 256)}


def attentions() -> dict[str, Contenders]:
    cases: dict[str, Contenders] = {}
    for rows, context in ((1, 64), (16, 64), (64, 43), (64, 64), (16, 300), (64, 300)):
        kinds: dict[str, tuple[Any, torch.dtype]] = {"torch, bf16": (PagedAttention, torch.bfloat16)}
        if native.library() is not None:
            kinds |= {"C, bf16": (NativeAttention, torch.bfloat16), "C, fp8": (NativeAttention, FP8)}
        case = {name: one_step(kind, dtype, rows, context) for name, (kind, dtype) in kinds.items()}
        if native.library() is not None:
            with small_pages():
                case["C, bf16" + SMALL] = one_step(NativeAttention, torch.bfloat16, rows, context)
        cases[f"attention, {rows} x {context}"] = case
    return cases


def one_step(kind: Any, dtype: torch.dtype, rows: int, context: int) -> Callable[[], object]:
    kernel, plan, cache = planned(kind, dtype, rows, context)
    qkv = torch.randn(rows, 3 * WIDTH).bfloat16()
    return lambda: [kernel.attend(plan, qkv, layer, SIZE**-0.5) for layer in cache]


def planned(kind: Any, dtype: torch.dtype, rows: int, context: int) -> tuple[Any, Any, torch.Tensor]:
    """An attention, its plan of a step of decode rows, their cache [L, 2, N, H, S, D]."""
    blocks = -(-context // BLOCK)
    num_blocks = rows * blocks + 1
    cache = memory.zeros((LAYERS, 2, num_blocks, HEADS, BLOCK, SIZE), dtype)
    for layer in cache:
        layer.copy_(torch.randn(layer.shape))
    tables = np.random.default_rng(0).permutation(np.arange(1, num_blocks)).reshape(rows, blocks).astype(np.int32)
    lengths, starts = np.full(rows, context, np.int32), np.arange(rows + 1, dtype=np.int32)
    slots = tables[:, -1].astype(np.int64) * BLOCK + (context - 1) % BLOCK
    kernel = kind(HEADS, SIZE, BLOCK, dtype)
    return kernel, kernel.plan(num_blocks, slots, starts, lengths, tables, rows), cache


def chunks() -> dict[str, Contenders]:
    library, size = native.library(), 512
    if library is None or not library.octavo_has_linear():
        return {}
    cases: dict[str, Contenders] = {}
    for before in (0, 512):
        blocks = (before + size) // BLOCK
        cache = memory.zeros((LAYERS, 2, blocks + 1, HEADS, BLOCK, SIZE), torch.bfloat16)
        cache.copy_(torch.randn(cache.shape[1:]).expand_as(cache))
        table, places = np.arange(1, blocks + 1, dtype=np.int32)[None], before + np.arange(size)
        slots = table[0, places // BLOCK].astype(np.int64) * BLOCK + places % BLOCK
        starts, lengths = np.array([0, size], np.int32), np.array([before + size], np.int32)
        case: dict[str, Callable[[], object]] = {}
        for name, dtype in (("torch, flash", torch.float32), ("C, bf16", torch.bfloat16)):  # of queries, as announced
            kernel = NativeAttention(HEADS, SIZE, BLOCK, torch.bfloat16, dtype)
            plan = kernel.plan(blocks + 1, slots, starts, lengths, table, 0)
            case[name] = partial(attend_layers, kernel, plan, torch.randn(size, 3 * WIDTH).bfloat16(), cache)
        cases[f"chunk, 512 after {before}"] = case
    return cases


def attend_layers(kernel: NativeAttention, plan: NativePlan, qkv: torch.Tensor, cache: torch.Tensor) -> None:
    for layer in cache:
        kernel.attend(plan, qkv, layer, SIZE**-0.5)


def layers() -> dict[str, Contenders]:
    library = native.library()
    if library is None or not library.octavo_has_linear():
        return {}
    blocks = [random_block() for _ in range(LAYERS)]
    whole = NativeBlocks.of(blocks, 1e-5)
    assert whole is not None
    cases: dict[str, Contenders] = {}
    for rows in (1, 4, 16, 64):
        kernel, plan, cache = planned(NativeAttention, torch.bfloat16, rows, 43)
        hidden = torch.randn(rows, WIDTH).bfloat16()
        cases[f"layers, {rows} rows"] = {
            "one by one": partial(one_by_one, blocks, kernel, hidden, plan, cache),
            "one call": lambda h=hidden, p=plan, c=cache: whole(h.clone(), p, c),  # type: ignore[misc]
        }
    return cases


def random_block() -> BlockParts:
    def linear(outputs: int, inputs: int, activation: str | None = None) -> Any:
        return pack(torch.randn(outputs, inputs) * 0.02, torch.zeros(outputs), LinearKind.NATIVE, activation)

    norm = torch.ones(WIDTH).bfloat16(), torch.zeros(WIDTH).bfloat16()
    qkv, out = linear(3 * WIDTH, WIDTH), linear(WIDTH, WIDTH)
    mlp_in, mlp_out = linear(4 * WIDTH, WIDTH, "gelu_new"), linear(WIDTH, 4 * WIDTH)
    return BlockParts(norm, qkv, out, norm, mlp_in, mlp_out, SIZE**-0.5, 1.0, 1.0)


def one_by_one(
    blocks: list[BlockParts], kernel: NativeAttention, hidden: torch.Tensor, plan: NativePlan, cache: torch.Tensor
) -> torch.Tensor:
    """As `GPT2.forward`."""
    hidden = hidden.clone()
    for block, layer in zip(blocks, cache, strict=True):
        qkv = block.qkv(layer_norm(hidden, *block.norm_1, 1e-5))
        kernel.write(plan, qkv, layer)
        hidden = block.attention_out(kernel.attend(plan, qkv, layer, block.scale), hidden)
        hidden = block.mlp_out(block.mlp_in(layer_norm(hidden, *block.norm_2, 1e-5)), hidden)
    return hidden


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
            f"{case:<22}{name:<22}{spread['median']:>9.3f} ms ({spread['least']:.3f} to {spread['most']:.3f})",
            flush=True,
        )
        lines.append({"record": "case", "case": case, "contender": name, **spread})
    return lines


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=["linear", "attention", "chunks", "layers", "argmax"], help="default: all")
    parser.add_argument("--out", default=str(OUT), help='"" to write nothing')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines: list[dict[str, Any]] = []
    for name, cases in {
        "linear": linears,
        "attention": attentions,
        "chunks": chunks,
        "layers": layers,
        "argmax": argmaxes,
    }.items():
        if options.only in (None, name):
            for case, contenders in cases().items():
                lines += measure(case, contenders, options.repeats)
    turns.append(options.out, environment.describe() | {"threads": options.threads, "repeats": options.repeats}, lines)


if __name__ == "__main__":
    main()
