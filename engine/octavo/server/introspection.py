"""Reflection and channelz: the servicers of grpcio-reflection and grpcio-channelz behind `rpc.Pipeline`."""

from __future__ import annotations

from typing import Any

from grpc_channelz.v1 import channelz_pb2
from grpc_channelz.v1._servicer import ChannelzServicer
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from octavo.server.rpc import Call, Pipeline
from octavo.server.statuses import PlainStatus

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
"""The same messages as v1alpha; grpcio-reflection has no descriptor of it, so it is served but not listed."""


class Reflection:
    """The servicer of both versions."""

    def __init__(self, services: list[str]) -> None:
        self._servicer = ReflectionServicer([*services, _v1alpha().full_name])

    async def ServerReflectionInfo(self, call: Call) -> None:
        async for response in self._servicer.ServerReflectionInfo(call.messages(), None):
            await call.write(response)


class Channelz:
    """gRPC's own counters of channels, servers and sockets."""

    def __getattr__(self, name: str) -> Any:
        """Each RPC of the service."""
        function = getattr(ChannelzServicer, name)

        async def method(request: Any, call: Call) -> Any:
            answer = function(request, call.context)
            if answer is None:  # it has set a status
                raise PlainStatus(call.context.code(), call.context.details())
            return answer

        return method


def reflection_handlers(pipeline: Pipeline, services: list[str]) -> list[Any]:
    servicer = Reflection(services)
    return [pipeline.service(_v1alpha(), servicer), pipeline.service(_v1alpha(), servicer, name=REFLECTION_V1)]


def channelz_handlers(pipeline: Pipeline) -> list[Any]:
    return [pipeline.service(channelz_pb2.DESCRIPTOR.services_by_name["Channelz"], Channelz())]


def _v1alpha() -> Any:
    return reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
