"""Bans and biases that depend on the tokens so far: against the specification and transformers' pipeline restated."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from octavo_kernels import history, reference
from octavo_kernels.reference.history import pack, unpack
from octavo_kernels.state import Bitmap, Feature, Finish, ListSizes, Param, SlotState
from octavo_kernels.workspace import SamplerWorkspace
from reference.hf_pipeline import RowParams, process_logits
from torch import Tensor

N_POSITIONS, POISON = 1024, 0x5A5A5A5A
LISTS = ListSizes(biases=40, sequences=16, sequence_words=256, requested=1)


@dataclass
class Row:
    """A request as a slot holds it."""

    tokens: list[int]
    prompt_len: int
    ngram: int = 0
    prompt_ngram: int = 0
    bad_words: Sequence[tuple[int, ...]] = ()
    bias: Mapping[tuple[int, ...], float] = field(default_factory=dict)
    penalty: float = 1.0
    prompt_penalty: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    finished: int = Finish.RUNNING

    @property
    def features(self) -> Feature:
        uses = {
            Feature.NO_REPEAT_NGRAM: self.ngram > 0,
            Feature.ENCODER_NO_REPEAT_NGRAM: self.prompt_ngram > 0,
            Feature.BAD_WORDS: bool(self.bad_words),
            Feature.BIAS: bool(self.bias),
            Feature.REPETITION_PENALTY: self.penalty != 1.0,
            Feature.ENCODER_REPETITION_PENALTY: self.prompt_penalty != 1.0,
            Feature.OUTPUT_PENALTY: self.frequency != 0.0 or self.presence != 0.0,
        }
        bits = Feature.SAMPLE | Feature.TOP_K
        for bit, used in uses.items():
            bits |= bit if used else Feature.NONE
        return bits

    def hf(self) -> RowParams:
        """What transformers is asked for."""
        return RowParams(
            max_length=N_POSITIONS + 1,
            sequence_bias=self.bias,
            encoder_repetition_penalty=self.prompt_penalty,
            repetition_penalty=self.penalty,
            no_repeat_ngram_size=self.ngram,
            encoder_no_repeat_ngram_size=self.prompt_ngram,
            bad_words_ids=self.bad_words,
        )


def bits_of(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(torch.int32)


def put(row: Tensor, values: Sequence[int]) -> None:
    row[: len(values)] = torch.tensor(values, dtype=torch.int32, device=row.device)


def admit(state: SlotState, slot: int, row: Row) -> None:
    """Writes what the engine would at admission."""
    device, params = state.arena.device, state.params[slot]
    state.length[slot] = len(row.tokens)
    state.finished[slot] = row.finished
    put(state.hist[slot], row.tokens)
    params[Param.FEATURES] = int(row.features)
    params[Param.PROMPT_LEN] = row.prompt_len
    params[Param.NO_REPEAT_NGRAM_SIZE] = row.ngram
    params[Param.ENCODER_NO_REPEAT_NGRAM_SIZE] = row.prompt_ngram
    floats = [row.penalty, 1 / row.prompt_penalty, row.frequency, row.presence]
    params[Param.REPETITION_PENALTY : Param.PRESENCE_PENALTY + 1] = bits_of(floats, device)
    for bitmap, tokens in ((Bitmap.SEEN, row.tokens), (Bitmap.PROMPT_SEEN, row.tokens[: row.prompt_len])):
        seen = torch.zeros(state.bitmaps.shape[2] * 32, dtype=torch.bool)
        seen[tokens] = True
        state.bitmaps[slot, bitmap] = pack(seen).to(device)
    output = row.tokens[row.prompt_len :]
    distinct = list(dict.fromkeys(output))
    state.num_counts[slot] = len(distinct)
    put(state.count_ids[slot], distinct)
    put(state.counts[slot], [output.count(token) for token in distinct])
    ids = list(dict.fromkeys(sequence[-1] for sequence in row.bias))
    params[Param.NUM_BIASES] = len(ids)
    put(state.bias_ids[slot], ids)
    state.bias_values[slot, : len(ids)] = bits_of([row.bias.get((token,), 0.0) for token in ids], device)
    lengths = list(dict.fromkeys(len(sequence) for sequence in row.bias if len(sequence) > 1))
    words, num_sequences = [], 0
    for sequence in sorted((s for s in row.bias if len(s) > 1), key=lambda s: lengths.index(len(s))):
        bias = int(bits_of([row.bias[sequence]], torch.device("cpu")))
        words += [len(sequence), ids.index(sequence[-1]), bias, *sequence[:-1]]
        num_sequences += 1
    params[Param.NUM_BIAS_SEQUENCES] = num_sequences
    put(state.bias_sequences[slot], words)
    params[Param.NUM_BAD_WORDS] = len(row.bad_words)
    put(state.bad_words[slot], [w for word in row.bad_words for w in (len(word), word[-1], 0, *word[:-1])])


def workspace_of(num_rows: int, vocab_size: int, device: torch.device) -> tuple[SamplerWorkspace, dict[str, Tensor]]:
    """Poisoned, with poison around scores and banned; the second value: those whole tensors."""
    workspace = SamplerWorkspace.allocate(num_rows, vocab_size, device)
    whole, views = {}, {}
    for name in ("scores", "banned"):
        tensor = getattr(workspace, name)
        big = torch.full((tensor.numel() + 128,), POISON, dtype=torch.int32, device=device).view(tensor.dtype)
        whole[name], views[name] = big, big[64:-64].view(tensor.shape)
    return dataclasses.replace(workspace, **views), whole


def is_poison(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) == POISON


def run(state: SlotState, logits: Tensor, slots: Sequence[int], *, reciprocal: bool = False) -> SamplerWorkspace:
    """Kernel and specification leave the same; nothing else is written."""
    device, vocab_size = logits.device, state.vocab_size
    row_slots = torch.tensor(slots, dtype=torch.int32, device=device)
    expected, _ = workspace_of(len(slots), vocab_size, device)
    actual, whole = workspace_of(len(slots), vocab_size, device)
    before, logits_before = state.arena.clone(), logits.clone()
    reference.apply_history(logits, state, row_slots, expected, reciprocal=reciprocal)
    history.apply_history(logits, state, row_slots, actual, reciprocal=reciprocal)
    assert torch.equal(state.arena, before), "the state is only read"
    assert torch.equal(logits.nan_to_num(), logits_before.nan_to_num()), "the logits are only read"
    for name, tensor in whole.items():
        assert is_poison(tensor[:64]).all() and is_poison(tensor[-64:]).all(), f"{name}: written outside"
    assert torch.equal(actual.banned, expected.banned)
    columns = slice(0, vocab_size)
    assert torch.equal(actual.scores[:, columns].view(torch.int32), expected.scores[:, columns].view(torch.int32))
    return actual


def logits_of(num_rows: int, vocab_size: int, device: torch.device, dtype=torch.float32, seed: int = 0) -> Tensor:
    """Padded columns hold NaN: nobody may look at them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((num_rows, -(-vocab_size // 64) * 64), torch.nan)
    logits[:, :vocab_size] = torch.randn(num_rows, vocab_size, generator=generator) * 4
    return logits.to(dtype).to(device)


def random_row(rng: random.Random, vocab_size: int) -> Row:
    def words(least: int, most: int) -> list[tuple[int, ...]]:
        """Some that end the history, some that do not; tokens are few, so that last tokens coincide."""
        chosen: dict[tuple[int, ...], None] = {}
        for _ in range(rng.randrange(1, most)):
            size = rng.choice([least, 2, 2, 3, 3, 5])
            prefix = tokens[len(tokens) - (size - 1) :] if rng.random() < 0.6 else []
            word = [*prefix, *(rng.randrange(vocab_size) for _ in range(size - len(prefix)))]
            chosen[tuple(word)] = None
        return list(chosen)

    length = rng.choice([1, 2, 3, 5, 17, 64, 65, 200, rng.randrange(1, 120)])
    tokens = [rng.randrange(vocab_size) for _ in range(length)]
    row = Row(tokens, rng.randrange(1, length + 1))
    if rng.random() < 0.5:
        row.ngram = rng.choice([1, 2, 2, 3, 4, length - 1, length, length + 1])
    if rng.random() < 0.4:
        row.prompt_ngram = rng.choice([1, 2, 2, 3, row.prompt_len, row.prompt_len + 1, length + 3])
    if rng.random() < 0.5:
        row.bad_words = words(2, 9)
    if rng.random() < 0.6:
        row.bias = {word: rng.choice([-3.7, 0.1, 0.7, 2.3, 1e-3, 30.0]) for word in words(1, 12)}
    if rng.random() < 0.4:
        row.penalty = rng.choice([0.7, 1.3, 1.9])
    if rng.random() < 0.4:
        row.prompt_penalty = rng.choice([0.7, 1.1])
    if rng.random() < 0.4:
        row.frequency, row.presence = rng.choice([0.3, -0.7, 0.0]), rng.choice([0.9, 0.0, -0.4])
    return row


def expected_bans(row: Row, vocab_size: int) -> Tensor:
    only = dataclasses.replace(row, bias={}, penalty=1.0, prompt_penalty=1.0)
    return torch.isneginf(process_logits(torch.zeros(vocab_size), torch.tensor(row.tokens), row.prompt_len, only.hf()))


def expected_scores(x: Tensor, row: Row, device_name: str) -> Tensor:
    only = dataclasses.replace(row, ngram=0, prompt_ngram=0, bad_words=())
    x = process_logits(x, torch.tensor(row.tokens), row.prompt_len, only.hf(), device_name)
    counts = torch.bincount(torch.tensor(row.tokens[row.prompt_len :], dtype=torch.long), minlength=len(x))
    x = x - torch.tensor(row.frequency) * counts
    return torch.where(counts > 0, x - torch.tensor(row.presence), x)


# ---- against transformers' pipeline


@pytest.mark.parametrize(
    ("vocab_size", "seed", "reciprocal"), [(5, 0, False), (13, 1, True), (32, 2, False), (97, 3, True)]
)
def test_random_histories_give_what_transformers_gives(
    device: torch.device, vocab_size: int, seed: int, reciprocal: bool
):
    rng = random.Random(seed)
    rows = [random_row(rng, vocab_size) for _ in range(40)]
    state = SlotState.allocate(len(rows), N_POSITIONS, 16, vocab_size, device, LISTS)
    for slot, row in enumerate(rows):
        admit(state, slot, row)
    logits = logits_of(len(rows), vocab_size, device, seed=seed)
    workspace = run(state, logits, range(len(rows)), reciprocal=reciprocal)
    bans = scores = 0
    for slot, row in enumerate(rows):
        if row.features & (Feature.NO_REPEAT_NGRAM | Feature.ENCODER_NO_REPEAT_NGRAM | Feature.BAD_WORDS):
            banned = unpack(workspace.banned[slot]).cpu()
            assert torch.equal(banned[:vocab_size], expected_bans(row, vocab_size)), row
            assert not banned[vocab_size:].any()
            bans += bool(banned.any())
        else:
            assert is_poison(workspace.banned[slot]).all()
        if row.features & (Feature.BIAS | Feature.OUTPUT_PENALTY):
            wanted = expected_scores(logits[slot, :vocab_size].cpu(), row, "cuda" if reciprocal else "cpu")
            assert torch.equal(workspace.scores[slot, :vocab_size].cpu(), wanted), row
            scores += 1
        else:
            assert is_poison(workspace.scores[slot]).all()
    assert bans > 10 and scores > 10


@pytest.mark.parametrize("size", [1, 2, 3, 200, 1024, 1025])
@pytest.mark.parametrize("length", [1, 2, 3, 255, 256, 257, 1023, 1025])
def test_ngrams_of_any_size_and_history(device: torch.device, size: int, length: int):
    tokens = ([1, 2, 3, 1, 2] * 205)[:length]
    state = SlotState.allocate(1, N_POSITIONS, 16, 40, device, LISTS)
    row = Row(tokens, max(1, length - 2), ngram=size, prompt_ngram=size)
    admit(state, 0, row)
    workspace = run(state, logits_of(1, 40, device), [0])
    assert torch.equal(unpack(workspace.banned[0]).cpu()[:40], expected_bans(row, 40))
    alone = dataclasses.replace(row, ngram=0)
    admit(state, 0, alone)
    workspace = run(state, logits_of(1, 40, device), [0])
    assert torch.equal(unpack(workspace.banned[0]).cpu()[:40], expected_bans(alone, 40))


def test_biases_are_added_in_list_order(device: torch.device):
    """Sums that depend on the order: 1e8 + 1 - 1e8 is 0 in fp32, 1e8 - 1e8 + 1 is 1."""
    tokens, state = [4, 5, 6], SlotState.allocate(1, N_POSITIONS, 16, 40, device, LISTS)
    for order, total in (([1e8, 1.0, -1e8], 0.0), ([1e8, -1e8, 1.0], 1.0)):
        prefixes = [(6,), (5, 6), (4, 5, 6)]
        bias = {(*prefix, 7): value for prefix, value in zip(prefixes, order, strict=True)}
        admit(state, 0, Row(tokens, 1, bias=bias))
        logits = torch.zeros(1, 64, device=device)
        assert run(state, logits, [0]).scores[0, 7] == total


def test_prefixes_longer_than_a_tile_match_to_the_first_token(device: torch.device):
    tokens = [(7 * i) % 31 for i in range(100)]
    for size in (63, 64, 65, 99):
        prefix = tuple(tokens[-size:])
        wrong = ((prefix[0] + 1) % 31, *prefix[1:])
        state = SlotState.allocate(1, N_POSITIONS, 16, 40, device, LISTS)
        admit(state, 0, Row(tokens, 1, bad_words=[(*wrong, 33), (*prefix, 34)], bias={(*wrong, 35): 9.0}))
        workspace = run(state, torch.zeros(1, 64, device=device), [0])
        assert unpack(workspace.banned[0]).nonzero().flatten().tolist() == [34]
        assert (workspace.scores[0, :40] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_large_vocabulary_takes_several_segments(device: torch.device, dtype: torch.dtype):
    rng, vocab_size = random.Random(7), 2 * history.SEGMENT + 77
    tokens = [rng.randrange(vocab_size) for _ in range(1025)]
    edges = [0, history.SEGMENT - 1, history.SEGMENT, 2 * history.SEGMENT, vocab_size - 1]
    row = Row([*edges, *tokens[10:]], 6, penalty=1.3, prompt_penalty=0.8, frequency=0.3, presence=0.2, ngram=1)
    row.bias = {(edge,): 0.5 for edge in edges} | {(row.tokens[-1], edge): 0.25 for edge in edges}
    state = SlotState.allocate(2, N_POSITIONS, 16, vocab_size, device, LISTS)
    admit(state, 0, row)
    admit(state, 1, Row([1], 1))
    logits = logits_of(2, vocab_size, device, dtype)
    workspace = run(state, logits, [0, 1])
    wanted = expected_scores(logits[0, :vocab_size].float().cpu(), row, "cpu")
    assert torch.equal(workspace.scores[0, :vocab_size].cpu(), wanted)


def test_more_biased_tokens_than_one_tile_holds(device: torch.device):
    vocab_size = 3000
    state = SlotState.allocate(1, N_POSITIONS, 16, vocab_size, device, ListSizes(biases=1152, sequence_words=256))
    bias = {(2 * token,): 0.25 + token for token in range(1100)} | {(1, 2 * 1090): 0.5, (1, 3): 0.5}
    row = Row([0, 1], 1, bias=bias)
    admit(state, 0, row)
    logits = logits_of(1, vocab_size, device)
    workspace = run(state, logits, [0])
    assert torch.equal(
        workspace.scores[0, :vocab_size].cpu(), expected_scores(logits[0, :vocab_size].cpu(), row, "cpu")
    )


# ---- rows


def test_a_row_does_not_depend_on_its_batch(device: torch.device):
    rng = random.Random(11)
    rows = [random_row(rng, 97) for _ in range(8)]
    state = SlotState.allocate(len(rows), N_POSITIONS, 16, 97, device, LISTS)
    for slot, row in enumerate(rows):
        admit(state, slot, row)
    logits = logits_of(len(rows), 97, device)
    together = run(state, logits, range(len(rows)))
    order = [*range(len(rows))]
    rng.shuffle(order)
    shuffled = run(state, logits[order], order)
    for place, slot in enumerate(order):
        alone = run(state, logits[slot : slot + 1], [slot])
        for other, at in ((together, slot), (shuffled, place)):
            assert torch.equal(other.banned[at], alone.banned[0])
            assert torch.equal(other.scores[at, :97].view(torch.int32), alone.scores[0, :97].view(torch.int32))


def test_padding_finished_and_plain_rows_are_left_alone(device: torch.device):
    state = SlotState.allocate(2, N_POSITIONS, 16, 97, device, LISTS)
    busy = Row([1, 2, 1], 2, ngram=2, bad_words=[(1, 5)], bias={(3,): 1.0}, frequency=1.0)
    admit(state, 0, dataclasses.replace(busy, finished=Finish.LENGTH))
    admit(state, 1, Row([1, 2, 1], 2, penalty=1.5))
    admit(state, 2, busy)  # the padding slot
    slots = [0, 1, 2, -1, 3, -(2**31), 2**31 - 1]
    workspace = run(state, logits_of(len(slots), 97, device), slots)
    assert is_poison(workspace.scores).all() and is_poison(workspace.banned).all()


def test_bans_of_the_last_step_are_gone(device: torch.device):
    state = SlotState.allocate(1, N_POSITIONS, 16, 97, device, LISTS)
    admit(state, 0, Row([1, 2, 1], 2, ngram=2))
    assert unpack(run(state, logits_of(1, 97, device), [0]).banned[0]).nonzero().flatten().tolist() == [2]
    admit(state, 0, Row([1, 2, 1, 5], 2, ngram=2))
    assert not run(state, logits_of(1, 97, device), [0]).banned.any()


# ---- wrong data on the device


def test_wrong_lengths_and_sizes_stay_inside_the_slot(device: torch.device):
    """The neighbours hold what would match if a kernel read on."""
    state = SlotState.allocate(3, N_POSITIONS, 16, 40, device, LISTS)
    for slot in range(3):
        admit(state, slot, Row([1, 2, 3] * 341 + [1, 2], 1024, ngram=3, prompt_ngram=2, bad_words=[(1, 2, 5)]))
    wrong = [2**31 - 1, 1026, 0, -1, -(2**31)]
    for value in wrong:
        state.length[1] = value
        run(state, logits_of(1, 40, device), [1])
    state.length[1] = 1025
    for column in (Param.PROMPT_LEN, Param.NO_REPEAT_NGRAM_SIZE, Param.ENCODER_NO_REPEAT_NGRAM_SIZE):
        before = int(state.params[1, column])
        for value in wrong:
            state.params[1, column] = value
            run(state, logits_of(1, 40, device), [1])
        state.params[1, column] = before


def test_tokens_outside_the_vocabulary_are_not_banned(device: torch.device):
    state = SlotState.allocate(1, N_POSITIONS, 16, 40, device, LISTS)
    admit(state, 0, Row([1, 2, 1, 3, 1, 4, 1, 9, 1], 9, ngram=2, bad_words=[(1, 5), (1, 6), (1, 7), (1, 8)]))
    put(state.hist[0], [1, -1, 1, 40, 1, 2**31 - 1, 1, 9, 1])
    state.bad_words[0, [1, 5, 9]] = torch.tensor([-1, 40, -(2**31)], dtype=torch.int32, device=device)
    workspace = run(state, logits_of(1, 40, device), [0])
    assert unpack(workspace.banned[0]).nonzero().flatten().tolist() == [8, 9]


@pytest.mark.parametrize("size", [-(2**31), -1, 0, 1, 2**31 - 1, 254])
def test_a_broken_list_ends_where_it_breaks(device: torch.device, size: int):
    state = SlotState.allocate(2, N_POSITIONS, 16, 40, device, LISTS)
    row = Row([1, 2], 1, bad_words=[(2, 5), (2, 6), (2, 7)], bias={(2, 5): 1.0, (2, 6): 1.0, (2, 7): 1.0})
    admit(state, 0, row)
    admit(state, 1, row)
    state.bad_words[0, 4] = state.bias_sequences[0, 4] = size
    workspace = run(state, torch.zeros(1, 64, device=device), [0])
    assert unpack(workspace.banned[0]).nonzero().flatten().tolist() == [5]
    assert workspace.scores[0, :40].nonzero().flatten().tolist() == [5]


def test_a_sequence_that_would_leave_its_list_is_not_read(device: torch.device):
    """The last slot's list goes on in its neighbour's, where the tokens are that would complete the match."""
    tokens, words = [(5 * i) % 29 for i in range(300)], LISTS.sequence_words
    state = SlotState.allocate(2, N_POSITIONS, 16, 40, device, LISTS)
    admit(state, 0, Row(tokens, 1, bad_words=[(33, 1)], bias={(33, 1): 1.0, (2,): 0.0}))
    size = words - 4
    for part, last in ((state.bad_words, 7), (state.bias_sequences, 1)):
        put(part[0, 4:], [size, last, int(bits_of([1.0], torch.device("cpu")))])
        part.view(-1)[7 : 7 + size - 1] = torch.tensor(tokens[1 - size :], dtype=torch.int32, device=device)
    state.params[0, [Param.NUM_BAD_WORDS, Param.NUM_BIAS_SEQUENCES]] = 2
    workspace = run(state, torch.zeros(1, 64, device=device), [0])
    assert not workspace.banned.any() and not workspace.scores[0, :40].any()


def test_wrong_counts_of_lists_are_capped(device: torch.device):
    state = SlotState.allocate(2, N_POSITIONS, 16, 97, device, LISTS)
    row = Row([1, 2, 3, 4, 4], 2, bad_words=[(4, 5)], bias={(4, 5): 1.0, (6,): 2.0}, frequency=0.5, presence=0.25)
    for slot in (0, 1):
        admit(state, slot, row)
    state.bias_ids[0, 2:] = torch.arange(97, 97 + LISTS.biases - 2, dtype=torch.int32, device=device)
    state.bias_ids[1] = 7  # what a kernel that reads on would find
    state.bias_values[1] = bits_of([100.0], device)
    good = run(state, torch.zeros(1, 128, device=device), [0])
    for value in (LISTS.biases + 1, 2**31 - 1):
        state.params[0, [Param.NUM_BIASES, Param.NUM_BIAS_SEQUENCES, Param.NUM_BAD_WORDS]] = value
        state.num_counts[0] = value
        capped = run(state, torch.zeros(1, 128, device=device), [0])
        assert torch.equal(capped.scores[:, :97], good.scores[:, :97]) and torch.equal(capped.banned, good.banned)
    state.params[0, [Param.NUM_BIASES, Param.NUM_BIAS_SEQUENCES, Param.NUM_BAD_WORDS]] = -1
    state.num_counts[0] = -1
    none = run(state, torch.zeros(1, 128, device=device), [0])
    assert not none.scores[:, :97].any() and not none.banned.any()


def test_biases_and_counts_outside_the_vocabulary_are_skipped(device: torch.device):
    state = SlotState.allocate(1, N_POSITIONS, 16, 40, device, LISTS)
    admit(state, 0, Row([1, 2, 3, 4], 1, bias={(4, 5): 1.0, (6,): 2.0, (7,): 3.0}, frequency=1.0))
    put(state.bias_ids[0], [-1, 40, 7])
    put(state.count_ids[0], [-(2**31), 63, 3])
    state.bias_sequences[0, 1] = 2**31 - 1
    workspace = run(state, torch.zeros(1, 64, device=device), [0])
    assert workspace.scores[0, :40].nonzero().flatten().tolist() == [3, 7]


# ---- wrong arguments


def test_wrong_arguments_are_named(device: torch.device):
    state = SlotState.allocate(4, N_POSITIONS, 16, 97, device, LISTS)
    slots = torch.zeros(2, dtype=torch.int32, device=device)
    logits, workspace = logits_of(2, 97, device), SamplerWorkspace.allocate(2, 97, device)
    wrong = [
        ("row_slots", (logits, state, slots.long(), workspace)),
        ("row_slots", (logits, state, slots[:, None], workspace)),
        ("row_slots", (logits, state, slots.repeat(2)[::2], workspace)),
        ("logits", (logits.double(), state, slots, workspace)),
        ("logits", (logits[:1], state, slots, workspace)),
        ("logits", (logits[:, :96], state, slots, workspace)),
        ("logits", (logits.repeat(1, 2)[:, ::2], state, slots, workspace)),
        ("workspace", (logits, state, slots, SamplerWorkspace.allocate(2, 96, device))),
        ("workspace", (logits, state, slots, SamplerWorkspace.allocate(1, 97, device))),
    ]
    for name, arguments in wrong:
        with pytest.raises(ValueError, match=f"^{name}:"):
            history.apply_history(*arguments, reciprocal=False)
