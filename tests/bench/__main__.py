"""How much the mesh costs: ``make bench``, or ``python tests/bench [--items N] [--reps N] [--json FILE]``.

Machines differ and are noisy, so figures are ratios between flows that run one after the other, again and
again, in one session; medians over the repetitions. Every role is a process of its own, on uvloop.

    raw(1)     submit -> work-queue stream -> fetch(1), ack, core publish "done"
    raw(32)    the same with fetch(32): the throughput a careful worker on plain nats-py reaches
    raw(pull)  the same with a continuous pull, without batches
    mesh       submit -> COMPUTE_WORK -> placed, recorded, delivered -> report -> recorded -> state event,
               with a bare subscriber as the node, so that nothing but the mesh is measured
    mesh, direct   the same with a node that acknowledges each delivery, as the node-agent does
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import nats
import nats.errors
import nats.js.errors
import psutil
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import RetentionPolicy

from computemesh.contracts.base import Role
from computemesh.nats_server.process import find_binary
from computemesh.testing import RunningMesh, running_mesh

# pyright: reportUnknownMemberType=false

LATENCY_ITEMS: Final = 500
WARM_ITEMS: Final = 50
IN_FLIGHT_MAX: Final = 1000
"""Publishes without acknowledgement at a time while throughput is measured."""

RAW_SUBJECT: Final = "raw.submit"

encode: Final = msgspec.json.Encoder().encode


class Work(msgspec.Struct):
    """What a worker or an onlooker must know of an item."""

    work_id: str
    attempt: int = 0
    state: str = ""


class Report(msgspec.Struct):
    """What a node says of an item that is done."""

    work_id: str
    attempt: int
    result: None = None


decode_work: Final = msgspec.json.Decoder(Work).decode


class Row(msgspec.Struct):
    """One measurement of one flow."""

    p50_us: float
    p99_us: float
    items_per_s: float
    cpu_us_per_item: float


# --- the roles, each a process ---------------------------------------------------------------------------------


async def raw_worker(url: str, batch: int) -> None:
    """The least a durable worker does on plain nats-py. ``batch`` 0 is a continuous pull."""
    nc = await nats.connect(url)
    js = nc.jetstream()

    async def done(msg: Msg) -> None:
        await nc.publish(msg.reply, b"+ACK")
        await nc.publish("raw.done." + decode_work(msg.data).work_id, b"{}")

    if batch == 0:
        await _continuous_pull(nc, done)
    subscription = await js.pull_subscribe(RAW_SUBJECT, "worker", stream="RAW") if batch else None
    print("ready", flush=True)  # noqa: T201
    while subscription is not None:
        with contextlib.suppress(nats.errors.TimeoutError):
            for msg in await subscription.fetch(batch, timeout=30):
                await done(msg)
    await asyncio.Event().wait()


async def _continuous_pull(nc: Client, on_message: Callable[[Msg], Awaitable[None]], batch: int = 2000) -> None:
    config = {"ack_policy": "explicit", "max_ack_pending": 5000}
    answer = await nc.request("$JS.API.CONSUMER.CREATE.RAW", encode({"stream_name": "RAW", "config": config}))
    inbox, ask = nc.new_inbox(), f"$JS.API.CONSUMER.MSG.NEXT.RAW.{msgspec.json.decode(answer.data)['name']}"
    left = batch

    async def on_one(msg: Msg) -> None:
        nonlocal left
        await on_message(msg)
        left -= 1
        if left <= batch // 2:
            left += batch // 2
            await nc.publish(ask, encode({"batch": batch // 2}), reply=inbox)

    await nc.subscribe(inbox, cb=on_one)
    await nc.publish(ask, encode({"batch": batch}), reply=inbox)


async def bare_node(url: str, _: int) -> None:
    """A bare subscriber: hears plain assignments and does nothing but report."""
    nc = await nats.connect(url, inbox_prefix="_INBOX_node.bench")

    async def on_work(msg: Msg) -> None:
        item = decode_work(msg.data)
        await nc.publish("compute.work.completed.v1", encode(Report(item.work_id, item.attempt)))

    await nc.subscribe("compute.work.assigned.v1", cb=on_work)
    await _register(nc, {"node_id": "bench", "work_types": ["noop"], "slots": 100_000})


async def direct_node(url: str, _: int) -> None:
    """A node with acknowledged delivery, as our agent is one: answers each assignment, then reports."""
    nc = await nats.connect(url, inbox_prefix="_INBOX_node.direct")

    async def on_work(msg: Msg) -> None:
        item = decode_work(msg.data)
        await msg.respond(b'{"accepted":true}')
        await nc.publish("compute.work.completed.v1", encode(Report(item.work_id, item.attempt)))

    await nc.subscribe("compute.work.assigned.v1.direct", cb=on_work)
    await _register(nc, {"node_id": "direct", "delivery": "direct", "work_types": ["noop-direct"], "slots": 100_000})


async def _register(nc: Client, node: dict[str, Any]) -> None:
    await nc.flush()
    await nc.request("compute.nodes.register.v1", encode(node))
    print("ready", flush=True)  # noqa: T201
    await asyncio.Event().wait()


ROLES: Final = {"raw": raw_worker, "node": bare_node, "direct": direct_node}


@asynccontextmanager
async def role(name: str, url: str, argument: int = 0) -> AsyncGenerator[int]:
    """A role as a process, ready; gives its pid."""
    command = [sys.executable, __file__, "--role", name, "--batch", str(argument)]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, env={**os.environ, "BENCH_URL": url}
    )
    assert process.stdout is not None
    try:
        await asyncio.wait_for(process.stdout.readline(), 20)
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


# --- the client ------------------------------------------------------------------------------------------------


async def measure(
    nc: Client, subject: str, done: str, is_done: Callable[[Msg], str], pid: int, items: int, work_type: str = "noop"
) -> Row:
    """Latency one by one, then throughput; CPU of the process that does the flow's work."""
    waits: dict[str, asyncio.Future[float]] = {}
    finished, wanted, complete = 0, items, asyncio.Event()

    async def on_done(msg: Msg) -> None:
        nonlocal finished
        work_id = is_done(msg)
        if not work_id:
            return
        if wait := waits.pop(work_id, None):
            wait.set_result(time.perf_counter())
        finished += 1
        if finished == wanted:
            complete.set()

    subscription = await nc.subscribe(done, cb=on_done)
    await nc.flush()
    js = nc.jetstream(publish_async_max_pending=20_000)
    tag = f"b{time.time_ns()}"
    latencies: list[float] = []
    for number in range(LATENCY_ITEMS + WARM_ITEMS):
        work_id = f"{tag}-l{number}"
        waits[work_id] = asyncio.get_running_loop().create_future()
        wait = waits[work_id]
        began = time.perf_counter()
        await js.publish(subject, encode({"work_id": work_id, "work_type": work_type}))
        latencies.append(await asyncio.wait_for(wait, 10) - began)
    latencies = sorted(latencies[WARM_ITEMS:])
    finished, cpu = 0, cpu_s(pid)
    began = time.perf_counter()
    slots = asyncio.Semaphore(IN_FLIGHT_MAX)
    for number in range(items):
        await slots.acquire()
        future = await js.publish_async(subject, encode({"work_id": f"{tag}-t{number}", "work_type": work_type}))
        future.add_done_callback(lambda _: slots.release())
    await asyncio.wait_for(complete.wait(), 120)
    took = time.perf_counter() - began
    await subscription.unsubscribe()
    return Row(
        p50_us=latencies[len(latencies) // 2] * 1e6,
        p99_us=latencies[int(len(latencies) * 0.99)] * 1e6,
        items_per_s=items / took,
        cpu_us_per_item=(cpu_s(pid) - cpu) * 1e6 / items,
    )


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def raw_done(msg: Msg) -> str:
    return msg.subject.rsplit(".", 1)[1]


def mesh_done(msg: Msg) -> str:
    record = decode_work(msg.data)
    return record.work_id if record.state == "completed" else ""


async def measure_raw(url: str, batch: int, items: int) -> Row:
    nc = await nats.connect(url)
    js = nc.jetstream()
    try:
        with contextlib.suppress(nats.js.errors.NotFoundError):
            await js.delete_stream("RAW")
        await js.add_stream(name="RAW", subjects=[RAW_SUBJECT], retention=RetentionPolicy.WORK_QUEUE)
        async with role("raw", url, batch) as pid:
            return await measure(nc, RAW_SUBJECT, "raw.done.*", raw_done, pid, items)
    finally:
        await nc.close()


async def measure_mesh(mesh: RunningMesh, items: int, work_type: str = "noop") -> Row:
    nc = await nats.connect(mesh.url(Role.CLIENT))
    try:
        pid = mesh.service("work-marshaller").status.pid
        return await measure(nc, "compute.work.submit.v1", "compute.work.state.v1.*", mesh_done, pid, items, work_type)
    finally:
        await nc.close()


@asynccontextmanager
async def raw_server(folder: Path) -> AsyncGenerator[str]:
    """A second server, without accounts or permissions, for the raw flows."""
    ports = folder / "ports"
    ports.mkdir(parents=True)
    command = [
        str(find_binary()),
        "-a",
        "127.0.0.1",
        "-p",
        "-1",
        "-js",
        "-sd",
        str(folder),
        "--ports_file_dir",
        str(ports),
    ]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.DEVNULL)
    try:
        while not (found := list(ports.glob("*.ports"))):
            await asyncio.sleep(0.02)
        yield str(msgspec.json.decode(found[0].read_bytes())["nats"][0])
    finally:
        process.kill()
        await process.wait()


