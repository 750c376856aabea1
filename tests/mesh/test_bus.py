"""The bus against a real server: what nats-py and JetStream do wrong or oddly must not reach a service.

Method: one server per test, our own Bus in the services role, and ``kill -9`` where it matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import pytest
import uvloop
from nats.aio.msg import Msg

from computemesh.bus import (
    Bucket,
    Bus,
    Conflict,
    Entry,
    MicroService,
    Mirror,
    NotStored,
    Pipeline,
    Posts,
    Pull,
    Reply,
    Stored,
    Where,
    Writer,
)
from computemesh.bus import lease as leases
from computemesh.bus.connection import read_ack
from computemesh.bus.errors import NoResponder, TimedOut
from computemesh.bus.provision import drift, provision
from computemesh.bus.writer import IN_FLIGHT_MAX
from computemesh.contracts import nodes, storage, work
from computemesh.contracts.base import Refused, Role, serve
from computemesh.contracts.nodes import Discover, NodeGet, NodeRecord, NodeView
from computemesh.contracts.storage import Lease
from computemesh.nats_server import NatsServer
from computemesh.testing import running_server, until


@pytest.fixture
async def server(tmp_path: Path) -> AsyncGenerator[NatsServer]:
    """A server of this test's own."""
    async with running_server(tmp_path) as running:
        yield running


@pytest.fixture
async def bus(server: NatsServer) -> AsyncGenerator[Bus]:
    """A connection as a service, with all streams and buckets."""
    connection = Bus(Where(url=server.url(Role.SERVICES), role=Role.SERVICES, name="test"))
    await connection.connect(timeout_s=5)
    await provision(connection)
    yield connection
    await connection.close()


def node(node_id: str, hostname: str = "h") -> NodeRecord:
    return NodeRecord(node_id=node_id, hostname=hostname)


async def restart(server: NatsServer) -> None:
    """``kill -9``, and the next life on the same store and port."""
    server.kill()
    await server.wait()
    await server.start()


async def test_provisioning_twice_changes_nothing_and_drift_is_put_right(bus: Bus) -> None:
    """What differs from the table is found, named and updated."""
    await provision(bus)
    assert await drift(bus) == {}
    reply = await bus.call("$JS.API.STREAM.INFO.COMPUTE_WORK", b"")
    config = msgspec.json.decode(reply.data)["config"]
    config["max_msg_size"] = 1000
    await bus.call("$JS.API.STREAM.UPDATE.COMPUTE_WORK", msgspec.json.encode(config))
    assert await drift(bus) == {"COMPUTE_WORK": ["max_msg_size"]}
    await provision(bus)
    assert await drift(bus) == {}


async def test_a_write_that_names_an_old_revision_loses(bus: Bus) -> None:
    """Every write is a compare-and-set; creating a key that is there loses as well."""
    bucket = Bucket(bus, storage.NODES)
    first = await bucket.create("n1", node("n1"))
    second = await bucket.update("n1", node("n1", "a"), last=first)
    with pytest.raises(Conflict):
        await bucket.update("n1", node("n1", "b"), last=first)
    with pytest.raises(Conflict):
        await bucket.create("n1", node("n1"))
    entry = await bucket.get("n1")
    assert entry is not None
    assert (entry.value.hostname, entry.revision) == ("a", second)


async def test_forty_changes_at_once_are_all_applied(bus: Bus) -> None:
    """The transaction loop decides again whenever it loses a race."""
    bucket = Bucket(bus, storage.NODES)

    def add_one(before: NodeRecord | None) -> NodeRecord:
        return node("n1", str(int(before.hostname) + 1 if before else 1))

    async def change() -> None:
        while True:
            with contextlib.suppress(Conflict):
                await bucket.change("n1", add_one)
                return

    await asyncio.gather(*(change() for _ in range(40)))
    entry = await bucket.get("n1")
    assert entry is not None
    assert entry.value.hostname == "40"


