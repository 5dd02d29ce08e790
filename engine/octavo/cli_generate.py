"""`octavo generate TEXT...`: the flags are made from the fields of the request's messages."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from octavo_proto.v1 import generation_pb2

from octavo.cli_common import add_connection, as_dict, connect, guarded, print_json, proto_comments
from octavo.client import Client, Response
from octavo.client.params import GROUPS, TOP_LEVEL
from octavo.client.tables import ALIASES

_TITLES = {
    "params": "generation",
    "output": "output",
    "prompt_options": "prompt",
    "cache": "cache",
}
_JSON = {"sequence_bias", "logit_bias", "bad_words_ids", "watermarking_config", "structured_output"}
_NOT_ALIASES = {"negative_prompt_ids"}


def add_generate(parser: argparse.ArgumentParser, *, with_help: bool) -> None:
    """Fills the parser. Comments of the .proto are read for --help only."""
    parser.usage = "octavo generate [options] TEXT..."
    parser.add_argument("text", nargs="*", metavar="TEXT", help="what to continue; without any: standard input")
    parser.add_argument("--stream", action="store_true", help="print text as it is generated")
    parser.add_argument("--json", action="store_true", help="print the answer, or each delta of a stream, as JSON")
    comments = proto_comments() if with_help else {}
    for name, descriptor in GROUPS.items():
        group = parser.add_argument_group(_TITLES[name])
        for field in descriptor.fields:
            _add_field(group, field, comments)
    group = parser.add_argument_group("request")
    for name in sorted(TOP_LEVEL):
        _add_field(group, generation_pb2.GenerateRequest.DESCRIPTOR.fields_by_name[name], comments)
    group.add_argument(
        "--remove-input",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="the opposite of --include-prompt",
    )
    add_connection(parser)
    parser.set_defaults(run=guarded(_generate))


def _add_field(group: Any, field: Any, comments: dict[str, str]) -> None:
    """One flag `--field-name`, which sets the keyword of that name only when it is given."""
    spellings = [alias for alias, name in ALIASES.items() if name == field.name and alias not in _NOT_ALIASES]
    flags = ["--" + name.replace("_", "-") for name in [field.name, *spellings]]
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    settings["help"] = comments.get(field.name, "").replace("%", "%%")
    is_ids = field.message_type is not None and field.message_type.name == "TokenIds"
    if field.name in _JSON:
        settings |= {"type": json.loads, "metavar": "JSON"}
    elif field.name == "early_stopping":
        settings |= {"type": _early_stopping, "metavar": "{false,true,never}"}
    elif field.name == "exponential_decay_length_penalty":
        settings |= {"type": _pair, "metavar": "START,FACTOR"}
    elif is_ids or (field.is_repeated and field.type == FieldDescriptor.TYPE_UINT32):
        settings |= {"type": _ids, "metavar": "ID,..."}
    elif field.is_repeated:
        settings |= {"action": "append", "metavar": "TEXT"}
    elif field.type == FieldDescriptor.TYPE_BOOL:
        settings |= {"action": argparse.BooleanOptionalAction}
    elif field.enum_type is not None:
        settings |= {"choices": _enum_names(field.enum_type)}
    elif field.name == "stream_max_delay":
        settings |= {"type": float, "metavar": "SECONDS"}
    elif field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        settings |= {"type": float, "metavar": "X"}
    elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE):
        settings |= {"metavar": "TEXT"}
    else:
        settings |= {"type": int, "metavar": "N"}
    group.add_argument(*flags, **settings)


def _enum_names(enum: Any) -> list[str]:
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    return [value.name.removeprefix(prefix).lower() for value in enum.values[1:]]


def _ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")] if text else []


def _pair(text: str) -> tuple[int, float]:
    start, factor = text.split(",")
    return int(start), float(factor)


def _early_stopping(text: str) -> bool | str:
    choices: dict[str, bool | str] = {"false": False, "true": True, "never": "never"}
    if text.lower() not in choices:
        raise argparse.ArgumentTypeError(f"has to be one of {', '.join(choices)}, got {text!r}")
    return choices[text.lower()]


def _generate(options: argparse.Namespace) -> int:
    prompts = options.text or [sys.stdin.read()]
    names = {name for descriptor in GROUPS.values() for name in descriptor.fields_by_name} | TOP_LEVEL
    keywords = {name: value for name, value in vars(options).items() if name in names | {"remove_input", "timeout"}}
    with connect(options) as client:
        if options.stream:
            _stream(client, prompts, keywords, as_json=options.json)
        else:
            response = client.generate_all(prompts, **keywords)
            print_json(_response_dict(response)) if options.json else _print_outputs(response)
    return 0


def _stream(client: Client, prompts: list[str], keywords: dict[str, Any], *, as_json: bool) -> None:
    """One sequence is printed as it comes; of several each is printed whole at its end, since they interleave."""
    count = keywords.get("num_return_sequences", 1)
    alone = len(prompts) == 1 and count == 1
    texts: dict[tuple[int, int], str] = {}
    with client.stream(prompts, **keywords) as stream:
        for delta in stream:
            key = (delta.prompt_index, delta.output_index)
            if as_json:
                print_json(asdict(delta))
            elif alone:
                print(delta.text, end="\n" if delta.finish_reason else "", flush=True)
            else:
                texts[key] = texts.get(key, "") + delta.text
                if delta.finish_reason:
                    print(f"[{key[0]}.{key[1]}] {texts[key]}", flush=True)


def _print_outputs(response: Response) -> None:
    outputs = [output for per_prompt in response.outputs for output in per_prompt]
    for output in outputs:
        label = f"[{output.prompt_index}.{output.output_index}] " if len(outputs) > 1 else ""
        print(label + output.text)


def _response_dict(response: Response) -> dict[str, Any]:
    resolved = as_dict(response.resolved) if response.resolved is not None else None
    fields = {name: getattr(response, name) for name in ("request_id", "model")}
    fields["outputs"] = [[asdict(output) for output in outputs] for outputs in response.outputs]
    fields["prompts"] = [asdict(info) for info in response.prompts]
    fields["usage"] = asdict(response.usage)
    fields["timing"] = asdict(response.timing) if response.timing else None
    return {**fields, "resolved": resolved}
