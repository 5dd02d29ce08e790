"""Random rows for the sampler's tests, and what the reference makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from octavo.step import LogprobSpec, NewRequest, SchedulerOutput
from octavo.types import ExponentialDecay, GenerationParams, LogprobKind, SequenceBias
from octavo.worker.noise import Noise
from octavo.worker.request_states import RequestStates
from octavo.worker.sampler import Sampler, SamplerOutput
from reference.hf_pipeline import RowParams, process_row

N_POSITIONS = 128


@dataclass
class Row:
    """One sampling row: its logits, history and parameters (by generate()'s names)."""

    logits: torch.Tensor
    token_ids: list[int]
    prompt_len: int
    params: dict = field(default_factory=dict)
    eos: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    seed: int = 0
    row: int = 0
    num_rows: int = 1
    group: int | None = None
    logprobs: LogprobSpec | None = None
    max_total_tokens: int = N_POSITIONS + 1

    @property
    def step(self) -> int:
        return len(self.token_ids) - self.prompt_len

    def request(self, slot: int) -> NewRequest:
        return NewRequest(
            slot=slot,
            group_id=slot if self.group is None else self.group,
            row=self.row,
            num_rows=self.num_rows,
            token_ids=np.array(self.token_ids, np.int32),
            prompt_len=self.prompt_len,
            num_computed_tokens=0,
            block_ids=np.array([], np.int32),
            params=GenerationParams(**self.params),
            max_total_tokens=self.max_total_tokens,
            eos_token_ids=self.eos,
            stop_token_ids=self.stop,
            seed=self.seed,
            logprobs=self.logprobs,
        )

    def expected_scores(self, *, intervals: bool) -> torch.Tensor:
        """[V] the processed row, by the reference."""
        names = self.transformers_names()
        if "forced_eos_token_id" in names:
            names["forced_eos_token_ids"] = tuple(names.pop("forced_eos_token_id"))
        return process_row(
            self.logits.float(),
            torch.tensor(self.token_ids),
            self.prompt_len,
            RowParams(max_length=self.max_total_tokens, eos_token_ids=self.eos + self.stop, **names),
            intervals=intervals,
        )

    def transformers_names(self) -> dict:
        """The parameters with biases and decay as generate() takes them."""
        names = dict(self.params)
        bias = {tuple(entry.token_ids): entry.bias for entry in names.pop("sequence_bias", [])}
        bias |= {(token,): value for token, value in names.pop("logit_bias", {}).items()}
        if bias:
            names["sequence_bias"] = bias
        if (decay := names.get("exponential_decay_length_penalty")) is not None:
            names["exponential_decay_length_penalty"] = (decay.start_index, decay.factor)
        return names

    def expected_token(self, scores: torch.Tensor) -> int:
        """What generate() chooses from `scores` at this row's step, after torch.manual_seed(seed)."""
        if not self.params.get("do_sample"):
            return int(scores.argmax())
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.step):
            torch.empty(self.num_rows, scores.numel()).exponential_(generator=generator)
        probs = scores.softmax(-1).expand(self.num_rows, -1)
        return int(torch.multinomial(probs, 1, generator=generator)[self.row])


def every_processed_logit(vocab_size: int) -> LogprobSpec:
    return LogprobSpec(0, LogprobKind.PROCESSED_LOGIT, list(range(vocab_size)))


class Bench:
    """A sampler over fresh states, one slot per row."""

    def __init__(self, vocab_size: int, num_slots: int) -> None:
        self.states = RequestStates(num_slots, N_POSITIONS, 16, vocab_size)
        self.noise = Noise(vocab_size, torch.device("cpu"))
        self.sampler = Sampler(self.states, self.noise)

    def add(self, rows: Sequence[Row], slots: Sequence[int]) -> None:
        requests = [row.request(slot) for row, slot in zip(rows, slots, strict=True)]
        self.states.apply(step_with(new_requests=requests))
        for request in requests:
            self.noise.open(request.group_id, request.seed, request.num_rows)

    def sample(self, rows: Sequence[Row], slots: Sequence[int]) -> SamplerOutput:
        return self.sampler.sample(torch.stack([row.logits for row in rows]), np.array(slots, np.int32))


def step_with(**fields: object) -> SchedulerOutput:
    empty = np.empty(0, np.int32)
    return SchedulerOutput(0, empty, empty, empty, empty.astype(bool), 0, **fields)  # type: ignore[arg-type]


