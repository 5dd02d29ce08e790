"""What a setting of the engine costs in quality: perplexity, and greedy tokens beside those of another setting.

    python bench/quality.py                                          float32 against bfloat16 on the bundled model
    python bench/quality.py --a dtype=bfloat16 --b dtype=bfloat16,quantization=int8
    python bench/quality.py --a kv_cache_dtype=auto --b kv_cache_dtype=fp8
    python bench/quality.py --model FOLDER --text FILE --window 1024

`--a` and `--b` are keywords of `octavo.LLM`; A is what B is held against.

perplexity     of the text in windows, through prompt_logprobs: each token given those before it in its window. It is
               `quality_text.txt`: public domain, by authors whom the bundled model was not trained on. The ratio
               has its standard error, as if tokens were independent
difference     mean over tokens of |log p under B - log p under A|, and the largest
greedy         both complete the windows' beginnings by `--new` tokens: part of the tokens that are the same, and mean
               number of tokens before the first difference (`--new` where there is none)

On CPUs without bf16 products the engine computes in float32 on weights stored in bfloat16: then the two settings of
the default are the same where the checkpoint's weights are bfloat16, as the bundled ones are.

Records go to the end of bench/results/quality.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import numpy as np
import turns
from contenders import agreement
from octavo import checkpoint
from octavo.llm import LLM
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "bench" / "quality_text.txt"


@dataclass
class Quality:
    """What one setting says about the text."""

    setting: str
    device: str
    dtype: str
    logprobs: list[list[float]]
    """Of each token of each window but the first of a window."""
    greedy: list[list[int]]

    @property
    def perplexity(self) -> float:
        return math.exp(-float(np.mean(np.concatenate(self.logprobs))))


def main() -> int:
    options = parse()
    first, second = (evaluate(options, setting) for setting in (options.a, options.b))
    lines = compare(first, second, options.new)
    header = environment.describe() | {"device": second.device, "gpu": environment.gpu_state()}
    header["settings"] = {"model": Path(options.model).name, "text": Path(options.text).name, "window": options.window}
    turns.append(options.out, header, lines)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default=str(TEXT))
    parser.add_argument("--a", default="dtype=float32", metavar="NAME=VALUE,...")
    parser.add_argument("--b", default="dtype=bfloat16", metavar="NAME=VALUE,...")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--windows", type=int, default=0, help="at most; 0: all of the text")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a window that are completed")
    parser.add_argument("--new", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "quality.jsonl"), help='"" to write nothing')
    return parser.parse_args()


def keywords(setting: str) -> dict[str, Any]:
    """Values are JSON where they can be read as such, else strings."""
    found: dict[str, Any] = {}
    for pair in setting.split(","):
        name, _, value = pair.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def evaluate(options: argparse.Namespace, setting: str) -> Quality:
    windows = split(options)
    beginnings = [window[: options.prompt] for window in windows]
    with LLM(options.model, enable_prefix_caching=False, **keywords(setting)) as llm:
        scored = llm.generate(windows, max_new_tokens=1, prompt_logprobs=0)
        completed = llm.generate(beginnings, max_new_tokens=options.new, ignore_eos=True)
        return Quality(
            setting,
            llm.info.device,
            llm.info.dtype,
            [list(output.prompt.logprobs.chosen) for output in scored],
            [list(output.token_ids) for output in completed],
        )


def split(options: argparse.Namespace) -> list[list[int]]:
    """Token ids of the text in windows; a last piece with nothing to complete is left out."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.resolve(options.model))
    ids: list[int] = tokenizer(Path(options.text).read_text(), verbose=False)["input_ids"]
    windows = [ids[i : i + options.window] for i in range(0, len(ids), options.window)]
    return [window for window in windows if len(window) > options.prompt][: options.windows or None]


def compare(first: Quality, second: Quality, new_tokens: int) -> list[dict[str, Any]]:
    """Prints the table and returns its records."""
    lines: list[dict[str, Any]] = []
    tokens = sum(map(len, first.logprobs))
    print(f"{tokens} tokens in {len(first.logprobs)} windows; {len(first.greedy)} x {new_tokens} greedy tokens")
    for name, quality in (("A", first), ("B", second)):
        print(f"{name}  perplexity {quality.perplexity:9.4f}   {quality.setting} ({quality.device}, {quality.dtype})")
        described = {"setting": quality.setting, "device": quality.device, "dtype": quality.dtype}
        lines.append({"record": "setting", "name": name, **described, "perplexity": quality.perplexity})
    signed = np.concatenate(first.logprobs) - np.concatenate(second.logprobs)
    differences = np.abs(signed)
    same = agreement(second.greedy, first.greedy)
    equal = [agreeing(ours, theirs) for ours, theirs in zip(second.greedy, first.greedy, strict=True)]
    ratio = second.perplexity / first.perplexity
    error = ratio * float(signed.std()) / math.sqrt(tokens)
    print(
        f"B / A: perplexity {ratio:.5f} +- {error:.5f}; |difference of log p| {differences.mean():.5f}, at most "
        f"{differences.max():.4f}\n"
        f"greedy: {same:.4f} of the tokens are the same; {np.mean(equal):.1f} of {new_tokens} before the first "
        "difference"
    )
    lines.append(
        {
            "record": "comparison",
            "tokens": tokens,
            "perplexity_ratio": ratio,
            "perplexity_ratio_error": error,
            "logprob_difference_mean": float(differences.mean()),
            "logprob_difference_most": float(differences.max()),
            "greedy_agreement": same,
            "greedy_tokens_before_difference": float(np.mean(equal)),
            "greedy_tokens": new_tokens,
        }
    )
    return lines


def agreeing(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first difference."""
    pairs = zip(ours, theirs, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours))


if __name__ == "__main__":
    sys.exit(main())
