"""Splits that rows share: computed once for a tile of them, they give what each row's own decode attention gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from kernels.test_paged_attention import (
    BF16,
    F16,
    F32,
    SCALE,
    Step,
    assert_near,
    assert_same_bits,
    decode,
    good_arguments,
    make_step,
    one_token_rows,
)
from octavo_kernels import reference
from octavo_kernels.kv_write import FP8
from octavo_kernels.paged_attention import (
    SHARED_TILE,
    SPLIT,
    AttentionWorkspace,
    decode_attention,
    shared_attention,
)
from torch import Tensor

Group = tuple[list[int], int]
"""Rows, and how many splits they share."""


def sharing_step(
    device: torch.device, dtype: torch.dtype, lengths: list[int], groups: list[Group], **options: Any
) -> Step:
    """Rows of one token; those of a group have their first splits' blocks from the group's first row."""
    step = make_step(device, dtype, one_token_rows(lengths), **{"heads": 1, "block_size": 32} | options)
    before = step.tables.unique().long()
    for rows, splits in groups:
        count = splits * SPLIT // step.cache.shape[3]
        step.tables[rows, :count] = step.tables[rows[0], :count].clone()
    unread = before[torch.isin(before, step.tables.long(), invert=True)]
    for half in step.cache:
        half[unread] = torch.full((1,), math.nan).to(half)
    return step


def shared_of(step: Step, groups: list[Group]) -> tuple[Tensor, Tensor]:
    """Tiles, and the shared splits of each row."""
    tiles = np.full((len(groups) + 1, SHARED_TILE), -1, np.int32)
    splits = np.zeros(len(step.seq_lens), np.int32)
    for tile, (rows, count) in zip(tiles, groups, strict=False):
        tile[: len(rows)] = rows
        splits[rows] = count
    return torch.from_numpy(tiles).to(step.device), torch.from_numpy(splits).to(step.device)


def decode_shared(step: Step, tiles: Tensor, splits: Tensor, workspace: AttentionWorkspace | None = None) -> Tensor:
    workspace = workspace or step.workspace(len(step.seq_lens))
    arguments = (step.qkv, step.cache, step.tables, step.seq_lens)
    shared_attention(*arguments, tiles, splits, workspace, **step.scales())
    found = decode_attention(*arguments, step.out(), workspace, **step.scales(), shared_splits=splits)
    assert not workspace.tickets.any()
    return found


CASES: list[tuple[list[int], list[Group], torch.dtype, dict[str, Any]]] = [
    ([257, 300], [([0, 1], 1)], F32, {"block_size": 16, "heads": 2}),
    ([5, 600, 261, 530, 40, 777], [([1, 3, 5], 2)], F16, {}),
    ([258 + 7 * r for r in range(18)], [(list(range(17)), 1)], F32, {"block_size": 64}),
    ([300, 513, 290, 514], [([2, 0], 1), ([1, 3], 2)], BF16, {"head_size": 128}),
    ([257, 258], [([0, 1], 1)], F16, {"head_size": 80, "cache_dtype": FP8, "k_scale": 0.25, "v_scale": 0.5}),
    ([257, 258], [([0, 1], 1)], F32, {"head_size": 20, "cache_dtype": F16}),
]


@pytest.mark.parametrize(("lengths", "groups", "dtype", "options"), CASES, ids=str)
def test_rows_that_share_splits_get_what_the_reference_gives_each(
    lengths: list[int], groups: list[Group], dtype: torch.dtype, options: dict[str, Any], device: torch.device
) -> None:
    step = sharing_step(device, dtype, lengths, groups, **options)
    after = step.rows(0, len(lengths))
    after.write()
    found = decode_shared(step, *shared_of(step, groups))
    assert_same_bits(step.cache, after.cache)
    assert_near(found, after.expected())


def test_rows_without_a_share_keep_their_bits(device: torch.device) -> None:
    groups: list[Group] = [([0, 2], 1)]
    step = sharing_step(device, F16, [300, 530, 270, 20], groups)
    alone = decode(step.rows(0, 4))
    found = decode_shared(step, *shared_of(step, groups))
    assert torch.equal(found[[1, 3]], alone[[1, 3]])


def test_a_tile_leaves_what_the_reference_says_in_the_workspace_and_nothing_else(device: torch.device) -> None:
    """Rows of one tile may share different numbers of splits; rows out of range are none."""
    step = sharing_step(device, F32, [530, 300, 600, 700], [([0, 1, 2, 3], 1), ([0, 2], 2)], heads=2)
    tiles = torch.full((1, SHARED_TILE), -1, dtype=torch.int32, device=device)
    tiles[0, :6] = torch.tensor([4, 2, 1, 2**31 - 1, 0, -(2**31)], dtype=torch.int32)
    counts = [2, 1, 2, 0]
    splits = torch.tensor(counts, dtype=torch.int32, device=device)
    workspace = step.workspace(4)
    shared_attention(step.qkv, step.cache, step.tables, step.seq_lens, tiles, splits, workspace, **step.scales())
    results, logarithms = reference.shared_attention(step.qkv, step.cache, step.tables, counts, SPLIT, scale=SCALE)
    for found, expected in ((workspace.partial, results), (workspace.lse, logarithms)):
        found = found.squeeze(3)
        assert expected[0].isfinite().all()
        torch.testing.assert_close(found[:, :, :2], expected, atol=1e-4, rtol=1e-4, equal_nan=True)
        assert found[:, :, 2:].isnan().all()


def test_muted_rows_and_the_split_of_the_new_token_are_never_shared(device: torch.device) -> None:
    """The last row of the tile has finished and lost its table; others' shares end before their new tokens."""
    groups: list[Group] = [([0, 2, 3], 1)]
    step = sharing_step(device, F32, [512, 256, 290, 300], groups)
    tiles, splits = shared_of(step, [([0, 1, 2, 3], 1)])
    splits[:2] = torch.tensor([2**31 - 1, 7], dtype=torch.int32)
    step.tables[3], step.seq_lens[3] = -1, 0
    expected = step.rows(0, 4)
    expected.write()
    found = decode_shared(step, tiles, splits)
    assert_near(found[:3], expected.expected()[:3])
    assert found[3].eq(0).all()


