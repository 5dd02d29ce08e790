"""Logging of all processes: standard library, one format, to stderr, and never in anybody's way.

Records go through a bounded queue to a thread that writes them: a full disk, a closed stderr or a blocked pipe costs
records (counted), never a step or a request. Nothing here knows prompts or outputs; callers must not log them. Control
characters in a message are escaped, so that an id from outside cannot forge a line.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import queue
import sys
import time

MAX_MESSAGE = 4096
"""Characters of a message; a traceback may have four times as many."""
MAX_RECORDS = 4096
"""Records that may wait for stderr."""
LOGGERS = ("octavo", "asyncio", "py.warnings")


class _Formatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z octavo core[4711] WARNING message`"""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s octavo {process}[%(process)d] %(levelname)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _printable(record.message)[:MAX_MESSAGE]
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        return super().formatException(ei)[-4 * MAX_MESSAGE :]  # type: ignore[arg-type]


class LogPipe(logging.handlers.QueueHandler):
    """The handler of a process: hands records to its writer thread, drops and counts what does not fit."""

    queue: queue.Queue[logging.LogRecord]

    def __init__(self, process: str) -> None:
        super().__init__(queue.Queue(MAX_RECORDS))
        self.dropped = 0
        """Records lost because stderr did not take them."""
        self.setFormatter(_Formatter(process))
        stream = _Stderr()
        stream.setFormatter(logging.Formatter("%(message)s"))
        self._writer = logging.handlers.QueueListener(self.queue, stream)
        self._writer.start()

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def flush(self) -> None:
        """Waits up to half a second for what is queued: before an exit that skips everything."""
        deadline = time.monotonic() + 0.5
        while not self.queue.empty() and time.monotonic() < deadline:
            time.sleep(0.005)


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """stderr as it is now; what it refuses is lost without a word."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def configure(process: str, level: int = logging.INFO) -> LogPipe:
    """Sends the records of the `octavo` loggers to stderr under the name of this process. Called once, by its main."""
    pipe = LogPipe(process)
    logging.getLogger("octavo").setLevel(level)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.handlers = [pipe]
    logging.captureWarnings(True)
    return pipe


def unconfigure() -> None:
    """Writes out what `configure`'s handler still has and removes it."""
    flush()
    logging.captureWarnings(False)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.propagate = True
        logger.handlers = []


def flush() -> None:
    """Flushes what `configure` installed, if it did."""
    for handler in logging.getLogger("octavo").handlers:
        with contextlib.suppress(Exception):
            handler.flush()


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text
    )
