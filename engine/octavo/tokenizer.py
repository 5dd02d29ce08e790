"""GPT-2's tokenizer over `tokenizers`, with the behaviour of transformers' GPT2Tokenizer (5.23).

transformers rebuilds the tokenizer from vocabulary, merges, added tokens and tokenizer_config.json instead of using
tokenizer.json as it stands; so do we. Decoding is a table of bytes per token id: byte-level BPE needs no more, and a
detokenizer can go on where it stopped.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE

from octavo.errors import StartupError

_DEFAULT_SPECIAL = "<|endoftext|>"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DESTRUCTIVE_CLEAN_UP = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
_MAX_MISSING_TOKENS = 1024
"""Checkpoints pad the embedding's rows; more rows than this without a token mean another model's vocabulary."""


class TokenizerError(Exception):
    """`tokenizers` failed on a text. Its own message is not part of this one."""


class Tokenizer:
    """Texts to token ids and back. Immutable, usable from several threads."""

    vocab_size: int
    """Of the model. Ids at the end may have no token; they decode to nothing, as in transformers."""
    token_bytes: list[bytes]
    """[vocab_size] what each id stands for; special tokens as they are spelled."""
    plain_bytes: list[bytes]
    """[vocab_size] the same, but nothing for special tokens: decoding with skip_special_tokens."""
    token_texts: list[str | None]
    """[vocab_size] `token_bytes` as text where they are whole characters, None where they are not."""
    plain_texts: list[str | None]
    """The same of `plain_bytes`."""
    special_ids: frozenset[int]
    split_special_tokens: bool
    """What an unset PromptOptions.split_special_tokens means: false unless tokenizer_config.json says otherwise."""

    vocabulary: dict[str, int]
    """Token as the vocabulary spells it -> id."""
    unk_token: str | None

    def __init__(
        self,
        rust: RustTokenizer,
        vocab_size: int,
        *,
        split_special_tokens: bool = False,
        unk_token: str | None = _DEFAULT_SPECIAL,
    ) -> None:
        self._rust = rust
        self._rust_splitting: RustTokenizer | None = None
        self._lock = threading.Lock()
        self.vocab_size = vocab_size
        self.split_special_tokens = split_special_tokens
        self.token_bytes = [b""] * vocab_size
        self.vocabulary = rust.get_vocab(with_added_tokens=True)
        self.unk_token = unk_token
        for token, token_id in self.vocabulary.items():
            self.token_bytes[token_id] = _bytes_of(token)
        added = rust.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.plain_bytes = [b"" if i in self.special_ids else data for i, data in enumerate(self.token_bytes)]
        self.token_texts = [_text_of(data) for data in self.token_bytes]
        self.plain_texts = ["" if i in self.special_ids else text for i, text in enumerate(self.token_texts)]

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> Tokenizer:
        """From tokenizer.json, else vocab.json and merges.txt, with tokenizer_config.json beside it.

        Raises StartupError (CHECKPOINT) when files are missing, broken, or do not belong to a model of `vocab_size`.
        """
        config = _read_json(path / "tokenizer_config.json") or {}
        if config.get("clean_up_tokenization_spaces") and config.get(_DESTRUCTIVE_CLEAN_UP):
            raise _unusable("tokenizer_config.json", f"{_DESTRUCTIVE_CLEAN_UP} is not supported")
        try:
            rust = _build(path, config)
        except StartupError:
            raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust library is not an Exception
            raise _unusable(
                "tokenizer", f"vocabulary and merges do not fit together ({type(error).__name__})"
            ) from error
        _check_vocabulary(rust, vocab_size)
        return cls(
            rust,
            vocab_size,
            split_special_tokens=bool(config.get("split_special_tokens", False)),
            unk_token=_special_name(config, "unk_token"),
        )

    def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[list[int]]:
        """One list of ids per text, as transformers' `tokenizer(text).input_ids`. Releases the GIL.

        Raises TokenizerError when the library fails, also when it panics.
        """
        try:
            rust = self._splitting() if split_special_tokens else self._rust
            encodings = rust.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust library is not an Exception
            raise TokenizerError("the text could not be tokenized") from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """As transformers' `tokenizer.decode`: bytes that are not UTF-8 become U+FFFD. Ids below vocab_size."""
        return b"".join(map(self.bytes_table(skip_special_tokens).__getitem__, token_ids)).decode("utf-8", "replace")

    def bytes_table(self, skip_special_tokens: bool) -> list[bytes]:
        return self.plain_bytes if skip_special_tokens else self.token_bytes

    def texts_table(self, skip_special_tokens: bool) -> list[str | None]:
        return self.plain_texts if skip_special_tokens else self.token_texts

    def _splitting(self) -> RustTokenizer:
        """A second tokenizer, since splitting special tokens is a setting of the whole object."""
        with self._lock:
            if self._rust_splitting is None:
                self._rust_splitting = RustTokenizer.from_str(self._rust.to_str())
                self._rust_splitting.encode_special_tokens = True
            return self._rust_splitting


