"""Block tables of the running requests, by slot: growing, forking, freeing them, and the prefix cache's side of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from octavo.core.block_pool import NULL_BLOCK, BlockPool
from octavo.core.request import Request
from octavo.core.running_batch import Slots
from octavo.step import Int32s


class KVCacheManager:
    """Owns `block_table` and `num_blocks`, both indexed by slot.

    A shared block is never written. A fork copies the last, partial one; rows of a beam search share it until they
    write (`extend`).
    """

    def __init__(
        self, pool: BlockPool, *, block_size: int, max_num_requests: int, max_model_len: int, watermark: float
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.watermark_blocks = int(watermark * pool.num_blocks)
        """Blocks that admissions leave free."""
        self.num_reserved = 0
        """Blocks that admissions leave to beam searches whose rows have not forked yet."""
        max_blocks = self.blocks_for(max_model_len)
        self.block_table: Int32s = np.full((max_num_requests, max_blocks), NULL_BLOCK, np.int32)
        self.num_blocks: Int32s = np.zeros(max_num_requests, np.int32)
        self.num_indexed: Int32s = np.zeros(max_num_requests, np.int32)
        """Leading blocks of the slot that the prefix cache knows."""

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def blocks_of(self, slot: int) -> list[int]:
        blocks: list[int] = self.block_table[slot, : self.num_blocks[slot]].tolist()
        return blocks

    def table_of(self, slot: int) -> Int32s:
        """A copy."""
        table: Int32s = self.block_table[slot, : self.num_blocks[slot]].copy()
        return table

    def find_prefix(self, request: Request) -> list[int]:
        """Blocks that hold the request's leading tokens already. Its last token is always left to be computed."""
        if request.spec.bypass_prefix_cache or not self.pool.enable_prefix_caching:
            return []
        if request.spec.prompt_logprobs is not None:
            return []  # every position's logits are wanted
        count = (request.num_tokens - 1) // self.block_size
        return self.pool.lookup(request.hashes(request.token_ids, count, self.block_size))

    def can_admit(self, shared: list[int], num_tokens: int, keep_watermark: bool, num_more: int = 0) -> bool:
        """Whether a request of `num_tokens` that shares these blocks fits as a whole, with `num_more` blocks."""
        taken = self.blocks_for(num_tokens) + num_more
        if shared:
            taken -= len(shared) - self.pool.num_unowned(shared)
        kept = (self.watermark_blocks if keep_watermark else 0) + self.num_reserved
        return taken + kept <= self.pool.num_free

    def admit(self, slot: int, shared: list[int], num_tokens: int) -> Int32s:
        """Starts the slot's table with a share in these full blocks, and makes room for `num_tokens` in all.

        Returns:
            A copy of the table.
        """
        if shared:
            self.pool.acquire(shared)
        own = self.pool.allocate(self.blocks_for(num_tokens) - len(shared))
        assert own is not None
        if shared:
            self.num_indexed[slot] = len(shared)
        return self._start_table(slot, shared + own)

    def _start_table(self, slot: int, blocks: list[int]) -> Int32s:
        """Of an empty slot; a copy."""
        table = np.array(blocks, np.int32)
        self.block_table[slot, : len(blocks)] = table
        self.num_blocks[slot] = len(blocks)
        return table

    def allocate_slots(self, slot: int, num_tokens: int) -> list[int] | None:
        """Makes room for `num_tokens` in all; the blocks added, or None (nothing has changed): preempt someone."""
        have = int(self.num_blocks[slot])
        missing = self.blocks_for(num_tokens) - have
        if missing <= 0:
            return []
        blocks = self.pool.allocate(missing)
        if blocks is not None:
            self.block_table[slot, have : have + missing] = blocks
            self.num_blocks[slot] = have + missing
        return blocks

    def append_blocks(self, slots: Slots) -> list[tuple[int, int, list[int]]]:
        """A block more for each of these slots, of which there must be enough: (slot, column, [block])."""
        blocks = self.pool.allocate(len(slots))
        assert blocks is not None
        columns = self.num_blocks[slots]
        self.block_table[slots, columns] = blocks
        self.num_blocks[slots] = columns + 1
        return [(s, c, [b]) for s, c, b in zip(slots.tolist(), columns.tolist(), blocks, strict=True)]

    def fork(self, slot: int, blocks: list[int], num_tokens: int) -> list[tuple[int, int]] | None:
        """Starts the slot's table with the first `num_tokens` of a sequence that lies in `blocks`.

        Full blocks are shared; a partial last one is copied, into room for at least one token more.

        Returns:
            (source, destination) blocks to copy, or None: no block is free, and nothing has changed.
        """
        num_full = num_tokens // self.block_size
        own = self.pool.allocate(1)
        if own is None:
            return None
        self.pool.acquire(blocks[:num_full])
        self._start_table(slot, blocks[:num_full] + own)
        self.num_indexed[slot] = num_full
        return [(blocks[num_full], own[0])] if num_tokens % self.block_size else []

    def share(self, slot: int, blocks: list[int]) -> None:
        """Starts the slot's table with these owned blocks, the last of which may be partial."""
        self.pool.acquire(blocks)
        self._start_table(slot, blocks)

    def num_missing(self, slots: Sequence[int], num_computed: Iterable[int], num_tokens: Iterable[int]) -> int:
        """Free blocks that it takes to `extend` these slots, all of them."""
        missing, writers = 0, Counter[int]()
        for slot, computed, reached in zip(slots, num_computed, num_tokens, strict=True):
            missing += max(0, self.blocks_for(reached) - int(self.num_blocks[slot]))
            if computed % self.block_size:
                writers[int(self.block_table[slot, computed // self.block_size])] += 1
        return missing + sum(min(count, self.pool.ref_counts[block] - 1) for block, count in writers.items())

    def extend(self, slot: int, num_computed: int, num_tokens: int) -> tuple[int, list[int], list[tuple[int, int]]]:
        """Makes room to write tokens `num_computed` .. `num_tokens` - 1, in blocks that no other slot has.

        Returns:
            The first column of the table that changed, what stands there now, and (source, destination) blocks to copy.
        """
        first, copies = int(self.num_blocks[slot]), []
        column = num_computed // self.block_size
        if num_computed % self.block_size and self.pool.ref_counts[source := int(self.block_table[slot, column])] > 1:
            own = self.pool.allocate(1)
            assert own is not None
            self.pool.release([source])
            self.block_table[slot, column] = own[0]
            first, copies = column, [(source, own[0])]
        assert self.allocate_slots(slot, num_tokens) is not None
        return first, self.blocks_of(slot)[first:], copies

    def gather(self, slots: Int32s, parents: Int32s) -> None:
        """Slot i gets a share in the blocks of slot parents[i] (an index into `slots`) instead of its own."""
        changed = np.flatnonzero(parents != np.arange(len(slots)))
        sources = slots[parents[changed]].tolist()
        old = [self.blocks_of(slot) for slot in slots[changed].tolist()]
        new = [self.blocks_of(slot) for slot in sources]
        for blocks in new:
            self.pool.acquire(blocks)
        for slot, blocks in zip(slots[changed].tolist(), new, strict=True):
            self.block_table[slot] = NULL_BLOCK
            self.block_table[slot, : len(blocks)] = blocks
            self.num_blocks[slot] = len(blocks)
        for blocks in old:
            self.pool.release(blocks)

    def index(self, slots: Slots, requests: Iterable[Request], token_ids: Int32s, num_full: Int32s) -> None:
        """Enters blocks that have become full of known, computed tokens into the prefix cache.

        Args:
            token_ids: [max_num_requests, max_model_len], by slot.
            num_full: [N] full blocks of each of `slots`.
        """
        blocks: list[int] = []
        hashes: list[bytes] = []
        firsts, counts = self.num_indexed[slots].tolist(), num_full.tolist()
        for slot, request, first, count in zip(slots.tolist(), requests, firsts, counts, strict=True):
            if request.beams is not None:  # what follows the prompt is of one row among several
                count = min(count, len(request.group.prompt) // self.block_size)
            hashes += request.hashes(token_ids[slot], count, self.block_size)[first:]
            blocks += self.block_table[slot, first:count].tolist()
        self.pool.insert(blocks, hashes)
        self.num_indexed[slots] = num_full

    def forget(self, slots: Sequence[int]) -> None:
        """Blocks that only these slots own leave the prefix cache: their content is not to be trusted."""
        owners = self.owners(slots)
        self.pool.forget(block for block, count in owners.items() if self.pool.ref_counts[block] == count)
        for slot in slots:
            self.never_index(slot)

    def never_index(self, slot: int) -> None:
        """No block of the slot enters the prefix cache (any more)."""
        self.num_indexed[slot] = self.block_table.shape[1]

    def free(self, slots: Slots) -> None:
        """Gives the slots' blocks back, those of the first slot first."""
        blocks: list[int] = []
        for slot, count in zip(slots[::-1].tolist(), self.num_blocks[slots[::-1]].tolist(), strict=True):
            blocks += self.block_table[slot, :count].tolist()
        self.pool.release(blocks)
        self.block_table[slots] = NULL_BLOCK
        self.num_blocks[slots] = 0
        self.num_indexed[slots] = 0

    def owners(self, slots: Iterable[int]) -> Counter[int]:
        """How many of these slots' tables name each block."""
        owners: Counter[int] = Counter()
        for slot in slots:
            owners.update(self.blocks_of(slot))
        return owners
