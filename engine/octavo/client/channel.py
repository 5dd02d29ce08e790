"""How the client reaches servers: targets, channel options, credentials, the default service config."""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

GENERATION_SERVICE = "octavo.v1.GenerationService"
DEFAULT_TIMEOUT = 300.0
"""Seconds. Every call has a deadline."""


@dataclass(frozen=True, slots=True)
class TLS:
    """Files (PEM) of a TLS connection. All empty: the system's roots, no client certificate."""

    ca_file: str = ""
    """Roots that the server's certificate is checked against."""
    cert_file: str = ""
    """This client's certificate, for servers that demand one; needs key_file."""
    key_file: str = ""
    server_name: str = ""
    """Name expected in the server's certificate, where it differs from the address."""


def service_config(*, health_check: bool, retry: bool) -> dict[str, Any]:
    """The default service config: round_robin over all addresses, health-aware, with retries.

    gRPC retries only until the first message of an answer has arrived, so tokens never repeat. A server's push-back
    (`grpc-retry-pushback-ms`) replaces the delay.
    """
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if health_check:
        config["healthCheckConfig"] = {"serviceName": GENERATION_SERVICE}
    if retry:
        policy = {
            "maxAttempts": 4,
            "initialBackoff": "0.1s",
            "backoffMultiplier": 2,
            "maxBackoff": "5s",
            "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
        }
        services = [GENERATION_SERVICE, "octavo.v1.ModelService", "octavo.v1.ControlService"]
        config["methodConfig"] = [{"name": [{"service": name} for name in services], "retryPolicy": policy}]
        config["retryThrottling"] = {"maxTokens": 10, "tokenRatio": 0.1}
    return config


def channel_options(*, health_check: bool, retry: bool, server_name: str = "") -> list[tuple[str, str | int]]:
    """Options of a channel. A frozen server is noticed after about 25 s: the ping's own timeout decides."""
    options: list[tuple[str, str | int]] = [
        ("grpc.service_config", json.dumps(service_config(health_check=health_check, retry=retry))),
        ("grpc.enable_retries", int(retry)),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.max_receive_message_length", 64 << 20),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    return options


def target(addresses: Sequence[str]) -> str:
    """The gRPC target of one address (as it is) or of several host:port, whose names are resolved here.

    Raises ValueError for an empty list, a malformed address or a mix of IPv4 and IPv6, and OSError for an unknown host.
    """
    if isinstance(addresses, str) or not addresses or not all(addresses):
        raise ValueError("address: at least one host:port, dns:///host:port or unix:PATH is needed")
    if len(addresses) == 1:
        return addresses[0]
    resolved = [ip for address in addresses for ip in _resolve(address)]
    families = {ip.version for ip, _ in resolved}
    if len(families) > 1:
        raise ValueError(f"addresses {list(addresses)} mix IPv4 and IPv6, which one channel cannot serve")
    parts = [f"{ip}:{port}" if ip.version == 4 else f"[{ip}]:{port}" for ip, port in resolved]
    return f"ipv{families.pop()}:{','.join(parts)}"


def _resolve(address: str) -> list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or "/" in address:
        raise ValueError(f"address {address!r}: with several addresses each has to be host:port")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    family = socket.AF_INET if any(entry[0] == socket.AF_INET for entry in found) else socket.AF_INET6
    ips = [ipaddress.ip_address(entry[4][0]) for entry in found if entry[0] == family]
    return [(ip, int(port)) for ip in dict.fromkeys(ips)]


def credentials(tls: bool | TLS) -> Any | None:
    """grpc.ChannelCredentials, or None for plaintext."""
    if tls is False:
        return None
    files = TLS() if tls is True else tls
    if bool(files.cert_file) != bool(files.key_file):
        raise ValueError("tls: cert_file and key_file go together")
    read = {name: Path(path).read_bytes() for name, path in _files(files).items() if path}
    return grpc.ssl_channel_credentials(read.get("ca"), read.get("key"), read.get("cert"))


def _files(files: TLS) -> dict[str, str]:
    return {"ca": files.ca_file, "cert": files.cert_file, "key": files.key_file}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Everything needed to open the two channels of a client.

    Generation goes over a channel that leaves servers which are not SERVING; facts, load and health go over one that
    does not, since they are wanted most when the server is starting or draining.
    """

    target: str
    credentials: Any | None
    server_name: str
    metadata: tuple[tuple[str, str], ...]
    retry: bool

    @classmethod
    def of(cls, addresses: Sequence[str], tls: bool | TLS, api_key: str | None, retry: bool) -> Endpoint:
        metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        name = tls.server_name if isinstance(tls, TLS) else ""
        return cls(target(addresses), credentials(tls), name, metadata, retry)

    def open(self, module: Any, *, health_check: bool) -> Any:
        """A channel of `module`: grpc or grpc.aio."""
        options = channel_options(health_check=health_check, retry=self.retry, server_name=self.server_name)
        if self.credentials is None:
            return module.insecure_channel(self.target, options=options)
        return module.secure_channel(self.target, self.credentials, options=options)


def deadline(timeout: float | None) -> float:
    """Seconds of a call: the default when None. Raises ValueError unless positive and finite."""
    if timeout is None:
        return DEFAULT_TIMEOUT
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout: has to be positive and finite, got {timeout}")
    return float(timeout)
