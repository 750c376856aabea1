"""The control plane on the bus: engines and peers kept by two replicas, told of when they change, and what is killed.

Goal: whatever dies, nothing that was confirmed is lost, nothing is told twice or out of order, and who follows the
changes ends with what is stored. Method: two replicas on a real server, with records that live for seconds; questions
as any program asks them; whole processes, the server among them, are killed in the middle of them.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
import msgspec
import pytest
import pytest_asyncio

from computemesh.bus import Bucket, Bus, BusError, MicroService, Mirror, Reply, Writer
from computemesh.bus.provision import drift
from computemesh.contracts import engines, peers, storage
from computemesh.contracts.base import AT_ONCE, Refused, Role, serve
from computemesh.contracts.engines import (
    Changes,
    ChangesGet,
    Engine,
    EngineChange,
    EngineGet,
    EngineHeard,
    EngineHeartbeat,
    EngineRegister,
    EngineRegistered,
    Engines,
    EnginesList,
    EngineUnregister,
    EngineUnregistered,
)
from computemesh.contracts.peer_records import AliasCounter, MemoryRecord
from computemesh.contracts.peers import (
    Closed,
    MemoryDrop,
    MemoryDropped,
    MemoryGet,
    MemoryList,
    MemoryPut,
    MemoryStored,
    Peer,
    PeerAnswered,
    PeerBeat,
    PeerCall,
    PeerCalled,
    PeerChanged,
    PeerGet,
    PeerHeard,
    PeerHeartbeat,
    PeerMemories,
    PeerMemory,
    PeerRegister,
    Peers,
    PeersList,
    PeerUnregister,
    PeerUnregistered,
    Topology,
    TopologyGet,
    TopologyPut,
)
from computemesh.ids import new_id, token_of
from computemesh.testing import RunningMesh, running_mesh, until
from computemesh_services.control_plane import entities
from computemesh_services.control_plane.changes import ChangeLedger
from computemesh_services.control_plane.peer_desk import PeerDesk
from computemesh_services.control_plane.shelf import Shelf

pytestmark = pytest.mark.asyncio(loop_scope="module")

REPLICAS: Final = ("control-plane", "control-plane-2")
TTL_S: Final = 3
T = TypeVar("T")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[RunningMesh]:
    """Two replicas, with records that live for an hour."""
    folder = tmp_path_factory.mktemp("plane")
    told = {"COMPUTEMESH_ENTITY_TTL_S": "3600"}
    async with running_mesh(folder, ["control-plane"], copies={"control-plane": 2}, environment=told) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def brief(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[RunningMesh]:
    """Two replicas, with records that live for seconds."""
    folder = tmp_path_factory.mktemp("brief")
    told = {"COMPUTEMESH_ENTITY_TTL_S": str(TTL_S)}
    async with running_mesh(folder, ["control-plane"], copies={"control-plane": 2}, environment=told) as running:
        yield running


@pytest.fixture
def scope() -> str:
    """One that no other test has."""
    return new_id("s")


async def patiently(asking: Callable[[], Awaitable[T | Refused]]) -> T:
    """The answer, asked for again while it is `unavailable` or nobody answers."""
    async with asyncio.timeout(60):
        while True:
            try:
                answer = await asking()
            except BusError:
                await asyncio.sleep(0.05)
                continue
            if not isinstance(answer, Refused):
                return answer
            assert answer.code == "unavailable", answer
            await asyncio.sleep(0.05)


async def register(bus: Bus, scope: str, engine_id: str = "e1", **facts: Any) -> Engine:
    known: dict[str, Any] = {"role": "decode", "host": "h", "port": 1, **facts}
    said = EngineRegister(scope=scope, engine_id=engine_id, **known)
    answer = await patiently(lambda: bus.ask(engines.REGISTER, said))
    assert isinstance(answer, EngineRegistered)
    return answer.engine


async def listed(bus: Bus, scope: str, **more: Any) -> Engines:
    answer = await patiently(lambda: bus.ask(engines.LIST, EnginesList(scope=scope, **more)))
    assert isinstance(answer, Engines)
    return answer


async def changes(bus: Bus, scope: str, since: int = 0, limit: int = 1000) -> Changes:
    answer = await patiently(lambda: bus.ask(engines.CHANGES, ChangesGet(scope=scope, since=since, limit=limit)))
    assert isinstance(answer, Changes)
    return answer


async def told(bus: Bus, scope: str, count: int, since: int = 0) -> list[EngineChange]:
    """The changes of a scope since a revision, once there are so many."""
    async with asyncio.timeout(30):
        while True:
            found = await changes(bus, scope, since)
            assert not found.reset
            if len(found.changes) >= count:
                return found.changes
            await asyncio.sleep(0.02)


async def every_replica_lists(mesh: RunningMesh, scope: str, wanted: list[str]) -> None:
    """Waits until each one does: a question on the bus is answered by either."""
    async with httpx.AsyncClient() as http, asyncio.timeout(60):
        for name in REPLICAS:
            while await _ids(http, mesh.http(name), scope) != wanted:
                await asyncio.sleep(0.02)


async def _ids(http: httpx.AsyncClient, url: str, scope: str) -> list[str] | None:
    """What a replica lists; None while it is away."""
    try:
        answer = await http.get(f"{url}/v1/engines", params={"scope": scope})
    except httpx.TransportError:
        return None
    return [engine["engine_id"] for engine in answer.json()["engines"]] if answer.status_code == 200 else None


# --- engines -------------------------------------------------------------------------------------------------------


async def test_an_engine_lives_by_its_requests(mesh: RunningMesh, scope: str) -> None:
    """Registered, found, kept, listed and forgotten; a heartbeat of one that is not known says so."""
    bus = await mesh.bus(Role.NODE)
    record = await register(bus, scope, "e1", metadata={"a": 1})
    assert await bus.ask(engines.GET, EngineGet(scope=scope, engine_id="e1")) == record
    assert (await listed(bus, scope)).engines == [record]
    beat = EngineHeartbeat(scope=scope, engine_id="e1")
    assert await bus.ask(engines.HEARTBEAT, beat) == EngineHeard(found=True)
    forget = EngineUnregister(scope=scope, engine_id="e1")
    assert await bus.ask(engines.UNREGISTER, forget) == EngineUnregistered(found=True)
    assert await bus.ask(engines.UNREGISTER, forget) == EngineUnregistered(found=False)
    assert await bus.ask(engines.HEARTBEAT, beat) == EngineHeard(found=False)
    answer = await bus.ask(engines.GET, EngineGet(scope=scope, engine_id="e1"))
    assert isinstance(answer, Refused)
    assert (answer.code, answer.field, answer.status) == ("not_found", "engine_id", 404)


async def test_what_one_replica_stored_the_other_knows_by_name_at_once(mesh: RunningMesh, scope: str) -> None:
    """Each asked directly, in turn."""
    clients = [httpx.AsyncClient(base_url=mesh.http(name)) for name in REPLICAS]
    for number in range(30):
        here, there = clients[number % 2], clients[1 - number % 2]
        name = {"scope": scope, "engine_id": f"e{number}"}
        assert (await here.post("/v1/engines/register", json={**name, "role": "decode"})).status_code == 200
        assert (await there.get("/v1/engines/get", params=name)).status_code == 200
        assert (await there.post("/v1/engines/heartbeat", json=name)).json() == {"found": True}
        assert (await there.post("/v1/engines/unregister", json=name)).json() == {"found": True}
        assert (await here.post("/v1/engines/heartbeat", json=name)).json() == {"found": False}
    for client in clients:
        await client.aclose()


async def test_a_record_that_memory_does_not_have_yet_is_looked_for_in_the_store(mesh: RunningMesh, scope: str) -> None:
    """Before it is said that there is none; here memory never learns of anything."""
    bus = await mesh.bus(Role.SERVICES)
    shelf = Shelf(bus, storage.ENGINES, ttl_s=60)
    await shelf.start()
    record = await register(bus, scope, "e1")
    key = entities.key(record)
    assert shelf.known(key) is None
    assert await shelf.get(key) == record
    other = await register(bus, scope, "e2")
    assert await shelf.move(entities.key(other), lambda known: known) == other
    assert await shelf.remove(entities.key(await register(bus, scope, "e3"))) is not None
    await bus.ask(engines.UNREGISTER, EngineUnregister(scope=scope, engine_id="e1"))
    assert (shelf.known(key), await shelf.move(key, lambda known: known)) == (record, record)
    assert (await shelf.read(key), await shelf.get(key)) == (None, None)
    assert await shelf.remove(key) is None
    await shelf.stop()


async def test_registrations_of_one_engine_at_the_same_time_leave_one_of_them(mesh: RunningMesh, scope: str) -> None:
    """By both replicas; each of them is told, in the order in which they were stored."""
    bus = await mesh.bus()
    records = await asyncio.gather(*(register(bus, scope, "e1", port=port) for port in range(1, 17)))
    final = await bus.ask(engines.GET, EngineGet(scope=scope, engine_id="e1"))
    assert final in records

    async def last() -> Engine | None:
        return (await told(bus, scope, 1))[-1].engine

    async with asyncio.timeout(30):
        while await last() != final:
            await asyncio.sleep(0.02)
    assert [engine.port for engine in (await listed(bus, scope)).engines] == [
        final.port if isinstance(final, Engine) else 0
    ]


# --- changes ---------------------------------------------------------------------------------------------------------


async def test_each_change_is_told_once_in_order_and_can_be_read_again(mesh: RunningMesh, scope: str) -> None:
    """As an event, and as an answer since any revision; a heartbeat is none."""
    bus = await mesh.bus()
    heard: list[EngineChange] = []

    async def on_change(change: EngineChange) -> None:
        heard.append(change)

    await bus.subscribe(engines.CHANGED, on_change, target=token_of(scope))
    await bus.flush()
    before = (await listed(bus, scope)).revision
    await register(bus, scope, "a")
    await told(bus, scope, 1, before)
    await bus.ask(engines.HEARTBEAT, EngineHeartbeat(scope=scope, engine_id="a"))
    await register(bus, scope, "a", port=2)
    await told(bus, scope, 2, before)
    await bus.ask(engines.UNREGISTER, EngineUnregister(scope=scope, engine_id="a"))
    found = await told(bus, scope, 3, before)
    assert [(one.change, one.engine_id, one.engine.port if one.engine else None) for one in found] == [
        ("added", "a", 1),
        ("changed", "a", 2),
        ("removed", "a", None),
    ]
    await until(lambda: heard == found, what="the events")
    assert [one.previous <= one.revision - 1 for one in found] == [True] * 3
    assert [one.previous for one in found[1:]] == [one.revision for one in found[:-1]]
    assert (await changes(bus, scope, found[0].revision)).changes == found[1:]
    assert (await changes(bus, scope, found[-1].revision)).changes == []
    first = await changes(bus, scope, before, limit=2)
    assert (first.changes, first.more, first.revision) == (found[:2], True, found[1].revision)
    assert (await changes(bus, new_id("s"), found[-1].revision)).changes == []


async def test_who_knows_more_than_there_is_is_told_to_list_anew(mesh: RunningMesh, scope: str) -> None:
    """As after the store was lost: its revisions begin anew."""
    bus = await mesh.bus()
    await register(bus, scope, "a")
    await told(bus, scope, 1)
    answer = await changes(bus, scope, 10**9)
    assert (answer.reset, answer.changes) == (True, [])


async def test_changes_that_are_no_longer_kept_make_the_reader_list_anew(mesh: RunningMesh, scope: str) -> None:
    """Of one engine, the last 64 are."""
    bus = await mesh.bus()
    await register(bus, scope, "a")
    since = (await told(bus, scope, 1))[0].revision
    for port in range(2, 72):
        await register(bus, scope, "a", port=port)
        async with asyncio.timeout(30):
            while (await listed(bus, scope)).revision == since + port - 2:
                await asyncio.sleep(0.005)
    async with asyncio.timeout(30):
        while not (await changes(bus, scope, since)).reset:
            await asyncio.sleep(0.02)
    revision = (await listed(bus, scope)).revision
    assert not (await changes(bus, scope, revision)).reset


async def test_a_change_that_cannot_be_read_ends_no_replica(mesh: RunningMesh, scope: str) -> None:
    """Who asks for what changed hears of the others, however often."""
    bus, pids = await mesh.bus(), [mesh.pid(name) for name in REPLICAS]
    await register(bus, scope, "a")
    first = (await told(bus, scope, 1))[-1].revision
    services = await mesh.bus(Role.SERVICES)
    await services.call(storage.ENGINE_CHANGES.subject(f"{token_of(scope)}.engine/b"), b'{"no": "change"}')
    await register(bus, scope, "c")
    for _ in range(50):  # Either replica answers some of them.
        assert [one.engine_id for one in await told(bus, scope, 1, first)] == ["c"]
    assert [mesh.pid(name) for name in REPLICAS] == pids


async def test_an_engine_of_which_nothing_is_heard_goes_and_that_is_told(brief: RunningMesh, scope: str) -> None:
    """One that sends heartbeats stays. NanoCtrl lets the first go without a word."""
    bus = await brief.bus()
    await register(bus, scope, "dumb")
    await register(bus, scope, "alive")
    beating = asyncio.create_task(_beat(bus, scope, "alive"))
    try:
        found = await told(bus, scope, 3)
        assert [(one.change, one.engine_id) for one in found[2:]] == [("expired", "dumb")]
        await every_replica_lists(brief, scope, ["alive"])
        beat = EngineHeartbeat(scope=scope, engine_id="dumb")
        assert await bus.ask(engines.HEARTBEAT, beat) == EngineHeard(found=False)
        await register(bus, scope, "dumb")
        assert (await told(bus, scope, 4))[3].change == "added"
    finally:
        beating.cancel()


async def _beat(bus: Bus, scope: str, engine_id: str) -> None:
    while True:
        await patiently(lambda: bus.ask(engines.HEARTBEAT, EngineHeartbeat(scope=scope, engine_id=engine_id)))
        await asyncio.sleep(0.3)


class Follower:
    """Keeps a copy of a scope by its changes alone."""

    def __init__(self, bus: Bus, scope: str) -> None:
        self._bus = bus
        self._scope = scope
        self.engines: dict[str, Engine] = {}
        self.revision = 0
        self.kinds: list[tuple[str, str]] = []
        self.resets = 0

    async def step(self) -> None:
        found = await changes(self._bus, self._scope, self.revision, limit=7)
        if found.reset:
            self.resets += 1
            page = await listed(self._bus, self._scope)
            self.engines = {engine.engine_id: engine for engine in page.engines}
            self.revision = page.revision
            return
        for change in found.changes:
            assert change.revision > self.revision
            assert change.previous <= self.revision
            self.revision = change.revision
            self.kinds.append((change.change, change.engine_id))
            if change.engine is None:
                self.engines.pop(change.engine_id, None)
            else:
                self.engines[change.engine_id] = change.engine


async def test_who_follows_the_changes_ends_with_what_is_stored_whoever_is_killed(tmp_path: Path) -> None:
    """Replicas are killed one after the other, and the server, while engines come and go; each change is told once."""
    told_ttl = {"COMPUTEMESH_ENTITY_TTL_S": "3600"}
    async with running_mesh(tmp_path, ["control-plane"], copies={"control-plane": 2}, environment=told_ttl) as mesh:
        bus, scope = await mesh.bus(), "s"
        follower = Follower(bus, scope)
        chance = random.Random(7)  # a story that can be told again
        done = asyncio.Event()

        async def follow() -> None:
            while not done.is_set():
                await follower.step()
                await asyncio.sleep(0.01)

        following = asyncio.create_task(follow())
        stored: dict[str, Engine] = {}
        for number in range(240):
            name = f"e{chance.randrange(12)}"
            if name in stored and chance.random() < 0.4:
                gone = EngineUnregister(scope=scope, engine_id=name)
                await patiently(lambda gone=gone: bus.ask(engines.UNREGISTER, gone))  # type: ignore[misc]
                del stored[name]
            else:
                await register(bus, scope, name, port=number + 1)
                found = await patiently(lambda name=name: bus.ask(engines.GET, EngineGet(scope=scope, engine_id=name)))  # type: ignore[misc]
                assert isinstance(found, Engine)
                assert found.port == number + 1
                stored[name] = found
            if number in (40, 80, 160, 200):
                mesh.kill(REPLICAS[(number // 40) % 2])
            elif number == 120:
                mesh.kill("nats-server")
        names = sorted(stored)
        await every_replica_lists(mesh, scope, names)
        async with asyncio.timeout(30):
            while follower.engines != stored:
                await asyncio.sleep(0.02)
        done.set()
        await following
        assert follower.resets == 0
        for name in {name for _, name in follower.kinds}:
            story = [kind for kind, who in follower.kinds if who == name]
            assert all(a != b or a == "changed" for a, b in itertools.pairwise(story)), story
        assert {engine.engine_id: engine for engine in (await listed(bus, scope)).engines} == stored


async def test_records_revisions_and_numbers_outlive_the_server(mesh: RunningMesh, scope: str) -> None:
    """With NanoCtrl's Redis they are gone, and begin anew."""
    bus = await mesh.bus()
    record = await register(bus, scope, "a")
    before = (await told(bus, scope, 1))[-1].revision
    assert (await join(await mesh.bus(Role.NODE), scope, None)).alias == "agent-1"
    pid = mesh.pid("nats-server")
    mesh.kill("nats-server")
    await until(lambda: mesh.pid("nats-server") not in (0, pid), what="the server is back")
    assert (await listed(bus, scope)).engines == [record]
    await register(bus, scope, "b")
    after = await told(bus, scope, 1, before)
    assert [(one.change, one.engine_id, one.previous) for one in after] == [("added", "b", before)]
    assert (await join(await mesh.bus(Role.NODE), scope, None, "i2")).alias == "agent-2"


