"""Objects: what is too large for a message, put and got part by part through any marshaller, on a real store."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncGenerator
from pathlib import Path

import nats
import pytest
import pytest_asyncio

from computemesh import objects as client
from computemesh.bus import Bus, ObjectStore
from computemesh.bus.provision import drift
from computemesh.contracts import objects, storage
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.objects import OBJECT_BYTES_MAX, PART_BYTES, ObjectGet, ObjectPart, ObjectPut, ObjectStored
from computemesh.contracts.work import ObjectRef
from computemesh.objects import ObjectError
from computemesh.testing import RunningMesh, running_mesh
from computemesh_services.work_marshaller import retention
from computemesh_services.work_marshaller.retention import drop_objects

# pyright: reportUnknownMemberType=false

pytestmark = pytest.mark.asyncio(loop_scope="module")

BIG = random.Random(7).randbytes(3 * PART_BYTES + 1234)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[RunningMesh]:
    """Two marshallers, one of which stands by."""
    folder: Path = tmp_path_factory.mktemp("objects")
    async with running_mesh(folder, ("work-marshaller", "node-registry"), copies={"work-marshaller": 2}) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def bus(mesh: RunningMesh) -> Bus:
    return await mesh.bus(Role.CLIENT)


def refused(answer: object) -> str:
    assert isinstance(answer, Refused), answer
    return answer.code


async def test_what_was_put_is_got_and_any_nats_library_reads_it(mesh: RunningMesh, bus: Bus) -> None:
    """Through two replicas that share nothing but the store; nats-py's object store gives the same bytes."""
    seen: list[tuple[int, int]] = []
    ref = await client.upload(client.put_on(bus), BIG, on_progress=lambda done, of: seen.append((done, of)))
    assert (ref.size, ref.sha256) == (len(BIG), hashlib.sha256(BIG).hexdigest())
    assert seen[-1] == (len(BIG), len(BIG))
    assert await client.download(client.get_on(bus), ref) == BIG
    nc = await nats.connect(mesh.url(Role.SERVICES), inbox_prefix=b"_INBOX_services")
    store = await nc.jetstream().object_store(storage.OBJECTS.name)
    assert (await store.get(ref.object_id)).data == BIG
    await nc.close()


async def test_an_empty_object_is_an_object(bus: Bus) -> None:
    ref = await client.upload(client.put_on(bus), b"")
    assert await client.download(client.get_on(bus), ref) == b""


