"""What a reservation costs: ``make bench-gpus``, or ``python -m tests.bench.gpus [--pairs N] [--json FILE]``.

A pair is a reserve and a release, each answered before the next is asked. Clients are plain nats-py on one connection.
The raw limit is the least that could keep a truth: one compare-and-set put of a record for the reserve and one for
the release, with the same library; who loses a race reads the record and tries again. Flows run one after the other,
again and again, in one session; medians count.

    one node, 64 nodes    where the reservations lie: on one record, or spread over as many records as clients
    own ids               each reserve has an id that its client chose, and no node: safe to repeat anywhere
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import nats
import uvloop
from nats.aio.client import Client

from computemesh.contracts.base import Role, encode
from computemesh.contracts.nodes import NodeAnnouncement
from computemesh.hardware import Gpu
from computemesh.testing import RunningMesh, running_mesh

# pyright: reportUnknownMemberType=false

NODES: Final = 64
CLIENTS: Final = 64
RECORD: Final = b"x" * 400
"""About as large as a record with one reservation."""

Pair = Callable[[int], Awaitable[None]]


class Row(msgspec.Struct):
    """One measurement."""

    pairs_per_s: float
    p50_ms: float
    p99_ms: float


async def measure(pair: Pair, clients: int, pairs: int) -> Row:
    """*pairs* in all, by so many clients at once."""
    waits: list[float] = []

    async def client(number: int) -> None:
        for _ in range(max(1, pairs // clients)):
            began = time.perf_counter()
            await pair(number)
            waits.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    took = time.perf_counter() - began
    waits.sort()
    return Row(
        pairs_per_s=len(waits) / took,
        p50_ms=waits[len(waits) // 2] * 1e3,
        p99_ms=waits[int(len(waits) * 0.99)] * 1e3,
    )


def reserving(nc: Client, *, spread: bool, own_ids: bool = False) -> Pair:
    """A pair as a client of the mesh does it."""
    numbers = iter(range(sys.maxsize))
    tag = f"{time.time_ns():x}"

    async def pair(client: int) -> None:
        ask: dict[str, Any] = {"required_mb": 100, "timeout_seconds": 60}
        if own_ids:
            ask["reservation_id"] = f"b{tag}-{next(numbers)}"
        else:
            ask["node_id"] = f"b{client % NODES if spread else 0}"
        answer = await nc.request("compute.gpus.reserve.v1", msgspec.json.encode(ask), timeout=20)
        reservation = msgspec.json.decode(answer.data)["reservation_id"]
        release = {"reservation_id": reservation}
        answer = await nc.request("compute.gpus.release.v1", msgspec.json.encode(release), timeout=20)
        assert msgspec.json.decode(answer.data)["reason"] == "released"

    return pair


def putting(nc: Client, *, spread: bool) -> Pair:
    """A pair as raw compare-and-set puts."""
    revisions: dict[str, int] = {}

    async def put(key: str) -> None:
        while True:
            headers = {"Nats-Expected-Last-Subject-Sequence": str(revisions.get(key, 0))}
            reply = await nc.request(f"$KV.raw.{key}", RECORD, timeout=20, headers=headers)
            ack = msgspec.json.decode(reply.data)
            if "error" not in ack:
                revisions[key] = max(revisions.get(key, 0), ack["seq"])
                return
            found = await nc.request(f"$JS.API.DIRECT.GET.KV_raw.$KV.raw.{key}", b"", timeout=20)
            revisions[key] = int((found.headers or {}).get("Nats-Sequence", "0"))

    async def pair(client: int) -> None:
        for _ in ("reserve", "release"):
            await put(f"k{client if spread else 0}")

    return pair


async def prepared(mesh: RunningMesh) -> tuple[Client, Client]:
    """A client's connection and one for the raw puts, with all nodes known."""
    services = await nats.connect(mesh.url(Role.SERVICES), inbox_prefix="_INBOX_services")
    config = {
        "name": "KV_raw",
        "subjects": ["$KV.raw.>"],
        "max_msgs_per_subject": 1,
        "allow_direct": True,
        "discard": "new",
        "storage": "file",
    }
    await services.request("$JS.API.STREAM.CREATE.KV_raw", msgspec.json.encode(config))
    for number in range(NODES):
        cards = [Gpu(index=at, uuid=f"GPU-{number}-{at}", vram_total_mb=81_920) for at in range(8)]
        node = NodeAnnouncement(node_id=f"b{number}", gpus=cards)
        await services.request("compute.nodes.register.v1", encode(node))
    client = await nats.connect(mesh.url(Role.CLIENT))
    while True:
        answer = await client.request("compute.gpus.states.v1", b"{}", timeout=20)
        if msgspec.json.decode(answer.data).get("count") == NODES:
            return client, services
        await asyncio.sleep(0.1)


