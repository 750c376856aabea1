"""Transfers that were ordered over the bus: which run, and how those that ended did. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

from computemesh.contracts.base import Refused, encode
from computemesh.contracts.peers import Transfer, TransferBegun, Transferred
from computemesh_services.peer_agent.desk import Name

KEPT: Final = 10_000
"""Transfers that have ended of which it is known how."""

GRACE_S: Final = 2.0
"""How long after its time a transfer is still waited for: the process says itself that the time is over."""

State = Literal["running", "completed", "failed"]
_RUNNING: Final[State] = "running"


@dataclass(slots=True)
class _Entry:
    terms: bytes
    transfer: Transfer
    began: float


class Transfers:
    """Each id is begun once, and ends once.

    Args:
        running_max: transfers at once.
    """

    def __init__(self, running_max: int, node_id: str) -> None:
        self._running_max = running_max
        self._node_id = node_id
        self._running: dict[str, _Entry] = {}
        self._ended: dict[str, tuple[bytes, State]] = {}
        """By the order in which they ended."""

    @property
    def running(self) -> int:
        return len(self._running)

    def known(self, transfer: Transfer) -> TransferBegun | Refused | None:
        """Where a transfer stands that was asked for before; None when its id is new."""
        transfer_id = transfer.transfer_id
        entry = self._running.get(transfer_id)
        known = (entry.terms, _RUNNING) if entry is not None else self._ended.get(transfer_id)
        if known is None:
            return None
        if known[0] != _terms(transfer):
            reason = f"{transfer_id} stands for a transfer with other terms"
            return Refused(code="conflict", reason=reason, field="transfer_id", status=409)
        return TransferBegun(transfer_id=transfer_id, state=known[1])

    def begin(self, transfer: Transfer, now: float) -> Refused | None:
        """A transfer whose id is new runs from now on; or why it cannot.

        Args:
            now: seconds by a clock that never goes back.
        """
        assert self.known(transfer) is None, f"{transfer.transfer_id} was begun before"
        if len(self._running) >= self._running_max:
            reason = f"{self._running_max} transfers run on this node, and no more are taken"
            return Refused(code="too_many_requests", reason=reason, status=429, retry="later")
        self._running[transfer.transfer_id] = _Entry(_terms(transfer), transfer, now)
        return None

    def forget(self, transfer_id: str) -> None:
        """It was not begun after all, and may be asked for again."""
        self._running.pop(transfer_id, None)

    def end(self, name: Name, outcome: Transferred) -> Transferred | None:
        """How a transfer of a process ended, as it is told; None when that was told before, or is not its to tell.

        One that is not known was begun in an earlier life of the peer-agent.
        """
        entry = self._running.get(outcome.transfer_id)
        if outcome.transfer_id in self._ended:
            return None
        if entry is not None and (entry.transfer.scope, entry.transfer.alias) != name:
            return None
        terms = self._running.pop(outcome.transfer_id).terms if entry is not None else b""
        self._keep(outcome.transfer_id, terms, "completed" if outcome.ok else "failed")
        return Transferred(
            transfer_id=outcome.transfer_id,
            node_id=self._node_id,
            scope=name.scope,
            alias=name.alias,
            peer=outcome.peer,
            kind=outcome.kind,
            ok=outcome.ok,
            bytes=outcome.bytes,
            seconds=outcome.seconds,
            transports=outcome.transports,
            epochs=outcome.epochs,
            checksums=outcome.checksums,
            code=outcome.code,
            reason=outcome.reason,
            at=outcome.at,
        )

    def fail_of(self, name: Name, code: str, reason: str, now: float, at: float) -> list[Transferred]:
        """Ends what a process had in hand, which has ended itself."""
        return [
            self._fail(entry, code, reason, now, at)
            for entry in list(self._running.values())
            if (entry.transfer.scope, entry.transfer.alias) == name
        ]

    def fail_overdue(self, now: float, at: float) -> list[Transferred]:
        """Ends what a process should have ended by now."""
        return [
            self._fail(entry, "timed_out", f"not done in {entry.transfer.timeout_s:g} s", now, at)
            for entry in list(self._running.values())
            if now - entry.began > entry.transfer.timeout_s + GRACE_S
        ]

    def fail_all(self, code: str, reason: str, now: float, at: float) -> list[Transferred]:
        """Ends everything: the peer-agent ends."""
        return [self._fail(entry, code, reason, now, at) for entry in list(self._running.values())]

    def _fail(self, entry: _Entry, code: str, reason: str, now: float, at: float) -> Transferred:
        transfer = entry.transfer
        del self._running[transfer.transfer_id]
        self._keep(transfer.transfer_id, entry.terms, "failed")
        return Transferred(
            transfer_id=transfer.transfer_id,
            node_id=self._node_id,
            scope=transfer.scope,
            alias=transfer.alias,
            peer=transfer.peer,
            kind=transfer.kind,
            ok=False,
            seconds=now - entry.began,
            code=code,
            reason=reason,
            at=at,
        )

    def _keep(self, transfer_id: str, terms: bytes, state: State) -> None:
        self._ended[transfer_id] = (terms, state)
        if len(self._ended) > KEPT:
            del self._ended[next(iter(self._ended))]


def _terms(transfer: Transfer) -> bytes:
    return hashlib.sha256(encode(transfer)).digest()
