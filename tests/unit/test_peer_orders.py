"""Ends of transfers that cannot be told as they are, or not now."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from prometheus_client import REGISTRY

from computemesh.bus import Bus, NotStored, Where
from computemesh.contracts.base import Role, encode
from computemesh.contracts.peers import Transferred
from computemesh.tasks import end_all
from computemesh_services.peer_agent import orders
from computemesh_services.peer_agent.desk import Name
from computemesh_services.peer_agent.node import Node
from computemesh_services.peer_agent.orders import Orders

WAIT_S = 20.0


def spawn(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.create_task(work)


def untold() -> float:
    return REGISTRY.get_sample_value("computemesh_peer_transfers_untold_total") or 0.0


class Small(Bus):
    """A connection to a server that takes a kilobyte at most, as far as publishing goes."""

    def __init__(self) -> None:
        super().__init__(Where(url="nats://127.0.0.1:1", role=Role.NODE, name="t"))
        self.published: asyncio.Queue[Transferred] = asyncio.Queue()

    async def publish(self, event: Any, payload: Any, *, target: str = "") -> None:
        if len(encode(payload)) > 1024:
            raise NotStored("larger than the server takes")
        self.published.put_nowait(payload)


def ended(transfer_id: str, **said: Any) -> Transferred:
    return Transferred(transfer_id=transfer_id, node_id="n1", alias="a", peer="b", kind="read", ok=True, at=1.0, **said)


async def test_an_end_that_is_larger_than_a_message_is_told_without_its_pieces() -> None:
    """It keeps no other from being told."""
    bus = Small()
    book = Orders(Node("n1", bus, spawn), 10)
    telling = asyncio.create_task(book.tell_forever())
    try:
        book.told(Name("", "a"), ended("t-1", bytes=4, checksums=["0" * 8] * 1000))
        book.told(Name("", "a"), ended("t-2"))
        async with asyncio.timeout(WAIT_S):
            assert [await bus.published.get(), await bus.published.get()] == [ended("t-1", bytes=4), ended("t-2")]
    finally:
        await end_all([telling])


def test_the_ends_that_wait_while_the_bus_is_away_are_bounded_and_the_others_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many a process says."""
    monkeypatch.setattr(orders, "UNTOLD_MAX", 10)
    book = Orders(Node("n1", Small(), spawn), 10)
    before = untold()
    for number in range(15):
        book.told(Name("", "a"), ended(f"t-{number}"))
    assert untold() - before == 5
