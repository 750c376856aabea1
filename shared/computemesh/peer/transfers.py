"""Transfers and messages over the connections of a peer, and what it knows of its peers' memory."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeVar

from computemesh.contracts.peers import PeerMemory, Region, Resolve, Transport
from computemesh.peer.assignments import Wanted, parse
from computemesh.peer.attachment import ASK_S, Attachment
from computemesh.peer.connection import Moved, PeerConnection, Route
from computemesh.peer.connections import Connections
from computemesh.peer.errors import (
    BAD_CHECKSUM,
    BAD_MESSAGE,
    NO_REGION,
    NO_WAY,
    NOT_FOUND,
    OUT_OF_RANGE,
    READ_ONLY,
    STALE_EPOCH,
    PeerError,
)
from computemesh.peer.futures import Gathered, ImmFuture, MessageFuture, PeerFuture, Reading, TransferFuture, UnderWay
from computemesh.peer.memory import Descriptor
from computemesh.peer.regions import LocalRegions, check_name
from computemesh.peer.signals import FDS_MAX, Call, Called, GetMemory, MemoryFacts, RegionsResolved
from computemesh.peer.transport import DONE, Copy, Drive, Endpoint, Link, LocalRegion, Outcome, RemoteRegion

logger: Final = logging.getLogger(__name__)

Kind = Literal["read", "write"]
F = TypeVar("F", bound=PeerFuture)

NAMES_MAX: Final = FDS_MAX - 1
"""Asked for in one question: the answer may have a descriptor for each, and one for the page of epochs."""


class RemoteHandle(NamedTuple):
    """What `get_handle` stands for: one registration of a peer's region, and none after it."""

    peer: str
    name: str
    epoch: int


class _Retrying(TransferFuture):
    """A transfer that is begun once more, with what the peer offers now, when it met a region that is gone."""

    again: Callable[[_Retrying, Outcome], None] | None = None
    terms: tuple[PeerConnection, Kind, object, int | None]

    def settle(self, outcome: Outcome) -> None:
        if outcome.code in (STALE_EPOCH, NO_REGION) and self.again is not None:
            again, self.again = self.again, None
            again(self, outcome)
        else:
            super().settle(outcome)


