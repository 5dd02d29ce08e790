"""Token healing: a prompt that was cut inside a word gets another last token, one that the model would have written.

As `GenerationMixin.heal_tokens` (huggingface/transformers, src/transformers/generation/utils.py) for one prompt: it is
stripped and tokenized anew, and its last token is chosen again, greedily, with a bias on the tokens whose spelling
begins with that of the old one. What decides about the spelling there decides here too: a token with a space in front,
or with bytes beyond ASCII, is left as it is, and so is a prompt of one token.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from octavo.frontend.requests import CheckedRequest
from octavo.tokenizer import Tokenizer
from octavo.types import PromptOptions

EXTENSION_BIAS: Final = 10.0
SAME_BIAS: Final = 11.0
"""A little more for the old token, so that "http" does not become "https" without need."""


@dataclass(frozen=True, slots=True)
class HealingPlan:
    """What is to be done to one prompt."""

    token_ids: list[int]
    """Stripped and tokenized anew."""
    candidates: list[int]
    """Tokens that extend the last one, itself included; empty if there is nothing to choose."""
    text: str
    """Of the stripped prompt."""

    @property
    def biases(self) -> dict[int, float]:
        return {**dict.fromkeys(self.candidates, EXTENSION_BIAS), self.token_ids[-1]: SAME_BIAS}

    def healed(self, chosen: int | None) -> list[int]:
        """The prompt with the token that was chosen, if there was something to choose."""
        return self.token_ids if chosen is None else [*self.token_ids[:-1], chosen]


@dataclass(frozen=True, slots=True)
class Healing:
    """What is to be done to a request."""

    checked: CheckedRequest
    """With the prompts that it was sent with."""
    plans: list[HealingPlan]
    """One per prompt."""
    others: list[list[int]]
    """Ids of the request's `words` and `negative_texts`."""


class TokenHealer:
    """Plans for one vocabulary, which is sorted when the first prompt comes. May be used from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._sorted: list[tuple[str, int]] = []

    def plan(self, token_ids: Sequence[int], options: PromptOptions) -> HealingPlan:
        """Raises TokenizerError. A prompt of nothing but blanks stays as it is."""
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True).strip()
        if not text:
            return HealingPlan(list(token_ids), [], text)
        retokenized = self._tokenizer.encode(
            [text],
            add_special_tokens=options.add_special_tokens is not False,
            split_special_tokens=bool(options.split_special_tokens),
        )[0]
        candidates = self._extensions(retokenized[-1]) if len(retokenized) > 1 else []
        return HealingPlan(retokenized, candidates, text)

    def extension(self, plan: HealingPlan, token_ids: Sequence[int]) -> str:
        """What the healed prompt has beyond the stripped one."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)[len(plan.text) :]

    def _extensions(self, token_id: int) -> list[int]:
        vocabulary = self._vocabulary()
        spelling = self._tokenizer.decode([token_id]).replace(" ", self._space())
        start = bisect.bisect_left(vocabulary, (spelling, -1))
        found = []
        for entry, entry_id in vocabulary[start:]:
            if not entry.startswith(spelling):
                break
            found.append(entry_id)
        return found if len(found) > 1 and token_id in found else []

    def _vocabulary(self) -> list[tuple[str, int]]:
        if not self._sorted:
            self._sorted = sorted(self._tokenizer.vocabulary.items())
        return self._sorted

    def _space(self) -> str:
        """What transformers takes for the spelling of a space: the first character of the token that " " becomes,
        which for GPT-2, where no token is spelled so, is the unknown token's."""
        if " " in self._tokenizer.vocabulary or self._tokenizer.unk_token is None:
            return " "
        return self._tokenizer.unk_token[0]
