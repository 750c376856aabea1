"""What a process has of tcp: its listeners, the threads for all its links, and the regions that peers may reach."""

from __future__ import annotations

import ipaddress
import os
import secrets
import select
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from select import EPOLLIN, EPOLLRDHUP
from typing import Any, Final

from computemesh.contracts.peers import Transport
from computemesh.peer.tcp.link import TcpLink
from computemesh.peer.tcp.reactor import Reactor
from computemesh.peer.tcp.wire import (
    CHALLENGE_BYTES,
    HELLO,
    HELLO_BYTES,
    LANES_MAX,
    NONCE_BYTES,
    PROOF_BYTES,
    VERSION,
    check_piece,
    link_digest,
    pack_hello,
    parse_hello,
    prove,
    proven,
)
from computemesh.peer.transport import LINK_LOST, NO_WAY, STALL_S, TIMED_OUT, LocalRegion, Parties, TransportError

HOST_VARIABLE: Final = "COMPUTEMESH_PEER_HOST"
LANES: Final = 2
KNOCKS_MAX: Final = 64
"""Connections that have not proven themselves; when another one comes, the oldest is closed."""
KNOCK_S: Final = 5.0
"""So long they may take for it."""
DIAL_S: Final = 2.0
"""So long the side that is asked for a link dials: who passes the question on waits little longer for the answer."""
_LOOPBACK: Final = ("127.0.0.1", "::1")


