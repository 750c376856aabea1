"""What the node-registry sustains: ``make bench-nodes``, or ``python -m tests.bench.nodes [--quick] [--json FILE]``.

A simulated fleet (:mod:`computemesh.testing.fleet`) on a real mesh, once for each size. In the same run, for
comparison: a bare nats-py subscriber that counts the same heartbeats, and ``nanoctrl`` where it is installed.

    join       from the first announcement until a query counts all nodes as online
    flood      heartbeats faster than nodes send them, with a bounded number under way, until all are handled
    queries    one and 16 clients, over NATS and HTTP, while the nodes send heartbeats as usual
    loss       all nodes fall silent; from the end of the patience until each was told lost, and none is online
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import nats
import psutil
import uvloop
from nats.aio.msg import Msg

from computemesh.bus import Bucket
from computemesh.contracts import nodes, storage
from computemesh.contracts.base import Role, decode
from computemesh.contracts.nodes import NodeHeartbeat, NodeLost
from computemesh.testing import RunningMesh, running_mesh
from computemesh.testing.fleet import Counts
from tests.bench.clients import Load, Took, connect_http, measure
from tests.bench.nanoctrl import HOW_TO_GET, find_peer, measure_peer

# pyright: reportUnknownMemberType=false

SIZES: Final = (10, 1_000, 10_000)
USUAL_S: Final = (5.0, 12.0, 15.0)
"""From one heartbeat of a node to the next, until it is suspect, until it is lost. Nodes send heartbeats half as
often unless told otherwise, and the bench waits for the patience to end, so it is shorter."""

QUICK_S: Final = (2.0, 5.0, 6.0)

UNDER_WAY: Final = 8_000
"""Heartbeats that were sent and not handled yet, at most, while the flood lasts."""

CHUNK: Final = 2_000
GIVE_UP_S: Final = 120.0

QUERIES: Final = {
    "few that match": ("query", {"model_name": "rare-70b", "online_only": True}, False),
    "a page of 100": ("query", {"limit": 100}, False),
    "all, in pages": ("query", {"limit": 10_000}, True),
    "all, a line each": ("list", {"limit": 10_000}, True),
}

_HANDLED: Final = re.compile(rb"^computemesh_node_heartbeats_total (\S+)", re.MULTILINE)


class Flood(msgspec.Struct, frozen=True, kw_only=True):
    """Heartbeats at full speed."""

    per_s: float
    cpu_us: float
    """Of the process that takes them, per heartbeat."""
    lag_ms: float
    """How far behind it was, at most."""
    lost: int
    """Never handled."""


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured with one number of nodes."""

    nodes: int
    join_s: float
    cpu: float
    """Cores the registry uses while the nodes send heartbeats as usual."""
    rss_mb: int
    floods: dict[str, Flood]
    requests: dict[str, Took]
    loss_s: float
    """Beyond the patience."""
    lost_twice: int
    """Nodes of whose loss more than one event was heard."""


# --- processes -------------------------------------------------------------------------------------------------


class FleetProcess:
    """A simulated fleet in a process of its own."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def do(self, command: str) -> Counts:
        """One command; returns when the server has all that it made the fleet say."""
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        return await self.answer()

    async def answer(self) -> Counts:
        """The next answer; the first comes without a command, when the fleet is ready."""
        assert self._process.stdout is not None
        answer = await asyncio.wait_for(self._process.stdout.readline(), GIVE_UP_S)
        return msgspec.json.decode(answer, type=Counts)


@asynccontextmanager
async def running(*command: str, url: str) -> AsyncGenerator[Process]:
    """A process that talks through its standard input and output, ended with the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *command), stdin=PIPE, stdout=PIPE, env={**os.environ, "NATS_URL": url}
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@asynccontextmanager
async def simulated(mesh: RunningMesh, size: int, interval_s: float) -> AsyncGenerator[FleetProcess]:
    """A fleet that has not joined yet."""
    options = ("--nodes", str(size), "--interval", str(interval_s), "--held")
    async with running("computemesh.testing.fleet", *options, url=mesh.url(Role.NODE)) as process:
        fleet = FleetProcess(process)
        await fleet.answer()
        yield fleet