def _build(path: Path, config: dict[str, Any]) -> RustTokenizer:
    """As GPT2Tokenizer.from_pretrained; file names and precedence too."""
    full = _read_json(path / "tokenizer.json")
    post_processor = None
    added: dict[int, AddedToken] = {}
    if full is not None:
        model = full.get("model") or {}
        if model.get("type", "BPE") != "BPE":
            raise _unusable("tokenizer.json", f"octavo knows GPT-2's byte-level BPE, this is {model.get('type')}")
        merges = [_pair(merge) for merge in model["merges"]]
        bpe = BPE(vocab=model["vocab"], merges=merges, **_BPE_OPTIONS)
        post_processor = _post_processor(full)
        added = {entry["id"]: _added_token(entry) for entry in full.get("added_tokens") or []}
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        bpe = BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"), **_BPE_OPTIONS)
    else:
        raise _unusable("tokenizer", f"neither tokenizer.json nor vocab.json with merges.txt in {path}")
    if "added_tokens_decoder" in config:
        added = {int(token_id): _added_token(entry) for token_id, entry in config["added_tokens_decoder"].items()}
    rust = RustTokenizer(bpe)
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    rust.decoder = decoders.ByteLevel()
    if post_processor is not None:
        rust.post_processor = post_processor
    _add_tokens(rust, config, added)
    if post_processor is None:  # else that of tokenizer.json counts, whatever add_bos_token says
        rust.post_processor = _bos_eos_template(rust, config)
    return rust


_BPE_OPTIONS: dict[str, Any] = {
    "dropout": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
}


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _post_processor(full: dict[str, Any]) -> Any:
    """The post-processor of a tokenizer.json: only `tokenizers` itself can read one, and only within a tokenizer."""
    if full.get("post_processor") is None:
        return None
    minimal = dict(full, model=dict(full["model"], vocab={}, merges=[]), added_tokens=[])
    return RustTokenizer.from_str(json.dumps(minimal)).post_processor


def _add_tokens(rust: RustTokenizer, config: dict[str, Any], added: dict[int, AddedToken]) -> None:
    """Added tokens by id, then the special tokens that are named in the configuration and not among them."""
    tokens = [added[token_id] for token_id in sorted(added)]
    known = {token.content for token in tokens}
    named = [_special_name(config, name) for name in _SPECIAL_NAMES]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named += [_content(entry) for entry in (extra.values() if isinstance(extra, dict) else extra)]
    for token in tokens:
        if token.content in named:
            token.special = True
    for name in named:
        if name is not None and name not in known:
            known.add(name)
            tokens.append(AddedToken(name, special=True))
    rust.add_tokens(tokens)


def _special_name(config: dict[str, Any], name: str) -> str | None:
    default = _DEFAULT_SPECIAL if name in ("bos_token", "eos_token", "unk_token") else None
    return _content(config.get(name, default))


def _content(entry: Any) -> str | None:
    content = entry["content"] if isinstance(entry, dict) else entry
    return None if content is None else str(content)


def _added_token(entry: dict[str, Any]) -> AddedToken:
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(**{name: entry[name] for name in flags if name in entry})


def _bos_eos_template(rust: RustTokenizer, config: dict[str, Any]) -> Any:
    """transformers' update_post_processor: bos and eos around the text where the configuration asks for them."""
    bos = _special_name(config, "bos_token") if config.get("add_bos_token") else None
    eos = _special_name(config, "eos_token") if config.get("add_eos_token") else None
    before, after = ([f"{bos}:0"] if bos else []), ([f"{eos}:0"] if eos else [])
    specials = [(token, rust.token_to_id(token)) for token in (bos, eos) if token is not None]
    return processors.TemplateProcessing(single=[*before, "$A:0", *after], special_tokens=specials)


def _check_vocabulary(rust: RustTokenizer, vocab_size: int) -> None:
    ids = rust.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise _unusable("tokenizer", "the vocabulary is empty")
    if max(ids) >= vocab_size:
        raise _unusable(
            "tokenizer", f"has token id {max(ids)}, but config.json says vocab_size {vocab_size}: not of the same model"
        )
    if vocab_size - len(set(ids)) > _MAX_MISSING_TOKENS:
        raise _unusable(
            "tokenizer",
            f"has {len(set(ids))} tokens, but config.json says vocab_size {vocab_size}: not of the same model",
        )


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table (`bytes_to_unicode` of openai/gpt-2's encoder.py): a printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in table.values()]
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR = _byte_of_char()


def _text_of(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _bytes_of(token: str) -> bytes:
    """As the ByteLevel decoder: a token with a character outside the table stands for its own UTF-8."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unusable(path.name, f"not readable as JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise _unusable(path.name, "not a JSON object")
    return value


def _unusable(file: str, why: str) -> StartupError:
    return StartupError(StartupError.CHECKPOINT, f"{file}: {why}")
