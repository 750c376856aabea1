"""RDMA in this process: its interfaces, the memory that is registered with them, and a thread for all of its links.

The thread sleeps until an interface has done something. One that is refused by an interface is lost: a peer that asks
for bytes outside of a region, or with a key that is not, ends its own link and no other.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import itertools
import logging
import os
import secrets
import selectors
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec

from computemesh.contracts.peers import Transport
from computemesh.peer.rdma import nics
from computemesh.peer.rdma.link import DEPTH, RdmaLink
from computemesh.peer.rdma.memory import Exposed, Exposures
from computemesh.peer.rdma.nics import Gid, Near, Nic, NicPort
from computemesh.peer.rdma.notes import BUFFERS
from computemesh.peer.rdma.verbs import Access, Completions, Device, Memory, Pair, Remote, Verbs, load
from computemesh.peer.transport import NO_WAY, LocalRegion, Parties, TransportError

logger: Final = logging.getLogger(__name__)

PAIRS_MAX: Final = 64

CONCEAL_S: Final = 5.0
"""How long peers are waited for that still use a region. Then it ends all the same, and their links with it."""

TICK_S: Final = 0.25


class QueuePair(msgspec.Struct, frozen=True):
    """One of the peer's."""

    number: Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]
    psn: Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]


class Hand(msgspec.Struct, frozen=True, kw_only=True):
    """What the two ends tell each other so that their pairs find each other; an offer, and the answer to it."""

    device: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    port: Annotated[int, msgspec.Meta(ge=1, le=255)]
    link_type: Annotated[str, msgspec.Meta(max_length=40)]
    gid: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    lid: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    mtu: Annotated[int, msgspec.Meta(ge=1, le=5)]
    reads: Annotated[int, msgspec.Meta(ge=1, le=255)]
    """How many a pair may have under way."""
    pairs: Annotated[list[QueuePair], msgspec.Meta(min_length=1, max_length=PAIRS_MAX)]
    wants: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    """Which device the other end is to take."""


@dataclass(slots=True)
class Half:
    """One end of a link before the other is known."""

    device: Device
    port: NicPort
    gid: Gid
    completions: Completions
    pairs: Sequence[Pair]
    hand: Hand

    def close(self) -> None:
        for pair in self.pairs:
            pair.close()
        self.completions.close()