async def test_any_byte_is_where_the_next_answer_may_begin(bus: Bus) -> None:
    """Also one in the middle of a part, the last, and one far behind the end, which is answered with nothing."""
    ref = await client.upload(client.put_on(bus), BIG)
    for offset in (0, 1, PART_BYTES - 1, PART_BYTES, 2 * PART_BYTES + 77, len(BIG) - 1, len(BIG), 2**50):
        answer = await bus.ask(objects.GET, ObjectGet(object_id=ref.object_id, offset=offset))
        assert isinstance(answer, ObjectPart)
        end = min(len(BIG), (offset // PART_BYTES + 1) * PART_BYTES)
        assert answer.data == BIG[offset:end]
        assert (answer.size, answer.sha256) == (ref.size, ref.sha256)


async def put(bus: Bus, object_id: str, offset: int, data: bytes, sha256: str = "") -> ObjectStored | Refused:
    return await bus.ask(objects.PUT, ObjectPut(object_id=object_id, offset=offset, data=data, sha256=sha256))


async def test_a_part_may_come_twice_and_not_too_early(bus: Bus) -> None:
    first, second, third = BIG[:PART_BYTES], BIG[PART_BYTES : 2 * PART_BYTES], b"end"
    digest = hashlib.sha256(first + second + third).hexdigest()
    assert refused(await put(bus, "parts", PART_BYTES, second)) == "out_of_order"
    for _ in range(2):
        stored = await put(bus, "parts", 0, first)
        assert stored == ObjectStored(object_id="parts", size=PART_BYTES)
    assert refused(await put(bus, "parts", 2 * PART_BYTES, third, digest)) == "out_of_order"
    assert refused(await bus.ask(objects.GET, ObjectGet(object_id="parts"))) == "not_found"
    for _ in range(2):
        assert isinstance(await put(bus, "parts", PART_BYTES, second), ObjectStored)
    for _ in range(3):
        done = await put(bus, "parts", 2 * PART_BYTES, third, digest)
        assert done == ObjectStored(object_id="parts", size=2 * PART_BYTES + 3, complete=True)
    assert isinstance(await put(bus, "parts", 0, first), ObjectStored)
    ref = ObjectRef(object_id="parts", size=2 * PART_BYTES + 3, sha256=digest)
    assert await client.download(client.get_on(bus), ref) == first + second + third


async def test_two_who_put_the_same_object_at_once_make_one_object(bus: Bus) -> None:
    """Each part is stored once, whoever was first."""
    await asyncio.gather(*(client.upload(client.put_on(bus), BIG, object_id="twins") for _ in range(4)))
    ref = ObjectRef(object_id="twins", size=len(BIG), sha256=hashlib.sha256(BIG).hexdigest())
    assert await client.download(client.get_on(bus), ref) == BIG


async def test_an_object_never_changes(bus: Bus) -> None:
    """Whoever puts other contents under the id of one that is there is refused, and the first stays."""
    ref = await client.upload(client.put_on(bus), b"mine", object_id="taken")
    other = hashlib.sha256(b"hers").hexdigest()
    assert refused(await put(bus, "taken", 0, b"hers", other)) == "exists"
    assert refused(await put(bus, "taken", 0, b"much longer", hashlib.sha256(b"much longer").hexdigest())) == "exists"
    assert await client.download(client.get_on(bus), ref) == b"mine"


async def test_contents_that_are_not_what_was_announced_are_refused_and_gone(mesh: RunningMesh, bus: Bus) -> None:
    """The parts are removed, so that the right ones can be put under the same id."""
    assert refused(await put(bus, "wrong", 0, b"right", hashlib.sha256(b"other").hexdigest())) == "bad_digest"
    store = ObjectStore(await mesh.bus(Role.SERVICES), storage.OBJECTS)
    assert "wrong" not in await store.begun()
    ref = await client.upload(client.put_on(bus), b"right", object_id="wrong")
    assert await client.download(client.get_on(bus), ref) == b"right"


@pytest.mark.parametrize(
    ("offset", "data", "sha256", "code"),
    [
        (0, b"short", "", "bad_part"),
        (1, b"x" * PART_BYTES, "", "bad_part"),
        (OBJECT_BYTES_MAX, b"x" * PART_BYTES, "", "too_large"),
        (2**53, b"x", "00", "too_large"),
        (2**53 // PART_BYTES * PART_BYTES, b"", "00", "too_large"),
        (PART_BYTES * 4, b"x", "00", "out_of_order"),
        (0, b"x", "no digest at all", "bad_digest"),
    ],
)
async def test_a_part_that_cannot_be_right_is_refused(
    bus: Bus, offset: int, data: bytes, sha256: str, code: str
) -> None:
    assert refused(await put(bus, "hostile", offset, data, sha256)) == code


async def test_what_is_read_is_held_against_what_was_referred_to(bus: Bus) -> None:
    """A reference with another digest or size, or to nothing, gives an error and no bytes."""
    ref = await client.upload(client.put_on(bus), b"contents")
    for wrong in (
        ObjectRef(object_id=ref.object_id, size=ref.size, sha256="0" * 64),
        ObjectRef(object_id=ref.object_id, size=3, sha256=ref.sha256),
    ):
        with pytest.raises(ObjectError) as raised:
            await client.download(client.get_on(bus), wrong)
        assert raised.value.code == "bad_digest"
    with pytest.raises(ObjectError) as raised:
        await client.download(client.get_on(bus), ObjectRef(object_id="nothing", size=1))
    assert raised.value.code == "not_found"


async def limit(bus: Bus, max_bytes: int) -> None:
    """Sets how much the store may hold."""
    config = json.loads((await bus.call(f"$JS.API.STREAM.INFO.{storage.OBJECTS.stream}", b"")).data)["config"]
    body = json.dumps(config | {"max_bytes": max_bytes}).encode()
    reply = json.loads((await bus.call(f"$JS.API.STREAM.UPDATE.{storage.OBJECTS.stream}", body)).data)
    assert "error" not in reply, reply


async def test_a_full_store_refuses_with_a_reason_and_takes_parts_again_once_there_is_room(
    mesh: RunningMesh, bus: Bus
) -> None:
    """The one who puts may give up or wait; waiting, what was stored of it is not put again."""
    services = await mesh.bus(Role.SERVICES)
    used = sum(info.size for info in await ObjectStore(services, storage.OBJECTS).list())
    await limit(services, used + PART_BYTES + PART_BYTES // 2)
    with pytest.raises(ObjectError) as raised:
        await client.upload(client.put_on(bus), BIG, object_id="gives-up", patience_s=0.0)
    assert (raised.value.code, raised.value.refused.retry) == ("not_stored", "later")
    assert "bytes" in str(raised.value)
    uploading = asyncio.create_task(client.upload(client.put_on(bus), BIG, object_id="waits", patience_s=None))
    await limit(services, storage.OBJECTS.max_bytes)
    assert await client.download(client.get_on(bus), await uploading) == BIG


async def test_room_is_made_by_the_oldest_objects_that_no_open_item_needs(
    mesh: RunningMesh, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being put at the moment stays as well; what nobody went on with goes."""
    services = await mesh.bus(Role.SERVICES)
    store = ObjectStore(services, storage.OBJECTS)
    needed = (await client.upload(client.put_on(bus), BIG)).object_id
    old = (await client.upload(client.put_on(bus), BIG)).object_id
    young = (await client.upload(client.put_on(bus), BIG)).object_id
    await put(bus, "begun", 0, BIG[:PART_BYTES])
    assert await drop_objects(services, {needed}, bytes_max=len(BIG) * 2 + PART_BYTES * 2) > 0
    left = [info.name for info in await store.list()]
    assert left == [needed, young]
    assert old not in await store.begun()
    assert "begun" in await store.begun()
    monkeypatch.setattr(retention, "ABANDONED_S", 0.0)
    await drop_objects(services, {needed, young}, bytes_max=storage.OBJECTS.max_bytes)
    assert set(await store.begun()) == {needed, young}


async def test_the_object_store_is_as_declared_and_only_services_touch_it(mesh: RunningMesh) -> None:
    """A client and a node that write to the store's own subjects are denied; nothing is stored."""
    services = await mesh.bus(Role.SERVICES)
    assert await drift(services) == {}
    for role in (Role.CLIENT, Role.NODE):
        denied: list[str] = []
        intruder = Bus((await mesh.bus(role)).where, on_denied=denied.append)
        await intruder.connect(timeout_s=5.0)
        await intruder.send(storage.OBJECTS.part_subject("evil"), b"evil")
        await intruder.send(storage.OBJECTS.meta_subject("evil"), b"{}")
        await intruder.flush()
        await intruder.close()
        assert len(denied) == 2
    assert "evil" not in await ObjectStore(services, storage.OBJECTS).begun()
