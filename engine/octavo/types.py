"""The nouns of a request and of its answer, free of protobuf and torch.

Field names and meanings are those of `proto/octavo_proto/v1/types.proto`, whose comments are normative; names of
`GenerationParams` are those of transformers' `GenerationConfig`. `None` means "unset" as the client sent it. The
`InputProcessor` *resolves* parameters: it returns the same type with every default filled in.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec


class FinishReason(enum.IntEnum):
    """Why a sequence ended. Numbers are those of the wire. If several hold at one token the smallest wins."""

    NONE = 0
    EOS = 1
    STOP_TOKEN = 2
    STOP_STRING = 3
    LENGTH = 4
    CONTEXT = 5
    TIME = 6
    ABORTED = 7


class EarlyStopping(enum.IntEnum):
    FALSE = 1
    TRUE = 2
    NEVER = 3


class StopStringOutput(enum.IntEnum):
    """Which text is returned when a stop string was found: of all tokens, to the match's end, to its beginning."""

    TOKENS = 1
    INCLUDE = 2
    EXCLUDE = 3


class LogprobKind(enum.IntEnum):
    RAW_LOGPROB = 1
    PROCESSED_LOGPROB = 2
    RAW_LOGIT = 3
    PROCESSED_LOGIT = 4


class SequenceBias(msgspec.Struct, frozen=True):
    token_ids: list[int]
    bias: float


class ExponentialDecay(msgspec.Struct, frozen=True):
    start_index: int
    factor: float


class SeedingScheme(enum.IntEnum):
    """What seeds a green list: the preceding token, or the candidate itself."""

    LEFTHASH = 1
    SELFHASH = 2


class GreenListWatermark(msgspec.Struct, frozen=True, kw_only=True):
    greenlist_ratio: float | None = None
    bias: float | None = None
    hashing_key: int | None = None
    seeding_scheme: SeedingScheme | None = None
    context_width: int | None = None


class SynthIdWatermark(msgspec.Struct, frozen=True, kw_only=True):
    ngram_len: int
    keys: list[int]
    context_history_size: int | None = None
    sampling_table_seed: int | None = None
    sampling_table_size: int | None = None
    skip_first_ngram_calls: bool | None = None


class Watermark(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly one of the two is set."""

    green_list: GreenListWatermark | None = None
    synth_id: SynthIdWatermark | None = None


class Choice(msgspec.Struct, frozen=True):
    values: list[str]


class StructuredOutput(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly one of the four is set."""

    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    """GBNF."""
    choice: Choice | None = None


class GenerationParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to generate. One field per field of the wire's GenerationParams, unset is None."""

    # Length and stopping
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    eos_token_id: list[int] | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool | None = None
    stop_strings: list[str] = []
    stop_string_output: StopStringOutput | None = None
    stop_strings_ignore_prompt: bool | None = None
    max_time: float | None = None
    # Selection
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_h: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    seed: int | None = None
    """Unsigned 64 bit."""
    num_return_sequences: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping | None = None
    # Processors
    repetition_penalty: float | None = None
    encoder_repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    sequence_bias: list[SequenceBias] = []
    logit_bias: dict[int, float] = {}
    bad_words_ids: list[list[int]] = []
    bad_words: list[str] = []
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: list[int] | None = None
    exponential_decay_length_penalty: ExponentialDecay | None = None
    remove_invalid_values: bool | None = None
    renormalize_logits: bool | None = None
    guidance_scale: float | None = None
    negative_prompt: Prompt | None = None
    watermarking_config: Watermark | None = None
    structured_output: StructuredOutput | None = None
    # The rest
    bos_token_id: int | None = None
    token_healing: bool | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None


PARAM_NAMES: Final = frozenset(GenerationParams.__struct_fields__)


class Prompt(msgspec.Struct, frozen=True):
    """Exactly one of the two is set."""

    text: str | None = None
    token_ids: list[int] | None = None


class PromptOptions(msgspec.Struct, frozen=True, kw_only=True):
    add_special_tokens: bool | None = None
    split_special_tokens: bool | None = None
    truncate_to_fit: bool | None = None
    truncate_to_last: int | None = None


class OutputOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_prompt: bool | None = None
    return_text: bool | None = None
    return_token_ids: bool | None = None
    return_prompt_token_ids: bool | None = None
    skip_special_tokens: bool | None = None
    logprobs: int | None = None
    logprob_kind: LogprobKind | None = None
    logprob_token_ids: list[int] = []
    prompt_logprobs: int | None = None
    stream_min_tokens: int | None = None
    stream_max_delay: float | None = None
    """Seconds."""
    return_resolved_options: bool | None = None


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True):
    bypass_prefix_cache: bool | None = None
    cache_salt: str = ""


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    prompts: list[Prompt]
    model: str = ""
    params: GenerationParams = GenerationParams()
    output: OutputOptions = OutputOptions()
    prompt_options: PromptOptions = PromptOptions()
    cache: CacheOptions = CacheOptions()
    request_id: str = ""
    priority: int = 0


