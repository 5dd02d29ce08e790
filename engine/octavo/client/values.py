"""Python values to fields of the wire, by the field's descriptor; ValueError or TypeError names the keyword."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from octavo_proto.v1 import types_pb2

Field = Any
"""A FieldDescriptor; of its two classes, which only mypy tells apart, it does not matter which."""

_RANGES = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}


def plain(value: Any) -> Any:
    """`value` as Python numbers and lists, if it is a numpy or torch one."""
    return value.tolist() if hasattr(value, "tolist") else value


def set_field(message: Message, field: Field, value: Any) -> None:
    """Sets one field of a request from what a caller gave for it. Raises ValueError or TypeError."""
    value = plain(value)
    special = _SPECIAL.get(field.name)
    if special is not None:
        special(message, field, value)
    elif field.message_type is not None and field.message_type.full_name == "octavo.v1.TokenIds":
        target = getattr(message, field.name)
        target.SetInParent()
        target.ids.extend(token_ids(field.name, value))
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(value)
    elif field.is_repeated:
        items = [value] if isinstance(value, str | bytes) or not isinstance(value, Iterable) else value
        getattr(message, field.name).extend(scalar(field, item) for item in items)
    else:
        setattr(message, field.name, scalar(field, value))


def scalar(field: Field, value: Any) -> Any:
    """`value` for a field of a scalar or enum type."""
    value = plain(value)
    if field.enum_type is not None:
        return _enum(field, value)
    if field.type in _RANGES:
        return integer(field.name, value, *_RANGES[field.type])
    if field.type == FieldDescriptor.TYPE_BOOL:
        if not isinstance(value, bool):
            raise TypeError(f"{field.name}: has to be True or False, got {value!r}")
        return value
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return number(field.name, value)
    return text(field.name, value)


def integer(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int of that range; bool and float are TypeErrors."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: has to be an integer, got {value!r}")
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: has to be an integer, got {value!r}") from None
    if not low <= result <= high:
        raise ValueError(f"{name}: has to be {low} to {high}, got {result}")
    return result


def number(name: str, value: Any) -> float:
    """`value` as a float; NaN and infinities pass, the server refuses them with the field's path."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: has to be a number, got {value!r}")
    return float(value)


def text(name: str, value: Any) -> str:
    """`value` as text that UTF-8 can carry."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: has to be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: not valid Unicode, it has a lone surrogate") from None
    return value


def token_ids(name: str, value: Any) -> list[int]:
    """One id or several as a list."""
    value = plain(value)
    items = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    return [integer(name, plain(item), 0, 2**32 - 1) for item in items]


def prompt(name: str, value: Any) -> types_pb2.Prompt:
    """A text or a list of token ids as a Prompt."""
    if isinstance(value, str):
        return types_pb2.Prompt(text=text(name, value))
    value = plain(value)
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise TypeError(f"{name}: has to be a string or a list of token ids, got {type(value).__name__}")
    return types_pb2.Prompt(token_ids=types_pb2.TokenIds(ids=token_ids(name, value)))


def _enum(field: Field, value: Any) -> int:
    """A number, or a name without its prefix in any case: "exclude" for STOP_STRING_OUTPUT_EXCLUDE."""
    values = field.enum_type.values_by_name
    prefix = field.enum_type.values_by_number[0].name.removesuffix("UNSPECIFIED")
    if isinstance(value, str):
        found = values.get(value.upper()) or values.get(prefix + value.upper())
        if found is None or found.number == 0:
            names = [name.removeprefix(prefix).lower() for name in list(values)[1:]]
            raise ValueError(f"{field.name}: has to be one of {', '.join(names)}, got {value!r}")
        return int(found.number)
    return integer(field.name, value, 0, 2**31 - 1)


def _seed(message: Any, field: Field, value: Any) -> None:
    """Negative seeds are two's complement, as in torch."""
    message.seed = integer("seed", value, -(2**63), 2**64 - 1) % 2**64


def _early_stopping(message: Any, field: Field, value: Any) -> None:
    message.early_stopping = _enum(field, str(value) if isinstance(value, bool) else value)


