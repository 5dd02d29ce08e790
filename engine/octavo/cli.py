"""The command line: `octavo COMMAND ...`. Only the module of the command in question is imported.

Each command lives in a `cli_*.py` with a function that fills its parser and sets `run`, which returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

from octavo import __version__

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "serve": ("octavo.cli_serve", "start a server"),
    "generate": ("octavo.cli_generate", "complete texts"),
    "bench": ("octavo.cli_bench", "load a server and measure it"),
    "health": ("octavo.cli_control", "ask whether a server is serving"),
    "info": ("octavo.cli_control", "show a server's version, device and capacity"),
    "load": ("octavo.cli_control", "show what a server is doing"),
    "drain": ("octavo.cli_control", "let a server finish what it has (admin)"),
    "abort": ("octavo.cli_control", "end requests by id, or all (admin)"),
    "proto": ("octavo.cli_proto", "write the .proto files of this version"),
}
"""Name -> module with a function `add_NAME(parser, *, with_help)`, what the command does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status. A usage error exits with status 2, as argparse does."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        return _overview(arguments)
    name, *rest = arguments
    module_name, summary = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"octavo {name}", description=summary, allow_abbrev=False)
    with_help = "-h" in rest or "--help" in rest
    getattr(importlib.import_module(module_name), f"add_{name}")(parser, with_help=with_help)
    options = parser.parse_args(rest)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return 141


def _overview(arguments: list[str]) -> int:
    lines = [f"  {name:10}{summary}" for name, (_, summary) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="octavo",
        description="A batched serving engine for GPT-2 over gRPC.",
        epilog="commands:\n" + "\n".join(lines) + "\n\n`octavo COMMAND --help` shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="what to do")
    parser.parse_args(arguments[:1])
    return 2


if __name__ == "__main__":
    sys.exit(main())
