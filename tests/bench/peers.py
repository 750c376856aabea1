"""The mesh beside its peers: ``make bench-peers``, or ``python -m tests.bench.peers [--quick] [--json FILE]``.

The same no-op, from submission until the submitter knows that it is done, with the flows of :mod:`tests.bench.flows` in
the same run. Each peer is set up as its own documentation advises; its program under ``programs/peers`` says how. What
is not installed is left out, and how to get it is said.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from computemesh.nats_server.process import find_binary
from computemesh.process import end
from tests.bench.flows import FLOWS
from tests.bench.harness import GRACE_S, ROOT, Flow, OpenFlow, Row, client, lines, program, repeat
from tests.bench.servers import nats_server, redis_server

DEFAULT_PLACE: Final = Path("~/.cache/computemesh-peers").expanduser()
PACKAGES: Final = ("faststream", "ray", "dramatiq", "celery", "redis", "hiredis", "nats-py", "uvloop")
PROGRAMS: Final = "tests.bench.programs.peers"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured, and with what."""

    items: int
    repetitions: int
    cores: int
    versions: dict[str, str]
    flows: dict[str, Row]


# --- what is here ----------------------------------------------------------------------------------------------


def versions(python: Path) -> dict[str, str]:
    """The peers that this Python has, and the servers, each with its version."""
    ask = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({name: have[name] for name in sys.argv[1:] if name in have}))"
    )
    found: dict[str, str] = {"python": ".".join(map(str, sys.version_info[:3])), "nats-server": _said_by(find_binary())}
    if python.is_file():
        answer = subprocess.run([python, "-c", ask, *PACKAGES], check=True, stdout=subprocess.PIPE).stdout
        found |= msgspec.json.decode(answer, type=dict[str, str])
    if redis := shutil.which("redis-server"):
        found["redis-server"] = _said_by(Path(redis))
    return found


def _said_by(server: Path) -> str:
    said = subprocess.run([server, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
    version = re.search(r"\bv=?([\d.]+)", said)
    return version[1] if version else said.strip()


def missing(found: dict[str, str], place: Path) -> list[str]:
    """What to do to get the peers that are not here, a line each."""
    advice: list[str] = []
    packages = [name for name in ("faststream", "ray", "dramatiq", "celery") if name not in found]
    if packages:
        advice += [
            f"{', '.join(packages)} left out: not in {place}. To get all peers:",
            f"  python3 -m venv {place} && {place}/bin/pip install -r tests/bench/peers.txt",
        ]
    if "redis-server" not in found:
        advice.append("dramatiq and Celery left out: no redis-server on PATH. On Debian: apt-get install redis-server")
    return advice


# --- the flows -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def redis_worker(*command: str, url: str, python: Path) -> AsyncGenerator[Process]:
    """A worker that a peer's own command line starts. It need not be ready: the first item waits for it."""
    process = await asyncio.create_subprocess_exec(
        *(str(python), "-m", *command),
        cwd=ROOT,
        stdout=DEVNULL,
        stderr=DEVNULL,
        env={**os.environ, "BENCH_URL": url},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        await end(process, grace_s=GRACE_S)


@asynccontextmanager
async def faststream(folder: Path, *, python: Path) -> AsyncGenerator[Flow]:
    module = f"{PROGRAMS}.on_faststream"
    async with (
        nats_server(folder) as (url, server),
        program(module, "worker", url=url, python=python) as worker,
        client(module, "client", url=url, python=python) as submitter,
    ):
        yield Flow(submitter, {"client": submitter.pid, "nats-server": server, "worker": worker.pid})


@asynccontextmanager
async def ray(_: Path, *, python: Path) -> AsyncGenerator[Flow]:
    async with client(f"{PROGRAMS}.on_ray", python=python) as driver:
        yield Flow(driver, {"driver and cluster": driver.pid})


@asynccontextmanager
async def dramatiq(folder: Path, *, python: Path) -> AsyncGenerator[Flow]:
    module = f"{PROGRAMS}.on_dramatiq"
    async with (
        redis_server(folder) as (url, server),
        redis_worker("dramatiq", module, url=url, python=python) as worker,
        client(module, url=url, python=python) as submitter,
    ):
        yield Flow(submitter, {"client": submitter.pid, "redis-server": server, "workers": worker.pid})


@asynccontextmanager
async def celery(folder: Path, *, python: Path) -> AsyncGenerator[Flow]:
    module = f"{PROGRAMS}.on_celery"
    async with (
        redis_server(folder) as (url, server),
        redis_worker("celery", "-A", module, "worker", "--pool", "threads", url=url, python=python) as worker,
        client(module, url=url, python=python) as submitter,
    ):
        yield Flow(submitter, {"client": submitter.pid, "redis-server": server, "worker": worker.pid})


def peers(found: dict[str, str], python: Path) -> dict[str, OpenFlow]:
    """The flows of the peers that are here."""
    flows: dict[str, OpenFlow] = {}
    if "faststream" in found:
        flows["FastStream, JetStream"] = partial(faststream, python=python)
    if "ray" in found:
        flows["Ray core"] = partial(ray, python=python)
    if "dramatiq" in found and "redis-server" in found:
        flows["dramatiq, Redis"] = partial(dramatiq, python=python)
    if "celery" in found and "redis-server" in found:
        flows["Celery, Redis"] = partial(celery, python=python)
    return flows


# --- the run ---------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="What the mesh costs, beside its peers.")
    parser.add_argument("--peers", type=Path, default=DEFAULT_PLACE, help=f"their environment; {DEFAULT_PLACE}")
    parser.add_argument("--items", type=int, default=10_000, help="items per throughput measurement")
    parser.add_argument("--reps", type=int, default=3, help="repetitions; the medians count")
    parser.add_argument("--quick", action="store_true", help="1,000 items, once")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    items, reps = (1_000, 1) if options.quick else (options.items, options.reps)
    python = options.peers.absolute() / "bin" / "python"
    found = versions(python)
    for line in missing(found, options.peers):
        sys.stderr.write(line + "\n")
    flows = uvloop.run(repeat({**FLOWS, **peers(found, python)}, items, reps))
    report = Report(items=items, repetitions=reps, cores=os.cpu_count() or 0, versions=found, flows=flows)
    print("\n".join(lines(report.flows)))  # noqa: T201
    print("\n" + ", ".join(f"{name} {version}" for name, version in found.items()))  # noqa: T201
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


if __name__ == "__main__":
    main()
