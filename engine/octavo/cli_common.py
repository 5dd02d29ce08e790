"""What the client commands share: where the server is, how errors are told, how messages are printed."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from octavo.client import Client

ADDRESS = "127.0.0.1:50051"


def run_directory(address: str) -> str:
    """The run directory of a server that listens on `address` and was given none; "" where the port does not tell."""
    _, separator, port = address.rpartition(":")
    if address.startswith("unix:") or not separator or not port.isdecimal() or int(port) == 0:
        return ""
    parent = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return str(Path(parent) / f"octavo-{port}")


def admin_address(address: str) -> str:
    """The admin socket of a server on this machine that listens on `address`. Raises ValueError where it is unknown, or
    the server may be on another machine: one here with the same port would be drained in its place."""
    from octavo.run_directory import is_loopback

    directory = run_directory(address)
    host = address.rpartition(":")[0].rpartition("/")[2]
    if not directory or not (host in ("0.0.0.0", "[::]") or (host and is_loopback(f"{host}:0"))):
        raise ValueError(f"--admin-address is needed: it does not follow from the address {address}")
    return f"unix:{directory}/admin.sock"


def add_connection(parser: argparse.ArgumentParser, *, admin: bool = False) -> None:
    """Options that say where the server is."""
    group = parser.add_argument_group("connection")
    group.add_argument("--address", action="append", metavar="HOST:PORT", help=f"server, or several; default {ADDRESS}")
    if admin:
        group.add_argument(
            "--admin-address",
            metavar="ADDRESS",
            help="unix:PATH or HOST:PORT of the server's admin port; default: its socket on this machine",
        )
    group.add_argument("--api-key-file", metavar="FILE", help="file that holds the API key")
    group.add_argument("--tls", action="store_true", help="use TLS, with the system's roots unless --tls-ca is given")
    group.add_argument("--tls-ca", default="", metavar="FILE", help="roots (PEM) for the server's certificate")
    group.add_argument("--tls-cert", default="", metavar="FILE", help="this client's certificate (PEM)")
    group.add_argument("--tls-key", default="", metavar="FILE", help="and its key")
    group.add_argument("--timeout", type=positive, metavar="SECONDS", help="of the call; default 300")


def connect(options: argparse.Namespace, *, admin: bool = False, retry: bool = True) -> Client:
    """A client for the options. Raises ValueError or OSError for files and addresses that do not work."""
    from octavo.client import TLS, Client

    addresses = options.address or [ADDRESS]
    if admin:
        addresses = [options.admin_address or admin_address(addresses[0])]
    tls = TLS(options.tls_ca, options.tls_cert, options.tls_key) if options.tls or options.tls_ca else False
    return Client(*addresses, tls=tls, api_key=read_api_key(options), retry=retry)


def read_api_key(options: argparse.Namespace) -> str | None:
    """The key in --api-key-file. Raises OSError."""
    return Path(options.api_key_file).read_text().strip() if options.api_key_file else None


def guarded(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """`command` with its errors as one line on stderr: exit status 1 for a failed call, 2 for wrong usage."""

    def run(options: argparse.Namespace) -> int:
        from octavo.client import OctavoError

        try:
            return command(options)
        except OctavoError as error:
            complain(str(error))
            return 1
        except BrokenPipeError:
            raise
        except (ValueError, TypeError, OSError) as error:
            complain(str(error))
            return 2

    return run


def complain(text: str) -> None:
    """One line on stderr."""
    print(f"octavo: {' '.join(text.split())}", file=sys.stderr, flush=True)


def show(message: Message, *, as_json: bool) -> None:
    """A message on stdout: `name: value` lines, or one line of JSON."""
    fields = as_dict(message)
    if as_json:
        print_json(fields)
    else:
        width = max(len(name) for name in fields) if fields else 0
        for name, value in fields.items():
            print(f"{name + ':':{width + 2}}{value}")


def as_dict(message: Message) -> dict[str, Any]:
    """A message as JSON has it, with the names of the .proto and fields that are zero."""
    from google.protobuf.json_format import MessageToDict

    fields: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {name: fields[name] for name in message.DESCRIPTOR.fields_by_name if name in fields}


def print_json(value: Any) -> None:
    """One line of JSON, at once."""
    import json

    print(json.dumps(value, ensure_ascii=False), flush=True)


def positive(text: str) -> float:
    """A number of seconds, as an argparse type."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def proto_files() -> list[tuple[str, str]]:
    """(path for -I, text) of the .proto files of this version."""
    folder = resources.files("octavo_proto") / "v1"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".proto"))
    return [(f"octavo_proto/v1/{name}", (folder / name).read_text()) for name in names]


def proto_comments() -> dict[str, str]:
    """Comment of each field of types.proto and generation.proto, by the field's name, for `--help`."""
    comments: dict[str, str] = {}
    for _, text in proto_files():
        block: list[str] = []
        for line in text.splitlines():
            stripped = line.strip()
            field = re.match(r"(?:optional |repeated )?[\w.<>, ]+ (\w+) = \d+;", stripped)
            if stripped.startswith("//"):
                block.append(stripped.removeprefix("//").strip())
                continue
            if field and block:
                comments.setdefault(field[1], " ".join(block))
            block = []
    return comments