def sample_together(rows: Sequence[Row]) -> SamplerOutput:
    bench = Bench(rows[0].logits.numel(), len(rows))
    order = list(range(len(rows)))
    bench.add(rows, order)
    return bench.sample(rows, order)


def random_row(rng: random.Random, vocab_size: int, *, bf16: bool = False) -> Row:
    """A row with a random mix of parameters; all processed logits are asked for."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    length = rng.randint(1, 40)
    prompt_len = rng.randint(1, length)
    token_ids = torch.randint(0, min(vocab_size, 60), (length,), generator=generator).tolist()
    logits = torch.randn(vocab_size, generator=generator) * rng.choice([1.0, 3.0, 6.0]) - rng.choice([0.0, 30.0, 100.0])
    params: dict = {"do_sample": rng.random() < 0.8}

    def sometimes(probability: float, name: str, *choices: object) -> None:
        if rng.random() < probability:
            params[name] = rng.choice(choices)

    params["top_k"] = rng.choice([0, 1, 5, 50, 63, 64, 500, 3000]) if params["do_sample"] else 50
    if params["do_sample"]:
        sometimes(0.5, "temperature", 0.3, 0.7, 1.3)
        sometimes(0.5, "top_p", 0.0, 0.5, 0.9, 0.95)
        sometimes(0.3, "min_p", 0.0, 0.05, 0.2)
        sometimes(0.3, "typical_p", 0.2, 0.9)
        sometimes(0.25, "top_h", 0.3, 0.6)
        sometimes(0.25, "epsilon_cutoff", 3e-4, 0.05)
        sometimes(0.25, "eta_cutoff", 3e-4, 0.02)
    sometimes(0.4, "repetition_penalty", 0.8, 1.3)
    sometimes(0.3, "logit_bias", {4: 2.5, 9: -3.0}, {9: 1 / 3, token_ids[-1]: -1.3, vocab_size - 1: 50.0})
    sometimes(0.4, "min_new_tokens", 1, 10)
    if "min_new_tokens" not in params:
        sometimes(0.3, "min_length", 5, 30)
    eos = rng.choice([(vocab_size - 1,), (vocab_size - 1, 5), ()])
    stop = rng.choice([(), (7,)])
    if rng.random() < 0.5:
        _add_rare(rng, params, token_ids, vocab_size, sometimes)
        if eos and not stop and "remove_invalid_values" not in params:
            sometimes(0.4, "exponential_decay_length_penalty", ExponentialDecay(0, 1.2), ExponentialDecay(3, 1.2))
    return Row(
        logits.bfloat16() if bf16 else logits,
        token_ids,
        prompt_len,
        params,
        eos=eos,
        stop=stop,
        seed=rng.randrange(2**64),
        logprobs=every_processed_logit(vocab_size),
        max_total_tokens=rng.choice([length + 1, N_POSITIONS + 1]),
    )


def _add_rare(
    rng: random.Random, params: dict, token_ids: list[int], vocab_size: int, sometimes: Callable[..., None]
) -> None:
    last, tail = token_ids[-1], token_ids[-3:]
    if "logit_bias" not in params:
        sometimes(
            0.4,
            "sequence_bias",
            [SequenceBias([4], 2.5), SequenceBias([last, 9], -3.0), SequenceBias([8, 9], 1.0)],
            [SequenceBias([*tail, 9], 0.1), SequenceBias([last, 9], 0.7), SequenceBias([9], -1.3)],
            [SequenceBias([last, 9], 0.3), SequenceBias([*tail, 9], 1e-3), SequenceBias([9], 1 / 3)],
        )
    sometimes(0.3, "encoder_repetition_penalty", 0.8, 1.5)
    sometimes(0.4, "no_repeat_ngram_size", 1, 2, 3)
    sometimes(0.3, "encoder_no_repeat_ngram_size", 1, 2, 4)
    sometimes(0.4, "bad_words_ids", [[3], [last, 11]], [[1, 2, 3], [last, 11], [*tail, 12]])
    sometimes(0.2, "allowed_token_ids", [2, 3, 40, 8, vocab_size - 1])
    sometimes(0.1, "forced_bos_token_id", 17)
    sometimes(0.15, "forced_eos_token_id", [vocab_size - 1], [vocab_size - 1, 6])
    sometimes(0.15, "remove_invalid_values", True)
    sometimes(0.3, "suppress_tokens", [10, 13])
    sometimes(0.3, "begin_suppress_tokens", [14, 15])
