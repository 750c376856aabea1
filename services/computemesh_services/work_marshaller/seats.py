"""What the marshaller knows of a node: its record, its work, and whether it may have more. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from computemesh.contracts.nodes import NodeRecord
from computemesh_services.work_marshaller.placement import Candidate

Place = tuple[str, int]
"""A replica of an item: the item's id, and the number of the replica."""

REST_S: Final = 1.0
REST_S_MAX: Final = 30.0
"""A node that could not be reached, or refused an item, is left alone this long unless it shows up; the
pause doubles while it goes on."""

STRIKES_MAX: Final = 3
"""Timeouts in a row after which a node that never sends heartbeats gets no more work."""


@dataclass
class Seat:
    """What the scheduler knows of a node."""

    node: NodeRecord
    taken: set[Place] = field(default_factory=set[Place])
    """What of items is with it."""
    loaded_models: frozenset[str] = frozenset()
    accepting: bool = True
    strikes: int = 0
    rests: int = 0
    """Rests in a row, without a sign of life between them."""
    rests_until: float = 0.0
    rest_reason: str = ""
    session: str = ""

    def candidate(self, now: float, objection: str = "") -> Candidate:
        """The node as placement sees it.

        Args:
            objection: why it gets nothing of the kind that is to be placed.
        """
        reason = self.rest_reason if now < self.rests_until else objection
        if self.strikes >= STRIKES_MAX and not self.node.monitored:
            reason = f"let {self.strikes} items time out in a row"
        return Candidate(self.node, len(self.taken), self.loaded_models, self.accepting, reason)
