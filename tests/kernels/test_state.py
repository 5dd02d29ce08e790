"""The state of requests on the device: where its parts lie, and that names mean one bit or column each."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from octavo_kernels.state import NUM_PARAMS, Bitmap, Feature, ListSizes, Param, SlotState

PARTS = [field.name for field in dataclasses.fields(SlotState) if field.name not in ("arena", "vocab_size")]


def test_parts_are_disjoint_views_of_the_arena(device: torch.device):
    state = SlotState.allocate(3, 100, 16, 97, device)
    arena = state.arena
    assert arena.dtype == torch.int32 and arena.dim() == 1 and not arena.any()
    for number, name in enumerate(PARTS, 1):
        part = getattr(state, name)
        assert part.is_contiguous() and part.shape[0] == 4
        assert (part.data_ptr() - arena.data_ptr()) % 128 == 0, f"{name}: not aligned"
        assert not part.any(), f"{name}: overlaps a part before it"
        part.fill_(number)
    for number, name in enumerate(PARTS, 1):
        assert (getattr(state, name) == number).all(), f"{name}: overlaps a part behind it"
    assert (arena != 0).sum() == sum(getattr(state, name).numel() for name in PARTS)


def test_widths_hold_the_largest_request(device: torch.device):
    lists = ListSizes(biases=5, sequences=6, sequence_words=70, requested=8)
    state = SlotState.allocate(2, 1000, 32, 50257, device, lists)
    assert state.padding_slot == 2
    assert state.block_table.shape == (3, 32) and state.hist.shape == (3, 1001)
    assert state.bitmaps.shape == (3, len(Bitmap), 1571) and state.params.shape == (3, NUM_PARAMS)
    assert state.count_ids.shape == state.counts.shape == state.hist.shape
    assert state.bias_ids.shape == state.bias_values.shape == (3, 5)
    assert state.bias_sequences.shape == state.bad_words.shape == (3, 70) and state.requested_ids.shape == (3, 8)


def test_the_default_lists_hold_the_limits_of_the_server(device: torch.device):
    lists = ListSizes()
    longest = 64  # tokens of a sequence; two more words each
    assert lists.sequence_words == lists.sequences * (longest + 2)
    assert lists.biases >= 1024 + lists.sequences


def test_a_state_too_large_for_32_bit_offsets_is_refused(device: torch.device):
    with pytest.raises(ValueError, match=r"^num_slots"):
        SlotState.allocate(100_000, 1024, 16, 50257, device)


def test_bytes_per_slot_are_what_a_slot_adds(device: torch.device):
    few, more = (SlotState.allocate(slots, 256, 16, 97, device).arena.numel() * 4 for slots in (32, 64))
    assert few + 32 * SlotState.bytes_per_slot(256, 16, 97) == pytest.approx(more, rel=0.01)


def test_features_are_single_bits_of_an_int32():
    bits = [int(feature) for feature in Feature if feature]
    assert all(bit & (bit - 1) == 0 for bit in bits) and len(set(bits)) == len(bits)
    assert max(bits) < 2**31


def test_columns_and_bitmaps_are_distinct():
    assert sorted(Param) == list(range(len(Param))) and len(Param) <= NUM_PARAMS
    assert sorted(Bitmap) == list(range(len(Bitmap)))
