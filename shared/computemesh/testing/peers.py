"""Peers of one process without a peer-agent: what it would pass on is passed on here, so cores can be tested alone."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from computemesh.contracts.base import Refused, decode, encode
from computemesh.contracts.peers import Close, Closed, Connect, Peer, PeerMemory, Region, Resolve, Topology
from computemesh.peer.attachment import Attach, OnClosed, OnTold
from computemesh.peer.errors import ALIAS_TAKEN, CLOSED, NOT_FOUND, PeerError
from computemesh.peer.signals import (
    Accept,
    Accepted,
    Aliases,
    Answer,
    Call,
    Called,
    Done,
    DropRegion,
    Ended,
    Frame,
    GetMemory,
    GetPeer,
    Hello,
    ListPeers,
    Lost,
    MemoryFacts,
    PeerFacts,
    PutEpochs,
    PutRegion,
    Question,
    RegionsResolved,
    SetTopology,
    Told,
    TopologyFacts,
    Traffic,
    Welcome,
)


@dataclass
class Seat:
    """One peer's way to the exchange."""

    exchange: Exchange
    welcome: Welcome
    hello: Hello
    on_told: OnTold
    regions: dict[str, tuple[PutRegion, int]] = field(default_factory=dict[str, tuple[PutRegion, int]])
    epochs: int = -1
    links: dict[str, str] = field(default_factory=dict[str, str])
    """By their name, the peer at the other end."""
    asked: list[Question] = field(default_factory=list[Question])
    ended: list[Ended] = field(default_factory=list[Ended])
    reports: list[Traffic] = field(default_factory=list[Traffic])
    away: bool = False
    """There is no peer-agent to tell anything."""
    closed: bool = False

    def ask(
        self, question: Question, fds: Sequence[int] = (), *, timeout_s: float = 30.0
    ) -> tuple[Answer, tuple[int, ...]]:
        frame = decode(
            encode(Frame(id=1, ask=question)), Frame
        )  # What cannot cross a socket does not cross this either.
        assert not isinstance(frame, Refused), frame
        if self.closed:
            raise PeerError(CLOSED, "this agent was shut down")
        self.asked.append(question)
        return self.exchange.answer(self, question, fds)

    def tell(self, said: Ended) -> None:
        self.ended.append(said)

    def report(self, said: Traffic) -> bool:
        if not self.away:
            self.reports.append(said)
        return not self.away

    def close(self) -> None:
        self.exchange.leave(self)


