import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EarlyStopping(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EARLY_STOPPING_UNSPECIFIED: _ClassVar[EarlyStopping]
    EARLY_STOPPING_FALSE: _ClassVar[EarlyStopping]
    EARLY_STOPPING_TRUE: _ClassVar[EarlyStopping]
    EARLY_STOPPING_NEVER: _ClassVar[EarlyStopping]

class StopStringOutput(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STOP_STRING_OUTPUT_UNSPECIFIED: _ClassVar[StopStringOutput]
    STOP_STRING_OUTPUT_TOKENS: _ClassVar[StopStringOutput]
    STOP_STRING_OUTPUT_INCLUDE: _ClassVar[StopStringOutput]
    STOP_STRING_OUTPUT_EXCLUDE: _ClassVar[StopStringOutput]

class LogprobKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOGPROB_KIND_UNSPECIFIED: _ClassVar[LogprobKind]
    LOGPROB_KIND_RAW_LOGPROB: _ClassVar[LogprobKind]
    LOGPROB_KIND_PROCESSED_LOGPROB: _ClassVar[LogprobKind]
    LOGPROB_KIND_RAW_LOGIT: _ClassVar[LogprobKind]
    LOGPROB_KIND_PROCESSED_LOGIT: _ClassVar[LogprobKind]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_EOS: _ClassVar[FinishReason]
    FINISH_REASON_STOP_TOKEN: _ClassVar[FinishReason]
    FINISH_REASON_STOP_STRING: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CONTEXT: _ClassVar[FinishReason]
    FINISH_REASON_TIME: _ClassVar[FinishReason]
    FINISH_REASON_ABORTED: _ClassVar[FinishReason]
EARLY_STOPPING_UNSPECIFIED: EarlyStopping
EARLY_STOPPING_FALSE: EarlyStopping
EARLY_STOPPING_TRUE: EarlyStopping
EARLY_STOPPING_NEVER: EarlyStopping
STOP_STRING_OUTPUT_UNSPECIFIED: StopStringOutput
STOP_STRING_OUTPUT_TOKENS: StopStringOutput
STOP_STRING_OUTPUT_INCLUDE: StopStringOutput
STOP_STRING_OUTPUT_EXCLUDE: StopStringOutput
LOGPROB_KIND_UNSPECIFIED: LogprobKind
LOGPROB_KIND_RAW_LOGPROB: LogprobKind
LOGPROB_KIND_PROCESSED_LOGPROB: LogprobKind
LOGPROB_KIND_RAW_LOGIT: LogprobKind
LOGPROB_KIND_PROCESSED_LOGIT: LogprobKind
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_EOS: FinishReason
FINISH_REASON_STOP_TOKEN: FinishReason
FINISH_REASON_STOP_STRING: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CONTEXT: FinishReason
FINISH_REASON_TIME: FinishReason
FINISH_REASON_ABORTED: FinishReason

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("text", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: TokenIds
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ...) -> None: ...

class PromptOptions(_message.Message):
    __slots__ = ("add_special_tokens", "split_special_tokens", "truncate_to_fit", "truncate_to_last")
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPLIT_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_TO_FIT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_TO_LAST_FIELD_NUMBER: _ClassVar[int]
    add_special_tokens: bool
    split_special_tokens: bool
    truncate_to_fit: bool
    truncate_to_last: int
    def __init__(self, add_special_tokens: bool = ..., split_special_tokens: bool = ..., truncate_to_fit: bool = ..., truncate_to_last: _Optional[int] = ...) -> None: ...

class GenerationParams(_message.Message):
    __slots__ = ("max_new_tokens", "max_length", "min_new_tokens", "min_length", "eos_token_id", "stop_token_ids", "ignore_eos", "stop_strings", "stop_string_output", "stop_strings_ignore_prompt", "max_time", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "seed", "num_return_sequences", "num_beams", "length_penalty", "early_stopping", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "frequency_penalty", "presence_penalty", "sequence_bias", "logit_bias", "bad_words_ids", "bad_words", "suppress_tokens", "begin_suppress_tokens", "allowed_token_ids", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values", "renormalize_logits", "guidance_scale", "negative_prompt", "watermarking_config", "structured_output", "bos_token_id", "token_healing", "prompt_lookup_num_tokens", "max_matching_ngram_size")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_LENGTH_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    STOP_STRINGS_IGNORE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_TIME_FIELD_NUMBER: _ClassVar[int]
    DO_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_P_FIELD_NUMBER: _ClassVar[int]
    TOP_H_FIELD_NUMBER: _ClassVar[int]
    EPSILON_CUTOFF_FIELD_NUMBER: _ClassVar[int]
    ETA_CUTOFF_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_RETURN_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_BEAMS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_PENALTY_FIELD_NUMBER: _ClassVar[int]
    EARLY_STOPPING_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    ENCODER_REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    NO_REPEAT_NGRAM_SIZE_FIELD_NUMBER: _ClassVar[int]
    ENCODER_NO_REPEAT_NGRAM_SIZE_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    SUPPRESS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BEGIN_SUPPRESS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FORCED_BOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FORCED_EOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    EXPONENTIAL_DECAY_LENGTH_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REMOVE_INVALID_VALUES_FIELD_NUMBER: _ClassVar[int]
    RENORMALIZE_LOGITS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    WATERMARKING_CONFIG_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    BOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_HEALING_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOOKUP_NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MATCHING_NGRAM_SIZE_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    max_length: int
    min_new_tokens: int
    min_length: int
    eos_token_id: TokenIds
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    stop_strings: _containers.RepeatedScalarFieldContainer[str]
    stop_string_output: StopStringOutput
    stop_strings_ignore_prompt: bool
    max_time: float
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    top_h: float
    epsilon_cutoff: float
    eta_cutoff: float
    seed: int
    num_return_sequences: int
    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    repetition_penalty: float
    encoder_repetition_penalty: float
    no_repeat_ngram_size: int
    encoder_no_repeat_ngram_size: int
    frequency_penalty: float
    presence_penalty: float
    sequence_bias: _containers.RepeatedCompositeFieldContainer[SequenceBias]
    logit_bias: _containers.ScalarMap[int, float]
    bad_words_ids: _containers.RepeatedCompositeFieldContainer[TokenIds]
    bad_words: _containers.RepeatedScalarFieldContainer[str]
    suppress_tokens: TokenIds
    begin_suppress_tokens: TokenIds
    allowed_token_ids: TokenIds
    forced_bos_token_id: int
    forced_eos_token_id: TokenIds
    exponential_decay_length_penalty: ExponentialDecay
    remove_invalid_values: bool
    renormalize_logits: bool
    guidance_scale: float
    negative_prompt: Prompt
    watermarking_config: Watermark
    structured_output: StructuredOutput
    bos_token_id: int
    token_healing: bool
    prompt_lookup_num_tokens: int
    max_matching_ngram_size: int
    def __init__(self, max_new_tokens: _Optional[int] = ..., max_length: _Optional[int] = ..., min_new_tokens: _Optional[int] = ..., min_length: _Optional[int] = ..., eos_token_id: _Optional[_Union[TokenIds, _Mapping]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., stop_strings: _Optional[_Iterable[str]] = ..., stop_string_output: _Optional[_Union[StopStringOutput, str]] = ..., stop_strings_ignore_prompt: bool = ..., max_time: _Optional[float] = ..., do_sample: bool = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., typical_p: _Optional[float] = ..., top_h: _Optional[float] = ..., epsilon_cutoff: _Optional[float] = ..., eta_cutoff: _Optional[float] = ..., seed: _Optional[int] = ..., num_return_sequences: _Optional[int] = ..., num_beams: _Optional[int] = ..., length_penalty: _Optional[float] = ..., early_stopping: _Optional[_Union[EarlyStopping, str]] = ..., repetition_penalty: _Optional[float] = ..., encoder_repetition_penalty: _Optional[float] = ..., no_repeat_ngram_size: _Optional[int] = ..., encoder_no_repeat_ngram_size: _Optional[int] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., sequence_bias: _Optional[_Iterable[_Union[SequenceBias, _Mapping]]] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., bad_words_ids: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ..., bad_words: _Optional[_Iterable[str]] = ..., suppress_tokens: _Optional[_Union[TokenIds, _Mapping]] = ..., begin_suppress_tokens: _Optional[_Union[TokenIds, _Mapping]] = ..., allowed_token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., forced_bos_token_id: _Optional[int] = ..., forced_eos_token_id: _Optional[_Union[TokenIds, _Mapping]] = ..., exponential_decay_length_penalty: _Optional[_Union[ExponentialDecay, _Mapping]] = ..., remove_invalid_values: bool = ..., renormalize_logits: bool = ..., guidance_scale: _Optional[float] = ..., negative_prompt: _Optional[_Union[Prompt, _Mapping]] = ..., watermarking_config: _Optional[_Union[Watermark, _Mapping]] = ..., structured_output: _Optional[_Union[StructuredOutput, _Mapping]] = ..., bos_token_id: _Optional[int] = ..., token_healing: bool = ..., prompt_lookup_num_tokens: _Optional[int] = ..., max_matching_ngram_size: _Optional[int] = ...) -> None: ...

class SequenceBias(_message.Message):
    __slots__ = ("token_ids", "bias")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    bias: float
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., bias: _Optional[float] = ...) -> None: ...

class ExponentialDecay(_message.Message):
    __slots__ = ("start_index", "factor")
    START_INDEX_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    start_index: int
    factor: float
    def __init__(self, start_index: _Optional[int] = ..., factor: _Optional[float] = ...) -> None: ...

class Watermark(_message.Message):
    __slots__ = ("green_list", "synth_id")
    GREEN_LIST_FIELD_NUMBER: _ClassVar[int]
    SYNTH_ID_FIELD_NUMBER: _ClassVar[int]
    green_list: GreenListWatermark
    synth_id: SynthIdWatermark
    def __init__(self, green_list: _Optional[_Union[GreenListWatermark, _Mapping]] = ..., synth_id: _Optional[_Union[SynthIdWatermark, _Mapping]] = ...) -> None: ...

class GreenListWatermark(_message.Message):
    __slots__ = ("greenlist_ratio", "bias", "hashing_key", "seeding_scheme", "context_width")
    class SeedingScheme(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SEEDING_SCHEME_UNSPECIFIED: _ClassVar[GreenListWatermark.SeedingScheme]
        SEEDING_SCHEME_LEFTHASH: _ClassVar[GreenListWatermark.SeedingScheme]
        SEEDING_SCHEME_SELFHASH: _ClassVar[GreenListWatermark.SeedingScheme]
    SEEDING_SCHEME_UNSPECIFIED: GreenListWatermark.SeedingScheme
    SEEDING_SCHEME_LEFTHASH: GreenListWatermark.SeedingScheme
    SEEDING_SCHEME_SELFHASH: GreenListWatermark.SeedingScheme
    GREENLIST_RATIO_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    HASHING_KEY_FIELD_NUMBER: _ClassVar[int]
    SEEDING_SCHEME_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_WIDTH_FIELD_NUMBER: _ClassVar[int]
    greenlist_ratio: float
    bias: float
    hashing_key: int
    seeding_scheme: GreenListWatermark.SeedingScheme
    context_width: int
    def __init__(self, greenlist_ratio: _Optional[float] = ..., bias: _Optional[float] = ..., hashing_key: _Optional[int] = ..., seeding_scheme: _Optional[_Union[GreenListWatermark.SeedingScheme, str]] = ..., context_width: _Optional[int] = ...) -> None: ...

class SynthIdWatermark(_message.Message):
    __slots__ = ("ngram_len", "keys", "context_history_size", "sampling_table_seed", "sampling_table_size", "skip_first_ngram_calls")
    NGRAM_LEN_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_HISTORY_SIZE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_TABLE_SEED_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_TABLE_SIZE_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIRST_NGRAM_CALLS_FIELD_NUMBER: _ClassVar[int]
    ngram_len: int
    keys: _containers.RepeatedScalarFieldContainer[int]
    context_history_size: int
    sampling_table_seed: int
    sampling_table_size: int
    skip_first_ngram_calls: bool
    def __init__(self, ngram_len: _Optional[int] = ..., keys: _Optional[_Iterable[int]] = ..., context_history_size: _Optional[int] = ..., sampling_table_seed: _Optional[int] = ..., sampling_table_size: _Optional[int] = ..., skip_first_ngram_calls: bool = ...) -> None: ...

class StructuredOutput(_message.Message):
    __slots__ = ("json_schema", "regex", "grammar", "choice")
    class Choice(_message.Message):
        __slots__ = ("values",)
        VALUES_FIELD_NUMBER: _ClassVar[int]
        values: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    json_schema: str
    regex: str
    grammar: str
    choice: StructuredOutput.Choice
    def __init__(self, json_schema: _Optional[str] = ..., regex: _Optional[str] = ..., grammar: _Optional[str] = ..., choice: _Optional[_Union[StructuredOutput.Choice, _Mapping]] = ...) -> None: ...

class OutputOptions(_message.Message):
    __slots__ = ("include_prompt", "return_text", "return_token_ids", "return_prompt_token_ids", "skip_special_tokens", "logprobs", "logprob_kind", "logprob_token_ids", "prompt_logprobs", "stream_min_tokens", "stream_max_delay", "return_resolved_options")
    INCLUDE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    RETURN_TEXT_FIELD_NUMBER: _ClassVar[int]
    RETURN_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RETURN_PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_KIND_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STREAM_MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STREAM_MAX_DELAY_FIELD_NUMBER: _ClassVar[int]
    RETURN_RESOLVED_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    include_prompt: bool
    return_text: bool
    return_token_ids: bool
    return_prompt_token_ids: bool
    skip_special_tokens: bool
    logprobs: int
    logprob_kind: LogprobKind
    logprob_token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_logprobs: int
    stream_min_tokens: int
    stream_max_delay: _duration_pb2.Duration
    return_resolved_options: bool
    def __init__(self, include_prompt: bool = ..., return_text: bool = ..., return_token_ids: bool = ..., return_prompt_token_ids: bool = ..., skip_special_tokens: bool = ..., logprobs: _Optional[int] = ..., logprob_kind: _Optional[_Union[LogprobKind, str]] = ..., logprob_token_ids: _Optional[_Iterable[int]] = ..., prompt_logprobs: _Optional[int] = ..., stream_min_tokens: _Optional[int] = ..., stream_max_delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., return_resolved_options: bool = ...) -> None: ...

class CacheOptions(_message.Message):
    __slots__ = ("bypass_prefix_cache", "cache_salt")
    BYPASS_PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    bypass_prefix_cache: bool
    cache_salt: str
    def __init__(self, bypass_prefix_cache: bool = ..., cache_salt: _Optional[str] = ...) -> None: ...

class FinishInfo(_message.Message):
    __slots__ = ("reason", "token_id", "stop_string", "completion_tokens")
    REASON_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    token_id: int
    stop_string: str
    completion_tokens: int
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., token_id: _Optional[int] = ..., stop_string: _Optional[str] = ..., completion_tokens: _Optional[int] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("chosen", "ranks", "num_top", "top_token_ids", "top_values", "requested")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_VALUES_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_FIELD_NUMBER: _ClassVar[int]
    chosen: _containers.RepeatedScalarFieldContainer[float]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    num_top: int
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_values: _containers.RepeatedScalarFieldContainer[float]
    requested: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, chosen: _Optional[_Iterable[float]] = ..., ranks: _Optional[_Iterable[int]] = ..., num_top: _Optional[int] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_values: _Optional[_Iterable[float]] = ..., requested: _Optional[_Iterable[float]] = ...) -> None: ...

class PromptInfo(_message.Message):
    __slots__ = ("prompt_index", "prompt_tokens", "cached_tokens", "seed", "token_ids", "logprobs")
    PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    prompt_index: int
    prompt_tokens: int
    cached_tokens: int
    seed: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: Logprobs
    def __init__(self, prompt_index: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "cached_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue", "time_to_first_token", "total", "preemptions")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    queue: _duration_pb2.Duration
    time_to_first_token: _duration_pb2.Duration
    total: _duration_pb2.Duration
    preemptions: int
    def __init__(self, queue: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., time_to_first_token: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., total: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., preemptions: _Optional[int] = ...) -> None: ...