async def test_a_key_that_expired_is_not_there_and_can_be_created_again(bus: Bus) -> None:
    """The marker of an expired key neither surfaces as a value nor blocks its name."""
    bucket = Bucket(bus, storage.LEASES)
    await bucket.create("svc", Lease(holder="a", epoch=1), ttl_s=1)
    mirror: Mirror[Lease] = Mirror(bus, storage.LEASES)
    following = asyncio.create_task(mirror.follow())
    await until(lambda: "svc" in mirror.entries, what="the lease")
    await until(lambda: "svc" not in mirror.entries, what="its expiry")
    assert await bucket.get("svc") is None
    await bucket.create("svc", Lease(holder="b", epoch=2), ttl_s=5)
    assert (await bucket.load())["svc"].value.holder == "b"
    following.cancel()


async def test_a_mirror_says_that_it_is_synced_when_it_holds_all_that_is_stored(bus: Bus) -> None:
    """Not when it has only begun to read."""
    bucket = Bucket(bus, storage.NODES)
    await asyncio.gather(*(bucket.create(f"n{number}", node(f"n{number}")) for number in range(300)))
    mirror = Mirror(bus, storage.NODES)
    following = asyncio.create_task(mirror.follow())
    await asyncio.wait_for(mirror.synced.wait(), 30)
    assert len(mirror.entries) == 300
    following.cancel()


async def test_a_mirror_is_whole_again_soon_after_the_server_was_killed(server: NatsServer, bus: Bus) -> None:
    """Changes and deletions made while it was blind are noticed within seconds."""
    bucket = Bucket(bus, storage.NODES)
    seen: list[tuple[str, bool]] = []
    mirror: Mirror[NodeRecord] = Mirror(bus, storage.NODES, lambda key, value: seen.append((key, value is not None)))
    following = asyncio.create_task(mirror.follow())
    await bucket.create("stays", node("stays"))
    doomed = await bucket.create("goes", node("goes"))
    await until(lambda: set(mirror.entries) == {"stays", "goes"}, what="both nodes")
    await restart(server)
    await asyncio.wait_for(bus.connected.wait(), 10)
    await bucket.purge("goes", last=doomed)
    await bucket.create("comes", node("comes"))
    await until(lambda: set(mirror.entries) == {"stays", "comes"}, what="the changes", within_s=8)
    assert ("goes", False) in seen
    following.cancel()


async def test_a_spoiled_value_is_skipped_and_the_rest_is_read(bus: Bus) -> None:
    """A record that does not decode does not take the service down with it."""
    bucket = Bucket(bus, storage.NODES)
    await bucket.create("good", node("good"))
    await bus.call(storage.NODES.subject("bad"), b"\xff{not json")
    assert list(await bucket.load()) == ["good"]
    assert await bucket.get("bad") is None


