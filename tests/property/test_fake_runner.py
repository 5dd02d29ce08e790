"""The fake runner by itself, on steps made by hand: it computes what the oracle says and refuses the rest."""

from __future__ import annotations

import numpy as np
import pytest
from octavo.errors import Reason
from octavo.step import LogprobSpec, NewRequest, SchedulerOutput
from octavo.types import FinishReason, GenerationParams, LogprobKind
from property.fake_runner import ContractError, FakeRunner
from property.oracle import answer

PROMPT = [5, 6, 7, 8, 9, 10]


def runner(strict: bool = True) -> FakeRunner:
    return FakeRunner(num_blocks=8, block_size=4, max_num_requests=4, max_model_len=16, strict=strict)


def new(slot: int, blocks: list[int], tokens: list[int] = PROMPT, computed: int = 0, **options: object) -> NewRequest:
    values: dict[str, object] = {
        "slot": slot, "group_id": 1, "row": 0, "num_rows": 2, "token_ids": np.array(tokens, np.int32),
        "prompt_len": len(PROMPT), "num_computed_tokens": computed, "block_ids": np.array(blocks, np.int32),
        "params": GenerationParams(), "max_total_tokens": 12, "eos_token_ids": (), "stop_token_ids": (), "seed": 3,
    }  # fmt: skip
    return NewRequest(**(values | options))  # type: ignore[arg-type]


def step(step_id: int, rows: list[tuple[int, int, int, bool]], **changes: object) -> SchedulerOutput:
    """Rows are (slot, num_computed, num_scheduled, samples); those of one token that samples come first."""
    columns = list(zip(*rows, strict=True)) if rows else [[], [], [], []]
    decode = sum(count == 1 and samples for _, _, count, samples in rows)
    output = SchedulerOutput(
        step_id,
        np.array(columns[0], np.int32),
        np.array(columns[1], np.int32),
        np.array(columns[2], np.int32),
        np.array(columns[3], np.bool_),
        decode,
    )
    for name, value in changes.items():
        setattr(output, name, value)
    return output


def grow(slot: int, column: int, block: int) -> dict[str, object]:
    names = ("block_slots", "block_columns", "block_ids")
    return {name: np.array([value], np.int32) for name, value in zip(names, (slot, column, block), strict=True)}


def expected(row: int = 0, seed: int = 3) -> list[int]:
    return answer(PROMPT, domain=0, seed=seed, row=row, max_total_tokens=12).token_ids


def tokens_of(fake: FakeRunner, output: SchedulerOutput) -> list[int]:
    return fake.submit(output).result().token_ids.tolist()


def started() -> FakeRunner:
    """Slot 0 has computed PROMPT in blocks 2 and 5, and got its first token."""
    fake = runner()
    assert tokens_of(fake, step(1, [(0, 0, 6, True)], new_requests=[new(0, [2, 5])])) == expected()[:1]
    return fake


def test_prompt_and_decode_steps_give_the_oracles_tokens_and_end_by_length() -> None:
    fake = started()
    got = expected()[:1]
    for i in range(5):
        changes = grow(0, 2, 7) if i == 2 else {}
        output = fake.submit(step(2 + i, [(0, 6 + i, 1, True)], **changes)).result()
        got += output.token_ids.tolist()
    assert got == expected()
    assert output.finish.tolist() == [FinishReason.LENGTH]


def test_chunks_give_the_same_token_as_one_step() -> None:
    fake = runner()
    assert tokens_of(fake, step(1, [(0, 0, 3, False)], new_requests=[new(0, [2, 5])])) == [-1]
    assert tokens_of(fake, step(2, [(0, 3, 3, True)])) == expected()[:1]


def test_fork_that_copies_the_partial_block_gets_its_own_rows_tokens() -> None:
    fake = started()
    child = new(1, [2, 6], computed=5, row=1)
    rows = [(0, 6, 1, True), (1, 5, 1, True)]
    got = tokens_of(fake, step(2, rows, new_requests=[child], block_copies=[(5, 6)]))
    assert got == [expected()[1], expected(row=1)[0]]


def test_resumed_request_continues_where_it_was() -> None:
    fake = started()
    again = new(1, [3, 4], tokens=PROMPT + expected()[:1], computed=0)
    assert tokens_of(fake, step(2, [(1, 0, 7, True)], freed_slots=[0], new_requests=[again])) == expected()[1:2]


