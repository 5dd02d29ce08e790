"""The engine-core process: `python -m octavo.engine_core.process --fd N`, started by the supervisor.

Four threads, one owner for each thing:

    control    reads the supervisor's messages into the inbox; its end of file ends the process
    input      reads the front-ends' messages from the bound socket into the inbox
    heartbeat  tells the supervisor once a second how many steps were made
    main       owns the engine core and the sockets to the front-ends:
               drain the inbox, step, send; waits on the inbox while there is no work

Nothing here waits for a front-end: one whose pipe is full has its sequences aborted and is reported as stalled. What
escapes from a step is a bug or a dead device: log it and exit, the supervisor starts a new process.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import os
import queue
import signal
import sys
import threading
from typing import TYPE_CHECKING, Never

import msgspec
import zmq

from octavo import log
from octavo.errors import StartupError
from octavo.ipc import (
    MAX_FRAME,
    CoreReady,
    FrontendDown,
    FrontendStalled,
    FrontendUp,
    Heartbeat,
    Progress,
    Shutdown,
    StartCore,
    StartFailed,
    ToChild,
    ToCore,
    ToFrontend,
)
from octavo.ipc_channel import Channel, ProtocolError, die_with_parent, socket_of_child

if TYPE_CHECKING:
    from octavo.engine_core.engine_core import EngineCore

PIPE_MESSAGES = 4096
"""Messages (steps) that may wait for one front-end before it counts as stalled."""

logger = logging.getLogger("octavo.engine_core.process")


class CoreProcess:
    """The loop around one `EngineCore`, and its threads."""

    def __init__(self, channel: Channel[ToChild]) -> None:
        self._channel = channel
        self._inbox: queue.SimpleQueue[ToCore | FrontendUp | FrontendDown | Shutdown] = queue.SimpleQueue()
        self._context = zmq.Context()
        self._pipes = FrontendPipes(self._context)
        self._core: EngineCore | None = None
        self._busy = False

    def run(self) -> int:
        """Returns the exit status."""
        start = self._channel.receive()
        if not isinstance(start, StartCore):
            return 1
        threading.Thread(target=self._read_control, name="control", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        try:
            # All threads but those that compute start before the core is built: what binds this one to a core leaves
            # them where they are.
            inputs = self._bind(start.address)
            threading.Thread(target=self._read_inputs, args=(inputs,), name="input", daemon=True).start()
            core = self._core = self._build(start)
        except StartupError as error:
            self._channel.send(StartFailed(error.exit_code, str(error)))
            return error.exit_code
        gc.collect()
        gc.freeze()  # what loading made stays for good: later collections need not look at it
        self._channel.send(CoreReady(core.info))
        self._loop(core)
        return 0  # not closed: the heartbeat still asks for its progress, and the end of the process frees everything

    def _build(self, start: StartCore) -> EngineCore:
        from octavo.engine_core.engine_core import EngineCore  # imports torch: seconds

        return EngineCore(start.config, progress=self._tell)

    def _tell(self, text: str) -> None:
        self._channel.send(Progress(text))

    def _bind(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PULL)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise StartupError(StartupError.USAGE, f"cannot listen in the run directory: {error.strerror}") from None
        return socket

    # --- main loop

    def _loop(self, core: EngineCore) -> None:
        while True:
            if not core.has_work and self._inbox.empty():
                self._busy = False
                if not self._handle(core, self._inbox.get()):
                    return
            self._busy = True
            while not self._inbox.empty():
                if not self._handle(core, self._inbox.get()):
                    return
            for frontend, messages in core.step().items():
                if not self._pipes.send(frontend, messages):
                    logger.error("front-end %d does not take its messages: its requests end", frontend)
                    core.abort_frontend(frontend)
                    self._channel.send(FrontendStalled(frontend))

    def _handle(self, core: EngineCore, message: ToCore | FrontendUp | FrontendDown | Shutdown) -> bool:
        """False when the process is to end."""
        if isinstance(message, Shutdown):
            return False
        if isinstance(message, FrontendUp):
            self._pipes.open(message.frontend, message.address)
            core.frontends[message.frontend] = None  # so that it hears of the load before its first request
        elif isinstance(message, FrontendDown):
            self._pipes.close(message.frontend)
            core.abort_frontend(message.frontend)
        elif not self._pipes.is_dead(message.frontend):
            core.handle(message)
        return True

    # --- the other threads

    def _read_control(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                if isinstance(message, FrontendUp | FrontendDown | Shutdown):
                    self._inbox.put(message)
        except ProtocolError as error:
            logger.error("control channel: %s", error)
        _exit_now(1)  # the supervisor is gone: nobody waits for an answer, and the device must be free

    def _read_inputs(self, socket: zmq.Socket[bytes]) -> None:
        decoder = msgspec.msgpack.Decoder(ToCore)
        while True:
            frame = socket.recv()
            try:
                message = decoder.decode(frame)
            except Exception as error:  # whatever a peer sends costs that message only
                logger.error("dropped a message of %d bytes from a front-end (%s)", len(frame), type(error).__name__)
            else:
                self._inbox.put(message)

    def _progress(self) -> int:
        return 0 if self._core is None else self._core.progress

    def _beat(self) -> None:
        clock = threading.Event()
        while self._channel.send(Heartbeat(steps=self._progress(), busy=self._busy)):
            clock.wait(1.0)


class FrontendPipes:
    """One PUSH socket per front-end. Sending never blocks. Owned by the main thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._early: dict[int, list[bytes]] = {}
        """Messages for front-ends whose requests came before their FrontendUp."""
        self._dead: set[int] = set()
        """Gone or stalled; numbers of front-ends are never used again."""
        self._encoder = msgspec.msgpack.Encoder()

    def open(self, frontend: int, address: str) -> None:
        if frontend in self._dead or frontend in self._sockets:
            return
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, PIPE_MESSAGES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        self._sockets[frontend] = socket
        for data in self._early.pop(frontend, []):
            socket.send(data, zmq.NOBLOCK)

    def close(self, frontend: int) -> None:
        self._dead.add(frontend)
        self._early.pop(frontend, None)
        socket = self._sockets.pop(frontend, None)
        if socket is not None:
            socket.close(linger=0)

    def is_dead(self, frontend: int) -> bool:
        return frontend in self._dead

    def send(self, frontend: int, messages: list[ToFrontend]) -> bool:
        """False when this front-end does not take its messages; it counts as dead from then on."""
        if frontend in self._dead:
            return True
        socket = self._sockets.get(frontend)
        for message in messages:
            data = self._encoder.encode(message)
            try:
                if socket is not None:
                    socket.send(data, zmq.NOBLOCK)
                else:
                    self._wait_for(frontend, data)
            except zmq.Again:
                self.close(frontend)
                return False
        return True

    def _wait_for(self, frontend: int, data: bytes) -> None:
        early = self._early.setdefault(frontend, [])
        if len(early) >= PIPE_MESSAGES:
            raise zmq.Again
        early.append(data)


def _exit_now(status: int) -> Never:
    """Ends the process without waiting for threads, destructors or the device."""
    log.flush()
    os._exit(status)


def _wait_politely() -> None:
    """Before torch is imported: OpenMP threads that wait for each other spin for microseconds, not milliseconds.

    libgomp has no call for it. With its default, a step of the demo model on two threads took 100 to 400 ms instead of
    6 ms whenever something else, a front-end for one, wanted one of the two cores. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # about 50 us: longer than the gap between two kernels


def main() -> None:
    parser = argparse.ArgumentParser(prog="octavo.engine_core.process")
    parser.add_argument("--fd", type=int, required=True, help="the control channel")
    arguments = parser.parse_args()
    die_with_parent()
    _wait_politely()
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides, also when the whole group is signalled
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    log.configure("core")
    channel: Channel[ToChild] = Channel(socket_of_child(arguments.fd), ToChild)
    try:
        status = CoreProcess(channel).run()
    except BaseException:
        logger.critical("the engine core failed", exc_info=sys.exc_info())
        status = 1
    _exit_now(status)


if __name__ == "__main__":
    main()
