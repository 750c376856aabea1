"""Accounts and users on a real server: each does what it may, and the forbidden thing is tried for each.

Method: one server with the streams and buckets of a mesh, plain connections as every role and as two nodes,
and no services, so that nothing but the server decides. What is allowed is read from the contracts here once
more, not asked from the code that makes the configuration.
"""

# nats-py is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import nats
import nats.errors
import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg

from computemesh.bus import Bus, MicroService, Where
from computemesh.bus.provision import provision
from computemesh.contracts import nodes, storage, work
from computemesh.contracts.base import Event, Refused, Request, Role, encode, serve
from computemesh.contracts.catalog import events, requests
from computemesh.contracts.permissions import inbox_prefix
from computemesh.nats_server import NatsServer
from computemesh.testing import running_server, until
from computemesh.testing.server import bare_server

WAIT_S: Final = 10.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


class User:
    """A plain connection, and what the server refused it."""

    def __init__(self, nc: Client, name: str, refusals: list[str]) -> None:
        self.nc = nc
        self.name = name
        self.role = Role.NODE if name in ("n1", "n2") else Role(name)
        self.node_id = name if self.role is Role.NODE else ""
        self._refusals = refusals

    async def settled(self) -> None:
        """Returns once the server has processed what was sent; the first ping of nats-py may overtake it."""
        await self.nc.flush()
        await self.nc.flush()

    async def refused(self) -> set[str]:
        """The subjects that the server refused since the last call, in lower case, as nats-py gives them."""
        await self.settled()
        found = {match[1] for text in self._refusals if (match := re.search(r'"(.*?)"', text))}
        assert len(found) == len(self._refusals), self._refusals
        self._refusals.clear()
        return found


async def connect(url: str, name: str) -> User:
    refusals: list[str] = []

    async def keep(error: Exception) -> None:
        refusals.append(str(error))

    role, node_id = (Role.NODE, name) if name in ("n1", "n2") else (Role(name), "")
    nc = await nats.connect(url, inbox_prefix=inbox_prefix(role, node_id), error_cb=keep, allow_reconnect=False)
    return User(nc, name, refusals)


Everyone = dict[str, User]
"""Every user, by name."""

NAMES: Final = ("services", "client", "observer", "n1", "n2")
OUTSIDERS: Final = NAMES[1:]


def role_of(name: str) -> Role:
    return Role.NODE if name in ("n1", "n2") else Role(name)


@asynccontextmanager
async def everyone_on(urls: dict[str, str]) -> AsyncGenerator[Everyone]:
    """Connections to a server on which the streams and buckets are made."""
    bus = Bus(Where(url=urls["services"], role=Role.SERVICES, name="test"))
    await bus.connect(timeout_s=WAIT_S)
    await provision(bus)
    await bus.close()
    found = {name: await connect(url, name) for name, url in urls.items()}
    try:
        yield found
    finally:
        for user in found.values():
            await user.nc.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[NatsServer]:
    folder: Path = tmp_path_factory.mktemp("accounts")
    async with running_server(folder, nodes=("n1", "n2")) as running:
        yield running


def urls_of(server: NatsServer) -> dict[str, str]:
    return {name: server.url(role_of(name), name if role_of(name) is Role.NODE else "") for name in NAMES}


@pytest_asyncio.fixture(loop_scope="module")
async def everyone(server: NatsServer) -> AsyncGenerator[Everyone]:
    async with everyone_on(urls_of(server)) as found:
        yield found


# --- what the contracts say --------------------------------------------------------------------------------------


def addresses(contract: Event[Any] | Request[Any, Any]) -> list[tuple[str, str]]:
    """Subjects of a contract, and the node that each names, if any."""
    if contract.target == "node_id":
        return [(contract.at(node), node) for node in ("n1", "n2")]
    return [(contract.at("w-1" if contract.target else ""), "")]


ALL: Final[list[Event[Any] | Request[Any, Any]]] = [*events(), *requests()]
CONTRACTS: Final = [(contract, subject, node) for contract in ALL for subject, node in addresses(contract)]

