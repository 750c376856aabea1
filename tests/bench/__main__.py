"""How much the mesh costs: ``make bench``, or ``python -m tests.bench [--items N] [--reps N] [--json FILE]``.

All flows of :mod:`tests.bench.flows`, as :mod:`tests.bench.harness` measures them, and how long a mesh takes to start.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import msgspec
import psutil
import uvloop

from computemesh.testing import running_mesh
from tests.bench.flows import FLOWS
from tests.bench.harness import Row, lines, repeat

SERVICES = ("node-registry", "work-marshaller", "resource-detector", "node-agent")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured."""

    items: int
    repetitions: int
    flows: dict[str, Row]
    latency_to_raw1: float
    throughput_to_raw32: float
    ready_s: float
    """From the start of a whole mesh until it is ready, engine excluded."""
    rss_mb: dict[str, float]
    """Of its services, at rest."""


async def start() -> tuple[float, dict[str, float]]:
    """How long a whole mesh takes to start, and the memory of its services."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        began = time.perf_counter()
        async with running_mesh(Path(folder), SERVICES, environment={"COMPUTEMESH_MODELS": "/nowhere"}) as mesh:
            ready_s = time.perf_counter() - began
            sizes = {name: psutil.Process(mesh.pid(name)).memory_info().rss / 2**20 for name in SERVICES}
            return ready_s, sizes


async def bench(items: int, reps: int) -> Report:
    ready_s, rss_mb = await start()
    flows = await repeat(FLOWS, items, reps)
    return Report(
        items=items,
        repetitions=reps,
        flows=flows,
        latency_to_raw1=flows["mesh"].p50_us / flows["raw(1)"].p50_us,
        throughput_to_raw32=flows["mesh"].items_per_s / flows["raw(32)"].items_per_s,
        ready_s=ready_s,
        rss_mb=rss_mb,
    )


def show(report: Report) -> None:
    """A table for people."""
    parts = [
        f"  {name:13} " + ", ".join(f"{part} {cpu:.0f}" for part, cpu in row.cpu_us.items())
        for name, row in report.flows.items()
    ]
    text = [
        *lines(report.flows),
        "",
        "CPU µs/item of each part:",
        *parts,
        "",
        f"latency:    {report.latency_to_raw1:.2f} × raw(1)      (aim: at most 1.75)",
        f"throughput: {report.throughput_to_raw32:.2f} × raw(32)     (aim: at least 0.75)",
        f"from start to ready, engine excluded: {report.ready_s:.1f} s",
        "memory: " + ", ".join(f"{name} {size:.0f} MB" for name, size in report.rss_mb.items()),
    ]
    print("\n".join(text))  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description="What the mesh costs, against the raw limit.")
    parser.add_argument("--items", type=int, default=10_000, help="items per throughput measurement")
    parser.add_argument("--reps", type=int, default=3, help="repetitions; the medians count")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    report = uvloop.run(bench(options.items, options.reps))
    show(report)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


if __name__ == "__main__":
    main()
