"""Three NATS servers: copies, drift, and clients that go on when theirs is killed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from computemesh.addresses import with_login
from computemesh.bus import Bucket, Bus, BusError, Entry, Mirror, NotStored, Where, survey
from computemesh.bus.provision import drift, provision, wanted
from computemesh.contracts import storage, work
from computemesh.contracts.base import Role
from computemesh.contracts.storage import Lease
from computemesh.contracts.work import WorkItem
from computemesh.nats_server import Credentials, load_or_create, render_accounts
from computemesh.nats_server.process import find_binary
from computemesh.process import dies_with_parent, end
from computemesh.testing import until
from computemesh.testing.cluster import SIZE, NatsCluster, free_ports, is_whole, leader

EXAMPLE = Path(__file__).parents[2] / "deploy" / "nats" / "nats.conf"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncGenerator[NatsCluster]:
    cluster = NatsCluster(tmp_path, tmp_path / "credentials.json")
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()


@asynccontextmanager
async def connected(url: str, role: Role = Role.SERVICES) -> AsyncGenerator[Bus]:
    bus = Bus(Where(url=url, role=role, name="test"))
    await bus.connect(timeout_s=10)
    try:
        yield bus
    finally:
        await bus.close()


async def provisioned(bus: Bus, *, replicas: int) -> None:
    """As a service does it: again, until the servers have chosen a leader."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await provision(bus, replicas=replicas)
            except BusError:
                await asyncio.sleep(0.1)


async def copies(bus: Bus) -> set[int]:
    """How many there are of each stream and bucket."""
    infos = [await survey.stream(bus, config["name"]) for config in wanted(replicas=SIZE)]
    return {int(info.config["num_replicas"]) for info in infos if info is not None}


async def until_whole(bus: Bus) -> None:
    async with asyncio.timeout(30):
        while not await is_whole(bus):
            await asyncio.sleep(0.05)


async def test_copies_are_added_when_told_and_never_taken_away(cluster: NatsCluster) -> None:
    """What lacks copies is drift; a service that was told of fewer changes nothing."""
    async with connected(cluster.url(Role.SERVICES)) as bus:
        await provisioned(bus, replicas=1)
        assert await copies(bus) == {1}
        assert await drift(bus, replicas=3) == {config["name"]: ["num_replicas"] for config in wanted(replicas=3)}
        leases = Bucket(bus, storage.LEASES)
        revision = await leases.create("kept", Lease(holder="before", epoch=1))
        await provisioned(bus, replicas=3)
        await until_whole(bus)
        assert await copies(bus) == {3}
        await provision(bus, replicas=1)
        assert await copies(bus) == {3}
        assert await drift(bus, replicas=1) == {}
        entry = await leases.get("kept")
        assert entry is not None
        assert (entry.value.holder, entry.revision) == ("before", revision)


async def test_what_was_acknowledged_outlives_the_server_that_acknowledged_it(cluster: NatsCluster) -> None:
    """Clients connect to another server; while it is away nothing that was stored is missing, and more is stored."""
    async with connected(cluster.url(Role.SERVICES)) as bus, connected(cluster.url(Role.CLIENT), Role.CLIENT) as client:
        await provisioned(bus, replicas=3)
        await until_whole(bus)
        leases = Bucket(bus, storage.LEASES)
        mirror = Mirror(bus, storage.LEASES)
        following = asyncio.create_task(mirror.follow())
        seqs = [await client.store(work.SUBMIT, WorkItem(work_id=f"w{n}", work_type="x")) for n in range(100)]
        revisions = {f"k{n}": await leases.create(f"k{n}", Lease(holder="h", epoch=n)) for n in range(100)}
        async with cluster.without(await leader(bus, storage.LEASES.stream)):
            found: dict[str, Entry[Lease]] = {}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(30):
                    while not found:
                        with contextlib.suppress(BusError):
                            found = await leases.load()
            assert {key: entry.revision for key, entry in found.items()} == revisions
            assert await stored_once_more(client) > seqs[-1]
            await until(lambda: mirror.synced.is_set() and len(mirror.entries) == 100, what="the mirror")
            with pytest.raises(BusError):
                await leases.update("k0", Lease(holder="late", epoch=0), last=revisions["k1"])
        await until_whole(bus)
        following.cancel()


async def stored_once_more(client: Bus) -> int:
    """Where another item stands, once the servers take it."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await client.store(work.SUBMIT, WorkItem(work_id="more", work_type="x"), timeout_s=1)
            except NotStored:
                raise
            except BusError:
                await asyncio.sleep(0.05)


# --- the example of deploy/nats --------------------------------------------------------------------------------------


@asynccontextmanager
async def as_deployed(folder: Path, credentials: Credentials) -> AsyncGenerator[str]:
    """Three servers with the configuration of ``deploy/nats``, its hosts and ports aside; their addresses."""
    clients, routes = free_ports(SIZE), free_ports(SIZE)
    processes: list[Process] = []
    try:
        for number in range(SIZE):
            home = folder / f"nats-{number + 1}"
            home.mkdir()
            text = EXAMPLE.read_text().replace("$ROUTE_PASSWORD", "secret-of-the-routes")
            for other, port in enumerate(routes, 1):
                text = text.replace(f"nats-{other}.example:6222", f"127.0.0.1:{port}")
            text = text.replace("port: 4222", f"listen: 127.0.0.1:{clients[number]}")
            text = text.replace("port: 6222", f"listen: 127.0.0.1:{routes[number]}")
            (home / "nats.conf").write_text(text.replace("/var/lib/nats", str(home / "store")))
            (home / "accounts.conf").write_text(render_accounts(credentials))
            command = [str(find_binary()), "--config", str(home / "nats.conf"), "--name", home.name]
            processes.append(
                await asyncio.create_subprocess_exec(
                    *command,
                    stderr=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=dies_with_parent(signal.SIGTERM),
                )
            )
        yield ",".join(f"nats://127.0.0.1:{port}" for port in clients)
    finally:
        for process in processes:
            await end(process, grace_s=10)


async def test_the_example_of_a_cluster_works_as_it_stands(tmp_path: Path) -> None:
    """With the accounts that ``computemesh nats-config`` prints."""
    credentials = load_or_create(tmp_path / "credentials.json")
    async with as_deployed(tmp_path, credentials) as url:
        bus = Bus(Where(url=with_login(url, credentials.login(Role.SERVICES)), role=Role.SERVICES, name="test"))
        await bus.connect()
        try:
            await provisioned(bus, replicas=3)
            await until_whole(bus)
            assert await copies(bus) == {3}
        finally:
            await bus.close()


async def test_a_server_of_the_example_refuses_to_start_without_a_password_for_the_routes(tmp_path: Path) -> None:
    """Nobody runs it by accident with a password that stands in a public file."""
    (tmp_path / "nats.conf").write_text(EXAMPLE.read_text())
    (tmp_path / "accounts.conf").write_text("")
    command = [str(find_binary()), "--config", str(tmp_path / "nats.conf"), "-t"]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    assert process.returncode != 0
    assert b"ROUTE_PASSWORD" in said
