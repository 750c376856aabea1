"""The connections of a peer: asked for, taken in, lost and ended."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from computemesh.contracts.peers import Close, Connect, Connected, Transport
from computemesh.ids import new_id
from computemesh.peer.attachment import Attachment, close_all
from computemesh.peer.choice import Choice, Demand, choose, ports, takes
from computemesh.peer.connection import ConnId, PeerConnection, Phase, State, no_way, on_incoming
from computemesh.peer.errors import (
    BAD_MESSAGE,
    CLOSED,
    CROSSED,
    LINK_LOST,
    NO_WAY,
    NOT_CONNECTED,
    NOT_FOUND,
    TIMED_OUT,
    UNAVAILABLE,
    PeerError,
)
from computemesh.peer.signals import Accept, Accepted, Call, Called, GetPeer, Lost, PeerFacts
from computemesh.peer.transport import WAS_CLOSED, Endpoint, Link, Outcome, Parties, TransportError

logger: Final = logging.getLogger(__name__)

CONNECT_S: Final = 30.0
"""After so long a connection that does not come about has failed."""
FAILED_MAX: Final = 256
"""Failed connections that are still told of; peers under ever new aliases would otherwise leave ever more."""

Resolve = Callable[[PeerConnection, list[str], float], None]


class Connections:
    """The connections of one peer. Methods may be called from any thread.

    Attributes:
        endpoints: the transports that can be used here.
        absent: why the others cannot.
        ready: of each peer the first connection that is connected, in the order of their names.
    """

    def __init__(self, life: Attachment, endpoints: Sequence[Endpoint], resolve: Resolve) -> None:
        self._life = life
        self._resolve = resolve
        self.absent: dict[Transport, str] = {"rdma": "not part of this process", "shm": "not part of this process"}
        self.absent["tcp"] = "not part of this process"
        self.endpoints: dict[Transport, Endpoint] = {}
        for one in endpoints:
            if why := one.absent():
                self.absent[one.name] = why
            else:
                self.endpoints[one.name] = one
                del self.absent[one.name]
        self.ready: dict[str, PeerConnection] = {}
        self._connections: dict[tuple[str, str, int, str, int], PeerConnection] = {}

    def all(self) -> list[PeerConnection]:
        """Sorted by name."""
        with self._life.lock:
            return sorted(self._connections.values(), key=lambda conn: conn.conn_id)

    def connected(self, peer: str, local_nic: str | None = None, remote_nic: str | None = None) -> PeerConnection:
        """A connection that bytes can go over. One whose terms are exchanged is waited for: it is up for the peer
        perhaps, who may have said so.

        Raises:
            PeerError: there is none, or it is not up yet, or not any more.
        """
        conn = self.ready.get(peer)
        if conn is not None and local_nic is None and remote_nic is None:
            return conn
        candidates = [
            conn
            for conn in self.all()
            if conn.peer_alias == peer and local_nic in (None, conn.local_nic) and remote_nic in (None, conn.remote_nic)
        ]
        for conn in candidates:
            if conn.state == "connected":
                return conn
        self._life.check_open()
        for conn in candidates:
            if conn.state == "connecting":
                if conn.phase == "answered":
                    with contextlib.suppress(TimeoutError):
                        return conn.wait(CONNECT_S)
                raise PeerError(NOT_CONNECTED, f"{conn.conn_id} is not connected yet; call wait() on it first")
        for conn in candidates:
            raise conn.failure()
        raise PeerError(NOT_CONNECTED, f"Connection for {peer} not found. Call connect_to({peer!r}, ...) first.")

    def connect(
        self,
        peer: str,
        *,
        demand: Demand = "auto",
        local_device: str | None = None,
        peer_device: str | None = None,
        ib_port: int = 1,
        qp_num: int = 1,
        min_bw: str | None = None,
        timeout_s: float = CONNECT_S,
    ) -> PeerConnection:
        """The connection with a peer: the one there is, or a new one, which a thread brings about.

        Raises:
            PeerError: there is no such peer, no way to it, or a connection in that place with other terms.
        """
        try:
            facts = self._life.ask(GetPeer(alias=peer), PeerFacts).peer
            if facts is None:
                raise PeerError(NOT_FOUND, f"there is no peer {peer!r} in scope {self._life.scope!r}")
            same_host, theirs = facts.node_id == self._life.node_id, ports(facts.resource)
        except PeerError as error:
            if error.code != UNAVAILABLE:
                raise
            same_host, theirs = True, []  # While the control plane is away, only peers of this machine can be reached.
        choice = choose(
            demand,
            same_host=same_host,
            absent=self.absent,
            mine=ports({"nics": self.facts()}),
            theirs=theirs,
            local_device=local_device,
            peer_device=peer_device,
            ib_port=ib_port,
        )
        ident = ConnId(
            self._life.alias, choice.local.nic, choice.local.port, peer, choice.remote.nic, choice.remote.port, qp_num
        )
        with self._life.lock:
            self._life.check_open()
            there = self._connections.get(ident.place())
            if there is not None and there.state != "failed":
                if there.ident.qp_num != qp_num:
                    raise PeerError(NO_WAY, f"{there.conn_id} is there with qp_num={there.ident.qp_num}, not {qp_num}")
                return there
            conn = self._new_connection(ident, new_id("l"), choice.wants[0], choice.reason)
            conn.phase = "asking"
        parties = Parties(
            link=conn.link_id,
            key=secrets.token_bytes(32),
            me=self._life.alias,
            peer=peer,
            deadline=time.monotonic() + timeout_s,
            options={
                "local_device": choice.local.nic,
                "peer_device": choice.remote.nic,
                "ib_port": ib_port,
                "qp_num": qp_num,
                "min_bw": min_bw,
            },
            same_host=same_host,
        )
        self._life.spawn("connect", lambda: self._reach(conn, choice, parties))
        return conn

    def facts(self) -> list[Any]:
        """Network interfaces of this process's transports, the best first."""
        return [nic for endpoint in self.endpoints.values() for nic in endpoint.facts().get("nics", ())]

    def _new_connection(self, ident: ConnId, link_id: str, transport: str, reason: str) -> PeerConnection:
        conn = PeerConnection(ident, link_id, transport, reason)
        conn.bind(self._resolve, self.disconnect)
        self._connections.pop(ident.place(), None)  # The new one is the last.
        self._connections[ident.place()] = conn
        if len(self._connections) > FAILED_MAX:
            failed = [place for place, one in self._connections.items() if one.state == "failed"]
            for place in failed[: max(0, len(failed) - FAILED_MAX + 1)]:
                del self._connections[place]
        return conn

    def _reach(self, conn: PeerConnection, choice: Choice, parties: Parties) -> None:
        """Brings a connection about, from the side that asks for it."""
        offers: dict[Transport, dict[str, Any]] = {}
        missing: list[str] = []
        try:
            for name in choice.wants:
                try:
                    offers[name] = dict(self.endpoints[name].offer(parties))
                except TransportError as error:
                    missing.append(f"{name}: {error}")
            if not offers or ("shm" in choice.wants and "tcp" not in offers):
                raise no_way(missing)
            connect = Connect(
                conn_id=conn.conn_id, link=parties.link, key=parties.key.hex(), offers=offers, wants=list(offers)
            )
            left = max(0.1, parties.deadline - time.monotonic())
            answer, fds = self._life.signals.ask(Call(peer=conn.peer_alias, body=connect), timeout_s=left)
            close_all(fds)
            said = answer.body if isinstance(answer, Called) else None
            if not isinstance(said, Connected):
                raise PeerError(BAD_MESSAGE, "the peer answered something else than whether it takes the connection")
            with self._life.lock:
                conn.phase = "answered"
                conn.answered.set()
                current = conn.link_id == parties.link and conn.state == "connecting" and not self._life.closed
            if not current:
                return
            links: dict[Transport, Link] = {}
            try:
                for transport in choice.wants:
                    if transport in said.answers and transport in offers:
                        links[transport] = self.endpoints[transport].establish(parties, said.answers[transport])
                        del offers[transport]
                if choice.wants[0] == "shm" and "shm" not in links:
                    missing.append("shm: the peer does not take it")
                self._bring_up(conn, links, said.answers, parties, missing, choice.wants)
            except BaseException:
                for link in links.values():
                    link.close()
                raise
        except (PeerError, TransportError) as error:
            self._not_reached(conn, parties, error)
        except Exception as error:
            logger.exception("%s: could not connect", conn.conn_id)
            self._not_reached(conn, parties, PeerError("failed", f"{type(error).__name__}: {error}"))
        finally:
            for name in offers:
                self.endpoints[name].abandon(parties)

    def _not_reached(self, conn: PeerConnection, parties: Parties, error: PeerError | TransportError) -> None:
        with self._life.lock:
            conn.phase = "awaiting" if error.code == CROSSED else "answered"
            conn.answered.set()
            if conn.link_id != parties.link:  # The peer's own attempt took its place.
                return
        if error.code == CROSSED:  # The peer's own attempt is what is taken.
            try:
                conn.wait(max(0.0, parties.deadline - time.monotonic()))
            except TimeoutError:
                self._fail(conn, PeerError(TIMED_OUT, "the peer's own attempt to connect did not arrive in time"))
            except PeerError:
                pass
            return
        self._fail(conn, PeerError(error.code, str(error)), tell=True)

    def _bring_up(
        self,
        conn: PeerConnection,
        links: Mapping[Transport, Link],
        said: Mapping[Transport, Mapping[str, Any]],
        parties: Parties,
        missing: Sequence[str],
        wants: Sequence[Transport],
    ) -> None:
        order = [links[name] for name in wants if name in links]
        if not order or ("shm" in links and "tcp" not in links) or (wants[0] == "shm" and "shm" not in links):
            raise no_way(list(missing))

        def lost(reason: str) -> None:
            self._fail(conn, PeerError(LINK_LOST, reason), link=parties.link, tell=True)

        for link in order:
            link.on_lost = lost
        for link in order:
            link.ready(max(0.1, parties.deadline - time.monotonic()))
        if order[0].transport != conn.transport:
            conn.selection_reason = f"{conn.transport} could not be had ({'; '.join(missing) or 'refused by the peer'})"
            conn.transport = order[0].transport
        conn.peer_endpoint_info = {name: dict(facts) for name, facts in said.items()}
        with self._life.lock:
            if conn.link_id != parties.link or self._life.closed:
                raise PeerError(CLOSED, "the connection was taken back meanwhile")
            conn.links = tuple(order)
            if not conn.move("connected"):
                raise conn.failure()
            self._sort_ready(conn.peer_alias)
        logger.debug("%s: connected by %s", conn.conn_id, conn.transport)

    def _sort_ready(self, peer: str) -> None:
        found = [conn for conn in self._connections.values() if conn.peer_alias == peer and conn.state == "connected"]
        if found:
            self.ready[peer] = min(found, key=lambda conn: conn.conn_id)
        else:
            self.ready.pop(peer, None)

    def disconnect(self, conn: PeerConnection) -> None:
        """Ends a connection for both sides."""
        self._fail(conn, PeerError(CLOSED, "it was closed"), tell=True, wait=True)

    def _fail(
        self, conn: PeerConnection, error: PeerError, *, link: str | None = None, tell: bool = False, wait: bool = False
    ) -> None:
        with self._life.lock:
            if link is not None and conn.link_id != link:
                return
            if not conn.move("failed", error):
                return
            self._sort_ready(conn.peer_alias)
            links, conn.links = conn.links, ()
            conn.remotes, conn.routes = {}, {}
        why = Outcome(LINK_LOST, error.reason) if error.code == LINK_LOST else WAS_CLOSED
        for one in links:
            one.close(why)
        logger.debug("%s: %s", conn.conn_id, error)
        if tell and not self._life.closed:
            close = Call(peer=conn.peer_alias, body=Close(link=conn.link_id, reason=error.reason[:200]))

            def say() -> None:
                with contextlib.suppress(PeerError):
                    close_all(self._life.signals.ask(close, timeout_s=5.0)[1])

            say() if wait else self._life.spawn("close", say)

    def lost(self, told: Lost) -> None:
        """The peer-agent says that a connection, or all with a peer, have ended."""
        for conn in self.all():
            if conn.peer_alias == told.peer and told.link in (None, conn.link_id):
                self._fail(conn, PeerError(LINK_LOST, told.reason or "the peer has ended"))

    def end(self, reason: str) -> None:
        """Ends all of them; peers hear of it by the peer-agent."""
        for conn in self.all():
            self._fail(conn, PeerError(CLOSED, reason))

    def after_fork(self, reason: str) -> None:
        """The child has none of them."""
        self.ready.clear()
        for conn in self._connections.values():
            conn.after_fork(PeerError(CLOSED, reason))

    def accept(self, told: Accept) -> Accepted:
        body = told.body
        ident = ConnId.parse(body.conn_id).mirrored()
        if ident.me != self._life.alias or ident.peer != told.peer:
            raise ValueError("conn_id: it is between others")
        parties = Parties(
            link=body.link,
            key=bytes.fromhex(body.key),
            me=self._life.alias,
            peer=told.peer,
            deadline=time.monotonic() + CONNECT_S,
            options={
                "local_device": ident.local_nic,
                "peer_device": ident.remote_nic,
                "ib_port": ident.local_port,
                "qp_num": ident.qp_num,
                "min_bw": None,
            },
            same_host=told.same_host,
        )
        tries = takes(body.wants, body.offers, list(self.endpoints), told.same_host)
        first: Transport = tries[0] if tries else "tcp"
        conn = self._take_in(ident, body.link, first, parties.deadline)
        links: dict[Transport, Link] = {}
        answers: dict[Transport, dict[str, Any]] = {}
        missing: list[str] = []
        try:
            for name in tries:
                if links and not (name == "tcp" and "shm" in links):
                    continue
                try:
                    links[name], answer = self.endpoints[name].accept(parties, body.offers[name])
                    answers[name] = dict(answer)
                except TransportError as error:
                    missing.append(f"{name}: {error}")
            if not links or ("shm" in links and "tcp" not in links):
                raise no_way(missing)
        except (PeerError, TransportError) as error:
            for link in links.values():
                link.close()
            self._fail(conn, PeerError(error.code, str(error)), link=body.link)
            raise
        except BaseException as error:  # A defect must not leave a connection that is in the way of all later ones.
            for link in links.values():
                link.close()
            self._fail(conn, PeerError("failed", f"{type(error).__name__}: {error}"), link=body.link)
            raise
        self._life.spawn("accept", lambda: self._stand_up(conn, links, body, parties, missing))
        return Accepted(body=Connected(link=body.link, answers=answers))

    def _take_in(self, ident: ConnId, link_id: str, transport: Transport, deadline: float) -> PeerConnection:
        """The connection as which a peer's attempt is taken."""
        while True:
            with self._life.lock:
                self._life.check_open()
                there = self._connections.get(ident.place())
                state: State | None = there.state if there is not None else None
                phase: Phase = there.phase if there is not None else "answered"
                decision = on_incoming(self._life.alias, ident.peer, state, phase)
                if decision == "crossed":
                    raise PeerError(CROSSED, f"{self._life.alias!r} is connecting to {ident.peer!r} already")
                if there is not None and state == "connecting" and decision == "take" and there.ident == ident:
                    there.link_id = link_id
                    there.phase = "answered"
                    return there
                if there is None or (decision != "wait" and state == "failed"):
                    return self._new_connection(ident, link_id, transport, "chosen by the peer")
            if decision != "wait":
                self._fail(there, PeerError(LINK_LOST, "the peer has made a new connection"))
            elif not there.answered.wait(max(0.0, deadline - time.monotonic())):
                raise PeerError(TIMED_OUT, f"{ident.peer!r} has not answered an earlier question")

    def _stand_up(
        self,
        conn: PeerConnection,
        links: Mapping[Transport, Link],
        body: Connect,
        parties: Parties,
        missing: Sequence[str],
    ) -> None:
        try:
            wants: list[Transport] = [name for name in body.wants if name in links]
            self._bring_up(conn, links, body.offers, parties, missing, wants)
        except (PeerError, TransportError) as error:
            for link in links.values():
                link.close()
            self._fail(conn, PeerError(error.code, str(error)), link=parties.link, tell=True)
