"""GenerationService: one operation in three shapes, all over AsyncEngine."""

from __future__ import annotations

import time

from octavo_proto.v1 import generation_pb2 as pb

from octavo.errors import Reason, RequestError
from octavo.frontend.async_engine import AsyncEngine
from octavo.metrics import Metrics
from octavo.server import convert, plain
from octavo.server.requests import ActiveRequest, request_of
from octavo.server.rpc import REQUEST_ID, Call
from octavo.server.session import Session, SessionTimes

STUCK_SECONDS = 0.5
"""That a failed request's last text may take to be written before the status goes without it."""


class GenerationService:
    """The servicer. Its methods are called by `rpc.Pipeline`."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics | None, *, times: SessionTimes | None = None) -> None:
        self._engine = engine
        self._metrics = metrics
        self._times = times or SessionTimes()

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> pb.GenerateResponse:
        async with self._open(request, call, streaming=False) as active:
            return await active.collect()

    async def StreamGenerate(self, request: pb.StreamGenerateRequest, call: Call) -> None:
        async with self._open(request_of(request), call, streaming=True) as active:
            active.handle.on_failure(lambda error: call.end_if_stuck(error, _grace(error)))
            handle = active.handle
            while True:
                news = active.take_plain(time.monotonic())
                raw = active.take() if news is None else plain.stream_response(*news)
                if not raw:
                    if handle.state.taken:
                        return
                    await handle.wait()
                elif len(raw) <= call.max_message:
                    await call.write_raw(raw)
                else:
                    for part in convert.split_response(pb.StreamGenerateResponse.FromString(raw), call.max_message):
                        await call.write(part)

    async def GenerateSession(self, call: Call) -> None:
        await Session(self._engine, call, self._metrics, self._times).run()

    def _open(self, request: pb.GenerateRequest, call: Call, *, streaming: bool) -> ActiveRequest:
        if REQUEST_ID.fullmatch(request.request_id):
            call.request_id = request.request_id
        return ActiveRequest(
            self._engine,
            request,
            call,
            request_id=call.request_id,
            deadline=call.deadline,
            streaming=streaming,
            metrics=self._metrics,
        )


def _grace(error: RequestError) -> float:
    return 0.0 if error.reason is Reason.SLOW_READER else STUCK_SECONDS
