"""Choosing the next tokens of a batch: greedy, filtered, and mixes of everything."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_timing import Work, copies_for
from kernel_case import Case, Setting, Target
from octavo_kernels.history import apply_history
from octavo_kernels.logprobs import LogprobBuffers, gather_logprobs
from octavo_kernels.sampling import sample
from octavo_kernels.state import Bitmap, Feature, Param, SlotState
from octavo_kernels.workspace import SamplerWorkspace
from torch import Tensor

VOCAB, COLUMNS = 50257, 50304
N_POSITIONS, LENGTH, PROMPT = 1024, 200, 100
BATCHES = (256, 64, 8, 1)
SPREAD = 3.0
"""Standard deviation of the logits: with 2.5 or more, top_p 0.9 keeps some thousand tokens of 50,257."""
HISTORY = (
    Feature.NO_REPEAT_NGRAM
    | Feature.ENCODER_NO_REPEAT_NGRAM
    | Feature.BAD_WORDS
    | Feature.BIAS
    | Feature.OUTPUT_PENALTY
)
"""What `apply_history` acts on."""
THREADS_PER_MULTIPROCESSOR = 2048

Settings = dict[Param, int | float]


def sampled(features: Feature = Feature.NONE, **values: Any) -> tuple[Feature, Settings]:
    return Feature.SAMPLE | features, {Param[name.upper()]: value for name, value in values.items()}


GREEDY: tuple[Feature, Settings] = (Feature.NONE, {})
RACE = sampled()
TOP_K = sampled(Feature.TOP_K, top_k=50)
BOTH = sampled(Feature.TOP_K | Feature.TOP_P | Feature.TEMPERATURE, top_k=50, top_p_tail=0.1, temperature=0.8)
TOP_P = sampled(Feature.TOP_P | Feature.REPETITION_PENALTY, top_p_tail=0.1, repetition_penalty=1.2)
PENALTIES = sampled(
    Feature.OUTPUT_PENALTY | Feature.NO_REPEAT_NGRAM | Feature.TOP_K,
    top_k=50,
    frequency_penalty=0.5,
    presence_penalty=0.5,
    no_repeat_ngram_size=3,
)
LOGPROBS = (Feature.SAMPLE | Feature.TOP_K | Feature.LOGPROBS, {Param.TOP_K: 50, Param.NUM_TOP: 5})
MIXES = {
    "greedy": [GREEDY],
    "unfiltered": [RACE],
    "top_k 50": [TOP_K],
    "top_k 50, top_p 0.9": [BOTH],
    "top_p 0.9": [TOP_P],
    "mixed": [GREEDY, TOP_K, BOTH, GREEDY, TOP_K, BOTH, TOP_P, RACE],
    "penalties and n-grams": [PENALTIES],
    "top_k 50, 5 logprobs": [LOGPROBS],
}
"""Rows take these in turns. "mixed" is the batch of the target."""


@dataclass
class Batch:
    """Rows with their settings and copies of random logits."""

    setting: Setting
    rows: int
    mix: list[tuple[Feature, Settings]]

    def __post_init__(self) -> None:
        device = self.setting.device
        self.vocab, columns = (120, 128) if self.setting.tiny else (VOCAB, COLUMNS)
        self.bytes = float(self.rows * self.vocab * self.setting.dtype.itemsize)
        self.copies = min(16, copies_for(self.bytes, self.setting.l2_bytes))
        self.logits = (torch.randn(self.copies, self.rows, columns, device=device) * SPREAD).to(self.setting.dtype)
        self.features = Feature.NONE
        self.state = SlotState.allocate(self.rows, N_POSITIONS, 32, self.vocab, device)
        self.state.hist.copy_(torch.randint(0, self.vocab, self.state.hist.shape, dtype=torch.int32))
        self.state.length[: self.rows] = LENGTH
        self.state.params.copy_(self._params())
        self._mark_seen()
        self.saved = self.state.arena.clone()
        self.row_slots = torch.arange(self.rows, dtype=torch.int32, device=device)
        self.workspace = SamplerWorkspace.allocate(self.rows, self.vocab, device)
        self.results = torch.zeros(self.rows, 4, dtype=torch.int32, device=device)
        self.logprobs = LogprobBuffers.allocate(self.rows, device)

    def _params(self) -> Tensor:
        params = torch.zeros(self.state.params.shape, dtype=torch.int32)
        for row in range(self.rows):
            features, values = self.mix[row % len(self.mix)]
            self.features |= features
            common: Settings = {
                Param.FEATURES: int(features),
                Param.SEED_LOW: row + 1,
                Param.NUM_ROWS: 1,
                Param.PROMPT_LEN: PROMPT,
                Param.MAX_TOTAL: 2**31 - 1,
                Param.MIN_KEEP: 1,
            }
            for param, value in (common | values).items():
                params[row, param] = struct.unpack("<i", struct.pack("<f", value))[0] if type(value) is float else value
        return params

    def _mark_seen(self) -> None:
        """The tokens of each row's history, as far as penalties need them."""
        for row in range(self.rows):
            features, _ = self.mix[row % len(self.mix)]
            if features & (Feature.REPETITION_PENALTY | Feature.OUTPUT_PENALTY):
                bits = torch.zeros(self.state.bitmaps.shape[2], 32, dtype=torch.int64)
                tokens = self.state.hist[row, :LENGTH].cpu().long()
                bits[tokens // 32, tokens % 32] = 1
                words = (bits << torch.arange(32)).sum(1)
                self.state.bitmaps[row, Bitmap.SEEN] = (words - (words >> 31 << 32)).to(torch.int32)
                ids, counts = self.state.hist[row, PROMPT:LENGTH].cpu().unique(return_counts=True)
                self.state.num_counts[row] = len(ids)
                self.state.count_ids[row, : len(ids)] = ids.to(torch.int32)
                self.state.counts[row, : len(ids)] = counts.to(torch.int32)

    def reset(self) -> None:
        self.state.arena.copy_(self.saved)


def sampling_cases(setting: Setting) -> Iterator[Case]:
    for rows in (2,) if setting.tiny else BATCHES:
        for name, mix in MIXES.items():
            yield sampling_case(setting, name, mix, rows)


def sampling_case(setting: Setting, name: str, mix: list[tuple[Feature, Settings]], rows: int) -> Case:
    batch = Batch(setting, rows, mix)
    contenders: dict[str, Callable[[], Work]] = {}
    if name == "greedy":
        contenders["torch argmax"] = partial(argmax_work, batch)
    if name == "unfiltered":
        contenders["torch softmax, race"] = partial(torch_work, batch, race)
    if name.startswith("top_k"):
        contenders["torch topk, race"] = partial(torch_work, batch, topk_race)
    if name in ("top_p 0.9", "mixed", "top_k 50, top_p 0.9"):
        contenders["torch sort, race"] = partial(torch_work, batch, sort_race)
        contenders["FlashInfer"] = partial(flashinfer_work, batch)
    contenders["octavo"] = partial(sample_work, batch)
    limit = 35.0 if rows == 256 and name == "mixed" else None
    return Case(
        bench="sampling",
        name=f"{name}, {rows} rows",
        facts={"rows": rows, "mix": name, "vocab": batch.vocab},
        bytes=batch.bytes,
        flops=0.0,
        copies=batch.copies,
        contenders=contenders,
        target=Target("octavo", microseconds=limit, ahead=True),
        tolerance=0.0,
    )


def sample_work(batch: Batch) -> Work:
    """As worker/device_runner.py launches it."""
    on_gpu = batch.setting.device.type == "cuda"
    processors = torch.cuda.get_device_properties(batch.setting.device).multi_processor_count if on_gpu else 132
    num_threads = processors * THREADS_PER_MULTIPROCESSOR

    def run(copy: int) -> None:
        logits, state, slots, workspace = batch.logits[copy], batch.state, batch.row_slots, batch.workspace
        if batch.features & HISTORY:
            apply_history(logits, state, slots, workspace, reciprocal=True)
        sample(logits, state, slots, workspace, batch.results, reciprocal=True, num_threads=num_threads)
        if batch.features & Feature.LOGPROBS:
            gather_logprobs(logits, state, slots, workspace, batch.results, batch.logprobs)

    def result() -> Tensor:
        batch.reset()
        run(0)
        return scores_of(batch, batch.results[:, 0].long())

    return Work(run, result if batch.features == Feature.NONE else None, batch.reset)


def scores_of(batch: Batch, tokens: Tensor) -> Tensor:
    """The chosen tokens' logits: rows may have several maxima."""
    return batch.logits[0].float().gather(1, tokens.clamp_min(0)[:, None])


def argmax_work(batch: Batch) -> Work:
    results: list[Tensor] = [batch.results]

    def run(copy: int) -> None:
        results[0] = batch.logits[copy, :, : batch.vocab].argmax(-1)

    def result() -> Tensor:
        run(0)
        return scores_of(batch, results[0])

    return Work(run, result)


def torch_work(batch: Batch, choose: Callable[[Tensor], Tensor]) -> Work:
    return Work(lambda copy: choose(batch.logits[copy, :, : batch.vocab].float()))


def race(scores: Tensor) -> Tensor:
    p = scores.softmax(-1)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def topk_race(scores: Tensor) -> Tensor:
    """top_k 50, then top_p 0.9 of what is left."""
    values, order = scores.topk(50)
    p = values.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p > 0.9, 0.0)
    return order.gather(1, (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True))


def sort_race(scores: Tensor) -> Tensor:
    """top_p 0.9 as transformers does it; what a batch costs where one row asks for it."""
    values, order = scores.sort(-1)
    values = values.masked_fill(values.softmax(-1).cumsum(-1) <= 0.1, -torch.inf)
    p = values.softmax(-1)
    return order.gather(1, (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True))


def flashinfer_work(batch: Batch) -> Work:
    """Its rejection sampler, top_k 50 and top_p 0.9 for all rows."""
    if batch.setting.device.type != "cuda":
        raise ImportError("flashinfer is only run on a GPU")
    sampling = importlib.import_module("flashinfer.sampling")

    def run(copy: int) -> None:
        probabilities = batch.logits[copy, :, : batch.vocab].float().softmax(-1)
        sampling.top_k_top_p_sampling_from_probs(probabilities, 50, 0.9, deterministic=True)

    return Work(run)
