"""Answers of engines over the bus: both ends, on a real server with accounts, with engines that are processes.

Method: the node's door and the asker are the real ones, each with a connection of its own in its role; the engine is
the fake one, whose tokens carry the name of their stream and a number. What the engine says of itself (how many answers
it gives, how many clients left) is what counts for places that fall free.
"""

# nats-py is typed in part only.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import nats
import pytest

from computemesh import trace
from computemesh.answers import Answer, AnswerFailed
from computemesh.bus import Bus, MicroService, Where
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.infer import (
    ASK,
    CONTROL,
    PART_MAX,
    InferAsk,
    InferControl,
    InferControlled,
    InferPart,
)
from computemesh.ids import new_id
from computemesh.infer_client import InferClient
from computemesh.nats_server import NatsServer
from computemesh.nats_server.process import find_binary
from computemesh.tasks import end_all
from computemesh.testing import FakeEngine, running_fake_engine, running_server, until
from computemesh_services.node_agent.engines.place import EngineError, Place
from computemesh_services.node_agent.infer import Door, Inference, door

MODEL = "fake"


class OneEngine:
    """In place of the pool: each request has its place at once, on the same engine."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.taken = 0

    @contextlib.asynccontextmanager
    async def admit(self, model: str, device: str = "") -> AsyncGenerator[Place]:
        if model != MODEL:
            raise EngineError(f"no model '{model}'", code="unknown_model")
        self.taken += 1
        try:
            yield Place(base_url=self.url, model=MODEL, device="cpu:0")
        finally:
            self.taken -= 1


class Node:
    """The door of a node, on a connection of its own."""

    def __init__(self, bus: Bus, engine_url: str, node_id: str = "n1") -> None:
        self.bus = bus
        self.engines = OneEngine(engine_url)
        self.inference = Inference(self.engines)
        self.session = new_id("s")
        self.door = Door(bus, self.inference, node_id=node_id, session=self.session)
        self.micro = MicroService(bus, name="node-agent", description="a node of a test", metadata={})
        self._watching: asyncio.Task[None] | None = None

    async def open(self) -> None:
        for bound in self.door.endpoints():
            await self.micro.add(bound)
        await self.micro.start([])
        await self.bus.flush()
        self._watching = asyncio.create_task(self.door.watch())

    async def close(self) -> None:
        if self._watching is not None:
            await end_all([self._watching])
        await self.door.drain(0)
        await self.inference.stop()
        await self.bus.close()


async def connected(url: str, role: Role) -> Bus:
    bus = Bus(Where(url=url, role=role, name="test"))
    await bus.connect(timeout_s=10)
    return bus


@pytest.fixture
async def server(tmp_path: Path) -> AsyncGenerator[NatsServer]:
    async with running_server(tmp_path, nodes=("n1",)) as running:
        yield running


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncGenerator[FakeEngine]:
    async with running_fake_engine(tmp_path) as running:
        yield running


@contextlib.asynccontextmanager
async def node_on(server: NatsServer, engine: FakeEngine) -> AsyncGenerator[Node]:
    node = Node(await connected(server.url(Role.NODE, "n1"), Role.NODE), engine.url)
    await node.open()
    try:
        yield node
    finally:
        await node.close()


@pytest.fixture
async def node(server: NatsServer, engine: FakeEngine) -> AsyncGenerator[Node]:
    async with node_on(server, engine) as opened:
        yield opened


@pytest.fixture
async def bus(server: NatsServer) -> AsyncGenerator[Bus]:
    """The asker's connection, as a client."""
    connection = await connected(server.url(Role.CLIENT), Role.CLIENT)
    yield connection
    await connection.close()


@pytest.fixture
async def asker(bus: Bus) -> AsyncGenerator[InferClient]:
    async with InferClient(bus) as client:
        yield client


def ask(words: str, *, stream: bool = True, model: str = MODEL, **fields: Any) -> InferAsk:
    body = {"messages": [{"role": "user", "content": words}], "stream": stream}
    return InferAsk(stream=new_id("i"), model=model, body=body, **fields)


async def opened(asker: InferClient, words: str, *, within_s: float = 10.0, **fields: Any) -> Answer:
    """An answer that has begun."""
    async with asyncio.timeout(within_s):
        answer = await asker.open("n1", ask(words, **fields))
    assert not isinstance(answer, Refused), answer
    return answer


