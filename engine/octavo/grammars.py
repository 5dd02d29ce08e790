"""Constraints on text, `structured_output`, as matchers of llguidance: what tokens may come next.

Front-ends compile a constraint to find out what is wrong with it; the engine compiles it again to follow it. Compiling
is lazy in llguidance, so both take milliseconds; what it may cost is limited in units of work, not in seconds.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from octavo.tokenizer import Tokenizer
from octavo.types import StructuredOutput

LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=200_000,  # about 14 ms
    step_max_items=50_000,  # about 3 ms
    max_lexer_states=20_000,  # 1 to 2 KB each
    max_grammar_size=200_000,
    verbose_errors=False,
)
WHITESPACE: Final = r"[\x20\x0A\x0D\x09]{1,24}"
"""Between two tokens of JSON. Without a limit small models never stop writing blanks."""
MAX_COMPILED: Final = 64
"""Constraints that are kept compiled."""
_EXHAUSTED: Final = re.compile(r"fuel|too (many|complex|large|big)|limit|TooComplex", re.IGNORECASE)
_ESCAPE: Final = re.compile(r"\\(?:(\\)|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")


class GrammarError(Exception):
    """The constraint cannot be used. `str()` is for its author and names no file."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.too_complex = _EXHAUSTED.search(message) is not None


class Grammars:
    """Compiles constraints for one vocabulary. Usable from several threads.

    The library's tokenizer has one token more than the model: its end of text, which is allowed where the text is
    complete. Which of the model's tokens end a sequence is up to the request. Where a constraint leaves one text only,
    the library allows its tokens as the tokenizer cuts it, and no others.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size = tokenizer.vocab_size
        self._tokenizer = LLTokenizer(
            _Vocabulary(tokenizer),  # type: ignore[arg-type]
            n_vocab=self.vocab_size + 1,
            eos_token=self.vocab_size,
        )
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(self, constraint: StructuredOutput) -> LLMatcher:
        """A matcher at the beginning of the text. Raises GrammarError."""
        key = repr(constraint)
        compiled = self._compiled.pop(key, None) or self._compile(constraint)
        self._compiled[key] = compiled  # now the youngest
        while len(self._compiled) > MAX_COMPILED:
            try:
                self._compiled.popitem(last=False)
            except KeyError:  # another thread was faster
                break
        return compiled.deep_copy()

    def _compile(self, constraint: StructuredOutput) -> LLMatcher:
        try:
            matcher = LLMatcher(self._tokenizer, _source(constraint), log_level=0, limits=LIMITS)
            if not matcher.is_error():
                matcher.compute_bitmask()
            problem = matcher.get_error()
        except GrammarError:
            raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust library is not an Exception
            raise GrammarError(f"the grammar library failed ({type(error).__name__})") from error
        if problem:
            raise GrammarError("no text satisfies it" if "NoExtension" in problem else _first_line(problem))
        return matcher


class _Vocabulary:
    """What LLTokenizer asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens = [*tokenizer.token_bytes, b"<|end of text|>"]
        self.eos_token_id = tokenizer.vocab_size
        self.special_token_ids = [*sorted(tokenizer.special_ids), self.eos_token_id]

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens of a text, for stretches where the constraint leaves one text only: no other tokens are allowed."""
        text = text.decode() if isinstance(text, bytes) else text
        return self._tokenizer.encode([text], add_special_tokens=False, split_special_tokens=True)[0]


def _source(constraint: StructuredOutput) -> str:
    """The constraint in llguidance's own form. Raises GrammarError."""
    if constraint.json_schema is not None:
        return LLMatcher.grammar_from_json_schema(
            _schema(constraint.json_schema), overrides={"whitespace_pattern": WHITESPACE}
        )
    if constraint.regex is not None:
        return LLMatcher.grammar_from_regex(constraint.regex)
    if constraint.grammar is not None:
        return LLMatcher.grammar_from_lark(_lark(constraint.grammar))
    assert constraint.choice is not None
    return LLMatcher.grammar_from_regex("|".join(map(_literal, constraint.choice.values)))


def _schema(text: str) -> str:
    """The schema as an object. Raises GrammarError."""
    try:
        schema = json.loads(text)
    except RecursionError:
        raise GrammarError("is nested too deeply") from None
    except ValueError as error:
        raise GrammarError(f"is not JSON: {_first_line(str(error))}") from None
    if schema is False:
        raise GrammarError("no text satisfies it")
    if not isinstance(schema, dict | bool):
        raise GrammarError("must be an object or a boolean")
    return "{}" if schema is True else text


def _lark(gbnf: str) -> str:
    try:
        return gbnf_to_lark(_ESCAPE.sub(_spelled, gbnf))
    except RecursionError:
        raise GrammarError("is nested too deeply") from None
    except Exception as error:  # the library's own, with the place
        raise GrammarError(_first_line(str(error))) from None


def _spelled(escape: re.Match[str]) -> str:
    r"""The character itself where Lark has no such escape: \u and \U."""
    if escape[1]:
        return escape[0]
    code = int(escape[2] or escape[3] or escape[4], 16)
    if code < 0x80:
        return f"\\x{code:02x}"
    if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
        raise GrammarError(f"{escape[0]} is no character")
    return chr(code)


def _literal(text: str) -> str:
    """A regular expression for exactly this text."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _first_line(message: str) -> str:
    """Of an error of the library, cut short."""
    line = next((part.strip() for part in message.splitlines() if part.strip()), "")
    return line if len(line) <= 160 else line[:157] + "..."
