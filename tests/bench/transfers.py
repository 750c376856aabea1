"""Memory moved between two processes: ``make bench-transfers``, or ``python -m tests.bench.transfers``.

Peers of the mesh beside memcpy, a plain socket, iperf3, and the libraries that move KV caches elsewhere, in one run.
Each is started anew, in turns; :mod:`tests.bench.programs.transfer` has the rules, which are the same for all.
``--get`` makes an environment for each library and installs it there; what is not installed is left out.

A machine's memory is never as fast twice. So every initiator copies the same amounts by memcpy between its transfers,
and what counts is the ratio of the two. That memcpy is one thread, in one go, between private pages of the usual size.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Final

import msgspec

from computemesh.peer.signals import SOCKET_NAME
from computemesh.process import end
from computemesh.testing import running_mesh
from tests.bench.harness import GRACE_S, Client, client, program
from tests.bench.servers import free_port

DEFAULT_PLACE: Final = Path("~/.cache/computemesh-transfer-peers").expanduser()
LIBRARIES: Final = {
    # NIXL's own needs are torch and a build for another CUDA.
    "nixl": ("--no-deps", "nixl==1.5.1", "nixl-cu12==1.5.1", "numpy==2.4.6"),
    "mooncake": ("mooncake-transfer-engine-non-cuda==0.3.13.post1",),
    "dlslime": ("dlslime==0.1.23",),
}
PROGRAMS: Final = "tests.bench.programs"
KIB: Final = 2**10
MIB: Final = 2**20
GIB: Final = 2**30
SIZES: Final = {4 * KIB: "4 KiB", 64 * KIB: "64 KiB", MIB: "1 MiB", 16 * MIB: "16 MiB", 256 * MIB: "256 MiB"}
BATCHES: Final = {4 * KIB: (4, 250), 64 * KIB: (4, 125), MIB: (4, 32), 16 * MIB: (4, 4), 256 * MIB: (4, 1)}
"""How often, and how many transfers each time, memcpy taking turns with them."""
LATENCIES: Final = (4 * KIB, 64 * KIB)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Transfers of one size."""

    p50_us: float
    p99_us: float
    of_memcpy: float
    """The speed of memcpy in the same process and the same moments is 1."""

    def gib_s(self, size: int) -> float:
        return size / GIB / (self.p50_us * 1e-6)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured: medians over the repetitions."""

    repetitions: int
    cores: int
    versions: dict[str, str]
    flows: dict[str, dict[int, Figures]]
    """By name and size in bytes."""
    stream_gib_s: float | None
    """What iperf3 says of one stream; it knows no transfers."""


OpenFlow = Callable[[], AbstractAsyncContextManager[Client]]


# --- one flow --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def pair(module: str, *arguments: str, python: Path | str = sys.executable) -> AsyncGenerator[Client]:
    """A target and an initiator, each a process of its own."""
    async with program(module, "target", *arguments, python=python) as target:
        assert target.stdin is not None
        assert target.stdout is not None
        address = (await target.stdout.readline()).decode().strip()
        async with client(module, "initiator", *arguments, url=address, python=python) as initiator:
            yield initiator
        target.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(target.wait(), GRACE_S)


@asynccontextmanager
async def peers(transport: str) -> AsyncGenerator[Client]:
    """Two peers of a mesh of their own, on one machine."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        async with running_mesh(Path(folder), ("control-plane", "peer-agent")) as mesh:
            socket = str(mesh.home.run / SOCKET_NAME)
            async with pair(f"{PROGRAMS}.on_peers", transport, socket) as initiator:
                yield initiator