class Transfers:
    """Moves bytes between the regions of this process and of its peers. Methods may be called from any thread."""

    def __init__(self, life: Attachment, regions: LocalRegions, endpoints: Sequence[Endpoint]) -> None:
        self._life = life
        self.regions = regions
        self.connections = Connections(life, endpoints, self._resolve_again)
        self._first = self.connections.ready
        self.moved: dict[Transport, Moved] = {endpoint.name: Moved() for endpoint in endpoints}
        """By transport."""
        self._under_way = UnderWay()
        """Who begins one says so before it looks whether the memory is still registered, and who ends a region says so
        before it looks here: one of the two sees the other."""
        self._handles: dict[int, RemoteHandle] = {}
        self._handle_of: dict[RemoteHandle, int] = {}
        self._resolving = threading.Lock()

    def memories(self, alias: str) -> list[PeerMemory]:
        """What a peer offers, sorted by name; none if there is no such peer."""
        try:
            return self._life.ask(GetMemory(alias=alias), MemoryFacts).memories
        except PeerError as error:
            if error.code == NOT_FOUND:
                return []
            raise

    def handle(self, name: str, peer: str | None = None) -> int:
        """A number that stands for one registration of a region, here or of a peer.

        Raises:
            PeerError: `no_region`.
        """
        if peer is None or peer == self._life.alias:
            return self.regions.get(name).handle
        conn = self.connections.ready.get(peer)
        if conn is not None:
            remotes = conn.remotes.get(name) or self._learn(conn, [name]).get(name)
            epoch = next(iter(remotes.values())).epoch if remotes else None
        else:
            epoch = next((one.epoch for one in self.memories(peer) if one.name == name), None)
        if epoch is None:
            raise PeerError(NO_REGION, f"peer {peer!r} has no memory region {name!r}")
        key = RemoteHandle(peer, name, epoch)
        with self._life.lock:
            number = self._handle_of.get(key)
            if number is None:
                number = self._handle_of[key] = self.regions.new_handle()
                self._handles[number] = key
        return number

    def transfer(
        self,
        kind: Kind,
        peer: str,
        assign: object,
        imm: int | None = None,
        local_nic: str | None = None,
        remote_nic: str | None = None,
        *,
        epochs: Sequence[int | None] | None = None,
        checksums: Sequence[int | None] | None = None,
        cached_only: bool = False,
    ) -> TransferFuture | None:
        """Begins to move bytes.

        Args:
            epochs: for each assignment, what the peer's region must be a registration of; None where any will do.
            checksums: for each assignment, the CRC-32 that its bytes must have.
            cached_only: return None when the peer-agent would have to be asked first, which blocks.

        Raises:
            PeerError: it cannot be begun: not connected, no such region, out of range, read-only, another epoch.
            TypeError, ValueError: the assignments are none.
        """
        conn = self._first.get(peer)
        if conn is None or local_nic is not None or remote_nic is not None:
            conn = self.connections.connected(peer, local_nic, remote_nic)
        if epochs is not None or checksums is not None:
            wanted = parse(assign)
            if cached_only and not all(_is_known(conn, kind, one) for one in wanted):
                return None
            return self._checked(conn, kind, wanted, imm, epochs, checksums)
        future = _Retrying()
        future.terms = (conn, kind, assign, imm)
        future.again = self._begin_again
        under_way = future.under_way = self._under_way
        under_way.add(future)
        try:
            if imm is None and (quick := _quick(conn.routes, kind, assign)) is not None:
                link, future.copies, moved, total = quick
                if kind == "read":  # As `Moved.count`, without a call.
                    moved.reads += 1
                    moved.bytes_read += total
                else:
                    moved.writes += 1
                    moved.bytes_written += total
                future.transport = link.transport
                future.drive = link.order(kind, future.copies, future.settle)
                return future
            wanted = parse(assign)
            if cached_only and not all(_is_known(conn, kind, one) for one in wanted):
                under_way.discard(future)
                return None
            self._issue(conn, kind, wanted, imm, future)
        except BaseException:
            under_way.discard(future)
            raise
        return future

    def _issue(
        self, conn: PeerConnection, kind: Kind, wanted: Sequence[Wanted], imm: int | None, future: TransferFuture
    ) -> None:
        self._learn_lacking(conn, wanted)
        copies: list[Copy] = []
        by_link: dict[Link, list[Copy]] = {}
        for one in wanted:
            route = conn.routes.get(key(one))
            if route is None or not route.local.live:
                route = self._route(conn, one.local, one.remote)
            elif isinstance(one.remote, str) and _why_not(route, kind, one) is not None:
                self._learn(conn, [one.remote])  # Perhaps it is another one by now, for which it fits.
                route = self._route(conn, one.local, one.remote)
            if (error := _why_not(route, kind, one)) is not None:
                raise error
            copy = Copy(route.local, one.local_offset, route.remote, one.remote_offset, one.length)
            copies.append(copy)
            if one.length:
                by_link.setdefault(route.link, []).append(copy)
        future.copies = copies
        if not all(copy.local.live for copy in copies):
            raise PeerError(NO_REGION, "a memory region was unregistered here just now")
        self._issue_parts(conn, kind, by_link, imm, future)

    def _issue_parts(
        self,
        conn: PeerConnection,
        kind: Kind,
        by_link: Mapping[Link, list[Copy]],
        imm: int | None,
        future: TransferFuture,
    ) -> None:
        """Several links, or a number that must come after the bytes that another link carries."""
        future.transport = "+".join(link.transport for link in by_link) or conn.transport
        links = conn.links
        if not links:
            raise conn.failure()
        for link, copies in by_link.items():
            self.moved[link.transport].count(kind, sum(copy.length for copy in copies))
        if len(by_link) == 1:
            link, copies = next(iter(by_link.items()))
            if imm is None or link is links[-1]:
                future.drive = link.order(kind, copies, future.settle, imm=imm)
                return

        def last(outcome: Outcome) -> None:
            if outcome.code or imm is None:
                future.settle(outcome)
            else:
                future.drive = links[-1].order("write", (), future.settle, imm=imm)

        if not by_link:
            last(DONE)
            return
        gathered = Gathered(len(by_link), last)
        drives = [link.order(kind, copies, gathered.settle) for link, copies in by_link.items()]
        future.drive = future.drive or _drive_all([drive for drive in drives if drive is not None])

    def _route(self, conn: PeerConnection, local_key: str | int, remote_key: str | int) -> Route:
        local = self.regions.get(local_key)
        if isinstance(remote_key, str):
            name, epoch = remote_key, None
        else:
            held = self._handles.get(remote_key)
            if held is None:
                raise PeerError(
                    NO_REGION, f"handle {remote_key} is of no peer's region; get it from get_handle(name, peer)"
                )
            if held.peer != conn.peer_alias:
                raise PeerError(
                    NO_REGION, f"handle {remote_key} is of a region of {held.peer!r}, not of {conn.peer_alias!r}"
                )
            name, epoch = held.name, held.epoch
        remotes = conn.remotes.get(name)
        if remotes is None or (epoch is not None and all(one.epoch < epoch for one in remotes.values())):
            remotes = self._learn(conn, [name]).get(name)
        if not remotes:
            raise PeerError(NO_REGION, f"peer {conn.peer_alias!r} has no memory region {name!r}")
        if epoch is not None and all(one.epoch != epoch for one in remotes.values()):
            raise PeerError(
                STALE_EPOCH, f"handle {remote_key}: {conn.peer_alias!r} has registered {name!r} again since"
            )
        for link in conn.links:
            remote = remotes.get(link.transport)
            if remote is None:
                continue
            if ("rdma" in local.tokens) if link.transport == "rdma" else (local.view is not None):
                kinds = ("read", "write") if remote.writable else ("read",)
                route = Route(local, remote, link, local.length, remote.length, kinds, self.moved[link.transport])
                conn.routes[local_key, remote_key] = route
                if local_key == remote_key:
                    conn.routes[local_key] = route
                return route
        if conn.state == "failed":
            raise conn.failure()
        raise PeerError(
            NO_WAY,
            f"{conn.transport} reaches region {name!r} of {conn.peer_alias!r}, or {local.name!r} here, in no way",
        )

    def _learn_lacking(self, conn: PeerConnection, wanted: Sequence[Wanted]) -> None:
        """Asks at once for all regions of an order that nothing is known of, as those of the layers of a model."""
        lacking: dict[str, None] = {}
        for one in wanted:
            held = None if isinstance(one.remote, str) else self._handles.get(one.remote)
            name = one.remote if isinstance(one.remote, str) else held.name if held is not None else None
            if name is not None and name not in conn.remotes:
                lacking[name] = None
        if len(lacking) > 1:
            self._learn(conn, list(lacking))

    def _learn(
        self, conn: PeerConnection, names: Sequence[str], timeout_s: float = ASK_S
    ) -> dict[str, dict[str, RemoteRegion]]:
        """Asks where regions of the peer are, and remembers; those that are gone are forgotten."""
        names = [check_name(name) for name in names]
        found: dict[str, dict[str, RemoteRegion]] = {}
        with self._resolving:
            for first in range(0, len(names), NAMES_MAX):
                found.update(self._learn_some(conn, names[first : first + NAMES_MAX], timeout_s))
        return found

    def _learn_some(
        self, conn: PeerConnection, names: list[str], timeout_s: float
    ) -> dict[str, dict[str, RemoteRegion]]:
        question = Call(peer=conn.peer_alias, body=Resolve(link=conn.link_id, names=names))
        answer, came = self._life.signals.ask(question, timeout_s=timeout_s)
        descriptors = [Descriptor(fd) for fd in came]
        said = answer.body if isinstance(answer, Called) else None
        if not isinstance(said, RegionsResolved):
            raise PeerError(BAD_MESSAGE, "the peer-agent answered something else than where the regions are")
        fds = dict(zip(said.fds, descriptors, strict=False))
        with self._life.lock:
            if not conn.links:
                raise conn.failure()
            found: dict[str, dict[str, RemoteRegion]] = {}
            for region in said.regions:
                before = conn.remotes.get(region.name)
                same = before and all(one.epoch == region.epoch for one in before.values())
                found[region.name] = before if before and same else _remotes(region, conn.links, fds)
            for name in names:
                if conn.remotes.pop(name, None) is not found.get(name):
                    for key, route in list(conn.routes.items()):
                        if route.remote.name == name:
                            conn.routes.pop(key, None)
            conn.remotes.update(found)
        return found

    def _resolve_again(self, conn: PeerConnection, names: list[str], timeout_s: float) -> None:
        if names:
            self._learn(conn, names, timeout_s)

    def _begin_again(self, future: _Retrying, outcome: Outcome) -> None:
        """A region was not what it was when it was looked up. Those who named it get the one of now."""
        conn, kind, assign, imm = future.terms
        wanted = parse(assign)
        for one in wanted:
            conn.routes.pop(key(one), None)
            conn.routes.pop((one.local, one.remote), None)
        names = sorted({one.remote for one in wanted if isinstance(one.remote, str)})
        if not all(isinstance(one.remote, str) for one in wanted):  # A handle stands for what is gone.
            future.settle(outcome)
            return

        def again() -> None:
            try:
                self._learn(conn, names)
                self._issue(conn, kind, wanted, imm, future)
            except PeerError as error:
                future.settle(Outcome(error.code, error.reason))
            except Exception as error:
                logger.exception("a transfer could not be begun again")
                future.settle(Outcome("failed", f"{type(error).__name__}: {error}"))

        self._life.chore(again)

    def _checked(
        self,
        conn: PeerConnection,
        kind: Kind,
        wanted: list[Wanted],
        imm: int | None,
        epochs: Sequence[int | None] | None,
        checksums: Sequence[int | None] | None,
    ) -> TransferFuture:
        """Only these registrations of the peer's regions, only these bytes. Nothing is tried again."""
        for what, given in (("epoch", epochs), ("checksum", checksums)):
            if given is not None and len(given) != len(wanted):
                raise ValueError(f"{what}: {len(given)} of them for {len(wanted)} assignments")
        self._learn_lacking(conn, wanted)
        for number, epoch in enumerate(epochs or ()):
            if epoch is not None:
                self._check_epoch(conn, wanted[number], epoch)
        whole, inner = self._begun(TransferFuture()), self._begun(TransferFuture())

        def check(outcome_of: PeerFuture) -> None:
            error = outcome_of.error()
            outcome = DONE if error is None else Outcome(error.code, error.reason)
            if error is None and kind == "read" and checksums is not None:
                outcome = self._look(wanted, checksums)
            whole.settle(outcome)

        try:
            if kind == "write" and checksums is not None:
                outcome = self._look(wanted, checksums)
                if outcome.code:
                    raise PeerError(outcome.code, outcome.reason)
            self._issue(conn, kind, wanted, imm, inner)
        except BaseException:
            self._under_way.difference_update((whole, inner))
            raise
        whole.copies, whole.transport = inner.copies, inner.transport
        if inner.done() or checksums is None:
            inner.add_done_callback(check)
        else:
            inner.add_done_callback(lambda done: self._life.chore(lambda: check(done)))
        whole.drive = inner.drive
        return whole

    def _check_epoch(self, conn: PeerConnection, one: Wanted, epoch: int) -> None:
        route = self._route(conn, one.local, one.remote)
        if route.remote.epoch < epoch and isinstance(one.remote, str):
            self._learn(conn, [one.remote])
            route = self._route(conn, one.local, one.remote)
        if route.remote.epoch != epoch:
            raise PeerError(
                STALE_EPOCH,
                f"region {route.remote.name!r} of {conn.peer_alias!r} has epoch {route.remote.epoch}, not {epoch}",
            )

    def _look(self, wanted: Sequence[Wanted], checksums: Sequence[int | None]) -> Outcome:
        for one, checksum in zip(wanted, checksums, strict=True):
            if checksum is None:
                continue
            try:
                found = self.checksum(one)
            except PeerError as error:
                return Outcome(error.code, error.reason)
            if found != checksum:
                return Outcome(
                    BAD_CHECKSUM,
                    f"{one.length} bytes at {one.local_offset} of {one.local!r} have CRC-32 {found:08x}, "
                    f"not {checksum:08x}",
                )
        return DONE

    def checksum(self, one: Wanted) -> int:
        """CRC-32 of the local bytes of an assignment.

        Raises:
            PeerError: the region is gone, or the processor cannot read it.
        """
        region = self.regions.get(one.local)
        if region.view is None:
            raise PeerError(NO_WAY, f"the bytes of {region.name!r} cannot be read here, as for a checksum")
        reading = self._begun(Reading(region))
        try:
            if not region.live:
                raise PeerError(NO_REGION, f"memory region {region.name!r} was unregistered here just now")
            return zlib.crc32(region.view[one.local_offset : one.local_offset + one.length])
        finally:
            reading.settle(DONE)

    def send(self, conn: PeerConnection, data: memoryview) -> MessageFuture:
        link = _messages(conn)
        future = self._begun(MessageFuture())
        future.held = data
        future.drive = link.send(data, future.settle)
        return future

    def recv(self, conn: PeerConnection, into: memoryview) -> MessageFuture:
        link = _messages(conn)
        future = self._begun(MessageFuture())
        future.held, future.link = into, link
        link.recv(into, future.settle)
        return future

    def recv_imm(self, conn: PeerConnection) -> ImmFuture:
        link = _messages(conn)
        future = self._begun(ImmFuture())
        future.link = link
        link.recv_imm(future.settle)
        return future

    def _begun(self, future: F) -> F:
        future.under_way = self._under_way
        self._under_way.add(future)
        return future

    def let_go(self, region: LocalRegion | None, until: float) -> bool:
        """Waits for what is under way in a region that was unregistered; None: in any, and in messages.

        Args:
            until: by ``time.monotonic()``.

        Returns:
            Whether it has all ended.
        """
        using = [one for one in tuple(self._under_way) if region is None or one.uses(region)]
        for one in using:
            with contextlib.suppress(PeerError):
                one.wait_for(max(0.0, until - time.monotonic()))
        return all(one.done() for one in using)

    def stats(self) -> dict[str, Any]:
        """See :meth:`computemesh.peer.agent.PeerAgent.stats`."""
        return {"under_way": len(self._under_way), "failed": self.failed()}

    def failed(self) -> dict[str, int]:
        """How many orders and messages have failed, by code."""
        return dict(self._under_way.failed)

    def after_fork(self, outcome: Outcome) -> None:
        """The child has none of the threads that would end what is under way."""
        self._resolving = threading.Lock()
        for one in tuple(self._under_way):
            one.abandon(outcome)


