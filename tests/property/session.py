"""The real scheduler, the fake runner and the oracle, bound together: what both the state machine and the seeded
mutants drive. Every check on what the scheduler says is here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
from octavo.config import CacheConfig, SchedulerConfig
from octavo.core.scheduler import Scheduler
from octavo.errors import Reason
from octavo.ipc import BeamSequence, EngineCoreOutputs, EngineCoreRequest
from octavo.step import Int32s, LogprobSpec, NewRequest, SchedulerOutput
from octavo.types import FinishReason, GenerationParams, LogprobKind
from property.beam_oracle import beam_answer
from property.fake_runner import FakePendingStep, FakeRunner, needs_host, require
from property.oracle import VOCAB_SIZE, Answer, answer, mix
from property.records import PromptSpec, SentPrompt, Sequence, columns, guess


class Session:
    """Owns the clock, the steps in flight and the record of every sequence."""

    def __init__(
        self, *, num_blocks: int, max_model_len: int, scheduler: SchedulerConfig, cache: CacheConfig, check: bool = True
    ) -> None:
        self.config = scheduler
        self.depth = scheduler.pipeline_depth or 0
        self.max_model_len = max_model_len
        self.block_size = cache.block_size
        self.num_blocks = num_blocks
        self.check = check
        self.scheduler = Scheduler(
            scheduler,
            cache,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            needs_host=lambda params, logprobs: needs_host(params),
        )
        self.runner = FakeRunner(
            num_blocks=num_blocks,
            block_size=cache.block_size,
            max_num_requests=scheduler.max_num_requests,
            max_model_len=max_model_len,
            depth=self.depth,
        )
        self.runner.domain_of = self._domain_of
        self._guess_drafts()
        self.now = 1000.0
        self.in_flight: deque[tuple[SchedulerOutput, FakePendingStep]] = deque()
        self.sequences: dict[tuple[int, int], Sequence] = {}
        """By (front-end, key)."""
        self.prompts: dict[int, SentPrompt] = {}
        """By seed, which is unique."""
        self.next_key: dict[int, int] = {}
        self.num_steps = 0
        self.broken = False
        """A check has failed: what follows means nothing."""
        self.num_preempted = 0
        self.num_cached_tokens = 0

    def _domain_of(self, request: NewRequest) -> int:
        return self.prompts[request.seed].domain

    def _guess_drafts(self) -> None:
        self.look_up, self.scheduler.drafts.draft = self.scheduler.drafts.draft, self._draft

    def _draft(self, slot: int, limit: int) -> Int32s:
        """What the fake model's history says is hardly ever right."""
        request = self.scheduler.batch.request_at(slot)
        known = int(self.scheduler.batch.num_known[slot])
        sequence = self.sequences[request.frontend, request.key]
        chance = mix(known * 1009 + request.key)
        if chance % 8 == 0:
            return self.look_up(slot, limit)
        return guess(sequence, known - len(sequence.prompt.spec.tokens), limit, chance)

    def alive(self) -> list[tuple[int, int]]:
        return [name for name, sequence in self.sequences.items() if sequence.alive]

    # --- inputs -------------------------------------------------------------------------------------------------------

    def add(self, frontend: int, specs: list[PromptSpec]) -> list[int]:
        """Adds one client request of these prompts. Returns the key of each sequence."""
        requests, keys = [], []
        for spec in specs:
            key = self.next_key.get(frontend, 0)
            self.next_key[frontend] = key + spec.num_sequences
            seed = len(self.prompts) + 1
            deadline = None if spec.deadline is None else self.now + spec.deadline
            sent = SentPrompt(spec, key, seed, self.now, deadline)
            self.prompts[seed] = sent
            max_total = len(spec.tokens) + spec.max_new_tokens
            if spec.num_beams > 1:
                self._expect_search(sent, max_total)
            for row in range(spec.num_sequences):
                if sent.search is not None:
                    expected = Answer(sent.search.outputs[-1][row], sent.search.finish)
                else:
                    expected = answer(
                        spec.tokens, domain=sent.domain, seed=seed, row=row, max_total_tokens=max_total,
                        eos=spec.eos, stop=spec.stop,
                    )  # fmt: skip
                sequence = Sequence(sent, row, expected)
                sent.sequences.append(sequence)
                self.sequences[frontend, key + row] = sequence
                keys.append(key + row)
            requests.append(self._request(sent, max_total))
        self.scheduler.add(frontend, requests)
        if any(self.sequences[frontend, key].prompt.too_large for key in keys):
            self._receive(self.scheduler.take_outputs())  # before anybody aborts them
        self._check()
        return keys

    def _expect_search(self, sent: SentPrompt, max_total: int) -> None:
        spec, size = sent.spec, self.block_size
        sent.search = beam_answer(
            spec.tokens, domain=sent.domain, seed=sent.seed, num_beams=spec.num_beams, max_total_tokens=max_total,
            eos=spec.eos, stop=spec.stop,
        )  # fmt: skip
        shared = (len(spec.tokens) - 1) // size
        blocks = shared + spec.num_beams * (-(-(max_total - 1) // size) - shared)
        sent.too_large = blocks > self.num_blocks or spec.num_beams > self.config.max_num_requests

    def _request(self, sent: SentPrompt, max_total: int) -> EngineCoreRequest:
        spec = sent.spec
        logprobs = None
        if spec.num_top is not None:
            logprobs = LogprobSpec(
                num_top=spec.num_top, kind=LogprobKind.RAW_LOGPROB, token_ids=[3] * (spec.num_top % 3)
            )
        return EngineCoreRequest(
            key=sent.key,
            num_sequences=spec.num_sequences,
            prompt_token_ids=np.array(spec.tokens, np.int32).tobytes(),
            params=GenerationParams(
                max_time=spec.max_time,
                seed=sent.seed,
                num_return_sequences=spec.num_sequences,
                num_beams=spec.num_beams,
                prompt_lookup_num_tokens=spec.lookup or None,
            ),
            max_total_tokens=max_total,
            length_is_context=spec.length_is_context,
            eos_token_ids=list(spec.eos),
            stop_token_ids=list(spec.stop),
            seed=sent.seed,
            priority=spec.priority,
            cache_salt=spec.salt,
            bypass_prefix_cache=spec.bypass,
            arrival_time=self.now,
            deadline=sent.deadline,
            deadline_is_client=spec.deadline_is_client,
            logprobs=logprobs,
            prompt_logprobs=spec.prompt_logprobs,
        )

    def abort(self, frontend: int, keys: Iterable[int]) -> None:
        keys = list(keys)
        for key in keys:
            if (frontend, key) in self.sequences and self.sequences[frontend, key].alive:
                sequence = self.sequences[frontend, key]
                for member in [sequence] if sequence.prompt.search is None else sequence.prompt.sequences:
                    member.aborted = True
        self.scheduler.abort(frontend, keys)
        self._check()

    def abort_frontend(self, frontend: int) -> None:
        for (owner, _), sequence in self.sequences.items():
            if owner == frontend and sequence.alive:
                sequence.aborted = True
        self.scheduler.abort_frontend(frontend)
        self._check()

    def reset_prefix_cache(self) -> None:
        freed = self.scheduler.reset_prefix_cache()
        require(freed >= 0 and self.scheduler.load(self.now).cached_blocks == 0, "the reset left cached blocks")
        self._check()

    def statistics(self) -> dict[str, int]:
        """What happened, to see that a workload reaches the paths that it is for."""
        ended = [sequence.ended for sequence in self.sequences.values()]
        return {
            "sequences": len(self.sequences),
            "steps": self.num_steps,
            "tokens": sum(len(sequence.received) for sequence in self.sequences.values()),
            "preempted": self.num_preempted,
            "cached_tokens": self.num_cached_tokens,
            "copies": self.runner.num_copies,
            "muted_rows": self.runner.num_muted_rows,
            "drafted": self.runner.num_drafted,
            "accepted": self.runner.num_accepted,
            "found": sum(s.prompt.search is not None and len(s.received) > 0 for s in self.sequences.values()),
            "aborted": sum(sequence.aborted for sequence in self.sequences.values()),
            **{reason.name: ended.count(reason) for reason in (*FinishReason, *Reason) if reason in ended},
        }

    def fail(self, frontend: int, key: int, reason: Reason = Reason.NON_FINITE_LOGITS) -> None:
        """The sequence's next row fails, if there will be one."""
        sequence = self.sequences[frontend, key]
        sequence.prompt.may_fail = True
        self.runner.fail_next[sequence.prompt.seed, sequence.row] = reason

    # --- steps --------------------------------------------------------------------------------------------------------

    def step(self) -> SchedulerOutput | None:
        """One turn of the engine core's loop; at depth 1 the result read is that of the step before."""
        self.broken = True
        plan = self._step()
        self.broken = False
        return plan

    def _step(self) -> SchedulerOutput | None:
        plan = self.scheduler.schedule(self.now)
        self._receive(self.scheduler.take_outputs())
        self._check()
        if plan is not None:
            self._check_plan(plan)
            self.in_flight.append((plan, self.runner.submit(plan)))
            self.num_steps += 1
        if self.in_flight and (plan is None or len(self.in_flight) > self.depth):
            self.settle_one()
        return plan

    def settle_one(self) -> None:
        """Reads the oldest step in flight."""
        plan, pending = self.in_flight.popleft()
        self._receive(self.scheduler.update(plan, pending.result(), self.now))
        self._receive(self.scheduler.take_outputs())
        self._check()

    def settle(self) -> None:
        while self.in_flight:
            self.settle_one()

    def drain(self) -> None:
        """No more inputs: everything must end within a bounded number of steps, and nothing may be left."""
        tokens = sum(len(s.prompt.spec.tokens) + len(s.expected.token_ids) for s in self.sequences.values() if s.alive)
        bound = self.num_steps + 100 + 10 * tokens
        idle = 0
        while self.alive() or self.in_flight:
            plan = self.step()
            idle = 0 if plan is not None or self.in_flight else idle + 1
            require(idle < 3, "nothing is scheduled, but these are alive:", self.alive())
            require(self.num_steps < bound, "starving:", self.alive())
        self.step()
        require(not self.scheduler.has_work, "work is left, but no sequence is alive")
        load = self.scheduler.load(self.now)
        require(load.running_requests == load.waiting_requests == load.waiting_tokens == 0, "load is not idle:", load)
        require(load.used_blocks == 0, "blocks have leaked:", load)
        require(load.total_blocks == self.num_blocks, "total_blocks:", load)

    def probe(self) -> None:
        """After `drain`: one more request takes the worker's last diff along; only its own slot may be left there."""
        self.add(0, [PromptSpec(tokens=[1, 2, 3], max_new_tokens=2)])
        self.drain()
        require(len(self.runner.slots) <= 1, "slots have leaked in the worker:", list(self.runner.slots))

    def _check_plan(self, plan: SchedulerOutput) -> None:
        total = int(plan.num_scheduled.sum())
        require(0 < total <= self.config.max_num_batched_tokens, "budget:", total)
        if self.config.max_chunk_tokens:
            require(plan.num_scheduled.max() <= self.config.max_chunk_tokens, "chunk limit:", plan.num_scheduled)
        for request in plan.new_requests:
            sent = self.prompts[request.seed]
            sequence = sent.sequences[request.row if sent.search is None else 0]
            require(sequence.alive, "an ended or aborted sequence enters the batch:", sent.key + request.row)
            late = sent.deadline is not None and sent.deadline < self.now
            require(not late, "started after its deadline:", sent.key + request.row)
        load = self.scheduler.load(self.now)
        require(load.running_requests <= self.config.max_num_requests, "running:", load)

    def _check(self) -> None:
        if self.check:
            self.scheduler.check()

    # --- outputs ------------------------------------------------------------------------------------------------------

    def _receive(self, messages: dict[int, EngineCoreOutputs]) -> None:
        for frontend, outputs in messages.items():
            for started in outputs.started:
                self._started(frontend, started.key, started.scheduled_time, started.cached_tokens)
            ended = set()
            entries = columns(outputs)
            for key, token_id, finish in entries:
                self._entry(frontend, key, token_id, finish)
                if finish:
                    ended.add(key)
            for found in outputs.beams:
                self._found(frontend, found)
                ended.add(found.key)
            for failure in outputs.failed:
                self._failed(frontend, failure.key, failure.reason)
                ended.add(failure.key)
            for key, times in outputs.preempted:
                require(key in ended and times >= 1, "preempted:", key, times)
                self.num_preempted += times
            self._prompt_logprobs(frontend, outputs)
            self._logprobs(frontend, outputs, entries)

    def _living(self, frontend: int, key: int) -> Sequence:
        sequence = self.sequences.get((frontend, key))
        assert sequence is not None, f"output for an unknown sequence {frontend, key}"
        require(not sequence.aborted, "output after abort:", frontend, key)
        require(sequence.ended is None, "output after the terminal event:", frontend, key)
        return sequence

    def _started(self, frontend: int, key: int, scheduled_time: float, cached_tokens: int) -> None:
        prompt = self.sequences[frontend, key].prompt
        require(prompt.key == key, "PromptStarted names sequence", key)
        require(prompt.scheduled_time is None, "PromptStarted twice:", key)
        require(any(s.alive for s in prompt.sequences), "PromptStarted of an ended prompt:", key)
        require(prompt.arrival <= scheduled_time <= self.now, "scheduled_time:", scheduled_time)
        require(0 <= cached_tokens < len(prompt.spec.tokens), "cached_tokens:", cached_tokens)
        require(not cached_tokens or not prompt.spec.bypass, "a hit in spite of bypass_prefix_cache:", key)
        prompt.scheduled_time = scheduled_time
        self.num_cached_tokens += cached_tokens

    def _entry(self, frontend: int, key: int, token_id: int, finish: int) -> None:
        sequence = self._living(frontend, key)
        prompt, expected = sequence.prompt, sequence.expected
        require(prompt.scheduled_time is not None, "a token before PromptStarted:", key)
        if token_id != -1:
            index = len(sequence.received)
            require(
                expected.token_ids[index : index + 1] == [token_id],
                "sequence", (frontend, key), "token", index, "is", token_id, "not", expected.token_ids[index:],
            )  # fmt: skip
            sequence.received.append(token_id)
        reason = FinishReason(finish)
        complete = len(sequence.received) == len(expected.token_ids)
        if reason == FinishReason.TIME:
            require(prompt.spec.max_time is not None and sequence.received, "TIME without a token or a max_time:", key)
            limit = (prompt.scheduled_time or 0.0) + (prompt.spec.max_time or 0.0)
            require(self.now >= limit, "TIME too early:", key)
        elif reason:
            wanted = expected.finish
            if wanted == FinishReason.LENGTH and prompt.spec.length_is_context:
                wanted = FinishReason.CONTEXT
            require(complete and reason == wanted, "finish:", key, reason, "not", wanted)
            require(token_id != -1, "an end without a token:", key)
        else:
            require(token_id != -1, "an empty entry:", key)
            require(not complete, "goes on after its end:", key)
        sequence.ended = reason or None

    def _found(self, frontend: int, found: BeamSequence) -> None:
        sequence = self._living(frontend, found.key)
        prompt = sequence.prompt
        require(prompt.search is not None, "a beam search that nobody asked for:", found.key)
        require(prompt.scheduled_time is not None, "found before PromptStarted:", found.key)
        assert prompt.search is not None
        token_ids = np.frombuffer(found.token_ids, np.int32).tolist()
        steps = prompt.search.outputs
        require(0 < len(token_ids) <= len(steps), "found after", len(token_ids), "steps of", len(steps))
        wanted = steps[len(token_ids) - 1][sequence.row]
        require(token_ids == wanted, "beam", sequence.row, "of", found.key, "is", token_ids, "not", wanted)
        finish = prompt.search.finish if len(token_ids) == len(steps) else FinishReason.TIME
        if finish == FinishReason.LENGTH and prompt.spec.length_is_context:
            finish = FinishReason.CONTEXT
        require(found.finish == finish, "finish:", found.key, found.finish, "not", finish)
        if finish == FinishReason.TIME:
            limit = (prompt.scheduled_time or 0.0) + (prompt.spec.max_time or 0.0)
            require(prompt.spec.max_time is not None and self.now >= limit, "TIME too early:", found.key)
        require(found.score == -float(sequence.row), "score:", found.key, found.score)
        sequence.received, sequence.ended = token_ids, found.finish

    def _failed(self, frontend: int, key: int, reason: Reason) -> None:
        sequence = self._living(frontend, key)
        prompt = sequence.prompt
        if reason == Reason.REQUEST_TOO_LARGE:
            require(prompt.too_large, "fits, but was refused:", key)
        elif reason == Reason.QUEUE_TIMEOUT:
            require(prompt.scheduled_time is None and not sequence.received, "QUEUE_TIMEOUT of one that ran:", key)
            require(self.now >= prompt.arrival + self.config.max_queue_time, "QUEUE_TIMEOUT too early:", key)
        elif reason in (Reason.CLIENT_DEADLINE, Reason.SERVER_MAX_DURATION):
            require(prompt.deadline is not None and self.now >= prompt.deadline, "deadline too early:", key)
            require((reason == Reason.CLIENT_DEADLINE) == prompt.spec.deadline_is_client, "whose deadline:", reason)
        else:
            require(prompt.may_fail, "failed for no reason:", key, reason)
        sequence.ended = reason

    def _prompt_logprobs(self, frontend: int, outputs: EngineCoreOutputs) -> None:
        for chunk in outputs.prompt_logprobs:
            prompt = self.sequences[frontend, chunk.key].prompt
            require(prompt.spec.prompt_logprobs == chunk.num_top, "prompt logprobs nobody asked for:", chunk.key)
            require(chunk.start == prompt.next_prompt_logprob, "prompt logprobs out of order:", chunk.key, chunk.start)
            chosen = np.frombuffer(chunk.chosen, np.float32)
            end = chunk.start + len(chosen)
            wanted = np.array(prompt.spec.tokens[chunk.start : end], np.float32)
            require(np.array_equal(chosen, -wanted), "prompt logprobs of other tokens:", chunk.key)
            require(len(chunk.top_values) == 4 * len(chosen) * chunk.num_top, "prompt logprobs: top")
            prompt.next_prompt_logprob = end
        for key, token_id, _ in columns(outputs):
            prompt = self.sequences[frontend, key].prompt
            if token_id != -1 and prompt.spec.prompt_logprobs is not None:
                complete = prompt.next_prompt_logprob == len(prompt.spec.tokens)
                require(complete, "a token before its prompt's logprobs:", key, prompt.next_prompt_logprob)

    def _logprobs(self, frontend: int, outputs: EngineCoreOutputs, entries: list[tuple[int, int, int]]) -> None:
        wanted = [
            index
            for index, (key, token_id, _) in enumerate(entries)
            if token_id != -1 and self.sequences[frontend, key].prompt.spec.num_top is not None
        ]
        if outputs.logprobs is None:
            require(not wanted, "logprobs are missing")
            return
        table = outputs.logprobs
        indices = np.frombuffer(table.entries, np.int32).tolist()
        require(indices == wanted, "logprobs of entries", indices, "not", wanted)
        tops, top_ids = np.frombuffer(table.top_offsets, np.int32), np.frombuffer(table.top_token_ids, np.int32)
        require(len(table.top_values) == len(table.top_token_ids), "logprobs: top values")
        offsets, values = np.frombuffer(table.requested_offsets, np.int32), np.frombuffer(table.requested, np.float32)
        for i, index in enumerate(indices):
            key, token_id, _ = entries[index]
            num_top = self.sequences[frontend, key].prompt.spec.num_top
            assert num_top is not None
            require(np.frombuffer(table.chosen, np.float32)[i] == -token_id, "logprobs: chosen of", key)
            require(np.frombuffer(table.ranks, np.int32)[i] == token_id + 1, "logprobs: rank of", key)
            top = top_ids[tops[i] : tops[i + 1]].tolist()
            require(top == [(token_id + j) % VOCAB_SIZE for j in range(num_top)], "logprobs: top of", key, top)
            requested = values[offsets[i] : offsets[i + 1]].tolist()
            require(requested == [float(token_id + 3)] * (num_top % 3), "logprobs: requested of", key, requested)
