"""The control channel: typed lines, an end that is noticed, and nothing else accepted."""

import asyncio
import socket

import pytest
from octavo.ipc import FromChild, FrontendDown, FrontendUp, Heartbeat, Progress, ToChild
from octavo.ipc_channel import MAX_LINE, AsyncChannel, Channel, ProtocolError


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_messages_arrive_in_order_and_typed(pair):
    ours, theirs = pair
    sender, receiver = Channel(ours, FromChild), Channel(theirs, ToChild)
    messages = [FrontendUp(1, "ipc:///x"), FrontendDown(2), FrontendUp(3, "line\nbreak")]
    for message in messages:
        assert sender.send(message)
    assert [receiver.receive() for _ in messages] == messages


def test_end_of_file_is_none_and_sending_says_false(pair):
    ours, theirs = pair
    channel = Channel(ours, FromChild)
    theirs.close()
    assert channel.receive() is None
    assert not channel.send(FrontendDown(1))


def test_half_a_line_at_the_end_is_an_end_not_a_message(pair):
    ours, theirs = pair
    theirs.sendall(b'{"type":"progress","text":"x"}')
    theirs.close()
    assert Channel(ours, FromChild).receive() is None


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"garbage\n",
        b'{"type":"nonsense"}\n',
        b'{"type":"progress"}\n',
        b'{"type":"progress","text":3}\n',
        b"[" * 9999 + b"\n",
    ],
)
def test_what_is_no_message_is_a_protocol_error(pair, line):
    ours, theirs = pair
    theirs.sendall(line)
    with pytest.raises(ProtocolError):
        Channel(ours, FromChild).receive()


async def test_asyncio_end_speaks_to_the_blocking_end(pair):
    ours, theirs = pair
    parent = await AsyncChannel.open(ours, FromChild)
    child = Channel(theirs, ToChild)
    assert parent.send(FrontendUp(0, "ipc:///a"))
    assert await asyncio.to_thread(child.receive) == FrontendUp(0, "ipc:///a")
    child.send(Heartbeat(steps=3, busy=True))
    child.send(Progress("loading"))
    assert await parent.receive() == Heartbeat(steps=3, busy=True)
    assert await parent.receive() == Progress("loading")
    child.close()
    assert await parent.receive() is None
    parent.close()


async def test_asyncio_end_refuses_garbage(pair):
    ours, theirs = pair
    parent = await AsyncChannel.open(ours, FromChild)
    theirs.sendall(b"{}\n")
    with pytest.raises(ProtocolError):
        await parent.receive()
    parent.close()


async def test_a_peer_that_does_not_read_is_given_up_not_waited_for(pair):
    ours, _ = pair
    parent = await AsyncChannel.open(ours, FromChild)
    text = "x" * (MAX_LINE // 4)
    sent = 0
    while parent.send(Progress(text)) and sent < 20:
        sent += 1
    assert sent < 20
    parent.close()
