"""`structured_output`: the rules that it obeys, and whether it compiles."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from octavo.config import Limits
from octavo.errors import FieldViolation, Reason, RequestError
from octavo.frontend.validation import Violations, check_strings, utf8_length
from octavo.grammars import GrammarError, Grammars
from octavo.tokenizer import Tokenizer
from octavo.types import GenerationParams, StructuredOutput

COMPILE_SECONDS: Final = 5.0
"""What a request may wait for its constraint, those before it included."""
_PATH: Final = "params.structured_output"
_KINDS: Final = ("json_schema", "regex", "grammar", "choice")
_MAX_CHOICES: Final = 256
_MAX_CHOICE_BYTES: Final = 1024
_MAX_REMEMBERED: Final = 256
"""Constraints of which it is known whether they compile."""


def check_structured_output(violations: Violations, constraint: StructuredOutput, limits: Limits) -> None:
    """On its own, without compiling it."""
    given = [kind for kind in _KINDS if getattr(constraint, kind) is not None]
    if len(given) != 1:
        violations.add(_PATH, f"must have exactly one of {', '.join(_KINDS)}")
        return
    limit = limits.max_constraint_bytes
    if constraint.choice is not None:
        choices = constraint.choice.values
        path = f"{_PATH}.choice.values"
        if not choices:
            violations.add(path, "must not be empty")
        check_strings(violations, path, choices, _MAX_CHOICES, _MAX_CHOICE_BYTES)
        size = sum(map(len, choices))
        if len(choices) <= _MAX_CHOICES and size > limit:
            violations.add(path, f"has at least {size} bytes, the limit is {limit}")
        return
    path, text = f"{_PATH}.{given[0]}", getattr(constraint, given[0])
    length = utf8_length(text, limit)
    if length is None:
        violations.add(path, "is not valid Unicode")
    elif length == 0:
        violations.add(path, "must not be empty")
    elif length > limit:
        violations.add(path, f"has at least {length} bytes, the limit is {limit}")


def check_with_structured_output(violations: Violations, params: GenerationParams) -> None:
    """What resolved parameters make it impossible to end the text where it is complete, or to follow it."""
    ends = set(params.eos_token_id or [])
    banned = set(params.suppress_tokens or []) | {ids[0] for ids in params.bad_words_ids if len(ids) == 1}
    if params.ignore_eos:
        violations.add(_PATH, "excludes ignore_eos: the text ends with end-of-sequence")
    elif not ends:
        violations.add(_PATH, "needs an end-of-sequence token, and neither request nor checkpoint names one")
    elif ends <= banned:
        violations.add(_PATH, "needs an end-of-sequence token that is not banned")
    elif params.allowed_token_ids is not None and not ends & set(params.allowed_token_ids):
        violations.add(_PATH, "needs an end-of-sequence token in allowed_token_ids")
    if (params.num_beams or 1) > 1:
        violations.add(
            _PATH, "excludes num_beams above 1: a constraint follows one sequence, not the beams of a search"
        )
    if params.forced_bos_token_id is not None:
        violations.add(_PATH, "excludes forced_bos_token_id")


class ConstraintCompiler:
    """Finds out whether constraints compile, and remembers it. May be used from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()
        self._remembered: OrderedDict[str, GrammarError | None] = OrderedDict()

    def knows(self, constraint: StructuredOutput) -> bool:
        """Whether `check` will answer at once."""
        return repr(constraint) in self._remembered

    def check(self, constraint: StructuredOutput) -> None:
        """Raises RequestError: INVALID_FIELD with what is wrong, or CONSTRAINT_TOO_COMPLEX. Takes up to 0.3 s the
        first time, later some milliseconds."""
        key = repr(constraint)
        try:
            problem = self._remembered[key]  # without the lock, which another compilation may hold
        except KeyError:
            with self._lock:
                problem = self._remembered[key] = self._problem(constraint)
                if len(self._remembered) > _MAX_REMEMBERED:
                    self._remembered.popitem(last=False)
        if problem is not None:
            raise _refusal(constraint, problem)

    def _problem(self, constraint: StructuredOutput) -> GrammarError | None:
        if self._grammars is None:
            self._grammars = Grammars(self._tokenizer)
        try:
            self._grammars.matcher(constraint)
        except GrammarError as error:
            return error.with_traceback(None)
        return None


def _refusal(constraint: StructuredOutput, problem: GrammarError) -> RequestError:
    kind = next(kind for kind in _KINDS if getattr(constraint, kind) is not None)
    return refusal(f"{_PATH}.{kind}", str(problem), too_complex=problem.too_complex)


def refusal(path: str, description: str, *, too_complex: bool) -> RequestError:
    reason = Reason.CONSTRAINT_TOO_COMPLEX if too_complex else Reason.INVALID_FIELD
    return RequestError(reason, f"{path}: {description}", violations=[FieldViolation(path, description)])


def too_slow() -> RequestError:
    """The constraint did not compile in time."""
    return refusal(_PATH, f"did not compile within {COMPILE_SECONDS:g} s", too_complex=True)