DISCOVERY: Final = ("$SRV.PING", "$SRV.INFO.name", "$SRV.STATS.name.id")
STORE: Final = (
    "$JS.API.INFO",
    "$JS.API.STREAM.MSG.GET.NONE",
    "$JS.ACK.a.b.1.1.1.1.0",
    "$JS.FC.a.b",
    "$KV.none.x",
    "$O.none.C.x",
)
INBOXES: Final = {
    "services": "_INBOX_services.x",
    "client": "_INBOX.x",
    "observer": "_INBOX_observer.x",
    "n1": "_INBOX_node.n1.x",
    "n2": "_INBOX_node.n2.x",
}
NOBODYS: Final = (
    "$SYS.REQ.SERVER.PING",
    "$SYS.REQ.ACCOUNT.MESH.INFO",
    "$SRV.OTHER",
    "compute.work.other.v1",
    "x",
    "_INBOX_node.x",
    "_INBOX_other.x",
)


def may_publish(name: str) -> set[str]:
    """Subjects of these tests that a user may publish to."""
    role, found = role_of(name), set[str]()
    for contract, subject, node in CONTRACTS:
        speakers = contract.sent_by if isinstance(contract, Event) else contract.asked_by
        if role in speakers and (role is not Role.NODE or node in ("", name)):
            found.add(subject)
    if role is not Role.NODE:
        found |= set(DISCOVERY)
    if role is Role.SERVICES:
        found |= set(STORE)
    if role in (Role.SERVICES, Role.NODE):
        found |= {INBOXES[name], "_R_.a.b"}
    return found


def may_hear(name: str) -> set[str]:
    """Subjects of these tests that a user may subscribe to."""
    role, found = role_of(name), {INBOXES[name]}
    for contract, subject, node in CONTRACTS:
        if isinstance(contract, Event):
            hears = role in contract.read_by
        else:
            hears = role is contract.answered_by and (role is not Role.NODE or node in ("", name))
        if hears:
            found.add(subject)
    if role in (Role.SERVICES, Role.NODE):
        found |= set(DISCOVERY)
    return found


EVERY_SUBJECT: Final = {
    *(subject for _, subject, _ in CONTRACTS), *DISCOVERY, *STORE, *INBOXES.values(), *NOBODYS, "_R_.a.b"
}  # fmt: skip
WIDE: Final = (
    *(">", "*", "compute.>", "compute.*.*.*", "$JS.>", "$KV.>", "$O.>", "$SYS.>", "$SRV.>", "_R_.>"),
    *("_INBOX_node.>", "_INBOX_node.*.>"),
)
"""Subscriptions that would reach further than anybody may."""


def lower(subjects: set[str]) -> set[str]:
    return {subject.lower() for subject in subjects}


# --- the matrix --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_a_user_publishes_what_the_contracts_let_it_and_nothing_else(everyone: Everyone, name: str) -> None:
    """Every subject of every contract, the store, the system, and everyone's inbox."""
    user = everyone[name]
    for subject in sorted(EVERY_SUBJECT):
        await user.nc.publish(subject, b"{}")
    assert await user.refused() == lower(EVERY_SUBJECT - may_publish(name))


@pytest.mark.parametrize("name", NAMES)
async def test_a_user_hears_what_the_contracts_let_it_and_nothing_else(everyone: Everyone, name: str) -> None:
    """The same subjects, and wildcards that would reach further."""
    user = everyone[name]
    for subject in sorted({*EVERY_SUBJECT, *WIDE}):
        await user.nc.subscribe(subject)
    assert await user.refused() == lower({*EVERY_SUBJECT, *WIDE} - may_hear(name))


@pytest.mark.parametrize("name", OUTSIDERS)
async def test_outside_the_services_there_is_no_jetstream(everyone: Everyone, name: str) -> None:
    """Not even a question about it is answered."""
    with pytest.raises(nats.errors.TimeoutError):
        await everyone[name].nc.request("$JS.API.INFO", b"", timeout=0.2)
    assert await everyone[name].refused() == {"$js.api.info"}


async def test_nobody_has_the_system_account(server: NatsServer) -> None:
    """It has no user; with its name alone one does not get in."""
    for login in ("sys:sys", "$SYS:", "admin:changeit"):
        with pytest.raises(nats.errors.Error, match=r"(?i)authorization violation"):
            await nats.connect(f"nats://{login}@127.0.0.1:{server.port}", allow_reconnect=False, error_cb=_ignore)


async def _ignore(_error: Exception) -> None:
    pass


