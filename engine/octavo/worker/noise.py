"""Random numbers of seeded sampling: those of `torch.manual_seed(seed); generate()` on the same kind of device.

`torch.multinomial` with one draw is argmax(p / q), where q is an exponential fill from the generator
(pytorch/pytorch `aten/src/ATen/native/Distributions.cpp`). generate() draws a fill of [n, V] per step for n sequences,
so the numbers of step t and row r are a function of (seed, n, t, r): they depend on nothing else in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

LOW_53_BITS = 2**53 - 1
KEPT_FILLS = 2


class RandomNumbers(Protocol):
    """What the host's choices need of random numbers, by group."""

    def open(self, group_id: int, seed: int, num_rows: int) -> None: ...

    def close(self, group_id: int) -> None: ...

    def row_ended(self, group_id: int, row: int) -> None: ...

    def exponentials(self, group_id: int, row: int, step: int, token_ids: Tensor | None = None) -> Tensor: ...


@dataclass(slots=True)
class _Stream:
    """The numbers of one prompt's sequences."""

    generator: torch.Generator
    row_steps: list[int]
    """[n] first step that a row has not drawn yet."""
    step: int = 0
    """Where the generator stands."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """The generator's state before each step, from the last one of the slowest row, which may ask again, to `step`."""
    blocks: dict[int, Tensor] = field(default_factory=dict)
    """The fills that were used last, by step: siblings are one step apart, since they fork one step late; unused with
    one row."""


class Noise:
    """Streams by group id. Draws are lazy: a step that nobody samples costs nothing."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._streams: dict[int, _Stream] = {}
        self._raw_words = device.type == "cpu" and _words_give_exponentials()
        """Whether a fill is kept as random words, of which only those looked at become exponentials: a fill of 50257
        takes 0.22 instead of 1.6 ms."""

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, group_id: int, seed: int, num_rows: int) -> None:
        """Starts the stream of a group; does nothing if it is open (a sequence came back after a preemption)."""
        if group_id not in self._streams:
            generator = torch.Generator(device=self.device).manual_seed(seed)
            self._streams[group_id] = _Stream(generator, row_steps=[0] * num_rows)

    def close(self, group_id: int) -> None:
        self._streams.pop(group_id, None)

    def exponentials(self, group_id: int, row: int, step: int, token_ids: Tensor | None = None) -> Tensor:
        """Numbers of one row at one step: float32 [V], or [K] those of `token_ids` (int64 [K]).

        `step` counts the tokens of the sequence that were sampled before. A row may ask for its last step again.
        """
        words = self._fill_of(self._streams[group_id], row, step)[row]
        if token_ids is not None:
            words = words[token_ids]
        if self._raw_words:
            return torch.log1p((words & LOW_53_BITS).double() * -(2.0**-53)).neg_().float()
        return words

    def _fill_of(self, stream: _Stream, row: int, step: int) -> Tensor:
        num_rows = len(stream.row_steps)
        assert step >= stream.row_steps[row] - 1, "a row asked for a step before its last"
        stream.row_steps[row] = step + 1
        block = stream.blocks.pop(step, None)
        if block is None and step >= stream.step:
            self._skip_to(stream, step, keep_states=num_rows > 1)
            stream.states[step] = stream.generator.get_state()
            block = self._draw(stream.generator, num_rows)
            stream.step = step + 1
        elif block is None:
            block = self._redraw(stream, step)
        if num_rows > 1:
            stream.blocks[step] = block
            if len(stream.blocks) > KEPT_FILLS:
                del stream.blocks[next(iter(stream.blocks))]
        self._forget(stream)
        return block

    def _skip_to(self, stream: _Stream, step: int, *, keep_states: bool) -> None:
        """Draws what lies before `step`; there is something only if a stream is opened at a later step."""
        while stream.step < step:
            if keep_states:
                stream.states[stream.step] = stream.generator.get_state()
            self._draw(stream.generator, len(stream.row_steps))
            stream.step += 1

    def _redraw(self, stream: _Stream, step: int) -> Tensor:
        """The fill of an earlier step, for a row that fell behind or asks again."""
        newest = stream.generator.get_state()
        stream.generator.set_state(stream.states[step])
        block = self._draw(stream.generator, len(stream.row_steps))
        stream.generator.set_state(newest)
        return block

    @staticmethod
    def _forget(stream: _Stream) -> None:
        """Drops the states before the slowest row's last step; they are in order of steps."""
        oldest = min(stream.row_steps) - 1
        while stream.states and (first := next(iter(stream.states))) < oldest:
            del stream.states[first]

    def row_ended(self, group_id: int, row: int) -> None:
        """The row will not draw again: the others need not keep what it did not draw."""
        if (stream := self._streams.get(group_id)) is not None:
            stream.row_steps[row] = 2**31

    def _draw(self, generator: torch.Generator, num_rows: int) -> Tensor:
        shape = (num_rows, self.vocab_size)
        if self._raw_words:
            return torch.empty(shape, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        return torch.empty(shape, device=self.device).exponential_(generator=generator)


def _words_give_exponentials() -> bool:
    """Whether this build of torch fills exponentials from one 64-bit word each, as -log1p(-word's low 53 bits / 2^53).

    Not so where it calls MKL's own generator.
    """
    one, two = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    expected = torch.empty(3, 1365).exponential_(generator=one)
    words = torch.empty(3, 1365, dtype=torch.int64).random_(-(2**63), None, generator=two)
    actual = torch.log1p((words & LOW_53_BITS).double() * -(2.0**-53)).neg_().float()
    return torch.equal(expected, actual) and torch.equal(one.get_state(), two.get_state())
