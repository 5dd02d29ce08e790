"""State of the running requests in device memory, as the kernels read and write it.

Everything is a view of one int32 arena, so that any change that the host makes is a list of (word, value) and one
kernel (`inputs.apply_diffs`) carries out all of a step's. Floats are stored by their bits. Rows are slots; the last
slot, `padding_slot`, belongs to no request: padding rows of a batch point to it.

Sizes: S + 1 slots, N = n_positions, B blocks per table, V tokens in the vocabulary, W = ceil(V / 32) words of a bitmap.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor


class Feature(enum.IntFlag):
    """What a request uses of the sampler, in the order in which it acts: transformers' `_get_logits_processor`.

    The numbers in the comments are those of the pipeline's steps in docs/generation.md.
    """

    NONE = 0
    BIAS = 1 << 0  # 2: `bias_*` lists; sequences of one token are their initial sums
    ENCODER_REPETITION_PENALTY = 1 << 1  # 3: bitmap PROMPT_SEEN
    REPETITION_PENALTY = 1 << 2  # 4: bitmap SEEN
    OUTPUT_PENALTY = 1 << 3  # 4a: frequency and presence: `count_*`
    NO_REPEAT_NGRAM = 1 << 4  # 5
    ENCODER_NO_REPEAT_NGRAM = 1 << 5  # 6
    BAD_WORDS = 1 << 6  # 7, of several tokens: the list
    BAN = 1 << 7  # 7, of one token: bitmap BAN; -inf is added
    MIN_LENGTH = 1 << 8  # 8, 9: bitmap END becomes -inf while length < MIN_TOTAL
    ALLOWED = 1 << 9  # 10: bitmap ALLOWED
    FORCED_BOS = 1 << 10  # 11
    FORCED_EOS = 1 << 11  # 12: bitmap FORCED_EOS
    REMOVE_INVALID = 1 << 12  # 13
    DECAY = 1 << 13  # 14: bitmap END
    SUPPRESS = 1 << 14  # 15: bitmap SUPPRESS
    BEGIN_SUPPRESS = 1 << 15  # 16: bitmap BEGIN_SUPPRESS
    SAMPLE = 1 << 16
    TEMPERATURE = 1 << 17  # 18
    TOP_H = 1 << 18  # 19
    TOP_K = 1 << 19  # 20
    TOP_P = 1 << 20  # 21
    MIN_P = 1 << 21  # 22
    TYPICAL_P = 1 << 22  # 23
    EPSILON_CUTOFF = 1 << 23  # 24
    ETA_CUTOFF = 1 << 24  # 25
    RENORMALIZE = 1 << 25  # 27: changes what is reported, never what is chosen
    LOGPROBS = 1 << 26


class Param(enum.IntEnum):
    """Columns of `SlotState.params`; (f) marks fp32 by its bits. Constants that transformers computes in double are
    rounded once, by the host."""

    FEATURES = 0
    SEED_LOW = 1
    SEED_HIGH = 2
    ROW = 3
    """Which of the request's NUM_ROWS sequences."""
    NUM_ROWS = 4
    PROMPT_LEN = 5
    MAX_TOTAL = 6
    """The sequence ends with LENGTH at this many tokens, prompt included."""
    MIN_TOTAL = 7
    MAX_LENGTH = 8
    """generate()'s max_length, for FORCED_EOS."""
    TEMPERATURE = 9  # (f)
    TOP_K = 10
    TOP_P_TAIL = 11  # (f) 1 - top_p
    MIN_P = 12  # (f)
    TYPICAL_P = 13  # (f)
    TOP_H = 14  # (f)
    EPSILON_CUTOFF = 15  # (f)
    ETA_CUTOFF = 16  # (f)
    MIN_KEEP = 17
    """Tokens that every filter leaves: 1, more for beams."""
    REPETITION_PENALTY = 18  # (f)
    ENCODER_REPETITION_PENALTY = 19  # (f) 1 / the parameter: the divisor of positive scores
    FREQUENCY_PENALTY = 20  # (f)
    PRESENCE_PENALTY = 21  # (f)
    NO_REPEAT_NGRAM_SIZE = 22
    ENCODER_NO_REPEAT_NGRAM_SIZE = 23
    FORCED_BOS = 24
    DECAY_START = 25
    DECAY_FACTOR = 26
    """The low word of a double."""
    BEGIN_LENGTH = 27
    """BEGIN_SUPPRESS acts at this length only."""
    NUM_BIASES = 28
    """`bias_ids` and `bias_values`."""
    NUM_BIAS_SEQUENCES = 29
    NUM_BAD_WORDS = 30
    LOGPROB_KIND = 31
    """A `LogprobKind`."""
    NUM_TOP = 32
    NUM_REQUESTED = 33
    """Of `requested_ids`."""
    DECAY_FACTOR_HIGH = 34
    """The high word of DECAY_FACTOR: transformers raises it to a power in double."""


NUM_PARAMS = 48


class Bitmap(enum.IntEnum):
    """Rows of `SlotState.bitmaps`: token t is bit t % 32 of word t // 32."""

    SEEN = 0
    """In prompt or output; the sampler adds to it where REPETITION_PENALTY is set."""
    PROMPT_SEEN = 1
    BAN = 2
    END = 3
    """EOS and stop ids."""
    EOS = 4
    ALLOWED = 5
    FORCED_EOS = 6
    SUPPRESS = 7
    BEGIN_SUPPRESS = 8