async def read(answer: Answer, texts: list[str] | None = None) -> str:
    """All of an answer; what comes before it breaks off is found in *texts*."""
    found: list[str] = [] if texts is None else texts
    async with contextlib.aclosing(answer):
        async for text in answer:
            found.append(text)  # noqa: PERF401  # also of one that breaks off
    return "".join(found)


def tokens_of(text: str) -> list[str]:
    return re.findall(r'"content":"([^"]*)"', text)


def numbered(name: str, count: int) -> list[str]:
    return [f"{name}:{number} " for number in range(count)]


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("node")
async def test_answers_that_stream_at_the_same_time_are_each_whole_and_in_order(asker: InferClient) -> None:
    """Every token carries the name of its stream and its number."""

    async def chat(name: str) -> None:
        text = await read(await opened(asker, f"id={name} tokens=200 rate=200"))
        assert tokens_of(text) == numbered(name, 200)
        assert text.endswith("data: [DONE]\n\n")

    await asyncio.gather(*(chat(f"s{number}") for number in range(50)))


@pytest.mark.usefixtures("node")
async def test_a_part_never_cuts_an_event_and_tells_at_the_beginning_what_it_is_of(asker: InferClient) -> None:
    answer = await opened(asker, "tokens=20000 size=20")
    assert (answer.status, answer.content_type, answer.device) == (200, "text/event-stream", "cpu:0")
    async with contextlib.aclosing(answer):
        async for text in answer:
            assert text.endswith("\n\n")


@pytest.mark.usefixtures("node")
async def test_usage_is_told_though_nobody_asked_for_it(asker: InferClient) -> None:
    """So whoever counts tokens can; it is for the front door to leave it out again."""
    text = await read(await opened(asker, "tokens=7"))
    assert '"completion_tokens":7' in text


@pytest.mark.usefixtures("node")
async def test_a_long_answer_that_does_not_stream_comes_whole(asker: InferClient) -> None:
    """In as many parts as it needs: it is longer than one, and longer than the window."""
    text = await read(await opened(asker, "id=é tokens=40000 size=10", stream=False))
    assert len(text) > 4 * PART_MAX
    content: str = msgspec.json.decode(text)["choices"][0]["message"]["content"]
    assert content.split() == [f"é:{number}" for number in range(40_000)]


@pytest.mark.usefixtures("node")
async def test_an_engine_s_complaint_is_passed_on_as_it_is(asker: InferClient) -> None:
    answer = await opened(asker, "status=422")
    assert answer.status == 422
    assert msgspec.json.decode(await read(answer))["error"]["code"] == 422


@pytest.mark.usefixtures("node")
async def test_what_a_node_refuses_is_refused_at_the_asker(asker: InferClient) -> None:
    refused = await asker.open("n1", ask("", model="nowhere"))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.status, refused.retry) == ("unknown_model", 404, "elsewhere")


@pytest.mark.usefixtures("node")
async def test_two_streams_of_one_name_are_refused(asker: InferClient) -> None:
    asked = ask("tokens=100 rate=1")
    first = await asker.open("n1", asked)
    assert not isinstance(first, Refused)
    async with contextlib.aclosing(first), InferClient(asker._bus) as other:  # pyright: ignore[reportPrivateUsage]
        second = await other.open("n1", asked)
        assert isinstance(second, Refused)
        assert (second.code, second.status) == ("duplicate_stream", 409)


@pytest.mark.usefixtures("node")
async def test_the_engine_hears_of_the_trace_of_the_asker(asker: InferClient, engine: FakeEngine) -> None:
    here = trace.begin()
    with trace.within(here.header):
        await read(await opened(asker, "tokens=1"))
    assert here.trace_id in (await engine.state())["traceparent"]


async def test_a_question_that_is_too_large_for_the_bus_is_refused_with_413(asker: InferClient) -> None:
    refused = await asker.open("n1", ask("x" * 9 * 1024 * 1024))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.status) == ("too_large", 413)


async def test_requests_in_parts_are_listed_among_the_endpoints_with_their_counts(
    node: Node, asker: InferClient, bus: Bus
) -> None:
    await read(await opened(asker, "tokens=1"))
    reply = await bus.call(f"$SRV.STATS.node-agent.{node.micro.id}", b"")
    stats = {each["subject"]: each for each in msgspec.json.decode(reply.data)["endpoints"]}
    assert stats[ASK.at("n1")]["num_requests"] == 1
    assert CONTROL.at("n1") in stats