class RdmaEndpoint:
    """See :class:`computemesh.peer.transport.Endpoint`.

    Attributes:
        refused: links that were lost since their peer could not prove who it is, or spoke out of turn.
    """

    name: Transport = "rdma"

    def __init__(self, device: str | None = None, *, verbs: Verbs | None = None, near: Near | None = None) -> None:
        """Opens nothing yet.

        Args:
            device: the interface that is taken where nothing else is asked for.
            verbs: by default what :func:`load` finds.
            near: what interfaces should be near to; by default the processors that this process may run on.
        """
        self.refused = 0
        self._preferred = device
        self._near = near
        self._verbs = verbs
        self._lock = threading.RLock()
        self._devices: dict[str, Device] = {}
        self._exposures = Exposures()
        self._numbers = itertools.count(1)
        self._offers: dict[str, Half] = {}
        self._links: set[RdmaLink] = set()
        self._reactor: _Reactor | None = None
        self._closed = False

    # --- what there is ------------------------------------------------------------------------------------------

    def absent(self) -> str:
        try:
            found = nics.read()
            nics.choose(self._nics() if found else [], device=None, port=1)
        except (ImportError, LookupError) as error:
            return str(error)
        return ""

    def facts(self) -> Mapping[str, Any]:
        try:
            found = self._nics() if nics.read() else []
        except ImportError:
            found = []
        return {"nics": [nics.describe(nic, self._mtu) for nic in found]}

    def stats(self) -> Mapping[str, int]:
        """`links` there are, and `refused`: those whose peer could not prove who it is, or spoke out of turn."""
        return {"links": len(self._links), "refused": self.refused}

    def _speaks(self) -> Verbs:
        with self._lock:
            if self._verbs is None:
                self._verbs = load()
            return self._verbs

    def _nics(self) -> list[Nic]:
        """Those that can be opened, the best first."""
        there = set(self._speaks().devices())
        near = nics.here(processors=os.sched_getaffinity(0)) if self._near is None else self._near
        return nics.rank([nic for nic in nics.read() if nic.name in there], near, self._preferred)

    def _mtu(self, name: str, port: int) -> int:
        try:
            return nics.MTUS.get(self._open(name).port(port).mtu, 0)
        except OSError:
            return 0

    def _open(self, name: str) -> Device:
        with self._lock:
            if self._closed:
                raise OSError("the endpoint was closed")
            device = self._devices.get(name)
            if device is None:
                device = self._devices[name] = self._speaks().open(name)
            return device

    # --- memory -------------------------------------------------------------------------------------------------

    def expose(self, region: LocalRegion) -> Mapping[str, Any] | None:
        writes = region.view is None or not region.view.readonly
        access = Access(local_write=writes, remote_read=True, remote_write=region.writable and writes)
        memories: dict[str, Memory] = {}
        for nic in self._nics():
            if not any(port.state == "ACTIVE" for port in nic.ports):
                continue
            try:
                device = self._open(nic.name)
                register = device.register_gpu if region.view is None else device.register
                memories[nic.name] = register(region.address, region.length, access)
            except OSError as error:
                logger.warning("region %s cannot be registered with %s: %s", region.name, nic.name, error)
        if not memories:
            return None
        exposed = Exposed(next(self._numbers), memories)
        self._exposures.add(region, exposed)
        keys = {name: memory.rkey for name, memory in memories.items()}
        return {"number": exposed.number, "address": region.address, "rkey": next(iter(keys.values())), "keys": keys}

    def conceal(self, region: LocalRegion) -> None:
        exposed = self._exposures.pop(region)
        if exposed is None:
            return
        until = time.monotonic() + CONCEAL_S
        with self._lock:
            links = list(self._links)
        for link in links:
            link.revoke(exposed.number)
        for link in links:
            if not link.revoked(exposed.number, until):
                logger.warning("region %s ends while the peer of %s may be using it", region.name, link.detail)
        if not exposed.end(until):
            logger.warning("region %s ends while it is being used here", region.name)
        for memory in exposed.memories.values():
            memory.close()

    # --- links --------------------------------------------------------------------------------------------------

    def offer(self, parties: Parties) -> Mapping[str, Any]:
        options = parties.options
        half = self._half(
            device=_text(options, "local_device"),
            port=_number(options, "ib_port", 1, 255),
            link_type=None,
            pairs=_number(options, "qp_num", 1, PAIRS_MAX),
            min_bw=_text(options, "min_bw"),
            wants=_text(options, "peer_device"),
        )
        with self._lock:
            self._offers[parties.link] = half
        return _told(half.hand)

    def accept(self, parties: Parties, offer: Mapping[str, Any]) -> tuple[RdmaLink, Mapping[str, Any]]:
        theirs = _hand(offer, "offer")
        half = self._half(
            device=theirs.wants, port=theirs.port, link_type=theirs.link_type, pairs=len(theirs.pairs), min_bw=None
        )
        return self._join(half, theirs, parties, first=False), _told(half.hand)

    def establish(self, parties: Parties, answer: Mapping[str, Any]) -> RdmaLink:
        with self._lock:
            half = self._offers.pop(parties.link, None)
        if half is None:
            raise TransportError(NO_WAY, f"link {parties.link!r} was not offered, or was abandoned")
        try:
            theirs = _hand(answer, "answer")
            if len(theirs.pairs) != len(half.pairs):
                raise TransportError(NO_WAY, f"answer: {len(theirs.pairs)} pairs, {len(half.pairs)} were offered")
        except TransportError:
            half.close()
            raise
        return self._join(half, theirs, parties, first=True)

    def abandon(self, parties: Parties) -> None:
        with self._lock:
            half = self._offers.pop(parties.link, None)
        if half is not None:
            half.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            links, halves, reactor = list(self._links), list(self._offers.values()), self._reactor
            self._offers.clear()
        for link in links:
            link.close()
        if reactor is not None:
            reactor.close()
        for half in halves:
            half.close()
        for exposed in self._exposures.drain():
            exposed.end(time.monotonic())
            for memory in exposed.memories.values():
                memory.close()
        for device in self._devices.values():
            device.close()
        self._devices.clear()

    def _half(
        self,
        *,
        device: str | None,
        port: int,
        link_type: str | None,
        pairs: int,
        min_bw: str | None,
        wants: str | None = None,
    ) -> Half:
        try:
            at_least = nics.gbps(min_bw) if min_bw else 0.0
            nic, found, gid = nics.choose(
                self._nics(), device=device, port=port, link_type=link_type, min_gbps=at_least
            )
            opened = self._open(nic.name)
            facts = opened.port(port)
            completions = opened.completions(pairs * DEPTH + BUFFERS + 16)
        except (ImportError, LookupError, ValueError, OSError) as error:
            raise TransportError(NO_WAY, f"rdma: {error}") from error
        made: list[Pair] = []
        try:
            completions.arm()
            while len(made) < pairs:
                receives = 0 if made else BUFFERS  # notes come to the first pair only
                made.append(opened.pair(completions, port=port, sends=DEPTH, receives=receives))
            hand = Hand(
                device=nic.name,
                port=port,
                link_type=found.link_type,
                gid=opened.gid(port, gid.index).hex(),
                lid=facts.lid,
                mtu=facts.mtu,
                reads=opened.reads,
                pairs=[QueuePair(pair.number, secrets.randbits(24)) for pair in made],
                wants=wants,
            )
        except OSError as error:
            for pair in made:
                pair.close()
            completions.close()
            raise TransportError(NO_WAY, f"rdma: {nic.name}: {error}") from error
        return Half(opened, found, gid, completions, made, hand)

    def _join(self, half: Half, theirs: Hand, parties: Parties, *, first: bool) -> RdmaLink:
        mine = half.hand
        if theirs.link_type != mine.link_type:
            half.close()
            raise TransportError(NO_WAY, f"rdma: {mine.device} is {mine.link_type}, the peer's is {theirs.link_type}")
        link: RdmaLink | None = None
        try:
            link = RdmaLink(
                device=half.device,
                completions=half.completions,
                pairs=half.pairs,
                exposures=self._exposures,
                proof=_proof(parties, parties.me, mine),
                expected=_proof(parties, parties.peer, theirs),
                first=first,
                on_gone=self._gone,
            )
            for pair, own, other in zip(half.pairs, mine.pairs, theirs.pairs, strict=True):
                remote = Remote(
                    other.number, other.psn, bytes.fromhex(theirs.gid), theirs.lid, min(mine.mtu, theirs.mtu)
                )
                pair.connect(
                    remote,
                    port=mine.port,
                    gid_index=half.gid.index,
                    psn=own.psn,
                    reads=min(mine.reads, theirs.reads),
                )
        except OSError as error:
            if link is None:
                half.close()
            else:
                link.close()
            raise TransportError(NO_WAY, f"rdma: {mine.device}: {error}") from error
        with self._lock:
            if self._closed:
                link.close()
                raise TransportError(NO_WAY, "rdma: the endpoint was closed")
            if self._reactor is None:
                self._reactor = _Reactor()
            self._links.add(link)
            self._reactor.add(link)
        link.connected(
            theirs.device,
            {
                "local_device": mine.device,
                "peer_device": theirs.device,
                "link_type": mine.link_type,
                "pairs": len(mine.pairs),
                "mtu": nics.MTUS[min(mine.mtu, theirs.mtu)],
            },
        )
        return link

    def _gone(self, link: RdmaLink) -> None:
        with self._lock:
            self.refused += link.refused
            if self._reactor is not None and link in self._links:
                self._links.discard(link)
                self._reactor.remove(link)
            else:
                link.completions.close()


