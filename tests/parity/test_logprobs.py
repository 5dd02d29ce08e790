"""Logprobs beside the tokens are transformers': of the chosen tokens and the most likely ones, raw and processed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from octavo.checkpoint import resolve
from octavo.llm import LLM
from parity.cases import TEXT

TOP_N = 5
SEED = 31
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "sampled": {"do_sample": True, "top_k": 40, "temperature": 0.8, "repetition_penalty": 1.2},
    "sampled without a filter": {"do_sample": True, "top_k": 0, "temperature": 1.3},
    "several sequences": {"do_sample": True, "top_k": 0, "top_p": 0.9, "num_return_sequences": 3},
    "renormalized": {"do_sample": True, "top_k": 20, "renormalize_logits": True, "num_return_sequences": 2},
}
KINDS = ["raw_logprob", "processed_logprob"]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(resolve("demo") / "tokenizer.json")).encode(TEXT).ids
    return [text[:33], text[200:217], text[400:401]]


@pytest.fixture(scope="module")
def ours(prompts: list[list[int]]) -> dict[tuple[str, str, int], Any]:
    """All in one batch: (setting, kind, number of the prompt) -> the outputs."""
    asked = [(name, kind, i) for name in SETTINGS for kind in KINDS for i in range(len(prompts))]
    requests = [
        {
            "prompt": prompts[i],
            "seed": SEED,
            "max_new_tokens": 12,
            "ignore_eos": True,
            "logprobs": TOP_N,
            "logprob_kind": kind,
            **SETTINGS[name],
        }
        for name, kind, i in asked
    ]
    with LLM("demo", dtype="float32", device="cpu", max_num_requests=64, num_blocks=400) as llm:
        results = llm.generate_each(requests)
    return {key: result if isinstance(result, list) else [result] for key, result in zip(asked, results, strict=True)}


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(resolve("demo"), dtype=torch.float32).eval()


@torch.inference_mode()
def generate(model: Any, prompt: list[int], settings: dict[str, Any]) -> Any:
    row = torch.tensor([prompt])
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(
            row,
            attention_mask=torch.ones_like(row),
            pad_token_id=0,
            eos_token_id=None,
            max_new_tokens=12,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **settings,
        )


@pytest.mark.parametrize("name", SETTINGS)
def test_logprobs_are_those_of_transformers(name: str, ours, model, prompts) -> None:
    for i, prompt in enumerate(prompts):
        found = generate(model, prompt, SETTINGS[name])
        chosen = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
        token_ids = found.sequences[:, len(prompt) :]
        rows = {
            "raw_logprob": torch.stack(found.logits, 1).log_softmax(-1),
            "processed_logprob": torch.stack(found.scores, 1).log_softmax(-1),
        }
        for kind, row in rows.items():
            outputs = ours[name, kind, i]
            assert [output.token_ids for output in outputs] == token_ids.tolist()
            logprobs = [output.logprobs for output in outputs]
            right = chosen if kind == "processed_logprob" else row.gather(-1, token_ids[..., None])[..., 0]
            _assert_close([values.chosen for values in logprobs], right)
            top = row.topk(TOP_N)
            _assert_close([values.top_values for values in logprobs], top.values, relative=1e-5)
            ids = torch.tensor([values.top_token_ids for values in logprobs])
            kept = top.values.isfinite()  # of tokens that are filtered away, any may stand there
            assert (ids == top.indices)[kept].all()


def _assert_close(found: list[Any], expected: torch.Tensor, relative: float = 2e-6) -> None:
    """Within 1e-5 and `relative`, which is more for the less likely tokens: their rounding in fp32 is larger. Both
    engines' values are up to 9e-6 away from those of fp64."""
    torch.testing.assert_close(torch.tensor(found), expected.float(), rtol=relative, atol=1e-5)
