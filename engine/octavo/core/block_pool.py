"""The pool of KV blocks: who owns which, which hold cached prefixes, which can be taken.

A block is *owned* (reference count > 0), *cached* (no owner, but its content is indexed by hash and may be found again)
or *free*. Block 0 is the null block: padding points there and nobody ever owns it.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence

NULL_BLOCK = 0
_NO_HASH = b""


class BlockPool:
    """Reference counts, the free list and the hash index of blocks 1 .. num_blocks.

    Free blocks are handed out lowest id first, which keeps the used part of the cache dense; when none is left, cached
    blocks are evicted, least recently released first.
    """

    def __init__(self, num_blocks: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self.ref_counts = [0] * (num_blocks + 1)
        self._free = list(range(1, num_blocks + 1))  # a heap
        self._cached: OrderedDict[int, None] = OrderedDict()  # unowned and hashed, next to be evicted first
        self._hash_of = [_NO_HASH] * (num_blocks + 1)
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one owner each, or None and nothing has changed."""
        free, cached = self._free, self._cached
        if count > len(free) + len(cached):
            return None
        blocks = []
        for _ in range(count):
            if free:
                block = heapq.heappop(free)
            else:
                block, _ = cached.popitem(last=False)  # next to be evicted
                self._unhash(block)
            self.ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more owner for each of these owned or cached blocks."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self._cached[block]
            self.ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less for each. Later blocks of a sequence are given up for eviction before earlier ones."""
        ref_counts, hash_of = self.ref_counts, self._hash_of
        for block in reversed(blocks):
            left = ref_counts[block] - 1
            assert left >= 0, f"block {block} released without an owner"
            ref_counts[block] = left
            if left:
                continue
            if hash_of[block]:
                self._cached[block] = None
            else:
                heapq.heappush(self._free, block)

    def lookup(self, block_hashes: Iterable[bytes]) -> list[int]:
        """The blocks, owned or cached, with these hashes, up to the first that is not known."""
        found = []
        for block_hash in block_hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def num_unowned(self, blocks: Iterable[int]) -> int:
        """How many of these, which are owned or cached, nobody owns."""
        return [self.ref_counts[block] for block in blocks].count(0)

    def insert(self, blocks: Iterable[int], block_hashes: Iterable[bytes]) -> None:
        """Indexes owned blocks. A hash that is known already keeps its first block."""
        if not self.enable_prefix_caching:
            return
        hash_of, block_of = self._hash_of, self._block_of
        for block, block_hash in zip(blocks, block_hashes, strict=True):
            assert self.ref_counts[block] > 0, f"block {block} indexed without an owner"
            if block_hash not in block_of and not hash_of[block]:
                block_of[block_hash] = block
                hash_of[block] = block_hash

    def forget(self, blocks: Iterable[int]) -> None:
        """Drops these owned blocks from the index, since their content is not to be trusted."""
        for block in blocks:
            if self._hash_of[block]:
                self._unhash(block)

    def _unhash(self, block: int) -> None:
        del self._block_of[self._hash_of[block]]
        self._hash_of[block] = _NO_HASH

    def reset_cache(self) -> int:
        """Empties the index; owners keep their blocks. Returns the number of blocks that became free."""
        freed = len(self._cached)
        for block in self._cached:
            heapq.heappush(self._free, block)
        self._cached.clear()
        self._hash_of = [_NO_HASH] * len(self._hash_of)
        self._block_of.clear()
        return freed

    def check(self, owners: Mapping[int, int]) -> None:
        """Asserts every invariant, given how many owners each block should have."""
        expected = Counter({block: count for block, count in owners.items() if count})
        actual = Counter({block: count for block, count in enumerate(self.ref_counts) if count})
        assert actual == expected, f"reference counts {actual - expected} too many, {expected - actual} too few"
        assert NULL_BLOCK not in actual, "the null block has an owner"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free list"
        owned = set(actual)
        assert not free & owned and not free & set(self._cached) and not owned & set(self._cached)
        assert free | owned | set(self._cached) == set(range(1, self.num_blocks + 1)), "blocks are missing"
        assert {h: b for b, h in enumerate(self._hash_of) if h} == self._block_of
        assert all(self._hash_of[block] for block in self._cached), "an unhashed block is cached"
        assert not any(self._hash_of[block] for block in free), "a free block is indexed"
