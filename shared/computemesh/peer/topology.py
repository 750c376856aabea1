"""Connections that are to be there, because the control plane was told so."""

from __future__ import annotations

import contextlib
import secrets
import threading
from typing import Final

from computemesh.contracts.peers import Topology
from computemesh.peer.attachment import Attachment
from computemesh.peer.connections import Connections
from computemesh.peer.errors import PeerError

RETRY_S: Final = (0.5, 30.0)
"""The first and the longest pause before a desired connection is tried again; each is twice the one before."""


class Keeper:
    """Keeps a peer connected to those that its topology names."""

    def __init__(self, life: Attachment, connections: Connections) -> None:
        self._life = life
        self._connections = connections
        self._desired: Topology | None = None
        self._changed = threading.Condition()
        self._running = False

    def desire(self, topology: Topology) -> None:
        """From now on these; those that failed are tried again at once."""
        with self._changed:
            self._desired = topology
            if not self._running:
                self._running = True
                self._life.spawn("topology", self._keep)
            self._changed.notify_all()

    def end(self) -> None:
        """The peer has ended."""
        with self._changed:
            self._changed.notify_all()

    def _keep(self) -> None:
        pause_s = RETRY_S[0]
        while not self._life.closed:
            desired = self._desired
            lacking = self._lacking(desired) if desired is not None else []
            for peer in lacking:
                with contextlib.suppress(PeerError):
                    self._connections.connect(peer, min_bw=desired.min_bw if desired is not None else None)
            with self._changed:
                if self._desired is desired and not self._life.closed:
                    self._changed.wait(pause_s * (0.75 + secrets.randbelow(500) / 1000))
                fresh = self._desired is not desired or not lacking
            pause_s = RETRY_S[0] if fresh else min(RETRY_S[1], 2 * pause_s)

    def _lacking(self, desired: Topology) -> list[str]:
        there = {conn.peer_alias for conn in self._connections.all() if conn.state != "failed"}
        return [peer for peer in desired.target_peers if peer != self._life.alias and peer not in there]