class TcpEndpoint:
    """See :class:`computemesh.peer.transport.Endpoint`.

    It listens when a link is first asked for: on loopback for peers of this machine, and on `host` for others. All its
    links together have as many threads as a link has lanes.

    Args:
        host: an address or name of this machine on the data network, where peers of other machines find it. Left out,
            it listens on loopback alone, and links to other machines are possible only where the peer has an address.
        lanes: sockets of a link for each direction. The first is for what is small, the others share what is large.
        stall_s: after so many seconds without any progress of what was ordered, a link is lost.

    Raises:
        ValueError: `host` stands for every address, which is none that a peer could be told, or is none of
            this machine.
    """

    name: Transport = "tcp"

    def __init__(self, host: str | None = None, *, lanes: int = LANES, stall_s: float = STALL_S) -> None:
        check_host(host or "")
        if not 1 <= lanes <= LANES_MAX:
            raise ValueError(f"lanes: {lanes} is not between 1 and {LANES_MAX}")
        self.stall_s = stall_s
        self._host = host or ""
        self._lanes = lanes
        self._lock = threading.Lock()
        self._reactors: list[Reactor] = []
        self._listeners: dict[str, _Listener] = {}
        self._regions: dict[int, LocalRegion] = {}
        self._latest_epoch = 0
        self._links: set[TcpLink] = set()
        self._offered: dict[str, TcpLink] = {}
        self._expected: dict[bytes, TcpLink] = {}
        self._counts: Counter[str] = Counter()
        self._closed = False
        _forked.add(self)

    def absent(self) -> str:
        return "" if hasattr(select, "epoll") and hasattr(os, "eventfd") else "it needs epoll, which only Linux has"

    def facts(self) -> Mapping[str, Any]:
        return {"version": VERSION, "host": self._host}

    def stats(self) -> Mapping[str, int]:
        """What happened so far: `links`, `lost`, `strangers` (connections that could not prove themselves), `breaches`
        (peers that did not keep to the protocol), and `refused_` with the code of each request that was refused."""
        return dict(self._counts)

    # --- regions

    def expose(self, region: LocalRegion) -> Mapping[str, Any] | None:
        if region.view is None:
            return None
        with self._lock:
            self._regions[region.handle] = region
            self._latest_epoch = max(self._latest_epoch, region.epoch)
        return {"handle": region.handle}

    def conceal(self, region: LocalRegion) -> None:
        with self._lock:
            if self._regions.get(region.handle) is region:
                del self._regions[region.handle]
            links = list(self._links)
        for link in links:
            link.conceal(region)

    def judge(self, handle: int, epoch: int, offset: int, length: int, write: bool) -> tuple[LocalRegion | None, str]:
        """The region that a peer may reach so, or the code of the refusal, which is counted."""
        region = self._regions.get(handle)
        code = check_piece(region, epoch, offset, length, write=write, latest_epoch=self._latest_epoch)
        if code:
            self.count(f"refused_{code}")
            return None, code
        return region, ""

    def count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def forget(self, link: TcpLink) -> None:
        """A link has ended."""
        with self._lock:
            self._links.discard(link)
            self._unexpect(link)

    # --- links

    def offer(self, parties: Parties) -> Mapping[str, Any]:
        link = TcpLink(parties, self._lanes, self)
        offer: dict[str, Any] = {"version": VERSION, "lanes": self._lanes}
        if host := parties.options.get("local_host") or self._host:
            offer["address"] = self._listen(str(host)).address
        with self._lock:
            self._check_open()
            self._links.add(link)
            self._offered[parties.link] = link
            if host:
                self._expected[link_digest(parties.link)] = link
        return offer

    def accept(self, parties: Parties, offer: Mapping[str, Any]) -> tuple[TcpLink, Mapping[str, Any]]:
        lanes = self._agreed(offer)
        link = TcpLink(parties, lanes, self)
        answer: dict[str, Any] = {"version": VERSION, "lanes": lanes}
        host = parties.options.get("local_host") or self._host
        if not host and not parties.same_host and not offer.get("address"):
            raise TransportError(
                NO_WAY,
                "neither machine has an address for tcp: set "
                f"{HOST_VARIABLE} to the address of the data network on one of the two",
            )
        with self._lock:
            self._check_open()
            self._links.add(link)
        try:
            if host or parties.same_host:
                answer["address"] = self._listen(str(host)).address
                with self._lock:
                    self._expected[link_digest(parties.link)] = link
            else:
                self._dial(link, offer["address"], min(parties.deadline, time.monotonic() + DIAL_S))
        except BaseException:
            link.close()
            raise
        return link, answer

    def establish(self, parties: Parties, answer: Mapping[str, Any]) -> TcpLink:
        with self._lock:
            link = self._offered.pop(parties.link, None)
        if link is None:
            raise TransportError(NO_WAY, f"the link {parties.link} was not offered, or was abandoned")
        try:
            lanes = self._agreed(answer)
            if (address := answer.get("address")) is not None:
                with self._lock:
                    self._unexpect(link)
                link.lanes = lanes
                self._dial(link, address, parties.deadline)
            else:
                link.agree(lanes)
        except BaseException:
            link.close()
            raise
        return link

    def abandon(self, parties: Parties) -> None:
        with self._lock:
            link = self._offered.pop(parties.link, None)
        if link is not None:
            link.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            links, listeners, reactors = list(self._links), list(self._listeners.values()), list(self._reactors)
        for listener in listeners:
            listener.stop()
        for link in links:
            link.close()
        for reactor in reactors:
            reactor.stop()

    def after_fork(self) -> None:
        """The child lets go of the sockets, which are its parent's, and has none of the threads."""
        self._lock = threading.Lock()
        self._closed = True
        for link in list(self._links):
            link.after_fork()
        for listener in self._listeners.values():
            listener.after_fork()
        for reactor in self._reactors:
            reactor.after_fork()

    def _agreed(self, said: Mapping[str, Any]) -> int:
        version, lanes = said.get("version"), said.get("lanes")
        if version != VERSION:
            raise TransportError(NO_WAY, f"the peer's tcp has version {version!r}, this one {VERSION}")
        if not isinstance(lanes, int) or not 1 <= lanes <= LANES_MAX:
            raise TransportError(NO_WAY, f"lanes: {lanes!r} is not between 1 and {LANES_MAX}")
        return min(lanes, self._lanes)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(NO_WAY, "the endpoint is closed")

    def _unexpect(self, link: TcpLink) -> None:
        digest = link_digest(link.parties.link)
        if self._expected.get(digest) is link:
            del self._expected[digest]

    def _threads(self) -> list[Reactor]:
        """Started when they are first needed; to be called with the lock."""
        self._check_open()
        while len(self._reactors) < self._lanes:
            first = not self._reactors
            tick_s = min(self.stall_s / 4, KNOCK_S / 4)
            self._reactors.append(Reactor(f"tcp-lane-{len(self._reactors)}", tick_s, self._on_tick if first else None))
        return self._reactors

    def _on_tick(self) -> None:
        now = time.monotonic()
        for link in list(self._links):
            link.check(now)
        for listener in list(self._listeners.values()):
            listener.check(now)

    # --- the side that dials

    def _dial(self, link: TcpLink, address: Any, deadline: float) -> None:
        """Opens all sockets of a link, in the calling thread.

        Args:
            deadline: by ``time.monotonic()``.

        Raises:
            TransportError: the peer cannot be reached, or did not prove itself.
        """
        try:
            host, port = str(address[0]), int(address[1])
        except (TypeError, ValueError, OverflowError, IndexError, KeyError) as error:
            raise TransportError(NO_WAY, f"address: {address!r} is no host and port") from error
        with self._lock:
            reactors = self._threads()
        parties = link.parties
        opened: list[tuple[socket.socket, int, bool, bytes]] = []
        try:
            for lane in range(link.lanes):
                for asks in (True, False):
                    sock = socket.create_connection((host, port), timeout=_left(deadline))
                    hello = pack_hello(parties.link, parties.key, lane, asks, secrets.token_bytes(NONCE_BYTES))
                    opened.append((sock, lane, asks, hello))
                    _tune(sock, self.stall_s)
                    sock.sendall(hello)
            while opened:
                sock, lane, asks, hello = opened[0]
                sock.settimeout(_left(deadline))
                challenge = _exactly(sock, CHALLENGE_BYTES)
                nonce, proof = challenge[:NONCE_BYTES], challenge[NONCE_BYTES:]
                if not proven(parties.key, proof, 2, hello, nonce):
                    self.count("strangers")
                    raise TransportError(NO_WAY, f"who answers at {host} port {port} is not the peer")
                sock.sendall(prove(parties.key, 3, hello, challenge))
                sock.settimeout(None)
                opened.pop(0)
                if not link.attach(sock, lane, asks=asks, reactors=reactors):
                    sock.close()
                    raise TransportError(NO_WAY, "the link has ended meanwhile")
        except TimeoutError as error:
            raise TransportError(TIMED_OUT, f"{host} port {port} did not answer in time") from error
        except (ConnectionResetError, BrokenPipeError) as error:
            raise TransportError(LINK_LOST, f"the peer at {host} port {port} went meanwhile: {error}") from error
        except (OSError, OverflowError, ValueError) as error:  # The last two: a port or a name that can be none.
            raise TransportError(NO_WAY, f"{host} port {port} cannot be reached: {error}") from error
        finally:
            for sock, *_ in opened:
                sock.close()
        link.detail["dialled"] = True
        self.count("links")

    # --- the side that listens

    def _listen(self, host: str) -> _Listener:
        with self._lock:
            reactors = self._threads()
            if (found := self._listeners.get(host)) is not None:
                return found
            listener = _Listener(self, host, reactors)
            self._listeners[host] = listener
            return listener

    def expected(self, link: bytes) -> TcpLink | None:
        """The link that a stranger speaks of, if it is waited for."""
        found = self._expected.get(link)
        return found if found is not None and time.monotonic() < found.parties.deadline else None

    def attach(self, link: TcpLink, sock: socket.socket, lane: int, *, asks: bool) -> bool:
        if not link.attach(sock, lane, asks=asks, reactors=self._reactors):
            return False
        if link.is_open:
            with self._lock:
                self._unexpect(link)
                self._counts["links"] += 1
        return True


