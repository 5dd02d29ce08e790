import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from octavo_proto.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("model", "prompts", "params", "output", "prompt_options", "cache", "request_id", "priority")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompts: _containers.RepeatedCompositeFieldContainer[_types_pb2.Prompt]
    params: _types_pb2.GenerationParams
    output: _types_pb2.OutputOptions
    prompt_options: _types_pb2.PromptOptions
    cache: _types_pb2.CacheOptions
    request_id: str
    priority: int
    def __init__(self, model: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[_types_pb2.Prompt, _Mapping]]] = ..., params: _Optional[_Union[_types_pb2.GenerationParams, _Mapping]] = ..., output: _Optional[_Union[_types_pb2.OutputOptions, _Mapping]] = ..., prompt_options: _Optional[_Union[_types_pb2.PromptOptions, _Mapping]] = ..., cache: _Optional[_Union[_types_pb2.CacheOptions, _Mapping]] = ..., request_id: _Optional[str] = ..., priority: _Optional[int] = ...) -> None: ...

class ResolvedOptions(_message.Message):
    __slots__ = ("params", "output", "prompt_options", "cache")
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    params: _types_pb2.GenerationParams
    output: _types_pb2.OutputOptions
    prompt_options: _types_pb2.PromptOptions
    cache: _types_pb2.CacheOptions
    def __init__(self, params: _Optional[_Union[_types_pb2.GenerationParams, _Mapping]] = ..., output: _Optional[_Union[_types_pb2.OutputOptions, _Mapping]] = ..., prompt_options: _Optional[_Union[_types_pb2.PromptOptions, _Mapping]] = ..., cache: _Optional[_Union[_types_pb2.CacheOptions, _Mapping]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "model", "completions", "prompts", "usage", "timing", "resolved")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    RESOLVED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    completions: _containers.RepeatedCompositeFieldContainer[Completion]
    prompts: _containers.RepeatedCompositeFieldContainer[_types_pb2.PromptInfo]
    usage: _types_pb2.Usage
    timing: _types_pb2.Timing
    resolved: ResolvedOptions
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., completions: _Optional[_Iterable[_Union[Completion, _Mapping]]] = ..., prompts: _Optional[_Iterable[_Union[_types_pb2.PromptInfo, _Mapping]]] = ..., usage: _Optional[_Union[_types_pb2.Usage, _Mapping]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ..., resolved: _Optional[_Union[ResolvedOptions, _Mapping]] = ...) -> None: ...

class Completion(_message.Message):
    __slots__ = ("prompt_index", "output_index", "text", "token_ids", "logprobs", "finish", "sequence_score")
    PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_SCORE_FIELD_NUMBER: _ClassVar[int]
    prompt_index: int
    output_index: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _types_pb2.Logprobs
    finish: _types_pb2.FinishInfo
    sequence_score: float
    def __init__(self, prompt_index: _Optional[int] = ..., output_index: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Union[_types_pb2.Logprobs, _Mapping]] = ..., finish: _Optional[_Union[_types_pb2.FinishInfo, _Mapping]] = ..., sequence_score: _Optional[float] = ...) -> None: ...

class StreamGenerateRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: GenerateRequest
    def __init__(self, request: _Optional[_Union[GenerateRequest, _Mapping]] = ...) -> None: ...

class StreamGenerateResponse(_message.Message):
    __slots__ = ("request_id", "model", "prompts", "deltas", "usage", "timing", "resolved")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    RESOLVED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    prompts: _containers.RepeatedCompositeFieldContainer[_types_pb2.PromptInfo]
    deltas: _containers.RepeatedCompositeFieldContainer[OutputDelta]
    usage: _types_pb2.Usage
    timing: _types_pb2.Timing
    resolved: ResolvedOptions
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[_types_pb2.PromptInfo, _Mapping]]] = ..., deltas: _Optional[_Iterable[_Union[OutputDelta, _Mapping]]] = ..., usage: _Optional[_Union[_types_pb2.Usage, _Mapping]] = ..., timing: _Optional[_Union[_types_pb2.Timing, _Mapping]] = ..., resolved: _Optional[_Union[ResolvedOptions, _Mapping]] = ...) -> None: ...

class OutputDelta(_message.Message):
    __slots__ = ("prompt_index", "output_index", "text", "token_ids", "logprobs", "finish", "sequence_score")
    PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_SCORE_FIELD_NUMBER: _ClassVar[int]
    prompt_index: int
    output_index: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _types_pb2.Logprobs
    finish: _types_pb2.FinishInfo
    sequence_score: float
    def __init__(self, prompt_index: _Optional[int] = ..., output_index: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Union[_types_pb2.Logprobs, _Mapping]] = ..., finish: _Optional[_Union[_types_pb2.FinishInfo, _Mapping]] = ..., sequence_score: _Optional[float] = ...) -> None: ...

class GenerateSessionRequest(_message.Message):
    __slots__ = ("submit", "cancel")
    class Submit(_message.Message):
        __slots__ = ("tag", "request", "timeout")
        TAG_FIELD_NUMBER: _ClassVar[int]
        REQUEST_FIELD_NUMBER: _ClassVar[int]
        TIMEOUT_FIELD_NUMBER: _ClassVar[int]
        tag: int
        request: GenerateRequest
        timeout: _duration_pb2.Duration
        def __init__(self, tag: _Optional[int] = ..., request: _Optional[_Union[GenerateRequest, _Mapping]] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
    class Cancel(_message.Message):
        __slots__ = ("tag",)
        TAG_FIELD_NUMBER: _ClassVar[int]
        tag: int
        def __init__(self, tag: _Optional[int] = ...) -> None: ...
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    submit: GenerateSessionRequest.Submit
    cancel: GenerateSessionRequest.Cancel
    def __init__(self, submit: _Optional[_Union[GenerateSessionRequest.Submit, _Mapping]] = ..., cancel: _Optional[_Union[GenerateSessionRequest.Cancel, _Mapping]] = ...) -> None: ...

class GenerateSessionResponse(_message.Message):
    __slots__ = ("events",)
    class Event(_message.Message):
        __slots__ = ("tag", "response", "error")
        TAG_FIELD_NUMBER: _ClassVar[int]
        RESPONSE_FIELD_NUMBER: _ClassVar[int]
        ERROR_FIELD_NUMBER: _ClassVar[int]
        tag: int
        response: StreamGenerateResponse
        error: RequestError
        def __init__(self, tag: _Optional[int] = ..., response: _Optional[_Union[StreamGenerateResponse, _Mapping]] = ..., error: _Optional[_Union[RequestError, _Mapping]] = ...) -> None: ...
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[GenerateSessionResponse.Event]
    def __init__(self, events: _Optional[_Iterable[_Union[GenerateSessionResponse.Event, _Mapping]]] = ...) -> None: ...

class RequestError(_message.Message):
    __slots__ = ("code", "message", "reason", "field_violations", "retry_delay", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class FieldViolation(_message.Message):
        __slots__ = ("field", "description")
        FIELD_FIELD_NUMBER: _ClassVar[int]
        DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
        field: str
        description: str
        def __init__(self, field: _Optional[str] = ..., description: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIELD_VIOLATIONS_FIELD_NUMBER: _ClassVar[int]
    RETRY_DELAY_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    reason: str
    field_violations: _containers.RepeatedCompositeFieldContainer[RequestError.FieldViolation]
    retry_delay: _duration_pb2.Duration
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., reason: _Optional[str] = ..., field_violations: _Optional[_Iterable[_Union[RequestError.FieldViolation, _Mapping]]] = ..., retry_delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...