async def test_the_pipeline_answers_each_request_exactly_once(bus: Bus) -> None:
    """Stored, lost race, refused, nobody there, no answer: each reaches its own callback."""
    replies: dict[str, Reply] = {}
    pipeline = Pipeline(bus, timeout_s=0.3)
    await pipeline.start()
    silent = await bus.listen(nodes.GET.subject, _ignore)

    async def send(name: str, subject: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        async def on_reply(reply: Reply) -> None:
            assert name not in replies
            replies[name] = reply

        await pipeline.send(subject, data, on_reply, headers=headers)

    record = msgspec.json.encode(node("n1"))
    await send("stored", storage.NODES.subject("n1"), record)
    await send("lost", storage.NODES.subject("n1"), record, {"Nats-Expected-Last-Subject-Sequence": "999"})
    await send("refused", work.SUBMIT.subject, b"x" * (1024 * 1024 + 1))
    await send("nobody", work.DELIVER.at("nobody"), b"")
    await send("silent", nodes.GET.subject, b"")
    await until(lambda: len(replies) == 5, what="five replies")
    assert read_ack("n1", replies["stored"].data).seq > 0
    with pytest.raises(Conflict):
        read_ack("n1", replies["lost"].data)
    with pytest.raises(NotStored):
        read_ack("submit", replies["refused"].data)
    assert replies["nobody"].no_responder
    assert replies["silent"].timed_out
    await asyncio.wait_for(pipeline.empty.wait(), 5)
    await bus.forget(silent)
    await pipeline.stop()


# --- many writes at once --------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def writing(bus: Bus, *, mirrored: bool = True) -> AsyncGenerator[tuple[Writer[NodeRecord], Mirror[NodeRecord]]]:
    """A writer of nodes; its mirror follows the bucket or, left blind, knows only what the writer tells it."""
    mirror: Mirror[NodeRecord] = Mirror(bus, storage.NODES)
    writer = Writer(bus, storage.NODES, mirror)
    following = asyncio.create_task(mirror.follow()) if mirrored else None
    await writer.start()
    yield writer, mirror
    await writer.stop()
    if following is not None:
        following.cancel()


def counted(before: NodeRecord | None) -> NodeRecord:
    """One more than before."""
    return node("n", str(int(before.hostname) + 1 if before else 1))


async def test_writes_of_many_keys_at_once_all_stand_and_are_known_at_once(bus: Bus) -> None:
    """More of them than may be in flight; the writer's own mirror has each as soon as it is acknowledged."""
    bucket = Bucket(bus, storage.NODES)
    async with writing(bus, mirrored=False) as (writer, mirror):
        names = [f"n{n}" for n in range(IN_FLIGHT_MAX + 500)]

        async def change(name: str) -> None:
            assert await writer.change(name, lambda _: node(name)) == node(name)
            assert mirror.get(name) == node(name)

        await asyncio.gather(*map(change, names))
        assert not any(map(writer.writing, names))
    assert sorted(await bucket.load()) == sorted(names)


async def test_decisions_about_one_key_are_made_in_order_on_what_stands(bus: Bus) -> None:
    """None gets lost, whoever else writes meanwhile; those that wait become one write."""
    bucket = Bucket(bus, storage.NODES)
    first = await bucket.create("n", node("n", "0"))
    async with writing(bus, mirrored=False) as (blind, _), writing(bus) as (other, _):
        results = await asyncio.gather(*((blind if n % 2 else other).change("n", counted) for n in range(100)))
        entry = await bucket.get("n")
        assert entry is not None
        assert entry.value.hostname == "100"
        assert len({result.hostname for result in results if result}) == 100
        assert entry.revision - first < 100


async def test_a_decision_that_changes_nothing_writes_nothing(bus: Bus) -> None:
    """Nor does one about a key that is not there and is not to be."""
    bucket = Bucket(bus, storage.NODES)
    async with writing(bus) as (writer, _):
        assert await writer.change("n", lambda _: None) is None
        assert await writer.change("n", lambda _: node("n")) == node("n")
        before = await bucket.get("n")
        assert await writer.change("n", lambda value: value) == node("n")
        assert await writer.change("n", lambda _: node("n")) == node("n")
        assert await bucket.get("n") == before


async def test_a_key_that_was_removed_can_be_written_again(bus: Bus) -> None:
    """The mirror does not know the marker that stands there; the lost race tells."""
    bucket = Bucket(bus, storage.NODES)
    async with writing(bus) as (writer, mirror):
        await writer.change("n", lambda _: node("n"))
        marker = await bucket.purge("n", last=mirror.entries["n"].revision, marker_ttl_s=60)
        mirror.wrote("n", None, marker)
        assert mirror.get("n") is None
        assert await writer.change("n", counted) == node("n", "1")


async def test_what_cannot_be_written_is_told_and_holds_up_nothing_else(bus: Bus) -> None:
    """Too large for the server; the next one about the same key is written."""
    async with writing(bus) as (writer, _):
        large = node("n", "x" * (bus.max_payload + 1))
        results = await asyncio.gather(
            writer.change("n", lambda _: large), writer.change("other", counted), return_exceptions=True
        )
        assert isinstance(results[0], NotStored)
        assert results[1] == node("n", "1")
        assert await writer.change("n", counted) == node("n", "1")


async def test_a_write_that_nobody_waits_for_any_more_is_not_tried_again(bus: Bus) -> None:
    """Its first try loses a race; the next would come when its caller was told long ago that it is not known."""
    bucket = Bucket(bus, storage.NODES)
    await bucket.create("n", node("n", "there"))
    async with writing(bus, mirrored=False) as (writer, _):
        tries: list[int] = []

        def decide(_: NodeRecord | None) -> NodeRecord:
            tries.append(1)
            asking.cancel()
            return node("n", "late")

        asking = asyncio.create_task(writer.change("n", decide))
        await asyncio.wait({asking})
        assert asking.cancelled()
        await until(lambda: not writer.writing("n"), what="it is given up")
        assert (len(tries), await bucket.get("n")) == (1, Entry(node("n", "there"), 1))
        assert await writer.change("n", lambda _: node("n", "next")) == node("n", "next")


async def test_writes_that_meet_a_restart_of_the_server_are_made_all_the_same(server: NatsServer, bus: Bus) -> None:
    """They are decided again once it is back."""
    async with writing(bus) as (writer, _):
        await writer.change("n", counted)
        server.kill()
        await server.wait()
        waiting = [asyncio.create_task(writer.change(name, counted)) for name in ("n", "m")]
        await asyncio.sleep(0)
        await server.start()
        assert await asyncio.wait_for(asyncio.gather(*waiting), 60) == [node("n", "2"), node("n", "1")]


async def test_all_that_arrived_before_is_handled_once_one_has_caught_up(bus: Bus) -> None:
    """Or one is told that it is not so yet."""
    gate = asyncio.Event()
    handled = 0

    async def slow(_: Discover) -> None:
        nonlocal handled
        await gate.wait()
        handled += 1

    subscription = await bus.subscribe(nodes.DISCOVER, slow)
    for _ in range(50):
        await bus.publish(nodes.DISCOVER, Discover())
    assert not await bus.caught_up(subscription, within_s=0.05)
    gate.set()
    assert await bus.caught_up(subscription, within_s=10)
    assert handled >= 49


async def test_a_post_that_nobody_hears_is_told_and_one_that_is_heard_is_not(bus: Bus) -> None:
    """Also when the listener answers, which it need not."""
    unheard: list[tuple[str, int]] = []

    async def on_unheard(name: str, number: int) -> None:
        unheard.append((name, number))

    posts = Posts(bus)
    await posts.start(on_unheard)
    await posts.send(work.ASSIGNED.at(), b"{}", "w1", 7)
    await until(lambda: unheard == [("w1", 7)], what="word of it")

    async def answer(message: Msg) -> None:
        await bus.respond(message, b"thanks")

    listening = await bus.listen(work.ASSIGNED.at(), answer)
    await bus.flush()
    await posts.send(work.ASSIGNED.at(), b"{}", "w2", 1)
    await bus.flush()
    await bus.forget(listening)
    await bus.flush()
    await posts.send(work.ASSIGNED.at(), b"{}", "w3", 1)
    await until(lambda: len(unheard) > 1, what="word of the last")
    assert unheard == [("w1", 7), ("w3", 1)]
    await posts.stop()


async def _ignore(_: object) -> None:
    """Hears and says nothing."""


async def test_a_pull_reads_all_in_order_across_many_batches_and_tells_when_it_is_lost(
    server: NatsServer, bus: Bus
) -> None:
    """Topping up leaves no gap; a server that went away sets ``lost``."""
    count = 5000
    pipeline = Pipeline(bus, timeout_s=5)
    await pipeline.start()
    for number in range(count):
        await pipeline.send(work.SUBMIT.subject, str(number).encode(), _ignore)
    await asyncio.wait_for(pipeline.empty.wait(), 20)
    seen: list[int] = []

    async def on_stored(stored: Stored) -> None:
        assert stored.seq == len(seen) + 1
        seen.append(int(stored.data))

    pull = Pull(bus, storage.WORK_INBOX.name)
    waiting = await pull.start(on_stored, subjects=[work.SUBMIT.subject])
    assert waiting == count
    await until(lambda: len(seen) == count, what="all messages")
    assert seen == list(range(count))
    server.kill()
    await server.wait()
    await asyncio.wait_for(pull.lost.wait(), 10)
    await server.start()
    await asyncio.wait_for(bus.connected.wait(), 10)
    again = Pull(bus, storage.WORK_INBOX.name)
    assert await again.start(on_stored, subjects=[work.SUBMIT.subject], start_seq=count + 1) == 0
    await bus.call(work.SUBMIT.subject, str(count).encode())
    await until(lambda: len(seen) == count + 1, what="the message after the restart")
    await again.stop()
    await pull.stop()
    await pipeline.stop()


async def test_a_pull_that_is_stopped_leaves_no_consumer(bus: Bus) -> None:
    """The server would keep it for ten seconds; whoever reads changes or lists makes many."""

    async def nothing(_: Stored) -> None:
        pass

    async def consumers() -> int:
        reply = await bus.call(f"$JS.API.CONSUMER.NAMES.{storage.NODES.stream}", b"")
        return int(msgspec.json.decode(reply.data)["total"])

    pull = Pull(bus, storage.NODES.stream)
    await pull.start(nothing, subjects=[storage.NODES.subject("*")])
    assert await consumers() == 1
    await pull.stop()
    await bus.flush()
    assert await consumers() == 0


async def test_a_lease_has_one_holder_and_passes_on_when_released_or_silent(bus: Bus) -> None:
    """The second waits for as long as the first renews it, gets it at once on release, and after the time to
    live when the first just stops."""
    waited = asyncio.Event()
    first = await leases.acquire(bus, "svc", "a", on_wait=waited.set)
    second = asyncio.create_task(leases.acquire(bus, "svc", "b", on_wait=waited.set))
    await asyncio.wait_for(waited.wait(), 5)
    assert not second.done()
    await until_renewed(bus, "svc", times=leases.TTL_S + 1)
    assert not second.done()
    assert first.certain
    await first.release()
    assert not first.certain
    entry = await Bucket(bus, storage.LEASES).get("svc")
    assert entry is None or entry.value.holder == "b", "nobody need wait until it expires"
    held = await asyncio.wait_for(second, 5)
    assert held.epoch > first.epoch
    third = asyncio.create_task(leases.acquire(bus, "svc", "c", on_wait=waited.set))
    stopped = asyncio.create_task(held.stop_renewing())
    await stopped
    taken = await asyncio.wait_for(third, 10)
    assert taken.epoch > held.epoch
    await taken.release()


async def test_a_lease_that_never_expires_is_taken_over_once_it_was_silent_for_long(bus: Bus) -> None:
    """A server that was killed may bring one back that had expired, and forget when it was to end."""
    waited = asyncio.Event()
    revision = await Bucket(bus, storage.LEASES).create("svc", storage.Lease(holder="dead", epoch=1))
    second = asyncio.create_task(leases.acquire(bus, "svc", "b", on_wait=waited.set))
    await asyncio.wait_for(waited.wait(), 5)
    assert not second.done()
    held = await asyncio.wait_for(second, 20)
    assert held.epoch > revision
    await held.release()


async def until_renewed(bus: Bus, service: str, *, times: int) -> None:
    """Waits until a lease was written so many times more, which takes as many seconds."""
    seen: set[int] = set()
    async with asyncio.timeout(30):
        while len(seen) <= times:
            entry = await Bucket(bus, storage.LEASES).get(service)
            assert entry is not None, "it expired"
            seen.add(entry.revision)
            await asyncio.sleep(0.05)


async def test_the_next_life_of_a_holder_takes_its_lease_at_once(bus: Bus) -> None:
    """A service that was killed does not wait for its own lease to expire, and its old life notices."""
    first = await leases.acquire(bus, "svc", "a", on_wait=lambda: None)
    again = await asyncio.wait_for(leases.acquire(bus, "svc", "a", on_wait=lambda: None), 2)
    await asyncio.wait_for(first.lost.wait(), 5)
    assert not again.lost.is_set()
    await again.release()


async def test_an_endpoint_handles_requests_at_the_same_time_and_drains_what_waits(bus: Bus) -> None:
    """One slow request does not hold up the others; draining answers every one of them."""
    gate = asyncio.Event()
    inside = 0

    async def on_get(ask: NodeGet) -> NodeView | Refused:
        nonlocal inside
        inside += 1
        await gate.wait()
        return NodeView(node_id=ask.node_id)

    micro = MicroService(bus, name="svc", description="", metadata={})
    await micro.start([serve(nodes.GET, on_get)])
    await bus.flush()

    async def ask(number: int) -> str:
        answer = await bus.ask(nodes.GET, NodeGet(node_id=f"n{number}"))
        return answer.node_id if isinstance(answer, NodeView) else answer.reason

    asks = [asyncio.create_task(ask(number)) for number in range(100)]
    await until(lambda: inside >= 64, what="as many at once as are allowed")
    draining = asyncio.create_task(micro.drain())
    gate.set()
    answers = await asyncio.gather(*asks)
    await asyncio.wait_for(draining, 10)
    assert answers == [f"n{number}" for number in range(100)]
    with pytest.raises(NoResponder):
        await bus.ask(nodes.GET, NodeGet(node_id="late"))


async def test_an_answer_that_the_bus_does_not_carry_is_a_refusal(bus: Bus) -> None:
    """Whoever asks hears so at once, and need not wait in vain."""

    async def on_get(ask: NodeGet) -> NodeView | Refused:
        models = ["x" * bus.max_payload] if ask.node_id == "large" else []
        return NodeView(node_id=ask.node_id, loaded_models=models)

    micro = MicroService(bus, name="svc", description="", metadata={})
    await micro.start([serve(nodes.GET, on_get)])
    answer = await bus.ask(nodes.GET, NodeGet(node_id="large"))
    assert isinstance(answer, Refused)
    assert (answer.code, answer.status) == ("too_large", 413)
    assert isinstance(await bus.ask(nodes.GET, NodeGet(node_id="small")), NodeView)
    await micro.drain()


async def test_anyone_can_discover_the_service_and_its_counters(bus: Bus) -> None:
    """``$SRV.INFO`` and ``$SRV.STATS`` answer as the NATS micro protocol says."""

    async def on_get(ask: NodeGet) -> NodeView | Refused:
        return Refused(code="not_found", reason="no such node", status=404)

    micro = MicroService(bus, name="svc", description="about", metadata={"http": "x"})
    await micro.start([serve(nodes.GET, on_get)])
    answer = await bus.ask(nodes.GET, NodeGet(node_id="n1"))
    assert isinstance(answer, Refused)
    info = msgspec.json.decode((await bus.call("$SRV.INFO.svc", b"")).data)
    assert info["type"] == "io.nats.micro.v1.info_response"
    assert info["endpoints"][0]["subject"] == nodes.GET.subject
    stats = msgspec.json.decode((await bus.call("$SRV.STATS", b"")).data)
    assert stats["endpoints"][0]["num_requests"] == 1
    assert stats["endpoints"][0]["last_error"] == "404:no such node"
    await micro.drain()


async def test_a_request_whose_server_dies_is_not_waited_for(server: NatsServer, bus: Bus) -> None:
    """No reply comes to a connection that is gone; one that is asked meanwhile waits for the next connection."""
    silent = await bus.listen(nodes.GET.subject, _ignore)
    asked = asyncio.create_task(bus.call(nodes.GET.subject, b"", timeout_s=60))
    await bus.flush()
    server.kill()
    await server.wait()
    with pytest.raises(TimedOut, match="the connection broke"):
        await asyncio.wait_for(asked, 30)
    again = asyncio.create_task(bus.call("$JS.API.INFO", b"", timeout_s=60))
    await server.start()
    assert b"account_info_response" in (await asyncio.wait_for(again, 30)).data
    cancelled = asyncio.create_task(bus.call(nodes.GET.subject, b"", timeout_s=60))
    await bus.flush()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await bus.forget(silent)


async def test_a_request_that_nobody_waits_for_any_more_is_not_made_when_the_server_is_back(
    server: NatsServer, bus: Bus
) -> None:
    """It would be served behind the one that was made in its place."""
    heard: list[bytes] = []

    async def on_request(message: Msg) -> None:
        heard.append(message.data)
        await bus.respond(message, b"{}")

    await bus.listen(nodes.GET.subject, on_request)
    server.kill()
    await server.wait()
    await until(lambda: not bus.connected.is_set(), what="the connection to break")
    with pytest.raises(TimedOut):
        await bus.call(nodes.GET.subject, b"first", timeout_s=0.2)
    await server.start()
    await bus.call(nodes.GET.subject, b"second", timeout_s=30)
    await bus.flush()
    assert heard == [b"second"]


@pytest.mark.parametrize("gone", ["unnoticed", "noticed", "reconnecting", "stopped", "came back"])
def test_closing_a_connection_whose_server_is_gone_raises_nothing(tmp_path: Path, gone: str) -> None:
    """Also with messages that were never sent, on the event loop of services. Who waits for an answer is told."""

    async def close() -> None:
        async with running_server(tmp_path) as server:
            bus = Bus(Where(url=server.url(Role.SERVICES), role=Role.SERVICES, name="test"))
            await bus.connect(timeout_s=5)
            await bus.listen(nodes.GET.subject, _ignore)
            await bus.flush()
            asked = asyncio.create_task(bus.call(nodes.GET.subject, b"", timeout_s=60))
            await bus.flush()
            server.kill()
            if gone != "unnoticed":
                await server.wait()
                await until(lambda: not bus.connected.is_set(), what="the connection to break")
            await bus.send(nodes.GET.subject, b"never sent")
            if gone == "reconnecting":
                await asyncio.sleep(0.5)
            if gone == "came back":
                await server.start()
                await asyncio.wait_for(bus.connected.wait(), 30)
                await bus.send(nodes.GET.subject, b"sent")
                server.kill()
            if gone == "stopped":  # It accepts, but never says a word.
                await server.start()
                os.kill(server.pid, signal.SIGSTOP)
            await bus.close()
            assert not bus.up
            await bus.close()
            with pytest.raises(TimedOut, match="the connection broke"):
                await asyncio.wait_for(asked, 30)

    uvloop.run(close())


async def test_a_flush_that_was_given_up_does_not_deafen_the_connection(server: NatsServer, bus: Bus) -> None:
    """Its answer comes all the same, when nobody waits for it any more."""
    os.kill(server.pid, signal.SIGSTOP)
    flushing = asyncio.create_task(bus.flush())
    for _ in range(5):  # Until it waits for the server.
        await asyncio.sleep(0)
    flushing.cancel()
    await asyncio.wait({flushing})
    os.kill(server.pid, signal.SIGCONT)
    await bus.flush()
    await Bucket(bus, storage.NODES).load()
    assert bus.up
    assert bus.stats["reconnects"] == 0


async def test_an_endpoint_that_ends_with_its_connection_does_not_come_back_with_the_next(
    server: NatsServer, bus: Bus
) -> None:
    """Whether the connection breaks before it is drained or meanwhile; and nobody waits for the server that died."""

    async def on_get(ask: NodeGet) -> NodeView | Refused:
        return NodeView(node_id=ask.node_id)

    micro = MicroService(bus, name="svc", description="", metadata={})
    meanwhile, before = await micro.add(serve(nodes.GET, on_get)), await micro.add(serve(nodes.GET, on_get))
    await bus.flush()
    os.kill(server.pid, signal.SIGSTOP)
    draining = asyncio.create_task(micro.remove(meanwhile))
    flushing = asyncio.create_task(bus.flush())
    await asyncio.sleep(0)
    server.kill()
    await server.wait()
    with pytest.raises(TimedOut, match="the connection broke"):
        await asyncio.wait_for(flushing, 4)
    await asyncio.wait_for(draining, 4)
    await until(lambda: not bus.connected.is_set(), what="the loss to be noticed")
    await asyncio.wait_for(micro.remove(before), 4)
    await server.start()
    await asyncio.wait_for(bus.connected.wait(), 10)
    with pytest.raises(NoResponder):
        await bus.ask(nodes.GET, NodeGet(node_id="n1"))


async def test_an_inline_handler_that_waits_for_an_answer_is_told_at_once(server: NatsServer, bus: Bus) -> None:
    """It would wait for ever, since it holds up the reading. The connection goes on as if nothing had happened."""
    defects: list[BaseException] = []
    one = Bus(bus.where, on_defect=defects.append)
    await one.connect(timeout_s=5)
    heard: list[bytes] = []

    async def on_message(message: Msg) -> None:
        heard.append(message.data)
        if message.data == b"ask":
            await one.call(nodes.GET.subject, b"")

    inbox = one.new_inbox()
    listening = await one.listen(inbox, on_message, inline=True)
    for data in (b"1", b"ask", b"2"):
        await one.send(inbox, data)
    await one.flush()
    assert heard == [b"1", b"ask", b"2"]
    assert [type(defect) for defect in defects] == [RuntimeError]
    await restart(server)
    await asyncio.wait_for(one.connected.wait(), 10)
    await one.send(inbox, b"3")
    await until(lambda: heard[-1] == b"3", what="a message over the next connection")
    await one.forget(listening)
    await one.send(inbox, b"4")
    await one.flush()
    assert heard[-1] == b"3"
    await one.close()
