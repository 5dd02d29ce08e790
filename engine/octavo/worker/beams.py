"""The beam searches of a runner: scores of their rows, and their choices applied to the request states.

Beside `Sampler`, which has the rows of all other requests. A row's logits are log_softmax'ed first, so that every step
of the pipeline acts on log-probabilities; every warper leaves `BeamParams.min_keep` tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.errors import Reason
from octavo.step import BeamChoice, Bools, Int32s, ModelRunnerOutput, NewRequest
from octavo.tokenizer import Tokenizer
from octavo.types import EarlyStopping, GenerationParams
from octavo.worker.beam_search import BeamParams, BeamSearch, Race, StopFinder, contains_stop
from octavo.worker.features import FILTERS, PROCESSORS, WATERMARK, Feature
from octavo.worker.logits import process_logits
from octavo.worker.noise import RandomNumbers
from octavo.worker.request_states import Int64s, RequestStates
from octavo.worker.warpers import keep_interval, ranked_interval, scale
from octavo.worker.watermark import watermarked

log = logging.getLogger(__name__)


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
        groups = self._states.group_id[slots]
        for group_id in np.unique(groups).tolist():
            members = np.flatnonzero(groups == group_id)
            members = members[np.argsort(self._states.group_row[slots[members]])]
            own = logits[torch.from_numpy(members).to(logits.device)].float().cpu()
            try:
                choice = self._choose(self._searches[group_id], own, slots[members], group_id in expired)
            except torch.AcceleratorError:
                raise
            except Exception:
                log.exception("the beam search of group %d failed; its request fails with it", group_id)
                choice = Reason.INTERNAL
            if isinstance(choice, Reason):
                self._states.fail(slots[members])
                output.failed += [(row, choice) for row in rows[members].tolist()]
            else:
                output.beams.append(choice)

    def _choose(self, search: BeamSearch, logits: Tensor, slots: Int32s, out_of_time: bool) -> BeamChoice | Reason:
        if bool(logits.isnan().any() | (logits == math.inf).any()):
            return Reason.NON_FINITE_LOGITS
        states = self._states
        flat = search.accumulated(self._scores(logits, slots, search.params.min_keep))
        best = float(flat.max())  # NaN if there is one
        if math.isnan(best) or best == -math.inf or (best == math.inf and search.params.do_sample):
            return Reason.NON_FINITE_SCORES
        histories = states.hist[slots, : states.length[slots[0]]]
        selected = search.select(flat, histories, out_of_time=out_of_time)
        states.advance_beams(slots, selected.parents, selected.token_ids, ended=selected.found is not None)
        return BeamChoice(int(slots[0]), selected.parents, selected.token_ids, selected.found)

    def _scores(self, logits: Tensor, slots: Int32s, min_keep: int) -> Tensor:
        """[k, V] log-probabilities after the whole pipeline; all rows have the same features."""
        states = self._states
        features = states.sampling.features[slots]
        used = int(features[0])
        scores = logits.log_softmax(-1)
        if used & PROCESSORS:
            process_logits(scores, slots, features, used, states)
        if used & Feature.SAMPLE:
            scores = self._warped(scores, slots, features, min_keep)
        if used & WATERMARK:
            mark, prompt_len = states.params[int(slots[0])].watermarking_config, int(states.prompt_len[slots[0]])
            assert mark is not None
            histories = states.hist[slots, : states.length[slots[0]]]
            scores = torch.stack([watermarked(row, histories[i], prompt_len, mark) for i, row in enumerate(scores)])
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
    )
