"""Fixtures: a fake server for each test, and the clients that talk to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from client.fake_server import FakeServer, running
from octavo.client import AsyncClient, Client


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running() as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.address) as opened:
        yield opened


@pytest.fixture
async def aclient(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address) as opened:
        yield opened