# --- the run ---------------------------------------------------------------------------------------------------


async def bench(items: int, reps: int) -> dict[str, Any]:
    """All flows, interleaved, and what else is worth knowing of a mesh."""
    flows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        services = ("node-registry", "work-marshaller", "resource-detector", "node-agent")
        began = time.perf_counter()
        async with (
            running_mesh(Path(folder), services, environment={"COMPUTEMESH_MODELS": "/nowhere"}) as mesh,
            raw_server(Path(folder) / "raw") as raw_url,
            role("node", await mesh.invite("bench")),
            role("direct", await mesh.invite("direct")),
        ):
            ready_s = time.perf_counter() - began
            runs: dict[str, Callable[[], Awaitable[Row]]] = {
                "raw(1)": lambda: measure_raw(raw_url, 1, items),
                "raw(32)": lambda: measure_raw(raw_url, 32, items),
                "raw(pull)": lambda: measure_raw(raw_url, 0, items),
                "mesh": lambda: measure_mesh(mesh, items),
                "mesh, direct": lambda: measure_mesh(mesh, items, "noop-direct"),
            }
            for rep in range(reps):
                for name, run in runs.items():
                    sys.stderr.write(f"\r{rep + 1}/{reps} {name:10}")
                    flows.setdefault(name, []).append(await run())
            sys.stderr.write("\r")
            memory = {
                status.name: round(psutil.Process(status.pid).memory_info().rss / 2**20, 1)
                for status in mesh.supervisor.status().services
            }
    medians = {name: median(rows) for name, rows in flows.items()}
    return {
        "items": items,
        "repetitions": reps,
        "flows": medians,
        "latency_to_raw1": medians["mesh"].p50_us / medians["raw(1)"].p50_us,
        "throughput_to_raw32": medians["mesh"].items_per_s / medians["raw(32)"].items_per_s,
        "ready_s": ready_s,
        "rss_mb": memory,
    }


