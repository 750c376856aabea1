"""The tcp transport against a model: whatever is ordered at once, by either side, in whatever sizes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from computemesh.peer.tcp import TcpEndpoint, TcpLink
from computemesh.peer.tcp.wire import EAGER_MAX
from computemesh.peer.transport import Copy, LocalRegion, Outcome, RemoteRegion
from tests.unit.tcp_peers import Settled, connect, exposed, region

SLOT = 600_000
SLOTS = 6
"""Of either side's memory. What is ordered at once touches none twice, for then the outcome would be open."""


@dataclass(repr=False)
class Side:
    endpoint: TcpEndpoint
    link: TcpLink
    buffer: bytearray
    model: bytearray
    registered: LocalRegion
    seen: RemoteRegion
    epoch: int = 1
    messages: deque[bytes] = field(default_factory=deque[bytes])
    """That the other side has sent, and that were not taken."""
    numbers: deque[int] = field(default_factory=deque[int])

    def register(self) -> None:
        """Again, under the same handle."""
        self.endpoint.conceal(self.registered)
        self.epoch += 1
        self.registered = region(self.buffer, handle=1, epoch=self.epoch)
        self.seen = exposed(self.endpoint, self.registered)


def make(endpoint: TcpEndpoint, link: TcpLink, seed: int) -> Side:
    content = random.Random(seed).randbytes(SLOT * SLOTS)
    buffer = bytearray(content)
    registered = region(buffer)
    return Side(endpoint, link, buffer, bytearray(content), registered, exposed(endpoint, registered))


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda lanes: f"{lanes} lanes")
def sides(request: pytest.FixtureRequest) -> Iterator[tuple[Side, Side]]:
    a, b = TcpEndpoint(lanes=request.param), TcpEndpoint(lanes=request.param)
    ours, theirs = connect(a, b)
    yield make(a, ours, 1), make(b, theirs, 2)
    a.close()
    b.close()


def order(rng: random.Random, here: Side, there: Side, own: list[int], other: list[int]) -> tuple[Settled, str]:
    """Orders something in one slot of either side, and does the same to the model; what is to come of it."""
    kind = rng.choice(["read", "write"])
    mine, theirs = own.pop() * SLOT, other.pop() * SLOT
    copies: list[Copy] = []
    plan: list[tuple[int, int, int]] = []
    at_mine = at_theirs = 0
    for _ in range(rng.choice([1, 1, 2, 5, 300])):
        size = rng.choice([0, 1, rng.randrange(100), rng.randrange(20_000), rng.randrange(300_000)])
        size = min(size, SLOT - at_mine, SLOT - at_theirs)
        plan.append((mine + at_mine, theirs + at_theirs, size))
        copies.append(Copy(here.registered, mine + at_mine, there.seen, theirs + at_theirs, size))
        at_mine += size
        at_theirs += size
    rng.shuffle(copies)
    expected = ""
    if rng.random() < 0.1:
        # Refused as a whole only if it is one question; so it is one piece.
        beyond = rng.random() < 0.5
        stale = RemoteRegion("r1", there.epoch - 1 if there.epoch > 1 else 99, SLOT, writable=True, token={"handle": 1})
        size = rng.choice([1, 1000, 300_000])
        copies = [Copy(here.registered, mine, there.seen if beyond else stale, SLOT * SLOTS - size + 1, size)]
        expected = "out_of_range" if beyond else "stale_epoch"
        plan = []
    for own_at, other_at, size in plan:
        if kind == "read":
            here.model[own_at : own_at + size] = there.model[other_at : other_at + size]
        else:
            there.model[other_at : other_at + size] = here.model[own_at : own_at + size]
    imm = rng.randrange(2**32) if kind == "write" and rng.random() < 0.3 else None
    settled = Settled()
    drive = here.link.order("read" if kind == "read" else "write", copies, settled, imm=imm)
    if imm is not None and not expected:
        there.numbers.append(imm)
    if drive is not None and rng.random() < 0.5:
        drive(rng.choice([None, 0, 0.001]))
    return settled, expected


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_memory_messages_and_numbers_are_as_in_the_model(sides: tuple[Side, Side], seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(rng.randrange(1, 6)):
        if rng.random() < 0.2:
            rng.choice(sides).register()
        free = {id(side): rng.sample(range(SLOTS), SLOTS) for side in sides}
        begun: list[tuple[Settled, str]] = []
        received: list[tuple[Settled, bytearray, bytes]] = []
        for _ in range(rng.randrange(1, 16)):
            here, there = rng.sample(sides, 2)
            what = rng.random()
            if what < 0.5 and free[id(here)] and free[id(there)]:
                begun.append(order(rng, here, there, free[id(here)], free[id(there)]))
            elif what < 0.75:
                size = rng.choice([0, rng.randrange(5000), EAGER_MAX, EAGER_MAX + 1, rng.randrange(700_000)])
                message = rng.randbytes(size)
                there.messages.append(message)
                begun.append((settled := Settled(), ""))
                here.link.send(memoryview(message), settled)
            elif here.messages:
                message = here.messages.popleft()
                into = bytearray(len(message) + rng.randrange(3))
                received.append((settled := Settled(), into, message))
                here.link.recv(memoryview(into), settled)
        for side in sides:
            while side.messages:
                message = side.messages.popleft()
                received.append((settled := Settled(), into := bytearray(len(message)), message))
                side.link.recv(memoryview(into), settled)
        for settled, expected in begun:
            assert settled.wait().code == expected
        for settled, into, message in received:
            assert settled.wait() == Outcome(received=len(message))
            assert into[: len(message)] == message
        for side in sides:
            assert side.buffer == side.model
            numbers = [Settled() for _ in side.numbers]
            for settled in numbers:
                side.link.recv_imm(settled)
            # Orders under way at once end in any order.
            assert sorted(settled.wait().imm or 0 for settled in numbers) == sorted(side.numbers)
            side.numbers.clear()
