"""What must hold between any two steps; tests ask after each."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.request import Request, RequestStatus
from octavo.core.running_batch import RunningBatch


def check_invariants(
    batch: RunningBatch, kv: KVCacheManager, requests: Sequence[Request], held_blocks: Sequence[int]
) -> None:
    """Asserts that blocks, slots and counters agree.

    Args:
        requests: those that have not ended.
        held_blocks: one entry per group's share in a block.
    """
    occupied = batch.occupied_slots()
    owners = kv.owners(occupied)
    owners.update(held_blocks)
    kv.pool.check(owners)
    assert len(occupied) + batch.num_free_slots == len(batch.requests)
    for slot in occupied:
        request = batch.request_at(slot)
        assert request.slot == slot
        assert batch.num_computed[slot] <= kv.num_blocks[slot] * kv.block_size, "computed beyond blocks"
        assert batch.num_known[slot] <= batch.num_tokens[slot] <= batch.max_total[slot]
        ended = request.status is RequestStatus.ENDED
        assert ended == (not batch.live[slot])
        assert not ended or batch.in_flight[slot], "an ended request holds a slot"
    for request in requests:
        assert request.status is not RequestStatus.ENDED
        assert (request.slot >= 0) == (request.status is RequestStatus.RUNNING)