# --- flow control ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("node")
async def test_a_reader_that_is_slow_makes_its_engine_wait_and_nobody_else(
    asker: InferClient, engine: FakeEngine
) -> None:
    """Of an answer of 26 million characters only what fits the window and the sockets is ever made."""
    slow = await opened(asker, "id=slow tokens=200000")
    seen = -1
    while seen != (seen := (await engine.state())["tokens"]):
        await asyncio.sleep(0.3)
    assert seen < 100_000
    assert tokens_of(await read(await opened(asker, "id=other tokens=500"))) == numbered("other", 500)
    assert tokens_of(await read(slow)) == numbered("slow", 200_000)


async def test_a_node_never_has_more_than_the_window_under_way(node: Node, bus: Bus) -> None:
    """Seen by an asker that takes nothing, then some, by hand."""
    parts: list[InferPart] = []

    async def on_part(message: Any) -> None:
        if message.data:
            parts.append(msgspec.json.decode(message.data, type=InferPart))

    def come() -> int:
        return sum(len(part.text) for part in parts)

    inbox = bus.new_inbox()
    await bus.listen(inbox, on_part)
    asked = ask("tokens=100000", session="s-hand", window=PART_MAX)
    await bus.send(ASK.at("n1"), msgspec.json.encode(asked), reply=inbox)

    async def settle() -> int:
        await until(lambda: parts, what="a part")
        seen = -1
        while seen != (seen := come()):
            await asyncio.sleep(0.2)
        return seen

    first = await settle()
    assert 0 < first <= PART_MAX  # How much depends on how large the pieces are in which the engine's text arrives.
    told = await bus.ask(CONTROL, InferControl(session="s-hand", taken={asked.stream: first}), target="n1")
    assert told == InferControlled(session=node.session)
    second = await settle()
    assert first < second <= first + PART_MAX
    # More than was sent cannot have been taken, and another session says nothing of this stream.
    await bus.ask(CONTROL, InferControl(session="s-hand", taken={asked.stream: 2**40}), target="n1")
    third = await settle()
    assert third <= second + PART_MAX
    stranger = await bus.ask(CONTROL, InferControl(session="s-other", cancel=[asked.stream]), target="n1")
    assert stranger == InferControlled(session=node.session, unknown=[asked.stream])
    await bus.ask(CONTROL, InferControl(session="s-hand", cancel=[asked.stream]), target="n1")
    await until(lambda: parts[-1].last, what="the last part")
    assert parts[-1].failed is not None
    assert parts[-1].failed.code == "cancelled"
    assert [part.seq for part in parts] == list(range(len(parts)))


# --- those who go ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_who_closes_an_answer_frees_the_engine_within_a_second(
    node: Node, asker: InferClient, engine: FakeEngine, *, stream: bool
) -> None:
    """Also while it waits for the answer to begin."""
    if stream:
        await (await opened(asker, "tokens=100000 rate=10")).aclose()
    else:
        opening = asyncio.create_task(asker.open("n1", ask("tokens=100000 rate=10", stream=False)))
        await engine.until(running=1)
        opening.cancel()
    await engine.until(within_s=1.0, running=0, cancelled=1)
    await until(lambda: node.engines.taken == 0, what="the place is free")


