"""What the server published as recorded, what is stored in the end, and what must hold of both. Pure but for hearing.

Every invariant is a function that gives its violations in words; a mesh that keeps its promises has none.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec
from nats.aio.msg import Msg

from computemesh.contracts.work import FINAL, WorkRecord, WorkState
from computemesh_services.work_marshaller.workitem import NEXT, STORY_MAX

TAKE_OVER_S: Final = 5.0
"""The promise: after whatever was done, some marshaller answers again within this time."""

SLACK: Final = 3.0
"""By how much a machine that has other things to do may stretch that."""


@dataclass(frozen=True)
class Event:
    """A record as the server published it."""

    revision: int
    before: int
    """Revision of the item's record that this one replaced; 0 = it had none."""
    record: WorkRecord


@dataclass
class History:
    """Everything that was seen of a run."""

    events: dict[str, list[Event]] = field(default_factory=lambda: defaultdict[str, list[Event]](list))
    """By item, in the order they were heard. Some are missing: nobody hears anything while the server is away."""
    stored: Mapping[str, WorkRecord] = field(default_factory=dict[str, WorkRecord])
    """What the bucket holds in the end."""
    accepted: dict[str, int] = field(default_factory=dict[str, int])
    """The number in each item whose submission was acknowledged as stored."""
    cancelled: set[str] = field(default_factory=set[str])
    """Items of which somebody was told that they are cancelled."""
    disturbed_s: list[float] = field(default_factory=list[float])
    """When something was done to the mesh, or undone."""
    answered_s: list[float] = field(default_factory=list[float])
    """When a marshaller answered."""
    ended: int = 0
    """Items of which a final state was heard."""

    async def on_state(self, message: Msg) -> None:
        headers = message.headers or {}
        record = msgspec.json.decode(message.data, type=WorkRecord)
        self.add(Event(int(headers["Nats-Sequence"]), int(headers["Nats-Last-Sequence"]), record))

    def add(self, event: Event) -> None:
        self.events[event.record.work_id].append(event)
        self.ended += event.record.state in FINAL


def nothing_that_was_accepted_is_lost(history: History) -> Iterator[str]:
    """An acknowledged submission has a record, and the record has ended."""
    for work_id in history.accepted:
        record = history.stored.get(work_id)
        if record is None:
            yield f"{work_id} was accepted and is not there"
        elif record.state not in FINAL:
            yield f"{work_id} is {record.state}"


def nothing_is_there_that_nobody_submitted(history: History) -> Iterator[str]:
    """A report about an unknown item makes no item."""
    for work_id in {*history.stored, *history.events} - {*history.accepted}:
        yield f"{work_id} came from nowhere"


def every_item_has_one_recorded_outcome(history: History) -> Iterator[str]:
    """In what was published, and in the story of what is stored."""
    for work_id, events in history.events.items():
        outcomes = {event.revision: str(event.record.state) for event in events if event.record.state in FINAL}
        if len(outcomes) > 1:
            yield f"{work_id} has the outcomes {outcomes}"
    for work_id, record in history.stored.items():
        if sum(move.state in FINAL for move in record.story) > 1:
            yield f"{work_id} ended more than once: {told(record)}"


def every_result_is_right(history: History) -> Iterator[str]:
    """Done work has the result of its own input; an item ends otherwise only when it was cancelled."""
    for work_id, number in history.accepted.items():
        record = history.stored.get(work_id)
        if record is None or record.state not in FINAL:
            continue
        if record.state is WorkState.COMPLETED and record.result != {"square": number**2}:
            yield f"{work_id} has the result {record.result}: {told(record)}"
        if record.state is not WorkState.COMPLETED and record.state is not WorkState.CANCELLED:
            yield f"{work_id} is {record.state}: {told(record)}"


def a_cancellation_that_was_confirmed_stands(history: History) -> Iterator[str]:
    """Whoever was told that an item is cancelled finds it so for ever."""
    for work_id in history.cancelled:
        record = history.stored.get(work_id)
        if record is not None and record.state is not WorkState.CANCELLED:
            yield f"{work_id} was confirmed to be cancelled and is {record.state}: {told(record)}"


def every_move_is_legal(history: History) -> Iterator[str]:
    """Each line of a story may follow the one before, and each record continues the story of the one before."""
    for work_id, events in history.events.items():
        for event in events:
            story = [move.state for move in event.record.story]
            if any(to not in NEXT[at] for at, to in itertools.pairwise(story)) or story[-1] != event.record.state:
                yield f"{work_id}: no such story: {told(event.record)}"
        for earlier, later in itertools.pairwise(event.record for event in events):
            if earlier.state in FINAL:
                yield f"{work_id} was {earlier.state}, then {later.state}: {told(later)}"
            elif len(later.story) < STORY_MAX and later.story[: len(earlier.story)] != earlier.story:
                yield f"{work_id}: another past: {told(earlier)} became {told(later)}"


def revisions_only_grow(history: History) -> Iterator[str]:
    """And each record replaced one that is not newer than the last that was heard of."""
    for work_id, events in history.events.items():
        for earlier, later in itertools.pairwise(events):
            if not earlier.revision <= later.before < later.revision:
                yield f"{work_id}: revision {later.revision} replaced {later.before} after {earlier.revision}"


def attempts_and_their_counts_only_grow(history: History) -> Iterator[str]:
    """A number that was used for one attempt is not used for another."""
    for work_id, events in history.events.items():
        for earlier, later in itertools.pairwise(event.record for event in events):
            if (later.attempt, later.failures, later.losses) < (earlier.attempt, earlier.failures, earlier.losses):
                yield f"{work_id}: {told(earlier)} became {told(later)}"
            if later.attempt == earlier.attempt and later.node_id != earlier.node_id:
                yield f"{work_id}: attempt {later.attempt} was on {earlier.node_id}, then on {later.node_id}"


def somebody_took_over_in_time(history: History) -> Iterator[str]:
    """However often it was disturbed, a marshaller answered soon after the last time."""
    if (late_s := slowest_take_over_s(history)) > TAKE_OVER_S * SLACK:
        yield f"nobody answered for {late_s:.1f} s after the last disturbance; {TAKE_OVER_S:g} s are promised"


def slowest_take_over_s(history: History) -> float:
    """The longest time without an answer, counted from the last disturbance before the answer."""
    longest_s = 0.0
    for before_s, after_s in itertools.pairwise(history.answered_s):
        since_s = max([before_s, *(at for at in history.disturbed_s if at < after_s)])
        longest_s = max(longest_s, after_s - since_s)
    return longest_s


INVARIANTS: Final[tuple[Callable[[History], Iterator[str]], ...]] = (
    nothing_that_was_accepted_is_lost,
    nothing_is_there_that_nobody_submitted,
    every_item_has_one_recorded_outcome,
    every_result_is_right,
    a_cancellation_that_was_confirmed_stands,
    every_move_is_legal,
    revisions_only_grow,
    attempts_and_their_counts_only_grow,
    somebody_took_over_in_time,
)


def violations(history: History) -> list[str]:
    """Everything that is not as promised, with the name of the promise."""
    return [f"{holds.__name__}: {what}" for holds in INVARIANTS for what in holds(history)]


def told(record: WorkRecord) -> str:
    """A record's story in one line."""
    return " > ".join(f"{move.state}/{move.attempt}@{move.node_id or '-'}" for move in record.story)
