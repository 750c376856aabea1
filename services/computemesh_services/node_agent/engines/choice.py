"""Which device serves a request, and what a device does next. Pure.

A request joins the line of one device (:func:`choose`) and stays in it. Devices work their lines off by
:func:`next_move`, which keeps these rules:

- Requests for one model begin in the order in which they came, as many at a time as the engine has slots. Work items
  take no slot: the engine shares itself among them and the requests.
- A model is replaced only when nothing uses it.
- Whoever needs another model than the one in memory is overtaken by those who need that one for ``patience_s``, and no
  longer. The time begins anew when a model has been loaded, so that a load always serves for a while. Nobody waits
  for ever.
- A start that nobody waits for any more goes on, and gives way to another model after ``patience_s``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

FIT: Final = 1.1
"""Memory that a model takes, over the size of its file: at least so much."""


@dataclass(frozen=True, kw_only=True)
class DeviceView:
    """A device, as the choice among devices sees it."""

    id: str
    model: str = ""
    """In memory, or about to be; empty for none."""
    ready: bool = False
    """It serves that model now."""
    pending: int = 0
    """Requests in its line and at work."""
    works: int = 0
    """Work items in its line and at work."""
    total_mb: int | None = None
    free_mb: int | None = None
    used_at: int = 0
    """Counts up with each use of any device."""
    barred: bool = False
    """The model that is asked for failed on it a moment ago."""


class No(StrEnum):
    """Why no device takes a request."""

    FULL = "full"
    BARRED = "barred"
    """The model failed on each of them a moment ago."""


def choose(
    model: str,
    devices: Sequence[DeviceView],
    *,
    pending_max: int | None,
    size_mb: int | None = None,
    wish: str = "",
) -> DeviceView | No:
    """The device whose line a request for *model* joins.

    One that has the model comes first, the least busy of them. Else one where it fits, the least busy, an empty one
    before one that must drop a model; of the empty ones that with most free memory, of the others the one used longest
    ago.

    Args:
        pending_max: requests that a device takes; None for a work item, which any device takes.
        size_mb: of the model's files, MiB; None when not known.
        wish: the id of a device, which is preferred among those with room, unless it would have to drop a model to
            take one that another device has.
    """
    room = [one for one in devices if pending_max is None or one.pending < pending_max]
    able = [one for one in room if not one.barred]
    if not able:
        return No.BARRED if all(one.barred for one in devices) else No.FULL

    def order(one: DeviceView) -> tuple[float, ...]:
        has_it = one.model == model
        wished = one.id == wish
        busy = one.pending + one.works
        free = one.free_mb or 0
        if has_it:
            return (0 if wished else 1, not one.ready, busy, -free)
        occupied = bool(one.model)
        first = 3 if not wished else 2 if occupied else 0
        return (first, not _fits(size_mb, one), busy, occupied, one.used_at if occupied else -free, -free)

    return min(able, key=order)


def _fits(size_mb: int | None, one: DeviceView) -> bool:
    """Whether a model fits, as far as that is known. What an occupied device has free shows only afterwards."""
    there_is = one.total_mb if one.model else one.free_mb
    return size_mb is None or there_is is None or size_mb * FIT <= there_is


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """One in the line of a device."""

    model: str
    since_s: float
    work: bool = False
    """A work item; it takes no slot."""


@dataclass(frozen=True, kw_only=True)
class EngineView:
    """What a device has in memory."""

    model: str = ""
    """Empty for none."""
    ready: bool = False
    since_s: float = 0.0
    """When it became ready, or its start began."""
    running: int = 0
    """Requests at work."""
    works: int = 0
    """Work items at work."""
    slots: int = 1


@dataclass(frozen=True)
class Run:
    """That one's turn has come; it leaves the line."""

    index: int


@dataclass(frozen=True)
class Load:
    """The engine that is there ends, if any, and one for *model* starts."""

    model: str


@dataclass(frozen=True)
class Hold:
    """Nothing, until something changes, or until a time."""

    until_s: float | None = None
    draining: bool = False
    """Another model takes the place of this one as soon as nothing uses it."""


def next_move(engine: EngineView, line: Sequence[Waiting], *, now_s: float, patience_s: float) -> Run | Load | Hold:
    """What a device does next; ask again after each ``Run``.

    Args:
        line: who waits for it, in the order in which they came.
        now_s: of the same clock as the other times, seconds.
    """
    if not line:
        return Hold()
    first = line[0]
    if not engine.model:
        return Load(first.model)
    until_s = max(first.since_s, engine.since_s) + patience_s
    overdue = first.model != engine.model and now_s >= until_s
    mine = [] if overdue else [index for index, one in enumerate(line) if one.model == engine.model]
    if engine.ready:
        for index in mine:
            if line[index].work or engine.running < engine.slots:
                return Run(index)
    if mine:
        return Hold(None if first.model == engine.model else until_s)
    if engine.running or engine.works:
        return Hold(draining=True)
    if not engine.ready and not overdue:
        return Hold(until_s)
    return Load(first.model)
