"""What all flows of the benches share: programs in processes of their own, and how one flow is measured.

Machines differ and are noisy, so figures are ratios between flows that run one after the other, again and again, in one
session; medians over the repetitions. Each measurement starts its flow anew, stores included.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final

import msgspec
import psutil

from computemesh.process import end

ROOT: Final = Path(__file__).parents[2]
LATENCY_ITEMS: Final = 500
WARM_ITEMS: Final = 50
GIVE_UP_S: Final = 300.0
GRACE_S: Final = 10.0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one flow."""

    p50_us: float
    """From submission to completion, one item at a time."""
    p99_us: float
    items_per_s: float
    """With many items under way."""
    cpu_us: dict[str, float]
    """Per item, of each part of the flow, while many are under way."""
    rss_mb: dict[str, float]
    """Of each part of the flow, after that."""


class Client:
    """The side that submits and waits, as ``programs/driver.py`` has it."""

    def __init__(self, process: Process) -> None:
        self.pid: Final = process.pid
        self._process = process

    async def do(self, kind: str, items: int) -> list[float]:
        """``each`` or ``all``; gives the seconds it took.

        Raises:
            EOFError: the client ended; what it has to say about that is on standard error.
            TimeoutError: no answer came.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{kind} {items}\n".encode())
        line = await asyncio.wait_for(self._process.stdout.readline(), GIVE_UP_S)
        if not line:
            raise EOFError("the client ended before it answered")
        return msgspec.json.decode(line, type=list[float])


@dataclass(frozen=True)
class Flow:
    """A flow that runs: its client, and the process of each of its parts. Their children count as theirs."""

    client: Client
    parts: Mapping[str, int]

    def cpu_s(self) -> dict[str, float]:
        return {name: sum(_each(pid, _cpu_s)) for name, pid in self.parts.items()}

    def rss_mb(self) -> dict[str, float]:
        return {name: sum(_each(pid, _rss_mb)) for name, pid in self.parts.items()}


OpenFlow = Callable[[Path], AbstractAsyncContextManager[Flow]]
"""Starts a flow anew, with its files in a folder of its own."""


def _each(pid: int, what: Callable[[psutil.Process], float]) -> list[float]:
    first = psutil.Process(pid)
    found: list[float] = []
    for process in (first, *first.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(what(process))
    return found


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _rss_mb(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


@asynccontextmanager
async def program(
    *command: str, url: str = "", python: Path | str = sys.executable, limit: int = 2**20
) -> AsyncGenerator[Process]:
    """A Python module in a process of its own that says when it is ready; it ends with the block.

    Args:
        limit: bytes that a line of its output may have.

    Raises:
        EOFError: it ended instead; what it has to say about that is on standard error.
    """
    process = await asyncio.create_subprocess_exec(
        *(str(python), "-m", *command),
        cwd=ROOT,
        stdin=PIPE,
        stdout=PIPE,
        env={**os.environ, "BENCH_URL": url},
        start_new_session=True,
        limit=limit,
    )
    try:
        assert process.stdout is not None
        if not await asyncio.wait_for(process.stdout.readline(), GIVE_UP_S):
            raise EOFError(f"{' '.join(command)} ended before it was ready")
        yield process
    finally:
        await end(process, grace_s=GRACE_S)


@asynccontextmanager
async def client(*command: str, url: str = "", python: Path | str = sys.executable) -> AsyncGenerator[Client]:
    """A client, ready; it is let out by the end of its input, so that it can end what it started."""
    async with program(*command, url=url, python=python) as process:
        yield Client(process)
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), GRACE_S)


async def measure(flow: Flow, items: int) -> Row:
    """Latency one by one, then throughput with the CPU it takes, and the memory after it."""
    await flow.client.do("each", WARM_ITEMS)
    each = sorted(await flow.client.do("each", LATENCY_ITEMS))
    before = flow.cpu_s()
    (took_s,) = await flow.client.do("all", items)
    cpu = flow.cpu_s()
    return Row(
        p50_us=each[len(each) // 2] * 1e6,
        p99_us=each[int(len(each) * 0.99)] * 1e6,
        items_per_s=items / took_s,
        cpu_us={name: (cpu[name] - before[name]) * 1e6 / items for name in cpu},
        rss_mb=flow.rss_mb(),
    )


async def repeat(flows: Mapping[str, OpenFlow], items: int, reps: int) -> dict[str, Row]:
    """Medians of all flows, measured one after the other, again and again; tells on standard error where it is."""
    rows: dict[str, list[Row]] = {}
    for rep, (name, open_flow) in product(range(reps), flows.items()):
        sys.stderr.write(f"\r{rep + 1}/{reps} {name:24}")
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            async with open_flow(Path(folder)) as flow:
                rows.setdefault(name, []).append(await measure(flow, items))
    sys.stderr.write("\r" + " " * 32 + "\r")
    return {name: median(found) for name, found in rows.items()}


def median(rows: Sequence[Row]) -> Row:
    """Each figure's median by itself."""

    def of_parts(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {part: statistics.median(figure[part] for figure in figures) for part in figures[0]}

    return Row(
        p50_us=statistics.median(row.p50_us for row in rows),
        p99_us=statistics.median(row.p99_us for row in rows),
        items_per_s=statistics.median(row.items_per_s for row in rows),
        cpu_us=of_parts([row.cpu_us for row in rows]),
        rss_mb=of_parts([row.rss_mb for row in rows]),
    )


def lines(rows: Mapping[str, Row]) -> list[str]:
    """A table for people, in Markdown."""
    return [
        f"| {'flow':21} | p50 µs | p99 µs | items/s | CPU µs/item | RSS MB |",
        f"|{'-' * 23}|-------:|-------:|--------:|------------:|-------:|",
        *(
            f"| {name:21} | {row.p50_us:6,.0f} | {row.p99_us:6,.0f} | {row.items_per_s:7,.0f} "
            f"| {sum(row.cpu_us.values()):11,.0f} | {sum(row.rss_mb.values()):6,.0f} |"
            for name, row in rows.items()
        ),
    ]
