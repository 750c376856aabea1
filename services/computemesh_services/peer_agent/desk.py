"""The processes of this node: what they offer, whom they are connected to, and who is to be told what. Pure.

Descriptors are numbers here; whoever takes an effect out of the desk opens, closes and writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from msgspec.structs import replace

from computemesh.contracts.base import Refused
from computemesh.contracts.peers import (
    MEMORY_KEYS_MAX,
    MemoryPut,
    Peer,
    PeerBeat,
    Piece,
    Region,
    Topology,
    Transfer,
    Transport,
)
from computemesh.peer.signals import FDS_MAX, LINKS_MAX, PutRegion


class Name(NamedTuple):
    """Which process: it has one alias in one scope."""

    scope: str
    alias: str


@dataclass(slots=True)
class Link:
    """A connection of a process, as its peer-agent sees it."""

    peer: str
    opening: bool = False
    """It was asked for, and the answer has not gone out yet."""
    ended: str | None = None
    """Why it ended meanwhile; the process is told once it knows that there was one."""


@dataclass(slots=True, eq=False)
class Offer:
    """A piece of memory that a process offers."""

    put: PutRegion
    fd: int
    """Of the object it lies in, or -1."""
    taken: bool = False
    """The control plane knows of it, or hears of it as soon as it can. Until then it may still refuse it."""
    before: Offer | None = None
    """What was taken under the name before; the process still has it, and offers it again if this one is refused."""

    def close(self) -> list[Effect]:
        return [CloseFd(one.fd) for one in (self, self.before) if one is not None and one.fd >= 0]


@dataclass(slots=True, eq=False)
class Process:
    """A process of this node that has said hello."""

    name: Name
    instance: str
    peer: Peer | None = None
    """What the control plane said of it when it was registered."""
    pid: int = 0
    offers: dict[str, Offer] = field(default_factory=dict[str, Offer])
    """By name."""
    epochs_fd: int = -1
    links: dict[str, Link] = field(default_factory=dict[str, Link])
    topology: Topology | None = None
    """What it was told last."""


# --- what is to be done -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TellLost:
    """A process of this node is told that a connection has ended."""

    to: Name
    peer: str
    link: str
    reason: str


@dataclass(frozen=True, slots=True)
class CloseFar:
    """The peer of a connection, on another node, is told that it has ended."""

    peer: str
    link: str
    reason: str


@dataclass(frozen=True, slots=True)
class CloseFd:
    fd: int


@dataclass(frozen=True, slots=True)
class ZeroEpochs:
    """The page of a process that has ended: what others have mapped is not taken for fresh."""

    fd: int


Effect = TellLost | CloseFar | CloseFd | ZeroEpochs


@dataclass(frozen=True, slots=True)
class Found:
    """Regions for one connection, and the descriptors that go along, in the order of their names."""

    regions: list[Region]
    names: list[str]
    fds: list[tuple[int, bool]]
    """The descriptor, and whether the peer may write through it."""


class Desk:
    """Who is here. Nothing of it is stored: processes say it again to the next life of the peer-agent."""

    def __init__(self) -> None:
        self._here: dict[Name, Process] = {}

    def __len__(self) -> int:
        return len(self._here)

    def __iter__(self) -> Iterator[Process]:
        return iter(list(self._here.values()))  # Who is told something may turn out to have ended.

    def get(self, name: Name) -> Process | None:
        return self._here.get(name)

    def regions(self) -> int:
        return sum(len(process.offers) for process in self)

    def links(self) -> int:
        return sum(len(process.links) for process in self)

    def beats(self) -> list[PeerBeat]:
        return [PeerBeat(scope=one.name.scope, alias=one.name.alias, instance=one.instance) for one in self]

    # --- processes ---------------------------------------------------------------------------------------------------

    def enter(self, process: Process, links: Mapping[str, str]) -> None:
        """A process is here, with the connections that it had in the last life of the peer-agent."""
        assert process.name not in self._here, f"{process.name} is here already"
        process.links.update({link: Link(peer=peer) for link, peer in links.items()})
        self._here[process.name] = process

    def leave(self, name: Name, reason: str) -> list[Effect]:
        """A process has ended: those that it was connected to are to hear of it, and its memory is none any more."""
        process = self._here.pop(name)
        effects: list[Effect] = []
        if process.epochs_fd >= 0:
            effects += [ZeroEpochs(process.epochs_fd), CloseFd(process.epochs_fd)]
        for offer in process.offers.values():
            effects += offer.close()
        for link, state in process.links.items():
            effects += self._end_at_peer(name, link, state, reason)
        return effects

    def forget(self, name: Name) -> list[Effect]:
        """A process is no longer here, but has not ended: it says hello again."""
        process = self._here.pop(name)
        effects: list[Effect] = [CloseFd(process.epochs_fd)] if process.epochs_fd >= 0 else []
        for offer in process.offers.values():
            effects += offer.close()
        return effects

    def _end_at_peer(self, name: Name, link: str, state: Link, reason: str) -> list[Effect]:
        """What the other side of a connection is told when it ends on this one."""
        other = self._here.get(Name(name.scope, state.peer))
        if other is not None:
            return self._end(other, link, name.alias, reason)
        if state.ended is not None:  # It is by their word.
            return []
        return [CloseFar(state.peer, link, reason)]

    def _end(self, process: Process, link: str, peer: str, reason: str) -> list[Effect]:
        """A connection of a process ends from the other side."""
        state = process.links.get(link)
        if state is None or state.peer != peer:
            return []
        if state.opening:
            state.ended = reason
            return []
        del process.links[link]
        return [TellLost(process.name, peer, link, reason)]

    # --- memory ------------------------------------------------------------------------------------------------------

    def put_epochs(self, name: Name, fd: int) -> list[Effect]:
        process = self._here[name]
        old, process.epochs_fd = process.epochs_fd, fd
        return [CloseFd(old)] if old >= 0 else []

    def put(self, name: Name, put: PutRegion, fd: int, size: int) -> list[Effect] | Refused:
        """A process offers memory. :meth:`taken` or :meth:`refused` says what the control plane says of it.

        Args:
            fd: of the object it lies in, which is the desk's from now on unless this is refused; -1 without.
            size: of that object, in bytes.
        """
        process = self._here[name]
        if put.name not in process.offers and len(process.offers) >= MEMORY_KEYS_MAX:
            reason = f"{name.alias} offers {MEMORY_KEYS_MAX} regions, and no more are kept"
            return Refused(code="full", reason=reason, field="ask.name", status=503)
        token = put.tokens.get("shm")
        if (fd >= 0) != (token is not None):
            reason = "shared memory has a descriptor and a token of 'shm', anything else neither"
            return Refused(code="bad_message", reason=reason, field="ask.tokens")
        if token is not None and (wrong := _no_place(token, put.length, size)):
            return Refused(code="out_of_range", reason=wrong, field="ask.tokens.shm")
        if token is not None and process.epochs_fd < 0:
            reason = "shared memory needs a page of epochs first: put_epochs"
            return Refused(code="bad_message", reason=reason, field="ask.tokens.shm")
        old = process.offers.get(put.name)
        if old is not None and old.put.epoch > put.epoch:
            reason = f"{put.name} was registered again with epoch {old.put.epoch}"
            return Refused(code="stale_epoch", reason=reason, field="ask.epoch", status=409)
        process.offers[put.name] = new = Offer(put, fd)
        if old is None or old.taken:
            new.before = old
            return []
        new.before, old.before = old.before, None
        return old.close()

    def taken(self, name: Name, put: PutRegion) -> list[Effect]:
        """The control plane knows of a region, or cannot be told now: the one before it is over."""
        offer = self._offered(name, put)
        if offer is None:
            return []
        before, offer.taken, offer.before = offer.before, True, None
        return before.close() if before is not None else []

    def refused(self, name: Name, put: PutRegion) -> list[Effect]:
        """The control plane does not take a region: the one before it is offered as if nothing had been."""
        offer = self._offered(name, put)
        if offer is None:
            return []
        before, offer.before = offer.before, None
        if before is not None:
            self._here[name].offers[put.name] = before
        else:
            del self._here[name].offers[put.name]
        return offer.close()

    def _offered(self, name: Name, put: PutRegion) -> Offer | None:
        """A region that the control plane was asked about, if it is still offered."""
        process = self._here.get(name)
        offer = process.offers.get(put.name) if process is not None else None
        return offer if offer is not None and offer.put is put else None

    def drop(self, name: Name, region: str, epoch: int) -> tuple[bool, list[Effect]]:
        """A process offers memory no longer; what was registered under the name since then stays."""
        process = self._here[name]
        old = process.offers.get(region)
        if old is None or old.put.epoch != epoch:
            return False, []
        del process.offers[region]
        return True, old.close()

    def resolve(self, owner: Name, asker: str, link: str, names: Sequence[str], *, same_host: bool) -> Found | Refused:
        """How a connected peer reaches regions of a process."""
        process = self._here.get(owner)
        if process is None:
            return _no_peer(owner.alias)
        state = process.links.get(link)
        if state is None or state.peer != asker or state.ended is not None:
            return Refused(code="no_link", reason=f"{owner.alias} has no connection {link} with {asker}", status=404)
        found = Found([], [], [])
        for name in dict.fromkeys(names):
            offer = process.offers.get(name)
            if offer is None:
                continue
            put = offer.put
            shared = same_host and offer.fd >= 0
            tokens: dict[Transport, dict[str, Any]] = {
                transport: token for transport, token in put.tokens.items() if transport != "shm" or shared
            }
            found.regions.append(
                Region(name=name, epoch=put.epoch, length=put.length, writable=put.writable, tokens=tokens)
            )
            if shared:
                if not found.fds:
                    found.names.append("")
                    found.fds.append((process.epochs_fd, False))
                found.names.append(name)
                found.fds.append((offer.fd, put.writable))
        if len(found.fds) > FDS_MAX:
            reason = f"{len(found.fds) - 1} regions of shared memory; {FDS_MAX - 1} can be had at once"
            return Refused(code="bad_message", reason=reason, field="ask.body.names")
        return found

    # --- connections -------------------------------------------------------------------------------------------------

    def opening(self, name: Name, peer: str, link: str) -> Refused | None:
        """A connection is being made between a process of this node and a peer."""
        process = self._here.get(name)
        if process is None:
            return _no_peer(name.alias)
        if link in process.links:
            reason = f"{link} is a connection already; each has a name of its own"
            return Refused(code="bad_message", reason=reason, field="body.link")
        if len(process.links) >= LINKS_MAX:
            return Refused(code="full", reason=f"{name.alias} has {LINKS_MAX} connections", status=503)
        process.links[link] = Link(peer=peer, opening=True)
        return None

    def opened(self, name: Name, link: str) -> list[Effect]:
        """The process knows that the connection is there. If it has ended meanwhile, it is told now."""
        process = self._here.get(name)
        state = process.links.get(link) if process is not None else None
        if process is None or state is None:
            return []
        state.opening = False
        return self._end(process, link, state.peer, state.ended) if state.ended is not None else []

    def not_opened(self, name: Name, link: str) -> None:
        """It came to nothing."""
        process = self._here.get(name)
        if process is not None:
            process.links.pop(link, None)

    def close(self, name: Name, peer: str, link: str, reason: str) -> tuple[bool, list[Effect]]:
        """A process ends a connection; whether there was one, and who is to be told."""
        process = self._here[name]
        state = process.links.get(link)
        if state is None or state.peer != peer:
            return False, []
        del process.links[link]
        return True, self._end_at_peer(name, link, state, reason)

    def closed_by_peer(self, name: Name, peer: str, link: str, reason: str) -> tuple[bool, list[Effect]]:
        """A peer on another node has ended a connection with a process of this one."""
        process = self._here.get(name)
        state = process.links.get(link) if process is not None else None
        if process is None or state is None or state.peer != peer:
            return False, []
        return True, self._end(process, link, peer, reason)

    # --- transfers ---------------------------------------------------------------------------------------------------

    def may_move(self, transfer: Transfer) -> Refused | None:
        """Why a transfer cannot be begun, as far as this node knows."""
        process = self._here.get(Name(transfer.scope, transfer.alias))
        if process is None:
            return _no_peer(transfer.alias)
        for number, piece in enumerate(transfer.pieces):
            if (wrong := _no_piece(process, piece)) is not None:
                return replace(wrong, field=f"pieces[{number}].{wrong.field}")
        return None


def view(process: Process, now: float) -> Peer | None:
    """A process of this node as the control plane would tell of it."""
    return process.peer and replace(process.peer, memory_keys=sorted(process.offers), seen_at=now)


def memory_of(process: Process, name: str) -> MemoryPut | None:
    """A region as the control plane keeps it; None when there is none of that name."""
    offer = process.offers.get(name)
    if offer is None:
        return None
    put = offer.put
    rdma = put.tokens.get("rdma", {})
    rkey = rdma.get("rkey", 0)
    return MemoryPut(
        scope=process.name.scope,
        alias=process.name.alias,
        instance=process.instance,
        name=name,
        length=put.length,
        epoch=put.epoch,
        addr=put.address,
        rkey=rkey if isinstance(rkey, int) and 0 <= rkey < 2**32 else 0,
        transports=sorted(put.tokens),
    )


def _no_peer(alias: str) -> Refused:
    return Refused(code="not_found", reason=f"there is no {alias!r} on this node", field="alias", status=404)


def _no_place(token: Mapping[str, Any], length: int, size: int) -> str:
    """Why a region does not lie where its token says; empty when it does."""
    offset = token.get("offset")
    if not isinstance(offset, int) or offset < 0:
        return f"offset {offset!r} is no place in an object"
    if offset + length > size:
        return f"{length} bytes from {offset} on, and the object has {size}"
    return ""


def _no_piece(process: Process, piece: Piece) -> Refused | None:
    offer = process.offers.get(piece.local)
    if offer is None:
        reason = f"{process.name.alias} has no region {piece.local!r}"
        return Refused(code="no_region", reason=reason, field="local", status=404)
    if piece.local_offset + piece.length > offer.put.length:
        reason = f"{piece.length} bytes from {piece.local_offset} on, and {piece.local!r} has {offer.put.length}"
        return Refused(code="out_of_range", reason=reason, field="local_offset")
    return None
