"""Random workloads in which most sequences get drafts, right and wrong, and mutants of what is theirs alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from octavo.core import results
from octavo.core.drafts import Drafts
from octavo.core.plan import Plan
from octavo.core.running_batch import RunningBatch, Slots
from octavo.core.scheduler import Scheduler
from octavo.step import FurtherTokens, ModelRunnerOutput, SchedulerOutput
from property.workload import run_workload

SEEDS = range(30)
MUTANT_SEEDS = range(80)
"""Until one catches it."""
DRAFTS = 0.7
"""Of a third of these sequences the host chooses the tokens: they have none all the same."""
Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("beams", [0.0, 0.3], ids=["alone", "beside searches"])
def test_drafted_sequences_get_the_tokens_of_the_oracle(beams: float) -> None:
    totals: dict[str, int] = {}
    for seed in SEEDS:
        for name, value in run_workload(seed, beams=beams, drafts=DRAFTS).statistics().items():
            totals[name] = totals.get(name, 0) + value
    assert totals["drafted"] - totals["accepted"] > 200 and totals["accepted"] > 200, totals
    reached = ("copies", "preempted", "cached_tokens", "aborted", "muted_rows", "TIME", "NON_FINITE_LOGITS", "EOS")
    assert all(totals[name] > 10 for name in reached), totals


def rejected_tokens_computed(patch: Patch) -> None:
    """All of a draft counts as computed."""
    launch = Scheduler._launch

    def mutant(self: Scheduler, plan: Plan, now: float) -> SchedulerOutput:
        step = launch(self, plan, now)
        for slot, draft in plan.drafts:
            self.batch.num_computed[slot] += len(draft)
        return step

    patch.setattr(Scheduler, "_launch", mutant)


def runs_ahead(patch: Patch) -> None:
    """A sequence whose draft is in flight is scheduled again."""
    patch.setattr(RunningBatch, "wait_for_tokens", lambda self, slot: None)


def limit_ignored(patch: Patch) -> None:
    """Drafts are as long as the request likes."""
    add = Drafts.add

    def mutant(self: Drafts, plan: Plan) -> None:
        draft = self.draft
        self.draft = lambda slot, limit: draft(slot, 32)  # type: ignore[method-assign]
        add(self, plan)
        self.draft = draft  # type: ignore[method-assign]

    patch.setattr(Drafts, "add", mutant)


def no_blocks_for_drafts(patch: Patch) -> None:
    patch.setattr(Drafts, "_make_room", lambda self, plan, slot, count: count)


def surplus_after_the_end(patch: Patch) -> None:
    """Tokens behind the one at which time was over are sent, too."""
    take = results._take_further

    def mutant(batch: RunningBatch, step_slots: Slots, further: FurtherTokens, ended: Slots) -> Slots:
        return take(batch, step_slots, further, np.empty(0, np.intp))

    patch.setattr(results, "_take_further", mutant)


def last_further_token_lost(patch: Patch) -> None:
    update = Scheduler.update

    def mutant(self: Scheduler, step: SchedulerOutput, output: ModelRunnerOutput, now: float) -> object:
        if (more := output.further) is not None:
            output.further = FurtherTokens(more.rows[:-1], more.token_ids[:-1], more.finish[:-1])
        return update(self, step, output, now)

    patch.setattr(Scheduler, "update", mutant)


def is_caught(check: bool) -> bool:
    for seed in MUTANT_SEEDS:
        try:
            run_workload(seed, check=check, drafts=DRAFTS)
        except Exception:
            return True
    return False


@pytest.mark.parametrize(
    "mutant",
    [
        rejected_tokens_computed,
        runs_ahead,
        limit_ignored,
        no_blocks_for_drafts,
        surplus_after_the_end,
        last_further_token_lost,
    ],
    ids=lambda mutant: mutant.__name__,
)
@pytest.mark.parametrize("check", [True, False], ids=["with its own checks", "from outside only"])
def test_mutant_is_caught(mutant: Callable[[Patch], None], check: bool, monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    assert is_caught(check)
