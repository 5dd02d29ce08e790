"""The embedding kernel against its specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from octavo_kernels import reference
from octavo_kernels.embed import embed
from torch import Tensor

VOCAB_SIZE, N_POSITIONS = 57, 33


def tables(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    wte, wpe = torch.randn(VOCAB_SIZE, width), torch.randn(N_POSITIONS, width)
    return wte.to(device, dtype), wpe.to(device, dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 320, 1280])
def test_embedding_is_the_references(
    width: int, dtype: torch.dtype, index_dtype: torch.dtype, device: torch.device
) -> None:
    wte, wpe = tables(width, dtype, device)
    ids = torch.tensor([0, 1, VOCAB_SIZE - 1, 5, 5], dtype=index_dtype, device=device)
    positions = torch.tensor([0, N_POSITIONS - 1, 3, 7, 7], dtype=index_dtype, device=device)
    out = torch.full((5, width), torch.nan, dtype=dtype, device=device)
    assert embed(ids, positions, wte, wpe, out) is out
    expected = reference.embed(ids.long(), positions.long(), wte, wpe, dtype)
    # The interpreter truncates to bf16 where a GPU rounds.
    truncated = dtype == torch.bfloat16 and device.type == "cpu"
    eps = torch.finfo(dtype).eps if truncated else 0.0
    torch.testing.assert_close(out, expected, rtol=eps, atol=0)


def test_a_wider_table_is_rounded_to_the_streams_type_first(device: torch.device) -> None:
    wte, wpe = tables(64, torch.float32, device)
    ids = torch.tensor([3, 4], dtype=torch.int32, device=device)
    out = torch.empty(2, 64, dtype=torch.float16, device=device)
    embed(ids, ids, wte, wpe, out)
    assert torch.equal(out, (wte[3:5].half().float() + wpe[3:5]).half())


@pytest.mark.parametrize("bad", [-1, VOCAB_SIZE, 2**31 - 1, -(2**31)])
def test_ids_and_positions_out_of_range_give_zeros_and_read_nothing(bad: int, device: torch.device) -> None:
    # What lies around the tables is poisoned: a read past their ends shows.
    memory = torch.full((3 * VOCAB_SIZE, 64), torch.nan, device=device)
    wte, wpe = memory[VOCAB_SIZE : 2 * VOCAB_SIZE], memory[VOCAB_SIZE : VOCAB_SIZE + N_POSITIONS]
    wte.fill_(1.0)
    ids = torch.tensor([bad, 2, 2], dtype=torch.int32, device=device)
    positions = torch.tensor([1, bad, 1], dtype=torch.int32, device=device)
    out = torch.full((3, 64), torch.nan, device=device)
    embed(ids, positions, wte, wpe, out)
    assert torch.equal(out, torch.tensor([[0.0], [0.0], [2.0]], device=device).expand(3, 64))


def test_strided_tables_and_output_leave_their_neighbours_alone(device: torch.device) -> None:
    wte, wpe = tables(128, torch.float32, device)
    memory = torch.full((4, 96), torch.nan, device=device)
    ids = torch.tensor([9, 8, 7, 6], dtype=torch.int32, device=device)
    embed(ids, ids, wte[:, 32:96], wpe[:, :64], memory[:, :64])
    assert torch.equal(memory[:, :64], wte[6:10, 32:96].flip(0) + wpe[6:10, :64].flip(0))
    assert memory[:, 64:].isnan().all()


def test_no_tokens_is_no_launch(device: torch.device) -> None:
    wte, wpe = tables(64, torch.float32, device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    assert embed(none, none, wte, wpe, torch.empty(0, 64, device=device)).shape == (0, 64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_ids", torch.zeros(3, dtype=torch.int32)),
        ("input_ids", torch.zeros(2)),
        ("positions", torch.zeros(4, dtype=torch.int32)[::2]),
        ("positions", torch.zeros(2, dtype=torch.int32, device="meta")),
        ("wte", torch.zeros(9, 64, dtype=torch.float64)),
        ("wpe", torch.zeros(9, 32)),
        ("wpe", torch.zeros(64, 9).t()),
        ("out", torch.zeros(2, 65)),
        ("out", torch.zeros(64)),
    ],
)
def test_a_bad_argument_is_named(name: str, value: Tensor) -> None:
    ids = torch.zeros(2, dtype=torch.int32)
    arguments: dict[str, Any] = {"input_ids": ids, "positions": ids, "wte": torch.zeros(9, 64)}
    arguments |= {"wpe": torch.zeros(9, 64), "out": torch.zeros(2, 64), name: value}
    with pytest.raises(ValueError, match=f"^{name}: "):
        embed(**arguments)
