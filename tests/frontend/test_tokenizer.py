"""The tokenizer equals transformers' GPT2Tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from frontend.fakes import demo, reference_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.checkpoint import resolve
from octavo.errors import StartupError
from octavo.tokenizer import Tokenizer, TokenizerError

ODD_TEXTS = [
    "",
    " ",
    "\n\n\t  \r\n",
    "I met a traveller from an antique land, who said",
    "<|endoftext|>",
    "one<|endoftext|> two <|endoftext|><|endoftext|>",
    "a\x00b",
    "\ufeffBOM and \u200bzero width",
    "שלום עולם",
    "e" + "\u0301" * 200,
    "👩‍👩‍👧‍👦 🙂🙂 é 漢字",
    "don't we'll I'VE 12345 $%^&",
]


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("add_special", [False, True])
def test_odd_texts_give_the_ids_of_transformers(text: str, split: bool, add_special: bool) -> None:
    ours = demo().tokenizer.encode([text], add_special_tokens=add_special, split_special_tokens=split)
    theirs = reference_tokenizer()(text, add_special_tokens=add_special, split_special_tokens=split).input_ids
    assert ours == [theirs]


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_round_trips_and_equals_transformers(text: str) -> None:
    ids = demo().tokenizer.encode([text])[0]
    assert ids == reference_tokenizer()(text).input_ids
    assert demo().tokenizer.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=60), st.booleans())
def test_any_ids_decode_as_in_transformers_also_to_broken_utf8(ids: list[int], skip: bool) -> None:
    expected = reference_tokenizer().decode(ids, skip_special_tokens=skip)
    assert demo().tokenizer.decode(ids, skip_special_tokens=skip) == expected


def test_spelling_of_a_special_token_is_that_token_unless_split() -> None:
    tokenizer = demo().tokenizer
    assert tokenizer.encode(["<|endoftext|>"]) == [[4095]]
    split = tokenizer.encode(["<|endoftext|>"], split_special_tokens=True)[0]
    assert 4095 not in split
    assert tokenizer.decode(split) == "<|endoftext|>"
    assert tokenizer.encode(["<|endoftext|>"]) == [[4095]], "splitting changed the tokenizer for others"


def test_vocab_and_merges_without_tokenizer_json_give_the_same_tokenizer(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(resolve("demo") / name, tmp_path)
    tokenizer = Tokenizer.load(tmp_path, 4096)
    assert tokenizer.encode(ODD_TEXTS) == demo().tokenizer.encode(ODD_TEXTS)
    assert tokenizer.token_bytes == demo().tokenizer.token_bytes
    assert tokenizer.special_ids == demo().tokenizer.special_ids


@pytest.mark.parametrize("files", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_add_bos_token_is_honoured_where_transformers_honours_it(tmp_path: Path, files: tuple[str, ...]) -> None:
    from transformers import GPT2Tokenizer

    for name in (*files, "config.json"):
        shutil.copy(resolve("demo") / name, tmp_path)
    config = json.loads((resolve("demo") / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    reference, tokenizer = GPT2Tokenizer.from_pretrained(str(tmp_path)), Tokenizer.load(tmp_path, 4096)
    for text in ("a b", ""):
        for add in (True, False):
            expected = reference(text, add_special_tokens=add).input_ids
            assert tokenizer.encode([text], add_special_tokens=add) == [expected]


def test_failing_library_is_an_error_and_never_a_crash() -> None:
    with pytest.raises(TokenizerError):
        demo().tokenizer.encode(["\ud800"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing", "neither tokenizer.json"),
        ("garbage", "not readable as JSON"),
        ("other model", "vocab_size 50257"),
        ("small model", "vocab_size 100"),
        ("merges", "do not fit together"),
    ],
)
def test_unusable_tokenizer_stops_the_start(tmp_path: Path, change: str, says: str) -> None:
    vocab_size = {"other model": 50257, "small model": 100}.get(change, 4096)
    if change == "garbage":
        (tmp_path / "tokenizer.json").write_text("{")
    elif change == "merges":
        full = json.loads((resolve("demo") / "tokenizer.json").read_text())
        full["model"]["merges"].append(["nowhere", "tobefound"])
        (tmp_path / "tokenizer.json").write_text(json.dumps(full))
    elif change != "missing":
        shutil.copy(resolve("demo") / "tokenizer.json", tmp_path)
    with pytest.raises(StartupError, match=says) as caught:
        Tokenizer.load(tmp_path, vocab_size)
    assert caught.value.exit_code == StartupError.CHECKPOINT
