"""The norm kernels against their specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from octavo_kernels import reference
from octavo_kernels.norm import add_layer_norm, layer_norm
from torch import Tensor

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rows_with_outliers(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like GPT-2's residual stream: a channel a hundred times the others, and a mean far from 0."""
    x = torch.randn(num_rows, width) * 2 + 5
    x[:, width // 3] *= 100
    return x.to(device, dtype)


def affine(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(width).to(device, dtype), torch.randn(width).to(device, dtype)


def assert_is_norm_of(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Within a rounding of the result's type of the norm in fp64."""
    expected = reference.layer_norm(x.double(), weight.double(), bias.double(), EPS)
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=eps, atol=(32 if out.dtype == torch.float32 else 1) * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1280), (3, 64), (2, 1600), (5, 100), (2, 1)])
def test_layer_norm_is_the_references(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    x = rows_with_outliers(num_rows, width, dtype, device)
    weight, bias = affine(width, dtype, device)
    out = torch.full_like(x, torch.nan)
    before = x.clone()
    assert layer_norm(x, weight, bias, EPS, out) is out
    assert_is_norm_of(out, x, weight, bias)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1280), (3, 64), (4, 100)])
def test_add_layer_norm_adds_in_place_and_normalises_the_rounded_sum(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(1)
    residual, delta = (rows_with_outliers(num_rows, width, dtype, device) for _ in range(2))
    weight, bias = affine(width, dtype, device)
    stream, out = residual.clone(), torch.full_like(residual, torch.nan)
    assert add_layer_norm(stream, delta, weight, bias, EPS, out) is out
    expected = residual.clone()
    reference.add_layer_norm(expected, delta, weight, bias, EPS)
    truncated = dtype == torch.bfloat16 and device.type == "cpu"  # so does the interpreter, where a GPU rounds
    torch.testing.assert_close(stream, expected, rtol=torch.finfo(dtype).eps if truncated else 0, atol=0)
    assert torch.equal(out, layer_norm(stream, weight, bias, EPS, torch.empty_like(out)))


def test_a_rows_norm_does_not_depend_on_the_other_rows(device: torch.device) -> None:
    torch.manual_seed(2)
    x = rows_with_outliers(9, 320, torch.float32, device)
    weight, bias = affine(320, torch.float32, device)
    together = layer_norm(x, weight, bias, EPS, torch.empty_like(x))
    for row in range(9):
        alone = layer_norm(x[row : row + 1], weight, bias, EPS, torch.empty_like(x[:1]))
        assert torch.equal(alone[0], together[row])
    x[3] = torch.nan
    poisoned = layer_norm(x, weight, bias, EPS, torch.empty_like(x))
    others = [0, 1, 2, 4, 5, 6, 7, 8]
    assert torch.equal(poisoned[others], together[others])
    assert poisoned[3].isnan().all()


def test_strided_rows_leave_their_neighbours_alone(device: torch.device) -> None:
    torch.manual_seed(3)
    memory = torch.full((4, 3, 100), torch.nan, device=device)
    memory[:, 1] = torch.randn(4, 100)
    out = torch.full((4, 3, 100), torch.nan, device=device)
    weight, bias = affine(100, torch.float32, device)
    layer_norm(memory[:, 1], weight, bias, EPS, out[:, 1])
    assert_is_norm_of(out[:, 1], memory[:, 1], weight, bias)
    assert out[:, ::2].isnan().all()
    delta = torch.randn(4, 100, device=device)
    expected = memory[:, 1] + delta
    add_layer_norm(memory[:, 1], delta, weight, bias, EPS, delta)
    assert torch.equal(memory[:, 1], expected)
    assert memory[:, ::2].isnan().all()
    assert_is_norm_of(delta, expected, weight, bias)


def test_a_row_of_one_value_gives_the_bias(device: torch.device) -> None:
    x = torch.full((1, 96), 3.0, device=device)
    weight, bias = affine(96, torch.float32, device)
    assert torch.equal(layer_norm(x, weight, bias, EPS, x), bias[None])


def test_no_rows_is_no_launch(device: torch.device) -> None:
    none, one = torch.empty(0, 8, device=device), torch.ones(8, device=device)
    assert add_layer_norm(none, none, one, one, EPS, none).shape == (0, 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("residual", torch.zeros(2, 8, dtype=torch.float64)),
        ("residual", torch.zeros(8)),
        ("residual", torch.zeros(8, 2).t()),
        ("delta", torch.zeros(3, 8)),
        ("delta", torch.zeros(2, 8, dtype=torch.float16)),
        ("delta", torch.zeros(2, 8, device="meta")),
        ("weight", torch.zeros(9)),
        ("bias", torch.zeros(16)[::2]),
        ("out", torch.zeros(2, 9)),
    ],
)
def test_a_bad_argument_is_named(name: str, value: Tensor) -> None:
    arguments: dict[str, Any] = {"residual": torch.zeros(2, 8), "delta": torch.zeros(2, 8), "weight": torch.zeros(8)}
    arguments |= {"bias": torch.zeros(8), "eps": EPS, "out": torch.zeros(2, 8), name: value}
    with pytest.raises(ValueError, match=f"^{name}: "):
        add_layer_norm(**arguments)


def test_the_sum_is_not_overwritten_by_the_norm(device: torch.device) -> None:
    x, one = torch.zeros(2, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match=r"^out: "):
        add_layer_norm(x, torch.zeros_like(x), one, one, EPS, x)
