"""Names of `generate()`'s keywords that are not fields of the wire: other spellings, neutral ones, refused ones.

Which names are neutral or refused, and why, is said in `octavo.generation_table`.
"""

from __future__ import annotations

from typing import Any, Final

from octavo.generation_table import CONFIG, TABLES, Ignored, Rejected

ALIASES: Final[dict[str, str]] = {
    "response_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "n": "num_return_sequences",
    "stop": "stop_strings",
    "stop_sequence": "stop_strings",
    "return_full_text": "include_prompt",
    "negative_prompt_ids": "negative_prompt",
}
"""Another spelling -> the field that it sets."""

OFF: Final[dict[str, Any]] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_eos_token_id": [],
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "guidance_scale": 1.0,
    "min_new_tokens": 0,
    "min_length": 0,
}
"""What an explicit None means in `generate()`: it switches off what the checkpoint sets. Any other field: unset.
`eos_token_id=None` is `ignore_eos=True`."""

NEUTRAL: Final[frozenset[str]] = frozenset(name for name, entry in CONFIG.items() if isinstance(entry, Ignored))
"""Accepted and not sent: no value of these can change a result here (no padding, one cache)."""

REJECTED: Final[dict[str, tuple[Any, str]]] = {
    name: (entry.neutral, entry.message)
    for table in TABLES
    for name, entry in table.items()
    if isinstance(entry, Rejected)
}
"""Refused by name: (the value that passes besides None and False, why and what to use instead)."""
