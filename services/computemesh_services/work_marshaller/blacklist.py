"""Which nodes get no work of some kind for a while, because it kept failing there. Pure.

A circuit breaker for each node and kind of work (its type and model):

    closed  --failures of `after` different items in a row-->  open, for `hold_s`
    open    --`until` has passed-->                            half open: one item is tried
    half open  --it goes well-->  closed       --it fails-->   open, for twice as long (as long as before, when the
                                                               item had failed there already)

Whose fault a failure was is not always said. So an item that fails on a second node is suspected itself: it counts
against neither of them. What a node reports as the work's own fault never comes here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

import msgspec

from computemesh.contracts.base import Message
from computemesh.contracts.work import Blacklisted

KINDS_MAX: Final = 10_000
"""Nodes and kinds with failures that are remembered; beyond it the one that failed longest ago is forgotten."""

ITEMS_MAX: Final = 10_000
"""Items of which it is remembered where they failed."""

Kind = tuple[str, str, str]
"""Node id, work type, model name."""


class BlacklistPolicy(Message, frozen=True, kw_only=True):
    after: int = 3
    """Different items that must fail in a row on a node; 0 = no node is ever blacklisted."""
    hold_s: float = 60.0
    """How long it gets none the first time; doubled each further time in a row."""
    hold_s_max: float = 3600.0


class Tally(Message, frozen=True, kw_only=True):
    """What went wrong on a node with one kind of work since it last went well."""

    node_id: str
    work_type: str
    model_name: str = ""
    failed: list[str] = []
    """The items, the latest last; at most as many as open the circuit."""
    reason: str = ""
    """Of the latest failure."""
    failed_at: float = 0.0
    """Unix seconds."""
    opened: int = 0
    """Times in a row that the circuit opened."""
    since: float = 0.0
    """Unix seconds at which it opened first."""
    until: float = 0.0
    probing: str = ""
    """The item that is tried while the circuit is half open."""

    @property
    def kind(self) -> Kind:
        return self.node_id, self.work_type, self.model_name


class Blacklist:
    """The tallies of all nodes. Time is a parameter, in Unix seconds."""

    def __init__(self, policy: BlacklistPolicy) -> None:
        self.changed = False
        """Something changed that should be stored; whoever stores it sets this back."""
        self._policy = policy
        self._tallies: OrderedDict[Kind, Tally] = OrderedDict()
        self._failed_on: OrderedDict[str, str] = OrderedDict()
        """The node on which an item failed, or empty when it failed on several."""

    # --- what happened -----------------------------------------------------------------------------------------

    def failed(self, kind: Kind, work_id: str, reason: str, now: float) -> float | None:
        """An attempt failed by the node's fault, as far as is known. Gives until when the node is blacklisted, if it
        came to that."""
        if not self._policy.after:
            return None
        suspect = self._suspects(work_id, kind[0])
        tally = self._tallies.get(kind) or Tally(node_id=kind[0], work_type=kind[1], model_name=kind[2])
        probed = tally.probing == work_id
        if suspect and not probed:
            return None
        again = work_id in tally.failed
        failed = [*(other for other in tally.failed if other != work_id), work_id][-self._policy.after :]
        tally = msgspec.structs.replace(tally, failed=failed, reason=reason[:500], failed_at=now)
        opens = probed or (not tally.opened and len(failed) >= self._policy.after)
        if opens:
            # A suspect that fails, or one that failed here before, shows nothing new; but nothing went well either.
            opened = tally.opened if probed and (suspect or again) else tally.opened + 1
            hold_s = min(self._policy.hold_s_max, self._policy.hold_s * 2.0 ** min(opened - 1, 30))
            tally = msgspec.structs.replace(
                tally, opened=opened, since=tally.since or now, until=now + hold_s, probing=""
            )
        self._keep(tally)
        return tally.until if opens else None

    def succeeded(self, kind: Kind, work_id: str) -> None:
        """An attempt went well: the node is trusted again."""
        self._failed_on.pop(work_id, None)
        if self._tallies.pop(kind, None) is not None:
            self.changed = True

    def probe(self, kind: Kind, work_id: str) -> None:
        """The item was given to the node. Should the node be blacklisted, this is what it is tried with."""
        tally = self._tallies.get(kind)
        if tally is not None and tally.opened:
            self._keep(msgspec.structs.replace(tally, probing=work_id))

    def tried(self, kind: Kind, work_id: str) -> None:
        """The item is off the node, and tells nothing about it: it was cancelled, declined, or vanished with it."""
        tally = self._tallies.get(kind)
        if tally is not None and tally.probing == work_id:
            self._keep(msgspec.structs.replace(tally, probing=""))

    def pardon(self, node_id: str, work_type: str = "") -> list[Blacklisted]:
        """Trusts a node again at once; gives what it was blacklisted for."""
        pardoned = [k for k in self._tallies if k[0] == node_id and work_type in ("", k[1])]
        entries = [_entry(tally) for kind in pardoned if (tally := self._tallies.pop(kind)).opened]
        self.changed |= bool(pardoned)
        return entries

    def restore(self, tallies: Iterable[Tally], out: Iterable[tuple[str, str]]) -> None:
        """Takes over what was stored.

        Args:
            out: items that are with nodes, and with which: others are not being tried any more.
        """
        being_tried = set(out)
        for tally in tallies:
            over = tally.probing and (tally.probing, tally.node_id) not in being_tried
            self._tallies[tally.kind] = msgspec.structs.replace(tally, probing="") if over else tally

    # --- questions ---------------------------------------------------------------------------------------------

    def objection(self, kind: Kind, now: float) -> str:
        """Why the node gets nothing of this kind now; empty when it may."""
        tally = self._tallies.get(kind)
        if tally is None or not tally.opened:
            return ""
        what = f"blacklisted for {kind[1]!r}" + (f" with {kind[2]!r}" if kind[2] else "")
        if now < tally.until:
            return f"{what} for {tally.until - now:.0f} s more: {len(tally.failed)} items failed, last: {tally.reason}"
        if tally.probing:
            return f"{what} until {tally.probing}, which is tried on it, goes well; last failure: {tally.reason}"
        return ""

    def entries(self, node_id: str | None = None) -> list[Blacklisted]:
        """What is blacklisted, also what is being tried again, by node."""
        found = [tally for tally in self._tallies.values() if tally.opened and node_id in (None, tally.node_id)]
        return [_entry(tally) for tally in sorted(found, key=lambda tally: tally.kind)]

    def tallies(self) -> list[Tally]:
        """What to store."""
        return list(self._tallies.values())

    # --- bookkeeping -------------------------------------------------------------------------------------------

    def _suspects(self, work_id: str, node_id: str) -> bool:
        """Whether the item itself is suspected, as it failed on other nodes too. Takes back what it did to those."""
        before = self._failed_on.get(work_id, node_id)
        self._failed_on[work_id] = node_id if before == node_id else ""
        self._failed_on.move_to_end(work_id)
        while len(self._failed_on) > ITEMS_MAX:
            self._failed_on.popitem(last=False)
        if before == node_id:
            return False
        for tally in list(self._tallies.values()):
            if work_id in tally.failed and not tally.opened:
                self._keep(msgspec.structs.replace(tally, failed=[other for other in tally.failed if other != work_id]))
        return True

    def _keep(self, tally: Tally) -> None:
        self._tallies[tally.kind] = tally
        self._tallies.move_to_end(tally.kind)
        if not tally.failed and not tally.opened:
            del self._tallies[tally.kind]
        while len(self._tallies) > KINDS_MAX:
            self._tallies.popitem(last=False)
        self.changed = True


def _entry(tally: Tally) -> Blacklisted:
    return Blacklisted(
        node_id=tally.node_id,
        work_type=tally.work_type,
        model_name=tally.model_name,
        failures=len(tally.failed),
        since=tally.since,
        until=tally.until,
        probing=tally.probing,
        reason=tally.reason,
    )
