"""Random workloads in which half of the prompts are beam searches, and mutants of what is theirs alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from octavo.core.beams import BeamScheduler
from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.plan import Plan
from octavo.core.request import Request
from octavo.step import Int32s
from property.workload import run_workload

SEEDS = range(30)
FOUND = {148: "blocks that rows need when they fork are not given away meanwhile"}
Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("seed", FOUND, ids=FOUND.get)
def test_workload_that_found_a_bug_passes(seed: int) -> None:
    run_workload(seed, beams=0.5)


def test_searches_beside_other_requests_end_as_the_oracle_says() -> None:
    totals: dict[str, int] = {}
    for seed in SEEDS:
        for name, value in run_workload(seed, beams=0.5).statistics().items():
            totals[name] = totals.get(name, 0) + value
    reached = ("found", "copies", "preempted", "cached_tokens", "aborted", "muted_rows", "TIME", "NON_FINITE_LOGITS")
    assert all(totals[name] > 10 for name in reached), totals


def parents_ignored(patch: Patch) -> None:
    """Block tables stay with their rows, whatever the parents."""
    patch.setattr(KVCacheManager, "gather", lambda self, slots, parents: None)


def tokens_ignored(patch: Patch) -> None:
    """A row keeps its own tokens before the new one."""
    advance = BeamScheduler.advance

    def mutant(self: BeamScheduler, request: Request, parents: Int32s, token_ids: Int32s) -> None:
        slots = np.array(request.slots)
        tokens = self._batch.token_ids[slots]
        length = int(self._batch.num_known[request.slot])
        advance(self, request, parents, token_ids)
        self._batch.token_ids[slots, :length] = tokens[:, :length]

    patch.setattr(BeamScheduler, "advance", mutant)


def no_copy_on_write(patch: Patch) -> None:
    """A row that leaves a shared block gets an empty one."""
    extend = KVCacheManager.extend

    def mutant(
        self: KVCacheManager, slot: int, num_computed: int, num_tokens: int
    ) -> tuple[int, list[int], list[tuple[int, int]]]:
        first, blocks, _ = extend(self, slot, num_computed, num_tokens)
        return first, blocks, []

    patch.setattr(KVCacheManager, "extend", mutant)


def row_left_behind(patch: Patch) -> None:
    """Now and then the last row of a search misses a step."""
    take_step = BeamScheduler.take_step

    def mutant(self: BeamScheduler, plan: Plan, request: Request, now: float) -> None:
        before = len(plan.beams)
        take_step(self, plan, request, now)
        if len(plan.beams) > before:
            plan.beams.pop()

    patch.setattr(BeamScheduler, "take_step", mutant)


def tables_not_sent(patch: Patch) -> None:
    """The worker is not told what a row shares."""
    fork = BeamScheduler._fork

    def mutant(self: BeamScheduler, request: Request) -> None:
        fork(self, request)
        assert request.beams is not None
        request.beams.unsent.clear()

    patch.setattr(BeamScheduler, "_fork", mutant)


def is_caught(check: bool) -> bool:
    for seed in SEEDS:
        try:
            run_workload(seed, check=check, beams=0.5)
        except Exception:
            return True
    return False


@pytest.mark.parametrize(
    "mutant",
    [parents_ignored, tokens_ignored, no_copy_on_write, row_left_behind, tables_not_sent],
    ids=lambda mutant: mutant.__name__,
)
@pytest.mark.parametrize("check", [True, False], ids=["with its own checks", "from outside only"])
def test_mutant_is_caught(mutant: Callable[[Patch], None], check: bool, monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    assert is_caught(check)
