"""The options of `octavo bench` and what their values may be."""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

from octavo.cli_common import positive

_SLO: Final = ("ttft", "tpot", "e2el")


def add_options(parser: argparse.ArgumentParser) -> None:
    """All but those of the connection."""
    _add_load(parser.add_argument_group("load"))
    _add_requests(parser.add_argument_group("requests"))
    _add_client(parser.add_argument_group("client"))
    _add_report(parser.add_argument_group("report"))


def _add_load(group: Any) -> None:
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        *("--rate", "--rates"),
        dest="rates",
        type=_rates,
        metavar="R,...",
        help="open loop: requests per second, inf (the default) for all at once; several are measured in turn",
    )
    kind.add_argument("--concurrency", type=_counts, metavar="N,...", help="closed loop: requests in flight")
    kind.add_argument(
        "--sweep",
        action="store_true",
        help="open loop: all at once, then 10, 25, 50, 75, 90 and 110 %% of the throughput which that gave",
    )
    group.add_argument(
        "--burstiness",
        type=_rate,
        default=1.0,
        metavar="K",
        help="shape of the gamma distribution of the gaps: 1 (default) is Poisson, less has more bursts, inf has none",
    )
    group.add_argument(
        "--num-requests",
        type=_count,
        metavar="N",
        help="of each load; default 100 and at least 5 times the concurrency, unless --duration is given",
    )
    group.add_argument("--duration", type=positive, metavar="SECONDS", help="sending of each load ends after this")
    group.add_argument(
        "--warmup", type=_whole, metavar="N", help="requests before the first load; default: one per connection"
    )


def _add_requests(group: Any) -> None:
    group.add_argument(
        "--dataset",
        default="fixed",
        metavar="NAME|FILE",
        help="fixed: every request has --input-len and --output-len. sharegpt-like: log-normal lengths with these "
        "means, by default 161 and 338, cut to the context. FILE: a JSON object per line with prompt (a text) or "
        "input_len, and output_len; used in order, and again from the beginning",
    )
    group.add_argument("--input-len", type=_count, metavar="N", help="random tokens of a prompt; default 128")
    group.add_argument("--output-len", type=_count, metavar="N", help="tokens to generate; default 128")
    group.add_argument(
        "--length-sigmas",
        type=_sigmas,
        metavar="IN,OUT",
        help="of sharegpt-like: standard deviations of the lengths' logarithms; default 1.2,0.8",
    )
    group.add_argument(
        "--prefix-len",
        type=_whole,
        default=0,
        metavar="N",
        help="tokens that all prompts begin with, added to the input",
    )
    group.add_argument("--seed", type=_whole, default=0, metavar="N", help="of arrivals, lengths, prompts; default 0")
    group.add_argument(
        "--params",
        type=_params,
        default={},
        metavar="JSON",
        help='parameters of generate(), such as \'{"do_sample": true, "top_p": 0.9}\'; ignore_eos is on by default',
    )


def _add_client(group: Any) -> None:
    group.add_argument(
        "--transport",
        choices=("stream", "session", "unary"),
        default="stream",
        help="StreamGenerate (default), GenerateSession or Generate, which has no TTFT, TPOT and ITL",
    )
    group.add_argument(
        "--processes", type=_count, metavar="N", help="client processes; default a quarter of the cores, 4 at most"
    )
    group.add_argument(
        "--connections",
        type=_count,
        default=1,
        metavar="N",
        help="of each process; default 1. A session takes 512 requests at once, and a connection has one front-end",
    )


def _add_report(group: Any) -> None:
    group.add_argument(
        "--slo",
        type=_slo,
        default={},
        metavar="NAME:MS,...",
        help="limits of a good request, such as ttft:200,tpot:50,e2el:5000",
    )
    group.add_argument("--json", metavar="FILE", help="all numbers, with the field names of vLLM's benchmark")
    group.add_argument("--save-detailed", action="store_true", help="put every request's numbers into the JSON, too")
    group.add_argument("--html", metavar="FILE", help="a page with throughput-latency curves and distributions")


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"has to be positive, or inf, got {text}")
    return value


def _rates(text: str) -> list[float]:
    return [_rate(part) for part in text.split(",")]


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"has to be 0 or more, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"has to be 1 or more, got {text}")
    return value


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _sigmas(text: str) -> tuple[float, float]:
    values = [float(part) for part in text.split(",")]
    if len(values) != 2 or not all(0 <= value <= 5 for value in values):
        raise argparse.ArgumentTypeError(f"has to be two numbers from 0 to 5, such as 1.2,0.8, got {text}")
    return values[0], values[1]


def _slo(text: str) -> dict[str, float]:
    limits = {}
    for part in text.split(","):
        name, _, value = part.partition(":")
        if name not in _SLO:
            raise argparse.ArgumentTypeError(f"has to name {', '.join(_SLO)}, such as ttft:200, got {part!r}")
        limits[name] = positive(value)
    return limits


def _params(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"has to be a JSON object, got {text}")
    return value
