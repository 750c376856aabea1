"""Many simulated nodes on one connection: real messages, hardware that is made up.

To the mesh each is a node: it announces itself with hardware one could buy, sends heartbeats with the use of its
GPUs, answers discovery, can fall silent, come back, and begin a new life. It takes no work but of the type
``simulated``, and there does nothing. Ten thousand fit into one process: what a node says is encoded beforehand.

As a program it reads what to do from standard input, one command a line, and answers each with a line of counts,
after a first one that says that it is ready:

    $ eval "$(computemesh env --role node)"
    $ python -m computemesh.testing.fleet --nodes 1000 --interval 10
    silence 200        the first 200 fall silent; without a number, all
    wake               those that were silent go on
    restart 200        the first 200 begin a new session
    beat 5000          so many heartbeats at once, in turn, from nodes that speak
    count              nothing but the counts

With ``--held`` they say nothing until the command ``join``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import heapq
import os
import random
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Final

import msgspec
import uvloop
from msgspec.structs import replace

from computemesh import log
from computemesh.bus import Bus, BusError, Where
from computemesh.contracts import nodes
from computemesh.contracts.base import Role, encode
from computemesh.contracts.nodes import Discover, NodeAnnouncement, NodeHeartbeat
from computemesh.hardware import Cpu, Gpu, GpuLink, GpuProcess, GpuUse, LinkKind, Memory, Platform
from computemesh.ids import new_id

TICK_S: Final = 0.005
"""Heartbeats that are due within this time of each other are sent together."""

AT_ONCE: Final = 200
"""Messages sent before others on the loop get their turn."""

LOADS: Final = (0.0, 0.35, 0.6, 0.92)
"""How full a machine is, from one heartbeat to the next."""

RARE_EVERY: Final = 1000
"""One node in so many serves the model ``rare-70b``."""

_MARK: Final = 0.5
_SENT_AT: Final = b'"sent_at":0.5'
"""Stands in an encoded heartbeat where the time belongs."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of machine."""

    cpu: Cpu
    memory_mb: int
    gpus: int = 0
    gpu: Gpu = Gpu()
    link: LinkKind = LinkKind.PHB
    lanes: int = 0


H100: Final = Machine(
    cpu=Cpu(model="Intel(R) Xeon(R) Platinum 8480C", cores=112, threads=224, frequency_mhz=3800.0),
    memory_mb=2_063_937,
    gpus=8,
    gpu=Gpu(
        name="NVIDIA H100 80GB HBM3",
        vram_total_mb=81_559,
        compute_capability="9.0",
        driver="570.124.06",
        pcie_generation=5,
        pcie_lanes=16,
    ),
    link=LinkKind.NVLINK,
    lanes=18,
)
RTX_4090: Final = Machine(
    cpu=Cpu(model="AMD Ryzen Threadripper PRO 5975WX", cores=32, threads=64, frequency_mhz=4500.0),
    memory_mb=257_617,
    gpus=2,
    gpu=Gpu(
        name="NVIDIA GeForce RTX 4090",
        vram_total_mb=24_564,
        compute_capability="8.9",
        driver="570.124.06",
        pcie_generation=4,
        pcie_lanes=16,
    ),
)
RTX_4070: Final = Machine(
    cpu=Cpu(model="AMD Ryzen 7 7700X", cores=8, threads=16, frequency_mhz=5400.0),
    memory_mb=63_431,
    gpus=1,
    gpu=Gpu(
        name="NVIDIA GeForce RTX 4070",
        vram_total_mb=12_282,
        compute_capability="8.9",
        driver="570.124.06",
        pcie_generation=4,
        pcie_lanes=16,
    ),
)
CPU: Final = Machine(cpu=Cpu(model="AMD EPYC 9354", cores=32, threads=64, frequency_mhz=3800.0), memory_mb=385_504)

MIX: Final = (CPU, RTX_4070, CPU, RTX_4090, CPU, H100, CPU, RTX_4070, RTX_4090, RTX_4070)
"""What a fleet is made of, node by node, again and again."""


class SimulatedNode:
    """What one node says: its announcement and its heartbeats, encoded.

    Args:
        number: decides the hardware; see :data:`MIX`.
        loads: how full it is, from one heartbeat to the next.
    """

    def __init__(self, node_id: str, number: int, loads: Sequence[float] = LOADS) -> None:
        self.node_id: Final = node_id
        self.number: Final = number
        self._loads = loads
        self.session = ""
        self.announcement = b""
        self.silent = True
        self.scheduled = False
        """Whether it stands in the queue of heartbeats to come."""
        self._beats: list[tuple[bytes, bytes]] = []
        self._next = number
        self.begin()

    def begin(self) -> None:
        """A new life: all it says from now on is of a new session."""
        self.session = new_id("s")
        said = announcement(self.node_id, self.number, self.session)
        self.announcement = encode(said)
        self._beats = []
        for full in self._loads:
            before, mark, after = encode(heartbeat(said, full)).partition(_SENT_AT)
            assert mark, "a heartbeat has a time"
            self._beats.append((before, after))

    def heartbeat(self, now: float) -> bytes:
        """The next heartbeat, sent at *now* in Unix seconds."""
        self._next += 1
        before, after = self._beats[self._next % len(self._beats)]
        return b'%b"sent_at":%.3f%b' % (before, now, after)


