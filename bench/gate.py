"""Are the tokens right on this device? Exit status 1 if not. Run it before believing any time.

    python bench/gate.py                       CUDA, or the CPU where there is none

fp32    the bundled model completes `--prompts` beginnings of the text, all in one batch, greedily: exactly the
        tokens of transformers' generate(), one prompt at a time on the same device
bf16    a random gpt2-large: the parts of the positions of fp32's completions at which octavo and transformers in bf16
        find fp32's token the likeliest; octavo's may be lower by `--margin`. Greedy agreement is reported beside it:
        one near tie makes all later tokens differ there
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch
from contenders import agreement, prepare_checkpoint
from octavo import checkpoint
from octavo.llm import LLM
from quality import TEXT
from transformers import AutoTokenizer, GPT2LMHeadModel
from workloads import LARGEST_TOKEN, prompts

Tokens = list[list[int]]


def main() -> int:
    options = parse()
    passed = [exact(options), close(options)]
    return 0 if all(passed) else 1


def parse() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--shape", default="gpt2-large" if on_gpu else "gpt2", help="of the random model in bf16")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--margin", type=float, default=0.02)
    return parser.parse_args()


def exact(options: argparse.Namespace) -> bool:
    path = checkpoint.resolve(checkpoint.DEMO)
    ids = AutoTokenizer.from_pretrained(path)(TEXT.read_text(), verbose=False)["input_ids"]
    asked = [ids[17 * i : 17 * i + 1 + 3 * i % 90] for i in range(options.prompts)]
    ours = complete(options, str(path), "float32", asked)
    model = load(options, path, torch.float32)
    theirs = [generate(model, [prompt], options.new)[0] for prompt in asked]
    wrong = [i for i in range(len(asked)) if ours[i] != theirs[i]]
    print(f"fp32, {options.device}: {len(asked) - len(wrong)} of {len(asked)} completions are transformers'")
    for i in wrong[:3]:
        at = next(k for k, (a, b) in enumerate(zip(ours[i], theirs[i], strict=True)) if a != b)
        print(f"  prompt {i} ({len(asked[i])} tokens): token {at} is {ours[i][at]}, not {theirs[i][at]}")
    return not wrong


def close(options: argparse.Namespace) -> bool:
    path = prepare_checkpoint(options.shape)
    asked = prompts([(11 + 5 * i, options.new) for i in range(min(8, options.prompts))], "gate")
    assert max(map(max, asked)) <= LARGEST_TOKEN
    model = load(options, path, torch.float32)
    truth = [generate(model, [prompt], options.new)[0] for prompt in asked]
    model = load(options, path, torch.bfloat16)
    greedy = agreement([generate(model, [prompt], options.new)[0] for prompt in asked], truth)
    theirs = sum(likeliest(model, prompt, answer) for prompt, answer in zip(asked, truth, strict=True))
    del model
    gc.collect()
    ours_greedy = agreement(complete(options, str(path), "bfloat16", asked), truth)
    with LLM(str(path), device=options.device, dtype="bfloat16") as llm:
        whole = [prompt + answer for prompt, answer in zip(asked, truth, strict=True)]
        scored = llm.generate(whole, max_new_tokens=1, ignore_eos=True, prompt_logprobs=0)
        ours = sum(rank == 1 for output in scored for rank in output.prompt.logprobs.ranks[-options.new :])
    count = len(asked) * options.new
    passed = ours / count >= theirs / count - options.margin
    print(
        f"bf16, {options.device}, {options.shape}: fp32's token is the likeliest at {ours / count:.4f} of {count} "
        f"positions, in transformers at {theirs / count:.4f}: {'passed' if passed else 'FAILED'}\n"
        f"  greedy tokens as in fp32: {ours_greedy:.4f}, in transformers {greedy:.4f}"
    )
    return passed


def complete(options: argparse.Namespace, path: str, dtype: str, asked: Tokens) -> Tokens:
    with LLM(path, device=options.device, dtype=dtype) as llm:
        outputs = llm.generate(asked, max_new_tokens=options.new, ignore_eos=True)
        return [list(output.token_ids) for output in outputs]


def load(options: argparse.Namespace, path: Path, dtype: torch.dtype) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel.from_pretrained(path, dtype=dtype).eval().to(options.device)
    model.generation_config.eos_token_id = None
    return model


def generate(model: GPT2LMHeadModel, asked: Tokens, new_tokens: int) -> Tokens:
    input_ids = torch.tensor(asked, device=model.device)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    answers: Tokens = output[:, input_ids.shape[1] :].tolist()
    return answers


@torch.inference_mode()
def likeliest(model: GPT2LMHeadModel, prompt: list[int], answer: list[int]) -> int:
    """Positions of the answer at which its token is the likeliest."""
    logits = model(torch.tensor([prompt + answer], device=model.device)).logits[0, len(prompt) - 1 : -1]
    return int((logits.argmax(-1).cpu() == torch.tensor(answer)).sum())


if __name__ == "__main__":
    sys.exit(main())