# --- what is allowed arrives -------------------------------------------------------------------------------------


class Listener:
    """What some users heard on a subject."""

    def __init__(self) -> None:
        self.heard: dict[str, list[bytes]] = {}

    async def add(self, user: User, subject: str) -> None:
        mine = self.heard.setdefault(user.name, [])

        async def keep(message: Msg) -> None:
            mine.append(message.data)

        await user.nc.subscribe(subject, cb=keep)
        await user.settled()


def readers_of(event: Event[Any]) -> list[str]:
    return [name for name in NAMES if role_of(name) in event.read_by]


SENT: Final = [
    (event, sender) for event in events() for sender in NAMES if role_of(sender) in event.sent_by and sender != "n2"
]


@pytest.mark.parametrize(("event", "sender"), SENT, ids=lambda it: it if isinstance(it, str) else it.subject)
async def test_an_event_reaches_each_of_its_readers_once(everyone: Everyone, event: Event[Any], sender: str) -> None:
    """Across accounts and within one, whoever of several senders it comes from."""
    subject = event.at(("n1" if event.target == "node_id" else "w-1") if event.target else "")
    listener = Listener()
    for name in readers_of(event):
        await listener.add(everyone[name], subject)
    for data in (b"first", b"last"):
        await everyone[sender].nc.publish(subject, data)
    await until(lambda: all(b"last" in heard for heard in listener.heard.values()), what="everyone to hear it")
    assert listener.heard == {name: [b"first", b"last"] for name in readers_of(event)}


async def test_the_recorded_state_reaches_each_of_its_readers_once(everyone: Everyone) -> None:
    """The server itself publishes it, from the services' account."""
    listener = Listener()
    for name in readers_of(work.STATE):
        await listener.add(everyone[name], work.STATE.at("*"))
    for data in (b"first", b"last"):
        await everyone["services"].nc.request(storage.WORK.subject("w-state"), data, timeout=WAIT_S)
    await until(lambda: all(b"last" in heard for heard in listener.heard.values()), what="everyone to hear it")
    assert listener.heard == {name: [b"first", b"last"] for name in NAMES}


ASKED: Final = [
    (request, asker)
    for request in requests()
    for asker in NAMES
    if role_of(asker) in request.asked_by and asker != "n2"
]


@pytest.mark.parametrize(("request_", "asker"), ASKED, ids=lambda it: it if isinstance(it, str) else it.subject)
async def test_a_request_is_answered_and_one_that_nobody_hears_is_told_so(
    everyone: Everyone, request_: Request[Any, Any], asker: str
) -> None:
    """Both at once, not after a timeout."""
    subject = request_.at("n1" if request_.target else "")
    with pytest.raises(nats.errors.NoRespondersError):
        await everyone[asker].nc.request(subject, b"question", timeout=WAIT_S)
    answerer = everyone["n1" if request_.answered_by is Role.NODE else "services"]

    async def answer(message: Msg) -> None:
        await message.respond(b"answer to " + message.data)

    await answerer.nc.subscribe(subject, cb=answer)
    await answerer.settled()
    assert (await everyone[asker].nc.request(subject, b"question", timeout=WAIT_S)).data == b"answer to question"
    assert await answerer.refused() == set()


CAPTURED: Final = [(event, name) for event, name in SENT if event.captured]


@pytest.mark.parametrize(("event", "sender"), CAPTURED, ids=lambda it: it if isinstance(it, str) else it.subject)
async def test_a_captured_event_is_acknowledged_by_the_store(
    everyone: Everyone, event: Event[Any], sender: str
) -> None:
    """An ordinary JetStream publish of an ordinary NATS library, from every account."""
    ack = await everyone[sender].nc.jetstream().publish(event.subject, b"{}")
    kept = await everyone["services"].nc.jetstream().get_msg(storage.WORK_INBOX.name, ack.seq)
    assert (ack.stream, kept.subject, kept.data) == (storage.WORK_INBOX.name, event.subject, b"{}")


