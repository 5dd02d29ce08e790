"""Continuous batching: which requests take part in the next step, with how many tokens, in which blocks.

There is no prefill phase and no decode phase. A request has `num_tokens`, and `num_computed`, which catches up with it;
each step gives it some tokens. Prefill, chunking, prefix-cache hits, forks and resuming after a preemption are all
arithmetic on these two counters.

Policy. Running requests come before waiting ones. Waiting ones are admitted by rank (priority, then order of arrival)
as long as each fits as a whole, and the first that does not fit closes the door. When a running request needs a block
and none is left, the one of the worst rank is preempted: it loses its blocks and later computes its tokens anew; a step
that preempted admits nobody.

`schedule()` may be called for step N+1 before `update()` for step N: counters run ahead (see RunningBatch). Slots and
blocks of a request that ended or was preempted return when no launched step contains it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable

import numpy as np

from octavo.config import CacheConfig, SchedulerConfig
from octavo.core.beams import BeamScheduler
from octavo.core.block_pool import BlockPool
from octavo.core.drafts import Drafts
from octavo.core.groups import PromptShares
from octavo.core.guidance import follow, negative_branch
from octavo.core.invariants import check_invariants
from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.load_meter import LoadMeter
from octavo.core.outputs import Events, prompt_logprob_columns
from octavo.core.plan import Plan
from octavo.core.request import Group, Request, RequestStatus, is_guided
from octavo.core.results import take_tokens
from octavo.core.running_batch import RunningBatch, Slots
from octavo.core.waiting_queue import Timers, WaitingQueue
from octavo.errors import Reason
from octavo.ipc import EngineCoreOutputs, EngineCoreRequest, PromptStarted
from octavo.step import (
    BeamChoice,
    LogprobSpec,
    ModelRunnerOutput,
    NewRequest,
    PromptLogprobs,
    SchedulerOutput,
)
from octavo.types import EngineLoad, FinishReason, GenerationParams

NeedsHost = Callable[[GenerationParams, LogprobSpec | None], bool]
"""Whether a request with these is not scheduled while a token of it is in flight."""


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
        speculates: bool = True,
    ) -> None:
        """`needs_host`: whose tokens the worker's host chooses. `speculates`: whether the worker can check drafts; if
        not, none are made."""
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
        self._needs_host = needs_host
        self.drafts = Drafts(self.batch, self.kv, config, enabled=speculates)
        self._beams = BeamScheduler(self.batch, self.kv, config.max_chunk_tokens, self._make_room)
        self._waiting = WaitingQueue()
        self._deadlines, self._queue_timeouts, self._time_limits = Timers(), Timers(), Timers()
        self._requests: dict[tuple[int, int], Request] = {}
        self._shares = PromptShares(self.pool)
        self._evicting: dict[int, None] = {}  # slots preempted while in flight
        self._events = Events()
        self._freed_slots: list[int] = []
        self._released_groups: list[int] = []
        self._ended_rows: list[tuple[int, int]] = []
        self._num_in_flight = 0
        self._step_ids, self._group_ids, self._arrivals = itertools.count(1), itertools.count(1), itertools.count(1)

    # --- requests come and go -----------------------------------------------------------------------------------------

    def add(self, frontend: int, requests: list[EngineCoreRequest]) -> None:
        """Queues the prompts of one client request. One that could never fit fails with REQUEST_TOO_LARGE."""
        for spec in requests:
            self._add_group(frontend, Group(next(self._group_ids), spec))

    def _add_group(self, frontend: int, group: Group) -> None:
        spec = group.spec
        members = [Request(frontend, group, row, next(self._arrivals)) for row in range(group.num_alive)]
        if not self._can_ever_fit(members[0]):
            for key in range(spec.key, spec.key + spec.num_sequences):
                self._events.fail(frontend, key, Reason.REQUEST_TOO_LARGE)
            return
        for member in members:
            for key in member.keys:
                assert (frontend, key) not in self._requests, "a key is used twice"
                self._requests[frontend, key] = member
            if spec.deadline is not None:
                self._deadlines.add(spec.deadline, member)
        self._queue_timeouts.add(spec.arrival_time + self.config.max_queue_time, members[0])
        first = members if is_guided(spec) else members[:1]
        self._hold(group, members[len(first) :])
        for member in first:
            self._waiting.add(member)

    def _can_ever_fit(self, request: Request) -> bool:
        """Alone, with rows of a search that have nothing in common but the prompt."""
        longest = [request.spec.max_total_tokens] if request.beams is None else request.beams.max_totals
        shared = (request.num_tokens - 1) // self.kv.block_size if request.is_search else 0
        blocks = shared + sum(self.kv.blocks_for(length - 1) - shared for length in longest)
        return blocks <= self.pool.num_blocks and request.num_rows <= self.config.max_num_requests

    def _hold(self, group: Group, members: list[Request]) -> None:
        for member in members:
            member.status = RequestStatus.HELD
        group.held_members = members

    def abort(self, frontend: int, keys: Iterable[int]) -> None:
        """Ends sequences without an answer; unknown keys are fine. Their blocks are free before the next schedule(),
        or when the step in flight is done."""
        for key in keys:
            request = self._requests.get((frontend, key))
            if request is not None:
                self._end(request)

    def abort_frontend(self, frontend: int) -> None:
        """Ends everything of a front-end that is gone."""
        self.abort(frontend, [key for owner, key in self._requests if owner == frontend])
        self._events.drop(frontend)

    def _end(self, request: Request, *, forget: bool = False) -> None:
        """The request's terminal events are out, or nobody waits for them: gives up all that it has."""
        group, slots = request.group, request.slots if request.slot >= 0 else []
        if request.status is RequestStatus.HELD:
            group.held_members.remove(request)
        elif group.held_members:  # it was to compute the prompt
            self._waiting.add(group.held_members.pop(0))
        request.status = RequestStatus.ENDED
        for key in request.keys:
            del self._requests[request.frontend, key]
        self._shares.note_fork(request)
        self._beams.remove(request)
        self._evicting.pop(request.slot, None)
        if forget and slots:
            self._shares.drop(group)
            self.kv.forget(slots)
        for slot in slots:
            self.batch.live[slot] = False
            self.batch.stop(slot)
            if not self.batch.in_flight[slot]:
                self._vacate(slot)
        group.num_alive -= 1
        if group.num_alive:
            self._ended_rows.append((group.group_id, request.row))
        self._release_if_gone(group)

    def _release_if_gone(self, group: Group) -> None:
        if not group.num_alive and not group.num_slots:
            self._released_groups.append(group.group_id)

    def _end_reported(self, request: Request, *, forget: bool = False) -> None:
        """Ends a request whose terminal event goes to its front-end."""
        if request.num_preemptions:
            self._events.of(request.frontend).preempted.append((request.key, request.num_preemptions))
        self._end(request, forget=forget)

    def _vacate(self, slot: int) -> None:
        self.kv.free(slot)
        self.batch.remove(slot)
        self.drafts.remove(slot)
        self._freed_slots.append(slot)

    # --- clocks -------------------------------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        for request in self._deadlines.due(now):
            if request.status is not RequestStatus.ENDED:
                client = request.spec.deadline_is_client
                self._fail(request, Reason.CLIENT_DEADLINE if client else Reason.SERVER_MAX_DURATION)
        for request in self._queue_timeouts.due(now):
            group = request.group
            if group.start_time is None:
                for member in self._members(group, request.frontend):
                    self._fail(member, Reason.QUEUE_TIMEOUT)
        for request in self._time_limits.due(now):
            # One that runs is seen to in update(), with its next token.
            if request.status is RequestStatus.WAITING and request.num_tokens > len(request.group.prompt):
                self._events.of(request.frontend).ended_waiting.append((request.key, FinishReason.TIME))
                self._end_reported(request)

    def _members(self, group: Group, frontend: int) -> list[Request]:
        first = group.spec.key
        found = (self._requests.get((frontend, first + row)) for row in range(group.spec.num_sequences))
        return [member for member in dict.fromkeys(found) if member is not None]

    def _fail(self, request: Request, reason: Reason, *, forget: bool = False) -> None:
        for key in request.keys:
            self._events.fail(request.frontend, key, reason)
        self._end_reported(request, forget=forget)

    # --- scheduling ---------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._requests) or self._num_in_flight > 0 or self._events.pending

    def schedule(self, now: float) -> SchedulerOutput | None:
        """Decides and accounts for the next step; None when nothing can run (now, or before an update())."""
        self._expire(now)
        plan = Plan(budget=self.config.max_num_batched_tokens)
        self._schedule_running(plan, now)
        if not plan.preempted:
            self._schedule_waiting(plan, now)
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
        for slot in order[decodes & full].tolist():
            self._grow(plan, slot, int(batch.num_computed[slot]) + 1)
        if not decodes.all():
            for slot, missing in zip(order[~decodes].tolist(), remaining[~decodes].tolist(), strict=True):
                self._schedule_prefill(plan, slot, missing)

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
        coming = sum(int(self.kv.num_blocks[slot]) for slot in self._evicting) - plan.promised_blocks
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
            self._evicting[request.slot] = None
        else:
            self._requeue(request)

    def _requeue(self, request: Request) -> None:
        end_time = float(self.batch.end_time[request.slot])
        if request.beams is not None:
            self._beams.save(request)
        if not request.is_search:
            request.token_ids = self.batch.known_tokens(request.slot)
            if end_time < math.inf:  # its timer may have gone off while it ran
                self._time_limits.add(end_time, request)
        for slot in request.slots:
            self._vacate(slot)
        self._waiting.add(request)

    def _schedule_waiting(self, plan: Plan, now: float) -> None:
        while plan.budget > 0 and self.batch.num_free_slots:
            request = self._waiting.peek()
            if request is None:
                return
            admit = self._admit if request.beams is None else self._admit_beams
            if not admit(plan, request, now):
                return

    def _admit(self, plan: Plan, request: Request, now: float) -> bool:
        group = request.group
        fork = request.forks and bool(group.held_blocks)
        if fork:
            num_cached = request.num_tokens - 1
            shared = group.held_blocks[: num_cached // self.kv.block_size]
        else:
            shared = self.kv.find_prefix(request)
            num_cached = len(shared) * self.kv.block_size
        if not self.kv.can_admit(shared, request.num_tokens, keep_watermark=self.batch.num_running > 0):
            return self._may_look_again()
        self._waiting.pop()
        slot = self.batch.add(request, num_cached)
        request.status = RequestStatus.RUNNING
        self.drafts.admit(request)
        if fork:
            copies = self.kv.fork(slot, group.held_blocks, num_cached)
            assert copies is not None
            plan.copies += [(slot, *copy) for copy in copies]
        else:
            self.kv.admit(slot, shared)
        if request.spec.bypass_prefix_cache:
            self.kv.never_index(slot)
        if self._needs_host(request.spec.params, request.spec.logprobs):
            self.batch.wait_for_tokens(slot)
        missing = request.num_tokens - num_cached
        count = min(missing, plan.budget, self.config.max_chunk_tokens or missing)
        blocks = self.kv.allocate_slots(slot, request.num_tokens)  # of all chunks, so that none is promised twice
        assert blocks is not None
        plan.admitted.append((slot, count))
        plan.budget -= count
        self._note_admission(request, num_cached, now)
        plan.new_requests.append(self._new_request(request, slot, request.row, num_cached, forked=fork))
        self._shares.note_fork(request)
        return True

    def _may_look_again(self) -> bool:
        """After a request did not fit: room is made for it only if nothing runs."""
        if self.batch.num_running or not self._shares:
            return False
        self._shares.drop_one()
        return True

    def _admit_beams(self, plan: Plan, request: Request, now: float) -> bool:
        if min(self.batch.num_free_slots, plan.budget) < request.num_rows:
            return False
        shared = self.kv.find_prefix(request)
        if not self._beams.fits(request, shared, keep_watermark=self.batch.num_running > 0):
            return self._may_look_again()
        self._waiting.pop()
        num_cached = len(shared) * self.kv.block_size
        self._beams.admit(request, shared, num_cached)
        request.status = RequestStatus.RUNNING
        if request.spec.bypass_prefix_cache:
            self.kv.never_index(request.slot)
        self._note_admission(request, num_cached, now)
        plan.new_requests.append(self._new_request(request, request.slot, request.row, num_cached, forked=False))
        for row, slot in enumerate(request.slots[1:], 1):
            if request.is_search:
                plan.new_requests.append(self._new_request(request, slot, row, 0, forked=True))
            else:
                plan.new_requests.append(negative_branch(request, np.array(self.kv.blocks_of(slot), np.int32)))
        self._beams.take_step(plan, request, now)  # if nothing of the prompt is left but its last token
        self._beams.compute_rows(plan, request)
        return True

    def _note_admission(self, request: Request, num_cached: int, now: float) -> None:
        group, spec = request.group, request.spec
        if group.start_time is None:
            group.start_time = now
            group.cached_tokens = num_cached
            self.meter.total.cache_queries += request.num_tokens
            self.meter.total.cache_hits += num_cached
        if spec.params.max_time is not None:
            self.batch.limit_time(request.slot, group.start_time + spec.params.max_time)
            if request.num_tokens == len(group.prompt) and not request.is_search:
                self._time_limits.add(group.start_time + spec.params.max_time, request)

    def _new_request(self, request: Request, slot: int, row: int, num_computed: int, *, forked: bool) -> NewRequest:
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
            block_ids=self.kv.block_table[slot, : self.kv.num_blocks[slot]].copy(),
            params=spec.params,
            max_total_tokens=spec.max_total_tokens,
            eos_token_ids=tuple(spec.eos_token_ids),
            stop_token_ids=tuple(spec.stop_token_ids),
            seed=spec.seed,
            logprobs=spec.logprobs,
            prompt_logprobs=spec.prompt_logprobs if wants_prompt else None,
        )

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
        step.freed_slots, self._freed_slots = self._freed_slots, []
        step.released_groups, self._released_groups = self._released_groups, []
        step.ended_rows, self._ended_rows = self._ended_rows, []
        for slot, _ in plan.prefill + plan.admitted:
            self._share_prompt(batch.request_at(slot))
        self.meter.total.prompt_tokens += sum(count for _, count in several) + len(single)
        self.meter.total.drafted_tokens += sum(len(draft) for _, draft in plan.drafts)
        self.meter.tick(now)
        return step

    def _share_prompt(self, request: Request) -> None:
        """When the last chunk of a group's prompt is launched, its other sequences may fork from it."""
        group = request.group
        if group.held_members and self.batch.num_computed[request.slot] >= len(group.prompt):
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
                self._fail(batch.request_at(int(slots[row])), reason, forget=True)
        tokens = take_tokens(batch, step, slots, output, now)
        if step.drafts:
            self.drafts.note(step, output.further)
        follow(batch, tokens.slots)
        self._announce(tokens.slots)
        for values in output.prompt_logprobs:
            self._send_prompt_logprobs(batch.requests[int(slots[values.row])], values)
        self._index_full_blocks(step, slots)
        for choice in output.beams:
            self._take_choice(choice)
        for slot in tokens.slots[tokens.finish != 0].tolist():
            self._end_reported(batch.request_at(slot))
        self._vacate_landed(slots)
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
            self._end_reported(request)

    def _index_full_blocks(self, step: SchedulerOutput, slots: Slots) -> None:
        """Blocks filled by this step hold tokens that are known by now."""
        if not self.pool.enable_prefix_caching:
            return
        reached = step.num_computed + step.num_scheduled
        if step.drafts:
            reached[-len(step.drafts) :] = self.batch.num_known[slots[-len(step.drafts) :]] - 1
        full = reached // self.kv.block_size
        for row in np.flatnonzero((full > self.kv.num_indexed[slots]) & self.batch.live[slots]).tolist():
            slot, computed = int(slots[row]), int(reached[row])
            request = self.batch.request_at(slot)
            if request.beams is not None:  # what follows the prompt is of one beam among several
                computed = min(computed, len(request.group.prompt))
            self.kv.index(slot, request, self.batch.token_ids[slot], computed)

    def _announce(self, slots: Slots) -> None:
        """Tells the front-ends of prompts whose first token is here."""
        for slot in slots[self.batch.announces[slots]].tolist():
            self.batch.announces[slot] = False
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

    def _vacate_landed(self, slots: Slots) -> None:
        """Empties slots that were only waiting for this step: ended, or preempted in flight."""
        batch = self.batch
        for slot in list(self._evicting):
            request = batch.request_at(slot)
            if not batch.in_flight[request.slots].any():
                del self._evicting[slot]
                self._requeue(request)
        for slot in slots[(batch.in_flight[slots] == 0) & ~batch.live[slots]].tolist():
            ended = batch.requests[slot]
            if ended is not None:
                self._vacate(slot)
                self._release_if_gone(ended.group)

    def fail_step(self, step: SchedulerOutput, reason: Reason, now: float) -> dict[int, EngineCoreOutputs]:
        """The step could not be computed: all of its requests fail, with their siblings, who share what it wrote."""
        for slot in step.slots.tolist():
            if self.batch.live[slot]:
                request = self.batch.request_at(slot)
                for member in self._members(request.group, request.frontend):
                    self._fail(member, reason, forget=True)
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
        requests = dict.fromkeys(self._requests.values())
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
        requests = list(dict.fromkeys(self._requests.values()))
        check_invariants(self.batch, self.kv, requests, self._shares.held_blocks())
        if not self.has_work:
            assert not self.batch.occupied_slots()
            assert not self.pool.num_used
