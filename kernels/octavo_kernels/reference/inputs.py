"""The specification of what prepares a step: `octavo_kernels.inputs` must leave the same words. Row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from octavo_kernels.state import SlotState

if TYPE_CHECKING:  # it imports triton, which the CPU's engine does without
    from octavo_kernels.inputs import StepInputs


def apply_diffs(state: SlotState, offsets: Tensor, values: Tensor, count: Tensor) -> None:
    """arena[offsets[i]] = values[i] for i < count[0]; int32 [C], int32 [C], int32 [1]; others than words of the arena
    are skipped."""
    n = min(int(count), offsets.numel())
    for offset, value in zip(offsets[:n].tolist(), values[:n].tolist(), strict=True):
        if 0 <= offset < state.arena.numel():
            state.arena[offset] = value


def prepare(
    state: SlotState, row_slots: Tensor, query_start_loc: Tensor, out: StepInputs, *, block_size: int, num_blocks: int
) -> None:
    """As `octavo_kernels.inputs.prepare`."""
    out.input_ids.zero_()
    out.positions.zero_()
    out.slot_mapping.fill_(-1)
    out.seq_lens.zero_()
    out.block_tables.zero_()
    starts, num_tokens = query_start_loc.tolist(), out.input_ids.numel()
    room = min(state.hist.shape[1] - 1, state.block_table.shape[1] * block_size)
    for row, slot in enumerate(row_slots.tolist()):
        begin, end = max(starts[row], 0), min(starts[row + 1], num_tokens)
        if begin >= end or not 0 <= slot < state.padding_slot or state.finished[slot] != 0:
            continue
        computed = int(state.num_computed[slot])
        if computed < 0 or computed + end - begin > room:
            continue
        table = [block if 0 <= block < num_blocks else 0 for block in state.block_table[slot].tolist()]
        for token in range(begin, end):
            position = computed + token - begin
            token_id = int(state.hist[slot, position]) if position < int(state.length[slot]) else 0
            block = table[position // block_size]
            out.input_ids[token] = token_id if 0 <= token_id < state.vocab_size else 0
            out.positions[token] = position
            if block > 0:
                out.slot_mapping[token] = block * block_size + position % block_size
        out.seq_lens[row] = computed + end - begin
        out.block_tables[row] = out.block_tables.new_tensor(table)
        state.num_computed[slot] = computed + end - begin
