"""Continuous batching: which requests take part in the next step, with how many tokens, in which blocks.

There is no prefill phase and no decode phase. A request has `num_tokens`, and `num_computed`, which catches up with it;
each step gives it some tokens. Prefill, chunking, prefix-cache hits, forks and resuming after a preemption are all
arithmetic on these two counters.

Policy. Running requests come before waiting ones. Waiting ones are admitted by rank (priority, then order of arrival)
as long as each fits as a whole, and the first that does not fit closes the door. When a running request needs a block
and none is left, the one of the worst rank is preempted: it loses its blocks and later computes its tokens anew; a step
that preempted admits nobody.

How requests come and end is in `request_table`, which of the waiting ones enter in `admission`, how several rows of one
go together in `beams`; what runs, who is preempted, and what a result changes is here.

`schedule()` may be called for step N+1 before `update()` for step N: counters run ahead (see RunningBatch). Slots and
blocks of a request that ended or was preempted return when no launched step contains it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable

import numpy as np

from octavo.config import CacheConfig, SchedulerConfig
from octavo.core.admission import Admission, NeedsHost
from octavo.core.beams import BeamScheduler
from octavo.core.block_pool import BlockPool
from octavo.core.drafts import Drafts
from octavo.core.groups import PromptShares
from octavo.core.guidance import follow
from octavo.core.invariants import check_invariants
from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.load_meter import LoadMeter
from octavo.core.outputs import Events, prompt_logprob_columns
from octavo.core.plan import Plan
from octavo.core.request import Request, RequestStatus
from octavo.core.request_table import RequestTable
from octavo.core.results import take_tokens
from octavo.core.running_batch import RunningBatch, Slots
from octavo.core.waiting_queue import WaitingQueue
from octavo.errors import Reason
from octavo.ipc import EngineCoreOutputs, EngineCoreRequest, PromptStarted
from octavo.step import BeamChoice, ModelRunnerOutput, PromptLogprobs, SchedulerOutput
from octavo.types import DraftLimits, EngineLoad


class Scheduler:
    """Owns all requests of an engine core, their slots and their blocks."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        needs_host: NeedsHost = lambda params, logprobs: False,
        drafts: DraftLimits | None = None,
    ) -> None:
        """`needs_host`: whose tokens the worker's host chooses. `drafts`: which the worker checks, by
        default any."""
        if config.max_num_batched_tokens < config.max_num_requests:
            raise ValueError(
                f"max_num_batched_tokens ({config.max_num_batched_tokens}) must be at least max_num_requests "
                f"({config.max_num_requests}), so that every running request can decode in every step"
            )
        self.config = config
        self.pool = BlockPool(num_blocks, cache.enable_prefix_caching)
        self.kv = KVCacheManager(
            self.pool,
            block_size=cache.block_size,
            max_num_requests=config.max_num_requests,
            max_model_len=max_model_len,
            watermark=config.watermark,
        )
        self.batch = RunningBatch(config.max_num_requests, max_model_len)
        self.meter = LoadMeter()
        self.drafts = Drafts(self.batch, self.kv, config, drafts or DraftLimits())
        self._beams = BeamScheduler(self.batch, self.kv, config.max_chunk_tokens, self._make_room)
        self._waiting = WaitingQueue()
        self._shares = PromptShares(self.pool)
        self._events = Events()
        self._table = RequestTable(
            self.batch,
            self.kv,
            self._waiting,
            self._events,
            shares=self._shares,
            beams=self._beams,
            drafts=self.drafts,
            max_queue_time=config.max_queue_time,
        )
        self._admission = Admission(
            self.batch,
            self.kv,
            self._waiting,
            self._table,
            shares=self._shares,
            beams=self._beams,
            drafts=self.drafts,
            meter=self.meter,
            needs_host=needs_host,
            max_chunk_tokens=config.max_chunk_tokens,
        )
        self._num_in_flight = 0
        self._step_ids = itertools.count(1)

    # --- requests come and go -----------------------------------------------------------------------------------------

    def add(self, frontend: int, requests: list[EngineCoreRequest]) -> None:
        """Queues the prompts of one client request. One that could never fit fails with REQUEST_TOO_LARGE."""
        for spec in requests:
            self._table.add(frontend, spec)

    def abort(self, frontend: int, keys: Iterable[int]) -> None:
        """Ends sequences without an answer; unknown keys are fine. Their blocks are free before the next schedule(),
        or when the step in flight is done."""
        for key in keys:
            request = self._table.get(frontend, key)
            if request is not None:
                self._table.drop([request])

    def abort_frontend(self, frontend: int) -> None:
        """Ends everything of a front-end that is gone."""
        self.abort(frontend, self._table.keys_of(frontend))
        self._events.drop(frontend)

    # --- scheduling ---------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._table) or self._num_in_flight > 0 or self._events.pending

    def schedule(self, now: float) -> SchedulerOutput | None:
        """Decides and accounts for the next step; None when nothing can run (now, or before an update())."""
        self._table.expire(now)
        plan = Plan(budget=self.config.max_num_batched_tokens)
        self._schedule_running(plan, now)
        if not plan.preempted:
            self._admission.admit(plan, now)
            if self.drafts:
                self.drafts.add(plan)
        if not (len(plan.decode) or plan.prefill or plan.admitted or plan.beams or plan.drafts):
            return None
        return self._launch(plan, now)

    def _schedule_running(self, plan: Plan, now: float) -> None:
        batch = self.batch
        if not batch.num_running:
            return
        if self._beams:
            self._beams.schedule(plan, now)
        self._schedule_sequences(plan)
        if self._beams:
            self._beams.catch_up(plan)
        if plan.preempted or plan.stalled:
            plan.decode = np.array([s for s in plan.decode.tolist() if self._may_run(plan, s)], np.intp)
            plan.prefill = [(s, n) for s, n in plan.prefill if self._may_run(plan, s)]
            plan.beams = [(s, n) for s, n in plan.beams if batch.is_running(s)]
            plan.grown = [entry for entry in plan.grown if batch.is_running(entry[0])]
            plan.copies = [entry for entry in plan.copies if batch.is_running(entry[0])]

    def _schedule_sequences(self, plan: Plan) -> None:
        batch = self.batch
        order = batch.order
        order = order[batch.num_tokens[order] < batch.max_total[order]]  # else its last token is in flight
        if self._beams:
            order = order[~batch.is_beam[order]]
        if batch.num_waiting:
            order = order[~batch.waits[order] | (batch.num_known[order] == batch.num_tokens[order])]
        computed = batch.num_computed[order]
        remaining = batch.num_tokens[order] - computed
        decodes = remaining == 1
        plan.decode = order[decodes]
        plan.budget -= len(plan.decode)
        full = computed >= self.kv.num_blocks[order] * self.kv.block_size
        full = order[decodes & full]
        if len(full):
            self._grow_decodes(plan, full)
        if not decodes.all():
            for slot, missing in zip(order[~decodes].tolist(), remaining[~decodes].tolist(), strict=True):
                self._schedule_prefill(plan, slot, missing)

    def _grow_decodes(self, plan: Plan, slots: Slots) -> None:
        """Room for one token more in running slots whose blocks are full."""
        if len(slots) <= self.pool.num_free:
            plan.grown += self.kv.append_blocks(slots)
        else:
            for slot in slots.tolist():
                self._grow(plan, slot, int(self.batch.num_computed[slot]) + 1)

    def _may_run(self, plan: Plan, slot: int) -> bool:
        return self.batch.is_running(slot) and slot not in plan.stalled

    def _schedule_prefill(self, plan: Plan, slot: int, missing: int) -> None:
        count = min(missing, plan.budget, self.config.max_chunk_tokens or missing)
        if count and self.batch.is_running(slot) and self._grow(plan, slot, int(self.batch.num_computed[slot]) + count):
            plan.prefill.append((slot, count))
            plan.budget -= count

    def _grow(self, plan: Plan, slot: int, num_tokens: int) -> bool:
        """Room for `num_tokens` in a running slot, at the expense of requests of worse rank."""
        while self.batch.is_running(slot):
            have = int(self.kv.num_blocks[slot])
            blocks = self.kv.allocate_slots(slot, num_tokens)
            if blocks is not None:
                if blocks:
                    plan.grown.append((slot, have, blocks))
                return True
            if not self._relieve(plan, self.kv.blocks_for(num_tokens) - have):
                plan.stalled.add(slot)
                return False
        return False

    def _make_room(self, plan: Plan, request: Request, num_blocks: int) -> bool:
        """As many free blocks, for a running request, at the expense of requests of worse rank."""
        while self.batch.is_running(request.slot):
            missing = num_blocks - self.pool.num_free
            if missing <= 0:
                return True
            if not self._relieve(plan, missing):
                return False
        return False

    def _relieve(self, plan: Plan, num_blocks: int) -> bool:
        """Makes blocks available: now (True), or with the update() of a step in flight (False)."""
        if self._shares:
            self._shares.drop_one()
            return True
        coming = sum(int(self.kv.num_blocks[slot]) for slot in self.batch.evicting) - plan.promised_blocks
        if coming >= num_blocks:
            plan.promised_blocks += num_blocks
            return False
        victim = max((self.batch.request_at(slot) for slot in self.batch.order.tolist()), key=lambda r: r.rank)
        self._preempt(plan, victim)
        return True

    def _preempt(self, plan: Plan, request: Request) -> None:
        plan.preempted = True
        request.num_preemptions += 1
        self.meter.total.preemptions += 1
        self._beams.remove(request)
        for slot in request.slots:
            self.batch.stop(slot)
        if self.batch.in_flight[request.slots].any():
            self.batch.evicting[request.slot] = None
        else:
            self._requeue(request)

    def _requeue(self, request: Request) -> None:
        end_time = float(self.batch.end_time[request.slot])
        if request.beams is not None:
            self._beams.save(request)
        if not request.is_search:
            request.token_ids = self.batch.known_tokens(request.slot)
            if end_time < math.inf:  # its timer may have gone off while it ran
                self._table.end_waiting_at(end_time, request)
        self._table.vacate(np.array(request.slots, np.intp))
        self._waiting.add(request)

    def _launch(self, plan: Plan, now: float) -> SchedulerOutput:
        """Turns the plan into arrays and moves the counters past it."""
        batch, listed = self.batch, plan.beams + plan.admitted
        single = [
            slot for slot, count in listed if count == 1 and batch.num_tokens[slot] - batch.num_computed[slot] == 1
        ]
        singles = set(single)
        several = plan.prefill + [(slot, count) for slot, count in listed if slot not in singles]
        longer = several + [(slot, 1 + len(draft)) for slot, draft in plan.drafts]
        num_decode_rows = len(plan.decode) + len(single)
        if single or longer:
            slots = np.concatenate([plan.decode, np.array(single + [slot for slot, _ in longer], np.intp)])
            scheduled = np.ones(len(slots), np.int32)
            scheduled[num_decode_rows:] = [count for _, count in longer]
        else:
            slots, scheduled = plan.decode, np.ones(len(plan.decode), np.int32)
        computed = batch.num_computed[slots]
        reached = computed + scheduled
        if plan.drafts:
            reached[-len(plan.drafts) :] = computed[-len(plan.drafts) :] + 1
        samples = reached == batch.num_tokens[slots]
        batch.num_computed[slots] = reached
        batch.num_tokens[slots] += samples & ~batch.is_beam[slots] if plan.beams else samples
        batch.in_flight[slots] += 1
        self._num_in_flight += 1
        step = SchedulerOutput(
            next(self._step_ids), slots.astype(np.int32), computed, scheduled, samples, num_decode_rows
        )
        plan.attach(step)
        self._table.attach(step)
        for slot, _ in plan.prefill + plan.admitted:
            if (request := batch.request_at(slot)).group.held_members:
                self._share_prompt(request)
        self.meter.total.prompt_tokens += sum([count for _, count in several]) + len(single)
        self.meter.total.drafted_tokens += sum([len(draft) for _, draft in plan.drafts])
        self.meter.tick(now)
        return step

    def _share_prompt(self, request: Request) -> None:
        """When the last chunk of a group's prompt is launched, its other sequences may fork from it."""
        group = request.group
        if self.batch.num_computed[request.slot] >= len(group.prompt):
            blocks = self.kv.blocks_of(request.slot)[: self.kv.blocks_for(len(group.prompt) - 1)]
            for member in self._shares.take(group, blocks):
                self._waiting.add(member)

    # --- results ------------------------------------------------------------------------------------------------------

    def update(self, step: SchedulerOutput, output: ModelRunnerOutput, now: float) -> dict[int, EngineCoreOutputs]:
        """Takes the results of a launched step, in launch order: appends tokens, ends requests, returns blocks."""
        batch, slots = self.batch, step.slots.astype(np.intp)
        batch.in_flight[slots] -= 1
        self._num_in_flight -= 1
        for row, reason in output.failed:
            if batch.live[slots[row]]:
                self._table.fail(batch.request_at(int(slots[row])), reason, forget=True)
        tokens = take_tokens(batch, step, slots, output, now)
        if step.drafts:
            self.drafts.note(step, output.further)
        if self._beams:
            follow(batch, tokens.slots)
        self._announce(tokens.slots)
        for values in output.prompt_logprobs:
            self._send_prompt_logprobs(batch.requests[int(slots[values.row])], values)
        self._index_full_blocks(step, slots)
        for choice in output.beams:
            self._take_choice(choice)
        ended = tokens.slots[tokens.finish.nonzero()[0]].tolist()
        if ended:
            self._table.end([batch.request_at(slot) for slot in ended])
        self._requeue_landed()
        self._table.vacate_landed(slots)
        self.meter.total.generation_tokens += len(tokens.slots)
        if output.further is not None:
            self.meter.total.accepted_tokens += len(output.further.rows)
        return self._events.take(step.step_id, tokens)

    def _take_choice(self, choice: BeamChoice) -> None:
        """A beam search goes on, or has ended."""
        batch = self.batch
        if not batch.live[choice.slot]:
            return
        request = batch.request_at(choice.slot)
        self._announce(np.array([choice.slot]))
        self.meter.total.generation_tokens += len(choice.token_ids)
        if choice.found is None:
            self._beams.advance(request, choice.parents, choice.token_ids)
        else:
            self._events.found(request, choice.found)
            self._table.end([request])

    def _index_full_blocks(self, step: SchedulerOutput, slots: Slots) -> None:
        """Blocks filled by this step hold tokens that are known by now."""
        if not self.pool.enable_prefix_caching:
            return
        reached = step.num_computed + step.num_scheduled
        if step.drafts:
            reached[-len(step.drafts) :] = self.batch.num_known[slots[-len(step.drafts) :]] - 1
        full = reached // self.kv.block_size
        rows = ((full > self.kv.num_indexed[slots]) & self.batch.live[slots]).nonzero()[0]
        if len(rows):
            requests = [self.batch.request_at(slot) for slot in slots[rows].tolist()]
            self.kv.index(slots[rows], requests, self.batch.token_ids, full[rows])

    def _announce(self, slots: Slots) -> None:
        """Tells the front-ends of prompts whose first token is here."""
        slots = slots[self.batch.announces[slots]]
        self.batch.announces[slots] = False
        for slot in slots.tolist():
            request = self.batch.request_at(slot)
            group = request.group
            if not group.announced:
                group.announced = True
                assert group.start_time is not None
                started = PromptStarted(group.spec.key, group.start_time, group.cached_tokens)
                self._events.of(request.frontend).started.append(started)

    def _send_prompt_logprobs(self, request: Request | None, values: PromptLogprobs) -> None:
        """They are the prompt's: wanted as long as any of its sequences is, though the one that computed them ended."""
        if request is None or not request.group.num_alive:
            return
        group = request.group
        skip = group.num_prompt_logprobs + 1 - values.start
        assert skip >= 0, "a chunk of prompt logprobs is missing"
        if skip < len(values.chosen):
            group.num_prompt_logprobs += len(values.chosen) - skip
            columns = prompt_logprob_columns(group.spec.key, values, skip)
            self._events.of(request.frontend).prompt_logprobs.append(columns)

    def _requeue_landed(self) -> None:
        """Preempted requests that were only waiting for the step that has just ended."""
        batch = self.batch
        for slot in list(batch.evicting):
            request = batch.request_at(slot)
            if not batch.in_flight[request.slots].any():
                del batch.evicting[slot]
                self._requeue(request)

    def fail_step(self, step: SchedulerOutput, reason: Reason, now: float) -> dict[int, EngineCoreOutputs]:
        """The step could not be computed: all of its requests fail, with their siblings, who share what it wrote."""
        for slot in step.slots.tolist():  # of one that ended meanwhile, siblings may have forked from it
            for member in self._table.members(self.batch.request_at(slot)):
                self._table.fail(member, reason, forget=True)
        rows = step.num_rows
        return self.update(step, ModelRunnerOutput(np.full(rows, -1, np.int32), np.zeros(rows, np.uint8)), now)

    def take_outputs(self) -> dict[int, EngineCoreOutputs]:
        """Events that no step brought: timeouts in the queue, requests that could never fit."""
        return self._events.take(0, None)

    # --- operators ----------------------------------------------------------------------------------------------------

    def reset_prefix_cache(self) -> int:
        """Forgets all cached prefixes, those of running requests included. Returns the blocks that became free."""
        return self.pool.reset_cache()

    def load(self, now: float) -> EngineLoad:
        requests = self._table.all()
        waiting = [r for r in requests if r.status in (RequestStatus.WAITING, RequestStatus.HELD)]
        num_waiting = sum(r.num_rows for r in waiting)
        generation_rate, prompt_rate, hit_rate = self.meter.rates(now)
        total = self.meter.total
        return EngineLoad(
            time=time.time(),
            running_requests=sum(r.num_rows for r in requests) - num_waiting,
            waiting_requests=num_waiting,
            waiting_tokens=sum(r.num_tokens for r in waiting if r.status is RequestStatus.WAITING),
            used_blocks=self.pool.num_used,
            cached_blocks=self.pool.num_cached,
            total_blocks=self.pool.num_blocks,
            generation_tokens_per_second=generation_rate,
            prompt_tokens_per_second=prompt_rate,
            prefix_cache_hit_rate=hit_rate,
            preemptions=total.preemptions,
            steps=total.steps,
            prompt_tokens=total.prompt_tokens,
            generation_tokens=total.generation_tokens,
            prefix_cache_queries=total.cache_queries,
            prefix_cache_hits=total.cache_hits,
            drafted_tokens=total.drafted_tokens,
            accepted_tokens=total.accepted_tokens,
        )

    def check(self) -> None:
        """Asserts the invariants of slots, blocks and counters. For tests."""
        check_invariants(self.batch, self.kv, self._table.all(), self._shares.held_blocks())
        if not self.has_work:
            assert not self.batch.occupied_slots()
            assert not self.pool.num_used
