"""Goal: whatever happens, an item that was accepted ends in exactly one recorded outcome.

Method: a simulated mesh. The scheduler, the floor and the roster are the real ones; the inbox, the bucket,
the journal's merging and the nodes are small models of what they do. Hypothesis chooses what happens:
submissions, deliveries that arrive or do not, reports that are doubled or late, nodes that restart, vanish
and return, and marshallers that crash between any two acknowledgements, with their last writes lost, landed
or landing late under their successor. Invariants hold after each step; at the end a healthy node joins, and
then everything must end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from computemesh.contracts.nodes import NodeAnnouncement, NodeHeartbeat, NodeRecord, RunningWork
from computemesh.contracts.work import (
    FINAL,
    Requirements,
    WorkCompleted,
    WorkFailed,
    WorkItem,
    WorkRecord,
    WorkState,
)
from computemesh.testing.builders import a_gpu
from computemesh_services.node_registry import roster
from computemesh_services.node_registry.roster import Patience
from computemesh_services.work_marshaller import scheduler as scheduling
from computemesh_services.work_marshaller import workitem
from computemesh_services.work_marshaller.effects import Deliver, Stop, consequences
from computemesh_services.work_marshaller.floor import Floor
from computemesh_services.work_marshaller.scheduler import Limits, Scheduler
from computemesh_services.work_marshaller.workitem import NEXT, STORY_MAX, RetryPolicy

LIMITS: Final = Limits(waiting_max=1000, retry=RetryPolicy(retries_max=2, delay_s=2.0))
PATIENCE: Final = Patience()
DELIVERIES_MAX: Final = 3
ROUNDS_MAX: Final = 120
"""Rounds of five seconds in which a mesh with a healthy node must finish: far less than the longest timeout."""
ACTIONS_MAX: Final = 500
"""What a marshaller may have to store and to send in one of those rounds."""

OUT: Final = (WorkState.ASSIGNED, WorkState.RUNNING)
WAITING: Final = (WorkState.PENDING, WorkState.RETRYING)

Captured = WorkItem | WorkCompleted | WorkFailed
Fate = Literal["lands", "is lost", "lands late"]

steps: Counter[str] = Counter()
"""What happened in a run, so that the test can tell when it has become weak."""


class ReignEnded(Exception):
    """The journal can no longer vouch for what is stored."""


class WriteConflict(Exception):
    """The key is not at the expected revision."""


@dataclass
class Bucket:
    """What is stored, and everything that ever was."""

    records: dict[str, tuple[WorkRecord, int]] = field(default_factory=dict[str, tuple[WorkRecord, int]])
    history: dict[str, list[WorkRecord]] = field(default_factory=dict[str, list[WorkRecord]])
    cursor: int = 1
    revision: int = 0

    def put(self, record: WorkRecord, expected: int) -> int:
        before, revision = self.records.get(record.work_id, (None, 0))
        if revision != expected:
            raise WriteConflict(record.work_id)
        check_successor(before, record)
        self.revision += 1
        self.records[record.work_id] = (record, self.revision)
        self.history.setdefault(record.work_id, []).append(record)
        steps[f"stored {record.state}"] += 1
        return self.revision


def check_successor(before: WorkRecord | None, after: WorkRecord) -> None:
    """One record may follow another in the store."""
    moves = [move.state for move in after.story]
    assert len(moves) == STORY_MAX or moves[0] is WorkState.PENDING, after.story
    assert all(to in NEXT[at] for at, to in pairwise(moves)), after.story
    assert moves[-1] is after.state, after.story
    if before is None:
        return
    assert before.state not in FINAL, f"{before.state} was overwritten with {after.state}: {after.story}"
    if len(moves) < STORY_MAX:
        assert after.story[: len(before.story)] == before.story, (before.story, after.story)
    assert after.attempt >= before.attempt
    assert after.failures >= before.failures
    assert after.losses >= before.losses
    steps["merged writes"] += len(after.story) - len(before.story) > 1


@dataclass
class Slot:
    """As the journal's: one item's place in the bucket."""

    revision: int = 0
    stored: WorkRecord | None = None
    flight: WorkRecord | None = None
    flight_seqs: list[int] = field(default_factory=list[int])
    wanted: WorkRecord | None = None
    seqs: list[int] = field(default_factory=list[int])


@dataclass
class Call:
    """A delivery that is on its way."""

    record: WorkRecord
    times_sent: int = 1


@dataclass
class Node:
    """A machine. The registry's record of it may lag behind."""

    node_id: str
    direct: bool
    slots: int
    gpu: bool = False
    life: int = 1
    alive: bool = False
    record: NodeRecord | None = None
    running: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])

    @property
    def session(self) -> str:
        return f"s{self.life}" if self.direct else ""

    def announcement(self) -> NodeAnnouncement:
        return NodeAnnouncement(
            node_id=self.node_id,
            session=self.session,
            delivery="direct" if self.direct else "plain",
            slots=self.slots,
            gpus=[a_gpu()] if self.gpu else [],
        )


