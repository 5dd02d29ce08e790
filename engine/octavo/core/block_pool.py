"""The pool of KV blocks: who owns which, which hold cached prefixes, which can be taken.

A block is *owned* (reference count > 0), *cached* (no owner, but its content is indexed by hash and may be found again)
or *free*. Block 0 is the null block: padding points there and nobody ever owns it.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence

NULL_BLOCK = 0


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
        self._hash_of: dict[int, bytes] = {}
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
        if count > self.num_free:
            return None
        free = self._free
        blocks = [heapq.heappop(free) for _ in range(min(count, len(free)))]
        blocks += [self._evict() for _ in range(count - len(blocks))]
        for block in blocks:
            self.ref_counts[block] = 1
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more owner for each of these owned or cached blocks."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self._cached[block]
            self.ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less for each. Later blocks of a sequence are given up for eviction before earlier ones."""
        ref_counts = self.ref_counts
        for block in reversed(blocks):
            left = ref_counts[block] - 1
            assert left >= 0, f"block {block} released without an owner"
            ref_counts[block] = left
            if left:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                heapq.heappush(self._free, block)

    def lookup(self, block_hash: bytes) -> int | None:
        """The block, owned or cached, that holds the tokens with this chained hash."""
        return self._block_of.get(block_hash)

    def num_unowned(self, blocks: Iterable[int]) -> int:
        """How many of these, which are owned or cached, nobody owns."""
        return [self.ref_counts[block] for block in blocks].count(0)

    def insert(self, block: int, block_hash: bytes) -> None:
        """Indexes an owned block. A hash that is known already keeps its first block."""
        assert self.ref_counts[block] > 0, f"block {block} indexed without an owner"
        if self.enable_prefix_caching and block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def forget(self, blocks: Iterable[int]) -> None:
        """Drops these owned blocks from the index, since their content is not to be trusted."""
        for block in blocks:
            block_hash = self._hash_of.pop(block, None)
            if block_hash is not None:
                del self._block_of[block_hash]

    def reset_cache(self) -> int:
        """Empties the index; owners keep their blocks. Returns the number of blocks that became free."""
        freed = len(self._cached)
        for block in self._cached:
            heapq.heappush(self._free, block)
        self._cached.clear()
        self._hash_of.clear()
        self._block_of.clear()
        return freed

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block

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
        assert {h: b for b, h in self._hash_of.items()} == self._block_of
        assert all(block in self._hash_of for block in self._cached), "an unhashed block is cached"
        assert not free & set(self._hash_of), "a free block is indexed"
