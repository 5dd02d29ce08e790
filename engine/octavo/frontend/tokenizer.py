"""GPT-2's tokenizer over `tokenizers`, with the behaviour of transformers' GPT2Tokenizer."""

from __future__ import annotations


class Tokenizer: ...