async def count_heartbeats(*, decoded: bool) -> None:
    """What a plain nats-py subscriber needs: prints how many it has heard, whenever it reads a line."""
    nc = await nats.connect(os.environ["NATS_URL"])
    heard = 0

    async def on_beat(message: Msg) -> None:
        nonlocal heard
        if decoded:
            decode(message.data, NodeHeartbeat)
        heard += 1

    await nc.subscribe(nodes.HEARTBEAT.subject, cb=on_beat)
    await nc.flush()
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while True:
        sys.stdout.write(f"{heard}\n")
        sys.stdout.flush()
        if not await lines.readline():
            return


def cpu_s(pid: int) -> float:
    """Seconds of CPU a process has used."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


# --- heartbeats ------------------------------------------------------------------------------------------------


async def flood(fleet: FleetProcess, handled: Callable[[], Awaitable[int]], pid: int, seconds: float) -> Flood:
    """Sends as fast as the taker handles, never more than :data:`UNDER_WAY` ahead of it."""
    sent_before, handled_before = (await fleet.do("count")).beats, await handled()
    sent = done = behind = 0
    began_s, began_cpu_s = time.perf_counter(), cpu_s(pid)
    while time.perf_counter() - began_s < seconds:
        while sent - done < UNDER_WAY:
            sent = (await fleet.do(f"beat {CHUNK}")).beats - sent_before
        behind = max(behind, sent - done)
        await asyncio.sleep(0.01)  # Asking costs the taker something, too.
        done = await handled() - handled_before
    took_s, took_cpu_s = time.perf_counter() - began_s, cpu_s(pid) - began_cpu_s
    per_s = done / took_s
    end_s = time.perf_counter() + 10.0
    while done < sent and time.perf_counter() < end_s:
        await asyncio.sleep(0.02)
        done = await handled() - handled_before
    return Flood(
        per_s=per_s,
        cpu_us=took_cpu_s * 1e6 / max(1, per_s * took_s),
        lag_ms=behind / max(1, per_s) * 1e3,
        lost=max(0, sent - done),
    )


async def flood_registry(mesh: RunningMesh, fleet: FleetProcess, seconds: float) -> Flood:
    """How fast the registry takes them; it says itself how many it has handled."""
    metrics = await connect_http(mesh.http("node-registry"))

    async def handled() -> int:
        found = _HANDLED.search(await metrics.get("/metrics"))
        assert found
        return int(float(found[1]))

    try:
        return await flood(fleet, handled, mesh.pid("node-registry"), seconds)
    finally:
        metrics.close()


async def flood_raw(mesh: RunningMesh, fleet: FleetProcess, seconds: float, role: str) -> Flood:
    """How fast a bare subscriber takes them."""
    async with running("tests.bench.nodes", "--role", role, url=mesh.url(Role.SERVICES)) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        output = process.stdout
        await output.readline()

        async def handled() -> int:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            return int(await output.readline())

        return await flood(fleet, handled, process.pid, seconds)


# --- one size --------------------------------------------------------------------------------------------------


async def measure_size(folder: Path, size: int, options: argparse.Namespace) -> Size:
    """Everything, with this many nodes."""
    patience = {"COMPUTEMESH_SUSPECT_AFTER_S": str(options.suspect), "COMPUTEMESH_LOST_AFTER_S": str(options.lost)}
    environment = {"COMPUTEMESH_STRICT": "", **patience}
    async with (
        running_mesh(folder / "mesh", ("node-registry",), environment=environment) as mesh,
        running_mesh(folder / "raw", ()) as raw_mesh,
        simulated(mesh, size, options.interval) as fleet,
        simulated(raw_mesh, size, 1e6) as raw_fleet,
    ):
        pid = mesh.pid("node-registry")
        say(f"{size} nodes: join")
        join_s = await measure_join(mesh, fleet, size)
        await raw_fleet.do("join")
        await until_calm(fleet)
        cpu = await usual_cpu(pid, options.seconds)
        floods: dict[str, list[Flood]] = {}
        for rep in range(options.reps):
            say(f"{size} nodes: heartbeats {rep + 1}/{options.reps}")
            for name, role in (("counted", "count"), ("decoded", "decode")):
                floods.setdefault(name, []).append(await flood_raw(raw_mesh, raw_fleet, options.seconds, role))
            floods.setdefault("registry", []).append(await flood_registry(mesh, fleet, options.seconds))
        requests: dict[str, Took] = {}
        for name, load in loads(mesh, size, options.seconds).items():
            say(f"{size} nodes: {name}")
            requests[name] = await measure(load)
        rss_mb = round(psutil.Process(pid).memory_info().rss / 2**20)
        say(f"{size} nodes: loss")
        loss_s, lost_twice = await measure_loss(mesh, fleet, size, options.lost)
        return Size(
            nodes=size,
            join_s=join_s,
            cpu=cpu,
            rss_mb=rss_mb,
            floods={name: median(found) for name, found in floods.items()},
            requests=requests,
            loss_s=loss_s,
            lost_twice=lost_twice,
        )


def loads(mesh: RunningMesh, size: int, seconds: float) -> dict[str, Load]:
    """The queries, by name, and heartbeats that are answered, as the peer's are."""
    found: dict[str, Load] = {}
    doors: tuple[tuple[Literal["http", "nats"], str, str], ...] = (
        ("nats", mesh.url(Role.CLIENT), "compute.nodes.{}.v1"),
        ("http", mesh.http("node-registry"), "/api/v1/nodes/{}"),
    )
    for (name, (verb, query, paged)), (kind, address, target), connections in product(QUERIES.items(), doors, (1, 16)):
        found[f"{name}, {kind}({connections})"] = Load(
            kind=kind,
            address=address,
            target=target.format(verb),
            bodies=[json.dumps(query)],
            connections=connections,
            seconds=seconds,
            paged=paged,
        )
    beats = [json.dumps({"node_id": f"sim-{number:05}", "cpu_percent": 12.5}) for number in range(min(size, 1000))]
    ways: tuple[tuple[Literal["http", "nats"], str, str], ...] = (
        ("nats", mesh.url(Role.NODE), "compute.nodes.alive.v1"),
        ("http", mesh.http("node-registry"), "/api/v1/nodes/heartbeat"),
    )
    for (kind, address, target), connections in product(ways, (1, 16)):
        found[f"heartbeat, answered, {kind}({connections})"] = Load(
            kind=kind, address=address, target=target, bodies=beats, connections=connections, seconds=seconds
        )
    return found


