"""Which texts a structured output admits, and what is said of one that cannot be used."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from llguidance import LLParserLimits
from octavo import grammars
from octavo.checkpoint import resolve
from octavo.grammars import GrammarError, Grammars
from octavo.tokenizer import Tokenizer
from octavo.types import Choice, StructuredOutput

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve("demo"), 4096)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer)


CASES = {
    "regex": (StructuredOutput(regex=r"[A-Z][a-z]+(, \d{2})?"), ["Ab", "Ab, 12"], ["", "A", "Ab, 1", "xAb", "Ab, 12 "]),
    "anchors": (StructuredOutput(regex=r"^ab|cd$"), ["ab", "cd"], ["abc"]),
    "schema": (
        StructuredOutput(json_schema=json.dumps(PERSON)),
        ['{"name":"é\\n","age":3}', '{\n  "name": "x",\n  "age": 0\n}'],
        ['{"name":"x"}', '{"name":"x","age":-1}', '{"name":"x","age":1,"b":2}', "{" + " " * 25 + '"name":"x","age":1}'],
    ),
    "any JSON": (StructuredOutput(json_schema="{}"), ["[1, null]", "true", '{"a":{"b":[]}}'], ["nul", "[1,]"]),
    "choice": (
        StructuredOutput(choice=Choice(["a", "ab", 'q"\\[x]*\n', "é/", "\x00"])),
        ["a", "ab", 'q"\\[x]*\n', "é/", "\x00"],
        ["", "abb", "q", "é", "b"],
    ),
    "grammar": (
        StructuredOutput(
            grammar='root ::= item ("," item)* # list\nitem ::= num | "\\u00e9" [\\x41-C^\\]]{2} | foo-bar\n'
            'num ::= num [0-9] | [0-9]\nfoo-bar ::= "\\\\u" .'
        ),
        ["1", "12,345", "éAB", "éC]", "1,é^^,\\ux"],
        ["", "1,", "éA", "éDD", "u"],
    ),
}


@pytest.mark.parametrize(("constraint", "good", "bad"), CASES.values(), ids=CASES)
def test_exactly_the_texts_of_the_language_are_admitted(
    compiler: Grammars, tokenizer: Tokenizer, constraint: StructuredOutput, good: list[str], bad: list[str]
) -> None:
    for text, expected in [(text, True) for text in good] + [(text, False) for text in bad]:
        for ids in (tokenizer.encode([text])[0], [tokenizer.token_bytes.index(bytes([b])) for b in text.encode()]):
            matcher = compiler.matcher(constraint)
            admitted = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
            assert admitted == expected, text


@pytest.mark.parametrize(("constraint", "good", "bad"), CASES.values(), ids=CASES)
def test_masks_allow_each_token_of_an_admitted_text(
    compiler: Grammars, tokenizer: Tokenizer, constraint: StructuredOutput, good: list[str], bad: list[str]
) -> None:
    for text in good:
        matcher = compiler.matcher(constraint)
        for token in [*tokenizer.encode([text])[0], tokenizer.vocab_size]:
            mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            assert mask[token] and not mask[4095]
            matcher.consume_token(token)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (StructuredOutput(regex="(a"), "invalid regex"),
        (StructuredOutput(regex="(?=a)b"), "invalid regex"),
        (StructuredOutput(json_schema='{"type":'), "is not JSON"),
        (StructuredOutput(json_schema="3"), "must be an object or a boolean"),
        (StructuredOutput(json_schema='{"type": "foo"}'), "Invalid type: foo"),
        (StructuredOutput(json_schema='{"unevaluatedItems": false}'), "nimplemented"),
        (StructuredOutput(json_schema='{"$ref": "file:///etc/passwd"}'), "not present"),
        (StructuredOutput(json_schema="false"), "no text satisfies it"),
        (StructuredOutput(json_schema="[" * 100_000), "nested too deeply"),
        (StructuredOutput(grammar='root = "a"'), "Expected ::="),
        (StructuredOutput(grammar='x ::= "a"'), "root"),
        (StructuredOutput(grammar="root ::= y"), "y"),
        (StructuredOutput(grammar='root ::= "\\uD800"'), "no character"),
        (StructuredOutput(grammar="root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "nested too deeply"),
        (StructuredOutput(grammar='root ::= root "a"'), "no text satisfies it"),
    ],
)
def test_what_does_not_compile_says_why_in_one_line(compiler: Grammars, constraint: StructuredOutput, message: str):
    with pytest.raises(GrammarError, match=message) as caught:
        compiler.matcher(constraint)
    assert len(str(caught.value)) <= 160 and "\n" not in str(caught.value)
    assert not caught.value.too_complex


def test_what_takes_too_much_is_told_apart(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("initial_lexer_fuel", "step_lexer_fuel", "max_lexer_states", "max_grammar_size"):
        monkeypatch.setattr(grammars, "LIMITS", LLParserLimits(verbose_errors=False, **{limit: 2}))
        with pytest.raises(GrammarError) as caught:
            Grammars(tokenizer).matcher(StructuredOutput(regex="(a|b)*a(a|b){200}"))
        assert caught.value.too_complex, str(caught.value)


def test_the_largest_constraints_compile_or_fail_quickly(compiler: Grammars) -> None:
    large = [
        StructuredOutput(regex="(((a{1,1000}){1,1000}){1,1000}b|c){1,1000}"),
        StructuredOutput(regex="|".join(f"x{i}y.*z{i}" for i in range(4000))),
        StructuredOutput(json_schema=json.dumps({"enum": [f"value {i}" for i in range(4000)]})),
        StructuredOutput(choice=Choice([f"{i}" * 80 for i in range(256)])),
    ]
    for constraint in large:
        start = time.process_time()
        compiler.matcher(constraint)
        assert time.process_time() - start < 2.0


def test_few_compiled_constraints_are_kept_and_matchers_are_independent(compiler: Grammars, monkeypatch) -> None:
    monkeypatch.setattr(grammars, "MAX_COMPILED", 3)
    for i in range(10):
        compiler.matcher(StructuredOutput(regex=f"a{i}"))
    assert len(compiler._compiled) == 3
    one, other = (compiler.matcher(StructuredOutput(regex="ab")) for _ in range(2))
    assert one.compute_bitmask() == other.compute_bitmask()
    before = np.frombuffer(other.compute_bitmask(), np.uint8)
    one.consume_token(int(np.flatnonzero(np.unpackbits(before, bitorder="little"))[0]))
    assert np.array_equal(np.frombuffer(other.compute_bitmask(), np.uint8), before)