def key(one: Wanted) -> object:
    """By which a route is found."""
    return one.local if one.local == one.remote and isinstance(one.local, str) else (one.local, one.remote)


def _is_known(conn: PeerConnection, kind: Kind, one: Wanted) -> bool:
    """Whether it can be begun without asking the peer-agent."""
    route = conn.routes.get(key(one))
    return route is not None and route.local.live and _why_not(route, kind, one) is None


def _quick(routes: Mapping[object, Route], kind: str, assign: Any) -> tuple[Link, list[Copy], Moved, int] | None:
    """What most assignments are: good, of regions that are known, and all by one link. None for any other."""
    copies: list[Copy] = []
    first: Link | None = None
    total = 0
    try:
        for item in assign if assign.__class__ is list else (assign,):
            if len(item) == 4:
                name, here, there, length = item
                route = routes[name]
            else:
                mine, theirs, here, there, length = item
                route = routes[mine, theirs]
                if type(mine) is not str:
                    here, there = there, here
            local, remote, link, local_room, remote_room, kinds, moved = route
            if not (
                type(here) is type(there) is type(length) is int
                and length > 0
                and 0 <= here <= local_room - length
                and 0 <= there <= remote_room - length
                and local.live
                and kind in kinds
                and (link is first or first is None)
            ):
                return None
            first = link
            total += length
            copies.append(Copy(local, here, remote, there, length))
    except (KeyError, TypeError, ValueError):
        return None
    if first is None:
        return None
    return first, copies, moved, total  # pyright: ignore[reportPossiblyUnboundVariable]  # It came with the link.


