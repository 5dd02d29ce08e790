"""What octavo does with every name of transformers' generate(): one line each, for the client, the docs and the gate.

A name is Supported (and a test compares it with transformers), Ignored (no value of it can change a result here) or
Rejected (any value but its neutral one is refused, with this message). Nothing of octavo is imported here, so that the
client can use it. docs/generation.md is rendered from it; tests/test_generation_gate.py compares it with the installed
transformers, and a name that is missing here fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

_ALONE: Final = "tests/parity/test_each_parameter.py::test_parameter_alone_gives_the_tokens_of_generate"


@dataclass(frozen=True, slots=True)
class Supported:
    meaning: str
    """What it does, and what is easy to get wrong."""
    test: str = _ALONE
    """Compares it with transformers: path::function, run with the name as a parameter where it is the default."""


@dataclass(frozen=True, slots=True)
class Ignored:
    reason: str


@dataclass(frozen=True, slots=True)
class Rejected:
    message: str
    neutral: Any = None
    """Passes, as None and False do."""


Entry = Supported | Ignored | Rejected

_CACHE: Final = Ignored("there is one paged cache, and results do not depend on it")
_FORWARD: Final = Ignored("says how transformers runs its forward pass")
_HEADS: Final = "needs a model with such heads, GPT-2 has none"
_DRAFT: Final = "how to draft tokens is the operator's choice and never changes a result"
_CALLABLE: Final = Rejected(
    "Python objects cannot cross the network; use structured_output, allowed_token_ids or stop_strings"
)
_TOKENIZER: Final = Rejected("the server uses the checkpoint's own tokenizer; send token ids for another")
_PIPELINE: Final = Rejected("not an option of the server; use truncate_to_last or truncate_to_fit")
_CHAT: Final = Rejected("for chats; GPT-2 continues text")
_ENCODER: Final = Rejected("for encoder-decoder models only")
_GROUPS: Final = "group beam search is not implemented; use num_beams"
_LOGPROBS: Final = "tests/parity/test_each_parameter.py::test_values_of_chosen_tokens_are_those_of_generate"

CONFIG: Final[dict[str, Entry]] = {
    # Length and stopping
    "max_new_tokens": Supported("most tokens to generate; 20 when nothing sets a length"),
    "max_length": Supported("the same as a total that includes the prompt; excludes max_new_tokens"),
    "min_new_tokens": Supported("tokens before which every end-of-sequence token is banned"),
    "min_length": Supported("the same as a total that includes the prompt; excludes min_new_tokens"),
    "eos_token_id": Supported("one id or several; None is ignore_eos; part of the ids, not of the text"),
    "stop_strings": Supported("matched on bytes, a match may begin in the prompt; the text is not trimmed"),
    "max_time": Supported("seconds from the prompt's first step, without the queue; at least one token"),
    "bos_token_id": Supported(
        "what an empty text prompt starts from",
        "tests/parity/test_each_parameter.py::test_empty_prompt_starts_from_bos_as_in_generate",
    ),
    # Choosing
    "do_sample": Supported("false is the default, also when temperature is set"),
    "temperature": Supported("any finite number above 0; 0 is greedy (transformers: an error)"),
    "top_k": Supported("50 by default once do_sample is on; 0 is off; ties with the k-th stay"),
    "top_p": Supported("0 to 1; tokens equal to the last one kept stay, too"),
    "min_p": Supported("0 to 1, a part of the largest probability"),
    "typical_p": Supported("above 0, to 1"),
    "top_h": Supported("above 0, to 1; looks at the 100 most likely tokens, even at 1"),
    "epsilon_cutoff": Supported("0 is off; below 1"),
    "eta_cutoff": Supported("0 is off; below 1"),
    "num_return_sequences": Supported("above 1 needs do_sample, or as many beams"),
    "num_beams": Supported("beam search, or beam sampling with do_sample; nothing is streamed before its end"),
    "length_penalty": Supported("exponent of the generated tokens, end-of-sequence included; needs num_beams above 1"),
    "early_stopping": Supported('false, true or "never"; needs num_beams above 1'),
    # Processors
    "sequence_bias": Supported("biases of sequences, summed per token, added once; any finite number"),
    "encoder_repetition_penalty": Supported("acts on GPT-2, too: the encoder's input is the prompt"),
    "repetition_penalty": Supported("on every token of prompt and output, once"),
    "no_repeat_ngram_size": Supported("over prompt and output; 0 is off"),
    "encoder_no_repeat_ngram_size": Supported("n-grams of the prompt; 0 is off"),
    "bad_words_ids": Supported("prefixes match anywhere; just an end-of-sequence token is refused, not dropped"),
    "forced_bos_token_id": Supported("acts after a prompt of one token only"),
    "forced_eos_token_id": Supported("one id or several; acts on the last token that the length allows"),
    "remove_invalid_values": Supported("after the bans, which become finite"),
    "exponential_decay_length_penalty": Supported("(start, factor); needs an end-of-sequence token"),
    "suppress_tokens": Supported("never generated; an empty list clears the checkpoint's"),
    "begin_suppress_tokens": Supported("not generated first; an empty list clears the checkpoint's"),
    "renormalize_logits": Supported("shows in processed logprobs and in beams"),
    "guidance_scale": Supported(
        "twice the work: a second branch starts from negative_prompt; excludes beams, which generate() mixes up there"
    ),
    "watermarking_config": Supported(
        "either class or a dict; acts on greedy rows, too; SynthID's memory stays with the row of a beam"
    ),
    # Without a change of the result
    "prompt_lookup_num_tokens": Supported(
        "0 to 32; a hint: the tokens never depend on it, in transformers sampled ones do; not with beams; on a GPU at "
        "most 15, and 0 where the host chooses the tokens (guidance, watermarks, structured outputs)"
    ),
    "max_matching_ngram_size": Supported("1 to 16, 2 by default: the longest n-gram that is looked up"),
    "token_healing": Supported(
        "the prompt's last token is chosen anew among those that extend it",
        "tests/parity/test_healing.py::test_healed_prompts_and_what_follows_equal_transformers",
    ),
    "output_scores": Supported(
        "logprobs of kind PROCESSED_LOGIT: chosen, top and requested tokens; of beams, along their ancestry", _LOGPROBS
    ),
    "output_logits": Supported("the same of kind RAW_LOGIT", _LOGPROBS),
    # Ignored
    "use_cache": _CACHE,
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "prefill_chunk_size": _CACHE,
    "compile_config": _FORWARD,
    "disable_compile": _FORWARD,
    "continuous_batching_config": _FORWARD,
    "pad_token_id": Ignored("nothing is padded"),
    "return_dict_in_generate": Ignored("the shape of a Python return value"),
    "transformers_version": Ignored("says where a file comes from"),
    # Rejected
    "output_attentions": Rejected("paged attention never forms that matrix"),
    "output_hidden_states": Rejected("not implemented; ask for logprobs instead"),
    "penalty_alpha": Rejected("contrastive search is not implemented; use do_sample or num_beams", 0),
    "num_beam_groups": Rejected(_GROUPS, 1),
    "diversity_penalty": Rejected(_GROUPS, 0.0),
    "dola_layers": Rejected("DoLa is not implemented"),
    "force_words_ids": Rejected("constrained beam search is not implemented; use structured_output"),
    "constraints": Rejected("Python objects cannot cross the network; use structured_output"),
    "low_memory": Rejected("removed from transformers as well"),
    "use_mtp": Rejected(_HEADS),
    "assistant_early_exit": Rejected(_HEADS),
    "speculation_type": Rejected(_HEADS),
    "is_assistant": Rejected(_DRAFT),
    "num_assistant_tokens": Rejected(_DRAFT, 20),
    "num_assistant_tokens_schedule": Rejected(_DRAFT, "constant"),
    "assistant_confidence_threshold": Rejected(_DRAFT, 0.4),
    "assistant_lookbehind": Rejected(_DRAFT, 10),
    "target_lookbehind": Rejected(_DRAFT, 10),
    "assistant_ensemble_weight": Rejected("it changes the distribution; octavo never does"),
    "decoder_start_token_id": _ENCODER,
}
"""Every field of GenerationConfig."""

GENERATE: Final[dict[str, Entry]] = {
    "inputs": Supported("the prompt: text, token ids, or a list of those"),
    "input_ids": Supported("the same"),
    "generation_config": Supported(
        "a GenerationConfig or a dict; None inside it is unset",
        "tests/client/test_params.py::test_every_processor_of_a_real_generation_config_is_taken",
    ),
    "negative_prompt_ids": Supported(
        "negative_prompt; needs guidance_scale",
        "tests/parity/test_guidance.py::test_every_token_of_guided_requests_equals_transformers_alone",
    ),
    "attention_mask": Supported(
        "ones only: nothing is padded",
        "tests/client/test_params.py::test_bad_keyword_is_refused_by_name_before_anything_is_sent",
    ),
    "negative_prompt_attention_mask": Supported(
        "ones only: nothing is padded", "tests/client/test_params.py::test_keyword_reaches_the_wire_as_documented"
    ),
    "use_cache": _CACHE,
    "logits_processor": _CALLABLE,
    "stopping_criteria": _CALLABLE,
    "prefix_allowed_tokens_fn": _CALLABLE,
    "custom_generate": _CALLABLE,
    "assistant_model": Rejected(_DRAFT),
    "assistant_tokenizer": Rejected(_DRAFT),
    "tokenizer": _TOKENIZER,
    "streamer": Rejected("use client.stream(...)"),
    "synced_gpus": Rejected("not a choice of the client"),
    "trust_remote_code": Rejected("the server runs no code of a checkpoint"),
    "inputs_embeds": Rejected("send text or token ids"),
    "position_ids": Rejected("positions follow from the prompt"),
    "token_type_ids": Rejected("send text or token ids"),
    "past_key_values": Rejected("the server's prefix cache takes its place"),
    "encoder_hidden_states": _ENCODER,
    "encoder_attention_mask": _ENCODER,
    "labels": Rejected("for training; ask for prompt_logprobs instead"),
    "logits_to_keep": Rejected("ask for prompt_logprobs instead", 0),
}
"""Every argument of GenerationMixin.generate(), with those that it takes from its **kwargs or hands on to GPT-2."""

_TEXT: Final = "tests/client/test_params.py::test_keyword_reaches_the_wire_as_documented"
PIPELINE: Final[dict[str, Entry]] = {
    "text_inputs": Supported("the prompt, or a list of prompts", _TEXT),
    "return_full_text": Supported("include_prompt: the prompt as it was sent, then the new text", _TEXT),
    "return_text": Supported("false skips detokenization", _TEXT),
    "return_tensors": Supported("true is return_text=false: token ids are returned anyway", _TEXT),
    "prefix": Supported("put before a text prompt", _TEXT),
    "handle_long_generation": Supported(
        '"hole" is truncate_to_fit',
        "tests/parity/test_stopping.py::test_hole_keeps_of_a_long_prompt_what_the_pipeline_keeps",
    ),
    "stop_sequence": Supported("stop_strings", _TEXT),
    "max_length": Supported("as in generate()"),
    "skip_special_tokens": Supported("true by default", _TEXT),
    "add_special_tokens": Supported("true by default, which adds nothing with GPT-2's tokenizer", _TEXT),
    "return_type": Rejected("use return_tensors or return_full_text"),
    "clean_up_tokenization_spaces": _TOKENIZER,
    "truncation": _PIPELINE,
    "padding": Rejected("nothing is padded"),
    "tokenizer_encode_kwargs": _PIPELINE,
    "continue_final_message": _CHAT,
    "tools": _CHAT,
    "documents": _CHAT,
}
"""Every argument of a call of transformers' TextGenerationPipeline."""

EXTENSIONS: Final[dict[str, str]] = {
    "stop_token_ids": "more end-of-sequence ids, with a finish reason of their own",
    "ignore_eos": "as if there were no end-of-sequence token",
    "stop_string_output": "what of a matched stop string the text keeps",
    "stop_strings_ignore_prompt": "a match may not begin in the prompt",
    "seed": "the tokens of generate() after torch.manual_seed(seed) on the same kind of device",
    "frequency_penalty": "per occurrence in the output",
    "presence_penalty": "once for what occurs in the output",
    "logit_bias": "biases of single tokens, -100 to 100, added together with sequence_bias",
    "bad_words": "bad_words_ids as text: each word as written, and after a space",
    "allowed_token_ids": "only these tokens; generate() has prefix_allowed_tokens_fn for it",
    "negative_prompt": "negative_prompt_ids, or as text",
    "structured_output": "a JSON Schema, a regular expression, a grammar, or one of several texts; not with beams",
}
"""Parameters that generate() does not have."""

TABLES: Final = (CONFIG, GENERATE, PIPELINE)
