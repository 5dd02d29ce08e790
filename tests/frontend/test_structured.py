"""structured_output: refused by its path before it is compiled, and when it does not compile."""

from __future__ import annotations

import time
from typing import Any

import pytest
from frontend.fakes import FakeCore, demo, engine_info, request
from octavo.config import Limits, ServerConfig
from octavo.errors import Reason, RequestError
from octavo.frontend import structured
from octavo.frontend.async_engine import AsyncEngine
from octavo.frontend.input_processor import InputProcessor
from octavo.frontend.structured import ConstraintCompiler
from octavo.types import Choice, StructuredOutput

PATH = "params.structured_output"
ANY = StructuredOutput(json_schema="{}")


@pytest.fixture(scope="module")
def inputs() -> InputProcessor:
    return InputProcessor(demo(), Limits(), cache_secret=b"secret")


def refused(inputs: InputProcessor, constraint: StructuredOutput, **params: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        inputs.process(request(structured_output=constraint, **params), arrival_time=1.0)
    return caught.value


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        (StructuredOutput(), ""),
        (StructuredOutput(regex="a", grammar="b"), ""),
        (StructuredOutput(regex=""), ".regex"),
        (StructuredOutput(regex="\ud800"), ".regex"),
        (StructuredOutput(regex="é" * 32_769), ".regex"),
        (StructuredOutput(json_schema="x" * 65_537), ".json_schema"),
        (StructuredOutput(choice=Choice([])), ".choice.values"),
        (StructuredOutput(choice=Choice(["a", ""])), ".choice.values[1]"),
        (StructuredOutput(choice=Choice(["a"] * 257)), ".choice.values"),
        (StructuredOutput(choice=Choice(["a" * 1025])), ".choice.values[0]"),
        (StructuredOutput(choice=Choice(["a" * 1000] * 100)), ".choice.values"),
        (StructuredOutput(regex="(a"), ".regex"),
        (StructuredOutput(json_schema="{"), ".json_schema"),
        (StructuredOutput(grammar='root ::= "a'), ".grammar"),
    ],
)
def test_what_is_wrong_with_a_constraint_is_told_by_its_path(inputs, constraint: StructuredOutput, field: str):
    error = refused(inputs, constraint)
    assert error.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in error.violations] == [PATH + field]


@pytest.mark.parametrize("params", [{"ignore_eos": True}], ids=str)
def test_parameters_that_keep_a_text_from_ending_are_refused(inputs, params: dict[str, Any]):
    assert [violation.field for violation in refused(inputs, ANY, **params).violations] == [PATH]


def test_a_constraint_that_takes_too_much_is_refused_as_such(monkeypatch):
    monkeypatch.setattr("octavo.grammars.LIMITS", structured_limits(initial_lexer_fuel=3))
    inputs = InputProcessor(demo(), Limits(), cache_secret=b"secret")
    error = refused(inputs, StructuredOutput(regex="[a-z]{3}"))
    assert error.reason is Reason.CONSTRAINT_TOO_COMPLEX
    assert [violation.field for violation in error.violations] == [f"{PATH}.regex"]


def structured_limits(**limits: int) -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False, **limits)


def test_a_bounded_number_of_answers_is_remembered(monkeypatch):
    monkeypatch.setattr(structured, "_MAX_REMEMBERED", 2)
    compiler = ConstraintCompiler(demo().tokenizer)
    bad = StructuredOutput(regex="(")
    for _ in range(2):
        with pytest.raises(RequestError):
            compiler.check(bad)
    assert compiler.knows(bad)
    compiler.check(ANY)
    compiler.check(StructuredOutput(regex="a"))
    assert compiler.knows(ANY) and not compiler.knows(bad)


async def test_compiling_leaves_the_event_loop_alone_and_has_its_time(monkeypatch):
    monkeypatch.setattr("octavo.frontend.async_engine.COMPILE_SECONDS", 0.05)
    engine = AsyncEngine(demo(), FakeCore(), ServerConfig(frontend_processes=1), cache_secret=b"")
    engine.engine_up(engine_info(), restarts=0)

    def slow(self: ConstraintCompiler, constraint: StructuredOutput) -> None:
        time.sleep(0.4)

    monkeypatch.setattr(ConstraintCompiler, "check", slow)
    start = time.monotonic()
    with pytest.raises(RequestError) as caught:
        await engine.submit(request(structured_output=ANY), streaming=True)
    assert caught.value.reason is Reason.CONSTRAINT_TOO_COMPLEX
    assert time.monotonic() - start < 0.3
    engine.close()
