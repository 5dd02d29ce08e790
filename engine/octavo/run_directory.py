"""What a server takes from the machine it runs on: its run directory and its addresses.

The run directory (mode 0700) holds the unix sockets of one server and a lock that says that it lives. Everything here
raises StartupError (USAGE) with one line for people.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import tempfile
from pathlib import Path

from octavo.errors import StartupError

MAX_SOCKET_PATH = 107
"""Bytes of a unix socket's path."""
_LONGEST_NAME = "admin-00000.sock"
_LOCK = "lock"


class RunDirectory:
    """Created, or taken over from a server that is gone. `close` removes what was put into it."""

    def __init__(self, configured: str) -> None:
        """`configured` may be empty: a fresh folder under XDG_RUNTIME_DIR or the temporary folder."""
        folder = Path(configured) if configured else None
        self._fresh = folder is None or not folder.exists() or (folder / _LOCK).exists()
        """Made by this server or by one that did not live to remove it: goes away at the end."""
        self.path = folder.absolute() if folder is not None else _fresh_folder()
        longest = self.path / _LONGEST_NAME
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
            if not configured:
                self.path.rmdir()
            raise _usage(f"run directory {self.path}: path too long for unix sockets ({MAX_SOCKET_PATH} bytes)")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.path.is_symlink() or self.path.stat().st_uid != os.geteuid():
                raise _usage(f"run directory {self.path}: a link, or not ours")  # somebody else may have put it there
            self.path.chmod(0o700)
            self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _usage(f"run directory {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise _usage(f"run directory {self.path}: in use by a running server") from None
        for path in self.path.glob("*.sock"):
            if is_listening(path):
                if not self._fresh:
                    (self.path / _LOCK).unlink(missing_ok=True)
                os.close(self._lock)
                raise _usage(f"run directory {self.path}: somebody listens on {path.name}")
            path.unlink()

    def address(self, name: str) -> str:
        """ZeroMQ's name of a socket in the directory."""
        return f"ipc://{self.path}/{name}.sock"

    def forget(self, name: str) -> None:
        """Removes the socket of a process that is gone."""
        (self.path / f"{name}.sock").unlink(missing_ok=True)

    def close(self) -> None:
        for path in [*self.path.glob("*.sock"), self.path / _LOCK]:
            path.unlink(missing_ok=True)
        if self._fresh:
            with contextlib.suppress(OSError):  # not empty: what is left is not ours
                self.path.rmdir()
        os.close(self._lock)


class Port:
    """The address of the server. With several front-ends a socket that never listens keeps the port for them."""

    def __init__(self, address: str, *, shared: bool) -> None:
        """Raises StartupError when somebody has the port. `shared`: several front-ends will listen on it."""
        self.address = address
        """With port 0 and several front-ends: the one that was chosen."""
        self._holder: socket.socket | None = None
        if address.startswith("unix:"):
            if is_listening(Path(address.removeprefix("unix:").removeprefix("//"))):
                raise _in_use(address)
            return
        host, port = split_address(address)
        family = _family(host, address)
        # Without SO_REUSEPORT a bind fails also against listeners that have it.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            _bind(probe, host, port, address)
        if shared:
            self._holder = socket.socket(family, socket.SOCK_STREAM)
            self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _bind(self._holder, host, port, address)
            shown = f"[{host}]" if ":" in host else host
            self.address = f"{shown}:{self._holder.getsockname()[1]}"

    def close(self) -> None:
        if self._holder is not None:
            self._holder.close()


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise _usage(f"{address}: not an address (host:port)")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach it."""
    if address.startswith("unix:"):
        return True
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_listening(path: Path) -> bool:
    """Whether a process listens on this unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0.5)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True


def _fresh_folder() -> Path:
    parent = os.environ.get("XDG_RUNTIME_DIR")
    with contextlib.suppress(OSError):
        if parent:
            return Path(tempfile.mkdtemp(prefix="octavo-", dir=parent))
    try:
        return Path(tempfile.mkdtemp(prefix="octavo-"))
    except OSError as error:
        raise _usage(f"run directory: {error.strerror}") from None


def _family(host: str, address: str) -> socket.AddressFamily:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except OSError:
        raise _usage(f"{address}: unknown host") from None


def _bind(sock: socket.socket, host: str, port: int, address: str) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _in_use(address) from None
        raise _usage(f"{address}: {error.strerror}") from None


def _in_use(address: str) -> StartupError:
    return _usage(f"{address}: address already in use")


def _usage(message: str) -> StartupError:
    return StartupError(StartupError.USAGE, message)
