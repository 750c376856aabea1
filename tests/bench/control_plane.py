"""What the control plane sustains: ``make bench-control-plane``, or ``python -m tests.bench.control_plane [--quick]``.

Engines are registered, kept, looked up and listed by the same clients, over HTTP with the same bodies, at our control
plane and, in the same run and in turn, at ``nanoctrl`` with Redis where it is installed; and at ours over the bus, too.

    register    of an engine that is known, which both take for a new life of it
    heartbeat   of one after the other; ours stores one of each engine in ten seconds
    get         one after the other
    list        all of a scope, over the bus in pages
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import psutil
import uvloop

from computemesh.contracts import engines
from computemesh.contracts.base import Role
from computemesh.testing import running_mesh
from tests.bench.clients import Load, Took, connect_http, measure
from tests.bench.nanoctrl import HOW_TO_GET, find_peer, running_peer

SIZES: Final = (10, 1_000, 10_000)
CONNECTIONS: Final = (1, 16)
AT_ONCE: Final = 64
"""Connections over which records are made and kept."""

KEEP_S: Final = 20.0
"""How often each record gets a heartbeat beside what is measured: it lives for a minute."""

KEEP_S_MAX: Final = 30.0
"""How long that may take."""

OPERATIONS: Final = ("register", "heartbeat", "get", "list")

PATHS: Final = {
    "register": "/register_engine",
    "heartbeat": "/heartbeat",
    "get": "/get_engine_info",
    "list": "/list_engines",
}
SUBJECTS: Final = {
    "register": engines.REGISTER.subject,
    "heartbeat": engines.HEARTBEAT.subject,
    "get": engines.GET.subject,
    "list": engines.LIST.subject,
}


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of request, at one place, with one number of records and of connections."""

    records: int
    operation: str
    connections: int
    way: str
    per_s: float
    p50_ms: float
    p99_ms: float
    answer_kb: float
    server_cpu_us: float
    """Of all processes of the server, its store among them, per request."""
    client_cpu: float
    """Cores the client used: near 1, it is the client that was measured."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What the processes of a server hold, with so many records, after all was measured."""

    records: int
    way: str
    rss_mb: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the repetitions."""

    cells: list[Cell]
    memory: list[Memory]
    peer: bool


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where is asked."""

    way: str
    kind: Literal["http", "nats"]
    address: str
    pids: Sequence[int]

    def cpu_s(self) -> float:
        times = [psutil.Process(pid).cpu_times() for pid in self.pids]
        return sum(time.user + time.system for time in times)

    def rss_mb(self) -> float:
        return sum(psutil.Process(pid).memory_info().rss for pid in self.pids) / 2**20


def engine(number: int) -> dict[str, Any]:
    """An engine as NanoCtrl's clients describe one; the bus takes the same."""
    return {
        "engine_id": f"engine-{number:05}",
        "role": "decode",
        "world_size": 8,
        "num_blocks": 15_000,
        "host": "10.0.0.2",
        "port": 6001,
        "peer_addrs": ["10.0.0.2:5000"],
    }


def bodies(place: Place, operation: str, size: int) -> list[str]:
    """What is asked in turn."""
    if operation == "list":
        return ["{}"]
    numbers = range(size)
    if operation == "register":
        found = [engine(number) for number in numbers]
    elif operation == "heartbeat" and place.kind == "http":
        found = [{"entity_type": "engine", "entity_id": engine(number)["engine_id"]} for number in numbers]
    else:
        found = [{"engine_id": engine(number)["engine_id"]} for number in numbers]
    return [json.dumps(body, separators=(",", ":")) for body in found]


def load(place: Place, operation: str, size: int, connections: int, seconds: float) -> Load:
    return Load(
        kind=place.kind,
        address=place.address,
        target=(PATHS if place.kind == "http" else SUBJECTS)[operation],
        bodies=bodies(place, operation, size),
        connections=connections,
        seconds=seconds,
        paged=place.kind == "nats" and operation == "list",
    )


async def fill(place: Place, size: int) -> None:
    """Registers all."""
    await measure(_once(place, PATHS["register"], [json.dumps(engine(number)) for number in range(size)]))


