"""TLS for the ports: certificates that are read again when their files change."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

import grpc

from octavo.config import ServerConfig
from octavo.errors import StartupError

logger = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int], ...]


class Certificates:
    """The server's key pair and, with a client CA, what clients must present."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises StartupError (USAGE) when the files cannot be used."""
        self._paths = [Path(path) for path in (config.tls_cert, config.tls_key, config.tls_client_ca) if path]
        self._has_client_ca = bool(config.tls_client_ca)
        self._stamp: _Stamp = ()
        try:
            self._stamp = self._present_stamp()
            self._initial = self._read()
        except (OSError, ssl.SSLError, ValueError) as error:
            raise _usage(f"TLS files cannot be used: {_text(error)}") from None

    def credentials(self) -> Any:
        """For `add_secure_port`. Each handshake uses the newest files that could be read."""
        # A client CA that nobody has to satisfy would verify nobody.
        return grpc.dynamic_ssl_server_credentials(
            self._initial, self._newest, require_client_authentication=self._has_client_ca
        )

    def _newest(self) -> Any | None:
        """Called by gRPC at each handshake, on a thread of its own. None keeps what is in use."""
        try:
            stamp = self._present_stamp()
            if stamp == self._stamp:
                return None
            configuration = self._read()
        except (OSError, ssl.SSLError, ValueError) as error:
            logger.warning("new TLS files cannot be used, the old ones stay: %s", _text(error))
            return None
        self._stamp = stamp
        logger.info("TLS files were read again")
        return configuration

    def _present_stamp(self) -> _Stamp:
        return tuple((status.st_mtime_ns, status.st_ino) for status in map(Path.stat, self._paths))

    def _read(self) -> Any:
        certificate, key, *client_ca = self._paths
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)  # fails unless they belong together
        root = None
        if client_ca:
            context.load_verify_locations(client_ca[0])
            root = client_ca[0].read_bytes()
        return grpc.ssl_server_certificate_configuration([(key.read_bytes(), certificate.read_bytes())], root)


def certificates(config: ServerConfig) -> Certificates | None:
    """None without TLS. Raises StartupError (USAGE) when the options contradict each other or a file is unusable."""
    if not config.tls_cert and not config.tls_key:
        if config.tls_client_ca:
            raise _usage("--tls-client-ca needs --tls-cert and --tls-key")
        return None
    if not config.tls_cert or not config.tls_key:
        raise _usage("--tls-cert and --tls-key need each other")
    return Certificates(config)


def _text(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a certificate and its key").replace("_", " ").lower()
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return "not a certificate"


def _usage(message: str) -> StartupError:
    return StartupError(StartupError.USAGE, message)
