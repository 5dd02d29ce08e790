"""Deltas add up to the final text, never split a character or a stop string, and stops are those of transformers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from frontend.fakes import demo, ids_of, reference_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.frontend.detokenizer import Detokenizer, StopMatch, StopMatcher
from octavo.types import StopStringOutput

TOKENS, INCLUDE, EXCLUDE = StopStringOutput.TOKENS, StopStringOutput.INCLUDE, StopStringOutput.EXCLUDE
TEXTS = st.text("ab 🙂é漢\n.", max_size=12)


@cache
def byte_ids() -> dict[int, int]:
    """The token of each single byte."""
    table = demo().tokenizer.token_bytes
    return {data[0]: i for i, data in enumerate(table) if len(data) == 1}


def run(
    ids: list[int],
    stops: list[str],
    output: StopStringOutput,
    *,
    prompt: str = "",
    every: int = 1,
    skip: bool = True,
) -> tuple[list[str], StopMatch | None, int]:
    """Feeds ids until a stop, taking a delta after each `every` tokens. Returns deltas, match, tokens used."""
    tokenizer = demo().tokenizer
    matcher = None
    if stops:
        matcher = StopMatcher(stops, StopMatcher.tail_of_prompt(tokenizer, ids_of(prompt), stops))
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, matcher=matcher, output=output)
    deltas, pending, match, used = [], [], None, 0
    for token_id in ids:
        used += 1
        pending.append(token_id)
        match = matcher.push(tokenizer.token_bytes[token_id]) if matcher else None
        if match is not None:
            detokenizer.stop_at(match)
            break
        if used % every == 0:
            deltas.append(detokenizer.take(pending, final=False))
            pending = []
    deltas.append(detokenizer.take(pending, final=True))
    return deltas, match, used


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 4095), st.integers(0, 255)), max_size=40), st.integers(1, 5), st.booleans())
def test_deltas_of_any_tokens_add_up_to_the_text_of_transformers(ids: list[int], every: int, skip: bool) -> None:
    deltas, _, _ = run(ids, [], TOKENS, every=every, skip=skip)
    assert "".join(deltas) == reference_tokenizer().decode(ids, skip_special_tokens=skip)


def test_delta_never_ends_inside_a_character() -> None:
    ids = [byte_ids()[byte] for byte in "a🙂é".encode()]
    deltas, _, _ = run(ids, [], TOKENS)
    assert deltas == ["a", "", "", "", "🙂", "", "é", ""]


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, st.lists(st.text("ab 🙂é.", min_size=1, max_size=4), min_size=1, max_size=3), st.integers(1, 4))
def test_text_with_stop_strings_is_the_same_however_it_is_cut(
    prompt: str, text: str, stops: list[str], every: int
) -> None:
    """Fed byte by byte, so that every boundary falls inside characters and stop strings."""
    ids = [byte_ids()[byte] for byte in text.encode()]
    for output in StopStringOutput:
        streamed, match, used = run(ids, stops, output, prompt=prompt, every=every)
        whole, whole_match, whole_used = run(ids, stops, output, prompt=prompt, every=10_000)
        assert ("".join(streamed), match, used) == ("".join(whole), whole_match, whole_used)
        expected = expected_text(prompt, text, stops, output)
        assert "".join(streamed) == expected


def expected_text(prompt: str, text: str, stops: list[str], output: StopStringOutput) -> str:
    """By brute force over bytes: the first byte of `text` at which a stop string ends."""
    before, data = prompt.encode(), text.encode()
    for end in range(1, len(data) + 1):
        for stop in stops:
            if (before + data[:end]).endswith(stop.encode()):
                if output == EXCLUDE:
                    return data[: max(0, end - len(stop.encode()))].decode("utf-8", "replace")
                return data[:end].decode("utf-8", "replace")
    return text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=30), st.lists(st.sampled_from(["e", " the", "and", "th", "<|end"])))
def test_held_back_text_never_contains_part_of_what_is_cut(ids: list[int], stops: list[str]) -> None:
    if not stops:
        return
    deltas, match, used = run(ids, stops, EXCLUDE, skip=False)
    tokenizer = demo().tokenizer
    data = b"".join(tokenizer.token_bytes[i] for i in ids[:used])
    cut = max(match.start, 0) if match else len(data)
    assert "".join(deltas) == data[:cut].decode("utf-8", "replace")


@cache
def stopping_criteria(stops: tuple[str, ...]) -> Any:
    from transformers.generation.stopping_criteria import StopStringCriteria

    return StopStringCriteria(reference_tokenizer(), list(stops))


@pytest.mark.parametrize("stops", [("the",), (" and", "e l"), ("🙂",), (" ,", "\n"), ("<|endoftext|>",)])
def test_stops_at_the_token_at_which_transformers_stops(stops: tuple[str, ...]) -> None:
    import random

    import torch

    torch.set_num_threads(1)
    rng = random.Random(str(stops))
    corpus = ids_of("the hand and e lands , weather\n🙂 other <|endoftext|> the lathe, breathe , and so on")
    for _ in range(10):
        ids = [rng.choice(corpus) for _ in range(14)]
        prompt_len = rng.randrange(1, 6)
        matcher = StopMatcher(stops, StopMatcher.tail_of_prompt(demo().tokenizer, ids[:prompt_len], stops))
        for end in range(prompt_len + 1, len(ids) + 1):
            ours = matcher.push(demo().tokenizer.token_bytes[ids[end - 1]]) is not None
            theirs = bool(stopping_criteria(stops)(torch.tensor([ids[:end]]), None)[0])
            assert ours == theirs, (ids[:end], stops)


def test_first_stop_string_in_request_order_wins() -> None:
    [world] = demo().tokenizer.encode([" world"])
    assert len(world) == 1
    _, match, _ = run(world, ["ld", "wor"], TOKENS)
    assert match is not None
    assert match.index == 0


def test_match_may_begin_in_the_prompt_and_leaves_nothing_with_exclude() -> None:
    ids = [byte_ids()[byte] for byte in b"ld and more"]
    for output, text in ((TOKENS, "ld"), (INCLUDE, "ld"), (EXCLUDE, "")):
        deltas, match, _ = run(ids, ["world"], output, prompt="Hello wor")
        assert match == StopMatch(0, -3, 2)
        assert "".join(deltas) == text


def test_token_that_reaches_beyond_the_match_is_whole_only_with_tokens() -> None:
    ids = demo().tokenizer.encode([" world"])[0]
    assert ["".join(run(ids, ["wor"], output)[0]) for output in (TOKENS, INCLUDE, EXCLUDE)] == [" world", " wor", " "]


def test_special_tokens_count_as_their_spelling_in_stops_but_are_left_out_of_text() -> None:
    ids = [*ids_of("ab"), 4095, *ids_of("cd")]
    deltas, match, used = run(ids, ["b<|endoftext|>"], EXCLUDE)
    assert "".join(deltas) == "a"
    assert match is not None
    assert used == len(ids_of("ab")) + 1
    assert "".join(run(ids, ["|>c"], EXCLUDE)[0]) == "ab"