class Reign:
    """One marshaller's memory, with the journal modelled: one put per item in flight, later ones merged."""

    def __init__(self, mesh: Mesh) -> None:
        self.scheduler = Scheduler(LIMITS, jitter=lambda: 0.5)
        self.floor = Floor(mesh.bucket.cursor)
        self.slots: dict[str, Slot] = {}
        self.calls: list[Call] = []
        self.stops: list[Stop] = []
        self.read_to = mesh.bucket.cursor - 1
        self.caught_up = False
        self._mesh = mesh
        for node in mesh.nodes.values():
            if node.record is not None:
                self.scheduler.node_changed(node.record, mesh.now)
        for record, revision in mesh.bucket.records.values():
            self.scheduler.restore(record, mesh.now)
            if record.state not in FINAL:
                self.slots[record.work_id] = Slot(revision=revision, stored=record)
        # Places that two reigns promised to different items, the first of them unwritten.
        self.crowded = {s.node.node_id for s in self.scheduler.seats.values() if len(s.taken) > s.node.slots}
        self.read()
        self.caught_up = True
        self.scheduler.recovered(mesh.now)
        for record in list(self.scheduler.records.values()):
            slot = self.slots.get(record.work_id)
            if record.state is WorkState.ASSIGNED and slot and slot.stored is record:
                self.calls.append(Call(record))
        self.advance()

    def read(self) -> None:
        """The inbox, to its end."""
        while self.read_to < len(self._mesh.inbox):
            self.read_to += 1
            self.floor.open(self.read_to)
            changed = self._decide(self._mesh.inbox[self.read_to - 1], self.read_to)
            if changed is None:
                self.floor.close(self.read_to)
            else:
                self.slots.setdefault(changed.work_id, Slot()).seqs.append(self.read_to)
            self.advance()

    def _decide(self, message: Captured, seq: int) -> WorkRecord | None:
        match message:
            case WorkItem():
                assert message.work_id is not None
                assert self.scheduler.refusal(message, self._mesh.now) is None
                changed = self.scheduler.submitted(message, message.work_id, seq, self._mesh.now)
                steps["duplicate submission"] += changed is None
            case WorkCompleted():
                changed = self.scheduler.completed(message, self._mesh.now)
                self._check_report(message, changed)
            case WorkFailed():
                changed = self.scheduler.failed(message, self._mesh.now)
                self._check_report(message, changed)
        return changed

    def _check_report(self, report: WorkCompleted | WorkFailed, changed: WorkRecord | None) -> None:
        """A report counts only for the attempt it is about."""
        if changed is None:
            steps["stale report"] += 1
        elif report.attempt is None:
            assert changed.plain, changed
        else:
            assert report.attempt == changed.attempt, (report, changed)

    def advance(self) -> None:
        self.scheduler.tick(self._mesh.now)
        if self.caught_up:
            self.scheduler.place(self._mesh.now)
        batch = {record.work_id: record for record in self.scheduler.outbox}
        self.scheduler.outbox.clear()
        for record in batch.values():
            self._write(record)

    def _write(self, record: WorkRecord) -> None:
        slot = self.slots.setdefault(record.work_id, Slot())
        if slot.stored is record:
            return
        slot.wanted = record
        if slot.flight is None:
            self._send(slot)

    def _send(self, slot: Slot) -> None:
        slot.flight, slot.wanted = slot.wanted, None
        slot.flight_seqs, slot.seqs = slot.seqs, []

    def flights(self) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.flight is not None]

    def acknowledge(self, slot: Slot) -> None:
        """The put in flight reaches the bucket, and its answer comes back."""
        record = slot.flight
        assert record is not None
        try:
            revision = self._mesh.bucket.put(record, slot.revision)
        except WriteConflict as error:
            self._conflict(slot, record, error)
            return
        before, slot.stored, slot.revision, slot.flight = slot.stored, record, revision, None
        for seq in slot.flight_seqs:
            self.floor.close(seq)
        if slot.wanted is not None:
            self._send(slot)
        elif record.state in FINAL:
            del self.slots[record.work_id]
        for effect in consequences(before, record):
            match effect:
                case Deliver() if self.scheduler.records.get(record.work_id) is record:
                    self.calls.append(Call(record))
                case Deliver():
                    steps["delivery overtaken"] += 1
                case Stop():
                    self.stops.append(effect)

    def _conflict(self, slot: Slot, record: WorkRecord, error: WriteConflict) -> None:
        found, _ = self._mesh.bucket.records[record.work_id]
        if slot.revision != 0 or found.state not in FINAL:
            raise ReignEnded from error
        steps["duplicate of a forgotten item"] += 1
        for seq in (*slot.flight_seqs, *slot.seqs):
            self.floor.close(seq)
        del self.slots[record.work_id]
        self.scheduler.forget(record.work_id)

    def answered(self, call: Call, answer: Literal["accepted", "declined", "nothing", "no responder"]) -> None:
        """What came back for a delivery."""
        record, now = call.record, self._mesh.now
        self.calls.remove(call)
        if record.plain and answer != "no responder":
            return
        if answer == "accepted":
            session = self._mesh.nodes[record.node_id].session
            self.scheduler.accepted(record.work_id, record.attempt, session, now)
        elif answer == "nothing" and self.scheduler.records.get(record.work_id) is not record:
            return
        elif answer == "nothing" and call.times_sent < DELIVERIES_MAX:
            self.calls.append(Call(record, call.times_sent + 1))
        else:
            steps["declined"] += 1
            self.scheduler.declined(record.work_id, record.attempt, answer, now)
        self.advance()