async def measure(initiator: Client) -> tuple[dict[int, Figures], dict[int, Figures]]:
    """The flow's figures, and memcpy's beside it."""
    await initiator.do(f"read:{256 * MIB}", 1)
    read: dict[int, Figures] = {}
    copied: dict[int, Figures] = {}
    for size, (times, count) in BATCHES.items():
        await initiator.do(f"read:{size}", max(1, count // 4))
        await initiator.do(f"copy:{size}", max(1, count // 4))
        transfers: list[float] = []
        copies: list[float] = []
        for _ in range(times):
            transfers += await initiator.do(f"read:{size}", count)
            copies += await initiator.do(f"copy:{size}", count)
        usual = statistics.median(copies)
        read[size] = figures(transfers, usual)
        copied[size] = figures(copies, usual)
    return read, copied


def figures(seconds: Sequence[float], memcpy_s: float) -> Figures:
    ordered = sorted(seconds)
    p50 = statistics.median(ordered)
    return Figures(p50_us=p50 * 1e6, p99_us=ordered[int(len(ordered) * 0.99)] * 1e6, of_memcpy=memcpy_s / p50)


async def stream_gib_s() -> float:
    """One stream of iperf3 in the direction of a read."""
    port = free_port()
    server = await asyncio.create_subprocess_exec(
        *("iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", str(port), "--forceflush"), stdout=PIPE, start_new_session=True
    )
    try:
        assert server.stdout is not None
        await asyncio.wait_for(server.stdout.readuntil(b"listening"), GRACE_S)
        asked = await asyncio.create_subprocess_exec(
            *("iperf3", "-c", "127.0.0.1", "-p", str(port), "-R", "-t", "2", "-J"), stdout=PIPE
        )
        said, _ = await asked.communicate()
        return float(msgspec.json.decode(said)["end"]["sum_received"]["bits_per_second"]) / 8 / GIB
    finally:
        await end(server, grace_s=GRACE_S)


# --- all of them -----------------------------------------------------------------------------------------------


def flows(place: Path) -> dict[str, OpenFlow]:
    """What is here, by the name it has in the table."""
    found: dict[str, OpenFlow] = {
        "peers, shm": partial(peers, "shm"),
        "peers, tcp": partial(peers, "tcp"),
        "memory that both map": partial(pair, f"{PROGRAMS}.raw_memory"),
        "a plain TCP socket": partial(pair, f"{PROGRAMS}.raw_socket"),
    }
    kinds = {
        "NIXL, UCX": ("nixl", "default"),
        "NIXL, UCX, shared memory": ("nixl", "shared"),
        "NIXL, UCX, TCP": ("nixl", "tcp"),
        "Mooncake, TCP": ("mooncake",),
        "DLSlime, TCP": ("dlslime",),
    }
    for name, (library, *arguments) in kinds.items():
        python = python_of(place, library)
        if python.is_file():
            found[name] = partial(pair, f"{PROGRAMS}.peers.on_{library}", *arguments, python=python)
    return found


async def repeat(opened: Mapping[str, OpenFlow], reps: int) -> tuple[dict[str, dict[int, Figures]], float | None]:
    """Medians of all flows, one after the other, again and again; tells on standard error where it is."""
    rows: dict[str, list[dict[int, Figures]]] = {"memcpy": []}
    streams: list[float] = []
    for rep, (name, open_flow) in product(range(reps), opened.items()):
        sys.stderr.write(f"\r{rep + 1}/{reps} {name:32}")
        async with open_flow() as initiator:
            read, copied = await measure(initiator)
        rows.setdefault(name, []).append(read)
        rows["memcpy"].append(copied)
    if shutil.which("iperf3"):
        streams = [await stream_gib_s() for _ in range(reps)]
    sys.stderr.write("\r" + " " * 40 + "\r")
    return {name: medians(found) for name, found in rows.items()}, statistics.median(streams) if streams else None


def medians(found: Sequence[Mapping[int, Figures]]) -> dict[int, Figures]:
    """Each figure's median by itself."""

    def of(figures: Iterable[Figures]) -> Figures:
        every = list(figures)
        return Figures(
            p50_us=statistics.median(each.p50_us for each in every),
            p99_us=statistics.median(each.p99_us for each in every),
            of_memcpy=statistics.median(each.of_memcpy for each in every),
        )

    return {size: of(row[size] for row in found) for size in SIZES}


# --- the libraries ---------------------------------------------------------------------------------------------


def python_of(place: Path, library: str) -> Path:
    return place.absolute() / library / "bin" / "python"


def get(place: Path) -> None:
    """Makes an environment for each library that has none.

    Raises:
        subprocess.CalledProcessError: pip could not install one; it said why.
    """
    for library, wanted in LIBRARIES.items():
        folder = place.absolute() / library
        if not python_of(place, library).is_file():
            sys.stderr.write(f"Installing {library} into {folder}\n")
            try:
                venv.create(folder, with_pip=True)
                subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *wanted], check=True)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise


def missing(place: Path) -> list[str]:
    """What is left out, and how to get it, a line each."""
    absent = [library for library in LIBRARIES if not python_of(place, library).is_file()]
    advice = [f"{', '.join(absent)} left out: not in {place}; --get installs them"] if absent else []
    if not shutil.which("iperf3"):
        advice.append("iperf3 left out: not on PATH. On Debian: apt-get install iperf3")
    return advice


def versions(place: Path) -> dict[str, str]:
    """Those of what is compared."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for library, wanted in LIBRARIES.items():
        if python_of(place, library).is_file():
            found |= dict(each.split("==") for each in wanted if each.startswith(library))
    if iperf := shutil.which("iperf3"):
        found["iperf3"] = subprocess.run([iperf, "--version"], check=True, stdout=PIPE, text=True).stdout.split()[1]
    return found


# --- the run ---------------------------------------------------------------------------------------------------


def lines(report: Report) -> list[str]:
    """A table for people, in Markdown."""
    speeds = [size for size in SIZES if size not in LATENCIES]
    headings = [f"{SIZES[size]} µs (p99)" for size in LATENCIES]
    headings += [f"{SIZES[size]} GiB/s (of memcpy)" for size in speeds]
    table = [f"| flow | {' | '.join(headings)} |", "|---|" + "--:|" * len(headings)]
    for name, row in report.flows.items():
        cells = [f"{row[size].p50_us:,.1f} ({row[size].p99_us:,.0f})" for size in LATENCIES]
        cells += [f"{row[size].gib_s(size):.2f} ({row[size].of_memcpy:.2f})" for size in speeds]
        table.append(f"| {name} | {' | '.join(cells)} |")
    if report.stream_gib_s is not None:
        table.append(f"| iperf3, one stream | – | – | – | – | {report.stream_gib_s:.2f} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory moved between two processes, beside what else moves it.")
    parser.add_argument("--peers", type=Path, default=DEFAULT_PLACE, help=f"their environments; {DEFAULT_PLACE}")
    parser.add_argument("--get", action="store_true", help="install the libraries that are not there, some 700 MB")
    parser.add_argument("--only", default="", help="flows whose names have one of these words, with commas")
    parser.add_argument("--reps", type=int, default=3, help="repetitions; the medians count")
    parser.add_argument("--quick", action="store_true", help="once")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    if options.get:
        get(options.peers)
    for line in missing(options.peers):
        sys.stderr.write(line + "\n")
    words = [word.strip().lower() for word in options.only.split(",")]
    opened = {name: flow for name, flow in flows(options.peers).items() if any(w in name.lower() for w in words)}
    reps = 1 if options.quick else options.reps
    rows, stream = asyncio.run(repeat(opened, reps))
    report = Report(
        repetitions=reps,
        cores=os.cpu_count() or 0,
        versions=versions(options.peers),
        flows=rows,
        stream_gib_s=stream,
    )
    print("\n".join(lines(report)))  # noqa: T201
    print("\n" + ", ".join(f"{name} {version}" for name, version in report.versions.items()))  # noqa: T201
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


if __name__ == "__main__":
    main()
