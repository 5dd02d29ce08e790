"""From `generate()`'s keywords to a GenerateRequest. Whatever is not understood is refused before anything is sent."""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from octavo_proto.v1 import generation_pb2, types_pb2

from octavo.client import values
from octavo.client.channel import deadline
from octavo.client.tables import ALIASES, NEUTRAL, OFF, REJECTED

Prompts = Any
"""str | list[int] | list[str | list[int]]; numpy arrays and torch tensors count as lists."""

GROUPS: Final[dict[str, Any]] = {
    "params": types_pb2.GenerationParams.DESCRIPTOR,
    "output": types_pb2.OutputOptions.DESCRIPTOR,
    "prompt_options": types_pb2.PromptOptions.DESCRIPTOR,
    "cache": types_pb2.CacheOptions.DESCRIPTOR,
}
"""Fields of GenerateRequest that hold options -> descriptor of their message."""

GROUP_OF_FIELD: Final[dict[str, str]] = {
    name: group for group, descriptor in GROUPS.items() for name in descriptor.fields_by_name
}
_PROMPTS: Final = ("inputs", "input_ids", "text_inputs")
TOP_LEVEL: Final[frozenset[str]] = frozenset({"model", "priority", "request_id"})
_SPELLINGS: Final[frozenset[str]] = frozenset(
    {"remove_input", "return_tensors", "handle_long_generation", "output_logits", "output_scores"}
    | {"attention_mask", "negative_prompt_attention_mask", "prefix"}
)
_KINDS: Final[dict[str, str]] = {"output_logits": "raw_logit", "output_scores": "processed_logit"}


@dataclass(frozen=True, slots=True)
class Call:
    """A request that is ready to be sent."""

    message: generation_pb2.GenerateRequest
    timeout: float
    """Seconds."""
    single: bool
    """One prompt was given, not a list of prompts."""

    @property
    def request_id(self) -> str:
        return str(self.message.request_id)


def build(prompts: Prompts, keywords: Mapping[str, Any]) -> Call:
    """The request for `generate(prompts, **keywords)`.

    Raises TypeError for an unknown keyword, a wrong type, or two spellings of one field with different values;
    ValueError for a refused keyword or a value that the wire cannot carry.
    """
    rest = dict(keywords)
    timeout = deadline(rest.pop("timeout", None))
    config = rest.pop("generation_config", None)
    prompts = _prompts_argument(prompts, rest)
    fields = _canonical(_config_entries(config), "generation_config.")
    _merge(fields, _canonical(rest, ""))
    message = generation_pb2.GenerateRequest()
    messages, single = _prompt_messages(prompts, fields.pop("prefix", None))
    message.prompts.extend(messages)
    for name, value in fields.items():
        group = GROUP_OF_FIELD.get(name)
        if group is None:
            descriptor = message.DESCRIPTOR.fields_by_name[name]
            setattr(message, name, values.scalar(descriptor, value))
        else:
            values.set_field(getattr(message, group), GROUPS[group].fields_by_name[name], value)
    if not message.request_id:
        message.request_id = uuid.uuid4().hex
    return Call(message, timeout, single)


def known_keywords() -> list[str]:
    """Every keyword that is understood, refused ones included."""
    own = {"timeout", "generation_config", *_PROMPTS}
    return sorted(own | _SPELLINGS | TOP_LEVEL | NEUTRAL | set(GROUP_OF_FIELD) | set(ALIASES) | set(REJECTED))


def _config_entries(config: Any) -> dict[str, Any]:
    """Entries of a GenerationConfig or dict. Inside it None means unset."""
    if config is None:
        return {}
    if isinstance(config, str | bytes) or not (isinstance(config, Mapping) or hasattr(config, "__dict__")):
        raise TypeError(f"generation_config: has to be a GenerationConfig or a dict, got {type(config).__name__}")
    entries = config if isinstance(config, Mapping) else vars(config)
    return {name: value for name, value in entries.items() if value is not None and not name.startswith("_")}


