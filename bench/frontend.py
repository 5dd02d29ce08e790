"""The front-end process under load, beside a grpc.aio server that only writes: tokens, messages, CPU time, latency.

    python bench/frontend.py                        # all scenarios; about 5 minutes
    python bench/frontend.py --only session/256 --rounds 5
    python bench/frontend.py --smoke --out ""       # a few tokens of each kind, no numbers worth keeping

The engine core is the real process with a runner that computes nothing and ends a step at each tick of a clock
(frontend_parts/mock_core.py). Its requests are all there before the first tick; measured is the middle 80 % of the
tokens. `bare` is the ceiling: grpc.aio, the same ticks, messages of the same sizes, and nothing else
(frontend_parts/bare_server.py); it and octavo take turns. CPU time is that of whole processes, latency the time from a
token's tick to the client's read. Results also go to the end of bench/results/frontend.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import environment

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench" / "frontend_parts"))

from rig import Scenario, measure  # noqa: E402

SCENARIOS = {
    "session/64": Scenario("session", 64, rate=64_000, tokens=1000),
    "session/256": Scenario("session", 256, rate=80_000, tokens=1000),
    "session/1024": Scenario("session", 1024, rate=80_000, tokens=300),
    "stream/64": Scenario("stream", 64, rate=16_000, tokens=800),
    "stream/256": Scenario("stream", 256, rate=16_000, tokens=200),
    "session/256 x2": Scenario("session", 256, rate=80_000, tokens=1000, frontends=2),
    "stream/256 x2": Scenario("stream", 256, rate=20_000, tokens=250, frontends=2),
}
SMOKE = ("session/256 x2", "stream/64")
COLUMNS = (
    ("tok/s", "tokens_per_second", "9,.0f"),
    ("msg/s", "messages_per_second", "8,.0f"),
    ("tok/event", "tokens_per_event", "10.2f"),
    ("server µs/tok", "server_us_per_token", "14.2f"),
    ("µs/msg", "server_us_per_message", "9.1f"),
    ("cores", "server_cores", "6.2f"),
    ("core µs/tok", "core_us_per_token", "12.2f"),
    ("client µs/msg", "client_us_per_message", "14.1f"),
    ("p50 ms", "latency_p50_ms", "8.2f"),
    ("p99 ms", "latency_p99_ms", "8.2f"),
)


def main() -> int:
    options = parse()
    print(f"{'':22}" + "".join(f"{title:>{_width(form)}}" for title, _, form in COLUMNS), flush=True)
    cells = []
    for name in options.only or (SMOKE if options.smoke else SCENARIOS):
        scenario = SCENARIOS[name]
        if options.smoke:
            scenario = replace(scenario, requests=8, rate=2000.0, tokens=40)
        cells += take_turns(name, scenario, 1 if options.smoke else options.rounds)
    if options.out:
        record(options, cells)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, help="these scenarios")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "frontend.jsonl"), help='"" to write nothing')
    return parser.parse_args()


def take_turns(name: str, scenario: Scenario, rounds: int) -> list[dict[str, Any]]:
    """A cell for each side: the medians of its runs, and the runs."""
    sides = ["octavo"] if scenario.frontends > 1 else ["bare", "octavo"]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            runs[side].append(asyncio.run(measure(scenario, bare=side == "bare")))
    cells = []
    for side, found in runs.items():
        median = {key: statistics.median(run[key] for run in found) for key in found[0]}
        cells.append({"scenario": name, "side": side, **asdict(scenario), "median": median, "runs": found})
        texts = [f"{median[key]:{form}}" if key in median else " " * _width(form) for _, key, form in COLUMNS]
        print(f"{name:16}{side:6}" + "".join(texts), flush=True)
    return cells


def _width(form: str) -> int:
    return int(form.split(".")[0].rstrip(","))


def record(options: argparse.Namespace, cells: list[dict[str, Any]]) -> None:
    header = environment.describe()
    versions = {package: version(package) for package in ("grpcio", "protobuf", "uvloop", "pyzmq")}
    with open(options.out, "a") as file:
        run = {"record": "run", "run": header["time"], **header, "versions": versions, "rounds": options.rounds}
        for line in [run, *({"record": "cell", "run": header["time"], **cell} for cell in cells)]:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
