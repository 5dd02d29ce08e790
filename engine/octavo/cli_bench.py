"""`octavo bench`: from options to a load test, and from its results to table, JSON and page."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo import __version__
from octavo.cli_bench_options import add_options
from octavo.cli_common import ADDRESS, add_connection, complain, connect, guarded, read_api_key

if TYPE_CHECKING:
    from octavo_proto.v1 import control_pb2, model_pb2

    from octavo.loadtest.fleet import Fleet
    from octavo.loadtest.job import Job
    from octavo.loadtest.report import Row
    from octavo.loadtest.run import Load
    from octavo.loadtest.schedule import Point
    from octavo.loadtest.workload import Entry, Workload

_NUM_REQUESTS = 100
_LENGTH = 128
_NOT_PARAMS = {"max_new_tokens": "--output-len", "response_length": "--output-len", "timeout": "--timeout"}
_SERVER_FACTS = (
    *("version", "instance_id", "model", "device", "attention_backend", "cpu_cores", "kv_cache_dtype", "block_size"),
    *("total_kv_blocks", "max_num_requests", "max_num_batched_tokens", "max_inflight_requests", "frontend_processes"),
)
_MODEL_FACTS = ("dtype", "num_parameters", "vocab_size", "n_positions", "weights_sha256", "batch_invariant")
_TICK = 0.25
"""Seconds between two updates of the progress line."""


def add_bench(parser: argparse.ArgumentParser, *, with_help: bool) -> None:
    """Fills the parser."""
    parser.usage = "octavo bench [--rate R,... | --concurrency N,... | --sweep] [options]"
    add_options(parser)
    add_connection(parser)
    parser.set_defaults(run=guarded(_bench))


def _bench(options: argparse.Namespace) -> int:
    from octavo.client import OctavoError
    from octavo.loadtest import report
    from octavo.loadtest.fleet import LoadTestError
    from octavo.loadtest.run import run

    _check(options)
    try:
        info, model = _facts(options)
    except OctavoError as error:
        complain(f"no octavo server answers at {', '.join(options.address or [ADDRESS])}: {error}")
        return 1
    load = _load(options)
    job = _job(options, _workload(options, model))
    try:
        results = asyncio.run(run(job, load, _watch))
    except LoadTestError as error:
        complain(str(error))
        return 1
    rows = report.rows(results, options.slo, streamed=options.transport != "unary")
    _write(options, rows, _header(options, info, model, job))
    if not results or any(result.cut_short for result in results):
        return 130
    return 1 if any(row.summary.failed for row in rows) else 0


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for options that contradict each other, TypeError for unknown parameters."""
    from octavo.client.params import build

    for name in sorted(set(options.params) & set(_NOT_PARAMS)):
        raise ValueError(f"--params: {name} is set by {_NOT_PARAMS[name]}")
    build([0], options.params)
    if options.params.get("return_token_ids") is False:
        raise ValueError("--params: return_token_ids has to stay on, tokens are counted by it")
    missing = sorted({"ttft", "tpot"} & set(options.slo))
    if options.transport == "unary" and missing:
        raise ValueError(f"--slo: {missing[0]} does not exist with --transport unary, which has one message")
    if options.duration and not options.num_requests and not options.sweep and math.inf in _rates(options):
        raise ValueError("--duration: says nothing about requests that are all sent at once; give --num-requests")
    for path in (options.json, options.html):
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no such directory")


def _rates(options: argparse.Namespace) -> list[float]:
    """Of the open loops; empty for a closed loop."""
    return [] if options.concurrency else options.rates or [math.inf]


def _facts(options: argparse.Namespace) -> tuple[control_pb2.GetServerInfoResponse, model_pb2.GetModelResponse]:
    with connect(options, retry=False) as client:
        return client.info(timeout=options.timeout), client.model(timeout=options.timeout)


def _load(options: argparse.Namespace) -> Load:
    from octavo.loadtest.run import Load
    from octavo.loadtest.schedule import Point

    count = options.num_requests or (None if options.duration and not options.sweep else _NUM_REQUESTS)
    points = [Point(number, rate, options.burstiness, None, count, options.duration)
              for number, rate in enumerate(_rates(options), 1)]  # fmt: skip
    for number, concurrency in enumerate(options.concurrency or [], 1):
        enough = count if options.num_requests or count is None else max(count, 5 * concurrency)
        points.append(Point(number, None, 1.0, concurrency, enough, options.duration))
    warmup = _processes(options) * options.connections if options.warmup is None else options.warmup
    return Load(tuple(points), warmup, options.sweep)