def test_ended_row_is_muted_in_the_step_that_was_launched_ahead() -> None:
    fake = runner()
    eos = expected()[0]
    first = fake.submit(step(1, [(0, 0, 6, True)], new_requests=[new(0, [2, 5], eos_token_ids=(eos,))]))
    second = fake.submit(step(2, [(0, 6, 1, True)]))
    assert first.result().finish.tolist() == [FinishReason.EOS]
    assert second.result().token_ids.tolist() == [-1]


def test_results_are_read_in_order() -> None:
    fake = runner()
    fake.submit(step(1, [(0, 0, 6, True)], new_requests=[new(0, [2, 5])]))
    second = fake.submit(step(2, [(0, 6, 1, True)]))
    with pytest.raises(ContractError, match="out of order"):
        second.result()


def test_row_can_fail_and_poisons_what_it_wrote() -> None:
    fake = runner()
    fake.fail_next[3, 0] = Reason.NON_FINITE_LOGITS
    output = fake.submit(step(1, [(0, 0, 6, True)], new_requests=[new(0, [2, 5])])).result()
    assert output.failed == [(0, Reason.NON_FINITE_LOGITS)]
    stranger = new(1, [2, 6], computed=4, group_id=2, seed=4)
    with pytest.raises(ContractError, match="failed request"):
        fake.submit(step(2, [(1, 4, 2, True)], new_requests=[stranger]))


def test_logprobs_follow_the_tokens() -> None:
    fake = runner()
    spec = LogprobSpec(num_top=2, kind=LogprobKind.RAW_LOGPROB, token_ids=[3])
    request = new(0, [2, 5], logprobs=spec, prompt_logprobs=1)
    output = fake.submit(step(1, [(0, 0, 6, True)], new_requests=[request])).result()
    assert output.logprobs is not None
    assert output.logprobs.chosen.tolist() == [-float(expected()[0])]
    assert [(chunk.start, chunk.ranks.tolist()) for chunk in output.prompt_logprobs] == [(1, [7, 8, 9, 10, 11])]


MISTAKES: dict[str, tuple[SchedulerOutput, str]] = {
    "row of an empty slot": (step(2, [(1, 0, 1, False)]), "empty slot"),
    "position skipped": (step(2, [(0, 7, 1, True)]), "is at 6"),
    "position repeated": (step(2, [(0, 5, 1, True)]), "is at 6"),
    "beyond the tokens": (step(2, [(0, 6, 2, True)]), "beyond the tokens"),
    "samples forgotten": (step(2, [(0, 6, 1, False)]), "samples"),
    "slot taken": (step(2, [(0, 0, 6, True)], new_requests=[new(0, [3, 4])]), "taken"),
    "freed twice": (step(2, [(0, 6, 1, True)], freed_slots=[0, 0]), "holds no request"),
    "block of another": (
        step(2, [(0, 6, 1, True), (1, 0, 6, True)], new_requests=[new(1, [1, 5])]), "both write block",
    ),
    "shared partial block": (step(2, [(1, 5, 1, True)], new_requests=[new(1, [2, 5], computed=5)]), "shared with"),
    "stale block": (step(2, [(1, 4, 2, True)], new_requests=[new(1, [3, 4], computed=4)]), "stale cache"),
    "other prompt's block": (
        step(2, [(1, 4, 2, True)], new_requests=[new(1, [2, 4], tokens=[9, 9, 9, 9, 9, 9], computed=4)]), "stale cache",
    ),
    "no block": (step(2, [(1, 0, 6, True)], new_requests=[new(1, [1])]), "no block"),
    "null block granted": (step(2, [(0, 6, 1, True)], **grow(0, 2, 0)), "no such block"),
    "hole in the table": (step(2, [(0, 6, 1, True)], **grow(0, 3, 1)), "hole"),
    "copies that depend on their order": (
        step(2, [(0, 6, 1, True)], block_copies=[(2, 6), (6, 7)]), "depend on their order",
    ),
    "living group released": (step(2, [(0, 6, 1, True)], released_groups=[1]), "living group"),
    "step id repeated": (step(1, [(0, 6, 1, True)]), "step ids"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_step_that_breaks_the_contract_is_refused(mistake: str) -> None:
    output, message = MISTAKES[mistake]
    with pytest.raises(ContractError, match=message):
        started().submit(output)


def test_without_strictness_a_stale_block_shows_in_the_tokens() -> None:
    fake = runner(strict=False)
    output = step(1, [(0, 4, 2, True)], new_requests=[new(0, [3, 4], computed=4)])
    assert tokens_of(fake, output) != expected()[:1]
