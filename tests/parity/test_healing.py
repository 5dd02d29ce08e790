"""generate(token_healing=True) through octavo.LLM: the same tokens, and the text that a pipeline would return."""

from __future__ import annotations

import random

import torch
from octavo.checkpoint import resolve
from octavo.llm import LLM
from parity.cases import TEXT

NUM_PROMPTS = 24


def test_healed_prompts_and_what_follows_equal_transformers():
    from transformers import AutoTokenizer, GPT2LMHeadModel

    path = resolve("demo")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
    rng = random.Random(6)
    starts = [rng.randrange(len(TEXT) - 90) for _ in range(NUM_PROMPTS)]
    texts = [TEXT[start : start + rng.randint(8, 90)] for start in starts]
    sampling = {"max_new_tokens": 5, "do_sample": True}
    options = {**sampling, "token_healing": True}
    with LLM("demo", device="cpu", dtype="float32") as llm:
        requests = [{"prompt": text, "seed": i, **options} for i, text in enumerate(texts)]
        results = llm.generate_each([{**request, "return_prompt_token_ids": True} for request in requests])
        whole = llm.generate_each([{**request, "include_prompt": True} for request in requests])
    num_healed = 0
    for i, text in enumerate(texts):
        inputs = tokenizer(text, return_tensors="pt")
        retokenized = tokenizer(text.strip()).input_ids
        torch.manual_seed(i)
        if len(retokenized) == inputs.input_ids.shape[1]:
            expected = model.generate(**inputs, tokenizer=tokenizer, **options)[0].tolist()
        else:  # its attention mask keeps the old length, and generate() fails or goes astray
            healed = model.heal_tokens(inputs.input_ids, tokenizer)
            expected = model.generate(healed, attention_mask=torch.ones_like(healed), **sampling)[0].tolist()
        found = results[i]
        assert [*found.prompt.token_ids, *found.token_ids] == expected
        decoded = tokenizer.decode(expected, skip_special_tokens=True)
        assert whole[i].text == decoded
        assert text.strip() + found.text == decoded or found.prompt.token_ids != retokenized
        num_healed += found.prompt.token_ids != retokenized
    assert num_healed > 2