def _sequence_bias(message: Any, field: Field, value: Any) -> None:
    pairs = list(value.items()) if isinstance(value, Mapping) else list(value)
    if not pairs:
        raise ValueError("sequence_bias: has to name at least one sequence; leave it out for none")
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2 or isinstance(plain(pair[0]), int | str):
            raise TypeError("sequence_bias: has to be a dict of tuples of token ids to biases, or a list of such pairs")
        ids, bias = pair
        entry = types_pb2.SequenceBias(token_ids=token_ids("sequence_bias", ids), bias=number("sequence_bias", bias))
        message.sequence_bias.append(entry)


def _logit_bias(message: Any, field: Field, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias: has to be a dict of token id to bias, got {type(value).__name__}")
    for token, bias in value.items():
        key = int(token) if isinstance(token, str) and token.isdecimal() else token
        message.logit_bias[integer("logit_bias", key, 0, 2**32 - 1)] = number("logit_bias", bias)


def _bad_words_ids(message: Any, field: Field, value: Any) -> None:
    if len(value) == 0:
        raise ValueError("bad_words_ids: has to have at least one entry; leave it out for none")
    for ids in value:
        if isinstance(plain(ids), int | str):
            raise TypeError("bad_words_ids: has to be a list of lists of token ids")
        message.bad_words_ids.append(types_pb2.TokenIds(ids=token_ids("bad_words_ids", ids)))


def _exponential_decay(message: Any, field: Field, value: Any) -> None:
    try:
        start, factor = value
    except (TypeError, ValueError):
        raise TypeError("exponential_decay_length_penalty: has to be a pair (start_index, factor)") from None
    message.exponential_decay_length_penalty.CopyFrom(
        types_pb2.ExponentialDecay(
            start_index=integer(field.name, start, 0, 2**32 - 1), factor=number(field.name, plain(factor))
        )
    )


def _negative_prompt(message: Any, field: Field, value: Any) -> None:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]  # generate() takes a batch of one
    message.negative_prompt.CopyFrom(prompt("negative_prompt", value))


def _watermark(message: Any, field: Field, value: Any) -> None:
    """A dict, or transformers' WatermarkingConfig or SynthIDTextWatermarkingConfig."""
    settings = dict(value if isinstance(value, Mapping) else vars(value))
    if settings.pop("debug_mode", False):
        raise ValueError("watermarking_config.debug_mode: not supported")
    scheme = "synth_id" if "ngram_len" in settings else "green_list"
    target = getattr(message.watermarking_config, scheme)
    target.SetInParent()
    _fill(target, field.name, settings)


def _structured_output(message: Any, field: Field, value: Any) -> None:
    """One of {"json_schema": text or dict}, {"regex": text}, {"grammar": text}, {"choice": [text, ...]}."""
    if not isinstance(value, Mapping) or len(value) != 1:
        raise TypeError("structured_output: has to be a dict with one key: json_schema, regex, grammar or choice")
    ((kind, constraint),) = value.items()
    if kind == "choice":
        message.structured_output.choice.values.extend(text("structured_output.choice", item) for item in constraint)
        return
    if kind == "json_schema" and not isinstance(constraint, str):
        constraint = json.dumps(constraint)
    _fill(message.structured_output, field.name, {kind: constraint})


def _stream_max_delay(message: Any, field: Field, value: Any) -> None:
    seconds = number(field.name, value)
    if not abs(seconds) < 1e9:
        raise ValueError(f"{field.name}: has to be a number of seconds, got {seconds}")
    message.stream_max_delay.FromNanoseconds(round(seconds * 1e9))


def _fill(message: Message, path: str, settings: Mapping[str, Any]) -> None:
    fields = message.DESCRIPTOR.fields_by_name
    for name, value in settings.items():
        if name not in fields:
            raise TypeError(f"{path}: unknown entry {name!r}")
        if value is not None:
            set_field(message, fields[name], value)


_SPECIAL: dict[str, Callable[[Any, Field, Any], None]] = {
    "seed": _seed,
    "early_stopping": _early_stopping,
    "sequence_bias": _sequence_bias,
    "logit_bias": _logit_bias,
    "bad_words_ids": _bad_words_ids,
    "exponential_decay_length_penalty": _exponential_decay,
    "negative_prompt": _negative_prompt,
    "watermarking_config": _watermark,
    "structured_output": _structured_output,
    "stream_max_delay": _stream_max_delay,
}
