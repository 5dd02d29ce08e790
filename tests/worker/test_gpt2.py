"""Logits of GPT2 against transformers' GPT2LMHeadModel, for every variant and every way to cut the work."""

import copy

import pytest
import torch
from octavo.checkpoint import ModelSpec
from octavo.errors import StartupError
from octavo.worker.attention import TorchAttention
from octavo.worker.gpt2 import GPT2
from octavo_kernels.activations import ACTIVATIONS
from transformers import GPT2Config, GPT2LMHeadModel
from worker.paged import CPU, all_logits, make_batch, poisoned_cache

VOCAB = 199  # odd, as GPT-2's is
SHAPE = {"vocab_size": VOCAB, "n_positions": 96, "n_embd": 64, "n_layer": 2, "n_head": 2}
FP32_TOLERANCE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference_model(seed: int = 0, **fields) -> GPT2LMHeadModel:
    """A random model whose weights are large enough for attention to be sharp and activations to bend."""
    torch.manual_seed(seed)
    config = GPT2Config(**{**SHAPE, **fields}, bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if "wte" in name or "wpe" in name else 0.12
            parameter.copy_(torch.randn_like(parameter) * scale + (1.0 if "ln" in name and "weight" in name else 0.0))
    return model


def octavo_model(model: GPT2LMHeadModel, dtype=torch.float32, quantization=None, device=CPU, **fields) -> GPT2:
    spec = ModelSpec(**{**SHAPE, **fields}, bos_token_id=0, eos_token_id=0)
    tensors = {name.removeprefix("transformer."): tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if spec.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return GPT2(spec, copy.deepcopy(tensors), device=device, dtype=dtype, quantization=quantization)


def expected_logits(model: GPT2LMHeadModel, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(tokens[None]).logits[0].float() for tokens in sequences]


def some_sequences(lengths=(70, 33, 3, 64, 17, 90)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in lengths]


PROMPT_LENS = [60, 32, 1, 63, 5, 71]


def largest_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """As a multiple of the expected logits' standard deviation, which is 1 to 5 here."""
    assert all(torch.isfinite(logits).all() for logits in found)
    difference = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    return difference / float(torch.cat(expected).std())


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_logits_equal_transformers_for_any_chunks_and_blocks(chunk, block_size):
    reference, sequences = reference_model(), some_sequences()
    found = all_logits(octavo_model(reference), sequences, PROMPT_LENS, chunk=chunk, block_size=block_size)
    assert largest_difference(found, expected_logits(reference, sequences)) < FP32_TOLERANCE


@pytest.mark.parametrize(
    "fields",
    [
        {"n_inner": 100},
        {"n_positions": 90},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False},
        {"layer_norm_epsilon": 1e-2},
        {"n_head": 1, "n_layer": 1},
        *({"n_embd": 2 * size} for size in (32, 80, 96, 128)),
    ],
    ids=str,
)
def test_every_variant_equals_transformers(fields):
    reference, sequences = reference_model(**fields), some_sequences()
    found = all_logits(octavo_model(reference, **fields), sequences, PROMPT_LENS, chunk=25, block_size=16)
    assert largest_difference(found, expected_logits(reference, sequences)) < 2 * FP32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_every_activation_equals_transformers(name, dtype):
    reference, sequences = reference_model(activation_function=name).to(dtype).float(), some_sequences((40,))
    model = octavo_model(reference, dtype, activation_function=name)
    found = all_logits(model, sequences, [31], chunk=16, block_size=16, cache_dtype=dtype)
    expected = expected_logits(reference, sequences)
    assert largest_difference(found, expected) < (2 * FP32_TOLERANCE if dtype is torch.float32 else 0.06)


@pytest.mark.parametrize("name", ["xielu", "prelu", "no_such"])
def test_an_activation_with_weights_or_unknown_is_refused_by_name(name):
    with pytest.raises(StartupError, match=f"config.json: activation_function '{name}'"):
        GPT2(ModelSpec(activation_function=name), {}, device=CPU, dtype=torch.float32)


def test_bf16_stays_within_its_rounding_of_fp32():
    reference, sequences = reference_model().bfloat16().float(), some_sequences()
    model = octavo_model(reference, torch.bfloat16)
    found = all_logits(model, sequences, PROMPT_LENS, chunk=20, block_size=32, cache_dtype=torch.bfloat16)
    assert largest_difference(found, expected_logits(reference, sequences)) < 0.06


def test_int8_stays_within_a_tenth_of_the_logits_spread():
    reference, sequences = reference_model(), some_sequences()
    model = octavo_model(reference, torch.bfloat16, quantization="int8")
    found = all_logits(model, sequences, PROMPT_LENS, chunk=20, block_size=32, cache_dtype=torch.bfloat16)
    expected = expected_logits(reference, sequences)
    errors = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)])
    assert torch.isfinite(errors).all()
    assert float(errors.std()) < 0.1 * float(torch.cat(expected).std())


def test_a_model_in_bf16_with_a_weight_beyond_fp16_is_still_right():
    reference = reference_model()
    with torch.no_grad():
        reference.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e6
        reference.transformer.h[0].mlp.c_proj.weight[0] = 0
    reference, sequences = reference.bfloat16().float(), some_sequences((30,))
    model = octavo_model(reference, torch.bfloat16)
    found = all_logits(model, sequences, [20], chunk=20, block_size=16, cache_dtype=torch.bfloat16)
    assert largest_difference(found, expected_logits(reference, sequences)) < 0.06


def test_a_decode_row_in_fp32_gives_the_same_bits_alone_and_in_any_batch():
    reference, sequences = reference_model(), some_sequences((70, 33, 3, 64, 17, 90, 66, 65))
    model = octavo_model(reference)
    cache = poisoned_cache(model.spec, 60, 16, torch.float32)
    tables = torch.arange(1, 49).view(8, 6).numpy()
    prompts = [(tokens[:-1], 0, table) for tokens, table in zip(sequences, tables, strict=True)]
    model.forward(make_batch(prompts, 16), cache)
    rows = [(tokens[-1:], len(tokens) - 1, table) for tokens, table in zip(sequences, tables, strict=True)]
    together = model.logits(model.forward(make_batch(rows, 16), cache))
    for i, row in enumerate(rows):
        assert torch.equal(model.logits(model.forward(make_batch([row], 16), cache))[0], together[i])


def test_the_reference_ops_equal_transformers():
    reference, sequences = reference_model(), some_sequences()
    model = octavo_model(reference)
    model.attention = TorchAttention(model.spec)
    found = all_logits(model, sequences, PROMPT_LENS, chunk=25, block_size=16)
    assert largest_difference(found, expected_logits(reference, sequences)) < FP32_TOLERANCE


def test_quantization_is_refused_beside_a_gpu_and_by_unknown_names():
    with pytest.raises(StartupError, match="int8"):
        GPT2(ModelSpec(), {}, device=torch.device("cuda"), dtype=torch.bfloat16, quantization="int8")
    with pytest.raises(ValueError, match="int3"):
        GPT2(ModelSpec(), {}, device=CPU, dtype=torch.bfloat16, quantization="int3")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_ops_on_a_gpu_equal_transformers(dtype):
    reference, sequences = reference_model().to(dtype).float(), some_sequences()
    model = octavo_model(reference, dtype, device=torch.device("cuda:0"))
    found = all_logits(model, sequences, PROMPT_LENS, chunk=25, block_size=32, cache_dtype=dtype)
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    assert largest_difference(found, expected_logits(reference, sequences)) < tolerance
