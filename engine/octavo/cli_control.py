"""`octavo health | info | load | drain | abort`: what a server is doing, and how to steer it."""

from __future__ import annotations

import argparse

from octavo_proto.v1 import control_pb2

from octavo.cli_common import add_connection, complain, connect, guarded, positive, show
from octavo.client import DeadlineExceeded, Unavailable
from octavo.client.channel import GENERATION_SERVICE

UNREACHABLE = 2
"""Exit status of `octavo health` when there is no answer."""
_DAY = 86_400.0
_HEALTH_TIMEOUT = 5.0


def add_health(parser: argparse.ArgumentParser, *, with_help: bool) -> None:
    parser.description = "Exit status 0: serving, 1: not serving, 2: unreachable."
    parser.add_argument("--watch", action="store_true", help="print every change, until interrupted")
    parser.add_argument(
        "--service",
        default=GENERATION_SERVICE,
        help=f"name of a service: would it take requests? Empty: does the process live? Default {GENERATION_SERVICE}",
    )
    add_connection(parser)
    parser.set_defaults(run=guarded(_health))


def _health(options: argparse.Namespace) -> int:
    status = ""
    with connect(options, retry=False) as client:
        try:
            if options.watch:
                for status in client.watch_health(options.service, timeout=options.timeout or _DAY):
                    print(status, flush=True)
            else:
                status = client.health(options.service, timeout=options.timeout or _HEALTH_TIMEOUT)
                print(status)
        except KeyboardInterrupt:
            pass
        except (Unavailable, DeadlineExceeded) as error:
            complain(str(error))
            return UNREACHABLE
    return 0 if status == "SERVING" else 1


def add_info(parser: argparse.ArgumentParser, *, with_help: bool) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--model", action="store_true", help="show the model, its defaults and limits instead")
    add_connection(parser)
    parser.set_defaults(run=guarded(_info))


def _info(options: argparse.Namespace) -> int:
    with connect(options) as client:
        answer = client.model(timeout=options.timeout) if options.model else client.info(timeout=options.timeout)
        show(answer, as_json=options.json)
    return 0


def add_load(parser: argparse.ArgumentParser, *, with_help: bool) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--watch", action="store_true", help="print a line at an interval, until interrupted")
    parser.add_argument("--interval", type=positive, default=1.0, metavar="SECONDS", help="of --watch; default 1")
    add_connection(parser)
    parser.set_defaults(run=guarded(_load))


def _load(options: argparse.Namespace) -> int:
    with connect(options) as client:
        if not options.watch:
            show(client.load(timeout=options.timeout), as_json=options.json)
            return 0
        try:
            for load in client.watch_load(options.interval, timeout=options.timeout or _DAY):
                show(load, as_json=True) if options.json else print(_load_line(load), flush=True)
        except KeyboardInterrupt:
            pass
    return 0


def _load_line(load: control_pb2.Load) -> str:
    state = control_pb2.ServerState.Name(load.state).removeprefix("SERVER_STATE_").lower()
    used = load.used_kv_blocks / load.total_kv_blocks if load.total_kv_blocks else 0.0
    return (
        f"{state:10} {load.running_requests} running, {load.waiting_requests} waiting, KV {used:.0%}, "
        f"{load.generation_tokens_per_second:.0f} tok/s generated, {load.prompt_tokens_per_second:.0f} tok/s prompt, "
        f"{load.prefix_cache_hit_rate:.0%} prefix hits, {load.preemptions} preemptions"
    )


def add_drain(parser: argparse.ArgumentParser, *, with_help: bool) -> None:
    parser.description = "The server takes no new requests and finishes the running ones."
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--shutdown", action="store_true", help="stop the server afterwards")
    parser.add_argument("--undo", action="store_true", help="serve again instead")
    add_connection(parser, admin=True)
    parser.set_defaults(run=guarded(_drain))


def _drain(options: argparse.Namespace) -> int:
    with connect(options, admin=True) as client:
        answer = client.drain(options.timeout, shutdown=options.shutdown, undo=options.undo)
        if options.json:
            show(answer, as_json=True)
        elif not options.undo:
            print(f"{answer.finished_requests} finished, {answer.aborted_requests} aborted")
    return 0


def add_abort(parser: argparse.ArgumentParser, *, with_help: bool) -> None:
    parser.add_argument("request_ids", nargs="*", metavar="ID", help="ids of the requests to end")
    parser.add_argument("--all", action="store_true", help="end all requests instead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_connection(parser, admin=True)
    parser.set_defaults(run=guarded(_abort))


def _abort(options: argparse.Namespace) -> int:
    with connect(options, admin=True) as client:
        answer = client.abort(*options.request_ids, all_requests=options.all, timeout=options.timeout)
    if options.json:
        show(answer, as_json=True)
    else:
        print(f"{answer.aborted_requests} aborted")
        for request_id in answer.not_found_request_ids:
            complain(f"{request_id}: not found")
    return 1 if answer.not_found_request_ids else 0