@pytest.mark.parametrize("name", ["services", "client", "observer"])
async def test_discovery_finds_services_and_nodes(everyone: Everyone, name: str) -> None:
    """One question, an answer from each."""
    for answerer in ("services", "n1", "n2"):
        user = everyone[answerer]

        async def answer(message: Msg, *, said: bytes = answerer.encode()) -> None:
            await message.respond(said)

        await user.nc.subscribe("$SRV.PING", cb=answer)
        await user.settled()
    found: list[bytes] = []

    async def keep(message: Msg) -> None:
        found.append(message.data)

    inbox = everyone[name].nc.new_inbox()
    await everyone[name].nc.subscribe(inbox, cb=keep)
    await everyone[name].nc.publish("$SRV.PING", b"", reply=inbox)
    await until(lambda: sorted(found) == [b"n1", b"n2", b"services"], what="three answers")


# --- reply subjects ----------------------------------------------------------------------------------------------

TARGETS: Final = (
    storage.WORK.subject("x"),
    storage.NODES.subject("x"),
    "$JS.API.STREAM.DELETE.COMPUTE_WORK",
    work.CANCEL.subject,
    work.COMPLETED.subject,
    work.STATE.at("w-1"),
    work.DELIVER.at("n2"),
)
"""Where an outsider would like to have an answer written."""


async def careless_service(user: User) -> None:
    """Answers wherever it is asked to."""

    async def answer(message: Msg) -> None:
        if message.reply:
            await message.respond(b'{"work_id": "x", "attempt": 1}')

    await user.nc.subscribe(work.GET.subject, cb=answer)
    await user.settled()


BARRIER: Final = "barrier"


async def kept_in(admin: User) -> dict[str, int]:
    """How much the store holds under each subject."""
    found: dict[str, int] = {}
    for stream in (storage.WORK.stream, storage.NODES.stream, storage.WORK_INBOX.name):
        asked = await admin.nc.request(f"$JS.API.STREAM.INFO.{stream}", b'{"subjects_filter": ">"}', timeout=WAIT_S)
        found |= json.loads(asked.data)["state"].get("subjects") or {}
    return {subject: count for subject, count in found.items() if not subject.endswith(f".{BARRIER}")}


async def attack(user: User, target: str, admin: User) -> dict[str, int]:
    """Publishes with *target* as the reply subject all that makes the server or a service answer.

    What came of it is stored when this returns, for the same ways are gone once more, with proper replies.

    Returns:
        How many messages of its own it had stored, by subject.
    """
    mine: dict[str, int] = {}
    for event, name in CAPTURED:
        if name == user.name:
            await user.nc.publish(event.subject, b"{}", reply=target)
            await user.nc.jetstream().publish(event.subject, b"{}")
            mine[event.subject] = 2
    await user.nc.publish(work.GET.subject, b"{}", reply=target)
    await user.nc.request(work.GET.subject, b"{}", timeout=WAIT_S)
    for bucket in (storage.WORK, storage.NODES):
        await admin.nc.request(bucket.subject(BARRIER), b"{}", timeout=WAIT_S)
    return mine


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["client", "observer", "n1"])
async def test_no_answer_is_written_into_the_store_for_an_outsider(everyone: Everyone, name: str, target: str) -> None:
    """Neither the server's acknowledgement nor a service's reply: its own account confines them."""
    await careless_service(everyone["services"])
    before = await kept_in(everyone["services"])
    heard = Listener()
    for other in NAMES:
        if target in may_hear(other) and role_of(other) is not role_of(name):
            await heard.add(everyone[other], target)
    stored = await attack(everyone[name], target, everyone["services"])
    after = await kept_in(everyone["services"])
    # What it may send itself it may also have sent as an answer.
    reached = {target} if target in may_publish(name) else set[str]()
    for subject in sorted({*before, *after} - reached):
        assert after.get(subject, 0) == before.get(subject, 0) + stored.get(subject, 0), subject
    for other in NAMES:
        await everyone[other].settled()
    if not reached:
        assert not any(heard.heard.values())


async def test_without_accounts_the_attack_would_succeed(tmp_path: Path) -> None:
    """Guards the test above: on a server with one account for all, the acknowledgement becomes a record."""
    async with bare_server(tmp_path) as url, everyone_on(dict.fromkeys(NAMES, url)) as found:
        await careless_service(found["services"])
        for target in (storage.WORK.subject("x"), storage.NODES.subject("x")):
            await attack(found["client"], target, found["services"])
            assert target in await kept_in(found["services"])