class Exchange:
    """A peer-agent, or several, in the memory of a test. Nothing of it touches what is transferred."""

    def __init__(self) -> None:
        self.seats: dict[tuple[str, str], Seat] = {}
        self._lock = threading.Lock()

    def attach(self, alias: str, *, scope: str = "", node_id: str = "node-1", hello: Hello | None = None) -> Attach:
        """For a `Core`, or the `attach` of a `PeerAgent`. Peers of different nodes share no memory."""

        def to_exchange(on_told: OnTold, on_closed: OnClosed) -> Seat:
            peer = Peer(scope=scope, alias=alias, node_id=node_id, registered_at=0.0, seen_at=0.0, revision=1)
            welcome = Welcome(
                alias=alias,
                scope=scope,
                instance=f"i-{secrets.token_hex(8)}",
                node_id=node_id,
                bus="nats://127.0.0.1:4222",
                peer=peer,
            )
            seat = Seat(self, welcome, hello or Hello(scope=scope, alias=alias), on_told)
            with self._lock:
                if (scope, alias) in self.seats:
                    raise PeerError(ALIAS_TAKEN, f"another peer lives under {alias!r}")
                self.seats[scope, alias] = seat
            return seat

        return to_exchange

    def tell(self, alias: str, told: Told, *, scope: str = "") -> Answer | Refused | None:
        """Says something to a peer."""
        return self.seats[scope, alias].on_told(told)

    def leave(self, seat: Seat) -> None:
        """A peer ends, or is gone."""
        with self._lock:
            if seat.closed:
                return
            seat.closed = True
            self.seats.pop((seat.welcome.scope, seat.welcome.alias), None)
        for _, fd in seat.regions.values():
            _close(fd)
        if seat.epochs >= 0:
            os.pwrite(seat.epochs, bytes(os.fstat(seat.epochs).st_size), 0)
            os.close(seat.epochs)
        for link, alias in seat.links.items():
            other = self.seats.get((seat.welcome.scope, alias))
            if other is not None:
                other.links.pop(link, None)
                other.on_told(Lost(peer=seat.welcome.alias, link=link, reason="the peer has ended"))

    def answer(self, seat: Seat, question: Question, fds: Sequence[int]) -> tuple[Answer, tuple[int, ...]]:
        scope = seat.welcome.scope
        match question:
            case PutEpochs():
                seat.epochs = os.dup(fds[0])
            case PutRegion():
                _, old = seat.regions.get(question.name, (None, -1))
                _close(old)
                seat.regions[question.name] = (question, os.dup(fds[0]) if fds else -1)
            case DropRegion():
                there = seat.regions.get(question.name)
                if there is not None and there[0].epoch == question.epoch:
                    _close(seat.regions.pop(question.name)[1])
            case ListPeers():
                return Aliases(aliases=[alias for space, alias in self.seats if space == scope]), ()
            case GetPeer():
                other = self.seats.get((scope, question.alias))
                return PeerFacts(peer=None if other is None else _peer(other)), ()
            case GetMemory():
                return MemoryFacts(memories=_memories(self._seat(scope, question.alias))), ()
            case SetTopology():
                topology = Topology(
                    scope=scope, alias=seat.welcome.alias, target_peers=question.target_peers, revision=1
                )
                return TopologyFacts(topology=topology), ()
            case Call():
                return self._call(seat, question)
            case _:
                raise AssertionError(f"not asked of an exchange: {question}")
        return Done(), ()

    def _seat(self, scope: str, alias: str) -> Seat:
        seat = self.seats.get((scope, alias))
        if seat is None:
            raise PeerError(NOT_FOUND, f"there is no peer {alias!r}")
        return seat

    def _call(self, seat: Seat, call: Call) -> tuple[Answer, tuple[int, ...]]:
        other = self._seat(seat.welcome.scope, call.peer)
        same_host = seat.welcome.node_id == other.welcome.node_id
        match call.body:
            case Connect() as body:
                accept = Accept(peer=seat.welcome.alias, node_id=seat.welcome.node_id, same_host=same_host, body=body)
                said = other.on_told(accept)
                if isinstance(said, Refused):
                    raise PeerError.of(said)
                assert isinstance(said, Accepted)
                seat.links[body.link] = other.welcome.alias
                other.links[body.link] = seat.welcome.alias
                return Called(body=said.body, same_host=same_host), ()
            case Resolve() as body:
                if body.link not in seat.links:
                    raise PeerError("no_link", "there is no such connection")
                return self._resolve(other, body, same_host)
            case Close() as body:
                seat.links.pop(body.link, None)
                found = other.links.pop(body.link, None) is not None
                other.on_told(Lost(peer=seat.welcome.alias, link=body.link, reason=body.reason))
                return Called(body=Closed(found=found), same_host=same_host), ()

    def _resolve(self, other: Seat, body: Resolve, same_host: bool) -> tuple[Answer, tuple[int, ...]]:
        found: list[Region] = []
        names: list[str] = [""] if same_host and other.epochs >= 0 else []
        fds = [_read_only(other.epochs)] if names else []
        for name in body.names:
            if name not in other.regions:
                continue
            put, fd = other.regions[name]
            found.append(
                Region(name=name, epoch=put.epoch, length=put.length, writable=put.writable, tokens=put.tokens)
            )
            if fd >= 0 and names:
                names.append(name)
                fds.append(os.dup(fd) if put.writable else _read_only(fd))
        return Called(body=RegionsResolved(regions=found, fds=names), same_host=same_host), tuple(fds)


def _peer(seat: Seat) -> Peer:
    welcome = seat.welcome
    return Peer(
        scope=welcome.scope,
        alias=welcome.alias,
        node_id=welcome.node_id,
        resource=seat.hello.resource,
        memory_keys=sorted(seat.regions),
        registered_at=0.0,
        seen_at=0.0,
        revision=1,
    )


def _memories(seat: Seat) -> list[PeerMemory]:
    return [
        PeerMemory(
            scope=seat.welcome.scope,
            alias=seat.welcome.alias,
            name=name,
            length=put.length,
            epoch=put.epoch,
            addr=put.address,
            transports=list(put.tokens),
        )
        for name, (put, _) in sorted(seat.regions.items())
    ]


def _read_only(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def _close(fd: int) -> None:
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)