class LogprobKind(enum.IntEnum):
    """Which values are reported: before or after processors and filters, normalised or not."""

    RAW_LOGPROB = 0
    RAW_LOGIT = 1
    PROCESSED_LOGPROB = 2
    PROCESSED_SCORE = 3


class Finish(enum.IntEnum):
    """In `finished`, and in a step's result. The smallest wins."""

    RUNNING = 0
    EOS = 1
    STOP_TOKEN = 2
    LENGTH = 4
    NON_FINITE_LOGITS = 254
    """The model gave NaN, or +inf where it was the largest."""
    NON_FINITE_SCORES = 255
    """Nothing is left to choose from."""


@dataclass(frozen=True, slots=True)
class ListSizes:
    """How long a request's lists may be. The defaults are the server's limits."""

    biases: int = 1152
    """Distinct tokens that a bias may act on: single tokens and last tokens of sequences."""
    sequences: int = 128
    """Of biased sequences, and as many again of bad words."""
    sequence_words: int = 128 * 66
    """Words of the biased sequences, and as many again of the bad words; see `SlotState.bias_sequences`."""
    requested: int = 128
    """Tokens whose logprobs are asked for by id."""


@dataclass(frozen=True, slots=True)
class SlotState:
    arena: Tensor
    """int32, one dimension, contiguous: all of the below."""
    vocab_size: int
    length: Tensor
    """int32 [S + 1] tokens in `hist`; the sampler adds one."""
    num_computed: Tensor
    """int32 [S + 1] tokens whose keys and values are in the cache, or will be after the launched steps."""
    finished: Tensor
    """int32 [S + 1] a `Finish`: rows of a slot that has ended are muted until the host frees the slot."""
    params: Tensor
    """int32 [S + 1, NUM_PARAMS]"""
    block_table: Tensor
    """int32 [S + 1, B] block ids; 0, the null block, past the end."""
    hist: Tensor
    """int32 [S + 1, N + 1] prompt, then output."""
    bitmaps: Tensor
    """int32 [S + 1, len(Bitmap), W]"""
    num_counts: Tensor
    """int32 [S + 1] distinct output tokens; the sampler adds to these three where OUTPUT_PENALTY is set."""
    count_ids: Tensor
    """int32 [S + 1, N + 1] the distinct output tokens, in order of their first appearance."""
    counts: Tensor
    """int32 [S + 1, N + 1] how often each occurs."""
    bias_ids: Tensor
    """int32 [S + 1, biases] distinct token ids that a bias may act on."""
    bias_values: Tensor
    """int32 [S + 1, biases], fp32 by bits: the bias of the token as a sequence of its own, else 0."""
    bias_sequences: Tensor
    """int32 [S + 1, sequence_words] biased sequences of two or more tokens, one after another, in the order in which
    their biases are added: number of tokens n, index of the last token in `bias_ids`, bias (fp32 by bits), then the
    first n - 1 tokens."""
    bad_words: Tensor
    """int32 [S + 1, sequence_words] banned sequences of two or more tokens: number of tokens n, last token, 0, then the
    first n - 1 tokens."""
    requested_ids: Tensor
    """int32 [S + 1, requested]"""

    @property
    def padding_slot(self) -> int:
        return self.length.shape[0] - 1

    @staticmethod
    def allocate(
        num_slots: int,
        n_positions: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
        lists: ListSizes | None = None,
    ) -> SlotState:
        """Zeroed. Raises ValueError if the arena cannot be indexed with 32 bits."""
        shapes = _shapes(num_slots + 1, n_positions, block_size, vocab_size, lists or ListSizes())
        sizes = [_aligned(torch.Size(shape).numel()) for shape in shapes.values()]
        if sum(sizes) >= 2**31:
            raise ValueError(f"num_slots {num_slots}: the state would have {sum(sizes)} words, at most 2**31 - 1")
        arena = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        parts = {
            name: part[: torch.Size(shape).numel()].view(shape)
            for (name, shape), part in zip(shapes.items(), arena.split(sizes), strict=True)
        }
        return SlotState(arena=arena, vocab_size=vocab_size, **parts)

    @staticmethod
    def bytes_per_slot(n_positions: int, block_size: int, vocab_size: int, lists: ListSizes | None = None) -> int:
        """About: without what aligns the parts."""
        shapes = _shapes(1, n_positions, block_size, vocab_size, lists or ListSizes())
        return 4 * sum(torch.Size(shape).numel() for shape in shapes.values())


def _shapes(
    rows: int, n_positions: int, block_size: int, vocab_size: int, lists: ListSizes
) -> dict[str, tuple[int, ...]]:
    """Of each part, in the order in which they lie in the arena."""
    return {
        "length": (rows,),
        "num_computed": (rows,),
        "finished": (rows,),
        "params": (rows, NUM_PARAMS),
        "block_table": (rows, -(-n_positions // block_size)),
        "hist": (rows, n_positions + 1),
        "bitmaps": (rows, len(Bitmap), -(-vocab_size // 32)),
        "num_counts": (rows,),
        "count_ids": (rows, n_positions + 1),
        "counts": (rows, n_positions + 1),
        "bias_ids": (rows, lists.biases),
        "bias_values": (rows, lists.biases),
        "bias_sequences": (rows, lists.sequence_words),
        "bad_words": (rows, lists.sequence_words),
        "requested_ids": (rows, lists.requested),
    }


def _aligned(num_words: int) -> int:
    """Parts begin at multiples of 128 bytes."""
    return -(-num_words // 32) * 32