class Logprobs(msgspec.Struct):
    """Values of a run of T tokens, in columns (see types.proto). Mutable: runs are appended to each other."""

    num_top: int = 0
    chosen: list[float] = []
    ranks: list[int] = []
    top_token_ids: list[int] = []
    """T rows of num_top."""
    top_values: list[float] = []
    requested: list[float] = []
    """T rows of len(OutputOptions.logprob_token_ids)."""

    def extend(self, other: Logprobs) -> None:
        self.num_top = other.num_top
        self.chosen = self.chosen + other.chosen
        self.ranks = self.ranks + other.ranks
        self.top_token_ids = self.top_token_ids + other.top_token_ids
        self.top_values = self.top_values + other.top_values
        self.requested = self.requested + other.requested


class FinishInfo(msgspec.Struct, frozen=True):
    reason: FinishReason
    completion_tokens: int
    token_id: int | None = None
    stop_string: str | None = None


class PromptInfo(msgspec.Struct, frozen=True, kw_only=True):
    prompt_index: int
    prompt_tokens: int
    cached_tokens: int = 0
    seed: int | None = None
    token_ids: list[int] = []
    logprobs: Logprobs | None = None


class OutputDelta(msgspec.Struct, kw_only=True):
    """What is new in one sequence. Mutable: a slow reader's deltas are merged into it."""

    prompt_index: int
    output_index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: Logprobs | None = None
    finish: FinishInfo | None = None
    sequence_score: float | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Timing(msgspec.Struct, frozen=True):
    """Seconds from arrival, by a monotonic clock."""

    queue: float
    time_to_first_token: float
    total: float
    preemptions: int


class ResolvedOptions(msgspec.Struct, frozen=True):
    params: GenerationParams
    output: OutputOptions
    prompt_options: PromptOptions
    cache: CacheOptions


class GenerateUpdate(msgspec.Struct, kw_only=True):
    """What happened to a request since the reader last looked; the whole answer, if it never did.

    `usage` and `timing` are set in the last update of a request that succeeds, and in no other.
    """

    prompts: list[PromptInfo] = []
    deltas: list[OutputDelta] = []
    """At most one per sequence."""
    usage: Usage | None = None
    timing: Timing | None = None


class DraftLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Which drafts (prompt_lookup_num_tokens) an engine's worker checks in a step."""

    max_rows: int = 256
    """With a draft; 0: none."""
    max_tokens_of_row: int = 256
    beside_prompts: bool = True
    """Whether in steps, too, in which rows compute parts of their prompts."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a loaded engine core; they stay the same while its process lives."""

    model: str
    architecture: str
    weights_sha256: str
    dtype: str
    device: str
    """"cpu", or "cuda:0 (NVIDIA H100 ...)"."""
    attention_backend: str
    kv_cache_dtype: str
    num_parameters: int
    vocab_size: int
    n_positions: int
    block_size: int
    num_blocks: int
    """Usable blocks; the null block is not counted."""
    max_num_requests: int
    max_num_batched_tokens: int
    max_model_len: int
    """Longest total length in tokens, n_positions + 1 unless configured lower."""
    batch_invariant: bool
    start_time: float
    """Seconds since the epoch."""
    drafts: DraftLimits = DraftLimits()
    cpu_cores: str = ""
    """Cores that compute threads are bound to, as "0-3,8"; empty if they may run anywhere."""


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the scheduler. One request per sequence."""

    time: float
    """Seconds since the epoch."""
    running_requests: int = 0
    waiting_requests: int = 0
    waiting_tokens: int = 0
    used_blocks: int = 0
    cached_blocks: int = 0
    total_blocks: int = 0
    generation_tokens_per_second: float = 0.0
    """Over the last 10 s, like the next two."""
    prompt_tokens_per_second: float = 0.0
    prefix_cache_hit_rate: float = 0.0
    preemptions: int = 0
    """Since the engine process started, like the rest."""
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    """Tokens looked up."""
    prefix_cache_hits: int = 0
    """Tokens found."""
    drafted_tokens: int = 0
    """By speculation."""
    accepted_tokens: int = 0
    """Drafted tokens that were right."""
