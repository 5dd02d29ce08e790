"""What prepares a step on the device: changes from the host, the inputs of the forward pass, copies of blocks.

Log (variants tried, what they gave). No GPU was at hand: registers are the compiler's for sm_90 (Triton 3.7.1, no
variant spills), times are predictions, not measured.

- apply_diffs: one thread per 4 words, 512 words per program; 29 registers. No order among the words of a step, so the
  host sends none twice. Bound by scattered 4-byte stores: ~2 us for the 10k words of an admission.
- prepare: one program per row and one for the tokens after the last row; 32 registers. Each ends after two or three
  dependent loads, ~3 us whatever the batch. Not chosen: one program per tile of tokens with a search for its row, more
  parallel for long chunks, but another kernel must then advance num_computed. 1024 tokens are 4 turns of the loop.
- copy_blocks: chains (a -> b, b -> c) and cycles need all reads before all writes. A scratch buffer costs twice the
  traffic and 6 MB a block for gpt2-large; an order made by the host cannot serve cycles. Chosen: a program owns the
  same slice of *all* the blocks in one layer's keys or values, so what it must read before it writes fits its
  registers; the slice shrinks as the number of pairs grows. 32 KB in 8 warps: 40-54 registers, 8 16-byte loads in
  flight per thread; 64 KB: 80-106 registers, half the occupancy for the same bytes in flight. One pair of gpt2-large
  (32 slots) is 720 programs and 11.8 MB of traffic, ~5 us.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.dependent_launch import follow, launch_options
from octavo_kernels.state import SlotState
from octavo_kernels.variant import Variant

MAX_PAIRS: Final = 4096
"""Block copies of one call."""

_DIFF_TILE: Final = 512  # words per program
_TOKEN_TILE: Final = 256  # tokens per turn of prepare's loop
_COPY_BYTES: Final = 32768  # that a program of copy_blocks holds in registers
_COPY_WARPS: Final = 8


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What `prepare` writes: T tokens in R rows, row after row. All contiguous, on one device."""

    input_ids: Tensor
    """int32 [T] token ids."""
    positions: Tensor
    """int32 [T] position of each token in its sequence."""
    slot_mapping: Tensor
    """int64 [T] cache slot where a token's key and value go, block * block_size + offset; -1: nowhere."""
    seq_lens: Tensor
    """int32 [R] context length with this step's tokens; 0: a muted row."""
    block_tables: Tensor
    """int32 [R, B] block ids of each row, 0 past the end and in muted rows."""

    @staticmethod
    def allocate(max_tokens: int, max_rows: int, num_table_blocks: int, device: torch.device) -> StepInputs:
        """Zeroed, for the largest step; `narrow` gives a step's part."""
        return StepInputs(
            input_ids=torch.zeros(max_tokens, dtype=torch.int32, device=device),
            positions=torch.zeros(max_tokens, dtype=torch.int32, device=device),
            slot_mapping=torch.zeros(max_tokens, dtype=torch.int64, device=device),
            seq_lens=torch.zeros(max_rows, dtype=torch.int32, device=device),
            block_tables=torch.zeros(max_rows, num_table_blocks, dtype=torch.int32, device=device),
        )

    def narrow(self, num_tokens: int, num_rows: int) -> StepInputs:
        """Views of the first tokens and rows. Raises ValueError if there are fewer."""
        if not 0 <= num_tokens <= self.input_ids.shape[0]:
            raise ValueError(f"num_tokens: {num_tokens}, room for {self.input_ids.shape[0]}")
        if not 0 <= num_rows <= self.seq_lens.shape[0]:
            raise ValueError(f"num_rows: {num_rows}, room for {self.seq_lens.shape[0]}")
        return StepInputs(
            input_ids=self.input_ids[:num_tokens],
            positions=self.positions[:num_tokens],
            slot_mapping=self.slot_mapping[:num_tokens],
            seq_lens=self.seq_lens[:num_rows],
            block_tables=self.block_tables[:num_rows],
        )


@triton.jit(do_not_specialize=["capacity", "arena_size"])
def _apply_diffs_kernel(arena_ptr, offsets_ptr, values_ptr, count_ptr, capacity, arena_size, TILE: tl.constexpr):
    count = tl.minimum(tl.load(count_ptr), capacity)
    if tl.program_id(0) * TILE < count:
        index = tl.program_id(0) * TILE + tl.arange(0, TILE)
        given = index < count
        offset = tl.load(offsets_ptr + index, mask=given, other=-1)
        value = tl.load(values_ptr + index, mask=given, other=0)
        tl.store(arena_ptr + offset, value, mask=(offset >= 0) & (offset < arena_size))