async def check(place: Place, size: int) -> None:
    """Makes sure that all are there.

    Raises:
        RuntimeError: they are not: it was something else that was measured.
    """
    connection = await connect_http(place.address)
    found = len(json.loads(await connection.ask(PATHS["list"], b"{}"))["engines"])
    connection.close()
    if found != size:
        raise RuntimeError(f"{place.way}: {found} of {size} engines are listed")


async def keep(place: Place, size: int) -> None:
    """A heartbeat of each.

    Raises:
        RuntimeError: the machine is too busy to keep so many.
    """
    began_s = time.monotonic()
    beats = [json.dumps({"entity_type": "engine", "entity_id": engine(number)["engine_id"]}) for number in range(size)]
    await measure(_once(place, PATHS["heartbeat"], beats))
    if (took_s := time.monotonic() - began_s) > KEEP_S_MAX:
        raise RuntimeError(f"{place.way}: a heartbeat of each of {size} engines takes {took_s:.0f} s; they live for 60")


def _once(place: Place, target: str, texts: list[str]) -> Load:
    return Load(
        kind="http", address=place.address, target=target, bodies=texts, connections=AT_ONCE, seconds=0, once=True
    )


async def measured(place: Place, operation: str, size: int, connections: int, seconds: float) -> Cell:
    before_s = place.cpu_s()
    took: Took = await measure(load(place, operation, size, connections, seconds))
    # Those of the first moments, which do not count otherwise, are in the server's time.
    share = seconds / (seconds + 0.2)
    return Cell(
        records=size,
        operation=operation,
        connections=connections,
        way=place.way,
        per_s=took.per_s,
        p50_ms=took.p50_ms,
        p99_ms=took.p99_ms,
        answer_kb=took.answer_bytes / 1000,
        server_cpu_us=(place.cpu_s() - before_s) * share * 1e6 / max(1, took.requests),
        client_cpu=took.client_cpu,
    )


# --- the places --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def ours(folder: Path) -> AsyncGenerator[tuple[Place, Place]]:
    """Our control plane, over HTTP and over the bus."""
    async with running_mesh(folder, ("control-plane",), environment={"COMPUTEMESH_STRICT": ""}) as mesh:
        pids = (mesh.pid("control-plane"), mesh.pid("nats-server"))
        yield (
            Place(way="HTTP", kind="http", address=mesh.http("control-plane"), pids=pids),
            Place(way="bus", kind="nats", address=mesh.url(Role.CLIENT), pids=pids),
        )


@asynccontextmanager
async def theirs(program: Path, folder: Path) -> AsyncGenerator[Place]:
    """NanoCtrl's server with a Redis of its own that stores nothing."""
    folder.mkdir()  # noqa: ASYNC240
    async with running_peer(program, folder) as (address, _):
        mine = psutil.Process().children()
        pids = [one.pid for one in mine if _is_of(one, address)]
        yield Place(way="nanoctrl", kind="http", address=address, pids=pids)


def _is_of(process: psutil.Process, address: str) -> bool:
    words = process.cmdline()
    return "redis-server" in words[0] or address.rpartition(":")[2] in words


async def measure_size(folder: Path, size: int, options: argparse.Namespace, program: Path | None) -> Report:
    """Everything with this many records, at each place in turn, again and again."""
    cells: list[Cell] = []
    async with AsyncExitStack() as stack:
        http, bus = await stack.enter_async_context(ours(folder / f"ours-{size}"))
        places = [http, bus]
        if program is not None:
            places.insert(0, await stack.enter_async_context(theirs(program, folder / f"theirs-{size}")))
        stores = [place for place in places if place.kind == "http"]
        for place in stores:
            say(f"{size} records: {place.way} registers them")
            await fill(place, size)
        kept_s = time.monotonic()
        order = product(range(options.reps), OPERATIONS, CONNECTIONS, places)
        for rep, operation, connections, place in order:
            if time.monotonic() - kept_s > KEEP_S:
                for store in stores:
                    await keep(store, size)
                kept_s = time.monotonic()
            say(f"{size} records: {rep + 1}/{options.reps} {operation}({connections}) {place.way}")
            cells.append(await measured(place, operation, size, connections, options.seconds))
        for place in stores:
            await check(place, size)
        memory = [Memory(records=size, way=place.way, rss_mb=place.rss_mb()) for place in stores]
    return Report(cells=_medians(cells), memory=memory, peer=program is not None)


