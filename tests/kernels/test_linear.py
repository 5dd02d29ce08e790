"""The GEMM, its epilogues and the choice of it against the specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from octavo_kernels import gemm_plan, reference
from octavo_kernels.activation_kernel import FUSED
from octavo_kernels.activations import ACTIVATIONS
from octavo_kernels.gemm_plan import GemmPlan, Measured, candidates, choose, invariant_plan, skinny_plan
from octavo_kernels.linear import linear, workspace_size
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = GemmPlan(16, 16, 32)
SPLIT = GemmPlan(16, 16, 32, splits=3)


def operands(m: int, o: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and residual; results are of the order of 1."""
    torch.manual_seed(m * o + k)
    x, weight = torch.randn(m, k), torch.randn(o, k) * k**-0.5
    return tuple(t.to(device, dtype) for t in (x, weight, torch.randn(o), torch.randn(m, o)))


def assert_is_linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, **epilogue: Any) -> None:
    """Within a rounding of the result's type (two where the specification's own order of roundings differs)."""
    epilogue = {name: value.double() if isinstance(value, Tensor) else value for name, value in epilogue.items()}
    expected = reference.linear(x.double(), weight.double(), None if bias is None else bias.double(), **epilogue)
    eps = torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=2 * eps, atol=(16 if y.dtype == torch.float32 else 4) * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", [SMALL, SPLIT, GemmPlan(32, 64, 16), None], ids=["small", "split", "wide", "choice"])