def apply_diffs(state: SlotState, offsets: Tensor, values: Tensor, count: Tensor) -> None:
    """arena[offsets[i]] = values[i] for i < count[0].

    offsets, values: int32 [C] contiguous; no word twice among the first count; offsets outside the arena are skipped.
    count: int32 [1]; more than C counts as C. Raises ValueError naming an argument of another type or shape.
    """
    device = state.arena.device
    check_tensor("offsets", offsets, torch.int32, (offsets.numel(),), device)
    check_tensor("values", values, torch.int32, (offsets.numel(),), device)
    check_tensor("count", count, torch.int32, (1,), device)
    capacity = offsets.numel()
    if capacity:
        _apply_diffs_kernel[(triton.cdiv(capacity, _DIFF_TILE),)](
            state.arena, offsets, values, count, capacity, state.arena.numel(), TILE=_DIFF_TILE, num_warps=4
        )


@triton.jit
def _write_tokens(
    begin, count, slot, live, computed, length,
    hist_ptr, table_ptr, input_ids_ptr, positions_ptr, slot_mapping_ptr, num_blocks, vocab_size,
    hist_width, table_width,
    BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A row's `count` tokens from token `begin` on: ids, positions and cache slots."""
    tokens = tl.arange(0, TOKENS)
    for start in range(0, count, TOKENS):
        index = start + tokens
        inside = index < count
        position = computed + index
        reads = inside & live
        token = tl.load(hist_ptr + slot * hist_width + position, mask=reads & (position < length), other=0)
        token = tl.where((token >= 0) & (token < vocab_size), token, 0)
        block = tl.load(table_ptr + slot * table_width + position // BLOCK_SIZE, mask=reads, other=0)
        cache_slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        cache_slot = tl.where((block > 0) & (block < num_blocks), cache_slot, -1)
        tl.store(input_ids_ptr + begin + index, token, mask=inside)
        tl.store(positions_ptr + begin + index, tl.where(live, position, 0), mask=inside)
        tl.store(slot_mapping_ptr + begin + index, cache_slot, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "padding_slot", "num_blocks", "vocab_size"])
def _prepare_kernel(
    row_slots_ptr, query_start_loc_ptr,
    num_computed_ptr, length_ptr, finished_ptr, hist_ptr, table_ptr,
    input_ids_ptr, positions_ptr, slot_mapping_ptr, seq_lens_ptr, block_tables_ptr,
    num_rows, num_tokens, padding_slot, num_blocks, vocab_size,
    hist_width,  # N + 1
    table_width,  # B
    BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, TABLE: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr,
):  # fmt: skip
    """One program per row, and one more for the tokens behind the last row."""
    if DEPENDENT_LAUNCH:
        follow()
    row = tl.program_id(0)
    is_row = row < num_rows
    begin = tl.maximum(tl.load(query_start_loc_ptr + row), 0)
    end = tl.load(query_start_loc_ptr + row + 1, mask=is_row, other=num_tokens)
    end = tl.minimum(end, num_tokens)
    count = tl.maximum(end - begin, 0)

    slot = tl.load(row_slots_ptr + row, mask=is_row, other=-1)
    live = (slot >= 0) & (slot < padding_slot) & (count > 0)
    slot64 = slot.to(tl.int64)
    live &= tl.load(finished_ptr + slot64, mask=live, other=1) == 0
    computed = tl.load(num_computed_ptr + slot64, mask=live, other=0)
    length = tl.minimum(tl.load(length_ptr + slot64, mask=live, other=0), hist_width)
    # A row that would leave its table or the model's positions is muted: nothing of it is in bounds.
    room = tl.minimum(hist_width - 1, table_width * BLOCK_SIZE)
    live &= (computed >= 0) & (computed <= room - count)

    _write_tokens(
        begin, count, slot64, live, computed, length, hist_ptr, table_ptr, input_ids_ptr, positions_ptr,
        slot_mapping_ptr, num_blocks, vocab_size, hist_width, table_width, BLOCK_SIZE, TOKENS,
    )  # fmt: skip
    if is_row:
        tl.store(seq_lens_ptr + row, tl.where(live, computed + count, 0))
        columns = tl.arange(0, TABLE)
        for start in range(0, table_width, TABLE):
            column = start + columns
            inside = column < table_width
            block = tl.load(table_ptr + slot64 * table_width + column, mask=inside & live, other=0)
            block = tl.where((block >= 0) & (block < num_blocks), block, 0)
            tl.store(block_tables_ptr + row.to(tl.int64) * table_width + column, block, mask=inside)
        tl.store(num_computed_ptr + slot64, computed + count, mask=live)


def prepare(
    state: SlotState,
    row_slots: Tensor,
    query_start_loc: Tensor,
    out: StepInputs,
    *,
    block_size: int,
    num_blocks: int,
    dependent_launch: bool = False,
) -> None:
    """Lays out a step's tokens from the slots' state and counts them as computed.

    row_slots: int32 [R] contiguous, no slot twice but the padding slot. query_start_loc: int32 [R + 1] contiguous:
    row r has the tokens query_start_loc[r] .. query_start_loc[r + 1] - 1, which are those after the slot's
    num_computed. out: T tokens, R rows, all of it is written; tokens from query_start_loc[R] on are padding.
    num_blocks: N of the cache.

    A row is muted if its slot is the padding slot, out of range or finished, if it has no tokens, or if they would not
    fit the block table or the positions: its ids and positions are 0, its slots -1, its seq_len and table 0, and
    num_computed stays. Block ids outside [1, N) give slot -1; ids outside the vocabulary, or past the slot's length,
    give 0. dependent_launch: see `octavo_kernels.dependent_launch`. Raises ValueError naming an argument of another
    type, shape or stride.
    """
    num_rows, num_tokens = row_slots.numel(), out.input_ids.numel()
    table_width = state.block_table.shape[1]
    _check_prepare(state, row_slots, query_start_loc, out, block_size, num_blocks)
    _prepare_kernel[(num_rows + 1,)](
        row_slots, query_start_loc,
        state.num_computed, state.length, state.finished, state.hist, state.block_table,
        out.input_ids, out.positions, out.slot_mapping, out.seq_lens, out.block_tables,
        num_rows, num_tokens, state.padding_slot, num_blocks, state.vocab_size, state.hist.shape[1], table_width,
        BLOCK_SIZE=block_size,
        TOKENS=_TOKEN_TILE,
        TABLE=min(1024, triton.next_power_of_2(table_width)),
        num_warps=4,
        **launch_options(dependent_launch),
    )  # fmt: skip


def _check_prepare(
    state: SlotState, row_slots: Tensor, query_start_loc: Tensor, out: StepInputs, block_size: int, num_blocks: int
) -> None:
    device = state.arena.device
    num_rows, num_tokens = row_slots.numel(), out.input_ids.numel()
    table_width = state.block_table.shape[1]
    check_tensor("row_slots", row_slots, torch.int32, (num_rows,), device)
    check_tensor("query_start_loc", query_start_loc, torch.int32, (num_rows + 1,), device)
    check_tensor("out.input_ids", out.input_ids, torch.int32, (num_tokens,), device)
    check_tensor("out.positions", out.positions, torch.int32, (num_tokens,), device)
    check_tensor("out.slot_mapping", out.slot_mapping, torch.int64, (num_tokens,), device)
    check_tensor("out.seq_lens", out.seq_lens, torch.int32, (num_rows,), device)
    check_tensor("out.block_tables", out.block_tables, torch.int32, (num_rows, table_width), device)
    if block_size < 1:
        raise ValueError(f"block_size: {block_size} is not positive")
    if table_width != -(-(state.hist.shape[1] - 1) // block_size):
        raise ValueError(f"block_size: {block_size} does not fit block tables of {table_width} blocks")
    if num_blocks < 1:
        raise ValueError(f"num_blocks: {num_blocks} is not positive")


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _copy_blocks_kernel(
    cache_ptr,
    sources_ptr,
    destinations_ptr,
    num_pairs,
    num_blocks,
    block_words,
    PAIRS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """A program has words program_id(0) * WORDS .. of all blocks in half layer program_id(1)."""
    pair = tl.arange(0, PAIRS)
    given = pair < num_pairs
    source = tl.load(sources_ptr + pair, mask=given, other=-1)
    destination = tl.load(destinations_ptr + pair, mask=given, other=-1)
    given &= (source >= 0) & (source < num_blocks) & (destination >= 0) & (destination < num_blocks)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    mask = given[:, None] & (word < block_words)[None, :]
    half_layer_ptr = cache_ptr + tl.program_id(1).to(tl.int64) * num_blocks * block_words
    words = tl.load(half_layer_ptr + source.to(tl.int64)[:, None] * block_words + word[None, :], mask=mask)
    tl.debug_barrier()  # other warps may still read what this one overwrites
    tl.store(half_layer_ptr + destination.to(tl.int64)[:, None] * block_words + word[None, :], words, mask=mask)


def copy_blocks(cache: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Copies whole blocks in all layers, keys and values, as if all were read before any is written.

    cache: [layers, 2, N, H, S, D] contiguous, any type, in place. sources, destinations: int32 [C] contiguous, C at
    most MAX_PAIRS, no destination twice; chains and cycles are fine. Pairs with an id outside [0, N), such as padding
    of -1, are skipped. Raises ValueError naming an argument of another type, shape or stride.
    """
    if cache.dim() != 6 or cache.shape[1] != 2 or not cache.is_contiguous():
        raise ValueError(
            f"cache: shape {tuple(cache.shape)} strides {cache.stride()}, not contiguous [L, 2, N, H, S, D]"
        )
    num_pairs = sources.numel()
    check_tensor("sources", sources, torch.int32, (num_pairs,), cache.device)
    check_tensor("destinations", destinations, torch.int32, (num_pairs,), cache.device)
    if num_pairs > MAX_PAIRS:
        raise ValueError(f"sources: {num_pairs} pairs, at most {MAX_PAIRS}")
    if num_pairs == 0 or cache.numel() == 0:
        return
    half_layers, num_blocks = cache.shape[0] * 2, cache.shape[2]
    block_bytes = cache[0, 0, 0].numel() * cache.element_size()
    word = next(kind for kind in (torch.int32, torch.int16, torch.uint8) if block_bytes % kind.itemsize == 0)
    words = cache.view(half_layers, num_blocks, -1).view(word)
    block_words = words.shape[2]
    pairs, slice_words = _copy_tile(num_pairs, word.itemsize)
    slice_words = min(slice_words, triton.next_power_of_2(block_words))
    _copy_blocks_kernel[(triton.cdiv(block_words, slice_words), half_layers)](
        words,
        sources,
        destinations,
        num_pairs,
        num_blocks,
        block_words,
        PAIRS=pairs,
        WORDS=slice_words,
        num_warps=_COPY_WARPS,
    )


def _copy_tile(num_pairs: int, word_bytes: int) -> tuple[int, int]:
    """(PAIRS, WORDS): the tile of a program; few values of PAIRS, as each is compiled."""
    pairs = 1 if num_pairs == 1 else 4
    while pairs < num_pairs:
        pairs *= 4
    return pairs, max(1, _COPY_BYTES // word_bytes // max(pairs, 4))


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises ValueError naming the argument unless it is contiguous, of this type and shape, on this device."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: {tensor.dtype}, not {dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, not {shape}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()}, not contiguous")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, not {device}")


def compile_variants() -> list[Variant]:
    """Every form that the engine launches for gpt2-large and for a demo model (block sizes 16 and 32)."""
    diffs = Variant(
        name="inputs/apply_diffs",
        kernel=_apply_diffs_kernel,
        signature={
            **dict.fromkeys(("arena_ptr", "offsets_ptr", "values_ptr", "count_ptr"), "*i32"),
            **dict.fromkeys(("capacity", "arena_size"), "i32"),
            "TILE": "constexpr",
        },
        constexprs={"TILE": _DIFF_TILE},
        divisible=frozenset({"arena_ptr", "offsets_ptr", "values_ptr", "count_ptr"}),
        wide_loads=False,
    )
    return [diffs, *(_prepare_variant(size, 1024) for size in (16, 32, 64)), *map(_copy_variant, (1, 4, 16, 64, 256))]


def _prepare_variant(block_size: int, n_positions: int) -> Variant:
    table_width = -(-n_positions // block_size)
    pointers = [name for name in _prepare_kernel.arg_names if name.endswith("_ptr")]
    constants: dict[str, Any] = {"BLOCK_SIZE": block_size, "TOKENS": _TOKEN_TILE, "TABLE": min(1024, table_width)}
    constants["DEPENDENT_LAUNCH"] = False
    signature = {name: "*i32" if name in pointers else "i32" for name in _prepare_kernel.arg_names}
    signature |= {"slot_mapping_ptr": "*i64"} | dict.fromkeys(constants, "constexpr")
    return Variant(
        name=f"inputs/prepare block{block_size}",
        kernel=_prepare_kernel,
        signature=signature,
        constexprs=constants,
        divisible=frozenset(pointers) | ({"table_width"} if table_width % 16 == 0 else frozenset()),
        wide_loads=False,
    )


def _copy_variant(num_pairs: int) -> Variant:
    pairs, slice_words = _copy_tile(num_pairs, 4)
    pointers = ("cache_ptr", "sources_ptr", "destinations_ptr")
    return Variant(
        name=f"inputs/copy_blocks pairs{pairs}",
        kernel=_copy_blocks_kernel,
        signature={
            **dict.fromkeys(pointers, "*i32"),
            **dict.fromkeys(("num_pairs", "num_blocks", "block_words"), "i32"),
            **dict.fromkeys(("PAIRS", "WORDS"), "constexpr"),
        },
        constexprs={"PAIRS": pairs, "WORDS": slice_words},
        divisible=frozenset({*pointers, "block_words"}),
        num_warps=_COPY_WARPS,
    )
