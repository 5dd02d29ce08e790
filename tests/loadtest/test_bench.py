"""`octavo bench` as a whole, with client processes, against a server without an engine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from client.fake_server import FakeServer, Refusal, reason, running
from octavo import cli


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running() as fake:
        yield fake


def bench(server: FakeServer, *arguments: str) -> int:
    lengths = ("--input-len", "6", "--output-len", "4")
    return cli.main(["bench", *lengths, *arguments, "--address", server.address])


def points(path: Path) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads(path.read_text())["points"]
    return loaded


def test_open_loop_from_two_processes(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html"), "--save-detailed")
    params = ("--params", '{"do_sample": true, "top_p": 0.9}', "--slo", "ttft:5000,e2el:60000")
    load = ("--rate", "60", "--num-requests", "30", "--processes", "2")
    assert bench(server, *load, *files, *params) == 0
    out = capsys.readouterr()
    assert "60 req/s" in out.out and "TTFT from schedule" in out.out
    assert out.err == ""  # no progress line where there is no terminal
    (point,) = points(tmp_path / "a.json")
    assert (point["completed"], point["failed"], point["request_rate"]) == (30, 0, 60)
    assert point["total_output_tokens"] == 30 * 4
    assert point["request_goodput"] == pytest.approx(point["request_throughput"])
    assert point["scheduled_times"][-1] == pytest.approx(0.5)
    assert len(point["clients"]) == 2
    assert all(sent >= due for sent, due in zip(point["start_times"], point["scheduled_times"], strict=True))
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["environment"]["server"]["device"] == "cpu"
    assert document["environment"]["load"]["params"] == {"ignore_eos": True, "do_sample": True, "top_p": 0.9}
    assert (tmp_path / "a.html").read_text().count("<svg") == 3
    assert len(server.requests) == 30 + 2  # and the warm-up, one per connection
    assert all(request.params.ignore_eos and request.params.top_p == 0.9 for request in server.requests)


def test_the_requests_do_not_depend_on_the_number_of_processes(server: FakeServer) -> None:
    seen = []
    for processes in ("1", "2"):
        server.requests.clear()
        load = ("--rate", "inf", "--num-requests", "12", "--warmup", "0", "--dataset", "sharegpt-like")
        assert bench(server, *load, "--processes", processes) == 0
        seen.append(sorted((list(r.prompts[0].token_ids.ids), r.params.max_new_tokens) for r in server.requests))
    assert len(seen[0]) == 12
    assert seen[0] == seen[1]


def test_closed_loop_keeps_to_its_concurrency(server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    load = ("--concurrency", "1,3", "--num-requests", "20", "--transport", "unary", "--processes", "2")
    assert bench(server, *load, "--json", str(path)) == 0
    one, three = points(path)
    assert (one["max_concurrent_requests"], three["max_concurrent_requests"]) == (1, 3)
    assert (one["completed"], three["completed"], three["request_rate"]) == (20, 20, None)
    assert three["mean_ttft_ms"] is None and three["mean_e2el_ms"] > 0


def test_a_duration_ends_the_sending(server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert bench(server, "--concurrency", "2", "--duration", "0.3", "--json", str(path)) == 0
    (point,) = points(path)
    assert point["completed"] > 2
    assert 0.3 <= point["duration"] < 3


def test_sweep_over_sessions_from_a_file(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = tmp_path / "a.json", tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "one two three"}\n{"prompt": "four five", "output_len": 1}\n')
    load = ("--sweep", "--num-requests", "10", "--transport", "session", "--connections", "2")
    assert bench(server, *load, "--dataset", str(data), "--json", str(path)) == 0
    found = points(path)
    rates = [point["request_rate"] for point in found]
    assert rates[0] == "inf" and len(rates) == 7
    top = found[0]["request_throughput"]
    assert rates[1:] == pytest.approx([part * top for part in (0.1, 0.25, 0.5, 0.75, 0.9, 1.1)], rel=0.01)
    assert [point["total_output_tokens"] for point in found] == [5 * 3 + 5 * 1] * 7
    assert server.sessions == 2
    assert sum(line.rstrip()[:1].isdigit() for line in capsys.readouterr().out.splitlines()) >= 6


def test_failures_are_counted_by_code_and_not_tried_again(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", reason("QUEUE_FULL"))
    down = Refusal(grpc.StatusCode.UNAVAILABLE, "starting")
    server.refusals = [full, down, full]
    path = tmp_path / "a.json"
    load = ("--rate", "inf", "--num-requests", "10", "--warmup", "0")
    assert bench(server, *load, "--json", str(path)) == 1
    (point,) = points(path)
    assert (point["completed"], point["failed"], point["rejected"]) == (7, 3, 2)
    assert point["failures"] == {"RESOURCE_EXHAUSTED/QUEUE_FULL": 2, "UNAVAILABLE": 1}
    assert "3 requests failed: 2 RESOURCE_EXHAUSTED/QUEUE_FULL, 1 UNAVAILABLE" in capsys.readouterr().out
    assert len(server.requests) == 10


def test_a_warm_up_that_fails_ends_the_run(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.refusals = [Refusal(grpc.StatusCode.INVALID_ARGUMENT, "no such thing")]
    assert bench(server, "--rate", "inf") == 1
    assert "all 1 requests of the warm-up failed; the first: INVALID_ARGUMENT: no such thing" in capsys.readouterr().err


def test_no_server_is_said_clearly(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--address", "127.0.0.1:1"]) == 1
    assert "octavo: no octavo server answers at 127.0.0.1:1: UNAVAILABLE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--params", '{"max_new_tokens": 3}'], "max_new_tokens is set by --output-len"),
        (["--params", '{"top_q": 3}'], "unknown keyword top_q"),
        (["--params", '{"return_token_ids": false}'], "return_token_ids has to stay on"),
        (["--transport", "unary", "--slo", "ttft:5"], "ttft does not exist with --transport unary"),
        (["--duration", "5"], "--num-requests"),
        (["--json", "/nowhere/at/all.json"], "no such directory"),
        (["--dataset", "no-such-file"], "no-such-file"),
        (["--input-len", "5000"], "do not fit into the context of 1024"),
        (["--length-sigmas", "1,1"], "sharegpt-like"),
    ],
)
def test_wrong_usage_is_status_2(
    server: FakeServer, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(server, *arguments) == 2
    assert message in capsys.readouterr().err
    assert server.requests == []


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--rate", "0"], ["--rate", "1", "--concurrency", "2"], ["--sweep", "--rates", "1"], ["--slo", "itl:5"]),
        *(["--params", "[]"], ["--concurrency", "0"], ["--burstiness", "-1"], ["--length-sigmas", "1"]),
    ],
)
def test_values_that_no_option_has_are_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *arguments])
    assert stopped.value.code == 2


def test_ctrl_c_prints_what_was_measured(server: FakeServer, tmp_path: Path) -> None:
    path, data = tmp_path / "a.json", tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "one two"}\n{"prompt": "forever"}\n')
    load = ("--rate", "inf", "--num-requests", "6", "--warmup", "0", "--processes", "2")
    command = [sys.executable, "-m", "octavo.cli", "bench", "--address", server.address, "--json", str(path), *load]
    process = subprocess.Popen([*command, "--dataset", str(data)], stdout=subprocess.PIPE, text=True)
    with process:
        deadline = time.monotonic() + 30
        while len(server.requests) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "all at once: cut short; 3 requests were running" in out
    (point,) = points(path)
    assert (point["completed"], point["failed"], point["unfinished"], point["cut_short"]) == (3, 0, 3, True)
    assert server.cancelled.wait(5)