async def test_while_the_bus_is_away_a_caller_is_told_so(tmp_path: Path) -> None:
    """NanoCtrl's door says that it runs while its Redis is away. What was known is listed from memory for as long as a
    record lives, and then no longer."""
    told_ttl = {"COMPUTEMESH_ENTITY_TTL_S": "6"}
    async with running_mesh(tmp_path, ["control-plane"], environment=told_ttl) as mesh:
        await register(await mesh.bus(), "s", "a")
        async with httpx.AsyncClient(base_url=mesh.http("control-plane"), timeout=60) as http:

            async def refused(path: str, **fields: Any) -> float:
                """How long it took to say that the bus is away, in seconds."""
                asked_s = time.monotonic()
                answer = await http.post(path, json={"scope": "s", "engine_id": "a", **fields})
                assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
                return time.monotonic() - asked_s

            async def statuses(path: str, wanted: int) -> httpx.Response:
                async with asyncio.timeout(60):
                    while (answer := await _asked(http, path)).status_code != wanted:
                        await asyncio.sleep(0.05)
                return answer

            async def unknown(path: str, **fields: Any) -> None:
                """What nobody here remembers is looked for in the store, and not for longer than NanoCtrl's clients
                wait."""
                asked_s = time.monotonic()
                answer = await http.post(path, json={"scope": "s", **fields})
                said = answer.json()
                assert (answer.status_code, said["code"]) == (503, "unavailable")
                assert "store did not answer" in said["message"]
                assert "$" not in said["message"]
                assert time.monotonic() - asked_s < 5.0

            mesh.kill("nats-server", signal.SIGSTOP)
            try:
                await asyncio.gather(
                    unknown("/get_engine_info", engine_id="other"),
                    unknown("/get_entity_info", entity_id="other"),
                    unknown("/unregister_engine", engine_id="other"),
                    unknown("/get_mr_info", dst="other", mr_name="kv"),
                )
                door = await statuses("/", 503)
                assert "NanoCtrl Server Running" not in door.text
                listing = await _asked(http, "/list_engines")
                assert [one["id"] for one in listing.json()["engines"]] == ["a"]
                refusal = await statuses("/list_engines", 503)
                assert (refusal.json()["status"], refusal.json()["code"]) == ("error", "unavailable")
                assert refusal.headers["retry-after"]
                beat = await http.post("/heartbeat_engine", json={"scope": "s", "engine_id": "other"})
                assert (beat.status_code, beat.json()["code"]) == (503, "unavailable")
                facts = {"role": "decode", "world_size": 1, "num_blocks": 1, "host": "h", "port": 1}
                took_s = await asyncio.gather(refused("/heartbeat_engine"), refused("/register_engine", **facts))
                assert max(took_s) < 20, "what is known already waits for as long as the bus is away"
            finally:
                mesh.kill("nats-server", signal.SIGCONT)
            await statuses("/", 200)
            await statuses("/list_engines", 200)


