"""Makes a checkpoint of one of GPT-2's shapes with random bf16 weights and a made-up vocabulary of GPT-2's size.

Speed does not depend on the values of weights, nor on which merges a tokenizer has. Needs no network.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

SHAPES = {
    "tiny": {"n_embd": 128, "n_layer": 2, "n_head": 2},
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
VOCAB_SIZE = 50257


def make(folder: Path, shape: str) -> None:
    """Writes weights, config and tokenizer into `folder`; config.json last, so that its presence means all is there."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, **SHAPES[shape])).to(torch.bfloat16)
    parts = folder / "parts"
    model.save_pretrained(parts)
    for part in sorted(parts.iterdir(), key=lambda path: path.name == "config.json"):
        part.rename(folder / part.name)
    parts.rmdir()


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 256 bytes, 50,000 merges of two bytes, and the end of text."""
    from tokenizers import ByteLevelBPETokenizer, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(itertools.islice(itertools.product(symbols, symbols), VOCAB_SIZE - 257))
    names = [*symbols, *(first + second for first, second in merges), "<|endoftext|>"]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = ByteLevelBPETokenizer(vocab, merges)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.save_model(str(folder))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 1024}))


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2])
