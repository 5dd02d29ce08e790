"""The beam searches of a runner: scores of their rows, and their choices applied to the request states.

Beside `Sampler`, which has the rows of all other requests. A row's logits are log_softmax'ed first, so that every step
of the pipeline acts on log-probabilities; every warper leaves `BeamParams.min_keep` tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.errors import Reason
from octavo.step import BeamChoice, Bools, Int32s, ModelRunnerOutput, NewRequest
from octavo.tokenizer import Tokenizer
from octavo.types import EarlyStopping, GenerationParams
from octavo.worker.beam_logprobs import shown_values
from octavo.worker.beam_search import BeamParams, BeamSearch, Race, StopFinder, contains_stop
from octavo.worker.features import FILTERS, PROCESSORS, WATERMARK, Feature
from octavo.worker.logits import process_logits
from octavo.worker.noise import RandomNumbers
from octavo.worker.request_states import Int64s, RequestStates
from octavo.worker.warpers import keep_interval, ranked_interval, scale
from octavo.worker.watermark import mark_rows, watermarked

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Member:
    """A search in a step, its rows in order."""

    group_id: int
    search: BeamSearch
    logits: Tensor
    """float32 [k, V]"""
    slots: Int32s
    """[k]"""
    rows: Int64s
    """[k] where they are in the step."""
    valid: bool
    """The logits have neither NaN nor +inf."""


class Beams:
    """Owns the state of every search, by group id, from its first admission until its group is released."""

    def __init__(self, states: RequestStates, noise: RandomNumbers, checkpoint: Path) -> None:
        self._states = states
        self._noise = noise
        self._checkpoint = checkpoint
        self._searches: dict[int, BeamSearch] = {}
        self._token_bytes: list[bytes] | None = None
        """Of the checkpoint's vocabulary, once a search has asked for stop strings."""

    def __len__(self) -> int:
        return len(self._searches)

    def open(self, request: NewRequest) -> None:
        """Starts the search of a new request; does nothing if it is open (it came back after a preemption)."""
        if request.group_id not in self._searches:
            find_stop = self._stop_finder(request) if request.params.stop_strings else None
            self._searches[request.group_id] = BeamSearch(_params_of(request), self._race(request), find_stop)

    def close(self, group_id: int) -> None:
        self._searches.pop(group_id, None)

    def of_searches(self, slots: Int32s) -> Bools:
        """[S] which of these slots are rows of a search."""
        found: Bools = np.isin(self._states.group_id[slots], list(self._searches))
        return found

    def choose(
        self, logits: Tensor, slots: Int32s, rows: Int64s, expired: Collection[int], output: ModelRunnerOutput
    ) -> None:
        """Advances the searches of a step by one token. One whose computation raises fails alone, with INTERNAL.

        Args:
            logits: [S, V] of rows of searches; all rows of each.
            slots: int32 [S] theirs.
            rows: [S] where each is in the step.
            expired: groups whose time is over.
        """
        members = self._members(logits, slots, rows)
        scores = self._scores_together(members)
        for member in members:
            try:
                choice = self._choose(member, scores.get(member.group_id), member.group_id in expired)
            except torch.AcceleratorError:
                raise
            except Exception:
                log.exception("the beam search of group %d failed; its request fails with it", member.group_id)
                choice = Reason.INTERNAL
            if isinstance(choice, Reason):
                self._states.fail(member.slots)
                output.failed += [(row, choice) for row in member.rows.tolist()]
            else:
                output.beams.append(choice)

    def _members(self, logits: Tensor, slots: Int32s, rows: Int64s) -> list[_Member]:
        """The searches of a step, by group id."""
        order = np.lexsort((self._states.group_row[slots], self._states.group_id[slots]))
        logits = logits[torch.from_numpy(order).to(logits.device)].float().cpu()
        slots, rows = slots[order], rows[order]
        best = logits.amax(-1).numpy()  # NaN if there is one
        valid = ~(np.isnan(best) | (best == math.inf))
        groups, first, sizes = np.unique(self._states.group_id[slots], return_index=True, return_counts=True)
        spans = [slice(start, start + size) for start, size in zip(first.tolist(), sizes.tolist(), strict=True)]
        return [
            _Member(group, self._searches[group], logits[s], slots[s], rows[s], bool(valid[s].all()))
            for group, s in zip(groups.tolist(), spans, strict=True)
        ]

    def _scores_together(self, members: list[_Member]) -> dict[int, Tensor]:
        """[k, V] by group id: `_scores` of searches with the same features at once; none of those where it raises."""
        scores: dict[int, Tensor] = {}
        alike: dict[tuple[int, int], list[_Member]] = {}
        for member in members:
            if member.valid:
                used = int(self._states.sampling.features[member.slots[0]])
                alike.setdefault((used, member.search.params.min_keep), []).append(member)
        for (_, min_keep), batch in alike.items():
            logits = torch.cat([member.logits for member in batch])
            slots = np.concatenate([member.slots for member in batch])
            try:
                parts = torch.split(self._scores(logits, slots, min_keep), [len(member.slots) for member in batch])
            except torch.AcceleratorError:
                raise
            except Exception:
                log.exception("scoring %d beam searches together failed; each is tried alone", len(batch))
                continue
            scores |= {member.group_id: part for member, part in zip(batch, parts, strict=True)}
        return scores

    def _choose(self, member: _Member, scores: Tensor | None, out_of_time: bool) -> BeamChoice | Reason:
        if not member.valid:
            return Reason.NON_FINITE_LOGITS
        states, search, slots = self._states, member.search, member.slots
        if scores is None:
            scores = self._scores(member.logits, slots, search.params.min_keep)
        scores = self._finished(scores, slots, search)
        flat = search.accumulated(scores)
        best = float(flat.max())  # NaN if there is one
        if math.isnan(best) or best == -math.inf or (best == math.inf and search.params.do_sample):
            return Reason.NON_FINITE_SCORES
        histories, spec = states.hist[slots, : states.length[slots[0]]], search.params.logprobs
        values = None if spec is None else shown_values(member.logits, scores, spec.kind)
        selected = search.select(flat, histories, values, out_of_time=out_of_time)
        states.advance_beams(slots, selected.parents, selected.token_ids, ended=selected.found is not None)
        return BeamChoice(int(slots[0]), selected.parents, selected.token_ids, selected.found)

    def _scores(self, logits: Tensor, slots: Int32s, min_keep: int) -> Tensor:
        """[S, V] log-probabilities after processors and warpers; all rows have the same features."""
        features = self._states.sampling.features[slots]
        used = int(features[0])
        scores = logits.log_softmax(-1)
        if used & PROCESSORS:
            process_logits(scores, slots, features, used, self._states)
        if used & Feature.SAMPLE:
            scores = self._warped(scores, slots, features, min_keep)
        return scores

    def _finished(self, scores: Tensor, slots: Int32s, search: BeamSearch) -> Tensor:
        """[k, V] after what is left of the pipeline."""
        used = int(self._states.sampling.features[slots[0]])
        if used & WATERMARK:
            scores = self._watermarked(scores, slots, search)
        return scores.log_softmax(-1) if used & Feature.RENORMALIZE else scores

    def _warped(self, scores: Tensor, slots: Int32s, features: npt.NDArray[np.uint32], min_keep: int) -> Tensor:
        params = self._states.sampling
        scores = scale(scores, slots, features, params)
        if features[0] & FILTERS:
            scores = keep_interval(scores, *ranked_interval(scores, slots, features, params, min_keep))
        return scores

    def _race(self, request: NewRequest) -> Race:
        """One draw from all continuations of all rows: the rows' numbers, one after another."""
        group_id, num_rows = request.group_id, request.num_rows

        def race(step: int) -> Tensor:
            rows = [self._noise.exponentials(group_id, row, step) for row in range(num_rows)]
            return torch.cat(rows)[None]

        return race

    def _watermarked(self, scores: Tensor, slots: Int32s, search: BeamSearch) -> Tensor:
        """As in transformers, what SynthID remembers of a row stays with the row when its tokens move to another."""
        states = self._states
        mark = states.params[int(slots[0])].watermarking_config
        assert mark is not None
        if mark.synth_id is not None:
            appended = np.array(search.appended, np.int32).reshape(-1, len(slots))
            return mark_rows(scores, appended.T, mark.synth_id, self._noise.device)
        histories, prompt_len = states.hist[slots, : states.length[slots[0]]], int(states.prompt_len[slots[0]])
        device = self._noise.device
        return torch.stack([watermarked(row, histories[i], prompt_len, mark, device) for i, row in enumerate(scores)])

    def _stop_finder(self, request: NewRequest) -> StopFinder:
        """As StopStringCriteria: on bytes, a match ends inside the newest token and may begin in the prompt."""
        if self._token_bytes is None:
            self._token_bytes = Tokenizer.load(self._checkpoint, self._states.vocab_size).token_bytes
        table, stops = self._token_bytes, [string.encode() for string in request.params.stop_strings]
        longest = max(map(len, stops))
        first = request.prompt_len if request.params.stop_strings_ignore_prompt else 0

        def find(history: Int32s, token: int) -> bool:
            tail = b""
            for token_id in history[first:][::-1].tolist():
                if len(tail) >= longest - 1:
                    break
                tail = table[token_id] + tail
            return contains_stop(tail, table[token], stops)

        return find


def is_beam_search(params: GenerationParams) -> bool:
    return (params.num_beams or 1) > 1


def _params_of(request: NewRequest) -> BeamParams:
    params = request.params
    return BeamParams(
        num_beams=request.num_rows,
        num_return_sequences=params.num_return_sequences or 1,
        prompt_len=request.prompt_len,
        max_total_tokens=request.max_total_tokens,
        eos_token_ids=request.eos_token_ids,
        stop_token_ids=request.stop_token_ids,
        length_penalty=1.0 if params.length_penalty is None else float(params.length_penalty),
        early_stopping=params.early_stopping or EarlyStopping.FALSE,
        do_sample=bool(params.do_sample and params.temperature != 0.0),
        logprobs=request.logprobs,
    )
