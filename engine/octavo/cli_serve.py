"""`octavo serve`: one flag per field of the configuration's structs, and the docstring under it is its help."""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

from octavo import config
from octavo.cli_common import run_directory
from octavo.config import CacheConfig, EngineConfig, Limits, ModelConfig, SchedulerConfig, ServerConfig

GROUPS: Final[dict[str, type[msgspec.Struct]]] = {
    "model": ModelConfig,
    "KV cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "server": ServerConfig,
    "limits on requests": Limits,
}
"""Title in --help -> the struct whose fields are flags. A field of two structs is one flag for both."""

FLAGS: Final[dict[str, tuple[str, ...]]] = {
    "name": ("model-name",),
    "memory": ("kv-cache-memory",),
    "frontend_processes": ("frontend-processes", "frontends"),
    "max_inflight_requests": ("max-inflight-requests", "max-inflight"),
}
"""Fields whose flags are not just their names."""

_CHOICES: Final[dict[str, list[Any]]] = {
    "device": ["auto", "cpu", "cuda", "interpreter"],
    "dtype": ["auto", "float32", "bfloat16", "float16"],
    "quantization": ["int8"],
    "dependent_launch": ["auto", "off"],
    "kv_cache_dtype": ["auto", "fp8"],
    "block_size": [16, 32, 64],
    "health_default": ["liveness", "readiness"],
}
_NOT_FLAGS: Final = {"path", "limits"}
_UNITS: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def add_serve(parser: argparse.ArgumentParser, *, with_help: bool) -> None:
    """Fills the parser. Flags that are not given leave the struct's default."""
    parser.usage = "octavo serve [options] [MODEL]"
    parser.description = "Exit status 0: stopped, 1: crash loop, 2: usage or port, 3: checkpoint, 4: device."
    parser.add_argument(
        "model",
        nargs="?",
        default="demo",
        metavar="MODEL",
        help='a checkpoint\'s folder, a hub id, or "demo" (bundled)',
    )
    docs = _docstrings() if with_help else {}
    seen: set[str] = set()
    for title, struct in GROUPS.items():
        group = parser.add_argument_group(title)
        for field in msgspec.structs.fields(struct):
            if field.name not in _NOT_FLAGS | seen:
                seen.add(field.name)
                _add_flag(group, field, docs.get((struct.__name__, field.name), ""))
    parser.set_defaults(run=_serve)


def configs(options: argparse.Namespace) -> tuple[EngineConfig, ServerConfig]:
    """The configuration that the flags stand for."""
    given = vars(options)
    model = options.model

    def fill(struct: type[Any], **more: Any) -> Any:
        names = [field.name for field in msgspec.structs.fields(struct)]
        return struct(**{**more, **{name: given[name] for name in names if name in given}})

    engine = EngineConfig(
        model=fill(ModelConfig, path=model, name=Path(model).name or model),
        cache=fill(CacheConfig),
        scheduler=fill(SchedulerConfig),
    )
    server: ServerConfig = fill(ServerConfig, limits=fill(Limits))
    if not server.run_directory:
        server = msgspec.structs.replace(server, run_directory=run_directory(server.address))
    return engine, server


def _serve(options: argparse.Namespace) -> int:
    from octavo.supervisor import serve

    engine, server = configs(options)
    return serve(engine, server)


def _add_flag(group: Any, field: msgspec.structs.FieldInfo, doc: str) -> None:
    kind = field.type
    if isinstance(kind, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    default = field.default if field.default is not msgspec.NODEFAULT else None
    shown = "" if default in (None, "") else f" Default {default}."
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    settings["help"] = (doc + shown).strip().replace("%", "%%")
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif field.name == "memory":
        settings |= {"type": size, "metavar": "BYTES"}
    elif field.name in _CHOICES:
        settings |= {"type": kind, "choices": _CHOICES[field.name]}
    else:
        settings |= {"type": _TYPES[kind], "metavar": _METAVARS[kind]}
    names = FLAGS.get(field.name, (field.name.replace("_", "-"),))
    group.add_argument(*(f"--{name}" for name in names), **settings)


def size(text: str) -> int:
    """Bytes: "4294967296", "4G", "4GiB"; units are powers of 1024."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:].isalpha() else ""
    value = float(number.removesuffix(unit)) * _UNITS[unit] if unit in _UNITS else math.nan
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (bytes, or a number with K, M, G or T)")
    return int(value)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"has to be 0 or more, got {value}")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"has to be 0 or more, got {text}")
    return value


_TYPES: Final[dict[Any, Callable[[str], Any]]] = {int: _count, float: _number, str: str}
_METAVARS: Final[dict[Any, str]] = {int: "N", float: "X", str: "TEXT"}


def _docstrings() -> dict[tuple[str, str], str]:
    """(struct, field) -> the string under the field."""
    found = {}
    for struct in ast.parse(inspect.getsource(config)).body:
        if not isinstance(struct, ast.ClassDef):
            continue
        for field, following in zip(struct.body, struct.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                value = following.value if isinstance(following, ast.Expr) else None
                if isinstance(value, ast.Constant):
                    found[struct.name, field.target.id] = " ".join(str(value.value).split())
    return found