class _Listener:
    """Where peers dial, and those that have not proven themselves yet; in the thread of the first lane."""

    def __init__(self, endpoint: TcpEndpoint, host: str, reactors: list[Reactor]) -> None:
        self._endpoint = endpoint
        self._reactor = reactors[0]
        self._sock = _listening(host)
        self._knocks: dict[int, _Knock] = {}
        self._paused = False
        self.address: list[Any] = list(self._sock.getsockname()[:2])
        self._reactor.register(self._sock.fileno(), self._on_event, EPOLLIN)

    def stop(self) -> None:
        self._reactor.call(self._close)

    def _close(self) -> None:
        self._reactor.unregister(self._sock.fileno())
        self._sock.close()
        for knock in list(self._knocks.values()):
            self.refuse(knock)

    def after_fork(self) -> None:
        for sock in (self._sock, *(knock.sock for knock in self._knocks.values())):
            sock.close()

    def check(self, now: float) -> None:
        for knock in list(self._knocks.values()):
            if now - knock.since >= KNOCK_S:
                self.refuse(knock)
        if self._paused:
            self._paused = False
            self._reactor.modify(self._sock.fileno(), EPOLLIN)

    def refuse(self, knock: _Knock) -> None:
        """Closes it without a word."""
        self._endpoint.count("strangers")
        self.release(knock)
        knock.sock.close()

    def release(self, knock: _Knock) -> None:
        del self._knocks[knock.fd]
        self._reactor.unregister(knock.fd)

    def _on_event(self, _: int) -> None:
        try:
            sock, _address = self._sock.accept()
        except BlockingIOError:
            return
        except OSError:
            # No descriptor is left, say. It would be told again and again: it waits for the next tick.
            self._paused = True
            self._reactor.modify(self._sock.fileno(), 0)
            return
        sock.setblocking(False)
        if len(self._knocks) >= KNOCKS_MAX:
            self.refuse(next(iter(self._knocks.values())))
        knock = _Knock(self, self._endpoint, sock)
        self._knocks[knock.fd] = knock
        self._reactor.register(knock.fd, knock.on_event, EPOLLIN | EPOLLRDHUP)


