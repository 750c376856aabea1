"""What several of these tests need."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from computemesh.peer.tcp import TcpEndpoint
from tests.unit.tcp_peers import Pair


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(TcpEndpoint(), TcpEndpoint())
    yield pair
    pair.close()


@pytest.fixture
def endpoints() -> Iterator[Callable[..., TcpEndpoint]]:
    """Endpoints that are closed at the end."""
    made: list[TcpEndpoint] = []

    def make(host: str | None = None, *, lanes: int = 2, stall_s: float = 30) -> TcpEndpoint:
        made.append(TcpEndpoint(host, lanes=lanes, stall_s=stall_s))
        return made[-1]

    yield make
    for each in made:
        each.close()