def announcement(node_id: str, number: int, session: str) -> NodeAnnouncement:
    """What a simulated node says of itself."""
    machine = MIX[number % len(MIX)]
    machine_id = hashlib.blake2b(node_id.encode(), digest_size=16).hexdigest()
    gpus = [
        replace(
            machine.gpu,
            index=index,
            uuid=f"GPU-{machine_id[:8]}-{index:04x}-{machine_id[8:12]}-{machine_id[12:16]}-{machine_id[16:28]}",
            pci_bus_id=f"00000000:{0x10 + 0x10 * index:02X}:00.0",
            numa_node=2 * index // machine.gpus,
        )
        for index in range(machine.gpus)
    ]
    links = [GpuLink(a=a, b=b, kind=machine.link, lanes=machine.lanes) for a, b in combinations(range(machine.gpus), 2)]
    return NodeAnnouncement(
        node_id=node_id,
        hostname=f"{node_id}.example",
        session=session,
        delivery="direct",
        work_types=["simulated"],
        models=["rare-70b", "usual-7b"] if number % RARE_EVERY == 7 else ["usual-7b"],
        slots=max(1, machine.gpus),
        labels={"zone": "abc"[number % 3], "rack": f"r{number // 40}"},
        platform=Platform.CUDA if machine.gpus else Platform.CPU,
        cpu=machine.cpu,
        memory=Memory(total_mb=machine.memory_mb, available_mb=int(machine.memory_mb * 0.9)),
        gpus=gpus,
        gpu_links=links,
        provider="scripted",
        machine_id=machine_id,
    )


def heartbeat(said: NodeAnnouncement, full: float) -> NodeHeartbeat:
    """A sign of life of a machine that is *full* to this part, 0 to 1."""
    return NodeHeartbeat(
        node_id=said.node_id,
        session=said.session,
        loaded_models=said.models if full else [],
        cpu_percent=round(100 * full / 2, 1),
        memory_available_mb=int(said.memory.total_mb * (0.95 - full / 2)) if said.memory else None,
        gpus=[
            GpuUse(
                index=gpu.index,
                uuid=gpu.uuid,
                vram_used_mb=int(gpu.vram_total_mb * full),
                utilization_percent=round(100 * full, 1),
                processes=[GpuProcess(pid=4000 + gpu.index, name="vllm", memory_mb=int(gpu.vram_total_mb * full))]
                if full
                else [],
            )
            for gpu in said.gpus
        ],
        sent_at=_MARK,
    )


