"""docs/generation.md, rendered from `octavo.generation_table`: python -m octavo.generation_docs > docs/generation.md"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from octavo.generation_table import (
    CONFIG,
    EXTENSIONS,
    GENERATE,
    PIPELINE,
    Entry,
    Ignored,
    Rejected,
    Supported,
)

HEAD: Final = """# Parameters of generation

Rendered from `engine/octavo/generation_table.py`: `python -m octavo.generation_docs > docs/generation.md`.
`tests/test_generation_gate.py` compares the table with the installed transformers: a name that is new there fails.

A request sets parameters by their names in transformers. A field that it leaves unset has the value of the checkpoint's
`generation_config.json`, else the default of `generate()` (not that of the pipeline). Nothing is ignored: a value that
transformers refuses, or warns about and drops, is INVALID_ARGUMENT with the field's name, all at once; so are NaN,
infinities, and ids outside of the vocabulary. Integers do where transformers wants a float. Ranges and limits are in
`proto/octavo_proto/v1/types.proto`.

- **Supported** names do what they do in `generate()` with this prompt alone, whatever else the engine runs. The test
  named compares the tokens with it; mixes of all are compared in `tests/parity/test_parity.py`.
- **Ignored** names are accepted by the Python client and in `generation_config.json`, and do nothing: by their own
  meaning no value of them can change a result here.
- **Rejected** names are refused with the message given, unless they are None, False or at their default.

A logits row passes, in this order: guidance_scale; sequence_bias and logit_bias; encoder_repetition_penalty;
repetition_penalty; frequency_penalty; presence_penalty; no_repeat_ngram_size; encoder_no_repeat_ngram_size;
bad_words_ids and bad_words; min_length; min_new_tokens; allowed_token_ids and structured_output; forced_bos_token_id;
forced_eos_token_id; remove_invalid_values; exponential_decay_length_penalty; suppress_tokens; begin_suppress_tokens;
then, when sampling: temperature; top_h; top_k; top_p; min_p; typical_p; epsilon_cutoff; eta_cutoff; then
watermarking_config and renormalize_logits. With beams the row is log_softmax'ed first. Every token that is equal to the
last one a filter keeps is kept as well; transformers cuts among equals by the order of its sort in top_p, typical_p and
top_h.
"""


def render() -> str:
    """The whole file."""
    parts = [
        HEAD,
        *_section(f"The {len(CONFIG)} fields of GenerationConfig", CONFIG),
        *_section("Arguments of generate()", GENERATE),
        *_section("Arguments of the text-generation pipeline", PIPELINE),
        "## Parameters that generate() does not have\n",
        _table(("name", "meaning"), [(f"`{name}`", meaning) for name, meaning in EXTENSIONS.items()]),
    ]
    return "\n".join(parts)


def _section(title: str, entries: dict[str, Entry]) -> list[str]:
    supported = [(f"`{name}`", e.meaning, f"`{_test(e)}`") for name, e in entries.items() if isinstance(e, Supported)]
    ignored = [(f"`{name}`", e.reason) for name, e in entries.items() if isinstance(e, Ignored)]
    rejected = [(f"`{name}`", e.message) for name, e in entries.items() if isinstance(e, Rejected)]
    return [
        f"## {title}\n",
        _table((f"supported ({len(supported)})", "meaning", "compared in"), supported),
        _table((f"ignored ({len(ignored)})", "reason"), ignored),
        _table((f"rejected ({len(rejected)})", "message"), rejected),
    ]


def _test(entry: Supported) -> str:
    return entry.test.partition("::")[0].removeprefix("tests/")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
