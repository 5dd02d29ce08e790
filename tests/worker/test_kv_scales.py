"""Scales of an fp8 cache: from the weights alone, and about what keys and values are."""

import math

import pytest
import torch
from octavo.worker.kv_scales import KVScales, kv_scales
from octavo_kernels.checks import FP8

WIDTH = 64


def layer(key: float, value: float, bias: float = 0.0) -> tuple[torch.Tensor, ...]:
    """ln_1 and c_attn whose keys and values are about that large."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * WIDTH, WIDTH, generator=generator) / math.sqrt(WIDTH)
    weight[WIDTH : 2 * WIDTH] *= key / 3
    weight[2 * WIDTH :] *= value / 3
    return torch.full((WIDTH,), 3.0), torch.full((WIDTH,), bias), weight, torch.full((3 * WIDTH,), bias)


@pytest.mark.parametrize(("key", "value"), [(1.0, 1.0), (40.0, 0.003), (1e-12, 1e12)])
def test_scaled_keys_and_values_are_about_1(key: float, value: float) -> None:
    norm_weight, norm_bias, weight, bias = layer(key, value)
    scales = kv_scales(FP8, norm_weight, norm_bias, weight, bias)
    x = torch.nn.functional.layer_norm(torch.randn(100, WIDTH), (WIDTH,), norm_weight, norm_bias)
    _, keys, values = (x @ weight.T + bias).split(WIDTH, 1)
    for scale, numbers in ((scales.key, keys), (scales.value, values)):
        assert math.frexp(scale)[0] == 0.5, "a power of two"
        if 2**-30 < scale < 2**30:
            assert 0.6 < numbers.square().mean().sqrt() / scale < 1.6


def test_a_constant_part_counts() -> None:
    assert kv_scales(FP8, *layer(1e-3, 1e-3, bias=16.0)) == KVScales(16.0, 16.0)


def test_only_fp8_is_scaled_and_weights_that_say_nothing_give_1() -> None:
    assert kv_scales(torch.bfloat16, *layer(40.0, 40.0)) == KVScales(1.0, 1.0)
    assert kv_scales(FP8, *layer(0.0, math.inf)) == KVScales(1.0, 1.0)