def _processes(options: argparse.Namespace) -> int:
    """A quarter of the cores, 4 at most, unless told; a closed loop has no more than requests in flight."""
    wanted: int = options.processes or max(1, min(4, (os.cpu_count() or 1) // 4))
    fewest: list[int] = options.concurrency or []
    return min([wanted, *fewest])


def _workload(options: argparse.Namespace, model: model_pb2.GetModelResponse) -> Workload:
    from octavo.loadtest.workload import FIXED, SHAREGPT_LIKE, SHAREGPT_MEANS, SIGMAS, Workload, read_entries

    name: str = options.dataset
    entries: tuple[Entry, ...] = ()
    if name not in (FIXED, SHAREGPT_LIKE):
        with Path(name).open(encoding="utf-8") as lines:
            entries = read_entries(lines, name)
    if options.length_sigmas and name != SHAREGPT_LIKE:
        raise ValueError(f"--length-sigmas: goes with --dataset {SHAREGPT_LIKE} only")
    means = SHAREGPT_MEANS if name == SHAREGPT_LIKE else (_LENGTH, _LENGTH)
    workload = Workload(
        dataset=name if name in (FIXED, SHAREGPT_LIKE) else Path(name).name,
        input_len=options.input_len or means[0],
        output_len=options.output_len or means[1],
        context=model.n_positions,
        vocab_size=model.vocab_size,
        seed=options.seed,
        prefix_len=options.prefix_len,
        sigmas=options.length_sigmas or SIGMAS,
        entries=entries,
    )
    workload.check()
    return workload


def _job(options: argparse.Namespace, workload: Workload) -> Job:
    from octavo.client import TLS
    from octavo.loadtest.job import Connection, Job

    tls = TLS(options.tls_ca, options.tls_cert, options.tls_key) if options.tls or options.tls_ca else None
    return Job(
        connection=Connection(tuple(options.address or [ADDRESS]), tls, read_api_key(options)),
        workload=workload,
        params={"ignore_eos": True, **options.params},
        transport=options.transport,
        connections=options.connections,
        processes=_processes(options),
        timeout=options.timeout,
    )


@contextlib.contextmanager
def _watch(fleet: Fleet, point: Point) -> Iterator[None]:
    """A progress line on standard error, where that is a terminal."""
    from tqdm import tqdm

    from octavo.loadtest.run import label

    async def update() -> None:
        while True:
            counts = fleet.progress()
            bar.set_postfix(counts, refresh=False)
            bar.update(counts["over"] - bar.n)
            await asyncio.sleep(_TICK)

    with tqdm(desc=label(point), total=point.count(), unit="req", disable=None, file=sys.stderr) as bar:
        task = asyncio.get_running_loop().create_task(update())
        try:
            yield
        finally:
            task.cancel()


def _header(
    options: argparse.Namespace,
    info: control_pb2.GetServerInfoResponse,
    model: model_pb2.GetModelResponse,
    job: Job,
) -> dict[str, dict[str, Any]]:
    """What the numbers depend on: the server, the load and this machine, which is not named."""
    import grpc

    workload = job.workload
    return {
        "server": {name: getattr(info, name) for name in _SERVER_FACTS}
        | {name: getattr(model, name) for name in _MODEL_FACTS},
        "load": {
            "dataset": workload.dataset,
            "input_len": workload.input_len,
            "output_len": workload.output_len,
            "length_sigmas": list(workload.sigmas) if options.dataset == "sharegpt-like" else None,
            "prefix_len": workload.prefix_len,
            "seed": workload.seed,
            "params": job.params,
            "transport": job.transport,
            "processes": job.processes,
            "connections": job.connections,
            "warmup": _load(options).warmup,
            "slo_ms": options.slo,
        },
        "client": {
            "version": __version__,
            "python": platform.python_version(),
            "grpcio": grpc.__version__,
            "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cores": os.cpu_count(),
        },
    }


def _write(options: argparse.Namespace, rows: list[Row], header: dict[str, dict[str, Any]]) -> None:
    """The table on standard output, and the files that were asked for."""
    from octavo.loadtest import html_report, report

    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    notes = report.notes(rows)
    print(f"{_headline(header)}\n\n{report.table(rows)}")
    print("".join(f"\n{note}" for note in ["milliseconds; percentiles of completed requests", *notes]))
    if options.json:
        points = [report.to_json(row, detailed=options.save_detailed) for row in rows]
        document = {
            "date": date,
            "backend": "octavo",
            "model_id": header["server"]["model"],
            "cut_short": any(row.result.cut_short for row in rows),
            "environment": header,
            "notes": notes,
            "points": points,
        }
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    if options.html:
        page = html_report.page(rows, {**header, "run": {"date": date}}, notes)
        Path(options.html).write_text(page, encoding="utf-8")


def _headline(header: dict[str, dict[str, Any]]) -> str:
    server, load = header["server"], header["load"]
    drawn = "mean " if load["length_sigmas"] else ""
    prefix = f"{load['prefix_len']} + " if load["prefix_len"] else ""
    lengths = f"{prefix}{drawn}{load['input_len']} in, {drawn}{load['output_len']} out"
    return (
        f"octavo {server['version']}: {server['model']}, {server['dtype']}, {server['device']}\n"
        f"{load['dataset']}: {lengths}; {load['transport']}, processes {load['processes']}, seed {load['seed']}"
    )
