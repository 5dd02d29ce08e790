"""Names of `generate()`'s keywords that are not fields of the wire: other spellings, neutral ones, refused ones.

The three tables and the fields of the .proto together cover every name of transformers' GenerationConfig; a test
compares them with the installed transformers.
"""

from __future__ import annotations

from typing import Any, Final

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

NEUTRAL: Final[frozenset[str]] = frozenset(
    {
        "pad_token_id",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "compile_config",
        "disable_compile",
        "prefill_chunk_size",
        "continuous_batching_config",
        "return_dict_in_generate",
        "transformers_version",
    }
)
"""Accepted and not sent: no value of these can change a result here (no padding, one cache)."""

_DRAFT = "how to draft tokens is the operator's choice and never changes a result"
_CALLABLE = "Python objects cannot cross the network; use structured_output, allowed_token_ids or stop_strings"
_TOKENIZER = "the server uses the checkpoint's own tokenizer; send token ids for another"
_PIPELINE = "not an option of the server; use truncate_to_last or truncate_to_fit"

REJECTED: Final[dict[str, tuple[Any, str]]] = {
    "output_attentions": (False, "paged attention never forms that matrix"),
    "output_hidden_states": (False, "not implemented; ask for logprobs instead"),
    "use_mtp": (False, "needs a model with such heads, GPT-2 has none"),
    "speculation_type": (None, "needs a model with such heads, GPT-2 has none"),
    "assistant_early_exit": (None, "needs a model with such heads, GPT-2 has none"),
    "assistant_model": (None, _DRAFT),
    "assistant_tokenizer": (None, _DRAFT),
    "is_assistant": (False, _DRAFT),
    "num_assistant_tokens": (20, _DRAFT),
    "num_assistant_tokens_schedule": ("constant", _DRAFT),
    "assistant_confidence_threshold": (0.4, _DRAFT),
    "assistant_lookbehind": (10, _DRAFT),
    "target_lookbehind": (10, _DRAFT),
    "assistant_ensemble_weight": (None, "it changes the distribution; octavo never does"),
    "decoder_start_token_id": (None, "for encoder-decoder models only"),
    "penalty_alpha": (None, "contrastive search is not implemented; use do_sample or num_beams"),
    "num_beam_groups": (1, "group beam search is not implemented; use num_beams"),
    "diversity_penalty": (0.0, "group beam search is not implemented; use num_beams"),
    "constraints": (None, "Python objects cannot cross the network; use structured_output"),
    "force_words_ids": (None, "constrained beam search is not implemented; use structured_output"),
    "dola_layers": (None, "DoLa is not implemented"),
    "low_memory": (None, "removed from transformers as well"),
    "logits_processor": (None, _CALLABLE),
    "stopping_criteria": (None, _CALLABLE),
    "prefix_allowed_tokens_fn": (None, _CALLABLE),
    "custom_generate": (None, _CALLABLE),
    "inputs_embeds": (None, "send text or token ids"),
    "position_ids": (None, "positions follow from the prompt"),
    "past_key_values": (None, "the server's prefix cache takes its place"),
    "streamer": (None, "use client.stream(...)"),
    "trust_remote_code": (False, "the server runs no code of a checkpoint"),
    "synced_gpus": (False, "not a choice of the client"),
    "tokenizer": (None, _TOKENIZER),
    "clean_up_tokenization_spaces": (None, _TOKENIZER),
    "truncation": (None, _PIPELINE),
    "padding": (False, "nothing is padded"),
    "tokenizer_encode_kwargs": (None, _PIPELINE),
}
"""Refused by name: (the value that passes besides None and False, why and what to use instead)."""