def _medians(cells: list[Cell]) -> list[Cell]:
    """Each figure's median by itself, in the order in which they first came."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.records, cell.operation, cell.connections, cell.way), []).append(cell)
    figures = ("per_s", "p50_ms", "p99_ms", "answer_kb", "server_cpu_us", "client_cpu")
    return [
        msgspec.structs.replace(
            found[0], **{figure: statistics.median(getattr(cell, figure) for cell in found) for figure in figures}
        )
        for found in groups.values()
    ]


# --- the run -----------------------------------------------------------------------------------------------------


async def bench(options: argparse.Namespace) -> Report:
    program = find_peer(options.peer)
    reports: list[Report] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for size in options.sizes:
            try:
                reports.append(await measure_size(Path(folder), size, options, program))
            except RuntimeError as error:  # A busy machine: what was measured before is worth having.
                say(f"{size} records: {error}\n")
    say("")
    return Report(
        cells=[cell for report in reports for cell in report.cells],
        memory=[memory for report in reports for memory in report.memory],
        peer=program is not None,
    )


def lines(report: Report) -> list[str]:
    """A table for people, in Markdown."""
    by = {(cell.records, cell.operation, cell.connections, cell.way): cell for cell in report.cells}
    ways = [way for way in ("nanoctrl", "HTTP", "bus") if any(cell.way == way for cell in report.cells)]
    head = [f"{way if way == 'nanoctrl' else f'ours, {way}'}: per s, p50, p99 ms" for way in ways]
    ratio = ["HTTP to nanoctrl"] if report.peer else []
    text = [
        "| records | request | clients | " + " | ".join([*head, *ratio]) + " |",
        "|---:|---|---:|" + "---:|" * (len(head) + len(ratio)),
    ]
    for records, operation, connections in dict.fromkeys(key[:3] for key in by):
        cells = [by[records, operation, connections, way] for way in ways]
        shown = [f"{cell.per_s:,.0f}, {_ms(cell.p50_ms)}, {_ms(cell.p99_ms)}" for cell in cells]
        if report.peer:
            shown.append(f"{_ratio(cells[1].per_s / cells[0].per_s)} ×")
        text.append(f"| {records:,} | {operation} | {connections} | " + " | ".join(shown) + " |")
    return text


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def show(report: Report) -> None:
    text = [*lines(report), "", "CPU of the server and its store, µs per request (client's cores):"]
    text += [
        f"  {cell.records:6}  {cell.operation:9}({cell.connections:2})  {cell.way:8}  {cell.server_cpu_us:9,.0f}"
        f"  ({cell.client_cpu:.2f})  {cell.answer_kb:9,.1f} kB"
        for cell in report.cells
    ]
    text += ["", "Memory of the server and its store:"]
    text += [f"  {memory.records:6}  {memory.way:8}  {memory.rss_mb:7,.0f} MB" for memory in report.memory]
    if not report.peer:
        text += ["", HOW_TO_GET]
    sys.stdout.write("\n".join(text) + "\n")


def say(what: str) -> None:
    """Progress, on one line."""
    sys.stderr.write(f"\r\033[K{what}")
    sys.stderr.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="What the control plane sustains, beside nanoctrl.")
    parser.add_argument("--quick", action="store_true", help="a minute: fewer records, once each")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of records")
    parser.add_argument("--seconds", type=float, help="of each measurement")
    parser.add_argument("--reps", type=int, help="repetitions; the medians count")
    parser.add_argument("--peer", type=Path, help="the program nanoctrl, if it is not on the PATH")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.sizes = options.sizes or ((10, 1_000) if options.quick else SIZES)
    options.seconds = options.seconds or (0.5 if options.quick else 2.0)
    options.reps = options.reps or (1 if options.quick else 3)
    began_s = time.monotonic()
    report = uvloop.run(bench(options))
    show(report)
    sys.stdout.write(f"\n{time.monotonic() - began_s:.0f} s\n")
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


if __name__ == "__main__":
    main()
