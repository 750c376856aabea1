"""How long a decision takes: ``make bench-scheduler``, or ``python -m tests.bench.scheduler [--quick] [--json FILE]``.

The marshaller's scheduler alone, without bus or store: what it thinks, not what it writes. A fleet of mixed machines
(four kinds of hardware, four zones), items of so many *shapes* (what they ask for), a hundred owners, all priorities.

    fill       the items come while the nodes are free; each is placed at once, the others wait
    end        an item ends: its place is given to the next, the best of all that wait
    come       an item comes while everything is full
    join       a node joins, or shows up again, and takes what waits
    beat       a heartbeat that says nothing new
    explain    why an item waits

Times are of the CPU, so that what else runs on the machine counts less.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from computemesh.contracts.nodes import NodeHeartbeat, NodeRecord, NodeState
from computemesh.contracts.work import Requirements, WorkCompleted, WorkItem, WorkState
from computemesh.hardware import Cpu, Gpu, Memory, Tier
from computemesh_services.work_marshaller.scheduler import Limits, Scheduler

NOW: Final = 1_000_000.0
SLOTS: Final = 4
SAMPLES: Final = 2000

KINDS: Final = (
    (0.1, Tier.AI_FACTORY, 192, 2_000_000, ("NVIDIA H100 80GB HBM3", 81_559, 8)),
    (0.2, Tier.GPU_PEER, 32, 128_000, ("NVIDIA GeForce RTX 4090", 24_564, 2)),
    (0.3, Tier.GPU_INFRA, 16, 64_000, ("NVIDIA GeForce RTX 4070", 12_282, 1)),
    (0.4, Tier.CPU_ONLY, 16, 64_000, ("", 0, 0)),
)


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    p50_us: float
    p99_us: float
    worst_us: float


class Row(msgspec.Struct, frozen=True, kw_only=True):
    nodes: int
    items: int
    shapes: int
    fill_s: float
    memory_mb: float
    timings: dict[str, Timing]


def fleet(count: int, rng: random.Random) -> list[NodeRecord]:
    made: list[NodeRecord] = []
    for n in range(count):
        _, tier, cpus, ram_mb, (name, vram_mb, gpus) = rng.choices(KINDS, [kind[0] for kind in KINDS])[0]
        made.append(
            NodeRecord(
                node_id=f"node-{n:05}",
                session="s",
                delivery="direct",
                monitored=True,
                slots=SLOTS,
                tier=tier,
                cpu=Cpu(threads=cpus),
                # No two machines report exactly the same.
                memory=Memory(total_mb=ram_mb - rng.randrange(200)),
                gpus=[Gpu(index=i, uuid=f"{n}-{i}", name=name, vram_total_mb=vram_mb) for i in range(gpus)],
                labels={"zone": rng.choice("abcd")},
            )
        )
    return made


def shapes(count: int, rng: random.Random) -> list[Requirements]:
    """What items ask for; one in ten of these fits no node at all."""
    made: list[Requirements] = []
    if count == 1:
        return [Requirements()]
    for n in range(count):
        if n % 10 == 9:
            made.append(Requirements(gpus=16, vram_mb=80_000 + n))
            continue
        gpus = rng.choice([0, 0, 0, 1, 1, 2])
        made.append(
            Requirements(
                cpus=rng.randrange(1, 9),
                ram_mb=rng.randrange(1, 16) * 1000 + n,
                gpus=gpus,
                vram_mb=rng.choice([4, 8, 16]) * 1000 if gpus else 0,
                labels={"zone": rng.choice("abcd")} if rng.random() < 0.3 else {},
                prefer_labels={"zone": rng.choice("abcd")} if rng.random() < 0.3 else {},
            )
        )
    return made


class Bench:
    """One fleet and one queue."""

    def __init__(self, nodes: int, items: int, kinds: int) -> None:
        self.rng = random.Random(7)
        self.shapes = shapes(kinds, self.rng)
        self.count = 0
        self.now = NOW
        self.nodes = fleet(nodes, self.rng)
        self.scheduler = Scheduler(Limits(waiting_max=10**9), jitter=lambda: 0.5)
        self.items = items
        self.out: list[str] = []

    def fill(self) -> float:
        """Seconds until all nodes are known, and all items placed or waiting."""
        began_s = time.thread_time()
        for node in self.nodes:
            self.scheduler.node_changed(node, self.now)
        for _ in range(len(self.nodes) * SLOTS + self.items):
            self.come()
        return time.thread_time() - began_s

    def decide(self) -> None:
        self.scheduler.tick(self.now)
        self.scheduler.place(self.now)
        self.out += [record.work_id for record in self.scheduler.outbox if record.state is WorkState.ASSIGNED]
        self.scheduler.outbox.clear()

    def come(self) -> None:
        self.count += 1
        item = WorkItem(
            work_type="inference",
            priority=self.rng.randrange(10),
            owner=f"owner-{self.rng.randrange(100)}",
            requirements=self.rng.choice(self.shapes),
        )
        self.scheduler.submitted(item, f"w{self.count}", self.count, self.now)
        self.decide()

    def end(self) -> None:
        if not self.out:
            return
        place = self.rng.randrange(len(self.out))
        self.out[place], self.out[-1] = self.out[-1], self.out[place]
        work_id = self.out.pop()
        self.scheduler.completed(WorkCompleted(work_id=work_id, attempt=1), self.now)
        self.decide()

    def join(self) -> None:
        """A node that was silent shows up."""
        node = self.rng.choice(self.nodes)
        for state in (NodeState.SUSPECT, NodeState.ONLINE):
            self.now += 0.001
            self.scheduler.node_changed(msgspec.structs.replace(node, state=state, changed_at=self.now), self.now)
        self.decide()

    def beat(self) -> None:
        node = self.rng.choice(self.nodes)
        self.scheduler.heartbeat(NodeHeartbeat(node_id=node.node_id, session="s"), self.now)
        self.decide()

    def explain(self) -> None:
        records = self.scheduler.records
        self.scheduler.explain(records[f"w{self.rng.randrange(self.count) + 1}"], self.now)


def timing(act: Callable[[], None], samples: int) -> Timing:
    took_s: list[float] = []
    for _ in range(samples):
        began_s = time.thread_time()
        act()
        took_s.append(time.thread_time() - began_s)
    took_s.sort()
    return Timing(
        p50_us=1e6 * took_s[samples // 2], p99_us=1e6 * took_s[int(samples * 0.99)], worst_us=1e6 * took_s[-1]
    )


def measure(nodes: int, items: int, kinds: int) -> Row:
    gc.collect()
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    bench = Bench(nodes, items, kinds)
    # As the marshaller runs: objects that live long are not looked at again and again.
    gc.disable()
    try:
        fill_s = bench.fill()
        samples = min(SAMPLES, items // 4)
        timings = {
            "end": timing(bench.end, samples),
            "come": timing(bench.come, samples),
            "join": timing(bench.join, samples),
            "beat": timing(bench.beat, samples),
            "explain": timing(bench.explain, 20),
        }
    finally:
        gc.enable()
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mb
    return Row(nodes=nodes, items=items, shapes=kinds, fill_s=fill_s, memory_mb=memory_mb, timings=timings)


def show(row: Row) -> None:
    cells = [f"{name} {t.p50_us:,.0f} / {t.p99_us:,.0f}" for name, t in row.timings.items()]
    sys.stdout.write(
        f"{row.nodes:,} nodes, {row.items:,} items wait, {row.shapes} shapes: filled in {row.fill_s:.1f} s, "
        f"{row.memory_mb:.0f} MB; p50 / p99 µs: {', '.join(cells)}\n"
    )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    tenth = 10 if asked.quick else 1
    rows: list[Row] = []
    for nodes, items, kinds in ((1, 10_000, 1), (1000, 10_000, 100), (10_000, 100_000, 100), (10_000, 100_000, 1000)):
        rows.append(measure(max(1, nodes // tenth), items // tenth, kinds))
        show(rows[-1])
    if asked.json:
        asked.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))


if __name__ == "__main__":
    main()
