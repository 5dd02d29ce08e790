"""Block tables: growing all or nothing, the watermark, forks, and giving back."""

from __future__ import annotations

import numpy as np
from core.steps import request
from octavo.core.block_pool import BlockPool
from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.request import Group, Request


def manager(num_blocks: int = 10, watermark: float = 0.0, prefix_caching: bool = True) -> KVCacheManager:
    pool = BlockPool(num_blocks, prefix_caching)
    return KVCacheManager(pool, block_size=4, max_num_requests=4, max_model_len=40, watermark=watermark)


def waiting(prompt: list[int], **options: object) -> Request:
    return Request(0, Group(1, request(1, prompt, **options)), 0, 1)


def test_growing_takes_just_the_blocks_that_the_tokens_need() -> None:
    kv = manager()
    assert len(kv.allocate_slots(0, 1) or []) == 1
    assert kv.allocate_slots(0, 4) == []
    assert len(kv.allocate_slots(0, 5) or []) == 1
    assert len(kv.allocate_slots(0, 16) or []) == 2
    assert kv.block_table[0, :5].tolist() == [*kv.blocks_of(0), 0]
    kv.pool.check(kv.owners([0]))


def test_growing_is_all_or_nothing() -> None:
    kv = manager(num_blocks=3)
    kv.allocate_slots(0, 8)
    before = kv.block_table.copy()
    assert kv.allocate_slots(1, 8) is None
    assert (kv.block_table == before).all()
    assert kv.blocks_of(1) == []
    assert kv.pool.num_free == 1


def test_admission_needs_room_for_the_whole_request_above_the_watermark() -> None:
    kv = manager(num_blocks=10, watermark=0.25)
    assert kv.watermark_blocks == 2
    assert kv.can_admit([], 32, keep_watermark=True)
    assert not kv.can_admit([], 33, keep_watermark=True)
    assert kv.can_admit([], 40, keep_watermark=False)
    assert not kv.can_admit([], 41, keep_watermark=False)


def test_owned_shared_blocks_cost_nothing_but_cached_ones_count() -> None:
    kv = manager(num_blocks=4)
    blocks = kv.allocate_slots(0, 8)
    assert blocks is not None
    for index, block in enumerate(blocks):
        kv.pool.insert([block], [bytes([index])])
    assert kv.can_admit(blocks, 16, keep_watermark=False)
    kv.free(np.array([0]))
    assert kv.can_admit(blocks, 16, keep_watermark=False)  # four blocks, two of them cached
    assert not kv.can_admit(blocks, 17, keep_watermark=False)
    kv.allocate_slots(1, 4)
    assert not kv.can_admit(blocks, 16, keep_watermark=False)


def test_fork_shares_full_blocks_and_copies_the_partial_one() -> None:
    kv = manager()
    source = kv.allocate_slots(0, 10)
    assert source is not None
    copies = kv.fork(1, source, 10)
    table = kv.blocks_of(1)
    assert table[:2] == source[:2]
    assert copies == [(source[2], table[2])]
    assert table[2] != source[2]
    assert [kv.pool.ref_counts[block] for block in source] == [2, 2, 1]
    kv.pool.check(kv.owners([0, 1]))


def test_fork_at_a_block_boundary_copies_nothing_and_has_room_for_a_token() -> None:
    kv = manager()
    source = kv.allocate_slots(0, 9)
    assert source is not None
    assert kv.fork(1, source, 8) == []
    table = kv.blocks_of(1)
    assert table[:2] == source[:2]
    assert len(table) == 3
    assert table[2] != source[2]


def test_fork_without_a_free_block_changes_nothing() -> None:
    kv = manager(num_blocks=3)
    source = kv.allocate_slots(0, 12)
    assert source is not None
    assert kv.fork(1, source, 10) is None
    assert kv.blocks_of(1) == []
    kv.pool.check(kv.owners([0]))


def test_freeing_one_fork_leaves_the_other_its_blocks() -> None:
    kv = manager()
    source = kv.allocate_slots(0, 10)
    assert source is not None
    kv.fork(1, source, 10)
    kv.free(np.array([0]))
    kv.pool.check(kv.owners([1]))
    kv.free(np.array([1]))
    kv.pool.check({})
    assert kv.pool.num_free == 10
    assert not kv.block_table.any()


def test_prefix_is_found_by_full_blocks_and_never_whole() -> None:
    kv = manager()
    first = waiting(list(range(12)))
    blocks = kv.allocate_slots(0, 12)
    kv.index(np.array([0]), [first], first.token_ids[None], np.array([12 // 4], np.int32))
    assert blocks is not None
    assert kv.find_prefix(waiting(list(range(13)))) == blocks
    assert kv.find_prefix(waiting(list(range(12)))) == blocks[:2]
    assert kv.find_prefix(waiting([*range(8), 99, 99, 99, 99, 99])) == blocks[:2]


def test_only_computed_full_blocks_are_indexed() -> None:
    kv = manager()
    first = waiting(list(range(12)))
    blocks = kv.allocate_slots(0, 12)
    assert blocks is not None
    kv.index(np.array([0]), [first], first.token_ids[None], np.array([7 // 4], np.int32))
    assert kv.find_prefix(waiting(list(range(13)))) == blocks[:1]


def test_hashes_are_chained_and_begin_with_the_salt() -> None:
    plain, salted = waiting([1, 2, 3, 4] * 2), waiting([1, 2, 3, 4] * 2, cache_salt="x")
    first, second = plain.hashes(plain.token_ids, 2, 4)
    assert first != second
    assert len(first) == 32
    assert not {first, second} & set(salted.hashes(salted.token_ids, 2, 4))
    again = waiting([1, 2, 3, 4] * 2)
    assert again.hashes(again.token_ids, 2, 4) == [first, second]
