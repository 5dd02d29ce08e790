"""The pool's promises: reference counts, the order of eviction, the hash index, the null block."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.core.block_pool import NULL_BLOCK, BlockPool


def hashed(pool: BlockPool, name: bytes) -> int:
    """A block that is cached under this hash and has no owner."""
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.insert([blocks[0]], [name])
    pool.release(blocks)
    return blocks[0]


def test_null_block_is_never_handed_out() -> None:
    pool = BlockPool(4)
    assert sorted(pool.allocate(4) or []) == [1, 2, 3, 4]
    assert NULL_BLOCK == 0


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    before = pool.num_free
    assert pool.allocate(3) is None
    assert pool.num_free == before == 2
    assert len(pool.allocate(2) or []) == 2
    assert pool.allocate(1) is None


def test_allocating_nothing_succeeds_in_a_full_pool() -> None:
    pool = BlockPool(1)
    pool.allocate(1)
    assert pool.allocate(0) == []


def test_block_with_two_owners_is_free_only_after_both_released_it() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.acquire(blocks)
    pool.release(blocks)
    assert pool.num_free == 1
    pool.release(blocks)
    assert pool.num_free == 2
    pool.check({})


def test_releasing_a_block_without_owner_is_an_assertion() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.release(blocks)


def test_cached_block_is_found_by_its_hash_until_evicted() -> None:
    pool = BlockPool(2)
    block = hashed(pool, b"a")
    assert pool.lookup([b"a"]) == [block]
    assert pool.num_cached == 1
    assert pool.num_free == 2
    pool.allocate(2)
    assert pool.lookup([b"a"]) == []
    assert pool.num_cached == 0


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(3)
    block = hashed(pool, b"a")
    assert block not in (pool.allocate(2) or [block])
    assert pool.lookup([b"a"]) == [block]


def test_cached_blocks_are_evicted_least_recently_released_first() -> None:
    pool = BlockPool(3)
    held = pool.allocate(3)
    assert held is not None
    for block, name in zip(held, (b"a", b"b", b"c"), strict=True):
        pool.insert([block], [name])
    for block in (held[1], held[0], held[2]):
        pool.release([block])
    pool.acquire([held[1]])  # used again: now the most recent
    pool.release([held[1]])
    assert pool.allocate(1) == [held[0]]
    assert pool.allocate(1) == [held[2]]
    assert pool.lookup([b"b"]) == [held[1]]


def test_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    """A beginning is shared by more requests than an end, and is of use without it."""
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, name in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.insert([block], [name])
    pool.release(blocks)
    assert pool.allocate(2) == [blocks[2], blocks[1]]
    assert pool.lookup([b"a"]) == [blocks[0]]


def test_acquired_cached_block_cannot_be_evicted() -> None:
    pool = BlockPool(2)
    block = hashed(pool, b"a")
    pool.acquire([block])
    assert pool.num_cached == 0
    assert pool.num_free == 1
    assert pool.allocate(2) is None
    pool.check({block: 1})


def test_first_block_of_a_hash_stays_and_the_second_becomes_free_on_release() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2) or []
    pool.insert([first], [b"a"])
    pool.insert([second], [b"a"])
    assert pool.lookup([b"a"]) == [first]
    pool.release([first, second])
    assert pool.num_cached == 1
    pool.check({})


def test_without_prefix_caching_nothing_is_indexed() -> None:
    pool = BlockPool(2, enable_prefix_caching=False)
    hashed(pool, b"a")
    assert pool.lookup([b"a"]) == []
    assert pool.num_cached == 0


def test_reset_frees_cached_blocks_and_leaves_owned_ones_to_their_owners() -> None:
    pool = BlockPool(3)
    owned = pool.allocate(1)
    assert owned is not None
    pool.insert([owned[0]], [b"owned"])
    hashed(pool, b"a")
    assert pool.reset_cache() == 1
    assert pool.lookup([b"a"]) == []
    assert pool.lookup([b"owned"]) == []
    pool.check({owned[0]: 1})
    pool.release(owned)
    assert pool.num_cached == 0
    pool.check({})


def test_forgotten_block_is_not_found_and_not_cached() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.insert([blocks[0]], [b"a"])
    pool.forget(blocks)
    assert pool.lookup([b"a"]) == []
    pool.release(blocks)
    assert pool.num_cached == 0
    pool.check({})


@pytest.mark.parametrize("owners", [{}, {1: 2}, {1: 1, 2: 1}, {0: 1, 1: 1}])
def test_check_finds_wrong_owner_counts(owners: dict[int, int]) -> None:
    pool = BlockPool(3)
    assert pool.allocate(1) == [1]
    with pytest.raises(AssertionError):
        pool.check(owners)


def test_pool_needs_a_block() -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        BlockPool(0)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["allocate", "acquire", "release", "insert", "reset", "forget"]), st.integers(0, 1000)),
    max_size=120,
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(num_blocks=st.integers(1, 9), operations=OPERATIONS)
def test_pool_agrees_with_a_naive_dictionary_after_every_operation(
    num_blocks: int, operations: list[tuple[str, int]]
) -> None:
    pool = BlockPool(num_blocks)
    owners: Counter[int] = Counter()  # the naive allocator
    index: dict[bytes, int] = {}
    for name, number in operations:
        owned = sorted(owners)
        if name == "allocate":
            count = number % (num_blocks + 2)
            blocks = pool.allocate(count)
            assert (blocks is None) == (count > num_blocks - len(owned))
            assert blocks is None or (not set(blocks) & set(owned) and len(set(blocks)) == count)
            owners.update(blocks or [])
            index = {key: block for key, block in index.items() if block not in (blocks or [])}
        elif name == "acquire":
            candidates = sorted(set(owned) | set(index.values()))
            if candidates:
                pool.acquire([candidates[number % len(candidates)]])
                owners[candidates[number % len(candidates)]] += 1
        elif name == "reset":
            assert pool.reset_cache() == len(set(index.values()) - set(owned))
            index = {}
        elif owned:
            block = owned[number % len(owned)]
            if name == "release":
                pool.release([block])
                owners = +(owners - Counter([block]))
            elif name == "forget":
                pool.forget([block])
                index = {key: other for key, other in index.items() if other != block}
            else:
                key = bytes([number % 7])
                pool.insert([block], [key])
                if key not in index and block not in index.values():
                    index[key] = block
        pool.check(owners)
        for key in (bytes([i]) for i in range(7)):
            assert pool.lookup([key]) == ([index[key]] if key in index else [])
