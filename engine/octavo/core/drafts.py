"""Speculation by prompt lookup: a sequence that repeats itself takes several tokens in one step.

When the last tokens of a sequence occurred before, what followed them there is a guess, its draft. The row computes its
last token and the draft in one step; the worker chooses a token behind each of them, as in a step of its own, for as
long as the draft's next token is the one that was chosen. So the tokens never depend on drafts, nor on whether a step
had room for them.

A draft takes what a step leaves over: tokens of its budget and blocks that nobody is short of, never another request's.
`num_computed` and `num_tokens` move past a draft only in `results.take_tokens`, as far as it was right. What is drafted
next depends on that, so a request that looks up drafts is not scheduled again while a token of it is in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from octavo.config import SchedulerConfig
from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.plan import Plan
from octavo.core.request import Request
from octavo.core.running_batch import RunningBatch, Slots
from octavo.ipc import EngineCoreRequest
from octavo.step import Bools, FurtherTokens, Int32s, SchedulerOutput
from octavo.types import DraftLimits

MAX_DRAFT_TOKENS = 256
"""In one step: the worker holds a row of logits for each."""
DEFAULT_NGRAM = 2
_NONE: Int32s = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Lookup:
    """How a request looks up its drafts."""

    num_tokens: int
    """Most tokens of a draft."""
    max_ngram: int
    ends: Int32s
    """Tokens at which a draft is cut, as the sequence would end there."""
    banned: Int32s
    """Tokens that are never chosen. Bans that depend on more than the token are left to the worker, which rejects."""
    no_repeat_ngram: int = 0

    @classmethod
    def of(cls, spec: EngineCoreRequest) -> Lookup:
        params = spec.params
        alone = [ids[0] for ids in params.bad_words_ids or [] if len(ids) == 1]
        return cls(
            num_tokens=params.prompt_lookup_num_tokens or 0,
            max_ngram=params.max_matching_ngram_size or DEFAULT_NGRAM,
            ends=np.array([*spec.eos_token_ids, *spec.stop_token_ids], np.int32),
            banned=np.array([*(params.suppress_tokens or []), *alone], np.int32),
            no_repeat_ngram=params.no_repeat_ngram_size or 0,
        )

    def draft(self, history: Int32s, limit: int) -> Int32s:
        """Up to `limit` tokens that may follow `history` [L]; none is fine.

        As transformers' PromptLookupCandidateGenerator: the longest n-gram first, its first occurrence from the left
        whose next token is not banned.
        """
        for size in range(min(self.max_ngram, len(history) - 1), 0, -1):
            count = min(self.num_tokens, limit)
            if self.no_repeat_ngram:  # the i-th token would repeat an n-gram of size + i
                count = min(count, self.no_repeat_ngram - 1 - size)
            if count <= 0:
                continue
            for start in _occurrences(history, size):
                found = _before(history[start + size : start + size + count], self.banned)
                if len(found):
                    return _before(found, self.ends)
        return _NONE


def _occurrences(history: Int32s, size: int) -> list[int]:
    """Where the last `size` tokens occur with a token behind them, from the left."""
    windows = len(history) - size
    same = history[:windows] == history[windows]
    for i in range(1, size):
        same &= history[i : windows + i] == history[windows + i]
    starts: list[int] = np.flatnonzero(same).tolist()
    return starts


def _before(token_ids: Int32s, stops: Int32s) -> Int32s:
    """The tokens up to the first that is among `stops`."""
    if len(stops):
        found = np.flatnonzero(np.isin(token_ids, stops))
        if len(found):
            return token_ids[: found[0]]
    return token_ids


class Drafts:
    """Owns who looks up drafts, and adds them to steps."""

    def __init__(self, batch: RunningBatch, kv: KVCacheManager, config: SchedulerConfig, limits: DraftLimits) -> None:
        self._limits = limits
        self._batch = batch
        self._kv = kv
        self._most = min(MAX_DRAFT_TOKENS, (config.max_chunk_tokens or MAX_DRAFT_TOKENS + 1) - 1)
        self._lookups: dict[int, Lookup] = {}  # by slot
        self._drafts: Bools = np.zeros(config.max_num_requests, np.bool_)
        self._lengths: Int32s = np.zeros(config.max_num_requests, np.int32)
        """Most tokens of the next draft."""

    def __bool__(self) -> bool:
        return bool(self._lookups)

    def admit(self, request: Request) -> None:
        """The request, of one row, has got its slot. Its tokens are chosen where drafts are checked."""
        if self._limits.max_rows and request.spec.params.prompt_lookup_num_tokens:
            self._lookups[request.slot] = Lookup.of(request.spec)
            self._drafts[request.slot] = True
            self._batch.wait_for_tokens(request.slot)  # what is drafted depends on them
            self._lengths[request.slot] = request.spec.params.prompt_lookup_num_tokens

    def remove(self, slots: Slots) -> None:
        """The slots are empty."""
        if self._lookups:
            self._drafts[slots] = False
            for slot in slots.tolist():
                self._lookups.pop(slot, None)

    def note(self, step: SchedulerOutput, further: FurtherTokens | None) -> None:
        """A draft that was right makes the next one longer by two tokens, any other shorter by one, as transformers'
        heuristic schedule does: text that does not repeat itself comes to pay for little."""
        rows = _NONE if further is None else further.rows
        right = np.bincount(rows, minlength=step.num_rows).tolist()
        for row, draft in enumerate(step.drafts, step.num_rows - len(step.drafts)):
            slot = int(step.slots[row])
            if (lookup := self._lookups.get(slot)) is not None:  # else the request has just failed
                change = 2 if right[row] == len(draft) else -1
                self._lengths[slot] = min(max(1, int(self._lengths[slot]) + change), lookup.num_tokens)

    def add(self, plan: Plan) -> None:
        """Moves decode rows of the plan that have a draft to `plan.drafts`, as far as budget and blocks go."""
        limits, most = self._limits, self._most
        if not limits.beside_prompts and plan.has_prompts:
            return
        for slot in plan.decode[self._drafts[plan.decode]].tolist():
            if len(plan.drafts) == limits.max_rows:
                break
            left = int(self._batch.max_total[slot] - self._batch.num_known[slot])  # one is chosen behind the draft
            wanted = min(limits.max_tokens_of_row, int(self._lengths[slot]))
            draft = self.draft(slot, min(most, plan.budget, left - 1, wanted))
            draft = draft[: self._make_room(plan, slot, len(draft))]
            if len(draft):
                plan.drafts.append((slot, draft))
                plan.budget -= len(draft)
                most -= len(draft)
        if plan.drafts:
            plan.decode = plan.decode[~np.isin(plan.decode, [slot for slot, _ in plan.drafts])]

    def draft(self, slot: int, limit: int) -> Int32s:
        """Up to `limit` tokens that may follow those of the slot; a copy."""
        history = self._batch.token_ids[slot, : self._batch.num_known[slot]]
        return self._lookups[slot].draft(history, limit).copy()

    def _make_room(self, plan: Plan, slot: int, count: int) -> int:
        """How many tokens fit behind the slot's next one. New blocks leave one to every running request."""
        kv = self._kv
        reached, have = int(self._batch.num_computed[slot]) + 1, int(kv.num_blocks[slot])
        spare = kv.pool.num_free - kv.watermark_blocks - kv.num_reserved - self._batch.num_running
        more = max(0, min(kv.blocks_for(reached + count) - have, spare))
        if more:
            blocks = kv.allocate_slots(slot, (have + more) * kv.block_size)
            assert blocks is not None
            plan.grown.append((slot, have, blocks))
        return min(count, (have + more) * kv.block_size - reached)
