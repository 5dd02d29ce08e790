"""What a server takes from its machine: a locked private folder and a port that nobody else has."""

import os
import socket
import stat

import pytest
from octavo.errors import StartupError
from octavo.run_directory import Port, RunDirectory, is_loopback, split_address


def test_a_fresh_directory_is_private_and_goes_away():
    directory = RunDirectory("")
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    directory.close()
    assert not directory.path.exists()


def test_a_directory_in_use_is_refused_and_left_alone(tmp_path):
    first = RunDirectory(str(tmp_path / "run"))
    with pytest.raises(StartupError, match="in use") as caught:
        RunDirectory(str(tmp_path / "run"))
    assert caught.value.exit_code == StartupError.USAGE
    first.close()
    RunDirectory(str(tmp_path / "run")).close()


def test_what_a_killed_server_left_is_taken_over_and_removed(tmp_path):
    path = tmp_path / "run"
    os.close(RunDirectory(str(path))._lock)  # as the kernel does
    RunDirectory(str(path)).close()
    assert not path.exists()


def test_what_is_not_the_servers_stays_also_after_a_killed_server(tmp_path):
    (tmp_path / "notes").write_text("mine")
    os.close(RunDirectory(str(tmp_path))._lock)
    RunDirectory(str(tmp_path)).close()
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_stale_sockets_are_replaced_but_one_with_a_live_peer_never_is(tmp_path):
    path = tmp_path / "core-0.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(StartupError, match=r"core-0\.sock"):
            RunDirectory(str(tmp_path))
        assert path.exists()
    directory = RunDirectory(str(tmp_path))
    assert not path.exists()
    directory.close()
    assert tmp_path.exists()


def test_a_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "run").symlink_to(tmp_path / "real")
    with pytest.raises(StartupError, match="a link"):
        RunDirectory(str(tmp_path / "run"))
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o755


@pytest.mark.parametrize("path", ["/proc/octavo", "/tmp/" + "x" * 120])
def test_an_impossible_directory_is_one_line(path):
    with pytest.raises(StartupError) as caught:
        RunDirectory(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_port_in_use_is_refused_even_when_it_is_shared(reuse, shared):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuse))
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(StartupError, match="already in use"):
            Port(f"127.0.0.1:{other.getsockname()[1]}", shared=shared)


def test_a_shared_port_is_chosen_once_and_held():
    port = Port("127.0.0.1:0", shared=True)
    number = split_address(port.address)[1]
    assert number
    with socket.socket() as frontend:
        frontend.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        frontend.bind(("127.0.0.1", number))
        frontend.listen()
        with pytest.raises(StartupError):
            Port(port.address, shared=True)
    port.close()


def test_addresses_are_understood():
    assert split_address("[::1]:50051") == ("::1", 50051)
    assert is_loopback("127.0.0.1:1")
    assert is_loopback("localhost:1")
    assert is_loopback("[::1]:1")
    assert not is_loopback("0.0.0.0:1")
    for wrong in ["", "host", "host:", ":1", "host:x", "host:70000"]:
        with pytest.raises(StartupError):
            split_address(wrong)


def test_a_unix_socket_with_a_listener_is_in_use(tmp_path):
    address = f"unix:{os.fspath(tmp_path)}/s"
    Port(address, shared=False).close()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(StartupError, match="already in use"):
            Port(address, shared=False)