class Mesh:
    """Everything outside the marshaller's memory, and the marshaller."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.bucket = Bucket()
        self.inbox: list[Captured] = []
        self.late: list[tuple[WorkRecord, int]] = []
        """Puts of dead marshallers that are still on their way."""
        self.reports: list[WorkCompleted | WorkFailed] = []
        self.nodes = {
            node.node_id: node
            for node in (
                Node("direct", direct=True, slots=2),
                Node("gpu", direct=True, slots=1, gpu=True),
                Node("plain", direct=False, slots=1),
            )
        }
        self.reign = Reign(self)

    def capture(self, message: Captured, *, read: bool = True) -> None:
        """A message is stored in the inbox; the marshaller reads it now or later."""
        self.inbox.append(message)
        if read:
            self.reign.read()

    def crash(self, fates: list[Fate], gone: Node | None = None) -> None:
        """The marshaller dies; each of its puts in flight meets its fate. Another one takes over.

        Args:
            gone: a node that dies and is forgotten by the registry while nobody reigns.
        """
        for n, slot in enumerate(self.reign.flights()):
            fate = fates[n % len(fates)]
            assert slot.flight is not None
            steps[f"a put in flight {fate}"] += 1
            if fate == "lands":
                self.lands(slot.flight, slot.revision)
            elif fate == "lands late":
                self.late.append((slot.flight, slot.revision))
        unread = len(self.inbox) - self.bucket.cursor + 1
        steps["replayed"] += unread
        if gone is not None:
            self.die(gone)
            gone.record = None
        self.reign = Reign(self)

    def lands(self, record: WorkRecord, expected: int) -> None:
        """A put of a dead marshaller reaches the bucket."""
        try:
            self.bucket.put(record, expected)
        except WriteConflict:
            steps["a late put was refused"] += 1

    def acknowledge(self, slot: Slot) -> None:
        try:
            self.reign.acknowledge(slot)
        except ReignEnded:
            steps["a reign ended by a conflict"] += 1
            self.crash(["is lost"])
        self.reign.advance()

    def acknowledge_all(self) -> None:
        reign = self.reign
        for slot in reign.flights():
            if self.reign is reign and slot.flight is not None:
                self.acknowledge(slot)

    # --- nodes -----------------------------------------------------------------------------------------------------

    def known(self, node: Node, record: NodeRecord) -> None:
        """The registry writes what it knows of a node, if that changed."""
        if record is not node.record:
            node.record = record
            self.reign.scheduler.node_changed(record, self.now)
            self.reign.advance()

    def join(self, node: Node) -> None:
        if not node.alive:
            node.life += 1
        node.alive = True
        self.known(node, roster.registered(node.record, node.announcement(), self.now))

    def die(self, node: Node) -> None:
        """Nobody is told."""
        node.alive = False
        node.running.clear()

    def fall_silent(self, node: Node, silent_s: float) -> None:
        """The registry hears nothing, whether the node lives or not."""
        assert node.record is not None
        self.known(node, roster.silent(node.record, silent_s, self.now, PATIENCE))

    def remove(self, node: Node) -> None:
        """The registry forgets it."""
        node.record = None
        self.reign.scheduler.node_gone(node.node_id, self.now)
        self.reign.advance()

    def beat(self, node: Node, *, registry_first: bool, stops_arrive: bool) -> None:
        assert node.record is not None
        running = [RunningWork(work_id=work_id, attempt=attempt) for work_id, attempt in sorted(node.running)]
        beat = NodeHeartbeat(node_id=node.node_id, session=node.session, running=running)
        if registry_first:
            self.registry_hears(node, beat)
        stops = self.reign.scheduler.heartbeat(beat, self.now)
        for stop in stops:
            steps["stop by heartbeat"] += 1
            if stops_arrive:
                self.stop(stop)
        self.reign.advance()
        self.registry_hears(node, beat)

    def registry_hears(self, node: Node, beat: NodeHeartbeat) -> None:
        """It asks a life that it does not know to announce itself."""
        assert node.record is not None
        if roster.of_this_life(node.record, beat):
            self.known(node, roster.heard(node.record, beat, self.now))
        else:
            self.known(node, roster.announced(node.record, node.announcement(), self.now))

    def stop(self, stop: Stop) -> None:
        if self.nodes[stop.node_id].direct:
            self.nodes[stop.node_id].running.discard((stop.work_id, stop.attempt))

    def deliver(self, call: Call, how: Literal["arrives", "answer lost", "lost", "declined"]) -> None:
        """A delivery reaches its node, or does not."""
        node, record = self.nodes[call.record.node_id], call.record
        attempt = (record.work_id, record.attempt)
        takes = attempt in node.running or not node.direct or len(node.running) < node.slots
        if not node.alive:
            self.reign.answered(call, "no responder")
        elif how == "lost":
            self.reign.answered(call, "nothing")
        elif node.direct and (how == "declined" or not takes):
            self.reign.answered(call, "declined")
        else:
            node.running.add(attempt)
            self.reign.answered(call, "nothing" if how == "answer lost" else "accepted")

    def finish(self, node: Node, attempt: tuple[str, int], how: str, *, named: bool = True, read: bool = True) -> None:
        """An attempt ends on its node, which reports it."""
        node.running.discard(attempt)
        work_id, number = attempt
        said = number if node.direct or named else None
        report: WorkCompleted | WorkFailed
        if how == "completed":
            report = WorkCompleted(work_id=work_id, attempt=said, node_id=node.node_id, result=number)
        else:
            fault: Literal["work", "node"] = "work" if how == "its own fault" else "node"
            report = WorkFailed(work_id=work_id, attempt=said, node_id=node.node_id, fault=fault, error=how)
        self.reports.append(report)
        self.capture(report, read=read)

    def alive(self) -> list[Node]:
        """The nodes that send heartbeats to a registry that knows them."""
        return [node for node in self.nodes.values() if node.alive and node.record is not None]

    def running(self) -> list[tuple[Node, tuple[str, int]]]:
        return [(node, attempt) for node in self.nodes.values() for attempt in sorted(node.running)]

    def finished(self) -> list[str]:
        """Ids of items in memory that are finished, and acknowledged as such to this reign."""
        records = self.reign.scheduler.records.values()
        return [r.work_id for r in records if r.state in FINAL and r.work_id not in self.reign.slots]

    def submitted(self, *, read: bool) -> Iterator[str]:
        """The ids of all items in the inbox, or of those that the marshaller has read."""
        for message in self.inbox[: self.reign.read_to if read else None]:
            if isinstance(message, WorkItem):
                assert message.work_id is not None
                yield message.work_id

    # --- the end ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """A healthy node joins, nothing is lost any more, and time passes until everything has ended."""
        for record, expected in self.late:
            self.lands(record, expected)
        self.late.clear()
        self.nodes["helper"] = Node("helper", direct=True, slots=100, gpu=True)
        self.join(self.nodes["helper"])
        plain = self.nodes["plain"]
        if plain.record is not None:
            self.remove(plain)  # It may have let items fall, and would be asked for their outcome for an hour.
        self.acknowledge_all()
        for call in list(self.reign.calls):
            self.deliver(call, "arrives")
        # What runs now must not be waited for: one node never comes back, the other is born again.
        self.die(self.nodes["gpu"])
        self.nodes["direct"].running.clear()
        self.nodes["direct"].life += 1
        for _ in range(ROUNDS_MAX):
            self._round()
            if self._ended():
                break
        else:
            left = [r.story for r in self.reign.scheduler.records.values() if r.state not in FINAL]
            raise AssertionError(f"never ended: {left}")
        self._round()

    def _round(self) -> None:
        self.reign.read()
        for _ in range(ACTIONS_MAX):
            if not (self.reign.flights() or self.reign.calls or self.reign.stops):
                break
            for slot in self.reign.flights()[:1]:
                self.acknowledge(slot)
            for call in self.reign.calls[:1]:
                self.deliver(call, "arrives")
            for stop in self.reign.stops[:1]:
                self.reign.stops.remove(stop)
                self.stop(stop)
        else:
            raise AssertionError("the marshaller goes in circles")
        for node in self.nodes.values():
            if node.record is not None and node.alive:
                self.beat(node, registry_first=True, stops_arrive=True)
            elif node.record is not None:
                self.fall_silent(node, 1e9)
        for node, attempt in self.running():
            self.finish(node, attempt, "completed")
        self.now += 5.0
        self.reign.advance()

    def _ended(self) -> bool:
        stored = self.bucket.records
        final = all(work_id in stored and stored[work_id][0].state in FINAL for work_id in self.submitted(read=False))
        return final and not (self.reign.flights() or self.running() or self.reign.calls or self.reign.stops)


nodes = st.sampled_from(["direct", "direct", "gpu", "plain"])
numbers = st.integers(0, 50)
outcomes = st.sampled_from(["arrives", "arrives", "arrives", "arrives", "answer lost", "lost", "declined"])
mostly = st.sampled_from([True, True, True, False])


class WorkLifecycle(RuleBasedStateMachine):
    """Every rule is one thing that may happen to a mesh."""

    def __init__(self) -> None:
        super().__init__()
        self.mesh = Mesh()
        self.submissions = 0

    @initialize(without=st.sampled_from(["", "", "direct", "gpu", "plain"]))
    def start(self, without: str) -> None:
        for node in self.mesh.nodes.values():
            if node.node_id != without:
                self.mesh.join(node)

    # --- submitters ------------------------------------------------------------------------------------------------

    @rule(
        priority=st.integers(4, 6),
        gpus=st.sampled_from([0, 0, 0, 1]),
        timeout_s=st.sampled_from([5.0, 36_000.0]),
        retries_max=st.sampled_from([None, 0, 1]),
        read=mostly,
    )
    def submit(self, priority: int, gpus: int, timeout_s: float, retries_max: int | None, read: bool) -> None:
        item = WorkItem(
            work_id=f"w{self.submissions}",
            work_type="inference",
            priority=priority,
            requirements=Requirements(gpus=gpus),
            timeout_s=timeout_s,
            retries_max=retries_max,
        )
        self.submissions += 1
        self.mesh.capture(item, read=read)

    @precondition(lambda self: self.submissions > 0)
    @rule(n=numbers)
    def submit_again(self, n: int) -> None:
        self.mesh.capture(WorkItem(work_id=f"w{n % self.submissions}", work_type="inference"))

    @precondition(lambda self: self.submissions > 0)
    @rule(n=numbers)
    def cancel(self, n: int) -> None:
        self.mesh.reign.scheduler.cancel(f"w{n % self.submissions}", "not wanted", self.mesh.now)
        self.mesh.reign.advance()

    # --- the store and the marshaller ------------------------------------------------------------------------------

    @precondition(lambda self: self.mesh.reign.flights())
    @rule(n=numbers)
    def acknowledge_one(self, n: int) -> None:
        flights = self.mesh.reign.flights()
        self.mesh.acknowledge(flights[n % len(flights)])

    @precondition(lambda self: self.mesh.reign.flights())
    @rule()
    def acknowledge_all(self) -> None:
        self.mesh.acknowledge_all()

    @precondition(lambda self: self.mesh.reign.flights() or self.mesh.reign.calls)
    @rule(seconds=st.sampled_from([0.0, 0.3, 0.3]))
    def all_goes_well_for_a_while(self, seconds: float) -> None:
        """What is on its way arrives, and attempts take long enough to be written as running."""
        self.mesh.acknowledge_all()
        for call in list(self.mesh.reign.calls):
            self.mesh.deliver(call, "arrives")
        self.mesh.now += seconds
        self.mesh.reign.advance()
        self.mesh.acknowledge_all()

    @precondition(lambda self: self.mesh.bucket.cursor != self.mesh.reign.floor.seq)
    @rule()
    def note_the_floor(self) -> None:
        assert self.mesh.reign.floor.seq > self.mesh.bucket.cursor
        self.mesh.bucket.cursor = self.mesh.reign.floor.seq

    @rule(
        fates=st.lists(st.sampled_from(["lands", "is lost", "lands late"]), min_size=1, max_size=4),
        gone=st.sampled_from(["", "", "direct", "gpu"]),
    )
    def crash(self, fates: list[Fate], gone: str) -> None:
        self.mesh.crash(fates, self.mesh.nodes.get(gone))

    @precondition(lambda self: self.mesh.late)
    @rule(n=numbers)
    def a_dead_marshallers_put_lands(self, n: int) -> None:
        self.mesh.lands(*self.mesh.late.pop(n % len(self.mesh.late)))

    @precondition(lambda self: self.mesh.finished())
    @rule(n=numbers)
    def forget_a_finished_item(self, n: int) -> None:
        """Memory holds only the latest finished ones."""
        finished = self.mesh.finished()
        self.mesh.reign.scheduler.forget(finished[n % len(finished)])

    @rule(seconds=st.sampled_from([0.1, 0.3, 1.0, 3.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.mesh.now += seconds
        self.mesh.reign.read()
        self.mesh.reign.advance()

    # --- nodes -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.mesh.reign.calls)
    @rule(n=numbers, how=outcomes)
    def deliver(self, n: int, how: Literal["arrives", "answer lost", "lost", "declined"]) -> None:
        calls = self.mesh.reign.calls
        self.mesh.deliver(calls[n % len(calls)], how)

    @precondition(lambda self: self.mesh.reign.stops)
    @rule(n=numbers, arrives=st.booleans())
    def stop(self, n: int, arrives: bool) -> None:
        stop = self.mesh.reign.stops.pop(n % len(self.mesh.reign.stops))
        if arrives:
            self.mesh.stop(stop)

    @precondition(lambda self: self.mesh.running())
    @rule(
        n=numbers,
        how=st.sampled_from(["completed", "completed", "its own fault", "the node's fault", "the node's fault"]),
        named=st.booleans(),
        read=mostly,
    )
    def finish(self, n: int, how: str, named: bool, read: bool) -> None:
        running = self.mesh.running()
        node, attempt = running[n % len(running)]
        self.mesh.finish(node, attempt, how, named=named, read=read)

    @precondition(lambda self: self.mesh.reports)
    @rule(n=numbers)
    def report_again(self, n: int) -> None:
        self.mesh.capture(self.mesh.reports[n % len(self.mesh.reports)])

    @precondition(lambda self: self.mesh.running())
    @rule(how=st.sampled_from(["completed", "the node's fault"]))
    def finish_all(self, how: str) -> None:
        for node, attempt in self.mesh.running():
            self.mesh.finish(node, attempt, how)

    @precondition(lambda self: self.mesh.alive())
    @rule(n=numbers, registry_first=st.booleans(), stops_arrive=st.booleans())
    def beat(self, n: int, registry_first: bool, stops_arrive: bool) -> None:
        alive = self.mesh.alive()
        self.mesh.beat(alive[n % len(alive)], registry_first=registry_first, stops_arrive=stops_arrive)

    @rule(
        node_id=nodes,
        what=st.sampled_from(["join", "join", "restart", "restart unannounced", "die", "silent", "lost", "remove"]),
    )
    def a_node_changes(self, node_id: str, what: str) -> None:
        node = self.mesh.nodes[node_id]
        if what == "join":
            self.mesh.join(node)
        elif node.record is None or not (node.alive or what in ("silent", "lost", "remove")):
            steps["skipped"] += 1
        elif what == "remove":
            self.mesh.remove(node)
        elif what in ("silent", "lost"):
            self.mesh.fall_silent(node, 30.0 if what == "silent" else 100_000.0)
        else:
            self.mesh.die(node)
            if what != "die":
                node.alive, node.life = True, node.life + 1
            if what == "restart":
                self.mesh.join(node)

    # --- what always holds -----------------------------------------------------------------------------------------

    @invariant()
    def count_the_step(self) -> None:
        steps["steps"] += 1

    @invariant()
    def every_item_that_was_read_is_known_or_stored(self) -> None:
        """Exactly once each, as keys are; nothing is known that nobody submitted."""
        known = set(self.mesh.reign.scheduler.records) | set(self.mesh.bucket.records)
        assert known >= set(self.mesh.submitted(read=True))
        assert known <= set(self.mesh.submitted(read=False))

    @invariant()
    def what_is_not_stored_will_be_read_again(self) -> None:
        """The floor that was noted lies at or below every submission that exists only in memory."""
        for seq, message in enumerate(self.mesh.inbox, start=1):
            if isinstance(message, WorkItem) and message.work_id not in self.mesh.bucket.records:
                assert self.mesh.bucket.cursor <= self.mesh.reign.floor.seq <= seq

    @invariant()
    def an_attempt_number_belongs_to_one_node(self) -> None:
        """In all that was ever stored, so a report says which node it is from."""
        for work_id, records in self.mesh.bucket.history.items():
            places = {(r.attempt, r.node_id) for r in records if r.state in OUT}
            assert len({attempt for attempt, _ in places}) == len(places), (work_id, places)

    @invariant()
    def what_a_node_runs_was_stored_before_it_was_sent(self) -> None:
        """So it is known after any crash."""
        for node, (work_id, attempt) in self.mesh.running():
            records = self.mesh.bucket.history.get(work_id, [])
            assert any(r.attempt == attempt and r.node_id == node.node_id for r in records), (work_id, attempt)

    @invariant()
    def a_result_is_that_of_the_recorded_attempt(self) -> None:
        """Of a direct node, that is: a plain one need not say."""
        for record, _ in self.mesh.bucket.records.values():
            if record.state is WorkState.COMPLETED and not record.plain:
                assert record.result == record.attempt, record.story

    @invariant()
    def an_item_fails_no_more_often_than_it_may(self) -> None:
        for record, _ in self.mesh.bucket.records.values():
            allowed = LIMITS.retry.retries_max if record.retries_max is None else record.retries_max
            assert record.failures <= allowed + 1
            assert (record.failures > allowed) <= (record.state in (WorkState.DEAD, WorkState.FAILED))

    @invariant()
    def seats_hold_what_the_records_say(self) -> None:
        """And so no item is out on two nodes."""
        scheduler = self.mesh.reign.scheduler
        for node_id, seat in scheduler.seats.items():
            out = {
                (record.work_id, replica)
                for record in scheduler.records.values()
                for replica, place in workitem.places(record)
                if place == node_id
            }
            assert seat.taken == out, node_id

    @invariant()
    def no_node_has_more_than_its_slots(self) -> None:
        """Unless a crash left it so, and then only until they are free again."""
        reign = self.mesh.reign
        for node_id, seat in reign.scheduler.seats.items():
            if len(seat.taken) <= seat.node.slots:
                reign.crowded.discard(node_id)
            assert len(seat.taken) <= seat.node.slots or node_id in reign.crowded, node_id

    @invariant()
    def the_counts_are_those_of_the_records(self) -> None:
        scheduler = self.mesh.reign.scheduler
        assert scheduler.waiting == sum(r.state in WAITING for r in scheduler.records.values())
        assert scheduler.out == sum(r.state in OUT for r in scheduler.records.values())

    @invariant()
    def memory_is_never_behind_the_journal(self) -> None:
        """What is stored, on its way or wanted last is what the scheduler holds."""
        for work_id, slot in self.mesh.reign.slots.items():
            newest = slot.wanted or slot.flight or slot.stored
            record = self.mesh.reign.scheduler.records.get(work_id)
            if newest is not None:
                assert record is newest, (record, newest)

    def teardown(self) -> None:
        """Liveness: with a healthy node, every item ends, once, and nothing remains."""
        mesh = self.mesh
        mesh.settle()
        assert all(record.state in FINAL for record, _ in mesh.bucket.records.values())
        assert set(mesh.bucket.records) == set(mesh.submitted(read=False))
        scheduler = mesh.reign.scheduler
        assert (scheduler.waiting, scheduler.out, mesh.reign.slots) == (0, 0, {})
        assert all(not seat.taken for seat in scheduler.seats.values())
        assert all(not node.running for node in mesh.nodes.values())
        assert mesh.reign.floor.seq == len(mesh.inbox) + 1


def test_every_accepted_item_ends_once_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run was worth its time: most steps did something, and everything that matters happened."""
    monkeypatch.setattr(scheduling, "CLOCK_SLACK", 0)  # Sweep as often as ever allowed.
    steps.clear()
    run_state_machine_as_test(
        WorkLifecycle,
        settings=settings(
            max_examples=400, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
    assert steps["skipped"] < steps["steps"] / 3, steps
    for mark in (
        *(f"stored {state}" for state in WorkState),
        "merged writes",
        "stale report",
        "duplicate submission",
        "declined",
        "replayed",
        "a put in flight is lost",
        "a put in flight lands",
        "a put in flight lands late",
    ):
        assert steps[mark] > 0, f"never: {mark}; {steps}"