class _Reactor:
    """The thread that sleeps until something is done."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._added: list[RdmaLink] = []
        self._removed: list[RdmaLink] = []
        self._links: set[RdmaLink] = set()
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="computemesh-rdma", daemon=True)
        self._thread.start()

    def add(self, link: RdmaLink) -> None:
        self._tell(self._added, link)

    def remove(self, link: RdmaLink) -> None:
        """Its completions are closed by the thread, which may be about to look at them."""
        self._tell(self._removed, link)

    def close(self) -> None:
        """Waits until the links that were closed are no more."""
        with self._lock:
            self._ends = True
            self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _tell(self, where: list[RdmaLink], link: RdmaLink) -> None:
        with self._lock:
            where.append(link)
            self._wake()

    def _wake(self) -> None:
        if self._wake_fd >= 0:  # the thread may have ended
            os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        look_at = 0.0
        while True:
            self._change()
            with self._lock:
                if self._ends and not self._links and not self._added:
                    self._selector.close()
                    os.close(self._wake_fd)
                    self._wake_fd = -1
                    return
            events = self._selector.select(TICK_S if self._links else None)
            for key, _ in events:
                if key.data is None:
                    os.eventfd_read(self._wake_fd)
                else:
                    self._guarded(key.data, key.data.serve)
            now = time.monotonic()
            if now >= look_at:
                look_at = now + TICK_S
                for link in self._links:
                    self._guarded(link, functools.partial(link.look, now))

    def _change(self) -> None:
        with self._lock:
            added, removed = self._added[:], self._removed[:]
            self._added.clear()
            self._removed.clear()
        for link in added:
            self._links.add(link)
            self._selector.register(link.completions.fd, selectors.EVENT_READ, link)
        for link in removed:
            self._links.discard(link)
            self._selector.unregister(link.completions.fd)
            link.completions.close()

    def _guarded(self, link: RdmaLink, call: Callable[[], None]) -> None:
        """What one link, or who is told of its outcomes, does wrong must not end the others."""
        try:
            call()
        except Exception:
            logger.exception("link %s", link.detail)


def _proof(parties: Parties, who: str, hand: Hand) -> bytes:
    """That `who` knows the key, and that these pairs are its own."""
    said = msgspec.json.encode(["rdma", parties.link, who, hand.gid, [pair.number for pair in hand.pairs]])
    return hmac.digest(parties.key, said, hashlib.sha256)


def _told(hand: Hand) -> Mapping[str, Any]:
    told: dict[str, Any] = msgspec.to_builtins(hand)
    return told


def _hand(said: Mapping[str, Any], what: str) -> Hand:
    try:
        return msgspec.convert(said, Hand)
    except msgspec.ValidationError as error:
        raise TransportError(NO_WAY, f"rdma: {what}: {error}") from error


def _text(options: Mapping[str, Any], name: str) -> str | None:
    value = options.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise TransportError(NO_WAY, f"rdma: {name} must be text, not {value!r}")
    return value


def _number(options: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = options.get(name, 1)
    if not isinstance(value, int) or not least <= value <= most:
        raise TransportError(NO_WAY, f"rdma: {name} must be {least} to {most}, not {value!r}")
    return value