def test_decode_reads_no_key_of_a_shared_split(device: torch.device) -> None:
    step = sharing_step(device, F32, [300, 290], [([0, 1], 1)])
    expected = step.rows(0, 2)
    expected.write()
    tiles, splits = shared_of(step, [([0, 1], 1)])
    workspace, arguments = step.workspace(2), (step.qkv, step.cache, step.tables, step.seq_lens)
    shared_attention(*arguments, tiles, splits, workspace, scale=SCALE)
    step.cache[:, step.tables[0, : SPLIT // 32].long()] = math.nan
    found = decode_attention(*arguments, step.out(), workspace, scale=SCALE, shared_splits=splits)
    assert_near(found, expected.expected())


def test_a_workspace_serves_steps_with_and_without_shares(device: torch.device) -> None:
    groups: list[Group] = [([0, 1], 2)]
    step = sharing_step(device, F16, [530, 600], groups)
    workspace = step.workspace(3, 16)
    first = decode_shared(step, *shared_of(step, groups), workspace)
    assert_near(decode(step, "fma", workspace), first.float())
    assert torch.equal(decode_shared(step, *shared_of(step, groups), workspace), first)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tile_rows", torch.zeros(1, 16, dtype=torch.int32)),
        ("tile_rows", torch.zeros(1, SHARED_TILE, dtype=torch.int64)),
        ("shared_splits", torch.zeros(3, dtype=torch.int32)),
        ("shared_splits", torch.zeros(2)),
        ("seq_lens", torch.zeros(3, dtype=torch.int32)),
        ("scale", math.inf),
        ("workspace", AttentionWorkspace.allocate(1, 2, 64, 32, torch.device("cpu"))),
    ],
)
def test_a_bad_argument_is_named(name: str, value: object) -> None:
    arguments = good_arguments() | {
        "scale": 1.0,
        "workspace": AttentionWorkspace.allocate(2, 2, 64, 32, torch.device("cpu")),
    }
    del arguments["out"]
    arguments["tile_rows"] = torch.zeros(1, SHARED_TILE, dtype=torch.int32)
    arguments["shared_splits"] = torch.zeros(2, dtype=torch.int32)
    named = "seq_lens|block_tables" if name == "seq_lens" else name
    with pytest.raises(ValueError, match=f"^({named}): "):
        shared_attention(**(arguments | {name: value}))


def test_decode_names_bad_shares() -> None:
    arguments = good_arguments() | {"workspace": AttentionWorkspace.allocate(2, 2, 64, 32, torch.device("cpu"))}
    for splits, form in ((torch.zeros(3, dtype=torch.int32), "fma"), (torch.zeros(2, dtype=torch.int32), "dot")):
        with pytest.raises(ValueError, match=r"^shared_splits: "):
            decode_attention(**arguments, scale=1.0, form=form, shared_splits=splits)
