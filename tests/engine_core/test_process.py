"""The core's sockets to the front-ends: nothing that a front-end does or fails to do makes the core wait."""

import time

import msgspec
import pytest
import zmq
from octavo.engine_core.process import PIPE_MESSAGES, FrontendPipes
from octavo.ipc import PrefixCacheReset, ToFrontend


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def receiver(context, address):
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.RCVTIMEO, 2000)
    socket.bind(address)
    return socket


def received(socket, count):
    decoder = msgspec.msgpack.Decoder(ToFrontend)
    return [decoder.decode(socket.recv()).call_id for _ in range(count)]


def test_messages_before_the_front_end_is_known_wait_for_it_in_order(context, tmp_path):
    address = f"ipc://{tmp_path}/f.sock"
    pipes = FrontendPipes(context)
    assert pipes.send(3, [PrefixCacheReset(1, 0), PrefixCacheReset(2, 0)])
    assert pipes.send(3, [PrefixCacheReset(3, 0)])
    socket = receiver(context, address)
    pipes.open(3, address)
    assert pipes.send(3, [PrefixCacheReset(4, 0)])
    assert received(socket, 4) == [1, 2, 3, 4]


@pytest.mark.parametrize("listening", [True, False], ids=["does not read", "is not there"])
def test_a_front_end_that_does_not_take_its_messages_costs_no_waiting_and_is_given_up(context, tmp_path, listening):
    address = f"ipc://{tmp_path}/f.sock"
    pipes = FrontendPipes(context)
    if listening:
        receiver(context, address)
    pipes.open(1, address)
    message = PrefixCacheReset(1, 0)
    slowest, sent = 0.0, 0
    while True:
        before = time.monotonic()
        taken = pipes.send(1, [message] * 100)
        slowest = max(slowest, time.monotonic() - before)
        if not taken:
            break
        sent += 100
        assert sent < 100 * PIPE_MESSAGES
    assert slowest < 0.5
    assert pipes.is_dead(1)
    assert pipes.send(1, [message])  # nothing to complain of any more


def test_a_front_end_that_never_comes_up_is_given_up_as_well(context):
    pipes = FrontendPipes(context)
    assert pipes.send(1, [PrefixCacheReset(1, 0)] * PIPE_MESSAGES)
    assert not pipes.send(1, [PrefixCacheReset(1, 0)])
    assert pipes.is_dead(1)


def test_a_dead_number_is_never_used_again(context, tmp_path):
    pipes = FrontendPipes(context)
    pipes.close(2)
    pipes.open(2, f"ipc://{tmp_path}/f.sock")
    assert pipes.is_dead(2)
