import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from octavo_proto.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "architecture", "weights_sha256", "dtype", "num_parameters", "vocab_size", "n_positions", "bos_token_id", "eos_token_ids", "default_params", "limits", "supported_fields", "batch_invariant")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    N_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    BOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PARAMS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SUPPORTED_FIELDS_FIELD_NUMBER: _ClassVar[int]
    BATCH_INVARIANT_FIELD_NUMBER: _ClassVar[int]
    model: str
    architecture: str
    weights_sha256: str
    dtype: str
    num_parameters: int
    vocab_size: int
    n_positions: int
    bos_token_id: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    default_params: _types_pb2.GenerationParams
    limits: Limits
    supported_fields: _containers.RepeatedScalarFieldContainer[str]
    batch_invariant: bool
    def __init__(self, model: _Optional[str] = ..., architecture: _Optional[str] = ..., weights_sha256: _Optional[str] = ..., dtype: _Optional[str] = ..., num_parameters: _Optional[int] = ..., vocab_size: _Optional[int] = ..., n_positions: _Optional[int] = ..., bos_token_id: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., default_params: _Optional[_Union[_types_pb2.GenerationParams, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., supported_fields: _Optional[_Iterable[str]] = ..., batch_invariant: bool = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_prompt_bytes", "max_prompts", "max_sequences", "max_num_return_sequences", "max_num_beams", "max_logprobs", "max_logprob_token_ids", "max_stop_strings", "max_stop_string_bytes", "max_stop_token_ids", "max_token_list", "max_token_sequences", "max_token_sequence_length", "max_constraint_bytes", "max_tokenize_inputs", "max_receive_message_bytes", "max_send_message_bytes", "max_session_requests", "max_queue_time", "max_request_duration")
    MAX_PROMPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_RETURN_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BEAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGPROB_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_STRING_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKEN_LIST_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKEN_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKEN_SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_CONSTRAINT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENIZE_INPUTS_FIELD_NUMBER: _ClassVar[int]
    MAX_RECEIVE_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEND_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSION_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_TIME_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_DURATION_FIELD_NUMBER: _ClassVar[int]
    max_prompt_bytes: int
    max_prompts: int
    max_sequences: int
    max_num_return_sequences: int
    max_num_beams: int
    max_logprobs: int
    max_logprob_token_ids: int
    max_stop_strings: int
    max_stop_string_bytes: int
    max_stop_token_ids: int
    max_token_list: int
    max_token_sequences: int
    max_token_sequence_length: int
    max_constraint_bytes: int
    max_tokenize_inputs: int
    max_receive_message_bytes: int
    max_send_message_bytes: int
    max_session_requests: int
    max_queue_time: _duration_pb2.Duration
    max_request_duration: _duration_pb2.Duration
    def __init__(self, max_prompt_bytes: _Optional[int] = ..., max_prompts: _Optional[int] = ..., max_sequences: _Optional[int] = ..., max_num_return_sequences: _Optional[int] = ..., max_num_beams: _Optional[int] = ..., max_logprobs: _Optional[int] = ..., max_logprob_token_ids: _Optional[int] = ..., max_stop_strings: _Optional[int] = ..., max_stop_string_bytes: _Optional[int] = ..., max_stop_token_ids: _Optional[int] = ..., max_token_list: _Optional[int] = ..., max_token_sequences: _Optional[int] = ..., max_token_sequence_length: _Optional[int] = ..., max_constraint_bytes: _Optional[int] = ..., max_tokenize_inputs: _Optional[int] = ..., max_receive_message_bytes: _Optional[int] = ..., max_send_message_bytes: _Optional[int] = ..., max_session_requests: _Optional[int] = ..., max_queue_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_request_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("model", "texts", "prompt_options")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    texts: _containers.RepeatedScalarFieldContainer[str]
    prompt_options: _types_pb2.PromptOptions
    def __init__(self, model: _Optional[str] = ..., texts: _Optional[_Iterable[str]] = ..., prompt_options: _Optional[_Union[_types_pb2.PromptOptions, _Mapping]] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenIds]
    def __init__(self, results: _Optional[_Iterable[_Union[_types_pb2.TokenIds, _Mapping]]] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("model", "token_ids", "skip_special_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    token_ids: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenIds]
    skip_special_tokens: bool
    def __init__(self, model: _Optional[str] = ..., token_ids: _Optional[_Iterable[_Union[_types_pb2.TokenIds, _Mapping]]] = ..., skip_special_tokens: bool = ...) -> None: ...

class DetokenizeResponse(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...
