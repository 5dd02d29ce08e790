"""Seeded mutants: one bug each, planted in the core or between it and the worker, all of which the session must catch.

A check that has never failed proves nothing. Each mutant runs the random workload of a few seeds, first with the
scheduler's own invariants and then without, where only the fake runner, the oracle and the end of the drain can see it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import count

import numpy as np
import pytest
from octavo.core.block_pool import BlockPool
from octavo.core.groups import PromptShares
from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.request import Group, Request, RequestStatus
from octavo.core.running_batch import RunningBatch
from octavo.core.scheduler import Scheduler
from octavo.step import Int32s, SchedulerOutput
from property.fake_runner import FakePendingStep, FakeRunner
from property.workload import run_workload

SEEDS = range(1000, 1030)
Patch = pytest.MonkeyPatch


def every(nth: int) -> Callable[[], bool]:
    """True at each n-th call: the bug shows only now and then."""
    calls = count(1)
    return lambda: next(calls) % nth == 0


def dropped_free(patch: Patch) -> None:
    """A sequence that ends keeps its last block."""
    release, strikes = BlockPool.release, every(5)

    def mutant(self: BlockPool, blocks: Sequence[int]) -> None:
        release(self, blocks[:-1] if strikes() else blocks)

    patch.setattr(BlockPool, "release", mutant)


def double_free(patch: Patch) -> None:
    """A block is given back twice; the pool's own assertion does not see it, since the count is not checked."""

    def mutant(self: BlockPool, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.ref_counts[block] = max(self.ref_counts[block] - 1, 0)
            if self.ref_counts[block] == 0 and not self._hash_of[block]:
                self._free += [block, block]
            elif self.ref_counts[block] == 0:
                self._cached[block] = None

    patch.setattr(BlockPool, "release", mutant)


def block_off_by_one(patch: Patch) -> None:
    """A sequence whose tokens just fill its blocks counts as needing one block less."""
    blocks_for = KVCacheManager.blocks_for
    patch.setattr(KVCacheManager, "blocks_for", lambda self, num_tokens: blocks_for(self, num_tokens - 1))


def wrong_block_in_hit(patch: Patch) -> None:
    """The last block of a cache hit is some other cached block."""
    find = KVCacheManager.find_prefix

    def mutant(self: KVCacheManager, request: Request) -> list[int]:
        found = find(self, request)
        others = [block for block in self.pool._cached if block not in found]
        return [*found[:-1], others[0]] if found and others else found

    patch.setattr(KVCacheManager, "find_prefix", mutant)


def stale_table_row(patch: Patch) -> None:
    """Where a block table grows, the worker keeps what the slot's last owner had there."""
    submit = FakeRunner.submit
    known: dict[tuple[int, int], int] = {}

    def mutant(self: FakeRunner, step: SchedulerOutput) -> FakePendingStep:
        for request in step.new_requests:
            known.update({(request.slot, column): int(block) for column, block in enumerate(request.block_ids)})
        places = list(zip(step.block_slots.tolist(), step.block_columns.tolist(), strict=True))
        fresh = step.block_ids.tolist()
        stale = [known.get(place, block) for place, block in zip(places, fresh, strict=True)]
        step.block_ids = np.array(stale, np.int32)
        known.update(zip(places, fresh, strict=True))
        return submit(self, step)

    patch.setattr(FakeRunner, "submit", mutant)


def abort_skipped_while_waiting(patch: Patch) -> None:
    """Aborting a request that has no slot is forgotten."""
    abort = Scheduler.abort

    def mutant(self: Scheduler, frontend: int, keys: Iterable[int]) -> None:
        requests = {key: self._table.get(frontend, key) for key in keys}
        kept = [k for k, r in requests.items() if r is None or r.status is not RequestStatus.WAITING]
        abort(self, frontend, kept)

    patch.setattr(Scheduler, "abort", mutant)


def forgotten_child(patch: Patch) -> None:
    """One of a prompt's n sequences never enters the queue."""
    take = PromptShares.take

    def mutant(self: PromptShares, group: Group, blocks: list[int]) -> list[Request]:
        *members, forgotten = take(self, group, blocks)
        forgotten.status = RequestStatus.WAITING
        return members

    patch.setattr(PromptShares, "take", mutant)


def missing_copy_on_write(patch: Patch) -> None:
    """A fork gets a block of its own for the partial one, but nothing is copied there."""
    fork = KVCacheManager.fork

    def mutant(self: KVCacheManager, slot: int, blocks: list[int], num_tokens: int) -> list[tuple[int, int]] | None:
        return None if fork(self, slot, blocks, num_tokens) is None else []

    patch.setattr(KVCacheManager, "fork", mutant)


def shared_partial_block(patch: Patch) -> None:
    """A fork shares the partial block too, and writes into it."""

    def mutant(self: KVCacheManager, slot: int, blocks: list[int], num_tokens: int) -> list[tuple[int, int]] | None:
        self.admit(slot, blocks[: self.blocks_for(num_tokens)])
        return []

    patch.setattr(KVCacheManager, "fork", mutant)


def two_rows_swapped(patch: Patch) -> None:
    """The tokens of two rows of a step change places."""
    update = Scheduler.update

    def mutant(self: Scheduler, step: SchedulerOutput, output: object, now: float) -> object:
        rows = np.flatnonzero(output.token_ids >= 0)  # type: ignore[attr-defined]
        if len(rows) > 1:
            output.token_ids[rows[:2]] = output.token_ids[rows[1::-1]]  # type: ignore[attr-defined]
        return update(self, step, output, now)  # type: ignore[arg-type]

    patch.setattr(Scheduler, "update", mutant)


def salt_left_out(patch: Patch) -> None:
    """Block hashes are the same for every salt."""

    def mutant(self: Request, token_ids: Int32s, num: int, block_size: int) -> list[bytes]:
        return [hashlib.sha256(token_ids[: (i + 1) * block_size].tobytes()).digest() for i in range(num)]

    patch.setattr(Request, "hashes", mutant)


def hash_without_parent(patch: Patch) -> None:
    """A block is found by its own tokens, whatever came before it."""

    def mutant(self: Request, token_ids: Int32s, num: int, block_size: int) -> list[bytes]:
        salt = self.spec.cache_salt.encode()
        return [salt + token_ids[i * block_size : (i + 1) * block_size].tobytes() for i in range(num)]

    patch.setattr(Request, "hashes", mutant)


def evicted_block_still_indexed(patch: Patch) -> None:
    """The hash index is not told that a cached block was taken for something else."""

    patch.setattr(BlockPool, "_unhash", lambda self, block: self._hash_of.__setitem__(block, b""))


def token_not_awaited(patch: Patch) -> None:
    """A request whose tokens the host chooses is scheduled while one is in flight."""
    patch.setattr(RunningBatch, "wait_for_tokens", lambda self, slot: None)


MUTANTS = [
    dropped_free,
    double_free,
    block_off_by_one,
    wrong_block_in_hit,
    stale_table_row,
    abort_skipped_while_waiting,
    forgotten_child,
    missing_copy_on_write,
    shared_partial_block,
    two_rows_swapped,
    salt_left_out,
    hash_without_parent,
    evicted_block_still_indexed,
    token_not_awaited,
]


def is_caught(check: bool) -> bool:
    for seed in SEEDS:
        try:
            run_workload(seed, check=check)
        except Exception:
            return True
    return False


@pytest.mark.parametrize("check", [True, False], ids=["with its own checks", "from outside only"])
def test_unharmed_core_passes_the_seeds_that_catch_the_mutants(check: bool) -> None:
    for seed in SEEDS:
        run_workload(seed, check=check)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("check", [True, False], ids=["with its own checks", "from outside only"])
def test_mutant_is_caught(mutant: Callable[[Patch], None], check: bool, monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    assert is_caught(check)
