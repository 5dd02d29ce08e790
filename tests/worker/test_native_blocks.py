"""All layers in one call of C give the numbers of one layer after the other; the norm is the reference's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from octavo.checkpoint import ModelSpec
from octavo.llm import LLM
from octavo.worker.gpt2 import GPT2
from octavo_kernels import reference
from octavo_kernels.checks import FP8
from octavo_kernels.cpu import native
from octavo_kernels.cpu.norm import layer_norm
from torch import Tensor
from worker.paged import CPU, all_logits

needs_kernels = pytest.mark.skipif(native.library() is None, reason=f"no C kernels: {native.why_not()}")
needs_bf16 = pytest.mark.skipif(
    native.library() is None or not native.loaded().octavo_has_linear(), reason="no AVX512_BF16"
)
LENGTHS, PROMPTS = (70, 33, 3, 64, 17, 90), [60, 32, 1, 63, 5, 71]


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever a test sets is undone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def spec_of(heads: int, width: int, activation: str = "gelu_new") -> ModelSpec:
    return ModelSpec(
        vocab_size=199,
        n_positions=96,
        n_embd=width,
        n_layer=3,
        n_head=heads,
        activation_function=activation,
        bos_token_id=0,
        eos_token_id=0,
    )


def random_model(spec: ModelSpec, cache_dtype: torch.dtype | None = None) -> GPT2:
    torch.manual_seed(0)
    width, inner = spec.n_embd, spec.inner_size
    shapes = {"wte.weight": (spec.vocab_size, width), "wpe.weight": (spec.n_positions, width)}
    for layer in range(spec.n_layer):
        for name, (inputs, outputs) in {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, inner),
            "mlp.c_proj": (inner, width),
        }.items():
            shapes |= {f"h.{layer}.{name}.weight": (inputs, outputs), f"h.{layer}.{name}.bias": (outputs,)}
    norms = [*(f"h.{layer}.ln_{i}" for layer in range(spec.n_layer) for i in (1, 2)), "ln_f"]
    weights = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    for norm in norms:
        weights |= {f"{norm}.weight": 1 + torch.randn(width) * 0.1, f"{norm}.bias": torch.randn(width) * 0.1}
    return GPT2(
        spec,
        {name: tensor.bfloat16() for name, tensor in weights.items()},
        device=CPU,
        dtype=torch.bfloat16,
        cache_dtype=cache_dtype,
    )


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(199, (length,), generator=generator) for length in LENGTHS]


@needs_bf16
@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize(("heads", "width"), [(2, 128), (3, 72), (1, 160)])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8], ids=str)
def test_bits_are_those_of_one_layer_after_the_other(
    heads: int, width: int, cache_dtype: torch.dtype, num_threads: int, threads: None
) -> None:
    torch.set_num_threads(num_threads)
    model = random_model(spec_of(heads, width), cache_dtype)
    assert model._whole is not None
    run = {"chunk": 7 if width % 64 else 40, "block_size": 16, "cache_dtype": cache_dtype}
    found = all_logits(model, sequences(), PROMPTS, **run)  # type: ignore[arg-type]
    assert model._num_layers_computed == 0
    num_computed, model._whole = model.num_layers_computed, None
    expected = all_logits(model, sequences(), PROMPTS, **run)  # type: ignore[arg-type]
    assert model._num_layers_computed == num_computed > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@needs_bf16
def test_progress_is_seen_within_a_step() -> None:
    model, seen = random_model(spec_of(4, 256)), set()
    run = {"chunk": 16, "block_size": 16, "cache_dtype": torch.bfloat16}
    steps = threading.Thread(target=all_logits, args=[model, sequences(), PROMPTS], kwargs=run)
    steps.start()
    while steps.is_alive():
        seen.add(model.num_layers_computed % 3)
        time.sleep(1e-5)
    assert seen > {0}


@needs_bf16
def test_long_chunks_of_heads_without_tiles_are_left_to_the_layers() -> None:
    model = random_model(spec_of(2, 64))
    all_logits(model, sequences(), PROMPTS, chunk=40, block_size=16, cache_dtype=torch.bfloat16)
    assert model._num_layers_computed > 0 and model.num_layers_computed > model._num_layers_computed


@needs_bf16
def test_an_activation_that_c_does_not_know_is_left_to_the_layers() -> None:
    assert random_model(spec_of(2, 64, "relu"))._whole is None


@needs_kernels
@pytest.mark.parametrize(("rows", "width"), [(1, 1280), (3, 64), (21, 1600), (5, 100), (9, 768), (2, 1)])
def test_norms_are_the_references(rows: int, width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, width) * 2 + 5
    x[:, width // 3] *= 100  # GPT-2's residual stream has such a channel
    x, weight, bias = x.bfloat16(), torch.randn(width).bfloat16(), torch.randn(width).bfloat16()
    expected = reference.layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
    found = layer_norm(x, weight, bias, 1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=2**-8)
    assert torch.equal(found, torch.cat([layer_norm(row[None], weight, bias, 1e-5) for row in x]))


@needs_kernels
def test_other_types_are_normed_by_torch() -> None:
    x, weight, bias = torch.randn(3, 20), torch.randn(20), torch.randn(20)
    assert torch.equal(layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5))


@needs_bf16
def test_the_engine_computes_its_steps_so() -> None:
    with LLM(dtype="bfloat16") as llm:
        llm.generate("Once upon a time", max_new_tokens=4)
        whole = llm.core.runner._model._whole  # type: ignore[attr-defined]
        assert whole.num_computed == llm.core.progress - llm.core.num_steps
