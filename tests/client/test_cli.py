"""The client commands, run in this process against a fake server, and the flags of `octavo serve`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from client.fake_server import FakeServer, Refusal, reason, running
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.json_format import MessageToDict
from octavo import cli, cli_common, cli_serve
from octavo.client.params import GROUPS
from octavo.config import CacheConfig, EngineConfig, Limits, ModelConfig, SchedulerConfig, ServerConfig


def octavo(server: FakeServer, command: str, *arguments: str) -> int:
    return cli.main([command, *arguments, "--address", server.address])


def test_generate_prints_text(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo(server, "generate", "one two") == 0
    assert capsys.readouterr().out == " two one\n"
    assert octavo(server, "generate", "a", "b", "--n", "2", "--do-sample") == 0
    assert capsys.readouterr().out == "[0.0]  a\n[0.1]  a\n[1.0]  b\n[1.1]  b\n"


def test_generate_streams(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo(server, "generate", "--stream", "one two") == 0
    assert capsys.readouterr().out == " two one\n"
    assert octavo(server, "generate", "--stream", "a", "b") == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["[0.0]  a", "[1.0]  b"]


def test_generate_prints_json(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo(server, "generate", "--json", "one two", "--request-id", "mine") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["request_id"] == "mine"
    assert answer["outputs"][0][0]["text"] == " two one"
    assert answer["outputs"][0][0]["finish_reason"] == "stop_string"
    assert octavo(server, "generate", "--json", "--stream", "one two") == 0
    deltas = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [delta["text"] for delta in deltas] == [" two", " one"]


def test_generate_reads_standard_input(
    server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("one two")
    with (tmp_path / "prompt").open() as prompt:
        monkeypatch.setattr(sys, "stdin", prompt)
        assert octavo(server, "generate") == 0
    assert capsys.readouterr().out == " two one\n"


FLAGS: list[tuple[list[str], dict[str, Any]]] = [
    (["--top-p", "0.5", "--do-sample", "--seed", "-1"], {"top_p": 0.5, "do_sample": True, "seed": str(2**64 - 1)}),
    (["--response-length", "5"], {"max_new_tokens": 5}),
    (["--no-do-sample"], {"do_sample": False}),
    (["--stop", "a", "--stop-strings", "b"], {"stop_strings": ["a", "b"]}),
    (["--eos-token-id", "1,2", "--stop-token-ids", "3"], {"eos_token_id": {"ids": [1, 2]}, "stop_token_ids": [3]}),
    (["--suppress-tokens", ""], {"suppress_tokens": {}}),
    (["--early-stopping", "never"], {"early_stopping": "EARLY_STOPPING_NEVER"}),
    (["--stop-string-output", "exclude"], {"stop_string_output": "STOP_STRING_OUTPUT_EXCLUDE"}),
    (["--logit-bias", '{"5": -1}'], {"logit_bias": {"5": -1.0}}),
    (["--bad-words-ids", "[[1, 2]]"], {"bad_words_ids": [{"ids": [1, 2]}]}),
    (
        ["--exponential-decay-length-penalty", "5,1.5"],
        {"exponential_decay_length_penalty": {"start_index": 5, "factor": 1.5}},
    ),
    (["--negative-prompt", "no"], {"negative_prompt": {"text": "no"}}),
    (["--structured-output", '{"regex": "a"}'], {"structured_output": {"regex": "a"}}),
]


@pytest.mark.parametrize(("flags", "expected"), FLAGS, ids=[row[0][0] for row in FLAGS])
def test_flag_of_generate_reaches_the_wire(server: FakeServer, flags: list[str], expected: dict[str, Any]) -> None:
    assert octavo(server, "generate", "text", *flags) == 0
    assert MessageToDict(server.requests[0].params, preserving_proto_field_name=True) == expected


def test_every_request_field_is_a_flag_with_its_comment_as_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    text = capsys.readouterr().out
    for descriptor in GROUPS.values():
        for name in descriptor.fields_by_name:
            assert "--" + name.replace("_", "-") in text
    assert "Keep the smallest set of tokens whose mass reaches top_p" in " ".join(text.split())
    assert "the opposite of" in text


def test_failed_call_is_one_line_with_code_and_reason_and_status_1(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refusals.append(Refusal(grpc.StatusCode.INVALID_ARGUMENT, "bad", reason("INVALID_FIELD")))
    assert octavo(server, "generate", "a", "--request-id", "r") == 1
    assert capsys.readouterr().err == "octavo: INVALID_ARGUMENT/INVALID_FIELD: bad [request r]\n"


@pytest.mark.parametrize("arguments", ["--early-stopping soon", "--top-p much", "--nonsense", "--top 1"])
def test_wrong_flag_is_usage_error(server: FakeServer, arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        octavo(server, "generate", "a", *arguments.split())
    assert caught.value.code == 2


def test_value_that_the_wire_cannot_carry_is_usage_error(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert octavo(server, "generate", "a", "--max-new-tokens", "-1") == 2
    assert "max_new_tokens" in capsys.readouterr().err
    assert server.requests == []


def test_health_tells_by_exit_status(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo(server, "health") == 0
    server.set_serving(False)
    assert octavo(server, "health") == 1
    assert octavo(server, "health", "--service", "") == 0
    assert capsys.readouterr().out == "SERVING\nNOT_SERVING\nSERVING\n"
    assert cli.main(["health", "--address", "127.0.0.1:1"]) == 2
    assert octavo(server, "health", "--watch", "--timeout", "0.3") == 2


def test_info_and_load(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo(server, "info") == 0
    assert "total_kv_blocks:" in capsys.readouterr().out
    assert octavo(server, "info", "--model", "--json") == 0
    assert json.loads(capsys.readouterr().out)["n_positions"] == 1024
    assert octavo(server, "load", "--json") == 0
    assert json.loads(capsys.readouterr().out)["running_requests"] == 3
    assert octavo(server, "load", "--watch", "--interval", "0.1") == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["0", "1"]


def test_admin_commands_find_the_socket_of_the_address(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert cli_common.admin_address("127.0.0.1:4711") == f"unix:{tmp_path}/octavo-4711/admin.sock"
    (tmp_path / "octavo-4711").mkdir()
    with running(cli_common.admin_address("127.0.0.1:4711")) as server:
        address = ["--address", "127.0.0.1:4711"]
        assert cli.main(["drain", "--timeout", "5", "--shutdown", *address]) == 0
        assert server.requests[-1].shutdown is True
        assert cli.main(["drain", "--undo", *address]) == 0
        assert cli.main(["abort", "a", *address]) == 0
        assert cli.main(["abort", "a", "b", *address]) == 1
        assert cli.main(["abort", "--all", *address]) == 0
        assert server.requests[-1].all is True
        assert cli.main(["abort", *address]) == 2
    output = capsys.readouterr()
    assert "5 finished, 0 aborted\n" in output.out
    assert "octavo: b: not found\n" in output.err


@pytest.mark.parametrize(
    "address", ["unix:/nowhere", "prod-7:50051", "192.0.2.1:50051", "dns:///octavo:50051", ":50051"]
)
def test_admin_socket_that_cannot_be_found_is_usage_error(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["drain", "--address", address]) == 2
    assert "--admin-address" in capsys.readouterr().err


def test_api_key_comes_from_a_file(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("secret\n")
    assert octavo(server, "generate", "a", "--api-key-file", str(tmp_path / "key")) == 0
    assert server.metadata[0]["authorization"] == "Bearer secret"
    assert octavo(server, "generate", "a", "--api-key-file", str(tmp_path / "nothing")) == 2


def test_proto_writes_files_that_describe_all_services(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["proto", "--out", str(tmp_path), "--descriptor-set", str(tmp_path / "set")]) == 0
    assert (tmp_path / "octavo_proto/v1/generation.proto").read_text().count("\n  rpc ") == 3
    files = FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    names = [file.name for file in files]
    assert names.index("google/protobuf/duration.proto") < names.index("octavo_proto/v1/types.proto")
    assert sorted(service.name for file in files for service in file.service) == [
        "ControlService",
        "GenerationService",
        "ModelService",
    ]
    assert cli.main(["proto", "--out", "/proc/nowhere"]) == 1


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_no_command_is_usage_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def served(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[EngineConfig, ServerConfig]:
    """What `octavo serve` hands to the supervisor."""
    calls: list[tuple[EngineConfig, ServerConfig]] = []
    monkeypatch.setattr("octavo.supervisor.serve", lambda engine, server: calls.append((engine, server)) or 3)
    assert cli.main(["serve", *arguments]) == 3
    return calls[0]


def test_serve_without_flags_is_the_demo_model_with_all_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    engine, server = served(monkeypatch)
    assert engine == EngineConfig(model=ModelConfig(path="demo", name="demo"))
    assert server == ServerConfig(run_directory=f"{tmp_path}/octavo-50051")


def test_flags_of_serve_reach_their_structs(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--dtype float32 --block-size 16 --kv-cache-memory 1.5GiB --no-enable-prefix-caching --frontends 2"
    flags += " --kv-cache-dtype fp8 --max-queue-time 5 --max-inflight 9 --max-stop-strings 4"
    flags += " --address unix:/tmp/x --reflection --drain-delay 1"
    engine, server = served(monkeypatch, "some/gpt2-large", *flags.split())
    assert (engine.model.path, engine.model.name, engine.model.dtype) == ("some/gpt2-large", "gpt2-large", "float32")
    assert engine.cache == CacheConfig(
        block_size=16, memory=3 * 2**29, kv_cache_dtype="fp8", enable_prefix_caching=False
    )
    assert engine.scheduler == SchedulerConfig(max_queue_time=5.0)
    limits = Limits(max_queue_time=5.0, max_inflight_requests=9, max_stop_strings=4)
    assert server == ServerConfig(
        address="unix:/tmp/x", frontend_processes=2, reflection=True, drain_delay=1.0, limits=limits
    )


def test_every_field_of_the_configuration_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    for struct in cli_serve.GROUPS.values():
        for field in msgspec.structs.fields(struct):
            flag = cli_serve.FLAGS.get(field.name, (field.name.replace("_", "-"),))[0]
            assert field.name in ("path", "limits") or f"--{flag}" in text
    assert "Requests (sequences) that may run at once." in " ".join(text.split())


@pytest.mark.parametrize(
    "arguments",
    [
        *("--block-size 17", "--device tpu", "--max-prompts -1", "--watermark nan", "--kv-cache-memory 4X", "--max"),
        "--kv-cache-dtype int4",
    ],
)
def test_bad_value_of_serve_is_usage_error(arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", *arguments.split()])
    assert caught.value.code == 2


HEAVY = {"torch", "triton", "transformers", "numpy", "tokenizers", "zmq", "huggingface_hub", "grpc_health.v1"}


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        (["health", "--address", "127.0.0.1:1"], {"msgspec"}),
        (["generate", "a", "--address", "127.0.0.1:1"], {"msgspec"}),
        (["proto"], {"msgspec", "grpc"}),
        (["serve", "--help"], {"grpc"}),
        (["--help"], {"grpc", "google.protobuf"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_command_imports_nothing_heavy(arguments: list[str], more: set[str]) -> None:
    program = (
        "import sys\nfrom octavo import cli\n"
        f"try: cli.main({arguments!r})\nexcept SystemExit: pass\n"
        "print('modules', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.rpartition("modules")[2].split())
    assert "octavo.cli" in loaded
    assert not loaded & (HEAVY | more)
