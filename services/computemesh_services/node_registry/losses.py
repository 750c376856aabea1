"""Telling of each loss: once it is stored, by whoever acts, and across the deaths of those who act.

Everyone who mirrors the bucket sees the losses in it and hears the events about them. A loss that was not
heard of waits here; whoever acts publishes what waits. Up to which revision all was told is noted in the
bucket, behind the events on the same connection, so that a first life after a crash knows it too.

So a loss is told at least once, unless its node is back before that; and twice only when the last
registry that lived ended between an event and the note of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from computemesh.bus import Bucket, Bus, Entry
from computemesh.contracts import nodes, storage
from computemesh.contracts.base import Message
from computemesh.contracts.nodes import NodeLost, NodeRecord, NodeState

TOLD_KEY: Final = "meta.losses"
"""Two tokens, so that it is no node."""


class Told(Message, frozen=True, kw_only=True):
    """Losses up to this revision of the bucket were told."""

    revision: int


NOTES: Final = storage.Bucket(
    name=storage.NODES.name,
    value=Told,
    owner=storage.NODES.owner,
    max_bytes=storage.NODES.max_bytes,
    about="The same bucket, for what it holds beside nodes.",
)


class Losses:
    """The losses that are stored, and which of them were told."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._notes = Bucket(bus, NOTES)
        self._told = 0
        """Losses up to this revision were told, as noted in the bucket."""
        self._seen = 0
        """Revision of the newest record of a lost node."""
        self._untold: dict[str, NodeLost] = {}
        """Losses that are stored, and of which nobody was heard."""
        self._heard: dict[str, int] = {}
        """Epoch of the loss that was told last, by node."""

    def noticed(self, node_id: str, record: NodeRecord | None, revision: int) -> None:
        """A record is stored, or gone."""
        if record is None:
            self._heard.pop(node_id, None)
        elif record.state is NodeState.LOST:
            self._seen = max(self._seen, revision)
            if revision > self._told and self._heard.get(node_id) != record.epoch:
                silent_s = round(max(0.0, record.changed_at - record.last_seen), 1)
                self._untold[node_id] = NodeLost(
                    node_id=node_id, epoch=record.epoch, silent_s=silent_s, left=record.left
                )

    async def on_lost(self, told: NodeLost) -> None:
        """Somebody told of a loss."""
        self._heard[told.node_id] = told.epoch
        waiting = self._untold.get(told.node_id)
        if waiting is not None and waiting.epoch == told.epoch:
            del self._untold[told.node_id]

    async def take_over(self, entries: Mapping[str, Entry[NodeRecord]]) -> None:
        """Whoever begins to act, and has read all *entries*, first learns what was told before.

        Raises:
            BusError: the note cannot be read.
        """
        note = await self._notes.get(TOLD_KEY)
        self._told = max(self._told, note.value.revision if note else 0)
        for node_id in list(self._untold):
            if node_id in entries and entries[node_id].revision <= self._told:
                del self._untold[node_id]

    async def tell(self) -> int:
        """Publishes what waits, notes it, and gives how many there were.

        Raises:
            BusError: not all of it; the rest is told the next time.
        """
        seen = self._seen
        waiting = list(self._untold.values())
        for lost in waiting:
            await self._bus.publish(nodes.LOST, lost)
            self._heard[lost.node_id] = lost.epoch
            self._untold.pop(lost.node_id, None)
        if seen > self._told:
            note, last = await self._notes.read(TOLD_KEY)
            if note is None or note.value.revision < seen:
                await self._notes.update(TOLD_KEY, Told(revision=seen), last=last)
            self._told = seen
        return len(waiting)