async def bench(pairs: int, reps: int) -> dict[str, Any]:
    """All flows, interleaved, with one replica and with two."""
    flows: dict[str, list[Row]] = {}
    for replicas in (1, 2):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            settings = {"COMPUTEMESH_UNMONITORED_TTL_S": "86400"}
            copies = {"gpu-orchestrator": replicas}
            services = ("node-registry", "gpu-orchestrator")
            async with running_mesh(Path(folder), services, copies=copies, environment=settings) as mesh:
                client, raw = await prepared(mesh)
                suffix = "" if replicas == 1 else ", 2 replicas"
                runs: dict[str, tuple[Pair, int, int]] = {
                    f"one node, 1 client{suffix}": (reserving(client, spread=False), 1, pairs // 8),
                    f"one node, 64 clients{suffix}": (reserving(client, spread=False), CLIENTS, pairs),
                    f"64 nodes, 64 clients{suffix}": (reserving(client, spread=True), CLIENTS, pairs),
                    f"own ids, 1 client{suffix}": (reserving(client, spread=False, own_ids=True), 1, pairs // 8),
                    f"own ids, 64 clients{suffix}": (reserving(client, spread=False, own_ids=True), CLIENTS, pairs),
                }
                if replicas == 1:
                    runs |= {
                        "raw, one key, 1 client": (putting(raw, spread=False), 1, pairs // 2),
                        "raw, one key, 64 clients": (putting(raw, spread=False), CLIENTS, pairs // 8),
                        "raw, 64 keys, 64 clients": (putting(raw, spread=True), CLIENTS, pairs),
                    }
                for rep in range(reps):
                    for name, (pair, clients, count) in runs.items():
                        sys.stderr.write(f"\r{rep + 1}/{reps} {name:36}")
                        await measure(pair, clients, clients * 2)  # Warm.
                        flows.setdefault(name, []).append(await measure(pair, clients, count))
                sys.stderr.write("\r")
                await client.close()
                await raw.close()
    medians = {name: median(rows) for name, rows in flows.items()}
    return {
        "pairs": pairs,
        "repetitions": reps,
        "flows": medians,
        "to_raw": {
            name: medians[flow].pairs_per_s / medians[limit].pairs_per_s
            for name, flow, limit in (
                ("one node, 1 client", "one node, 1 client", "raw, one key, 1 client"),
                ("one node, 64 clients", "one node, 64 clients", "raw, one key, 64 clients"),
                ("64 nodes, 64 clients", "64 nodes, 64 clients", "raw, 64 keys, 64 clients"),
            )
        },
    }


def median(rows: list[Row]) -> Row:
    names = Row.__struct_fields__
    return Row(*(statistics.median(getattr(row, name) for row in rows) for name in names))


def show(report: dict[str, Any]) -> None:
    """A table for people."""
    lines = [f"{'reserve + release':32} pairs/s   p50 ms   p99 ms"]
    for name, row in report["flows"].items():
        lines.append(f"{name:32} {row.pairs_per_s:7.0f} {row.p50_ms:8.2f} {row.p99_ms:8.2f}")
    lines.append("")
    lines += [f"{name}: {ratio:.2f} x raw" for name, ratio in report["to_raw"].items()]
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a reservation of GPU memory costs, against the raw limit.")
    parser.add_argument("--pairs", type=int, default=4000, help="pairs per measurement with 64 clients")
    parser.add_argument("--reps", type=int, default=3, help="repetitions; the medians count")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    report = uvloop.run(bench(options.pairs, options.reps))
    show(report)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


if __name__ == "__main__":
    main()