async def online(mesh: RunningMesh) -> int:
    """How many nodes a query counts as online."""
    reply = await (await mesh.bus()).call(nodes.QUERY.subject, b'{"online_only":true,"limit":1}', timeout_s=30.0)
    return int(msgspec.json.decode(reply.data)["count"])


async def measure_join(mesh: RunningMesh, fleet: FleetProcess, size: int) -> float:
    """Seconds until all are counted."""
    await online(mesh)
    began_s = time.perf_counter()
    await fleet.do("join")
    while (found := await online(mesh)) < size:
        if time.perf_counter() - began_s > GIVE_UP_S:
            raise RuntimeError(f"{found} of {size} nodes joined within {GIVE_UP_S:g} s")
        await asyncio.sleep(0.01)
    return time.perf_counter() - began_s


async def measure_loss(mesh: RunningMesh, fleet: FleetProcess, size: int, patience_s: float) -> tuple[float, int]:
    """Seconds beyond the patience until every loss was told and recorded, and how many were told twice."""
    told: Counter[str] = Counter()
    complete = asyncio.Event()

    async def on_lost(lost: NodeLost) -> None:
        told[lost.node_id] += 1
        if len(told) == size:
            complete.set()

    bus = await mesh.bus(Role.SERVICES)
    await bus.subscribe(nodes.LOST, on_lost)
    await bus.flush()
    await fleet.do("silence")
    began_s = time.perf_counter()
    try:
        await asyncio.wait_for(complete.wait(), patience_s + GIVE_UP_S)
    except TimeoutError:
        raise RuntimeError(f"{len(told)} of {size} losses were told") from None
    while await online(mesh):
        await asyncio.sleep(0.01)
    took_s = time.perf_counter() - began_s
    recorded = Counter(entry.value.state for entry in (await Bucket(bus, storage.NODES).load()).values())
    assert recorded == {nodes.NodeState.LOST: size}, recorded
    return took_s - patience_s, sum(times > 1 for times in told.values())


async def until_calm(fleet: FleetProcess) -> None:
    """Waits until nobody asks the nodes any more to announce themselves."""
    before = -1
    for _ in range(int(GIVE_UP_S)):
        announced = (await fleet.do("count")).announced
        if announced == before:
            return
        before = announced
        await asyncio.sleep(1.0)
    raise RuntimeError(f"{GIVE_UP_S:g} s after all nodes joined they are still asked to announce themselves")


async def usual_cpu(pid: int, seconds: float) -> float:
    """Cores a process uses, over twice that time."""
    before_s = cpu_s(pid)
    await asyncio.sleep(2 * seconds)
    return (cpu_s(pid) - before_s) / (2 * seconds)


