"""A model runner without a model, which trusts nobody.

It keeps its own slots from the diffs in `SchedulerOutput`, exactly as step.py describes them, and a paged cache of
tags (see oracle.py). It works in the order of submission, as a device's stream does; a step's result is handed out
when asked for, so that steps can be submitted ahead. A step that fails as a whole spoils what its rows wrote, and no
later row that reads it says so. What breaks the contract of step.py raises `ContractError`; with
`strict=False` the contents of the cache are not compared, and a mistake there only shows in the tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from octavo.errors import Reason
from octavo.step import (
    BeamChoice,
    BeamHypothesis,
    Int32s,
    ModelRunnerOutput,
    NewRequest,
    PromptLogprobs,
    SchedulerOutput,
)
from octavo.types import FinishReason, GenerationParams
from property.beam_oracle import choose
from property.fake_output import FurtherTable, LogprobTable
from property.oracle import MASK, WEIGHTS, TagChain, finish_of, make_tag, mix, next_token


class StepError(Exception):
    """The device could not compute a step."""


class ContractError(AssertionError):
    """The scheduler sent a step that step.py does not allow, or one that reads a wrong block."""


def require(condition: object, message: str, *details: object) -> None:
    if not condition:
        raise ContractError(" ".join([message, *map(str, details)]))


def needs_host(params: GenerationParams) -> bool:
    """A third of the requests, as if their tokens were chosen on the host."""
    return (params.seed or 0) % 3 == 1


def num_beams(request: NewRequest) -> int:
    return request.params.num_beams or 1


@dataclass
class Slot:
    """A request as the worker knows it."""

    request: NewRequest
    tokens: list[int]
    chain: TagChain
    """What the tags of `tokens` must be, computed without the cache."""
    block_table: Int32s
    """[max_blocks], 0 where nothing was granted."""
    num_computed: int
    started: bool = True
    """False for a row of a beam search that was not scheduled since it entered: where it starts is up to the core."""
    sampled_in: int = 0
    """The last step that gave it a token."""
    finished: FinishReason | None = None
    """A finished or failed request's rows are muted: they write nothing and answer -1."""
    num_late_rows: int = 0
    """Rows since it finished."""

    def expected_tags(self, count: int) -> list[int]:
        while len(self.chain.tags) < count:
            self.chain.append(self.tokens[len(self.chain.tags)])
        return self.chain.tags[:count]


class FakePendingStep:
    """A submitted step; its result was computed in the order of submission and is read in that order."""

    def __init__(self, runner: FakeRunner, step_id: int, output: ModelRunnerOutput, spoilt: set[int]) -> None:
        self._runner = runner
        self._step_id = step_id
        self._output = output
        self._spoilt = spoilt
        """Groups of the rows, if the step has failed."""

    def result(self) -> ModelRunnerOutput:
        require(self._runner.unread and self._runner.unread[0] == self._step_id, "results read out of order")
        if self._spoilt:
            self.fail()
        self._runner.unread.pop(0)
        return self._output

    def fail(self) -> NoReturn:
        """Tells the core that the step has failed, instead of a result."""
        self._runner.unread.remove(self._step_id)
        self._runner.spoilt_groups |= self._spoilt
        raise StepError