def _canonical(source: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Field -> value, with every other spelling translated. A value of None in the result means "unset"."""
    fields: dict[str, Any] = {}
    spelled: dict[str, str] = {}

    def assign(field: str, value: Any, spelling: str) -> None:
        if field in fields and not _same(field, fields[field], value):
            raise TypeError(f"{where}{spelling}: contradicts {where}{spelled[field]}, which sets the same field")
        fields[field] = value
        spelled.setdefault(field, spelling)

    for name, value in source.items():
        if name in NEUTRAL:
            continue
        if name in REJECTED:
            _refuse(where + name, name, value)
        elif name in _SPELLINGS:
            for field, translated in _translate(name, value, source):
                assign(field, translated, name)
        elif ALIASES.get(name, name) in GROUP_OF_FIELD or name in TOP_LEVEL:
            field = ALIASES.get(name, name)
            if value is None and field == "eos_token_id":
                assign("ignore_eos", True, name)
            assign(field, OFF.get(field) if value is None else value, name)
        else:
            raise TypeError(f"unknown keyword {where}{name}{_suggestion(name)}")
    return fields


def _merge(fields: dict[str, Any], stronger: Mapping[str, Any]) -> None:
    fields.update(stronger)
    for name in [name for name, value in fields.items() if value is None]:
        del fields[name]


def _translate(name: str, value: Any, source: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The fields that a spelling which is more than another name stands for."""
    if name == "prefix":
        return [("prefix", value or None)]
    if name.endswith("attention_mask"):
        _check_mask(name, value)
        return []
    if value is None:
        return []
    if name == "handle_long_generation":
        if value != "hole":
            raise ValueError(f'handle_long_generation: has to be "hole" or None, got {value!r}')
        return [("truncate_to_fit", True)]
    if not isinstance(value, bool):
        raise TypeError(f"{name}: has to be True or False, got {value!r}")
    if name == "remove_input":
        return [("include_prompt", not value)]
    if not value:
        return []
    if name == "return_tensors":
        return [("return_text", False)]
    if source.get("output_logits") and source.get("output_scores"):
        raise ValueError("output_logits and output_scores: one request returns one kind of value")
    kind: list[tuple[str, Any]] = [("logprob_kind", _KINDS[name])]
    return kind if source.get("logprobs") is not None else [*kind, ("logprobs", 0)]


def _refuse(path: str, name: str, value: Any) -> None:
    default, why = REJECTED[name]
    value = values.plain(value)
    if value is None or value is False or (type(value) is type(default) and value == default):
        return
    if isinstance(value, int | float) and not isinstance(value, bool) and value == default:
        return
    raise ValueError(f"{path}: not supported: {why}")


def _check_mask(name: str, value: Any) -> None:
    """A mask of ones says nothing; holes are refused, since nothing here is padded."""

    def ones(item: Any) -> bool:
        item = values.plain(item)
        return all(ones(part) for part in item) if isinstance(item, Iterable) else item == 1

    if value is not None and not ones(value):
        raise ValueError(f"{name}: only ones are supported; leave padding out of the prompt")


def _same(field: str, one: Any, other: Any) -> bool:
    """The same value, where a string and a list of that string are the same stop strings."""
    if field == "stop_strings":
        one, other = ([item] if isinstance(item, str) else item for item in (one, other))
    if field == "logprob_kind":
        one, other = (item.lower() if isinstance(item, str) else item for item in (one, other))
    return bool(values.plain(one) == values.plain(other))


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, known_keywords(), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _prompts_argument(prompts: Prompts, rest: dict[str, Any]) -> Prompts:
    """The prompts, which `generate()` also knows as `inputs` and `input_ids`, and the pipeline as `text_inputs`."""
    given = [value for value in (prompts, *(rest.pop(name, None) for name in _PROMPTS)) if value is not None]
    if len(given) != 1:
        raise TypeError("prompts: has to be given once" if given else "prompts: missing")
    return given[0]


def _prompt_messages(prompts: Prompts, prefix: Any) -> tuple[list[types_pb2.Prompt], bool]:
    prompts = values.plain(prompts)
    single = isinstance(prompts, str)
    if not single:
        if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | Mapping):
            raise TypeError(f"prompts: has to be a string, token ids or a list of those, got {type(prompts).__name__}")
        prompts = [values.plain(item) for item in prompts]
        if not prompts:
            raise ValueError("prompts: empty; a prompt of no text is the string ''")
        single = isinstance(prompts[0], int)
    items = [prompts] if single else prompts
    if prefix is not None:
        items = [_prefixed(values.text("prefix", prefix), item) for item in items]
    names = ["prompts"] if single else [f"prompts[{index}]" for index in range(len(items))]
    return [values.prompt(name, item) for name, item in zip(names, items, strict=True)], single


def _prefixed(prefix: str, item: Any) -> str:
    if not isinstance(item, str):
        raise ValueError("prefix: goes before text; put it into the token ids instead")
    return prefix + item
