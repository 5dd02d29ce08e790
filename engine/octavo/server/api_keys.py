"""API keys: who calls, and what the key allows. Keys are stored as SHA-256 in a file of mode 0600.

A line per key: `name role tenant sha256`, role `user` or `admin`, the hash in hexadecimal; `#` begins a comment.
"""

from __future__ import annotations

import hashlib
import hmac
import stat
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import Reason, RequestError, StartupError

_FAILURES_PER_MINUTE = 20
_MAX_PEERS = 1024


@dataclass(frozen=True, slots=True)
class Identity:
    """The caller of an RPC. Without API keys everybody is the same nobody."""

    name: str = ""
    tenant: str = ""
    is_admin: bool = False


@dataclass(frozen=True, slots=True)
class _Key:
    digest: bytes
    identity: Identity


class ApiKeys:
    """The keys of a file. A missing and a wrong key are told apart neither by text nor by time."""

    def __init__(self, path: str) -> None:
        """Raises StartupError (USAGE) naming file and line."""
        self._keys = _load(Path(path))

    def identify(self, authorization: Iterable[str | bytes]) -> Identity:
        """The caller, from the values of the `authorization` metadata. Raises RequestError UNAUTHENTICATED."""
        values = [value if isinstance(value, bytes) else value.encode() for value in authorization]
        scheme, _, token = (values[0] if len(values) == 1 else b"").partition(b" ")
        digest = hashlib.sha256(token).digest()
        found: Identity | None = None
        for key in self._keys:  # all of them, always: the time tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = key.identity
        if found is None or scheme != b"Bearer":
            raise RequestError(Reason.UNAUTHENTICATED, "a valid API key is required")
        return found


def _load(path: Path) -> list[_Key]:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise _usage(f"API keys file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _usage(f"API keys file {path}: not UTF-8 text") from None
    if mode & 0o077:
        raise _usage(f"API keys file {path}: mode is {mode:04o}, others may read it; make it 0600")
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            keys.append(_parse(words, f"API keys file {path}, line {number}"))
    if not keys:
        raise _usage(f"API keys file {path}: it has no keys")
    return keys


def _parse(words: list[str], where: str) -> _Key:
    if len(words) != 4 or words[1] not in ("user", "admin"):
        raise _usage(f"{where}: expected `name user|admin tenant sha256`")
    try:
        digest = bytes.fromhex(words[3])
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise _usage(f"{where}: the last word is not a SHA-256 in hexadecimal")
    return _Key(digest, Identity(words[0], words[2], words[1] == "admin"))


class FailureMeter:
    """Counts failed authentications by peer host, in windows of a minute; remembers a bounded number of hosts."""

    def __init__(self) -> None:
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def is_excessive(self, peer: str) -> bool:
        """Counts one failure of `peer` (gRPC's name of it) and tells whether there were too many."""
        host = peer.rpartition(":")[0]
        now = time.monotonic()
        start, count = self._windows.pop(host, (now, 0))
        if now - start > 60.0:
            start, count = now, 0
        self._windows[host] = (start, count + 1)
        if len(self._windows) > _MAX_PEERS:
            self._windows.popitem(last=False)
        return count + 1 > _FAILURES_PER_MINUTE


def _usage(message: str) -> StartupError:
    return StartupError(StartupError.USAGE, message)
