"""One peer: its memory, its connections, and the transfers over them. What programs hold is in :mod:`.agent`.

Threads: a call runs in its caller's, down to the copy where memory is shared. Besides there are the transports' own
threads, one for each connection that is being made, one for what must be asked again after an order failed, and one
that tells the peer-agent what was moved.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final, cast

from computemesh.contracts.base import Refused
from computemesh.contracts.peers import Bandwidth, Peer, Topology
from computemesh.peer.attachment import Attach, Attachment
from computemesh.peer.errors import BAD_MESSAGE, CLOSED, FORKED, NO_WAY, TIMED_OUT, PeerError
from computemesh.peer.orders import Orders
from computemesh.peer.regions import LocalRegions, Memory, check_name
from computemesh.peer.signals import (
    Accept,
    Aliases,
    Answer,
    Desired,
    Done,
    DropRegion,
    GetPeer,
    ListPeers,
    Lost,
    Order,
    PeerFacts,
    PutEpochs,
    PutRegion,
    SetTopology,
    Told,
    TopologyFacts,
    Welcome,
)
from computemesh.peer.topology import Keeper
from computemesh.peer.traffic import Teller
from computemesh.peer.transfers import Transfers
from computemesh.peer.transport import STALL_S, Endpoint, LocalRegion, Outcome, TransportError

logger: Final = logging.getLogger(__name__)

CLOSE_S: Final = 2.0
"""So long an agent that ends waits for its transfers: it may itself be waited for by the thread that ends them."""


class Core:
    """A peer from its hello to its end.

    Args:
        attach: makes the way to the peer-agent.
        endpoints: the transports of this process; the core closes them. Absent ones may be among them.

    Raises:
        PeerError: the peer-agent is not there, or does not take this peer. Nothing is left behind then, and no other
            peer comes to harm.
    """

    def __init__(self, attach: Attach, endpoints: Sequence[Endpoint]) -> None:
        self._pid = os.getpid()
        self._all = tuple(endpoints)
        self._life = Attachment()
        self.regions = LocalRegions()
        self.transfers = Transfers(self._life, self.regions, endpoints)
        self.connections = self.transfers.connections
        self.orders = Orders(self._life, self.transfers)
        self._keeper = Keeper(self._life, self.connections)
        self._teller = Teller(self._life, self.transfers)
        self._registering = threading.Lock()
        """One region is registered at a time, so that what is said of a name comes in order."""
        self._epochs_sent = False
        try:
            signals = attach(self.on_told, self._on_agent_gone)
        except BaseException:
            self._life.begin(None)
            for one in self._all:
                one.close()
            raise
        self.alias = signals.welcome.alias
        self.scope = signals.welcome.scope
        self.node_id = signals.welcome.node_id
        self._life.begin(signals)
        self._teller.begin()
        _living.add(self)

    @property
    def welcome(self) -> Welcome:
        return self._life.signals.welcome

    @property
    def closed(self) -> str:
        """Why it has ended; empty while it lives."""
        return self._life.closed

    def register(
        self, name: str, memory: Memory, *, writable: bool = True, fd: int = -1, fd_offset: int = 0
    ) -> LocalRegion:
        """Offers memory to peers, in the place of what had the name before.

        When this returns, peers find it, and the one before is out of their reach.

        Args:
            fd: of the memory object that the memory is a mapping of, `fd_offset` bytes from its beginning; whoever
                gave it keeps it open while the region is registered.

        Raises:
            PeerError: the peer-agent does not take it; then the one before stays.
        """
        check_name(name)
        with self._registering:
            self._life.check_open()
            with self._life.lock:
                region = self.regions.make(name, memory, writable=writable, fd=fd, fd_offset=fd_offset)
            try:
                self._expose(region)
                if region.view is None and not region.tokens:
                    why = self.connections.absent.get("rdma", "no interface takes it, see the log")
                    raise PeerError(NO_WAY, f"memory of a GPU is reached by RDMA alone: {why}")
                self._put(region)
            except BaseException:
                self._conceal(region)
                raise
            with self._life.lock:
                old = self.regions.put(region)
            if old is not None:
                self._conceal(old)
        return region

    def unregister(self, name: str) -> bool:
        """Ends it; False if nothing has that name. Nobody reads or writes the memory any more when this returns:
        no peer, and no transfer of this process, which it waits for.

        Raises:
            PeerError: `timed_out`; a peer was stopped in the middle of a write, or a transfer of this process does not
                end. Later ones are refused.
        """
        with self._registering:
            with self._life.lock:
                region = self.regions.take(name)
            if region is None:
                return False
            try:
                self._conceal(region)
            finally:
                with contextlib.suppress(PeerError):  # Without a peer-agent nobody finds it either.
                    self._life.ask(DropRegion(name=name, epoch=region.epoch), Done)
        return True

    def _expose(self, region: LocalRegion) -> None:
        for endpoint in self.connections.endpoints.values():
            token = endpoint.expose(region)
            if token is not None:
                region.tokens[endpoint.name] = token

    def _conceal(self, region: LocalRegion, *, wait: bool = True) -> None:
        region.live = False
        until = time.monotonic() + (STALL_S if wait else 0.0)
        stuck: TransportError | None = None
        for endpoint in self.connections.endpoints.values():
            try:
                endpoint.conceal(region)
            except TransportError as error:
                stuck = error
        if stuck is not None:
            raise PeerError(stuck.code, str(stuck))
        if not self.transfers.let_go(region, until):
            reason = f"region {region.name!r}: a transfer of this process still uses it; wait for its future first"
            raise PeerError(TIMED_OUT, reason)

    def _put(self, region: LocalRegion) -> None:
        shared = "shm" in region.tokens
        if shared and not self._epochs_sent:
            page: int = cast(Any, self.connections.endpoints["shm"]).epochs_fd
            self._life.ask(PutEpochs(), Done, (page,))
            self._epochs_sent = True
        put = PutRegion(
            name=region.name,
            length=region.length,
            epoch=region.epoch,
            address=region.address,
            writable=region.writable,
            tokens={name: dict(token) for name, token in region.tokens.items()},
            fds=int(shared),
        )
        self._life.ask(put, Done, (region.fd,) if shared else ())

    def peers(self) -> list[str]:
        """Aliases in the scope, sorted, this one included."""
        return sorted(self._life.ask(ListPeers(), Aliases).aliases)

    def peer(self, alias: str) -> Peer | None:
        return self._life.ask(GetPeer(alias=alias), PeerFacts).peer

    def set_topology(self, targets: Sequence[str], *, min_bw: Bandwidth | None, symmetric: bool) -> Topology:
        question = SetTopology(target_peers=list(targets), min_bw=min_bw, symmetric=symmetric)
        return self._life.ask(question, TopologyFacts).topology

    def on_told(self, told: Told) -> Answer | Refused | None:
        """Answers the peer-agent; from any thread."""
        if not self._life.ready():
            return Refused(code=CLOSED, reason="this peer has ended", status=409)
        try:
            match told:
                case Accept():
                    return self.connections.accept(told)
                case Order():
                    return self.orders.begin(told.transfer)
                case Lost():
                    self.connections.lost(told)
                case Desired():
                    self._keeper.desire(told.topology)
        except (PeerError, TransportError) as error:
            return Refused(code=error.code, reason=str(error), status=409)
        except ValueError as error:
            return Refused(code=BAD_MESSAGE, reason=str(error), field="body.conn_id")
        return None

    def _on_agent_gone(self, reason: str) -> None:
        logger.error("peer %s: %s; connections go on, but nobody finds it any more", self._life.alias, reason)

    def stats(self) -> dict[str, Any]:
        """See :meth:`computemesh.peer.agent.PeerAgent.stats`."""
        states = [conn.state for conn in self.connections.all()]
        found: dict[str, Any] = {
            "regions": len(self.regions.by_name),
            "connections": {state: states.count(state) for state in ("connecting", "connected", "failed")},
        }
        found |= self.transfers.stats()
        for name, endpoint in self.connections.endpoints.items():
            found[name] = {**asdict(self.transfers.moved[name]), **endpoint.stats()}
        return found

    def close(self, reason: str = "this agent was shut down") -> None:
        """Ends it: memory is out of reach, connections end, futures fail, the alias is free. Twice is fine."""
        if os.getpid() != self._pid:  # A copy of the process that was made by fork: none of this is its own.
            return
        if sys.is_finalizing():  # There are no threads any more, and who waited for one would wait forever.
            return
        if not self._life.end(reason):
            return
        self._keeper.end()
        self.connections.end(reason)
        with self._registering:
            for region in self.regions:
                self.regions.take(region.name)
                with contextlib.suppress(PeerError):
                    self._conceal(region, wait=False)
        self._teller.end()
        self._life.signals.close()
        for endpoint in self._all:
            endpoint.close()
        if not self.transfers.let_go(None, time.monotonic() + CLOSE_S):
            logger.warning("peer %s has ended, and transfers of it still use its memory", self.alias)

    def after_fork(self) -> None:
        """The child is no peer. What it has of its parent stays as it is there: nothing is closed that both have."""
        self._registering = threading.Lock()
        self._life.after_fork(FORKED)
        self.connections.after_fork(FORKED)
        self.transfers.after_fork(Outcome(CLOSED, FORKED))


_of_the_parent: Final[list[Core]] = []
"""In a child made by ``fork``: an interface of RDMA would end what is its parent's when nobody holds it any more."""


def _in_child() -> None:
    for core in list(_living):
        core.after_fork()
        _of_the_parent.append(core)


os.register_at_fork(after_in_child=_in_child)

_living: Final[weakref.WeakSet[Core]] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A program that ends without a word: its agents do so while there are threads that can do it."""
    for core in list(_living):
        with contextlib.suppress(Exception):
            core.close("the process has ended")