async def _asked(http: httpx.AsyncClient, path: str) -> httpx.Response:
    return await (http.get(path) if path == "/" else http.post(path, json={"scope": "s"}))


async def test_a_replica_that_ends_hands_over_and_nothing_is_told_twice(mesh: RunningMesh, scope: str) -> None:
    """The one that acts is told to end, in the middle of registrations."""
    bus = await mesh.bus()
    since = (await listed(bus, scope)).revision
    holder = await mesh.holder("control-plane")
    sending = [asyncio.create_task(register(bus, scope, f"e{number:02}")) for number in range(50)]
    mesh.kill(holder, signal.SIGTERM)
    await asyncio.gather(*sending)
    found = await told(bus, scope, 50, since)
    assert sorted(one.engine_id for one in found) == [f"e{number:02}" for number in range(50)]
    assert {one.change for one in found} == {"added"}
    await every_replica_lists(mesh, scope, [f"e{number:02}" for number in range(50)])


async def test_a_replica_that_wakes_up_after_another_took_over_tells_nothing_twice(
    mesh: RunningMesh, scope: str
) -> None:
    """It still thinks that it acts: what it would tell has a place that is taken."""
    bus = await mesh.bus()
    since = (await listed(bus, scope)).revision
    holder = await mesh.holder("control-plane")
    assert holder
    other = next(name for name in REPLICAS if name != holder)
    mesh.kill(holder, signal.SIGSTOP)
    try:
        async with httpx.AsyncClient(base_url=mesh.http(other), timeout=30) as http, asyncio.timeout(60):
            body = {"scope": scope, "role": "decode"}
            for number in range(10):
                said = {**body, "engine_id": f"e{number}"}
                assert (await http.post("/v1/engines/register", json=said)).status_code == 200
            asked: dict[str, str | int] = {"scope": scope, "since": since}
            while len((await http.get("/v1/engines/changes", params=asked)).json()["changes"]) < 10:
                await asyncio.sleep(0.05)
            assert await mesh.holder("control-plane") == other
    finally:
        mesh.kill(holder, signal.SIGCONT)
    for number in range(10, 20):
        await register(bus, scope, f"e{number}")
    found = await told(bus, scope, 20, since)
    assert [(one.change, one.engine_id) for one in found] == [("added", f"e{number}") for number in range(20)]
    assert [one.previous for one in found[1:]] == [one.revision for one in found[:-1]]
    await every_replica_lists(mesh, scope, sorted(f"e{number}" for number in range(20)))


