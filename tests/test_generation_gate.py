"""Every name of the installed transformers' generate() has a status, and the status is true.

A field that a new transformers brings fails here, until `octavo/generation_table.py` says what becomes of it.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from octavo import generation_table, types
from octavo.client.params import GROUP_OF_FIELD, build, known_keywords
from octavo.client.tables import ALIASES
from octavo.frontend.defaults import checkpoint_params
from octavo.generation_docs import render
from octavo.generation_table import CONFIG, EXTENSIONS, GENERATE, PIPELINE, TABLES, Ignored, Rejected, Supported
from octavo.server import fields
from parity.test_each_parameter import PARAMETERS
from transformers import GenerationConfig, GenerationMixin, GPT2LMHeadModel, TextGenerationPipeline

ROOT = Path(__file__).parents[1]
OPEN_ENDED = {"self", "kwargs", "args", "generate_kwargs"}
POPPED_FROM_KWARGS = {"tokenizer", "assistant_tokenizer", "trust_remote_code"}
"""Arguments of generate() that its signature does not show."""
FROM_ELSEWHERE = {"prompt_text", "model_inputs", "model_outputs", "inputs"}
"""What one step of the pipeline hands to the next."""


def arguments(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - OPEN_ENDED


def test_every_field_of_generation_config_has_a_status() -> None:
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} == set(CONFIG)


def test_every_argument_of_generate_has_a_status() -> None:
    named = arguments(GenerationMixin.generate) | arguments(GPT2LMHeadModel.forward) | POPPED_FROM_KWARGS
    assert named - set(GENERATE) == set()
    assert set(GENERATE) - named == set(), "names that are no longer transformers'"


def test_every_argument_of_the_pipeline_has_a_status() -> None:
    steps = ("_sanitize_parameters", "preprocess", "_forward", "postprocess", "__call__")
    named = set[str]().union(*(arguments(getattr(TextGenerationPipeline, step)) for step in steps)) - FROM_ELSEWHERE
    assert named - set(PIPELINE) == set()
    assert set(PIPELINE) - named == set(), "names that are no longer transformers'"


def test_every_parameter_of_the_wire_is_transformers_or_an_extension() -> None:
    ours = {field.name for field in msgspec.structs.fields(types.GenerationParams)}
    assert ours - set(CONFIG) <= set(EXTENSIONS)
    assert set(EXTENSIONS) <= {name for name, group in GROUP_OF_FIELD.items() if group == "params"} - set(CONFIG)
    assert ours <= {name for name, group in GROUP_OF_FIELD.items() if group == "params"}


@cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(
    ("name", "entry"),
    [(name, entry) for table in (CONFIG, GENERATE, PIPELINE) for name, entry in table.items()],
)
def test_status_names_what_proves_it(name: str, entry: generation_table.Entry) -> None:
    match entry:
        case Supported(meaning, test):
            path, _, function = test.partition("::")
            assert function in functions_of(path), f"{name}: there is no test {test}"
            if test == Supported.__dataclass_fields__["test"].default and name not in ("inputs", "input_ids"):
                assert PARAMETERS.get(name), f"{name}: add settings to PARAMETERS of {path}"
        case Ignored(meaning) | Rejected(meaning):
            pass
    assert meaning and not meaning.endswith(".")


@pytest.mark.parametrize("name", CONFIG)
def test_server_client_and_checkpoint_treat_a_field_as_the_table_says(name: str) -> None:
    entry = CONFIG[name]
    listed = [path for path in fields.supported_fields() if path.startswith("params.")]
    on_the_wire = any(path.split(".")[1] == name for path in listed)
    assert on_the_wire == (isinstance(entry, Supported) and not name.startswith("output_"))
    assert name in known_keywords()
    if isinstance(entry, Ignored):
        assert build("x", {name: object()}).message.params.ListFields() == []
        checkpoint_params({name: "anything"}, 100)
    if isinstance(entry, Rejected):
        with pytest.raises(ValueError, match=f"^{name}: not supported: "):
            build("x", {name: "something"})
        if name != "decoder_start_token_id":  # which files of encoder-decoder models hold, and nothing reads
            checkpoint_params({name: entry.neutral}, 100)
            with pytest.raises(Exception, match=f"{name} = 'something' is not implemented"):
                checkpoint_params({name: "something"}, 100)


@pytest.mark.parametrize("name", [name for table in TABLES for name in table])
def test_client_understands_every_name(name: str) -> None:
    assert name in known_keywords() or name in ALIASES


def test_docs_are_those_of_the_table() -> None:
    written = (ROOT / "docs" / "generation.md").read_text()
    assert written == render(), "run: python -m octavo.generation_docs > docs/generation.md"
