"""What must hold between any two steps; tests ask after each."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.core.guidance import branches
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
        assert slot in request.slots
        assert batch.num_computed[slot] <= kv.num_blocks[slot] * kv.block_size, "computed beyond blocks"
        assert batch.num_known[slot] <= batch.num_tokens[slot] <= batch.max_total[slot]
        assert batch.is_beam[slot] == (request.beams is not None)
        ended = request.status is RequestStatus.ENDED
        assert ended == (not batch.live[slot])
        assert not ended or batch.in_flight[slot], "an ended request holds a slot"
    for request in requests:
        assert request.status is not RequestStatus.ENDED
        assert (request.slot >= 0) == (request.status is RequestStatus.RUNNING)
        if request.beams is not None and request.slot >= 0:
            _check_beams(batch, kv, request)


def _check_beams(batch: RunningBatch, kv: KVCacheManager, request: Request) -> None:
    """Rows of a search go in step, and share the prompt's full blocks; those of a guided sequence share nothing."""
    slots, beams = request.slots, request.beams
    assert beams is not None and len(slots) == request.num_rows == len(set(slots))
    assert all(batch.requests[slot] is request for slot in slots)
    begun = [len(row) for row in branches(request.spec)] if request.group.is_guided else [0] * len(slots)
    for counter in (batch.num_tokens, batch.num_known):
        assert len(set((counter[slots] - begun).tolist())) == 1, "rows do not go in step"
    assert (batch.num_known[slots] == batch.num_tokens[slots]).all(), "a beam search ran ahead"
    if beams.forked and request.is_search:
        shared = (len(request.group.prompt) - 1) // kv.block_size
        assert (kv.block_table[slots, :shared] == kv.block_table[slots[0], :shared]).all(), "the prompt is not shared"