class FakeRunner:
    """See the module. Owns `slots` and `cache`; `fail_next`, `fail_step` and `domain_of` belong to the test."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_requests: int,
        max_model_len: int,
        depth: int = 1,
        strict: bool = True,
    ) -> None:
        """`depth`: steps that may be launched before the end of a request in an earlier one is seen."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_num_requests = max_num_requests
        self.max_blocks = -(-max_model_len // block_size)
        self.depth = depth
        self.strict = strict
        self.cache = np.zeros((num_blocks + 1, block_size), np.uint64)
        self.slots: dict[int, Slot] = {}
        self.released_groups: set[int] = set()
        self.unread: list[int] = []
        """Ids of submitted steps whose results were not read."""
        self.fail_next: dict[tuple[int, int], Reason] = {}
        """(seed, row) of sequences whose next row fails."""
        self.fail_step = False
        """The next step fails as a whole: nobody knows what it wrote."""
        self.spoilt_groups: set[int] = set()
        """Groups of failed steps of which the core knows by now."""
        self.domain_of: Callable[[NewRequest], int] = lambda request: 0
        """Requests of different domains must never share a block."""
        self.num_muted_rows = 0
        self.num_copies = 0
        self.num_drafted = self.num_accepted = 0
        self._last_step_id = -1
        self._poison: dict[int, int] = {}  # tags that a failed row left behind -> its group
        self._lost_groups: set[int] = set()  # of failed steps: a device does not know whose work it has spoilt

    # --- applying the diff --------------------------------------------------------------------------------------------

    def submit(self, step: SchedulerOutput) -> FakePendingStep:
        require(step.step_id > self._last_step_id, "step ids must grow", step.step_id)
        self._last_step_id = step.step_id
        for slot in step.freed_slots:
            require(slot in self.slots, "freed a slot that holds no request:", slot)
            del self.slots[slot]
        self._release_groups(step.released_groups)
        for request in step.new_requests:
            self._enter(request)
        self._grow_tables(step)
        self._copy_blocks(step.block_copies)
        output = self._run(step)
        self.unread.append(step.step_id)
        failed, self.fail_step = self.fail_step, False
        groups = {self.slots[slot].request.group_id for slot in step.slots.tolist()} if failed else set()
        self._lost_groups |= groups
        return FakePendingStep(self, step.step_id, output, groups)

    def _release_groups(self, groups: list[int]) -> None:
        for group in groups:
            require(group not in self.released_groups, "group released twice:", group)
            require(all(s.request.group_id != group for s in self.slots.values()), "released a living group:", group)
            self.released_groups.add(group)

    def _enter(self, request: NewRequest) -> None:
        slot, length, computed = request.slot, len(request.token_ids), request.num_computed_tokens
        require(slot not in self.slots, "slot is taken:", slot)
        require(0 <= slot < self.max_num_requests, "no such slot:", slot)
        require(request.group_id not in self.released_groups, "group comes back after its release:", request.group_id)
        require(0 <= request.row < request.num_rows, "row out of range")
        require(0 < request.prompt_len <= length < request.max_total_tokens, "lengths do not fit:", request)
        require(0 <= computed < length, "nothing left to compute:", computed, length)
        require(len(request.block_ids) * self.block_size >= computed, "computed tokens without blocks:", request)
        require(len(request.block_ids) <= self.max_blocks, "block table too long")
        table = np.zeros(self.max_blocks, np.int32)
        table[: len(request.block_ids)] = request.block_ids
        tokens = request.token_ids.tolist()
        started = num_beams(request) == 1 or request.row == 0
        self.slots[slot] = Slot(request, tokens, TagChain(self.domain_of(request)), table, computed, started)

    def _grow_tables(self, step: SchedulerOutput) -> None:
        require(len(step.block_slots) == len(step.block_columns) == len(step.block_ids), "ragged block diff")
        for slot, column, block in zip(
            step.block_slots.tolist(), step.block_columns.tolist(), step.block_ids.tolist(), strict=True
        ):
            require(slot in self.slots, "block for an empty slot:", slot)
            require(1 <= block <= self.num_blocks, "no such block:", block)
            require(0 <= column < self.max_blocks, "no such column:", column)
            table = self.slots[slot].block_table
            require(column == 0 or table[column - 1], "hole in the block table of slot", slot, "before column", column)
            table[column] = block

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """In order or all at once: both must come to the same."""
        written: set[int] = set()
        contents = [self.cache[source].copy() for source, _ in copies]
        for (source, destination), content in zip(copies, contents, strict=True):
            require(1 <= source <= self.num_blocks and 1 <= destination <= self.num_blocks, "bad copy:", copies)
            require(source not in written and destination not in written, "copies depend on their order:", copies)
            written.add(destination)
            self.cache[destination] = content
            self.num_copies += 1

    # --- the rows -----------------------------------------------------------------------------------------------------

    def _run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        rows = list(zip(step.slots.tolist(), step.num_computed.tolist(), step.num_scheduled.tolist(), strict=True))
        require(len(step.samples) == len(rows), "ragged rows")
        require(len({row[0] for row in rows}) == len(rows), "a slot has two rows:", step.slots)
        require(0 <= step.num_decode_rows <= len(rows), "num_decode_rows")
        self._check_rows(step, rows)
        self._check_writers(rows)
        output = ModelRunnerOutput(np.full(len(rows), -1, np.int32), np.zeros(len(rows), np.uint8))
        logprobs, further = LogprobTable(), FurtherTable(len(rows))
        drafts = [[] for _ in range(len(rows) - len(step.drafts))] + [draft.tolist() for draft in step.drafts]
        snapshot = self.cache.copy()
        searches: dict[int, dict[int, tuple[int, int]]] = {}  # group -> beam -> slot and last tag
        for row, (slot_id, start, count) in enumerate(rows):
            slot = self.slots[slot_id]
            if slot.finished is not None:
                self.num_muted_rows += 1
                continue
            context = snapshot[slot.block_table[: -(-start // self.block_size)]].reshape(-1)[:start]
            reason = self._failure(slot, context)
            if reason is not None:
                self._write_poison(slot, start, count)
                if slot.request.group_id not in self._lost_groups:
                    output.failed.append((row, reason))
                self._mute(slot)
                continue
            tags = self._compute(slot, context, start, count, drafts[row])
            self._add_prompt_logprobs(output, slot, row, start, count)
            if step.samples[row] and num_beams(slot.request) > 1:
                searches.setdefault(slot.request.group_id, {})[slot.request.row] = (slot_id, tags[-1])
            elif step.samples[row]:
                behind = tags[len(tags) - 1 - len(drafts[row]) :]
                output.token_ids[row], output.finish[row] = self._sample(logprobs, slot, row, behind[0])
                self._check_draft(further, slot, row, drafts[row], behind)
        further.finish(output, logprobs, [self.slots[slot_id].request for slot_id, _, _ in rows])
        for group, rows_of_group in searches.items():
            self._advance_search(output, rows_of_group, group in step.expired_groups)
        output.logprobs = logprobs.finish()
        return output

    def _check_rows(self, step: SchedulerOutput, rows: list[tuple[int, int, int]]) -> None:
        for row, (slot_id, start, count) in enumerate(rows):
            require(slot_id in self.slots, "row of an empty slot:", slot_id)
            require(count >= 1, "empty row:", slot_id)
            slot = self.slots[slot_id]
            if needs_host(slot.request.params):
                require(slot.sampled_in not in self.unread, "scheduled before its token was read:", slot_id)
            if step.samples[row]:
                slot.sampled_in = step.step_id
            if row < step.num_decode_rows:
                require(count == 1 and step.samples[row], "not a decode row:", row)
            if slot.finished is not None:
                require(slot.finished != FinishReason.LENGTH, "scheduled past its length:", slot_id)
                slot.num_late_rows += 1
                require(slot.num_late_rows <= self.depth, "scheduled after its end was seen:", slot_id)
                continue
            length = len(slot.tokens)
            if row >= len(rows) - len(step.drafts):
                count -= self._check_limits(slot, step.drafts[row - len(rows)].tolist())
            if not slot.started:
                slot.started, slot.num_computed = True, start
            require(start == slot.num_computed, "row starts at", start, "but slot", slot_id, "is at", slot.num_computed)
            require(start + count <= length, "row beyond the tokens of slot", slot_id, start, count, length)
            require(bool(step.samples[row]) == (start + count == length), "samples is wrong in row", row)
            blocks = slot.block_table[: -(-(start + rows[row][2]) // self.block_size)]
            require((blocks >= 1).all() and (blocks <= self.num_blocks).all(), "no block for slot", slot_id, blocks)
            require(len(set(blocks.tolist())) == len(blocks), "a block twice in one table:", slot_id, blocks)

    def _check_limits(self, slot: Slot, draft: list[int]) -> int:
        """Length of a draft that is as step.py says."""
        request = slot.request
        require(draft, "an empty draft:", request.slot)
        require(num_beams(request) == 1, "a draft of a beam search:", request.slot)
        require(not needs_host(request.params), "a draft of which the host would choose the tokens:", request.slot)
        ends = {*request.eos_token_ids, *request.stop_token_ids}
        require(not ends & set(draft), "a draft goes on behind an end:", request.slot, draft)
        require(len(draft) <= (request.params.prompt_lookup_num_tokens or 0), "a long draft:", request.slot, draft)
        require(len(slot.tokens) + len(draft) < request.max_total_tokens, "a draft beyond the length:", request.slot)
        return len(draft)

    def _check_writers(self, rows: list[tuple[int, int, int]]) -> None:
        """A block that one row writes is in no other request's computed part: shared blocks are immutable."""
        readers: dict[int, set[int]] = {}
        for slot_id, slot in self.slots.items():
            for block in slot.block_table[: -(-slot.num_computed // self.block_size)].tolist():
                readers.setdefault(block, set()).add(slot_id)
        writers: dict[int, int] = {}
        for slot_id, start, count in rows:
            slot = self.slots[slot_id]
            if slot.finished is not None:
                continue
            first, last = start // self.block_size, (start + count - 1) // self.block_size
            for block in slot.block_table[first : last + 1].tolist():
                require(block not in writers, "slots", writers.get(block), slot_id, "both write block", block)
                writers[block] = slot_id
                others = readers.get(block, set()) - {slot_id}
                require(not others, "slot", slot_id, "writes block", block, "which is shared with slots", others)

    def _failure(self, slot: Slot, context: np.ndarray) -> Reason | None:
        """Why the row fails: the test wants it, or it reads what a failed sibling wrote, as NaN would spread."""
        request = slot.request
        reason = self.fail_next.pop((request.seed, request.row), None)
        groups = {self._poison[tag] for tag in context.tolist() if tag in self._poison} if self._poison else set()
        require(groups <= {request.group_id}, "slot", request.slot, "reads what a failed request of", groups, "wrote")
        require(not groups & self.spoilt_groups, "slot", request.slot, "goes on after the failed step of its group")
        if self.fail_step:
            return Reason.INTERNAL
        return reason or (Reason.NON_FINITE_LOGITS if groups else None)

    def _write_poison(self, slot: Slot, start: int, count: int) -> None:
        for position in range(start, start + count):
            tag = mix(mix(len(self._poison)) ^ 0xBAD)
            self._poison[tag] = slot.request.group_id
            self.cache[slot.block_table[position // self.block_size], position % self.block_size] = tag

    def _compute(self, slot: Slot, context: np.ndarray, start: int, count: int, draft: list[int]) -> list[int]:
        """Writes the tags of the row's tokens, given those that its block table reads. Returns them."""
        if self.strict:
            wrong = np.flatnonzero(context != np.array(slot.expected_tags(start), np.uint64))
            require(not wrong.size, "stale cache: slot", slot.request.slot, "positions", wrong, slot.block_table)
        total = int((context * WEIGHTS[:start]).sum())
        tags: list[int] = []
        tokens = slot.tokens + draft
        for position in range(start, start + count):
            tags.append(make_tag(slot.chain.domain, tokens[position], position, total))
            total = (total + tags[-1] * (2 * position + 1)) & MASK
            self.cache[slot.block_table[position // self.block_size], position % self.block_size] = tags[-1]
        slot.num_computed = start + count - len(draft)
        return tags

    def _check_draft(self, further: FurtherTable, slot: Slot, row: int, draft: list[int], tags: list[int]) -> None:
        """Tokens behind the first one, as long as the draft has what was chosen; tags [1 + len(draft)]."""
        self.num_drafted += len(draft)
        for drafted, tag in zip(draft, tags[1:], strict=True):
            if drafted != slot.tokens[-1]:
                return
            self.num_accepted += 1
            slot.num_computed += 1
            further.entries.append((row, *self._sample(None, slot, row, tag)))

    def _sample(self, logprobs: LogprobTable | None, slot: Slot, row: int, tag: int) -> tuple[int, FinishReason]:
        """Appends the token that follows this tag."""
        request = slot.request
        token_id = next_token(tag, request.seed, request.row)
        slot.tokens.append(token_id)
        finish = finish_of(
            token_id, len(slot.tokens), request.max_total_tokens, request.eos_token_ids, request.stop_token_ids
        )
        if finish:
            slot.finished = finish
        if logprobs is not None and request.logprobs is not None:
            logprobs.add(row, token_id, request.logprobs.num_top, request.logprobs.token_ids)
        return token_id, finish

    def _mute(self, slot: Slot) -> None:
        """Of a beam search all rows."""
        request = slot.request
        rows = [other for other in self.slots.values() if other.request.group_id == request.group_id]
        for other in rows if num_beams(request) > 1 else [slot]:
            other.finished = FinishReason.ABORTED

    def _advance_search(self, output: ModelRunnerOutput, rows: dict[int, tuple[int, int]], out_of_time: bool) -> None:
        """Rows take over what their parents have."""
        slots = [self.slots[slot] for _, (slot, _) in sorted(rows.items())]
        request = slots[0].request
        if slots[0].finished is not None:
            return  # a sibling failed in this step
        require(len(rows) == num_beams(request), "a beam search steps without some of its rows:", rows)
        tags = [tag for _, (_, tag) in sorted(rows.items())]
        total = len(slots[0].tokens) + 1
        choice = choose(
            tags, request.seed, total, request.max_total_tokens, request.eos_token_ids, request.stop_token_ids
        )
        old = [(list(s.tokens), copy.deepcopy(s.chain), s.block_table.copy(), s.num_computed) for s in slots]
        for slot, parent, token in zip(slots, choice.parents, choice.tokens, strict=True):
            tokens, chain, table, slot.num_computed = old[parent]
            slot.tokens, slot.chain, slot.block_table = [*tokens, token], copy.deepcopy(chain), table.copy()
        finish = choice.finish or (FinishReason.TIME if out_of_time else FinishReason.NONE)
        found = None
        if finish:
            for slot in slots:
                slot.finished = finish
            outputs = [np.array(slot.tokens[request.prompt_len :], np.int32) for slot in slots]
            count = request.params.num_return_sequences or 1
            found = [BeamHypothesis(ids, finish, -float(i)) for i, ids in enumerate(outputs[:count])]
        parents, tokens = np.array(choice.parents, np.int32), np.array(choice.tokens, np.int32)
        output.beams.append(BeamChoice(request.slot, parents, tokens, found))

    def _add_prompt_logprobs(self, output: ModelRunnerOutput, slot: Slot, row: int, start: int, count: int) -> None:
        """The row's position i gives the values of prompt token i + 1."""
        request = slot.request
        first, end = start + 1, min(start + count, request.prompt_len - 1) + 1
        if request.prompt_logprobs is None or first >= end:
            return
        tokens = np.array(slot.tokens[first:end], np.int32)
        top = np.tile(tokens[:, None], (1, request.prompt_logprobs))
        output.prompt_logprobs.append(
            PromptLogprobs(
                row=row,
                start=first,
                num_top=request.prompt_logprobs,
                chosen=-tokens.astype(np.float32),
                ranks=tokens + 1,
                top_token_ids=top,
                top_values=-top.astype(np.float32),
            )
        )