async def test_nobody_names_a_reply_that_the_server_makes(everyone: Everyone) -> None:
    """Or it could take the place of somebody's answer."""
    await everyone["client"].nc.publish(work.GET.subject, b"{}", reply="_R_.abc.def")
    assert await everyone["client"].refused() == {"_r_.abc.def"}


async def test_a_node_that_asks_itself_gets_no_leave_to_publish_elsewhere(everyone: Everyone) -> None:
    """With leave to respond it could name any subject as the reply, and publish there."""
    node, other = everyone["n1"], everyone["n2"]
    listener = Listener()
    await listener.add(other, work.STOP.at("n2"))
    own = "compute.resources.get.v1.n1"
    await node.nc.subscribe(own)
    await node.nc.publish(own, b"", reply=work.STOP.at("n2"))
    await node.settled()
    await node.nc.publish(work.STOP.at("n2"), b'{"work_id": "w", "attempt": 1}')
    assert await node.refused() == {work.STOP.at("n2")}
    await other.settled()
    assert listener.heard == {"n2": []}


async def test_a_node_cannot_have_a_service_stop_another_nodes_work(server: NatsServer, everyone: Everyone) -> None:
    """An answer delivered in the place of a request is recognised: it wants no answer."""
    await careless_service(everyone["services"])
    stopped: list[str] = []

    async def on_stop(asked: work.WorkStop) -> work.Stopped | Refused:
        stopped.append(asked.work_id)
        return work.Stopped(was_running=True)

    bus = Bus(Where(url=server.url(Role.NODE, "n2"), role=Role.NODE, name="n2"))
    await bus.connect(timeout_s=WAIT_S)
    try:
        agent = MicroService(bus, name="agent", description="", metadata={})
        await agent.start([serve(work.STOP, on_stop, target="n2")])
        await bus.flush()
        seen = await everyone["n2"].nc.subscribe(work.STOP.at("n2"))
        await everyone["n2"].settled()
        await everyone["n1"].nc.publish(work.GET.subject, b"{}", reply=work.STOP.at("n2"))
        assert b'"work_id": "x"' in (await seen.next_msg(timeout=WAIT_S)).data
        real = encode(work.WorkStop(work_id="real", attempt=1))
        await everyone["services"].nc.request(work.STOP.at("n2"), real, timeout=WAIT_S)
        assert stopped == ["real"]
    finally:
        await bus.close()


async def test_a_node_registers_with_nothing_but_an_address(everyone: Everyone, server: NatsServer) -> None:
    """A plain program, the default inbox and all: announce, hear work, report."""
    plain = await nats.connect(server.url(Role.NODE, "n1"))
    try:
        mine = await plain.subscribe(work.ASSIGNED.subject)
        await plain.flush()
        await plain.flush()
        announced = await everyone["services"].nc.subscribe(nodes.ANNOUNCE.subject)
        reports = await everyone["services"].nc.subscribe(work.COMPLETED.subject)
        await everyone["services"].settled()
        await plain.publish(nodes.ANNOUNCE.subject, b'{"node_id": "n1"}')
        assert (await announced.next_msg(timeout=WAIT_S)).data == b'{"node_id": "n1"}'
        await everyone["services"].nc.publish(work.ASSIGNED.subject, b'{"work_id": "w"}')
        assert (await mine.next_msg(timeout=WAIT_S)).data == b'{"work_id": "w"}'
        await plain.publish(work.COMPLETED.subject, b'{"work_id": "w"}')
        assert (await reports.next_msg(timeout=WAIT_S)).data == b'{"work_id": "w"}'
    finally:
        await plain.close()


async def test_a_quick_succession_of_requests_gets_the_right_answers(everyone: Everyone) -> None:
    """Replies find their way back across accounts, each to its own request."""

    async def echo(message: Msg) -> None:
        await message.respond(message.data)

    await everyone["services"].nc.subscribe(work.LIST.subject, cb=echo)
    await everyone["services"].settled()
    asked = [
        (name, f"{name} {number}".encode()) for number in range(200) for name in ("client", "observer", "n1", "n2")
    ]
    answers = await asyncio.gather(
        *(everyone[name].nc.request(work.LIST.subject, data, timeout=WAIT_S) for name, data in asked)
    )
    assert [answer.data for answer in answers] == [data for _, data in asked]
