"""Number formats of model and weights, by checkpoint and device."""

import pytest
import torch
from octavo.checkpoint import ModelSpec
from octavo.config import CacheConfig, ModelConfig
from octavo.errors import StartupError
from octavo.worker import device
from octavo.worker.device import choose_cache_dtype, choose_dtype, choose_load_dtype, uses_dependent_launch
from octavo.worker.gpt2 import GPT2
from octavo.worker.weights import expected_shapes
from octavo_kernels.cpu import linear
from octavo_kernels.cpu.linear import LinearKind
from worker.paged import all_logits

CPU = torch.device("cpu")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("stored", "asked", "kind", "expected"),
    [
        ("float16", "auto", LinearKind.FP16, (BF16, FP16)),
        ("float16", "auto", LinearKind.INT8, (BF16, FP16)),
        ("float16", "auto", LinearKind.ONEDNN, (BF16, BF16)),
        ("float16", "bfloat16", LinearKind.FP16, (BF16, BF16)),
        ("float16", "float32", LinearKind.ONEDNN, (FP32, FP32)),
        ("bfloat16", "auto", LinearKind.FP16, (BF16, BF16)),
        (None, "auto", LinearKind.ONEDNN, (FP32, FP32)),
    ],
)
def test_fp16_weights_keep_their_bits_where_a_cpu_multiplies_by_fp16(monkeypatch, stored, asked, kind, expected):
    monkeypatch.setattr(device, "choose_kind", lambda dtype, quantization: kind)
    config, spec = ModelConfig(path="", name="", dtype=asked), ModelSpec(dtype=stored)
    dtype = choose_dtype(config, spec, CPU)
    assert (dtype, choose_load_dtype(config, spec, CPU, dtype)) == expected


@pytest.mark.parametrize(
    ("asked", "kind", "capability", "expected"),
    [
        ("off", "cuda", (9, 0), False),
        ("auto", "cuda", (9, 0), True),
        ("auto", "cuda", (12, 0), True),
        ("auto", "cuda", (8, 9), False),
        ("auto", "cpu", None, False),
    ],
)
def test_dependent_launch_is_used_where_it_is_asked_for_and_can_be(monkeypatch, asked, kind, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert uses_dependent_launch(ModelConfig(path="", name="", dependent_launch=asked), torch.device(kind)) is expected


def test_another_value_of_dependent_launch_is_refused():
    with pytest.raises(StartupError, match="dependent-launch 'on'"):
        uses_dependent_launch(ModelConfig(path="", name="", dependent_launch="on"), CPU)


def test_a_gpu_takes_a_checkpoint_as_it_is_stored():
    config, spec = ModelConfig(path="", name=""), ModelSpec(dtype="float16")
    gpu = torch.device("cuda")
    dtype = choose_dtype(config, spec, gpu)
    assert (dtype, choose_load_dtype(config, spec, gpu, dtype)) == (FP16, FP16)


def test_the_cache_has_the_dtype_of_the_model_or_fp8():
    assert choose_cache_dtype(CacheConfig(), BF16) == BF16
    assert choose_cache_dtype(CacheConfig(kv_cache_dtype="fp8"), BF16) == torch.float8_e4m3fn
    with pytest.raises(StartupError, match="kv_cache_dtype 'int4': must be auto or fp8"):
        choose_cache_dtype(CacheConfig(kv_cache_dtype="int4"), BF16)


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="fp16 products are fbgemm's")
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_bfloat16_model_takes_fp16_weights(monkeypatch, quantization):
    """Its logits are those of the same weights in fp32, which bfloat16 would change."""
    if quantization is None:
        monkeypatch.setattr(linear, "choose_kind", lambda dtype, quantization: LinearKind.FP16)
    spec = ModelSpec(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    torch.manual_seed(0)
    weights = {name: torch.randn(shape).mul_(0.2).half() for name, shape in expected_shapes(spec).items()}
    del weights["lm_head.weight"]

    def logits(weights, dtype):
        model = GPT2(spec, dict(weights), device=CPU, dtype=dtype, quantization=quantization)
        return all_logits(model, [torch.arange(20)], [15], chunk=8, block_size=16)[0]

    expected = logits({name: weight.float() for name, weight in weights.items()}, FP32)
    torch.testing.assert_close(logits(weights, BF16), expected, rtol=0, atol=1e-4)
    rounded = logits({name: weight.bfloat16() for name, weight in weights.items()}, BF16)
    assert (rounded - expected).abs().max() > 1e-3
