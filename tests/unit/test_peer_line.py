"""The peer-agent's end of a process's connection, when the process closes its own."""

from __future__ import annotations

import asyncio
import socket

import pytest
from structlog.testing import capture_logs

from computemesh.contracts.peers import Topology, Transferred
from computemesh.peer.frames import pack
from computemesh.peer.signals import Accept, Desired, Done, Ended, Frame, News, Question
from computemesh_services.peer_agent.line import Line

WAIT_S = 10.0
ENDED = Ended(
    outcome=Transferred(transfer_id="t-1", node_id="n1", alias="a", peer="b", kind="read", ok=True, bytes=4, at=1.0)
)


class Heard:
    """What a connection says of its process."""

    def __init__(self) -> None:
        self.asked: list[Question | News] = []
        self.over = asyncio.Event()

    def heard(self, line: Line, number: int, ask: Question | News, fds: tuple[int, ...]) -> None:
        self.asked.append(ask)

    def late(self, line: Line, accept: Accept) -> None:
        raise AssertionError("nothing was asked of the process")

    def refused(self, code: str) -> None:
        raise AssertionError(code)

    def ended(self, line: Line) -> None:
        self.over.set()


@pytest.mark.parametrize("unread", [0, 1, 3])
@pytest.mark.parametrize("told_behind", [False, True])
async def test_a_process_that_ends_is_not_cut_off_and_its_last_words_are_heard(unread: int, told_behind: bool) -> None:
    """Also when it has not read what it was told, or is told something more: neither is worth a warning."""
    here, there = socket.socketpair()
    on = Heard()
    with capture_logs() as logs:
        line = Line(here, 1, on, lambda _: None)
        for number in range(unread):
            line.say(Frame(id=number + 1, answer=Done()))
        there.sendall(pack(Frame(ask=ENDED)))
        there.close()
        if told_behind:
            line.tell(Desired(topology=Topology(alias="a", target_peers=["b"], revision=1)))
            line.tell(Desired(topology=Topology(alias="a", target_peers=["b"], revision=2)))
        await asyncio.wait_for(on.over.wait(), WAIT_S)
    assert on.asked == [ENDED]
    assert not line.open
    assert [entry for entry in logs if entry["log_level"] == "warning"] == []