def _why_not(route: Route, kind: Kind, one: Wanted) -> PeerError | None:
    if kind not in route.kinds:
        return PeerError(READ_ONLY, f"region {route.remote.name!r} of the peer may only be read")
    if one.local_offset + one.length > route.local_room:
        where, offset, room = f"region {route.local.name!r} here", one.local_offset, route.local_room
    elif one.remote_offset + one.length > route.remote_room:
        where, offset, room = f"region {route.remote.name!r} of the peer", one.remote_offset, route.remote_room
    else:
        return None
    return PeerError(OUT_OF_RANGE, f"{one.length} bytes from {offset} on leave {where}, which has {room}")


def _messages(conn: PeerConnection) -> Link:
    links = conn.links
    if not links:
        raise conn.failure()
    return links[-1]


def _remotes(region: Region, links: Sequence[Link], fds: Mapping[str, Descriptor]) -> dict[str, RemoteRegion]:
    """A peer's region as each link reaches it."""
    found: dict[str, RemoteRegion] = {}
    for link in links:
        token: dict[str, Any] | None = region.tokens.get(link.transport)
        if token is None:
            continue
        if link.transport == "shm":
            if region.name not in fds or "" not in fds:
                continue
            token = {**token, "fd": fds[region.name], "epochs_fd": fds[""]}
        found[link.transport] = RemoteRegion(region.name, region.epoch, region.length, region.writable, token)
    return found


def _drive_all(drives: Sequence[Drive]) -> Drive | None:
    if len(drives) < 2:
        return drives[0] if drives else None

    def drive(timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for one in drives:
            one(None if deadline is None else max(0.0, deadline - time.monotonic()))

    return drive
