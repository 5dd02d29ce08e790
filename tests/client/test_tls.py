"""TLS of the client: the server's certificate is checked, and the client shows its own where one is demanded."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from client.fake_server import FakeServer, running
from octavo.client import TLS, Client, DeadlineExceeded, Unavailable

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


def certificate(folder: Path, name: str) -> tuple[str, str]:
    """Files of a self-signed certificate for 127.0.0.1, and of its key."""
    certificate_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -addext"
    files = ["-keyout", str(key_file), "-out", str(certificate_file), "-subj", f"/CN={name}"]
    subprocess.run([*command.split(), "subjectAltName=IP:127.0.0.1", *files], check=True, capture_output=True)
    return str(certificate_file), str(key_file)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("tls")
    return {name: certificate(folder, name) for name in ("server", "client")}


@pytest.fixture
def server(files: dict[str, tuple[str, str]]) -> Iterator[FakeServer]:
    """A server that demands the client's certificate."""
    pair, root = [Path(path).read_bytes() for path in files["server"]], Path(files["client"][0]).read_bytes()
    with running(tls=grpc.ssl_server_credentials([(pair[1], pair[0])], root, True)) as fake:
        yield fake


def test_both_certificates_together_let_a_call_through(server: FakeServer, files: dict[str, tuple[str, str]]) -> None:
    tls = TLS(ca_file=files["server"][0], cert_file=files["client"][0], key_file=files["client"][1])
    with Client(server.address, tls=tls) as client:
        assert client.generate("a").text == " a"


@pytest.mark.parametrize("kind", ["no client certificate", "unknown root", "plaintext"])
def test_anything_less_is_unavailable(server: FakeServer, files: dict[str, tuple[str, str]], kind: str) -> None:
    tls = {"no client certificate": TLS(ca_file=files["server"][0]), "unknown root": True, "plaintext": False}[kind]
    with Client(server.address, tls=tls, retry=False) as client, pytest.raises((Unavailable, DeadlineExceeded)):
        client.generate("a", timeout=5)
    assert server.requests == []


def test_half_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="key_file"):
        Client("127.0.0.1:1", tls=TLS(cert_file="x"))