async def test_pages_of_a_large_scope_have_each_engine_once(mesh: RunningMesh, scope: str) -> None:
    bus = await mesh.bus()
    await asyncio.gather(*(register(bus, scope, f"e{number:03}", metadata="x" * 3000) for number in range(500)))
    found: list[str] = []
    page = await listed(bus, scope)
    assert page.next
    while True:
        found += [engine.engine_id for engine in page.engines]
        if not page.next:
            break
        page = await listed(bus, scope, after=page.next)
    assert found == [f"e{number:03}" for number in range(500)]


async def test_the_store_is_as_it_is_declared(mesh: RunningMesh) -> None:
    """The ledger's history and what it publishes, too."""
    assert await drift(await mesh.bus(Role.SERVICES)) == {}


# --- peers -----------------------------------------------------------------------------------------------------------


async def join(bus: Bus, scope: str, alias: str | None = "a", instance: str = "i1", **said: Any) -> Peer:
    answer = await patiently(
        lambda: bus.ask(peers.REGISTER, PeerRegister(scope=scope, alias=alias, instance=instance, **said))
    )
    assert isinstance(answer, Peer)
    return answer


async def put(bus: Bus, scope: str, name: str = "kv", epoch: int = 1, instance: str = "i1") -> MemoryStored | Refused:
    said = MemoryPut(scope=scope, alias="a", instance=instance, name=name, length=8, epoch=epoch, transports=["tcp"])
    return await bus.ask(peers.MEMORY_PUT, said)