async def test_an_asker_that_falls_silent_loses_its_answers(
    node: Node, bus: Bus, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that asked in a session and says nothing any more; one without a session is left alone."""
    monkeypatch.setattr(door, "SILENT_S", 1.0)
    await bus.send(ASK.at("n1"), msgspec.json.encode(ask("tokens=9999 rate=5", session="s-1")), reply=bus.new_inbox())
    await bus.send(ASK.at("n1"), msgspec.json.encode(ask("tokens=9999 rate=5")), reply=bus.new_inbox())
    await engine.until(running=2)
    await engine.until(running=1, cancelled=1)
    assert node.door.streams == 1


async def test_an_asker_that_reads_on_is_never_taken_for_silent(
    node: Node, asker: InferClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its answer says nothing for long, and it takes nothing."""
    monkeypatch.setattr(door, "SILENT_S", 3.5)
    answer = await opened(asker, "id=a tokens=30 rate=5")
    await asyncio.sleep(5)
    assert node.door.streams == 1
    assert tokens_of(await read(answer)) == numbered("a", 30)


@pytest.mark.usefixtures("node")
async def test_an_engine_that_dies_on_the_way_breaks_the_answer_off(asker: InferClient) -> None:
    """What came before is given, then why there is no more."""
    answer = await opened(asker, "id=a tokens=100 rate=50 crash=5")
    texts: list[str] = []
    with pytest.raises(AnswerFailed) as failure:
        await read(answer, texts)
    assert (failure.value.refused.code, failure.value.refused.retry) == ("engine_lost", "elsewhere")
    assert tokens_of("".join(texts)) == numbered("a", 5)[: len(tokens_of("".join(texts)))]
    assert texts


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("words", ["crash=0", "break=0", "wait=1 break=0"])
async def test_an_engine_that_dies_before_its_first_token_is_a_refusal(asker: InferClient, words: str) -> None:
    """So that another engine can be asked as if nothing had been."""
    refused = await asker.open("n1", ask(words))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.status, refused.retry) == ("engine_lost", 503, "elsewhere")


@pytest.mark.usefixtures("node")
async def test_an_engine_that_takes_no_connection_is_a_refusal(asker: InferClient) -> None:
    """Its end is known to its pool only a little later."""
    await asker.open("n1", ask("crash=0"))
    refused = await asker.open("n1", ask(""))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.status, refused.retry) == ("engine_lost", 503, "elsewhere")


async def test_nobody_there_is_known_at_once(asker: InferClient) -> None:
    began_s = time.monotonic()
    refused = await asker.open("n1", ask(""))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.retry) == ("node_lost", "elsewhere")
    assert time.monotonic() - began_s < 2


async def test_a_node_that_is_gone_fails_all_its_answers(
    server: NatsServer, engine: FakeEngine, asker: InferClient
) -> None:
    """Within seconds, though none of its messages says so."""
    async with node_on(server, engine) as node:
        answers = [await opened(asker, "tokens=1000 rate=2") for _ in range(3)]
        await node.bus.close()
        for failed in await asyncio.wait_for(
            asyncio.gather(*(read(answer) for answer in answers), return_exceptions=True), 6
        ):
            assert isinstance(failed, AnswerFailed)
            assert (failed.refused.code, failed.refused.retry) == ("node_lost", "elsewhere")


async def test_a_node_in_a_new_life_knows_nothing_of_the_answers_of_the_last(
    server: NatsServer, engine: FakeEngine, asker: InferClient
) -> None:
    """It answers, so it is there; but what it does not know will not come."""
    async with node_on(server, engine) as old:
        lost = await opened(asker, "tokens=1000 rate=2")
        await old.bus.close()
        async with node_on(server, engine):
            kept = await opened(asker, "id=new tokens=40 rate=10")
            with pytest.raises(AnswerFailed) as failure:
                await asyncio.wait_for(read(lost), 8)
            assert failure.value.refused.code in ("stream_broken", "node_lost")
            assert tokens_of(await read(kept)) == numbered("new", 40)


@pytest.mark.parametrize("lost", [3, -1])
async def test_a_part_that_is_lost_breaks_the_answer_off(
    node: Node, asker: InferClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """One in the middle, by the number of the next; the last one, as the node has nothing more to send."""
    real = node.bus.send

    async def send(subject: str, data: bytes, **options: Any) -> None:
        gone = f'{{"seq":{lost},'.encode() in data if lost >= 0 else b'"last":true' in data
        if not gone:
            await real(subject, data, **options)

    monkeypatch.setattr(node.bus, "send", send)
    answer = await opened(asker, "tokens=60 rate=40")
    with pytest.raises(AnswerFailed) as failure:
        await asyncio.wait_for(read(answer), 10)
    assert (failure.value.refused.code, failure.value.refused.retry) == ("stream_broken", "elsewhere")
    await engine.until(running=0)


async def test_nothing_outlives_the_nats_server_that_carried_it(
    server: NatsServer, node: Node, asker: InferClient, engine: FakeEngine
) -> None:
    """The next life of the server does not know where answers go. The asker fails at once, the engine is free, and
    whoever asks again is answered."""
    answer = await opened(asker, "tokens=100000 rate=20")
    server.kill()
    await server.wait()
    with pytest.raises(AnswerFailed) as failure:
        await asyncio.wait_for(read(answer), 3)
    assert failure.value.refused.code == "stream_broken"
    await engine.until(running=0, cancelled=1)
    await server.start()
    await asyncio.wait_for(node.bus.connected.wait(), 15)
    await node.bus.flush()
    assert tokens_of(await read(await opened(asker, "id=b tokens=9"))) == numbered("b", 9)


# --- the end of a node ----------------------------------------------------------------------------------------------


async def test_a_node_that_drains_ends_its_answers_and_takes_no_new_ones(node: Node, asker: InferClient) -> None:
    """Those that end in time end as they would; the others are broken off, to be asked elsewhere."""
    short = await opened(asker, "id=short tokens=20 rate=20")
    long = await opened(asker, "tokens=1000 rate=20")
    draining = asyncio.create_task(node.door.drain(4.0))
    await asyncio.sleep(0)
    refused = await asker.open("n1", ask(""))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.status, refused.retry) == ("unavailable", 503, "elsewhere")
    assert tokens_of(await read(short)) == numbered("short", 20)
    with pytest.raises(AnswerFailed) as failure:
        await asyncio.wait_for(read(long), 10)
    assert (failure.value.refused.code, failure.value.refused.retry) == ("unavailable", "elsewhere")
    await draining


