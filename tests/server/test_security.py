"""Addresses, TLS, API keys: who may listen and who may call."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from octavo.config import Limits
from octavo.errors import StartupError
from octavo.server.api_keys import ApiKeys, FailureMeter
from octavo_proto.v1 import control_pb2, generation_pb2, model_pb2
from server.harness import CLIENT_OPTIONS, Client, Outcome, Served, outcome, request, serving, until

USER, ADMIN, OTHER = "user-key", "admin-key", "other-key"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="oct-") as path:
        yield Path(path)


def key_file(folder: Path) -> str:
    path = folder / "keys"
    lines = ["# name role tenant sha256"]
    for name, role, tenant, key in (
        ("alice", "user", "red", USER),
        ("carol", "user", "blue", OTHER),
        ("root", "admin", "red", ADMIN),
    ):
        lines.append(f"{name} {role} {tenant} {hashlib.sha256(key.encode()).hexdigest()}  # comment")
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return str(path)


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def refused(**config: Any) -> str:
    with pytest.raises(StartupError) as caught:
        async with serving(**config):
            pass
    assert caught.value.exit_code == StartupError.USAGE
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- addresses


async def test_a_port_in_use_is_one_line_and_no_second_server(served: Served) -> None:
    text = await refused(address=served.address)
    assert served.address in text
    with socket.create_server(("127.0.0.1", 0)) as plain:
        await refused(address=f"127.0.0.1:{plain.getsockname()[1]}")


async def test_several_front_ends_share_a_port() -> None:
    async with serving(frontend_processes=2) as first:  # noqa: SIM117
        async with serving(frontend_processes=2, address=first.address) as second:
            assert second.address == first.address


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"])
async def test_a_remote_address_needs_tls_or_a_word(address: str) -> None:
    assert "--insecure-allow-remote" in await refused(address=address)


async def test_insecure_allow_remote_is_that_word() -> None:
    async with serving(address="0.0.0.0:0", insecure_allow_remote=True) as served:
        client = served.connect(f"127.0.0.1:{served.address.rpartition(':')[2]}")
        assert (await outcome(client.generation.Generate(request("x")))).code == "OK"
        await client.channel.close()


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", ":1"])
async def test_what_is_no_address_is_refused(address: str) -> None:
    if address:
        await refused(address=address)


async def test_admin_on_tcp_needs_tls_and_keys(folder: Path) -> None:
    assert "--api-keys-file" in await refused(admin_address="127.0.0.1:0")
    assert "--api-keys-file" in await refused(admin_address="127.0.0.1:0", api_keys_file=key_file(folder))


async def test_admin_socket_of_a_living_server_is_not_taken(folder: Path) -> None:
    address = f"unix:{folder}/admin.sock"
    async with serving(admin_address=address):
        assert "listens" in await refused(admin_address=address)
    path = folder / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(admin_address=f"unix:{path}"):
        pass


async def test_admin_socket_path_may_not_be_too_long() -> None:
    assert "107" in await refused(admin_address="unix:/tmp/" + "x" * 120)


# --- API keys


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no keys"),
        ("alice user red", "line 1"),
        ("\nalice boss red " + "00" * 32, "line 2"),
        ("alice user red 00", "SHA-256"),
        ("alice user red " + "zz" * 32, "SHA-256"),
    ],
)
async def test_a_faulty_key_file_is_refused(folder: Path, text: str, word: str) -> None:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(0o600)
    assert word in await refused(api_keys_file=str(path))


async def test_a_key_file_that_others_may_read_is_refused(folder: Path) -> None:
    path = key_file(folder)
    os.chmod(path, 0o640)
    assert "0600" in await refused(api_keys_file=path)
    await refused(api_keys_file=str(folder / "missing"))


METHODS = ["/octavo.v1.GenerationService/Generate", "/octavo.v1.ControlService/GetLoad", "/no.Such/Method"]
BAD_METADATA: dict[str, tuple[tuple[str, str], ...]] = {
    "missing": (),
    "wrong": bearer("wrong"),
    "empty": (("authorization", ""),),
    "no scheme": (("authorization", USER),),
    "lower case": (("authorization", f"bearer {USER}"),),
    "two": bearer(USER) + bearer(USER),
    "long": bearer("x" * 6000),
    "hash": bearer(hashlib.sha256(USER.encode()).hexdigest()),
    "space": bearer(USER + " "),
}


@pytest.mark.parametrize("title", BAD_METADATA)
async def test_without_a_valid_key_every_method_is_unauthenticated_with_one_text(folder: Path, title: str) -> None:
    async with serving(api_keys_file=key_file(folder), check=False) as served:
        found = [
            await outcome(served.client.raw(method)(b"\xff\xff not protobuf", metadata=BAD_METADATA[title]))
            for method in METHODS
        ]
        assert {(f.code, f.reason, f.message) for f in found} == {
            ("UNAUTHENTICATED", "UNAUTHENTICATED", "a valid API key is required")
        }


async def test_a_valid_key_opens_and_health_needs_none(folder: Path) -> None:
    async with serving(api_keys_file=key_file(folder), check=False) as served:
        call = served.client.generation.Generate(request("x"), metadata=bearer(USER))
        assert (await outcome(call)).code == "OK"
        assert (await served.client.health.Check(health_pb2.HealthCheckRequest())).status == 1
        assert (await outcome(served.client.raw("/no.Such/Method")(b"", metadata=bearer(USER)))).code == "UNIMPLEMENTED"


async def test_an_admin_key_is_no_admin_on_the_public_port(folder: Path) -> None:
    async with serving(api_keys_file=key_file(folder), check=False) as served:
        for key in (USER, ADMIN):
            call = served.client.control.Drain(control_pb2.DrainRequest(), metadata=bearer(key))
            found = await outcome(call)
            assert (found.code, found.reason) == ("PERMISSION_DENIED", "NOT_ADMIN")


async def test_another_tenants_requests_cannot_be_aborted(folder: Path) -> None:
    async with serving(api_keys_file=key_file(folder), check=False) as served:
        served.core.hold()
        what = request("x")
        what.request_id = "mine"
        call = asyncio.create_task(outcome(served.client.generation.Generate(what, metadata=bearer(USER))))
        await served.core.arrived.wait()
        ask = control_pb2.AbortRequestsRequest(request_ids=["mine"])
        theirs = await served.client.control.AbortRequests(ask, metadata=bearer(OTHER))
        assert list(theirs.not_found_request_ids) == ["mine"] and not theirs.aborted_requests
        ours = await served.client.control.AbortRequests(ask, metadata=bearer(USER))
        assert ours.aborted_requests == 1
        assert (await call).reason == "ABORTED_BY_OPERATOR"


async def test_a_tenants_share_is_its_own(folder: Path) -> None:
    async with serving(api_keys_file=key_file(folder), limits=Limits(max_tenant_requests=1), check=False) as served:
        served.core.hold()
        first = asyncio.create_task(outcome(served.client.generation.Generate(request("x"), metadata=bearer(USER))))
        await served.core.arrived.wait()
        found = await outcome(served.client.generation.Generate(request("y"), metadata=bearer(USER)))
        assert (found.code, found.reason) == ("RESOURCE_EXHAUSTED", "TENANT_LIMIT")
        other = asyncio.create_task(outcome(served.client.generation.Generate(request("z"), metadata=bearer(OTHER))))
        await until(lambda: len(served.core.running) == 2, "the other tenant has no place")
        served.core.release()
        assert ((await first).code, (await other).code) == ("OK", "OK")
        salts = {r.cache_salt for r in served.core.added}
        assert len(salts) == 2 and "" not in salts


def test_keys_are_compared_all_and_failures_are_counted_by_host(folder: Path) -> None:
    keys = ApiKeys(key_file(folder))
    assert keys.identify([f"Bearer {USER}"]).tenant == "red"
    assert keys.identify([f"Bearer {ADMIN}".encode()]).is_admin
    meter = FailureMeter()
    results = [meter.is_excessive(f"ipv4:192.0.2.1:{port}") for port in range(25)]
    assert results == [False] * 20 + [True] * 5
    assert not meter.is_excessive("ipv4:192.0.2.2:1")
    for host in range(3000):
        meter.is_excessive(f"ipv4:192.0.2.{host}:1")
    assert len(meter._windows) <= 1024


@pytest.mark.slow
def test_missing_wrong_and_valid_keys_take_the_same_time(folder: Path) -> None:
    keys = ApiKeys(key_file(folder))
    first, last = f"Bearer {'0' * 40}", f"Bearer {'z' * 40}"
    times: dict[str, list[float]] = {first: [], last: []}
    for _ in range(10_000):
        for value, taken in times.items():
            begin = time.perf_counter()
            with contextlib.suppress(Exception):
                keys.identify([value])
            taken.append(time.perf_counter() - begin)
    medians = [sorted(taken)[5000] for taken in times.values()]
    assert abs(medians[0] - medians[1]) < 0.2 * medians[0]


# --- TLS


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")


def certificate(folder: Path, name: str, ca: str = "") -> tuple[str, str]:
    """Files of a new key pair for 127.0.0.1, self-signed or by the CA of that name."""
    by = ["-CA", f"{ca}.crt", "-CAkey", f"{ca}.key"] if ca else []
    subprocess.run(
        [
            *[
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-days",
                "2",
            ],
            *("-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", f"/CN={name}"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *by,
        ],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    return str(folder / f"{name}.crt"), str(folder / f"{name}.key")


def tls_client(address: str, root: str, pair: tuple[str, str] | None = None) -> Client:
    certificate_chain, key = (Path(pair[0]).read_bytes(), Path(pair[1]).read_bytes()) if pair else (None, None)
    credentials = grpc.ssl_channel_credentials(Path(root).read_bytes(), key, certificate_chain)
    return Client(grpc.aio.secure_channel(address, credentials, options=CLIENT_OPTIONS))


async def tls_generate(client: Client, **call: Any) -> Outcome:
    try:
        return await outcome(client.generation.Generate(request("x"), timeout=5, **call))
    finally:
        await client.channel.close()


@contextlib.asynccontextmanager
async def tls_server(folder: Path, **config: Any) -> AsyncIterator[Served]:
    cert, key = certificate(folder, "server")
    async with serving(tls_cert=cert, tls_key=key, check=False, **config) as served:
        yield served


@needs_openssl
async def test_tls_serves_those_who_know_the_certificate_only(folder: Path) -> None:
    async with tls_server(folder) as served:
        assert (await tls_generate(tls_client(served.address, str(folder / "server.crt")))).code == "OK"
        assert (await tls_generate(served.connect())).code == "UNAVAILABLE"
        other, _ = certificate(folder, "other")
        assert (await tls_generate(tls_client(served.address, other))).code == "UNAVAILABLE"


@needs_openssl
async def test_tls_below_1_2_is_refused(folder: Path) -> None:
    async with tls_server(folder) as served:
        host, _, port = served.address.rpartition(":")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        context.set_ciphers("DEFAULT:@SECLEVEL=0")

        def shake() -> None:
            with socket.create_connection((host, int(port)), timeout=5) as raw, context.wrap_socket(raw):
                pass

        with pytest.raises(OSError):
            await asyncio.to_thread(shake)


@needs_openssl
async def test_a_client_ca_means_that_clients_must_have_a_certificate(folder: Path) -> None:
    ca, _ = certificate(folder, "ca")
    good, stranger = certificate(folder, "client", "ca"), certificate(folder, "stranger")
    async with tls_server(folder, tls_client_ca=ca) as served:
        root = str(folder / "server.crt")
        assert (await tls_generate(tls_client(served.address, root, good))).code == "OK"
        assert (await tls_generate(tls_client(served.address, root))).code == "UNAVAILABLE"
        assert (await tls_generate(tls_client(served.address, root, stranger))).code == "UNAVAILABLE"


@needs_openssl
async def test_a_new_certificate_is_served_and_a_broken_one_ignored(folder: Path) -> None:
    def served_certificate(address: str) -> str:
        host, _, port = address.rpartition(":")
        return ssl.get_server_certificate((host, int(port)))

    async with tls_server(folder) as served:
        client = tls_client(served.address, str(folder / "server.crt"))
        assert (await outcome(client.generation.Generate(request("x")))).code == "OK"
        old = await asyncio.to_thread(served_certificate, served.address)
        certificate(folder, "server")
        new = await asyncio.to_thread(served_certificate, served.address)
        assert new != old
        (folder / "server.key").write_text("broken")
        assert await asyncio.to_thread(served_certificate, served.address) == new
        assert (await outcome(client.generation.Generate(request("x")))).code == "OK"
        await client.channel.close()


@needs_openssl
async def test_tls_options_that_contradict_each_other_are_refused(folder: Path) -> None:
    cert, key = certificate(folder, "server")
    _, other_key = certificate(folder, "other")
    assert "--tls-cert" in await refused(tls_client_ca=cert)
    assert "--tls-key" in await refused(tls_cert=cert)
    assert "TLS" in await refused(tls_cert=cert, tls_key=other_key)
    assert "missing.crt" in await refused(tls_cert=str(folder / "missing.crt"), tls_key=key)
    (folder / "broken.crt").write_text("no certificate")
    assert "TLS" in await refused(tls_cert=str(folder / "broken.crt"), tls_key=key)


@needs_openssl
async def test_admin_on_tcp_takes_admin_keys_only(folder: Path) -> None:
    async with tls_server(folder, admin_address="127.0.0.1:0", api_keys_file=key_file(folder)) as served:
        admin = tls_client(served.server.admin_address, str(folder / "server.crt"))
        call = admin.control.ResetPrefixCache(control_pb2.ResetPrefixCacheRequest(), metadata=bearer(USER))
        found = await outcome(call)
        assert (found.code, found.reason) == ("PERMISSION_DENIED", "NOT_ADMIN")
        call = admin.control.ResetPrefixCache(control_pb2.ResetPrefixCacheRequest(), metadata=bearer(ADMIN))
        assert (await outcome(call)).code == "OK"
        await admin.channel.close()


async def test_a_key_is_checked_before_the_message_is_read(folder: Path) -> None:
    """A caller without a key learns nothing about its message, and the server parses none."""
    async with serving(api_keys_file=key_file(folder), check=False) as served:
        what = generation_pb2.GenerateRequest(prompts=request("x" * 500_000).prompts)
        found = await outcome(served.client.generation.Generate(what))
        assert found.code == "UNAUTHENTICATED"
        found = await outcome(served.client.models.GetModel(model_pb2.GetModelRequest(), metadata=bearer("no")))
        assert found.code == "UNAUTHENTICATED"
