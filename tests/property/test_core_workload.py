"""Random workloads for a whole EngineCore that runs one step ahead of a slow and unreliable device, and mutants of what
only that can show: ends that are seen late, aborts and failures with steps in flight, and shutdown."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from octavo.core.request_table import RequestTable
from octavo.core.running_batch import Slots
from octavo.core.scheduler import Scheduler
from octavo.engine_core.engine_core import EngineCore
from octavo.errors import Reason
from octavo.ipc import EngineCoreOutputs
from octavo.step import ModelRunnerOutput, SchedulerOutput
from property.core_session import CoreSession, statistics
from property.workload import act, random_session

SEEDS = range(40)
Patch = pytest.MonkeyPatch


def run(seed: int, patch: Patch, check: bool = True) -> CoreSession:
    """Inputs with steps in flight; in the end everything runs out, or everybody leaves."""
    rng = random.Random(seed)
    patch.setattr(CoreSession, "rng", rng)
    session = random_session(rng, check, CoreSession)
    assert isinstance(session, CoreSession)
    session.take_clock(patch)
    for _ in range(40):
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            act(session, rng, beams=0.1, drafts=0.2)
        for _ in range(rng.choice([1, 1, 2, 5])):
            session.step()
            session.now += rng.choice([0.0, 0.001])
    if seed % 2:
        session.shut_down()
    else:
        session.drain()
    session.failures = 0.0
    session.probe()
    return session


def test_ends_aborts_failures_and_shutdown_are_exact_with_steps_in_flight(monkeypatch: Patch) -> None:
    totals: dict[str, int] = {}
    for seed in SEEDS:
        for name, value in statistics(run(seed, monkeypatch)).items():
            totals[name] = totals.get(name, 0) + value
    reached = ("copies", "preempted", "cached_tokens", "aborted", "muted_rows", "failed_steps", "found", "accepted")
    ends = ("TIME", "EOS", "LENGTH", "INTERNAL", "NON_FINITE_LOGITS", "CLIENT_DEADLINE", "QUEUE_TIMEOUT")
    assert all(totals.get(name, 0) > 10 for name in (*reached, *ends)), totals


def siblings_of_a_failed_step_go_on(patch: Patch) -> None:
    """Only the sequences in the step fail with it, not those that share what it wrote."""

    def mutant(self: Scheduler, step: SchedulerOutput, reason: Reason, now: float) -> dict[int, EngineCoreOutputs]:
        for slot in step.slots.tolist():
            if self.batch.live[slot]:
                self._table.fail(self.batch.request_at(slot), reason, forget=True)
        nothing = ModelRunnerOutput(np.full(step.num_rows, -1, np.int32), np.zeros(step.num_rows, np.uint8))
        return self.update(step, nothing, now)

    patch.setattr(Scheduler, "fail_step", mutant)


def slots_given_back_in_flight(patch: Patch) -> None:
    """An aborted request's slot and blocks are free while a launched step contains them."""
    stop = RequestTable._stop

    def mutant(self: RequestTable, slots: Slots) -> None:
        in_flight = self._batch.in_flight[slots]
        self._batch.in_flight[slots] = 0
        stop(self, slots)
        self._batch.in_flight[slots] = in_flight

    patch.setattr(RequestTable, "_stop", mutant)


def ends_seen_two_steps_late(patch: Patch) -> None:
    step = EngineCore.step

    def mutant(self: EngineCore) -> object:
        self._depth = 2
        return step(self)

    patch.setattr(EngineCore, "step", mutant)


def failed_launch_is_forgotten(patch: Patch) -> None:
    patch.setattr(EngineCore, "_fail_step", lambda self, step, error, messages: None)


def tokens_of_ended_requests_are_sent(patch: Patch) -> None:
    """A request that was aborted in flight still takes the token of that step."""
    stop = RequestTable._stop

    def mutant(self: RequestTable, slots: Slots) -> None:
        stop(self, slots)
        self._batch.live[slots[self._batch.in_flight[slots] > 0]] = True

    patch.setattr(RequestTable, "_stop", mutant)


def leaver_keeps_its_queue(patch: Patch) -> None:
    """Of a front-end that is gone, requests without a slot stay."""
    keys_of = RequestTable.keys_of

    def mutant(self: RequestTable, frontend: int) -> list[int]:
        requests = {key: self.get(frontend, key) for key in keys_of(self, frontend)}
        return [key for key, request in requests.items() if request is not None and request.slot >= 0]

    patch.setattr(RequestTable, "keys_of", mutant)


def is_caught(patch: Patch, check: bool) -> bool:
    for seed in SEEDS:
        try:
            run(seed, patch, check)
        except Exception:
            return True
    return False


@pytest.mark.parametrize(
    "mutant",
    [
        siblings_of_a_failed_step_go_on,
        slots_given_back_in_flight,
        ends_seen_two_steps_late,
        failed_launch_is_forgotten,
        tokens_of_ended_requests_are_sent,
        leaver_keeps_its_queue,
    ],
    ids=lambda mutant: mutant.__name__,
)
@pytest.mark.parametrize("check", [True, False], ids=["with its own checks", "from outside only"])
def test_mutant_is_caught(mutant: Callable[[Patch], None], check: bool, monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    assert is_caught(monkeypatch, check)
