"""The shapes that steps are padded to, and CUDA graphs of their launches, captured at start.

A graph replays hundreds of launches for the price of one, which is what makes a step of a few rows fast. Shapes are
captured largest first, so that the smaller ones fit the memory of the larger, until a time is over: a step takes the
smallest captured shape that holds it, and is launched kernel by kernel, without padding, where there is none.

In Triton's interpreter the same shapes are launched and nothing is captured, so that tests see the padding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from octavo.config import EngineConfig, shares_prefixes
from octavo.worker.step_layout import MAX_DRAFT, StepShape, largest_drafts, lay_out
from octavo.worker.step_program import StepProgram, StepTensors

MIXED_CHUNKS = ((4, 64), (8, 128), (16, 256), (32, 512), (64, 1024))
"""(rows, tokens) of the prompts' part of a mixed step, at most `kv_cache.PADDING_ROWS` rows. Larger steps are bound by
arithmetic, not by launches."""
MIXED_DECODES = (0, 16, 64, 128, 256, 512)
DRAFT_CHUNKS = ((4, 16), (4, 64), (8, 128), (16, 256))
"""(rows, tokens) of the part of a step that has drafts: from a single row's longest one on. Steps that bring prompts,
too, draft nothing."""
LEAST_SHARED_ROWS = 4
"""Fewer save too little, see `shared_prefixes.LEAST_SAVED`."""

CAPTURE_SECONDS = 30.0
"""After which no more shapes are captured: a server should start."""

Launch = Callable[[], StepTensors]
NO_ROWS = np.empty(0, np.int32)


def decode_buckets(max_rows: int) -> list[int]:
    """1, 2, 4, then steps of 8 to 256, of 16 to 512, of 32 beyond; the last is max_rows."""
    buckets = [1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, max_rows, 32)]
    return [bucket for bucket in buckets if bucket < max_rows] + [max_rows]


def graph_shapes(max_rows: int, max_tokens: int, *, shared: bool = False) -> Iterator[StepShape]:
    """Worth capturing, the most useful first: decode steps, then mixed ones, each largest first; then those with
    drafts. shared: also steps in which rows share splits of their context, those without history or drafts."""
    plain = [*_decode_shapes(max_rows), *_mixed_shapes(max_rows, max_tokens)]
    for shapes in (plain, list(_draft_shapes(max_rows))):
        yield from shapes
        yield from (replace(shape, history=True) for shape in shapes)
    if shared:
        yield from (replace(shape, shared=True) for shape in plain if shape.decode_rows >= LEAST_SHARED_ROWS)


def _decode_shapes(max_rows: int) -> Iterator[StepShape]:
    for rows in reversed(decode_buckets(max_rows)):
        yield StepShape(rows)


def _mixed_shapes(max_rows: int, max_tokens: int) -> Iterator[StepShape]:
    for rows, tokens in reversed(MIXED_CHUNKS):
        for count in _decodes_beside(max_rows):
            if tokens <= max_tokens and rows <= max_rows:
                yield StepShape(count, rows, tokens)


def _draft_shapes(max_rows: int) -> Iterator[StepShape]:
    most = largest_drafts(max_rows).draft_rows
    for rows, tokens in reversed(DRAFT_CHUNKS):
        for count in _decodes_beside(max_rows):
            if rows <= most:
                yield StepShape(count, draft_rows=rows, draft_tokens=tokens, draft_rounds=MAX_DRAFT)


def _decodes_beside(max_rows: int) -> list[int]:
    """Rows that decode beside others, the most first."""
    return [max_rows] + [count for count in reversed(MIXED_DECODES) if count < max_rows]


def capture_graphs(
    graphs: StepGraphs, config: EngineConfig, device: torch.device, progress: Callable[[str], None]
) -> None:
    """Captures what the configuration asks for. progress: is told how many shapes, in what time and memory."""
    if not config.model.cuda_graphs:
        return
    scheduler, start = config.scheduler, time.monotonic()
    shared = shares_prefixes(config.model)
    shapes = list(graph_shapes(scheduler.max_num_requests, scheduler.max_num_batched_tokens, shared=shared))
    if device.type != "cuda":
        graphs.capture(shapes, CAPTURE_SECONDS)
        return
    progress(f"CUDA graphs: capturing up to {len(shapes)} shapes of steps")
    before = torch.cuda.memory_reserved(device)
    graphs.capture(shapes, CAPTURE_SECONDS)
    mib = (torch.cuda.memory_reserved(device) - before) >> 20
    seconds = time.monotonic() - start
    progress(f"CUDA graphs: {graphs.num_shapes} of {len(shapes)} shapes in {seconds:.1f} s, {mib} MiB")


def _size(shape: StepShape) -> tuple[int, ...]:
    return shape.num_tokens, shape.num_rows, shape.draft_rounds, shape.history, shape.shared


class StepGraphs:
    """Runs a step's launches: by replaying the graph of its shape, or one by one."""

    def __init__(self, program: StepProgram) -> None:
        self._program = program
        self._launches: dict[StepShape, Launch] = {}
        self._by_size: list[StepShape] = []
        self._chosen: dict[StepShape, StepShape] = {}

    @property
    def num_shapes(self) -> int:
        return len(self._launches)

    def capture(self, shapes: Iterable[StepShape], seconds: float) -> None:
        """Captures shapes until the time is over; each is launched once with rows of padding alone."""
        end = time.monotonic() + seconds
        pool = torch.cuda.graph_pool_handle() if self._program.device.type == "cuda" else None
        for shape in shapes:
            if time.monotonic() > end:
                break
            self._program.write(lay_out(shape, NO_ROWS, NO_ROWS, 0, NO_ROWS.astype(bool), self._program.padding_slot))
            self._launches[shape] = self._captured(shape, pool)
        self._by_size = sorted(self._launches, key=_size)
        self._chosen.clear()

    def shape_for(self, exact: StepShape) -> StepShape:
        """The smallest captured shape that holds this one, or this one without shares; else this one."""
        shape = self._chosen.get(exact)
        if shape is None:
            shape = self._smallest(exact) or self._smallest(replace(exact, shared=False)) or exact
            if len(self._chosen) < 1 << 16:
                self._chosen[exact] = shape
        return shape

    def _smallest(self, exact: StepShape) -> StepShape | None:
        return next((shape for shape in self._by_size if shape.holds(exact)), None)

    def run(self, shape: StepShape) -> StepTensors:
        """Computes the step whose words the program has."""
        launch = self._launches.get(shape)
        return self._program.launch(shape) if launch is None else launch()

    def _captured(self, shape: StepShape, pool: Any) -> Launch:
        program = self._program
        if pool is None:
            return lambda: program.launch(shape)
        side = torch.cuda.Stream(program.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(program.device))
        with torch.cuda.stream(side):
            program.launch(shape)  # compiles kernels and lets libraries allocate, which no capture may
        torch.cuda.current_stream(program.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side):
            tensors = program.launch(shape)

        def replay() -> StepTensors:
            graph.replay()
            program.model.num_layers_computed += program.model.spec.n_layer
            return tensors

        return replay