class Heard:
    """The changes of peers of one scope, as events."""

    def __init__(self, scope: str) -> None:
        self._scope = scope
        self.changes: list[tuple[str, str]] = []

    async def __call__(self, change: PeerChanged) -> None:
        if change.scope == self._scope:
            self.changes.append((change.change, change.alias))


async def test_a_peer_lives_by_its_requests_and_each_change_is_told(mesh: RunningMesh, scope: str) -> None:
    bus, heard = await mesh.bus(Role.NODE), Heard(scope)
    await bus.subscribe(peers.CHANGED, heard)
    await bus.flush()
    peer = await join(bus, scope, node_id="n1", device="mlx5_0")
    assert (await join(bus, scope, node_id="n1", device="mlx5_0")).revision == peer.revision
    moved = await join(bus, scope, node_id="n1", device="mlx5_1")
    assert moved.revision > peer.revision
    beat = PeerBeat(scope=scope, alias="a", instance="i1")
    others = [PeerBeat(scope=scope, alias="a", instance="i2"), PeerBeat(scope=scope, alias="b", instance="i1")]
    assert await bus.ask(peers.HEARTBEAT, PeerHeartbeat(peers=[others[0], beat, others[1]])) == PeerHeard(
        missing=others
    )
    stored = await put(bus, scope)
    assert isinstance(stored, MemoryStored)
    got = await bus.ask(peers.GET, PeerGet(scope=scope, alias="a"))
    assert isinstance(got, Peer)
    assert (got.memory_keys, got.revision) == (["kv"], stored.revision)
    topology = await bus.ask(
        peers.TOPOLOGY_PUT, TopologyPut(scope=scope, alias="a", target_peers=["b"], symmetric=True)
    )
    assert isinstance(topology, Topology)
    assert topology.revision > stored.revision
    other = await bus.ask(peers.TOPOLOGY_GET, TopologyGet(scope=scope, alias="b"))
    assert isinstance(other, Topology)
    assert other.target_peers == ["a"]
    gone = PeerUnregister(scope=scope, alias="a", instance="i1")
    assert await bus.ask(peers.UNREGISTER, gone) == PeerUnregistered(found=True)
    assert await bus.ask(peers.UNREGISTER, gone) == PeerUnregistered(found=False)
    wanted = [("added", "a"), ("changed", "a"), ("memory", "a"), ("topology", "a"), ("topology", "b")]
    wanted += [("topology", "b"), ("removed", "a")]
    await until(lambda: heard.changes == wanted, what=f"{wanted}")
    asked: list[tuple[Any, Any]] = [
        (peers.GET, PeerGet(scope=scope, alias="a")),
        (peers.MEMORY_GET, MemoryGet(scope=scope, alias="a", name="kv")),
        (peers.MEMORY_LIST, MemoryList(scope=scope, alias="a")),
    ]
    for request, question in asked:
        answer: Any = await bus.ask(request, question)
        assert isinstance(answer, Refused)
        assert answer.status == 404