def median(rows: list[Row]) -> Row:
    names = Row.__struct_fields__
    return Row(*(statistics.median(getattr(row, name) for row in rows) for name in names))


def show(report: dict[str, Any]) -> None:
    """A table for people."""
    lines = ["flow          p50 us   p99 us   items/s  CPU us/item"]
    for name, row in report["flows"].items():
        lines.append(
            f"{name:12} {row.p50_us:7.0f}  {row.p99_us:7.0f}  {row.items_per_s:8.0f}  {row.cpu_us_per_item:11.0f}"
        )
    lines += [
        "",
        f"latency:    {report['latency_to_raw1']:.2f} x raw(1)      (aim: at most 2)",
        f"throughput: {report['throughput_to_raw32']:.2f} x raw(32)     (aim: at least 0.5)",
        f"from start to ready, engine excluded: {report['ready_s']:.1f} s",
        "memory: " + ", ".join(f"{name} {size} MB" for name, size in report["rss_mb"].items()),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the mesh costs, against the raw limit.")
    parser.add_argument("--items", type=int, default=10_000, help="items per throughput measurement")
    parser.add_argument("--reps", type=int, default=3, help="repetitions; the medians count")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        uvloop.run(ROLES[options.role](os.environ["BENCH_URL"], options.batch))
        return
    report = uvloop.run(bench(options.items, options.reps))
    show(report)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


if __name__ == "__main__":
    main()
