"""Logs never stand in the way of work, and cannot be forged."""

import logging
import queue

import pytest
from octavo import log


@pytest.fixture
def pipe():
    yield log.configure("test")
    log.unconfigure()


def test_a_message_cannot_forge_a_line(pipe, capsys):
    logging.getLogger("octavo.x").warning("id %s", "a\n2026 octavo core[1] ERROR forged\x1b[31m")
    formatted = pipe.format(logging.makeLogRecord({"msg": "a\nb\x1b", "levelname": "INFO", "levelno": 20}))
    assert "\n" not in formatted
    assert "\x1b" not in formatted
    assert "a\\nb\\x1b" in formatted


def test_a_long_message_is_cut_and_a_traceback_kept(pipe):
    try:
        raise ValueError("inside")
    except ValueError as error:
        record = logging.makeLogRecord(
            {"msg": "x" * 100_000, "levelname": "ERROR", "exc_info": (type(error), error, error.__traceback__)}
        )
    formatted = pipe.format(record)
    assert len(formatted) < 10_000
    assert formatted.endswith("ValueError: inside")


def test_records_that_stderr_does_not_take_are_dropped_and_counted(pipe):
    pipe._writer.stop()
    pipe.queue = queue.Queue(2)
    for i in range(5):
        logging.getLogger("octavo.x").warning("%d", i)
    assert pipe.dropped == 3
    pipe._writer.start()