async def test_an_alias_is_its_instances_own(mesh: RunningMesh, scope: str) -> None:
    """Another one can't take it, drop it, offer memory in its name or speak for it; the same one may come again."""
    bus = await mesh.bus(Role.NODE)
    await join(bus, scope)
    asked: list[tuple[Any, Any]] = [
        (peers.REGISTER, PeerRegister(scope=scope, alias="a", instance="i2")),
        (peers.UNREGISTER, PeerUnregister(scope=scope, alias="a", instance="i2")),
        (peers.MEMORY_DROP, MemoryDrop(scope=scope, alias="a", instance="i2", name="kv", epoch=1)),
        (peers.CALL, PeerCall(scope=scope, alias="a", instance="i2", peer="b", body=peers.Close(link="l"))),
    ]
    codes: list[tuple[str, int]] = []
    for request, question in asked:
        answer = await bus.ask(request, question)
        assert isinstance(answer, Refused)
        codes.append((answer.code, answer.status))
    assert codes == [("alias_taken", 409), ("not_yours", 409), ("not_yours", 409), ("not_yours", 409)]
    assert isinstance(await put(bus, scope, instance="i2"), Refused)
    await join(bus, scope)


async def test_memory_of_a_peer_has_its_newest_epoch(mesh: RunningMesh, scope: str) -> None:
    """Whatever comes late changes nothing."""
    bus = await mesh.bus(Role.NODE)
    await join(bus, scope)
    for epoch in (3, 2):
        assert isinstance(await put(bus, scope, epoch=epoch), MemoryStored)
    found = await bus.ask(peers.MEMORY_GET, MemoryGet(scope=scope, alias="a", name="kv"))
    assert isinstance(found, PeerMemory)
    assert (found.epoch, found.transports) == (3, ["tcp"])
    late = MemoryDrop(scope=scope, alias="a", instance="i1", name="kv", epoch=2)
    assert await bus.ask(peers.MEMORY_DROP, late) == MemoryDropped(found=False)
    await put(bus, scope, "b")
    listing = await bus.ask(peers.MEMORY_LIST, MemoryList(scope=scope, alias="a"))
    assert isinstance(listing, PeerMemories)
    assert [memory.name for memory in listing.memories] == ["b", "kv"]
    now = MemoryDrop(scope=scope, alias="a", instance="i1", name="kv", epoch=3)
    assert await bus.ask(peers.MEMORY_DROP, now) == MemoryDropped(found=True)
    assert isinstance(await bus.ask(peers.MEMORY_GET, MemoryGet(scope=scope, alias="a", name="kv")), Refused)


async def test_peers_are_listed_in_pages_by_alias(mesh: RunningMesh, scope: str) -> None:
    bus = await mesh.bus(Role.NODE)
    await asyncio.gather(*(join(bus, scope, f"p{number}", f"i{number}") for number in range(5)))
    async with asyncio.timeout(30):
        while len(found := await _aliases(bus, scope, limit=2)) < 5:
            await asyncio.sleep(0.02)
    assert found == [f"p{number}" for number in range(5)]
    assert await _aliases(bus, new_id("s")) == []


async def _aliases(bus: Bus, scope: str, limit: int = 1000) -> list[str]:
    found: list[str] = []
    after = ""
    while True:
        page = await bus.ask(peers.LIST, PeersList(scope=scope, after=after, limit=limit))
        assert isinstance(page, Peers)
        found += [peer.alias for peer in page.peers]
        if not page.next:
            return found
        after = page.next


async def test_aliases_that_are_found_are_never_given_twice(mesh: RunningMesh, scope: str) -> None:
    """Not by two replicas at once, nor after a peer has gone."""
    bus = await mesh.bus(Role.NODE)
    found = await asyncio.gather(*(join(bus, scope, None, f"i{number}") for number in range(20)))
    assert len({peer.alias for peer in found}) == 20
    gone = PeerUnregister(scope=scope, alias=found[0].alias, instance="i0")
    assert await bus.ask(peers.UNREGISTER, gone) == PeerUnregistered(found=True)
    assert (await join(bus, scope, None, "i0")).alias not in {peer.alias for peer in found}
    counter = await Bucket(await mesh.bus(Role.SERVICES), storage.PEERS).read_other(f"{scope}.numbers", AliasCounter)
    assert counter is not None
    assert counter.value.last == 21


async def test_who_did_not_hear_which_alias_was_found_for_it_gets_that_one_again(mesh: RunningMesh, scope: str) -> None:
    """Its peer-agent asks again when no answer came."""
    bus = await mesh.bus(Role.NODE)
    found = await join(bus, scope, None, "i1")
    async with asyncio.timeout(30):
        while await _aliases(bus, scope) != [found.alias]:
            await asyncio.sleep(0.02)
    again = [await join(bus, scope, None, "i1") for _ in range(6)]  # Some ask the replica that did not store it.
    assert {peer.alias for peer in again} == {found.alias}


