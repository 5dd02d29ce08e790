"""The gRPC servers of a front-end process: the public port and, in the first front-end, the admin address."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2
from octavo_proto.v1 import control_pb2, generation_pb2, model_pb2

from octavo.config import ServerConfig
from octavo.errors import StartupError
from octavo.frontend.async_engine import AsyncEngine, EngineState
from octavo.frontend.cluster import Cluster
from octavo.metrics import Metrics
from octavo.run_directory import MAX_SOCKET_PATH, is_listening, is_loopback, split_address
from octavo.server.api_keys import ApiKeys
from octavo.server.control_service import ControlService
from octavo.server.generation_service import GenerationService
from octavo.server.health import HealthService
from octavo.server.introspection import channelz_handlers, reflection_handlers
from octavo.server.model_service import ModelService
from octavo.server.rpc import Pipeline
from octavo.server.tls import Certificates, certificates

MAX_CONNECTIONS: Final = 2000

_SERVICES: Final[list[Any]] = [
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    model_pb2.DESCRIPTOR.services_by_name["ModelService"],
    control_pb2.DESCRIPTOR.services_by_name["ControlService"],
]
_HEALTH: Final[Any] = health_pb2.DESCRIPTOR.services_by_name["Health"]


def server_options(config: ServerConfig, *, shared_port: bool) -> list[tuple[str, int]]:
    """Channel arguments; each is tested by its effect, since gRPC ignores names that it does not know."""
    # The longest request and a little more may outlive the age of its connection.
    grace = int((config.limits.max_request_duration + 30) * 1000)
    return [
        ("grpc.so_reuseport", int(shared_port)),  # else a second server takes half of the port's clients, silently
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.max_connection_age_ms", 1_800_000),
        ("grpc.max_connection_age_grace_ms", grace),
        ("grpc.max_connection_idle_ms", 600_000),
        ("grpc.server_handshake_timeout_ms", 5_000),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        # Calls that wait to be taken. gRPC's defaults answer bursts with CANCELLED.
        ("grpc.server.max_pending_requests", 8192),
        ("grpc.server.max_pending_requests_hard_limit", 16384),
        ("grpc.max_receive_message_length", config.limits.max_receive_message_bytes),
        ("grpc.max_send_message_length", config.limits.max_send_message_bytes),
    ]


class GrpcServer:
    """Listens and serves one AsyncEngine. All methods on the event loop that runs the engine."""

    def __init__(
        self,
        engine: AsyncEngine,
        config: ServerConfig,
        *,
        cluster: Cluster,
        frontend: int,
        instance_id: str,
        start_time: float,
        metrics: Metrics | None = None,
        stop_server: Callable[[], None] = lambda: None,
    ) -> None:
        """`frontend` is the index of this front-end; `start_time` the server's, seconds since the epoch.

        `stop_server` is called when an operator asked for a drain with shutdown and the drain is over.
        Raises StartupError (USAGE) when addresses, TLS files or the keys file cannot be used.
        """
        self._engine = engine
        self._config = config
        self._instance_id = instance_id
        self._metrics = metrics
        self._serves_admin = bool(config.admin_address) and frontend % config.frontend_processes == 0
        self._certificates = certificates(config)
        self._keys = ApiKeys(config.api_keys_file) if config.api_keys_file else None
        self._check_addresses()
        names = [service.full_name for service in _SERVICES]
        self._health = HealthService(names, empty_is_readiness=config.health_default == "readiness")
        self._control = ControlService(
            engine,
            config,
            cluster=cluster,
            instance_id=instance_id,
            start_time=start_time,
            stop_server=stop_server,
        )
        self.generation = GenerationService(engine, metrics)
        self._advertises = True
        self._servers: list[Any] = []
        self._pipelines: list[Pipeline] = []
        self.admin_address = ""
        """Where the admin port listens, after `start`; empty without one."""
        engine.on_state_change(self._state_changed)
        self._state_changed(engine.state)

    async def start(self) -> str:
        """Listens. Returns the public address with the port in use. Raises StartupError (USAGE)."""
        public = await self._listen(self._config.address, on_admin_port=False)
        if self._serves_admin:
            self.admin_address = await self._listen(self._config.admin_address, on_admin_port=True)
        for server in self._servers:
            await server.start()
        return public

    def stop_advertising(self) -> None:
        """Health says NOT_SERVING from now on; requests are still taken. The first step of a shutdown."""
        self._advertises = False
        self._health.set_ready(False)
        self._control.stop()

    async def stop(self, grace: float) -> None:
        """Closes the ports at once; RPCs that still answer have `grace` seconds, those that wait for their clients end.
        Safe to call twice."""
        self.stop_advertising()
        self._health.stop()
        for pipeline in self._pipelines:
            pipeline.stop()
        await asyncio.gather(*(server.stop(grace) for server in self._servers))
        if self.admin_address.startswith("unix:"):
            _check_socket_path(self.admin_address).unlink(missing_ok=True)

    def _state_changed(self, state: EngineState) -> None:
        self._health.set_ready(self._advertises and state is EngineState.READY)

    # --- ports

    def _check_addresses(self) -> None:
        config = self._config
        for option, address in (("--address", config.address), ("--admin-address", config.admin_address)):
            if not address:
                continue
            if address.startswith("unix:"):
                _check_socket_path(address)
                continue
            split_address(address)
            if self._certificates is None and not is_loopback(address) and not config.insecure_allow_remote:
                raise _usage(f"{option} {address}: a remote address needs TLS, or --insecure-allow-remote")
        is_tcp_admin = bool(config.admin_address) and not config.admin_address.startswith("unix:")
        if is_tcp_admin and (self._certificates is None or self._keys is None):
            raise _usage("--admin-address on TCP needs TLS and --api-keys-file")

    async def _listen(self, address: str, *, on_admin_port: bool) -> str:
        is_unix = address.startswith("unix:")
        shared = self._config.frontend_processes > 1 and not on_admin_port and not is_unix
        options = server_options(self._config, shared_port=shared)
        options.append(("grpc.enable_channelz", int(self._serves_admin)))
        server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers(tuple(self._handlers(on_admin_port=on_admin_port, is_unix=is_unix)))
        self._servers.append(server)
        if is_unix:
            return _bind_unix(server, address)
        return _bind(server, address, self._certificates)

    def _handlers(self, *, on_admin_port: bool, is_unix: bool) -> list[Any]:
        pipeline = Pipeline(
            # The admin socket is guarded by its mode.
            keys=None if on_admin_port and is_unix else self._keys,
            on_admin_port=on_admin_port,
            instance_id=self._instance_id,
            max_message=self._config.limits.max_send_message_bytes,
            max_duration=self._config.limits.max_request_duration,
            observe=self._metrics.rpc if self._metrics is not None else None,
        )
        self._pipelines.append(pipeline)
        servicers = [self.generation, ModelService(self._engine), self._control]
        handlers = [pipeline.service(*pair) for pair in zip(_SERVICES, servicers, strict=True)]
        handlers.append(pipeline.service(_HEALTH, self._health, is_open=True))
        if self._config.reflection:
            names = [service.full_name for service in [*_SERVICES, _HEALTH]]
            handlers += reflection_handlers(pipeline, names)
        if on_admin_port:
            handlers += channelz_handlers(pipeline)
        return [*handlers, pipeline.fallback()]


def _bind(server: Any, address: str, certs: Certificates | None) -> str:
    try:
        if certs is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, certs.credentials())
    except RuntimeError:
        raise _usage(f"{address}: cannot listen; the address is in use or not of this machine") from None
    host, _ = split_address(address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind_unix(server: Any, address: str) -> str:
    """gRPC unlinks whatever socket is there, so somebody else's has to be noticed before."""
    path = _check_socket_path(address)
    if path.exists() and is_listening(path):
        raise _usage(f"{path}: a server listens on this socket")
    umask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError:
        raise _usage(f"{path}: cannot create the socket") from None
    finally:
        os.umask(umask)
    return f"unix:{path}"


def _check_socket_path(address: str) -> Path:
    path = Path(address.removeprefix("unix:").removeprefix("//"))
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise _usage(f"{path}: longer than the {MAX_SOCKET_PATH} bytes that a unix socket's path may have")
    return path


def _usage(message: str) -> StartupError:
    return StartupError(StartupError.USAGE, message)