class Fleet:
    """Simulated nodes ``{prefix}-00000`` and so on, in the hands of a test.

    Args:
        bus: connected as a node, any node: what a payload says is not checked by the server.
        first: number of the first node, so that several fleets make a larger one.
        interval_s: from one heartbeat of a node to its next, give or take a fifth.
        loads: how full each node is, 0 to 1, from one heartbeat to the next.
    """

    def __init__(
        self,
        bus: Bus,
        size: int,
        *,
        first: int = 0,
        prefix: str = "sim",
        interval_s: float = 10.0,
        loads: Sequence[float] = LOADS,
    ) -> None:
        self.node_ids: Final = [f"{prefix}-{number:05}" for number in range(first, first + size)]
        self._nodes: Final = {
            node_id: SimulatedNode(node_id, number, loads) for number, node_id in enumerate(self.node_ids, first)
        }
        self.beats = 0
        """Heartbeats sent."""
        self.announced = 0
        """Announcements sent."""
        self.late_s = 0.0
        """By how much the latest heartbeat came too late: a fleet on a busy machine may be truly silent."""
        self._bus = bus
        self._interval_s = interval_s
        self._due: list[tuple[float, str]] = []
        """When whose heartbeat is due, in seconds of the loop; a heap."""
        self._beating: asyncio.Task[None] | None = None
        self._turn = 0
        """How many heartbeats were sent out of turn."""

    async def join(self) -> None:
        """Listens for discovery, announces every node, and sends heartbeats from now on."""
        await self._bus.subscribe(nodes.DISCOVER, self._on_discover)
        await self._bus.flush()
        self._beating = asyncio.create_task(self._beat_forever())
        await self.wake(announce=True)

    async def leave(self) -> None:
        """Ends the simulation: all fall silent for good."""
        self.silence()
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait({self._beating})

    def silence(self, node_ids: Iterable[str] | None = None) -> None:
        """These nodes, or all, say nothing any more, as machines that lost their power or their network."""
        for node in self._of(node_ids):
            node.silent = True

    async def wake(self, node_ids: Iterable[str] | None = None, *, announce: bool = False) -> None:
        """These nodes, or all, speak again in the life they had, as after a broken network.

        Args:
            announce: they say first what they are.
        """
        awake = [node for node in self._of(node_ids) if node.silent]
        now_s = asyncio.get_running_loop().time()
        for node in awake:
            node.silent = False
            if not node.scheduled:
                node.scheduled = True
                due_s = now_s + random.uniform(0.0, self._interval_s)  # noqa: S311  # spreads the fleet
                heapq.heappush(self._due, (due_s, node.node_id))
        if announce:
            await self._announce(awake)

    async def restart(self, node_ids: Iterable[str] | None = None) -> None:
        """These nodes, or all, begin a new session, also those that were silent."""
        fresh = self._of(node_ids)
        for node in fresh:
            node.begin()
        await self.wake([node.node_id for node in fresh])
        await self._announce(fresh)

    def session(self, node_id: str) -> str:
        """The present life of a node."""
        return self._nodes[node_id].session

    async def beat(self, count: int) -> None:
        """So many heartbeats at once, from each node that is not silent in turn: faster than nodes send them.

        Raises:
            BusError: the connection is down and its buffer full.
        """
        speaking = [node for node in self._nodes.values() if not node.silent]
        first = self._turn
        self._turn += count
        for number in range(first, first + count if speaking else first):
            await self._beat(speaking[number % len(speaking)])

    def _of(self, node_ids: Iterable[str] | None) -> list[SimulatedNode]:
        return list(self._nodes.values()) if node_ids is None else [self._nodes[node_id] for node_id in node_ids]

    async def _on_discover(self, ask: Discover) -> None:
        asked = (
            self._of(node_id for node_id in ask.node_ids if node_id in self._nodes) if ask.node_ids else self._of(None)
        )
        await self._announce([node for node in asked if not node.silent])

    async def _announce(self, some: list[SimulatedNode]) -> None:
        """Each says what it is, and sends a heartbeat, as the node agent does."""
        for count, node in enumerate(some, 1):
            with contextlib.suppress(BusError):
                await self._bus.send(nodes.ANNOUNCE.subject, node.announcement)
                self.announced += 1
                await self._beat(node)
            if count % AT_ONCE == 0:
                await asyncio.sleep(0)

    async def _beat(self, node: SimulatedNode) -> None:
        await self._bus.send(nodes.HEARTBEAT.subject, node.heartbeat(time.time()))
        self.beats += 1

    async def _beat_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            now_s = loop.time()
            sent = 0
            while self._due and self._due[0][0] <= now_s and sent < AT_ONCE:
                due_s, node_id = self._due[0]
                node = self._nodes[node_id]
                if node.silent:
                    heapq.heappop(self._due)
                    node.scheduled = False
                    continue
                pause_s = self._interval_s * random.uniform(0.8, 1.2)  # noqa: S311  # spreads the fleet
                heapq.heapreplace(self._due, (now_s + pause_s, node_id))
                self.late_s = max(self.late_s, now_s - due_s)
                sent += 1
                if self._bus.up:
                    with contextlib.suppress(BusError):
                        await self._beat(node)
            await asyncio.sleep(0 if sent == AT_ONCE else TICK_S)


class Counts(msgspec.Struct, frozen=True):
    """What the program answers to each command."""

    nodes: int
    beats: int
    announced: int
    late_s: float


async def _obey(fleet: Fleet, command: str, number: str) -> None:
    some = fleet.node_ids[: int(number)] if number else None
    if command == "silence":
        fleet.silence(some)
    elif command == "wake":
        await fleet.wake(some)
    elif command == "restart":
        await fleet.restart(some)
    elif command == "join":
        await fleet.join()
    elif command == "beat":
        await fleet.beat(int(number))
    elif command != "count":
        sys.stderr.write(f"no command {command!r}: silence, wake, restart, beat or count\n")


async def _run(options: argparse.Namespace) -> None:
    bus = Bus(Where(url=os.environ.get("NATS_URL", "nats://127.0.0.1:4222"), role=Role.NODE, name="simulated fleet"))
    await bus.connect(timeout_s=5.0, wait_for_server=False)
    fleet = Fleet(bus, options.nodes, first=options.first, prefix=options.prefix, interval_s=options.interval)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    line = b"count" if options.held else b"join"
    while line:
        command, _, number = line.decode().strip().partition(" ")
        await _obey(fleet, command, number)
        await bus.flush()
        counts = Counts(len(fleet.node_ids), fleet.beats, fleet.announced, round(fleet.late_s, 3))
        sys.stdout.write(encode(counts).decode() + "\n")
        sys.stdout.flush()
        line = await lines.readline()
    await fleet.leave()
    await bus.close()


def main() -> None:
    """Simulates nodes until standard input ends."""
    parser = argparse.ArgumentParser(description="Simulated nodes, on the mesh at NATS_URL.")
    parser.add_argument("--nodes", type=int, default=1000, help="how many; 1000 unless told otherwise")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--prefix", default="sim", help="what their ids begin with")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between heartbeats")
    parser.add_argument("--held", action="store_true", help="say nothing until told to join")
    log.configure("fleet", out=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