async def test_a_registration_whose_acknowledgement_is_lost_is_made_once(
    mesh: RunningMesh, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NanoCtrl's clients cannot show who they are: what they stored looks like somebody else's."""
    bus = await mesh.bus(Role.SERVICES)
    desk = PeerDesk(bus, ChangeLedger(bus, Mirror(bus, storage.ENGINES), "test"), 60)
    on_reply: Any = vars(Writer)["_on_reply"]
    lost: list[str] = []

    async def lose_the_first(*about: Any) -> None:
        if lost:
            await on_reply(*about)
        else:
            lost.append(about[1])
            await on_reply(*about[:-1], Reply(b"", timed_out=True))

    monkeypatch.setattr(Writer, "_on_reply", lose_the_first)
    tasks: list[asyncio.Task[None]] = []
    await desk.start(lambda coroutine: tasks.append(asyncio.create_task(coroutine)))
    try:
        peer = await desk.register(PeerRegister(scope=scope, instance="unknown"), None)
        assert isinstance(peer, Peer)
        assert (lost, peer.alias) == ([f"{token_of(scope)}/agent-1"], "agent-1")
        assert isinstance(await desk.register(PeerRegister(scope=scope, alias="agent-1", instance="i"), None), Refused)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await desk.drain()


async def test_what_is_written_while_its_removal_is_considered_stays(mesh: RunningMesh, scope: str) -> None:
    """A peer that was taken for gone registers and offers its memory again at that moment."""
    bus, key = await mesh.bus(Role.SERVICES), f"{token_of(scope)}/a"
    shelf = Shelf(bus, storage.MEMORY)
    await shelf.start()

    def record(revision: int) -> MemoryRecord:
        return MemoryRecord(scope=scope, alias="a", instance="i1", entries={}, revision=revision, at=time.time())

    asked: list[int] = []

    async def still() -> bool:
        asked.append(1)
        if len(asked) == 1:
            await shelf.bucket.update(key, record(2), last=(await shelf.bucket.read(key))[1])
        return len(asked) == 1

    try:
        assert await shelf.move(key, lambda _: record(1)) is not None
        assert await shelf.remove(key, still=still) is None
        stands = await shelf.bucket.get(key)
        assert stands is not None
        assert (len(asked), stands.value.revision) == (2, 2)
    finally:
        await shelf.remove(key)
        await shelf.stop()


async def test_a_store_without_room_says_that_it_is_full(mesh: RunningMesh, scope: str) -> None:
    """On the bus and at NanoCtrl's door; when there is room again it goes on."""
    bus = await mesh.bus(Role.SERVICES)
    stream = storage.ENGINES.stream
    reply = msgspec.json.decode((await bus.call(f"$JS.API.STREAM.INFO.{stream}", b"")).data)

    async def limit(**changed: int) -> None:
        body = msgspec.json.encode(reply["config"] | changed)
        assert "error" not in msgspec.json.decode((await bus.call(f"$JS.API.STREAM.UPDATE.{stream}", body)).data)

    await limit(max_bytes=reply["state"]["bytes"] + 10)
    try:
        answer = await bus.ask(engines.REGISTER, EngineRegister(scope=scope, engine_id="a", role="decode"))
        assert isinstance(answer, Refused)
        assert (answer.code, answer.status, answer.retry) == ("full", 503, "later")
        async with httpx.AsyncClient(base_url=mesh.http("control-plane")) as http:
            facts = {"role": "decode", "world_size": 1, "num_blocks": 1, "host": "h", "port": 1}
            said = await http.post("/register_engine", json={"scope": scope, "engine_id": "a", **facts})
            assert (said.status_code, said.json()["code"]) == (503, "full")
    finally:
        await limit()
    await register(bus, scope, "a")


async def test_what_the_server_forgot_to_end_ends(brief: RunningMesh, scope: str) -> None:
    """One that was killed may bring expired records back without their time. They expire all the same, and no name
    stays taken."""
    services, bus, heard = await brief.bus(Role.SERVICES), await brief.bus(Role.NODE), Heard(scope)
    await bus.subscribe(peers.CHANGED, heard)
    await bus.flush()
    engine = await register(bus, scope, "e")
    await join(bus, scope)
    kinds: list[tuple[storage.Bucket[Any], str]] = [
        (storage.ENGINES, entities.key(engine)),
        (storage.PEERS, f"{token_of(scope)}/a"),
    ]
    for spec, key in kinds:
        bucket = Bucket(services, spec)
        entry = await bucket.get(key)
        assert entry is not None
        await bucket.update(key, entry.value, last=entry.revision)
    await until(lambda: ("expired", "a") in heard.changes, what="the peer is gone")
    async with asyncio.timeout(30):
        while (await changes(bus, scope)).changes[-1].change != "expired":
            await asyncio.sleep(0.1)
    assert (await join(bus, scope, instance="i2")).alias == "a"


async def test_a_peer_of_which_nothing_is_heard_goes_with_all_that_is_its(brief: RunningMesh, scope: str) -> None:
    """Its memory, its topology and what that said of others; NanoCtrl keeps these for ever."""
    bus, heard = await brief.bus(Role.NODE), Heard(scope)
    await bus.subscribe(peers.CHANGED, heard)
    await bus.flush()
    await join(bus, scope)
    await put(bus, scope)
    await bus.ask(peers.TOPOLOGY_PUT, TopologyPut(scope=scope, alias="a", target_peers=["b"], symmetric=True))
    await until(lambda: ("expired", "a") in heard.changes, what="it is told")
    other = await bus.ask(peers.TOPOLOGY_GET, TopologyGet(scope=scope, alias="b"))
    assert isinstance(other, Topology)
    assert other.target_peers == []
    services = await brief.bus(Role.SERVICES)
    key = f"{token_of(scope)}/a"
    buckets: list[storage.Bucket[Any]] = [storage.PEERS, storage.MEMORY, storage.TOPOLOGY]
    for bucket in buckets:
        assert await Bucket(services, bucket).get(key) is None


async def test_memory_of_an_agent_that_never_comes_goes_after_a_while(brief: RunningMesh, scope: str) -> None:
    """NanoCtrl takes memory of agents that it does not know, and keeps it for ever."""
    async with httpx.AsyncClient(base_url=brief.http("control-plane")) as http:
        body = {"scope": scope, "agent_name": "a", "mr_name": "kv", "addr": 1, "length": 2, "rkey": 3}
        assert (await http.post("/register_mr", json=body)).status_code == 200
        ask = {"scope": scope, "src": "x", "dst": "a", "mr_name": "kv"}
        async with asyncio.timeout(30):
            while (await http.post("/get_mr_info", json=ask)).json()["mr_info"] is not None:
                await asyncio.sleep(0.1)


async def test_what_a_peer_says_reaches_the_peer_agent_of_the_other_node(mesh: RunningMesh, scope: str) -> None:
    """With who says it and where that one is, which it cannot make up."""
    bus, far = await mesh.bus(Role.NODE), await mesh.bus(Role.NODE, "far")
    heard: list[PeerCalled] = []

    async def on_called(called: PeerCalled) -> PeerAnswered | Refused:
        heard.append(called)
        if called.peer == "c":
            return Refused(code="no_link", reason="there is no such link", status=404)
        return PeerAnswered(body=Closed(found=True))

    agent = MicroService(far, name="peer-agent", description="of a test", metadata={})
    await agent.start([serve(peers.ANSWER, on_called, target="far")])
    await far.flush()
    await join(bus, scope, node_id="n1")
    for alias in ("b", "c"):
        await join(bus, scope, alias, node_id="far")
    await join(bus, scope, "nowhere", node_id="nobody")
    await join(bus, scope, "alone")

    async def say(peer: str) -> PeerAnswered | Refused:
        body = peers.Close(link="l-1", reason="bye")
        return await bus.ask(peers.CALL, PeerCall(scope=scope, alias="a", instance="i1", peer=peer, body=body))

    assert await say("b") == PeerAnswered(body=Closed(found=True))
    said = PeerCalled(scope=scope, alias="a", node_id="n1", peer="b", body=peers.Close(link="l-1", reason="bye"))
    assert heard == [said]
    answers = [await say(peer) for peer in ("c", "nowhere", "alone", "unknown")]
    codes = [(answer.code, answer.status) for answer in answers if isinstance(answer, Refused)]
    assert codes == [("no_link", 404), ("unavailable", 503), ("no_way", 409), ("not_found", 404)]
    await agent.drain()


async def test_a_node_that_does_not_answer_keeps_no_other_waiting(mesh: RunningMesh, scope: str) -> None:
    """However many wait for the one that hangs; those above a bound are told to come back."""
    bus, far = await mesh.bus(Role.NODE), await mesh.bus(Role.NODE, "far")
    stuck, held = asyncio.Event(), list[PeerCalled]()

    async def on_called(called: PeerCalled) -> PeerAnswered | Refused:
        if called.peer == "hung":
            held.append(called)
            await stuck.wait()
        return PeerAnswered(body=Closed(found=True))

    hung = await mesh.bus(Role.NODE, "hung")
    agents = list[MicroService]()
    for there, target in ((far, "far"), (hung, "hung")):
        agent = MicroService(there, name="peer-agent", description="of a test", metadata={})
        await agent.start([serve(peers.ANSWER, on_called, target=target)])
        await there.flush()
        agents.append(agent)
    await join(bus, scope, node_id="n1")
    await join(bus, scope, "b", node_id="far")
    await join(bus, scope, "hung", node_id="hung")

    async def say(peer: str) -> PeerAnswered | Refused:
        body = peers.Close(link="l-1", reason="bye")
        said = PeerCall(scope=scope, alias="a", instance="i1", peer=peer, body=body)
        return await bus.ask(peers.CALL, said, timeout_s=30 if peer == "hung" else 2)

    waiting = [asyncio.create_task(say("hung")) for _ in range(600)]
    await until(lambda: len(held) == AT_ONCE, what="calls that hang")
    assert await say("b") == PeerAnswered(body=Closed(found=True))
    stuck.set()
    answers = await asyncio.gather(*waiting)
    refusals = [answer for answer in answers if isinstance(answer, Refused)]
    assert any(one.reason.startswith("256 calls wait") for one in refusals), "two replicas keep 512 waiting"
    assert {(one.code, one.status, one.retry) for one in refusals} == {("unavailable", 503, "later")}
    for agent in agents:
        await agent.drain()


def nested(levels: int) -> dict[str, Any]:
    deep: dict[str, Any] = {}
    for _ in range(levels - 1):
        deep = {"a": deep}
    return deep


async def test_what_is_nested_as_deep_as_may_be_is_in_every_answer_and_event(mesh: RunningMesh, scope: str) -> None:
    """What is nested deeper is refused, by its field: no reader would take the whole list that holds it."""
    bus, node = await mesh.bus(), await mesh.bus(Role.NODE)
    events: list[EngineChange] = []

    async def on_change(change: EngineChange) -> None:
        events.append(change)

    subscription = await bus.subscribe(engines.CHANGED, on_change, target=token_of(scope))
    await bus.flush()
    for field in ("endpoint", "metadata", "resource"):
        facts: dict[str, Any] = {"role": "decode", field: nested(61)}
        refusal = await bus.ask(engines.REGISTER, EngineRegister(scope=scope, engine_id="deeper", **facts))
        assert isinstance(refusal, Refused)
        assert (refusal.code, refusal.field) == ("bad_message", field)
        await register(bus, scope, field, **{field: nested(60)})
    assert [one.engine_id for one in (await listed(bus, scope)).engines] == ["endpoint", "metadata", "resource"]
    assert len(await told(bus, scope, 3)) == 3
    await until(lambda: len(events) == 3, what="three events")
    await bus.forget(subscription)

    peer = PeerRegister(scope=scope, alias="deeper", instance="i1", resource=nested(61))
    refused = await node.ask(peers.REGISTER, peer)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.field) == ("bad_message", "resource")
    await join(node, scope, resource=nested(60))
    found = await bus.ask(peers.LIST, PeersList(scope=scope))
    assert isinstance(found, Peers)
    assert [one.alias for one in found.peers] == ["a"]