# --- the server's memory of where answers go ------------------------------------------------------------------------


async def test_a_node_that_has_nothing_to_say_says_so(
    bus: Bus, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, node: Node
) -> None:
    """Before the first token and after it, so that the server does not forget where the answer goes."""
    monkeypatch.setattr(door, "QUIET_S", 0.5)
    parts: list[InferPart] = []

    async def on_part(message: Any) -> None:
        if message.data:
            parts.append(msgspec.json.decode(message.data, type=InferPart))

    inbox = bus.new_inbox()
    await bus.listen(inbox, on_part)
    await bus.send(ASK.at("n1"), msgspec.json.encode(ask("tokens=9 hang=2 wait=3 rate=100")), reply=inbox)
    await until(lambda: sum(not part.text for part in parts if part.seq > 4) >= 2, what="signs of life")
    await engine.until(running=1)
    assert [part.seq for part in parts] == list(range(len(parts)))
    begun = next(part.seq for part in parts if part.content_type)
    assert begun >= 1
    assert all(not part.text and not part.last for part in parts[:begun])
    assert node.door.streams == 1


@pytest.mark.parametrize(("pause_s", "arrives"), [(0.5, True), (7.0, False)])
async def test_the_nats_server_forgets_where_an_answer_goes_that_is_silent_for_long(
    tmp_path: Path, *, pause_s: float, arrives: bool
) -> None:
    """Why nodes send signs of life, and an empty message at the end: seen on a server with a threshold of 2 s instead
    of its two minutes. After the empty message it forgets at once."""
    accounts = """
    accounts {
      N { users: [{user: n, password: n}]
          exports: [{service: "ask", accounts: [C], response_type: stream, threshold: "2s"}] }
      C { users: [{user: c, password: c}], imports: [{service: {account: N, subject: "ask"}}] }
    }
    """
    (tmp_path / "server.conf").write_text(accounts)
    ports = tmp_path / "ports"
    ports.mkdir()
    process = await asyncio.create_subprocess_exec(
        find_binary(), "-c", str(tmp_path / "server.conf"), "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir",
        str(ports), stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await until(lambda: list(ports.glob("*.ports")), what="the server's port")
        await asyncio.sleep(0.2)
        url = msgspec.json.decode(next(ports.glob("*.ports")).read_bytes())["nats"][0]
        node = await nats.connect(url, user="n", password="n")
        client = await nats.connect(url, user="c", password="c")
        asked, heard = await node.subscribe("ask"), await client.subscribe("answers.1")
        await node.flush()
        await client.flush()
        await client.publish("ask", b"?", reply="answers.1")
        reply = (await asked.next_msg(5)).reply
        await node.publish(reply, b"first")
        await asyncio.sleep(pause_s)
        for data in (b"second", b"", b"after the end"):
            await node.publish(reply, data)
            await node.flush()
            await asyncio.sleep(0.2)
        await client.flush()
        come = [(await heard.next_msg(1)).data for _ in range(heard.pending_msgs)]
        assert come == ([b"first", b"second", b""] if arrives else [b"first"])
        await node.close()
        await client.close()
    finally:
        process.kill()
        await process.wait()
