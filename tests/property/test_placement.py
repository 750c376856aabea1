"""Goal: placement keeps its promises whatever nodes, items and ends come, in any order.

- No node is given more than it has.
- After each decision no item waits that fits a node: what may start, starts.
- The node that an item gets is the best of all that fit, and the one that its explanation puts first.

Method: a scheduler with mixed nodes, and a list of what happens. The nodes that fit are found anew, node by node, by
the filters that an explanation uses; the scheduler itself never looks at all of them.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings
from msgspec.structs import replace

from computemesh.contracts.nodes import NodeHeartbeat, NodeRecord, NodeState
from computemesh.contracts.work import Requirements, WorkCompleted, WorkFailed, WorkItem, WorkRecord, WorkState
from computemesh.hardware import Cpu, GpuUse, Memory, Tier
from computemesh.testing.builders import a_gpu, a_node
from computemesh_services.work_marshaller import workitem
from computemesh_services.work_marshaller.scheduler import Limits, Scheduler
from computemesh_services.work_marshaller.workitem import OUT

NOW = 1_000_000.0

tiers = st.sampled_from(list(Tier))
labels = st.dictionaries(st.sampled_from(["zone", "rack"]), st.sampled_from(["a", "b"]), max_size=2)
ids = st.sampled_from([f"n{n}" for n in range(6)])


@st.composite
def nodes(draw: st.DrawFn, node_id: str) -> NodeRecord:
    cpus = draw(st.sampled_from([None, 4, 6, 16]))
    ram_mb = draw(st.sampled_from([None, 1000, 1500, 4000]))
    return a_node(
        node_id,
        slots=draw(st.integers(0, 4)),
        tier=draw(tiers),
        labels=draw(labels),
        models=draw(st.sampled_from([[], ["m1"], ["m1", "m2"]])),
        work_types=draw(st.sampled_from([[], ["inference"]])),
        delivery=draw(st.sampled_from(["direct", "direct", "plain"])),
        cpu=None if cpus is None else Cpu(threads=cpus),
        memory=None if ram_mb is None else Memory(total_mb=ram_mb),
        gpus=[replace(a_gpu(mb), index=n) for n, mb in enumerate(draw(st.lists(st.sampled_from([8, 24]), max_size=3)))],
    )


requirements = st.builds(
    Requirements,
    gpus=st.sampled_from([0, 0, 0, 1, 2]),
    vram_mb=st.sampled_from([0, 0, 4, 8, 20]),
    ram_mb=st.sampled_from([0, 0, 400, 1200]),
    cpus=st.sampled_from([0, 0, 1, 3, 6]),
    min_tier=st.one_of(st.none(), tiers),
    labels=st.sampled_from([{}, {}, {"zone": "a"}]),
    not_labels=st.sampled_from([{}, {}, {"rack": "a"}]),
    prefer_labels=labels,
    node_id=st.one_of(st.none(), st.none(), st.none(), ids),
    node_ids=st.one_of(st.just([]), st.just([]), st.lists(ids, max_size=3)),
    not_node_ids=st.lists(ids, max_size=2),
    spread=st.booleans(),
)
items = st.builds(
    WorkItem,
    work_type=st.sampled_from(["inference", "inference", "ppo"]),
    model_name=st.sampled_from(["", "", "m1", "m2"]),
    priority=st.integers(4, 6),
    owner=st.sampled_from(["", "ann", "bob"]),
    requirements=requirements,
    replicas=st.sampled_from([1, 1, 1, 2, 3]),
)
happenings = st.one_of(
    st.tuples(st.just("submit"), items),
    st.tuples(st.just("submit"), items),
    st.tuples(st.just("complete"), st.integers(0, 50)),
    st.tuples(st.just("fail"), st.integers(0, 50)),
    st.tuples(st.just("decline"), st.integers(0, 50)),
    st.tuples(st.just("cancel"), st.integers(0, 50)),
    st.tuples(st.just("node"), ids.flatmap(nodes)),
    st.tuples(st.just("state"), st.tuples(ids, st.sampled_from(list(NodeState)))),
    st.tuples(st.just("gone"), ids),
    st.tuples(
        st.just("beat"),
        st.tuples(ids, st.sampled_from([[], ["m1"], ["m2"]]), st.booleans(), st.integers(0, 24), st.integers(0, 4000)),
    ),
    st.tuples(st.just("later"), st.sampled_from([0.5, 1.0, 5.0, 100.0])),
)


class World:
    """A scheduler, and what a careful clerk knows of it."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(Limits(waiting_max=1000), jitter=lambda: 0.5)
        self.now = NOW
        self.count = 0
        self.squeezed: set[str] = set()
        """Nodes that were announced smaller than what they had been given, until they are empty again."""

    def happen(self, what: str, how: Any) -> None:
        scheduler, now = self.scheduler, self.now
        match what:
            case "submit":
                self.count += 1
                scheduler.submitted(how, f"w{self.count}", self.count, now)
            case "node":
                self.squeezed.add(how.node_id)
                scheduler.node_changed(replace(how, changed_at=now + self.count), now)
            case "state":
                if seat := scheduler.seats.get(how[0]):
                    scheduler.node_changed(replace(seat.node, state=how[1], changed_at=now), now)
            case "gone":
                scheduler.node_gone(how, now)
            case "beat":
                self.beat(*how)
            case "later":
                self.now += how
            case _:
                self.end(what, how)

    def beat(self, node_id: str, loaded_models: list[str], accepting: bool, used_mb: int, available_mb: int) -> None:
        beat = NodeHeartbeat(
            node_id=node_id,
            session="s1",
            loaded_models=loaded_models,
            accepting=accepting,
            gpus=[GpuUse(index=0, vram_used_mb=used_mb)],
            memory_available_mb=available_mb,
        )
        self.scheduler.heartbeat(beat, self.now)

    def end(self, what: str, n: int) -> None:
        """One of the items that are out, or of all, ends in some way."""
        records = [r for r in self.scheduler.records.values() if r.state in OUT or what == "cancel"]
        if not records:
            return
        record = records[n % len(records)]
        match what:
            case "complete":
                for replica, _ in workitem.places(record):
                    done = WorkCompleted(work_id=record.work_id, attempt=record.attempt, replica=replica)
                    self.scheduler.completed(done, self.now)
            case "fail":
                failed = WorkFailed(work_id=record.work_id, attempt=record.attempt)
                self.scheduler.failed(failed, self.now)
            case "decline":
                self.scheduler.declined(record.work_id, record.attempt, "busy", self.now)
            case _:
                self.scheduler.cancel(record.work_id, "", self.now)

    def place(self) -> list[tuple[WorkRecord, list[str]]]:
        """Items that were given to nodes, with the explanation as it was before each of them."""
        self.scheduler.tick(self.now)
        self.scheduler.outbox.clear()
        before = self._explain_all()
        self.scheduler.place(self.now)
        placed = [record for record in self.scheduler.outbox if record.state is WorkState.ASSIGNED]
        self.scheduler.outbox.clear()
        return [(record, before[record.work_id]) for record in placed[:1]]

    def _explain_all(self) -> dict[str, list[str]]:
        return {record.work_id: self.fitting(record) for record in self.waiting()}

    def waiting(self) -> list[WorkRecord]:
        return [r for r in self.scheduler.records.values() if r.state is WorkState.PENDING and not r.awaits]

    def fitting(self, record: WorkRecord) -> list[str]:
        return [verdict.node_id for verdict in self.scheduler.explain(record, self.now).nodes if verdict.fits]

    def check(self) -> None:
        for node_id, seat in self.scheduler.seats.items():
            held = [self.scheduler.records[work_id].requirements for work_id, _ in seat.taken]
            if not held:
                self.squeezed.discard(node_id)
            if node_id in self.squeezed:
                continue
            node = seat.node
            assert len(held) <= node.slots
            assert node.cpu is None or sum(need.cpus for need in held) <= node.cpu.threads
            assert node.memory is None or sum(need.ram_mb for need in held) <= node.memory.total_mb
            assert sum(need.vram_mb * max(1, need.gpus) for need in held) <= sum(g.vram_total_mb for g in node.gpus)
            assert sum(max(1, need.gpus) for need in held if need.gpus and not need.vram_mb) <= len(node.gpus)
        for record in self.waiting():
            fits = self.fitting(record)
            if record.replicas == 1:
                assert fits == [], record
            elif record.requirements.spread:
                assert len(fits) < record.replicas, record


@settings(max_examples=300, deadline=None)
@given(st.lists(happenings, max_size=60))
def test_what_may_start_starts_on_the_best_node_and_never_more_than_there_is(what: list[tuple[str, Any]]) -> None:
    world = World()
    for n in range(4):
        world.scheduler.node_changed(a_node(f"n{n}", slots=2, gpus=[a_gpu(24)], cpu=Cpu(threads=8)), NOW)
    for name, how in what:
        world.happen(name, how)
        for record, best in world.place():
            if record.replicas == 1:
                assert record.node_id == best[0], record
        world.check()