class _Knock:
    """A connection that has not proven itself."""

    def __init__(self, listener: _Listener, endpoint: TcpEndpoint, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.since = time.monotonic()
        self._listener = listener
        self._endpoint = endpoint
        self._heard = b""
        self._hello = b""
        self._challenge = b""

    def on_event(self, _: int) -> None:
        try:
            known = self._listen()
        except BlockingIOError:
            return
        except OSError:
            known = False
        if not known:
            self._listener.refuse(self)

    def _listen(self) -> bool:
        need = PROOF_BYTES if self._challenge else HELLO_BYTES
        heard = self.sock.recv(need - len(self._heard))
        self._heard += heard
        if len(self._heard) < need:
            return bool(heard)
        said, self._heard = self._heard, b""
        hello = parse_hello(self._hello or said)
        link = self._endpoint.expected(hello.link) if hello is not None else None
        if hello is None or link is None or not link.wants(hello.lane, asks=not hello.dialler_asks):
            return False
        key = link.parties.key
        if not self._challenge:
            if not proven(key, hello.proof, 1, said[: HELLO.size]):
                return False
            nonce = secrets.token_bytes(NONCE_BYTES)
            self._hello = said
            self._challenge = nonce + prove(key, 2, said, nonce)
            return self.sock.send(self._challenge) == CHALLENGE_BYTES
        if not proven(key, said, 3, self._hello, self._challenge):
            return False
        self.sock.setblocking(True)
        _tune(self.sock, self._endpoint.stall_s)
        self._listener.release(self)
        if not self._endpoint.attach(link, self.sock, hello.lane, asks=not hello.dialler_asks):
            self.sock.close()
        return True


def check_host(host: str) -> None:
    """
    Raises:
        ValueError: peers of other machines cannot be told to dial this. Empty is fine: they are told nothing then.
    """
    if not host:
        return
    if _is_wildcard(host):
        raise ValueError(f"{HOST_VARIABLE}: {host} is no address that a peer can be told; name one of this machine")
    try:
        _listening(host).close()
    except TransportError as error:
        raise ValueError(str(error)) from None


def _listening(host: str) -> socket.socket:
    """A listening socket on this address or name; on loopback when it is empty.

    Raises:
        TransportError: there is no such address here.
    """
    reason: OSError | None = None
    for name in (host,) if host else _LOOPBACK:
        try:
            for family, kind, protocol, _, address in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM):
                sock = socket.socket(family, kind, protocol)
                try:
                    sock.bind(address)
                    sock.listen(KNOCKS_MAX)
                    sock.setblocking(False)
                except OSError:
                    sock.close()
                    raise
                return sock
        except OSError as error:
            reason = error
    raise TransportError(NO_WAY, f"{HOST_VARIABLE}: cannot listen on {host or 'loopback'}: {reason}")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _tune(sock: socket.socket, stall_s: float) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # What tells of a machine that is gone when nothing is under way.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(stall_s / 3)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(stall_s / 6)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1000, int(stall_s * 1000)))


def _exactly(sock: socket.socket, count: int) -> bytes:
    heard = b""
    while len(heard) < count:
        more = sock.recv(count - len(heard))
        if not more:
            raise ConnectionError("it closed the connection")
        heard += more
    return heard


_forked: weakref.WeakSet[TcpEndpoint] = weakref.WeakSet()


def _in_child() -> None:
    for one in list(_forked):
        one.after_fork()


os.register_at_fork(after_in_child=_in_child)


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
