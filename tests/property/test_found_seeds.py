"""Random workloads that once found a bug in the core; see the commit that fixed it."""

from __future__ import annotations

import pytest
from property.workload import run_workload

FOUND = {
    1: "a prompt whose last chunk is one token is announced",
    10: "a group is released with its last slot",
    38: "a block freed by a fork is a copy's destination in the same step",
    146: "prompt logprobs survive the sequence that computed them",
    291: "a sibling that computes the prompt itself gets its logprobs",
    538: "the same, after its share was dropped",
}


@pytest.mark.parametrize("seed", FOUND, ids=FOUND.get)
def test_workload_that_found_a_bug_passes(seed: int) -> None:
    run_workload(seed)
