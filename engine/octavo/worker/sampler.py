"""Chooses the next token of every sampling row of a step, each by its own request's parameters.

logits -> float32 -> processors (`logits.py`) -> argmax, or: temperature, filters (`warpers.py`), softmax, and the race
argmax(p / q) with the request's own random numbers (`noise.py`). Steps, order and numbers are those of transformers'
generate(). Rows that use a feature are worked on together; a batch of plain greedy rows is one argmax.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from octavo_kernels.cpu.argmax import argmax
from torch import Tensor

from octavo.errors import Reason
from octavo.step import Bools, Int32s, LogprobRows
from octavo.worker.constraints import ConstraintError
from octavo.worker.features import FILTERS, PROCESSORS, RANKED, WATERMARK, Feature
from octavo.worker.guidance import Guided
from octavo.worker.logits import process_logits
from octavo.worker.logprobs import RAW, gather_logprobs, join_logprob_rows
from octavo.worker.noise import RandomNumbers
from octavo.worker.request_states import WHOLE_VOCABULARY, WINDOWS, Float32s, Int64s, RequestStates
from octavo.worker.warpers import filter_scores, keep_interval, largest, ranked_interval, scale, spills
from octavo.worker.watermark import watermarked

log = logging.getLogger(__name__)

Features = npt.NDArray[np.uint32]


@dataclass(slots=True)
class SamplerOutput:
    token_ids: Int32s
    """[S], -1 where the row failed."""
    logprobs: LogprobRows | None = None
    """Its rows are indices into the S rows."""
    failed: list[tuple[int, Reason]] = field(default_factory=list)


class Sampler:
    """Stateless but for the random streams; reads parameters and histories from the RequestStates of the runner."""

    def __init__(self, states: RequestStates, noise: RandomNumbers) -> None:
        self._states = states
        self._noise = noise

    def sample(self, logits: Tensor, slots: Int32s, guided: Guided | None = None) -> SamplerOutput:
        """Chooses one token for each row. A row whose computation raises fails alone, with INTERNAL.

        Args:
            logits: [S, V] in the model's dtype; not changed.
            slots: int32 [S] the rows' requests.
            guided: what some rows choose from instead of their logits.

        Raises:
            torch.AcceleratorError: the device is at fault, not a row.
        """
        try:
            return self._sample(logits, slots, guided)
        except torch.AcceleratorError:
            raise
        except ConstraintError:
            pass
        except Exception:
            log.exception("sampling %d rows together failed; each is tried alone", len(slots))
        parts = [
            self._sample_alone(logits[row : row + 1], slots[row : row + 1], guided and guided.alone(row))
            for row in range(len(slots))
        ]
        for row, part in enumerate(parts):
            part.failed = [(row, reason) for _, reason in part.failed]
            if part.logprobs is not None:
                part.logprobs.rows += row
        logprobs = [part.logprobs for part in parts if part.logprobs is not None]
        return SamplerOutput(
            np.concatenate([part.token_ids for part in parts]),
            join_logprob_rows(logprobs) if logprobs else None,
            [failure for part in parts for failure in part.failed],
        )

    def _sample_alone(self, logits: Tensor, slots: Int32s, guided: Guided | None) -> SamplerOutput:
        """As `_sample`, of one row that fails if it raises."""
        try:
            return self._sample(logits, slots, guided)
        except torch.AcceleratorError:
            raise
        except ConstraintError:
            return SamplerOutput(np.full(1, -1, np.int32), failed=[(0, Reason.CONSTRAINT_TOO_COMPLEX)])
        except Exception:
            log.exception("sampling for slot %d failed; its request fails with it", slots[0])
            return SamplerOutput(np.full(1, -1, np.int32), failed=[(0, Reason.INTERNAL)])

    def _sample(self, logits: Tensor, slots: Int32s, guided: Guided | None) -> SamplerOutput:
        """Changes nothing but the random streams, which may be asked for the same step again."""
        features = self._states.sampling.features[slots]
        if logits.is_cpu and not features.all():
            return self._sample_apart(logits, slots, features, guided)
        return self._sample_together(logits, slots, features, guided)

    def _sample_together(
        self, logits: Tensor, slots: Int32s, features: Features, guided: Guided | None
    ) -> SamplerOutput:
        used = int(np.bitwise_or.reduce(features))
        scores = logits.float()
        if scores is logits and (used & PROCESSORS or guided is not None):
            scores = scores.clone()
        if guided is not None:
            scores[torch.from_numpy(guided.rows).to(scores.device)] = guided.scores
        if used & PROCESSORS:
            process_logits(scores, slots, features, used, self._states)
        token_ids, best = _argmax(scores)
        failed = self._failures(logits, best, slots, features)
        if used & WATERMARK:
            greedy = np.flatnonzero(features & (WATERMARK | Feature.SAMPLE) == WATERMARK)
            scores = self._watermarked(scores, slots, greedy)
            token_ids[greedy] = _argmax(_rows(scores, greedy))[0]
        warped: dict[int, Tensor] = {}
        if used & Feature.SAMPLE:
            sampling = features & Feature.SAMPLE != 0
            sampling[[row for row, _ in failed]] = False
            self._draw(scores, slots, features, np.flatnonzero(sampling), token_ids, warped)
        token_ids[[row for row, _ in failed]] = -1
        logprobs = None
        if used & Feature.LOGPROBS:
            logprobs = self._logprobs(logits, scores, warped, slots, features, token_ids)
        return SamplerOutput(token_ids, logprobs, failed)

    def _sample_apart(self, logits: Tensor, slots: Int32s, features: Features, guided: Guided | None) -> SamplerOutput:
        """As `_sample`: rows that use nothing take their largest logit, and pay nothing for what others use."""
        uses = features != 0
        if guided is not None:
            uses[guided.rows] = True
        token_ids, best = _argmax(logits)
        failed = [(row, reason) for row, reason in self._failures(logits, best, slots, features) if not uses[row]]
        token_ids[[row for row, _ in failed]] = -1
        rows = np.flatnonzero(uses)
        if not len(rows):
            return SamplerOutput(token_ids, failed=failed)
        others = guided and guided.among(rows)
        part = self._sample_together(logits[torch.from_numpy(rows)], slots[rows], features[rows], others)
        token_ids[rows] = part.token_ids
        if part.logprobs is not None:
            part.logprobs.rows = rows[part.logprobs.rows].astype(np.int32)
        failed += [(int(rows[row]), reason) for row, reason in part.failed]
        return SamplerOutput(token_ids, part.logprobs, sorted(failed))

    def _failures(self, logits: Tensor, best: Float32s, slots: Int32s, features: Features) -> list[tuple[int, Reason]]:
        """Rows without a choice, seen from their largest score: NaN is larger than anything."""
        samples = features & Feature.SAMPLE != 0
        if not samples.any() and np.isfinite(best).all():
            return []
        scaled = best
        if samples.any():  # a tiny temperature may overflow; greedy rows do not divide
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                scaled = np.where(samples, best / self._states.sampling.temperature[slots], best)
        bad = np.isnan(scaled) | (scaled == -math.inf) | (samples & np.isinf(scaled))
        failed = []
        for row in np.flatnonzero(bad).tolist():
            raw = logits[row]
            of_model = bool(raw.isnan().any() | (raw == math.inf).any())
            failed.append((row, Reason.NON_FINITE_LOGITS if of_model else Reason.NON_FINITE_SCORES))
        return failed

    def _draw(
        self,
        scores: Tensor,
        slots: Int32s,
        features: Features,
        rows: Int64s,
        token_ids: Int32s,
        warped: dict[int, Tensor],
    ) -> None:
        """Draws the tokens of the rows that sample into `token_ids`; fills `warped` for those who want to see it."""
        windows = self._states.sampling.window[slots[rows]]
        whole = rows[windows <= WHOLE_VOCABULARY]
        for window in WINDOWS:
            members = rows[windows == window]
            if len(members):
                values, ids, spilled = self._windowed(scores, members, slots[members], features[members], window)
                whole = np.concatenate([whole, members[spilled]])
                kept = np.flatnonzero(~spilled)
                self._race(values[kept], ids[kept], members[kept], slots, features, token_ids, warped)
        whole.sort()
        if len(whole):
            values = self._whole(scores, whole, slots[whole], features[whole])
            self._race(values, None, whole, slots, features, token_ids, warped)

    def _windowed(
        self, scores: Tensor, rows: Int64s, slots: Int32s, features: Features, window: int
    ) -> tuple[Tensor, Tensor, Bools]:
        """Filtered scores [F, K] and token ids [F, K] of rows whose top_k fits the window.

        The third, [F], is true where ties with the k-th may lie outside the window, so that the row's result is void.
        """
        params = self._states.sampling
        values, ids = largest(_rows(scores, rows), window)
        values = scale(values, slots, features, params)
        spilled = spills(values, window, params.top_k[slots])
        return filter_scores(values, slots, features, params), ids, spilled

    def _whole(self, scores: Tensor, rows: Int64s, slots: Int32s, features: Features) -> Tensor:
        """Filtered scores [F, V]. Rows with ranked filters find their interval in a sorted copy."""
        params = self._states.sampling
        values = scale(_rows(scores, rows), slots, features, params)
        ranked = np.flatnonzero(features & RANKED != 0)
        plain = np.flatnonzero((features & RANKED == 0) & (features & FILTERS != 0))
        if len(plain):
            index = torch.from_numpy(plain).to(values.device)
            values = values.index_copy(0, index, filter_scores(values[index], slots[plain], features[plain], params))
        if len(ranked):
            index = torch.from_numpy(ranked).to(values.device)
            subset = values[index]
            lo, hi = ranked_interval(subset, slots[ranked], features[ranked], params)
            values = values.index_copy(0, index, keep_interval(subset, lo, hi))
        return self._watermarked(values, slots, np.flatnonzero(features & WATERMARK))

    def _watermarked(self, scores: Tensor, slots: Int32s, rows: Int64s) -> Tensor:
        """[F, V] with these rows marked; the same tensor if there are none, else a copy."""
        states = self._states
        copy = scores.clone() if len(rows) else scores
        for row in rows.tolist():
            slot = int(slots[row])
            mark = states.params[slot].watermarking_config
            assert mark is not None
            history = states.hist[slot, : states.length[slot]]
            copy[row] = watermarked(scores[row], history, int(states.prompt_len[slot]), mark, self._noise.device)
        return copy

    def _race(
        self,
        values: Tensor,
        ids: Tensor | None,
        rows: Int64s,
        slots: Int32s,
        features: Features,
        token_ids: Int32s,
        warped: dict[int, Tensor],
    ) -> None:
        """argmax(p / q) of filtered scores [F, K], lowest token id on ties; ids [F, K] names the columns."""
        if len(rows) == 0:
            return
        noise = torch.stack([self._noise_of(slots[row], None if ids is None else ids[i]) for i, row in enumerate(rows)])
        ratio = values.softmax(-1) / noise
        if ids is None:
            winners = ratio.argmax(-1)
        else:
            vocab_size = self._states.vocab_size
            best = ratio == ratio.amax(-1, keepdim=True)
            winners = torch.where(best, ids, vocab_size).amin(-1).clamp_(max=vocab_size - 1)
        token_ids[rows] = winners.cpu().numpy()
        for i in np.flatnonzero(features[rows] & Feature.LOGPROBS).tolist():
            row = int(rows[i])
            if self._states.logprobs[int(slots[row])].kind in RAW:
                continue
            warped[row] = values[i] if ids is None else _scattered(values[i], ids[i], self._states.vocab_size)

    def _noise_of(self, slot: int, ids: Tensor | None) -> Tensor:
        states = self._states
        step = int(states.length[slot] - states.prompt_len[slot])
        return self._noise.exponentials(int(states.group_id[slot]), int(states.group_row[slot]), step, ids)

    def _logprobs(
        self,
        logits: Tensor,
        scores: Tensor,
        warped: dict[int, Tensor],
        slots: Int32s,
        features: Features,
        token_ids: Int32s,
    ) -> LogprobRows | None:
        rows = np.flatnonzero((features & Feature.LOGPROBS != 0) & (token_ids >= 0))
        if len(rows) == 0:
            return None
        specs = [self._states.logprobs[slot] for slot in slots[rows].tolist()]
        return gather_logprobs(logits, scores, warped, rows, specs, token_ids)


def _argmax(scores: Tensor) -> tuple[Int32s, Float32s]:
    """int32 [S] first index of each row's largest score (of its first NaN, if there is one), and that score."""
    if scores.is_cpu:
        return argmax(scores)
    winners = scores.argmax(-1, keepdim=True)
    return winners[:, 0].int().cpu().numpy(), scores.gather(1, winners)[:, 0].cpu().numpy()


def _rows(scores: Tensor, rows: Int64s) -> Tensor:
    """scores[rows], without a copy if that is all of them."""
    return scores if len(rows) == scores.shape[0] else scores[torch.from_numpy(rows).to(scores.device)]


def _scattered(values: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """[V] with values [K] at ids [K], -inf elsewhere."""
    kept = values > -math.inf
    row = torch.full((vocab_size,), -math.inf, device=values.device)
    row[ids[kept]] = values[kept]
    return row
