"""gpt2-large's shape with random weights: the tokens of transformers, in bounded memory."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROMPTS = [[464, 3290, 318], [15496] * 5, list(range(1000, 1060)), [50256], [198, 262, 11] * 10]
NEW_TOKENS = 12
CACHE_BYTES = 512 << 20
SLACK_BYTES = 1536 << 20

# In a process of its own: its peak memory is the engine's.
ENGINE = """
import json, resource, sys
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from parity.cases import Case
from parity.engine import engine_answers

path, prompts, new_tokens, memory = json.loads(sys.argv[1])
config = EngineConfig(
    model=ModelConfig(path=path, name="large", device="cpu", dtype="float32"),
    cache=CacheConfig(memory=memory),
    scheduler=SchedulerConfig(max_num_requests=16, max_chunk_tokens=16),
)
cases = [Case(prompt, 0, 1, new_tokens, {"do_sample": False}) for prompt in prompts]
answers, _ = engine_answers(config, cases, order_seed=0)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"tokens": [answer.token_ids[0] for answer in answers], "peak": peak}))
"""


@torch.inference_mode()
def make_checkpoint(path: Path) -> tuple[int, list[list[int]]]:
    """Saves a random gpt2-large; returns the bytes of its weights and transformers' greedy tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=1280, n_layer=36, n_head=20)
    model = GPT2LMHeadModel(config).eval()
    model.transformer.wte.weight.mul_(4.0)  # logits far enough apart that the last bit decides nothing
    model.save_pretrained(path)
    tokens = []
    for prompt in PROMPTS:
        row = torch.tensor([prompt])
        mask = torch.ones_like(row)
        out = model.generate(row, attention_mask=mask, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0)
        tokens.append(out[0, len(prompt) :].tolist())
    return sum(parameter.numel() * 4 for parameter in model.parameters()), tokens


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gpt2_large_shape_equals_transformers_within_its_memory(tmp_path: Path):
    weight_bytes, expected = make_checkpoint(tmp_path)
    gc.collect()
    arguments = json.dumps([str(tmp_path), PROMPTS, NEW_TOKENS, CACHE_BYTES])
    result = subprocess.run(
        [sys.executable, "-c", ENGINE, arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["tokens"] == expected
    print(f"peak {found['peak'] / 2**30:.2f} GiB, weights {weight_bytes / 2**30:.2f} GiB")
    assert found["peak"] <= weight_bytes + CACHE_BYTES + SLACK_BYTES
