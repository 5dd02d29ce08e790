"""Follows the structured outputs of running requests: which tokens each may choose next.

What a matcher has read is compared with the request's output whenever it is asked, and it reads on, or goes back, to
there: after a preemption a request begins with a fresh matcher that reads all of the output again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from octavo.grammars import GrammarError, Grammars
from octavo.tokenizer import Tokenizer
from octavo.types import StructuredOutput

Int64s = npt.NDArray[np.int64]


class ConstraintError(Exception):
    """A constraint that compiled in the front-end takes more work or memory than it may."""


@dataclass(slots=True)
class _Reader:
    constraint: StructuredOutput
    matcher: LLMatcher | None = None
    """None until it is first asked."""
    read: list[int] = field(default_factory=list)
    """Tokens that the matcher has read."""


class Constraints:
    """Owned by the RequestStates. Reads the checkpoint's vocabulary when the first constraint comes."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        """`path`: the checkpoint's folder."""
        self._path = path
        self._vocab_size = vocab_size
        self._grammars: Grammars | None = None
        self._readers: dict[int, _Reader] = {}

    def add(self, slot: int, constraint: StructuredOutput) -> None:
        self._readers[slot] = _Reader(constraint)

    def remove(self, slot: int) -> None:
        self._readers.pop(slot, None)

    def allowed(self, slot: int, output: list[int], end_ids: Int64s) -> Int64s:
        """Tokens that may follow `output`, ascending: `end_ids` where it is complete, and only there.

        Raises ConstraintError.
        """
        reader = self._readers[slot]
        matcher = reader.matcher = reader.matcher or self._matcher(reader.constraint)
        common = next((i for i, pair in enumerate(zip(reader.read, output, strict=False)) if pair[0] != pair[1]), None)
        common = min(len(reader.read), len(output)) if common is None else common
        if common < len(reader.read):
            matcher.rollback(len(reader.read) - common)
        matcher.consume_tokens(output[common:])
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            reader.matcher, reader.read = None, []
            raise ConstraintError(matcher.get_error())
        reader.read = list(output)
        bits = np.unpackbits(mask, bitorder="little")[: self._vocab_size + 1]
        bits[end_ids] = bits[self._vocab_size]
        return np.flatnonzero(bits[: self._vocab_size])

    def _matcher(self, constraint: StructuredOutput) -> LLMatcher:
        if self._grammars is None:
            tokenizer = Tokenizer.load(self._path, self._vocab_size)
            self._grammars = Grammars(tokenizer)
        try:
            return self._grammars.matcher(constraint)
        except GrammarError as error:
            raise ConstraintError(str(error)) from error