@pytest.mark.parametrize(("m", "o", "k"), [(1, 96, 64), (5, 65, 130), (17, 48, 33)])
def test_linear_is_the_references_for_sizes_that_no_tile_divides(
    m: int, o: int, k: int, plan: GemmPlan | None, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, bias, _ = operands(m, o, k, dtype, device)
    out = torch.full((m, o), torch.nan, dtype=dtype, device=device)
    assert linear(x, weight, bias, plan=plan, out=out) is out
    assert_is_linear(out, x, weight, bias)


@pytest.mark.parametrize(
    ("m", "dtype"), [(3, torch.float32), (3, torch.float16), (3, torch.bfloat16), (20, torch.float16)], ids=str
)
@pytest.mark.parametrize(
    "how",
    [{"plan": SMALL}, {"plan": SPLIT}, {"batch_invariant": True}, {}],
    ids=["one", "split", "invariant", "choice"],
)
def test_epilogues_are_the_references(m: int, how: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias, residual = operands(m, 80, 96, dtype, device)
    assert_is_linear(linear(x, weight, None, **how), x, weight, None)
    y = linear(x, weight, bias, activation="gelu_new", **how)
    assert_is_linear(y, x, weight, bias, activation="gelu_new")
    before = residual.clone()
    assert_is_linear(linear(x, weight, bias, residual=residual, **how), x, weight, bias, residual=before)
    assert torch.equal(residual, before)
    assert linear(x, weight, bias, residual=residual, out=residual, **how) is residual
    assert_is_linear(residual, x, weight, bias, residual=before)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("how", [{"plan": SMALL}, {"plan": SPLIT}], ids=["one", "split"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_fused(name: str, how: dict[str, Any], device: torch.device) -> None:
    """Over the range where they bend and where their exponentials leave fp32's."""
    values = torch.cat([torch.linspace(-12, 12, 61), torch.tensor([-200.0, -88.0, -20.5, 20.5, 88.0, 200.0])])
    x = torch.ones(1, 16, device=device) / 16
    weight = values[:, None].expand(-1, 16).contiguous().to(device)
    y = linear(x, weight, None, activation=name, **how)
    expected = reference.linear(x.double(), weight.double(), None, activation=name)
    torch.testing.assert_close(y.double(), expected, rtol=4e-6, atol=1e-6)


def test_every_activation_of_the_specification_has_a_fused_form() -> None:
    assert list(FUSED) == list(ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariant_rows_have_the_same_bits_in_every_batch(dtype: torch.dtype, device: torch.device) -> None:
    num_rows = 70
    x, weight, bias, residual = operands(num_rows, 80, 160, dtype, device)
    together = linear(x, weight, bias, residual=residual, batch_invariant=True)
    for rows in (slice(0, 1), slice(69, 70), slice(3, 20), slice(16, 66)):
        assert torch.equal(linear(x[rows], weight, bias, residual=residual[rows], batch_invariant=True), together[rows])
    turned = linear(x.flip(0), weight, bias, residual=residual.flip(0), batch_invariant=True)
    assert torch.equal(turned.flip(0), together)
    x[::2] = torch.nan
    poisoned = linear(x, weight, bias, residual=residual, batch_invariant=True)
    assert torch.equal(poisoned[1::2], together[1::2])


def test_skinny_rows_have_the_same_bits_whatever_their_neighbours(device: torch.device) -> None:
    x, weight, bias, _ = operands(16, 64, 320, torch.float16, device)
    for plan in (SMALL, SPLIT):
        together = linear(x, weight, bias, plan=plan)
        assert torch.equal(linear(x[3:4], weight, bias, plan=plan), together[3:4])
        assert torch.equal(linear(x[5:].clone(), weight, bias, plan=plan), together[5:])


def test_split_parts_are_added_in_index_order(device: torch.device) -> None:
    """Three parts of which any other order gives other numbers: (2**24 + 1) - 2**24 is 0 in fp32, not 1."""
    x = torch.zeros(1, 96, device=device)
    x[0, 0], x[0, 32], x[0, 64] = 2.0**24, 1.0, -(2.0**24)
    weight = torch.ones(16, 96, device=device)
    assert torch.equal(linear(x, weight, None, plan=SPLIT), torch.zeros(1, 16, device=device))


def test_parts_beyond_a_short_k_add_nothing(device: torch.device) -> None:
    x, weight, bias, _ = operands(2, 16, 40, torch.float32, device)
    assert_is_linear(linear(x, weight, bias, plan=GemmPlan(16, 16, 32, splits=8)), x, weight, bias)


def test_nothing_past_the_operands_is_read_or_written(device: torch.device) -> None:
    """All four operands lie in the middle of poisoned memory."""
    m, o, k = 5, 50, 40

    def embedded(rows: int, cols: int, wider: int = 0) -> Tensor:
        memory = torch.full((3 * rows, cols + wider), torch.nan, device=device)
        view = memory[rows : 2 * rows, :cols]
        view.copy_(torch.randn(rows, cols))
        return view

    x, residual, out = embedded(m, k, 9), embedded(m, o, 7), embedded(m, o, 3)
    weight, bias = embedded(o, k), embedded(1, o)[0]
    for plan in (SMALL, SPLIT, invariant_plan(o, k, torch.float32)):
        out.fill_(torch.nan)
        linear(x, weight, bias, residual=residual, out=out, plan=plan)
        torch.testing.assert_close(out, reference.linear(x, weight, bias, residual=residual), rtol=1e-5, atol=1e-5)
        assert out._base is not None
        assert out._base.isnan().sum() == out._base.numel() - m * o


def test_the_vocabularys_projection_has_no_bias_and_any_width(device: torch.device) -> None:
    """gpt2-large's 50,304 outputs with the inputs cut: the interpreter is slow."""
    x, weight, _, _ = operands(2, 50304, 64, torch.float32, device)
    y = linear(x, weight, None, plan=GemmPlan(16, 1024, 64))
    torch.testing.assert_close(y, reference.linear(x, weight, None), rtol=1e-5, atol=1e-5)


def test_vocabulary_plans_cover_gpt2_large(device: torch.device) -> None:
    """The last rows of the true shape, through the plan that is used for it."""
    x, weight, _, _ = operands(1, 192, 1280, torch.float16, device)
    plan = choose(1, 50304, 1280, torch.float16)
    assert plan == GemmPlan(16, 64, 128)
    assert_is_linear(linear(x, weight, None, plan=plan), x, weight, None)


def test_no_rows_is_no_launch(device: torch.device) -> None:
    x, weight, bias, _ = operands(0, 32, 64, torch.float32, device)
    assert linear(x, weight, bias).shape == (0, 32)
    assert linear(x, weight, bias, batch_invariant=True).shape == (0, 32)


def test_a_given_workspace_is_used_and_must_be_large_enough(device: torch.device) -> None:
    x, weight, bias, _ = operands(2, 48, 96, torch.float32, device)
    workspace = torch.full((3 * 2 * 48,), torch.nan, device=device)
    assert_is_linear(linear(x, weight, bias, plan=SPLIT, workspace=workspace), x, weight, bias)
    assert not workspace.isnan().any()
    with pytest.raises(ValueError, match=r"^workspace: "):
        linear(x, weight, bias, plan=SPLIT, workspace=workspace[1:])
    assert workspace_size(4, 1280, 5120, torch.float16, torch.device("cpu")) == 3 * 4 * 1280
    assert workspace_size(4, 3840, 1280, torch.float16, torch.device("cpu")) == 0


def test_default_choice_is_triton_up_to_sixteen_rows_and_cublas_beyond() -> None:
    for dtype in DTYPES:
        for o, k in ((3840, 1280), (1280, 1280), (5120, 1280), (1280, 5120), (50304, 1280)):
            assert choose(1, o, k, dtype) == choose(16, o, k, dtype) == skinny_plan(o, k, dtype)
            assert choose(17, o, k, dtype) is None


def test_a_measured_line_wins_over_the_default_on_its_card_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = GemmPlan(16, 32, 64)
    lines = (Measured("card", torch.float16, 64, 32, 1, 8, None), Measured("card", torch.float16, 64, 32, 9, 99, plan))
    monkeypatch.setattr(gemm_plan, "MEASURED", lines)
    gemm_plan._measured.cache_clear()
    try:
        assert choose(8, 64, 32, torch.float16, "card") is None
        assert choose(99, 64, 32, torch.float16, "card") == plan
        assert choose(100, 64, 32, torch.float16, "card") is None
        assert choose(8, 64, 32, torch.float16, "another card") == skinny_plan(64, 32, torch.float16)
    finally:
        gemm_plan._measured.cache_clear()


def test_candidates_are_distinct_fit_shared_memory_and_begin_with_the_default() -> None:
    for dtype in DTYPES:
        plans = candidates(16, 1280, 5120, dtype)
        assert plans[0] == choose(16, 1280, 5120, dtype)
        assert len(set(plans)) == len(plans) > 10
        assert all((p.tile_m + p.tile_o) * p.tile_k * dtype.itemsize * p.num_stages <= 200 << 10 for p in plans)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 16, 17, 300])
def test_gpt2_large_shapes_on_the_gpu(m: int, dtype: torch.dtype, device: torch.device) -> None:
    """The tanh form of gelu in cuBLAS's epilogue among them."""
    for o, k in ((3840, 1280), (1280, 5120), (5120, 1280)):
        x, weight, bias, _ = operands(m, o, k, dtype, device)
        for how in ({}, {"batch_invariant": True}):
            assert_is_linear(
                linear(x, weight, bias, activation="gelu_new", **how), x, weight, bias, activation="gelu_new"
            )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda: torch.zeros(2, 64, dtype=torch.float64)),
        ("x", lambda: torch.zeros(64, 2).t()),
        ("x", lambda: torch.zeros(64)),
        ("weight", lambda: torch.zeros(32, 63)),
        ("weight", lambda: torch.zeros(64, 32).t()),
        ("weight", lambda: torch.zeros(32, 64, dtype=torch.float16)),
        ("weight", lambda: torch.zeros(32, 64, device="meta")),
        ("bias", lambda: torch.zeros(31)),
        ("activation", lambda: "gelu_old"),
        ("residual", lambda: torch.zeros(2, 33)),
        ("out", lambda: torch.zeros(3, 32)),
        ("workspace", lambda: torch.zeros(9, dtype=torch.float16)),
    ],
)
def test_a_bad_argument_is_named(name: str, change: Callable[[], object]) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 64), "weight": torch.zeros(32, 64), "bias": None, name: change()}
    with pytest.raises(ValueError, match=f"^{name}: "):
        linear(**arguments)


def test_activation_with_residual_and_plan_with_invariance_are_refused() -> None:
    x, weight, _, residual = operands(2, 32, 64, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^residual: "):
        linear(x, weight, None, activation="relu", residual=residual)
    with pytest.raises(ValueError, match=r"^plan: "):
        linear(x, weight, None, plan=SMALL, batch_invariant=True)