def median(found: list[Flood]) -> Flood:
    return Flood(
        per_s=statistics.median(one.per_s for one in found),
        cpu_us=statistics.median(one.cpu_us for one in found),
        lag_ms=max(one.lag_ms for one in found),
        lost=sum(one.lost for one in found),
    )


# --- the run ---------------------------------------------------------------------------------------------------


async def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Every size, ours and the peer's in turn."""
    program = find_peer(options.peer)
    found: list[Size] = []
    peers: list[dict[str, Any]] = []
    began_s, began_busy_s, began_own_s = time.perf_counter(), busy_s(), own_s()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for size in options.sizes:
            found.append(await measure_size(Path(folder) / str(size), size, options))
            if program is not None:
                say(f"{size} records: nanoctrl")
                peers.append(await measure_peer(program, Path(folder), size, options.seconds))
    say("")
    others_s = busy_s() - began_busy_s - (own_s() - began_own_s)
    return {
        "interval_s": options.interval,
        "lost_after_s": options.lost,
        "cores_used_by_others": max(0.0, others_s) / (time.perf_counter() - began_s),
        "sizes": found,
        "nanoctrl": peers,
    }


def busy_s() -> float:
    """Seconds of CPU that this machine has spent on anything, or was denied."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def own_s() -> float:
    """Seconds of CPU that this program, and all it started that have ended, have used."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, kinds))


def say(what: str) -> None:
    """Progress, on one line."""
    sys.stderr.write(f"\r\033[K{what}")
    sys.stderr.flush()


def show(report: dict[str, Any]) -> None:
    """Tables for people."""
    lines: list[str] = []
    sizes: list[Size] = report["sizes"]
    lines.append("nodes   join s   loss s beyond patience   told twice   RSS MB   cores, usual heartbeats")
    lines += [
        f"{one.nodes:5}  {one.join_s:7.2f}  {one.loss_s:23.2f}  {one.lost_twice:11}  {one.rss_mb:7}  {one.cpu:24.3f}"
        for one in sizes
    ]
    lines += ["", "nodes  heartbeats       per s   CPU us each   lag ms   lost   to counted"]
    for one in sizes:
        for name, found in one.floods.items():
            ratio = found.per_s / one.floods["counted"].per_s
            lines.append(
                f"{one.nodes:5}  {name:12} {found.per_s:9.0f}  {found.cpu_us:12.1f}  {found.lag_ms:7.0f}"
                f"  {found.lost:5}  {ratio:9.2f} x"
            )
    lines += ["", "nodes  requests                          per s   p50 ms   p99 ms   answer kB   client CPU"]
    for one in sizes:
        lines += [request_line(one.nodes, name, took) for name, took in one.requests.items()]
    for peer in report["nanoctrl"]:
        lines += [request_line(peer["nodes"], f"nanoctrl {name}", took) for name, took in peer["requests"].items()]
    if not report["nanoctrl"]:
        lines += ["", HOW_TO_GET]
    lines += ["", f"cores used by others meanwhile: {report['cores_used_by_others']:.2f}"]
    sys.stdout.write("\n".join(lines) + "\n")


def request_line(size: int, name: str, took: Took) -> str:
    return (
        f"{size:5}  {name:30} {took.per_s:8.0f}  {took.p50_ms:7.2f}  {took.p99_ms:7.2f}"
        f"  {took.answer_bytes / 1000:10.1f}  {took.client_cpu:11.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What the node-registry sustains.")
    parser.add_argument("--quick", action="store_true", help="a minute: smaller fleets, once each")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of nodes")
    parser.add_argument("--seconds", type=float, help="of each measurement")
    parser.add_argument("--reps", type=int, help="of the heartbeats; the medians count")
    parser.add_argument("--peer", type=Path, help="the program nanoctrl, if it is not on the PATH")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("--role", choices=("count", "decode"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.role:
        uvloop.run(count_heartbeats(decoded=options.role == "decode"))
        return
    options.sizes = options.sizes or ((10, 1_000) if options.quick else SIZES)
    options.seconds = options.seconds or (0.5 if options.quick else 2.0)
    options.reps = options.reps or (1 if options.quick else 3)
    options.interval, options.suspect, options.lost = QUICK_S if options.quick else USUAL_S
    report = uvloop.run(bench(options))
    show(report)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


if __name__ == "__main__":
    main()
