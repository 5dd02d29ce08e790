"""Who enters the batch: waiting requests by rank, as long as each fits as a whole. The first that does not fit closes
the door."""

from __future__ import annotations

from collections.abc import Callable

from octavo.core.beams import BeamScheduler
from octavo.core.drafts import Drafts
from octavo.core.groups import PromptShares
from octavo.core.guidance import negative_branch
from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.load_meter import LoadMeter
from octavo.core.plan import Plan
from octavo.core.request import Request, RequestStatus
from octavo.core.request_table import RequestTable
from octavo.core.running_batch import RunningBatch
from octavo.core.waiting_queue import WaitingQueue
from octavo.step import Int32s, LogprobSpec, NewRequest
from octavo.types import GenerationParams

NeedsHost = Callable[[GenerationParams, LogprobSpec | None], bool]
"""Whether a request with these is not scheduled while a token of it is in flight."""


class Admission:
    """Takes requests from the queue into a step."""

    def __init__(
        self,
        batch: RunningBatch,
        kv: KVCacheManager,
        waiting: WaitingQueue,
        table: RequestTable,
        *,
        shares: PromptShares,
        beams: BeamScheduler,
        drafts: Drafts,
        meter: LoadMeter,
        needs_host: NeedsHost,
        max_chunk_tokens: int,
    ) -> None:
        self._batch = batch
        self._kv = kv
        self._waiting = waiting
        self._table = table
        self._shares = shares
        self._beams = beams
        self._drafts = drafts
        self._meter = meter
        self._needs_host = needs_host
        self._max_chunk_tokens = max_chunk_tokens

    def admit(self, plan: Plan, now: float) -> None:
        """Those that fit into what is left of the step's budget, the slots and the blocks."""
        while plan.budget > 0 and self._batch.num_free_slots:
            request = self._waiting.peek()
            if request is None:
                return
            admit = self._admit_sequence if request.beams is None else self._admit_beams
            if not admit(plan, request, now):
                return

    def _admit_sequence(self, plan: Plan, request: Request, now: float) -> bool:
        kv, group, num_tokens = self._kv, request.group, request.num_tokens
        fork = request.forks and bool(group.held_blocks)
        if fork:
            num_cached = num_tokens - 1
            shared = group.held_blocks[: num_cached // kv.block_size]
        else:
            shared = kv.find_prefix(request)
            num_cached = len(shared) * kv.block_size
        if not kv.can_admit(shared, num_tokens, keep_watermark=self._batch.num_running > 0):
            return self._may_look_again()
        slot = self._enter(request, num_cached)
        if fork:
            copies = kv.fork(slot, group.held_blocks, num_cached)
            assert copies is not None
            plan.copies += [(slot, *copy) for copy in copies]
            block_ids = kv.table_of(slot)
        else:
            block_ids = kv.admit(slot, shared, num_tokens)  # of all chunks, so that none is promised twice
        self._note_admission(request, num_cached, now)
        count = min(num_tokens - num_cached, plan.budget, self._max_chunk_tokens or num_tokens)
        plan.admitted.append((slot, count))
        plan.budget -= count
        plan.new_requests.append(_new_request(request, slot, request.row, block_ids, num_cached, forked=fork))
        if request.forks:
            self._shares.note_fork(request)
        return True

    def _enter(self, request: Request, num_cached: int) -> int:
        """Gives a request of one row its slot."""
        self._waiting.pop()
        slot = self._batch.add(request, num_cached)
        request.status = RequestStatus.RUNNING
        if self._needs_host(request.spec.params, request.spec.logprobs):
            self._batch.wait_for_tokens(slot)
        else:
            self._drafts.admit(request)
        return slot

    def _may_look_again(self) -> bool:
        """After a request did not fit: room is made for it only if nothing runs."""
        if self._batch.num_running or not self._shares:
            return False
        self._shares.drop_one()
        return True

    def _admit_beams(self, plan: Plan, request: Request, now: float) -> bool:
        kv = self._kv
        if min(self._batch.num_free_slots, plan.budget) < request.num_rows:
            return False
        shared = kv.find_prefix(request)
        if not self._beams.fits(request, shared, keep_watermark=self._batch.num_running > 0):
            return self._may_look_again()
        self._waiting.pop()
        num_cached = len(shared) * kv.block_size
        self._beams.admit(request, shared, num_cached)
        request.status = RequestStatus.RUNNING
        self._note_admission(request, num_cached, now)
        for row, slot in enumerate(request.slots):
            if row == 0 or request.is_search:
                new = _new_request(
                    request, slot, request.row + row, kv.table_of(slot), 0 if row else num_cached, forked=row > 0
                )
            else:
                new = negative_branch(request, kv.table_of(slot))
            plan.new_requests.append(new)
        self._beams.take_step(plan, request, now)  # if nothing of the prompt is left but its last token
        self._beams.compute_rows(plan, request)
        return True

    def _note_admission(self, request: Request, num_cached: int, now: float) -> None:
        group, spec = request.group, request.spec
        if spec.bypass_prefix_cache:
            self._kv.never_index(request.slot)
        if group.start_time is None:
            group.start_time = now
            group.cached_tokens = num_cached
            self._meter.total.cache_queries += request.num_tokens
            self._meter.total.cache_hits += num_cached
        if spec.params.max_time is not None:
            end_time = group.start_time + spec.params.max_time
            self._batch.limit_time(request.slot, end_time)
            if request.num_tokens == len(group.prompt) and not request.is_search:
                self._table.end_waiting_at(end_time, request)


def _new_request(
    request: Request, slot: int, row: int, block_ids: Int32s, num_computed: int, *, forked: bool
) -> NewRequest:
    """What the worker is told of a row. `forked`: another one computes the prompt."""
    group, spec = request.group, request.spec
    wants_prompt = not forked and group.num_prompt_logprobs < len(group.prompt) - 1
    return NewRequest(
        slot=slot,
        group_id=group.group_id,
        row=row,
        num_rows=group.num_rows,
        token_ids=request.beams.rows[row] if request.beams and request.is_search else request.token_ids,
        prompt_len=len(group.prompt),
        num_computed_tokens=num_computed,
        block_ids=block_ids,
        params=spec.params,
        max_total_tokens=spec.max_total_tokens,
        eos_token_ids=tuple(spec.eos_token_ids),
        stop_token_ids=tuple(spec.stop_token_ids),
        seed=spec.seed,
        logprobs=spec.logprobs,
        prompt_logprobs=spec.prompt_logprobs if wants_prompt else None,
    )
