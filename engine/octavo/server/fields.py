"""Which fields of a GenerateRequest are honoured, and the reading of those into our types.

The walk is driven by the descriptors: every field that is set is converted or reported by its path, and fields and enum
values that this server does not know are reported by number. `supported_fields` is made of the same tables.
"""

from __future__ import annotations

import enum
from typing import Any, Final, TypeVar

import msgspec
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from octavo_proto.v1 import generation_pb2 as pb

from octavo import types
from octavo.errors import FieldViolation, Reason, RequestError

STRUCTS: Final[dict[str, type[msgspec.Struct]]] = {
    "octavo.v1.GenerateRequest": types.GenerateRequest,
    "octavo.v1.Prompt": types.Prompt,
    "octavo.v1.GenerationParams": types.GenerationParams,
    "octavo.v1.SequenceBias": types.SequenceBias,
    "octavo.v1.ExponentialDecay": types.ExponentialDecay,
    "octavo.v1.Watermark": types.Watermark,
    "octavo.v1.GreenListWatermark": types.GreenListWatermark,
    "octavo.v1.SynthIdWatermark": types.SynthIdWatermark,
    "octavo.v1.StructuredOutput": types.StructuredOutput,
    "octavo.v1.StructuredOutput.Choice": types.Choice,
    "octavo.v1.OutputOptions": types.OutputOptions,
    "octavo.v1.PromptOptions": types.PromptOptions,
    "octavo.v1.CacheOptions": types.CacheOptions,
}
"""Our type of each message; fields have the same names."""

ENUMS: Final[dict[str, type[enum.IntEnum]]] = {
    "octavo.v1.EarlyStopping": types.EarlyStopping,
    "octavo.v1.StopStringOutput": types.StopStringOutput,
    "octavo.v1.LogprobKind": types.LogprobKind,
    "octavo.v1.GreenListWatermark.SeedingScheme": types.SeedingScheme,
}
"""Our type of each enum; numbers are the same and 0 is unset."""

_REQUIRED: Final[dict[str, list[str]]] = {
    name: [field.name for field in msgspec.structs.fields(struct) if field.required] for name, struct in STRUCTS.items()
}
_LARGE: Final = 16_384
"""Bytes of unknown fields from which they are not listed one by one (that takes 1.4 s per MB)."""

S = TypeVar("S", bound=msgspec.Struct)


def supported_fields() -> list[str]:
    """Paths from GenerateRequest of every field that a request may set."""
    return list(_paths(pb.GenerateRequest.DESCRIPTOR, ""))


def _paths(descriptor: Any, path: str) -> list[str]:
    found: list[str] = []
    for field in descriptor.fields:
        name = path + field.name
        inner = field.message_type
        is_option_message = inner is not None and inner.full_name in STRUCTS
        found += _paths(inner, name + ".") if is_option_message else [name]
    return found


def read_request(message: pb.GenerateRequest) -> types.GenerateRequest:
    """Raises RequestError (UNSUPPORTED_FIELD, or INVALID_FIELD) with every field at fault."""
    return read(message, types.GenerateRequest)


def read(message: Message, struct: type[S], path: str = "") -> S:
    """Our form of one of the messages in STRUCTS; `path` is put before the names of its fields, with a dot at its end.

    Raises RequestError (UNSUPPORTED_FIELD, or INVALID_FIELD) with every field at fault.
    """
    reader = _Reader()
    result = reader.struct(message, path)
    if reader.unsupported:
        raise RequestError(
            Reason.UNSUPPORTED_FIELD, "the request sets fields that are not supported", violations=reader.unsupported
        )
    if reader.invalid:
        raise RequestError(Reason.INVALID_FIELD, "the request has invalid fields", violations=reader.invalid)
    assert isinstance(result, struct)
    return result


def reject_unknown(message: Message, path: str = "") -> None:
    """Raises RequestError (UNSUPPORTED_FIELD) when this message, its submessages aside, has unknown fields."""
    if numbers := _unknown_numbers(message):
        violations = [_unknown(path, number) for number in numbers]
        raise RequestError(
            Reason.UNSUPPORTED_FIELD, "the request sets fields that are not supported", violations=violations
        )


class _Reader:
    """One walk over a request."""

    def __init__(self) -> None:
        self.unsupported: list[FieldViolation] = []
        self.invalid: list[FieldViolation] = []

    def struct(self, message: Message, path: str) -> msgspec.Struct:
        full_name = message.DESCRIPTOR.full_name
        values: dict[str, Any] = {name: self._default(message, name) for name in _REQUIRED[full_name]}
        for field, value in message.ListFields():
            values[field.name] = self._value(field, value, path + field.name)
        self.unsupported += [_unknown(path, number) for number in _unknown_numbers(message)]
        return STRUCTS[full_name](**values)

    @staticmethod
    def _default(message: Message, name: str) -> Any:
        value = message.DESCRIPTOR.fields_by_name[name].default_value
        return [] if value == [] else value

    def _value(self, field: FieldDescriptor, value: Any, name: str) -> Any:
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            return dict(value)
        if field.is_repeated:
            if inner is None:
                return list(value)
            return [self._message(item, f"{name}[{i}]") for i, item in enumerate(value)]
        if inner is not None:
            return self._message(value, name)
        if field.enum_type is not None:
            return self._enum(field, value, name)
        return value

    def _message(self, message: Any, name: str) -> Any:
        full_name = message.DESCRIPTOR.full_name
        if full_name in STRUCTS:
            return self.struct(message, name + ".")
        self.unsupported += [_unknown(name + ".", number) for number in _unknown_numbers(message)]
        if full_name == "octavo.v1.TokenIds":
            return list(message.ids)
        if full_name == "google.protobuf.Duration":
            return self._seconds(message, name)
        return message  # an unsupported one: only compared with nothing

    def _enum(self, field: FieldDescriptor, value: int, name: str) -> enum.IntEnum | None:
        assert field.enum_type is not None
        if value == 0:
            return None
        if value not in field.enum_type.values_by_number:
            self.unsupported.append(FieldViolation(name, f"unknown value {value}"))
            return None
        return ENUMS[field.enum_type.full_name](value)

    def _seconds(self, duration: Any, name: str) -> float:
        try:
            return seconds(duration)
        except ValueError:
            self.invalid.append(FieldViolation(name, "not a valid Duration"))
            return 0.0


def seconds(duration: Any) -> float:
    """Of a google.protobuf.Duration. Raises ValueError when it breaks the rules of that type."""
    if abs(duration.nanos) >= 1_000_000_000 or abs(duration.seconds) > 315_576_000_000:
        raise ValueError("nanos or seconds out of range")
    if duration.seconds * duration.nanos < 0:
        raise ValueError("seconds and nanos differ in sign")
    return float(duration.seconds + duration.nanos / 1e9)


def _unknown(path: str, number: int) -> FieldViolation:
    return FieldViolation(f"{path}{number}", f"unknown field number {number}")


def _unknown_numbers(message: Any) -> list[int]:
    """Numbers of the unknown fields of this message, submessages aside; only the first where there are very many."""
    if message.ByteSize() > _LARGE:
        rest = type(message)()
        rest.CopyFrom(message)
        for field, _ in rest.ListFields():
            rest.ClearField(field.name)
        raw = rest.SerializeToString()
        if len(raw) > _LARGE:
            return [_first_number(raw)]
        message = rest
    unknown: Any = UnknownFieldSet(message)
    return sorted({entry.field_number for entry in unknown}) if len(unknown) else []


def _first_number(raw: bytes) -> int:
    tag = shift = 0
    for byte in raw[:5]:
        tag |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return tag >> 3
