"""No field of the wire is forgotten: each one is converted or rejected by its path, in both directions."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from octavo import types
from octavo.config import Limits
from octavo.errors import Reason, RequestError
from octavo.server import convert, fields
from octavo_proto.v1 import control_pb2, generation_pb2, model_pb2, types_pb2


def fill_one(message: Message, field: FieldDescriptor) -> Any:
    """Sets `field` to a value that is neither its default nor a neutral one."""
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        getattr(message, field.name)[3] = 1.5
    elif inner is not None:
        part = GetMessageClass(inner)()
        for nested in inner.fields:
            fill_one(part, nested)
        target = getattr(message, field.name)
        target.append(part) if field.is_repeated else target.CopyFrom(part)
    else:
        value = {
            FieldDescriptor.CPPTYPE_BOOL: True,
            FieldDescriptor.CPPTYPE_STRING: "x",
            FieldDescriptor.CPPTYPE_DOUBLE: 0.5,
            FieldDescriptor.CPPTYPE_FLOAT: 0.5,
            FieldDescriptor.CPPTYPE_ENUM: 2,
        }.get(field.cpp_type, 7)
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    return message


def paths_of(descriptor: Any, prefix: str = "") -> list[tuple[str, list[FieldDescriptor]]]:
    """Every leaf of the tree of GenerateRequest: (path, fields that lead to it)."""
    found: list[tuple[str, list[FieldDescriptor]]] = []
    for field in descriptor.fields:
        inner = field.message_type
        if inner is not None and inner.full_name in fields.STRUCTS and not field.is_repeated and not prefix:
            found += [(p, [field, *rest]) for p, rest in paths_of(inner, f"{field.name}.")]
        else:
            found.append((prefix + field.name, [field]))
    return found


PATHS = dict(paths_of(generation_pb2.GenerateRequest.DESCRIPTOR))


@pytest.mark.parametrize("path", PATHS)
def test_every_field_of_a_request_is_read_or_rejected_by_its_path(path: str) -> None:
    message = generation_pb2.GenerateRequest()
    *way, last = PATHS[path]
    target: Any = message
    for field in way:
        target = getattr(target, field.name)
    fill_one(target, last)
    supported = any(name == path or name.startswith(path + ".") for name in fields.supported_fields())
    if not supported:
        with pytest.raises(RequestError) as caught:
            fields.read_request(message)
        assert caught.value.reason is Reason.UNSUPPORTED_FIELD
        assert [violation.field for violation in caught.value.violations] == [path]
        return
    value: Any = fields.read_request(message)
    default: Any = types.GenerateRequest(prompts=[])
    for field in [*way, last]:
        value, default = getattr(value, field.name), getattr(default, field.name)
    assert value != default and value is not None


def test_every_field_of_the_wire_has_a_namesake_in_our_types() -> None:
    for name, struct in fields.STRUCTS.items():
        descriptor = generation_pb2.DESCRIPTOR.pool.FindMessageTypeByName(name)
        ours = {field.name for field in msgspec.structs.fields(struct)}
        assert {field.name for field in descriptor.fields} == ours


def test_supported_fields_is_the_list_that_the_validator_uses() -> None:
    listed = fields.supported_fields()
    assert "params.top_p" in listed and "prompts.token_ids" in listed and "request_id" in listed
    assert {name.split(".")[1] for name in listed if name.startswith("params.")} == types.PARAM_NAMES


def test_all_unknown_fields_are_told_at_once() -> None:
    message = generation_pb2.GenerateRequest()
    for part in (message.params, message.output):
        part.ParseFromString(b"\xb8\x3e\x01")
    with pytest.raises(RequestError) as caught:
        fields.read_request(message)
    assert {v.field for v in caught.value.violations} == {"params.999", "output.999"}


def test_presence_and_emptiness_are_kept_apart() -> None:
    params = fields.read_request(generation_pb2.GenerateRequest(params=types_pb2.GenerationParams())).params
    assert params.top_k is None and params.eos_token_id is None
    message = generation_pb2.GenerateRequest()
    message.params.top_k = 0
    message.params.do_sample = False
    message.params.eos_token_id.SetInParent()
    params = fields.read_request(message).params
    assert params.top_k == 0 and params.do_sample is False and params.eos_token_id == []


@pytest.mark.parametrize(
    ("path", "make"),
    [
        ("999", lambda m, raw: m.MergeFromString(raw)),
        ("params.999", lambda m, raw: m.params.MergeFromString(raw)),
        ("params.eos_token_id.999", lambda m, raw: m.params.eos_token_id.MergeFromString(raw)),
        ("prompts[1].999", lambda m, raw: [m.prompts.add(), m.prompts.add().MergeFromString(raw)]),
        ("output.999", lambda m, raw: m.output.MergeFromString(raw)),
        ("output.stream_max_delay.999", lambda m, raw: m.output.stream_max_delay.MergeFromString(raw)),
        ("cache.999", lambda m, raw: m.cache.MergeFromString(raw)),
        ("prompt_options.999", lambda m, raw: m.prompt_options.MergeFromString(raw)),
    ],
)
@pytest.mark.parametrize("copies", [1, 30_000])
def test_an_unknown_field_is_rejected_by_its_number(path: str, make: Any, copies: int) -> None:
    message = generation_pb2.GenerateRequest()
    make(message, b"\xb8\x3e\x01" * copies)  # field 999, varint 1
    with pytest.raises(RequestError) as caught:
        fields.read_request(message)
    assert caught.value.reason is Reason.UNSUPPORTED_FIELD
    assert [violation.field for violation in caught.value.violations] == [path]


@pytest.mark.parametrize(
    ("message", "name"),
    [("params", "stop_string_output"), ("params", "early_stopping"), ("output", "logprob_kind")],
)
def test_an_unknown_enum_value_is_rejected_and_unspecified_is_unset(message: str, name: str) -> None:
    request = generation_pb2.GenerateRequest()
    setattr(getattr(request, message), name, 0)
    assert getattr(getattr(fields.read_request(request), message), name) is None
    setattr(getattr(request, message), name, 99)
    with pytest.raises(RequestError) as caught:
        fields.read_request(request)
    assert caught.value.reason is Reason.UNSUPPORTED_FIELD
    assert f"{message}.{name}" in [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize(("seconds", "nanos"), [(1, -1), (-1, 1), (0, 1_000_000_000), (1 << 60, 0)])
def test_a_broken_duration_is_an_invalid_field(seconds: int, nanos: int) -> None:
    request = generation_pb2.GenerateRequest()
    request.output.stream_max_delay.seconds, request.output.stream_max_delay.nanos = seconds, nanos
    with pytest.raises(RequestError) as caught:
        fields.read_request(request)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.violations[0].field == "output.stream_max_delay"


def test_enum_numbers_and_names_are_those_of_the_wire() -> None:
    wire = {
        "EARLY_STOPPING": (types_pb2.EarlyStopping, types.EarlyStopping),
        "STOP_STRING_OUTPUT": (types_pb2.StopStringOutput, types.StopStringOutput),
        "LOGPROB_KIND": (types_pb2.LogprobKind, types.LogprobKind),
        "FINISH_REASON": (types_pb2.FinishReason, types.FinishReason),
    }
    for prefix, (theirs, ours) in wire.items():
        names = {name.removeprefix(prefix + "_"): number for name, number in theirs.items() if number}
        assert names == {member.name: member.value for member in ours if member.value}


# --- the way out

LOGPROBS = types.Logprobs(
    num_top=1, chosen=[-1.0], ranks=[1], top_token_ids=[5], top_values=[-1.0], requested=[-2.0]
)  # fmt: skip
FINISH = types.FinishInfo(types.FinishReason.EOS, 3, token_id=7)
DELTA = types.OutputDelta(
    prompt_index=1, output_index=2, text="t", token_ids=[4], logprobs=LOGPROBS, finish=FINISH, sequence_score=0.5
)
PROMPT = types.PromptInfo(
    prompt_index=1, prompt_tokens=2, cached_tokens=1, seed=9, token_ids=[1], logprobs=LOGPROBS
)  # fmt: skip
OPTIONS = types.ResolvedOptions(
    types.GenerationParams(top_k=5), types.OutputOptions(logprobs=1), types.PromptOptions(), types.CacheOptions()
)
UPDATE = types.GenerateUpdate(
    prompts=[PROMPT], deltas=[DELTA], usage=types.Usage(1, 2, 3), timing=types.Timing(0.5, 1.25, 2.0, 1)
)


def assert_full(message: Any, *, absent: frozenset[str] = frozenset()) -> None:
    """Every field of the message, and of its messages, is set."""
    names = {field.name for field, _ in message.ListFields()}
    assert names == {field.name for field in message.DESCRIPTOR.fields} - absent, message.DESCRIPTOR.full_name
    for field, value in message.ListFields():
        inner = field.message_type
        if inner is None or not inner.full_name.startswith("octavo.v1.") or inner.GetOptions().map_entry:
            continue
        if inner.full_name.endswith(("Params", "Options")):
            continue
        for part in value if field.is_repeated else [value]:
            assert_full(part, absent=frozenset({"stop_string"}) if inner.name == "FinishInfo" else frozenset())


def test_every_field_of_an_answer_is_written() -> None:
    assert_full(convert.generate_response(UPDATE, request_id="r", model="m", options=OPTIONS))
    response = convert.stream_response(UPDATE)
    convert.name_first_response(response, request_id="r", model="m", options=OPTIONS)
    assert_full(response)
    stop = convert.finish_info(types.FinishInfo(types.FinishReason.STOP_STRING, 3, token_id=1, stop_string="s"))
    assert stop is not None and stop.stop_string == "s" and stop.completion_tokens == 3


def test_every_option_survives_the_way_out_and_in() -> None:
    message = generation_pb2.GenerateRequest()
    for path, way in PATHS.items():
        if path in fields.supported_fields() and len(way) == 2:
            fill_one(getattr(message, way[0].name), way[1])
    message.params.stop_string_output = types_pb2.STOP_STRING_OUTPUT_EXCLUDE
    ours = fields.read_request(message)
    again = convert.resolved(types.ResolvedOptions(ours.params, ours.output, ours.prompt_options, ours.cache))
    assert again is not None
    for name in ("params", "output", "prompt_options", "cache"):
        assert getattr(again, name) == getattr(message, name), name


WATERMARK = types.Watermark(green_list=types.GreenListWatermark(seeding_scheme=types.SeedingScheme.SELFHASH))


CONSTRAINT = types.StructuredOutput(choice=types.Choice(["a", "b"]))


def test_watermarks_and_constraints_go_both_ways() -> None:
    synth = types.Watermark(synth_id=types.SynthIdWatermark(ngram_len=3, keys=[1, -2], skip_first_ngram_calls=False))
    for params in (
        types.GenerationParams(watermarking_config=WATERMARK),
        types.GenerationParams(watermarking_config=synth),
        types.GenerationParams(structured_output=CONSTRAINT),
        types.GenerationParams(structured_output=types.StructuredOutput(json_schema="{}")),
    ):
        message = generation_pb2.GenerateRequest(params=convert.wire(params))
        assert fields.read_request(message).params == params


def test_every_parameter_of_ours_is_written() -> None:
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(types.GenerationParams):
        text = str(field.type)
        values[field.name] = (
            [types.SequenceBias([1], 2.0)] if "SequenceBias" in text
            else types.ExponentialDecay(1, 1.5) if "ExponentialDecay" in text
            else WATERMARK if "Watermark" in text
            else CONSTRAINT if "StructuredOutput" in text
            else types.Prompt(token_ids=[1]) if "Prompt" in text
            else {1: 0.5} if "dict" in text
            else [[1]] if "list[list" in text
            else [1] if "list[int" in text
            else ["x"] if "list[str" in text
            else 2
        )  # fmt: skip
    message = convert.wire(types.GenerationParams(**values))
    assert {field.name for field in message.DESCRIPTOR.fields} == {field.name for field, _ in message.ListFields()}


def test_every_limit_and_every_figure_of_the_load_is_written() -> None:
    ours = {field.name for field in msgspec.structs.fields(Limits)}
    wire = {field.name for field in model_pb2.Limits.DESCRIPTOR.fields}
    assert wire <= ours
    assert {field.name for field, _ in convert.wire(Limits()).ListFields()} == wire
    numbers = {f.name: 1 for f in msgspec.structs.fields(types.EngineLoad)}
    assert_full(convert.load(types.EngineLoad(**numbers), control_pb2.SERVER_STATE_READY, 0.0))


def test_a_large_response_is_split_without_losing_anything() -> None:
    update = types.GenerateUpdate(
        prompts=[msgspec.structs.replace(PROMPT, prompt_index=i, token_ids=list(range(200))) for i in range(5)],
        deltas=[
            types.OutputDelta(prompt_index=0, output_index=i, text="x" * 100, token_ids=list(range(100)))
            for i in range(20)
        ],
        usage=types.Usage(1, 2, 3),
        timing=types.Timing(0.5, 1.25, 2.0, 1),
    )
    whole = convert.stream_response(update)
    convert.name_first_response(whole, request_id="r", model="m", options=OPTIONS)
    parts = convert.split_response(whole, 1000)
    assert len(parts) > 3
    assert all(part.ByteSize() <= 1000 for part in parts)
    assert [part.HasField("usage") for part in parts] == [False] * (len(parts) - 1) + [True]
    assert [bool(part.request_id) for part in parts] == [True] + [False] * (len(parts) - 1)
    merged = generation_pb2.StreamGenerateResponse()
    for part in parts:
        merged.MergeFrom(part)
    assert merged == whole
