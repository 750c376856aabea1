"""Who may connect: nodes invited and revoked while a mesh runs, and NATS servers that somebody else runs.

Method: real servers and the real command line, each test with a home of its own.
"""

# nats-py is typed in part only.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import httpx
import nats
import nats.errors
import nats.js.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from computemesh.contracts import storage, work
from computemesh.contracts.base import Role
from computemesh.nats_server import (
    Credentials,
    NatsServer,
    add_node,
    admit_node,
    expel_node,
    load_or_create,
    render_accounts,
)
from computemesh.testing import running_server, until
from computemesh.testing.server import bare_server

WAIT_S: Final = 10.0


class Cli:
    """The command line with one home, in the background of a test's own connections."""

    def __init__(self, home: Path) -> None:
        self.home = home

    async def run(self, *words: str, **changes: str) -> tuple[int, str, str]:
        """Exit status, output and errors of one command."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NATS_", "COMPUTEMESH"))}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "computemesh.cli", *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**inherited, "COMPUTEMESH_HOME": str(self.home), "COMPUTEMESH_MODELS": "/nowhere", **changes},
        )
        async with asyncio.timeout(90):
            out, err = await process.communicate()
        assert process.returncode is not None
        assert b"Traceback" not in err, err.decode()
        return process.returncode, out.decode(), err.decode()

    async def ok(self, *words: str, **changes: str) -> str:
        status, out, err = await self.run(*words, **changes)
        assert status == 0, f"{words}: {status}\n{out}\n{err}"
        return out

    async def json(self, *words: str, **changes: str) -> Any:
        return json.loads(await self.ok(*words, "--json", **changes))

    async def fails(self, *words: str, **changes: str) -> str:
        status, out, err = await self.run(*words, **changes)
        assert (status, out) == (2, ""), f"{words}: {status}\n{out}\n{err}"
        return err

    async def up(self, **changes: str) -> str:
        return await self.ok("up", "--detach", "--ports", "any", "--nats-port", "0", "--no-demo", **changes)


@pytest.fixture
async def cli(tmp_path: Path) -> AsyncGenerator[Cli]:
    """A home without a mesh."""
    fresh = Cli(tmp_path / "home")
    yield fresh
    if fresh.home.exists():
        await fresh.run("down")


async def connect(url: str, inbox_prefix: str = "_INBOX") -> Client:
    return await nats.connect(url, inbox_prefix=inbox_prefix, allow_reconnect=False, error_cb=_ignore)


async def _ignore(_error: Exception) -> None:
    pass


async def settled(nc: Client) -> None:
    """Returns once the server has processed what was sent; the first ping of nats-py may overtake it."""
    await nc.flush()
    await nc.flush()


async def closed(nc: Client) -> None:
    """Returns once the server has closed the connection."""
    await until(lambda: nc.is_closed, what="the server to close a connection")


async def refused(url: str) -> bool:
    """Whether the server does not take the credentials in *url*."""
    try:
        await (await connect(url)).close()
    except nats.errors.Error as error:
        if "authorization violation" not in str(error).lower():
            raise
        return True
    return False


# --- a server that runs ------------------------------------------------------------------------------------------


async def test_a_node_is_admitted_and_expelled_while_the_others_work_on(tmp_path: Path) -> None:
    """Nobody else loses a connection, a subscription, or the answer to a request that is under way.

    At the very moment of a change a request may be told that nobody answers; it is not left waiting.
    """
    async with running_server(tmp_path, nodes=("n1",)) as server:
        folder, file = server.folder, tmp_path / "credentials.json"
        services, client = (
            await connect(server.url(Role.SERVICES), "_INBOX_services"),
            await connect(server.url(Role.CLIENT)),
        )
        node = await connect(server.url(Role.NODE, "n1"), "_INBOX_node.n1")
        await services.jetstream().add_stream(name=storage.WORK_INBOX.name, subjects=list(storage.WORK_INBOX.subjects))

        async def echo(message: Msg) -> None:
            await message.respond(message.data)

        await services.subscribe(work.GET.subject, cb=echo)
        await node.subscribe(work.DELIVER.at("n1"), cb=echo)
        await settled(services)
        await settled(node)
        done = asyncio.Event()
        acknowledged: list[int] = []
        counts = {"asked": 0, "delivered": 0, "stored": 0}

        async def repeat(what: str, once: Callable[[], Awaitable[bytes]]) -> None:
            while not done.is_set():
                # For some microseconds of a change the server knows no subject of another account.
                with contextlib.suppress(nats.errors.NoRespondersError, nats.js.errors.NoStreamResponseError):
                    assert await once() == b"{}"
                    counts[what] += 1

        async def ask() -> bytes:
            return (await client.request(work.GET.subject, b"{}", timeout=WAIT_S)).data

        async def deliver() -> bytes:
            return (await services.request(work.DELIVER.at("n1"), b"{}", timeout=WAIT_S)).data

        async def submit() -> bytes:
            stored = await client.jetstream().publish(work.SUBMIT.subject, b"{}", timeout=WAIT_S)
            acknowledged.append(stored.seq)
            return b"{}"

        async def change() -> None:
            for number in range(10):
                before = dict(counts)
                await admit_node(folder, file, f"new-{number}")
                url = server.url(Role.NODE, f"new-{number}")
                newcomer = await connect(url, f"_INBOX_node.new-{number}")
                await newcomer.subscribe(work.DELIVER.at(f"new-{number}"), cb=echo)
                await settled(newcomer)
                subject = work.DELIVER.at(f"new-{number}")
                assert (await services.request(subject, b"hello", timeout=WAIT_S)).data == b"hello"
                assert await expel_node(folder, file, f"new-{number}")
                await closed(newcomer)
                assert await refused(url)
                while any(counts[key] <= before[key] for key in counts):
                    await asyncio.sleep(0.01)
            done.set()

        await asyncio.gather(repeat("asked", ask), repeat("delivered", deliver), repeat("stored", submit), change())
        assert all(nc.is_connected for nc in (services, client, node))
        assert acknowledged == list(range(1, len(acknowledged) + 1))
        for nc in (services, client, node):
            await nc.close()


async def test_users_outlive_the_server(tmp_path: Path) -> None:
    """Who was invited, or expelled, before a crash or while no server ran, still is afterwards."""
    file = tmp_path / "credentials.json"
    async with running_server(tmp_path) as server:
        await admit_node(server.folder, file, "kept")
        await admit_node(server.folder, file, "gone")
        gone = server.url(Role.NODE, "gone")
        await expel_node(server.folder, file, "gone")
        server.kill()
        await server.wait()
        await admit_node(server.folder, file, "late")
        await server.start()
        for node_id in ("kept", "late"):
            await (await connect(server.url(Role.NODE, node_id))).close()
        assert await refused(gone)
    assert not await expel_node(server.folder, file, "gone")


async def test_a_node_that_is_invited_while_the_server_starts_is_admitted(tmp_path: Path) -> None:
    """Whichever state of the users the server read first."""
    file = tmp_path / "credentials.json"
    server = NatsServer(tmp_path / "nats", file)
    for number in range(5):
        starting = asyncio.create_task(server.start())
        await asyncio.sleep(0.01 * number)
        await admit_node(server.folder, file, f"n{number}")
        await starting
        await (await connect(server.url(Role.NODE, f"n{number}"))).close()
        await server.stop()


async def test_an_invitation_leaves_no_refusal_in_the_log_of_the_server(tmp_path: Path) -> None:
    """Where the doctor would read of a program with wrong credentials."""
    async with running_server(tmp_path) as server:
        for number in range(10):
            await admit_node(server.folder, tmp_path / "credentials.json", f"n{number}")
            await (await connect(server.url(Role.NODE, f"n{number}"))).close()
        assert "authentication error" not in server.log_file.read_text()


async def test_the_file_with_the_accounts_is_its_owners_alone(tmp_path: Path) -> None:
    """It holds every password, also after a change."""
    async with running_server(tmp_path) as server:
        await admit_node(server.folder, tmp_path / "credentials.json", "n1")
        assert stat.S_IMODE((server.folder / "accounts.conf").stat().st_mode) == 0o600


# --- the command line --------------------------------------------------------------------------------------------


async def test_an_invited_node_has_all_it_needs_until_it_is_revoked(cli: Cli) -> None:
    """What invite prints is enough for an ordinary NATS program; revoke closes its connection."""
    await cli.up()
    needs = await cli.json("nodes", "invite", "gpu-7")
    assert needs["COMPUTEMESH_NODE_ID"] == "gpu-7"
    assert await cli.json("nodes", "invite", "gpu-7") == needs
    assert (await cli.json("env", "--role", "node", "--node", "gpu-7"))["NATS_URL"] == needs["NATS_URL"]
    node = await connect(needs["NATS_URL"], needs["NATS_INBOX_PREFIX"])
    registered = await node.request("compute.nodes.register.v1", b'{"node_id": "gpu-7"}', timeout=WAIT_S)
    assert json.loads(registered.data)["state"] == "online"
    assert "gpu-7" in await cli.ok("nodes")
    assert await cli.ok("nodes", "revoke", "gpu-7") == "Node gpu-7 may connect no more.\n"
    await closed(node)
    assert await refused(needs["NATS_URL"])
    own = (await cli.json("status"))["node_id"]
    for words, said in (
        (("nodes", "revoke", "gpu-7"), f"no node gpu-7 was invited; those that were: {own}"),
        (("nodes", "revoke", own), f"{own} is this machine's own node"),
        (("nodes", "invite", "a.b"), "'a.b' is no node id"),
        (("nodes", "invite", "a", "--url", "http://u:p@h"), "is no address of a server: write nats://HOST:PORT"),
        (("env", "--role", "node", "--node", "gpu-7"), "`computemesh nodes invite gpu-7` does that"),
        (("env", "--node", "gpu-7"), "--node goes with --role node"),
    ):
        assert said in await cli.fails(*words)


async def test_many_may_invite_at_the_same_time(cli: Cli) -> None:
    """Every one of them is told only once its node can connect, and none overwrites another's."""
    await cli.up()
    names = [f"n{number}" for number in range(4)]
    invited = await asyncio.gather(*(cli.json("nodes", "invite", name) for name in names))
    for needs in invited:
        await (await connect(needs["NATS_URL"])).close()
    assert set(names) <= load_or_create(cli.home / "credentials.json").nodes.keys()


async def test_spoiled_credentials_are_an_error_that_names_the_file(cli: Cli) -> None:
    """Whatever needs them says so, and how to go on."""
    cli.home.mkdir()
    (cli.home / "credentials.json").write_text("{}")
    for words in (("up",), ("nodes", "invite", "a", "--url", "h"), ("nodes", "revoke", "a"), ("nats-config",)):
        assert "credentials.json holds no credentials" in await cli.fails(*words)


# --- servers that somebody else runs -----------------------------------------------------------------------------


async def test_a_mesh_runs_on_an_external_server_with_the_printed_configuration(cli: Cli, tmp_path: Path) -> None:
    """Accounts, users and permissions are those of the embedded one; each role uses its own address."""
    await cli.ok("nodes", "invite", "here", "--url", "127.0.0.1")
    config = tmp_path / "accounts.conf"
    config.write_text(await cli.ok("nats-config"))
    async with bare_server(tmp_path, "-c", str(config)) as url:
        urls = exported(await cli.ok("nats-config", "--urls", url))
        await cli.up(**urls)
        status = await cli.json("status")
        assert (status["embedded"], status["ready"], status["node_id"]) == (False, True, "here")
        client = await connect((await cli.json("env"))["NATS_URL"])
        ack = await client.jetstream().publish(work.SUBMIT.subject, b'{"work_id": "w-1", "work_type": "inference"}')
        assert ack.stream == storage.WORK_INBOX.name
        await client.publish(work.SUBMIT.subject, b"{}", reply=storage.WORK.subject("x"))
        inventory = await client.request("compute.resources.get.v1.here", b"{}", timeout=WAIT_S)
        assert json.loads(inventory.data)["node_id"] == "here"
        assert (await cli.json("work", "show", "w-1"))["state"] == "pending"
        assert not not_permitted(cli.home)
        await client.close()

        # A node more: the operator takes the new configuration over.
        status_, out, err = await cli.run("nodes", "invite", "there", "--json")
        assert (status_, "give it what `computemesh nats-config` prints" in err) == (0, True)
        needs = json.loads(out)
        assert await refused(needs["NATS_URL"])
        config.write_text(await cli.ok("nats-config"))
        os.kill(pid_of(tmp_path), signal.SIGHUP)
        async with asyncio.timeout(WAIT_S):
            while await refused(needs["NATS_URL"]):
                await asyncio.sleep(0.05)
        assert (await cli.json("status"))["ready"]
        await cli.ok("down")


async def test_a_mesh_runs_on_an_external_server_without_accounts(cli: Cli, tmp_path: Path) -> None:
    """There everyone may do everything; services still answer only into inboxes."""
    async with bare_server(tmp_path) as url:
        await cli.up(NATS_URL=url)
        nc = await connect(url)
        assert set((await cli.json("env")).items()) >= {("NATS_URL", url), ("NATS_INBOX_PREFIX", "_INBOX")}
        env = await cli.json("env", "--role", "node")
        await nc.subscribe("compute.work.assigned.v1", cb=_worker(nc))
        await settled(nc)
        async with httpx.AsyncClient() as http:
            said = {"node_id": "plain", "work_types": ["echo"]}
            answer = await http.post(f"{env['NODE_REGISTRY_URL']}/api/v1/nodes/register", json=said)
            assert answer.status_code == 200, answer.text
        states = await nc.subscribe(work.STATE.at("w-1"))
        await settled(nc)
        await nc.jetstream().publish(
            work.SUBMIT.subject, b'{"work_id": "w-1", "work_type": "echo", "payload": {"a": 1}}'
        )
        state = ""
        async with asyncio.timeout(WAIT_S):
            while state != "completed":
                state = json.loads((await states.next_msg(timeout=WAIT_S)).data)["state"]
        await nc.publish(work.GET.subject, b'{"work_id": "w-1"}', reply=storage.WORK.subject("evil"))
        log = cli.home / "logs" / "work-marshaller.log"
        await until(lambda: "the reply subject is no inbox" in log.read_text(), what="the marshaller to see through it")
        found = await nc.request(f"$JS.API.STREAM.INFO.{storage.WORK.stream}", b'{"subjects_filter": ">"}')
        assert storage.WORK.subject("evil") not in json.loads(found.data)["state"]["subjects"]
        assert not not_permitted(cli.home)
        await nc.close()
        await cli.ok("down")


def _worker(nc: Client) -> Any:
    async def on_work(message: Msg) -> None:
        item = json.loads(message.data)
        report = {"work_id": item["work_id"], "result": item["payload"]}
        await nc.publish("compute.work.completed.v1", json.dumps(report).encode())

    return on_work


async def test_up_refuses_addresses_that_do_not_fit_together(cli: Cli) -> None:
    """It says which one, before anything starts."""
    node = "nats://node-x:secret@127.0.0.1:1"
    said = await cli.fails("up", COMPUTEMESH_NATS_URL_NODE=node)
    assert "COMPUTEMESH_NATS_URL_SERVICES is not set, and NATS_URL neither" in said
    said = await cli.fails("up", NATS_URL="nats://127.0.0.1:1", COMPUTEMESH_NATS_URL_NODE=node, COMPUTEMESH_NODE_ID="z")
    assert "COMPUTEMESH_NODE_ID is z, but the address of the bus has the user of x" in said


async def test_a_cluster_has_the_accounts_on_every_server(tmp_path: Path) -> None:
    """Requests, stored events and their acknowledgements cross accounts and servers alike."""
    credentials: Credentials = add_node(tmp_path / "credentials.json", "n1")
    names = ("a", "b", "c")
    ports = await _free_ports(3)
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    for name, port in zip(names, ports, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "accounts.conf").write_text(render_accounts(credentials))
        (tmp_path / name / "nats.conf").write_text(
            f'server_name: {name}\ncluster {{ name: c, listen: "127.0.0.1:{port}", routes: [{routes}] }}\n'
            'include "accounts.conf"\n'
        )
    async with (
        bare_server(tmp_path / "a", "-c", str(tmp_path / "a" / "nats.conf")) as a,
        bare_server(tmp_path / "b", "-c", str(tmp_path / "b" / "nats.conf")) as b,
        bare_server(tmp_path / "c", "-c", str(tmp_path / "c" / "nats.conf")) as c,
    ):
        services = await connect(_as(a, credentials.login(Role.SERVICES)), "_INBOX_services")
        client = await connect(_as(b, credentials.login(Role.CLIENT)))
        node = await connect(_as(c, credentials.login(Role.NODE, "n1")), "_INBOX_node.n1")
        js = services.jetstream(timeout=1)
        async with asyncio.timeout(60):
            while True:  # Until the cluster has elected a leader.
                try:
                    await js.add_stream(
                        name=storage.WORK_INBOX.name, subjects=list(storage.WORK_INBOX.subjects), num_replicas=3
                    )
                    break
                except (nats.errors.Error, TimeoutError):
                    await asyncio.sleep(0.1)

        async def echo(message: Msg) -> None:
            await message.respond(message.data)

        await services.subscribe(work.GET.subject, cb=echo)
        await node.subscribe(work.DELIVER.at("n1"), cb=echo)
        await settled(services)
        await settled(node)
        for asker, subject in (
            (client, work.GET.subject),
            (node, work.GET.subject),
            (services, work.DELIVER.at("n1")),
        ):
            assert await _answered(asker, subject) == b"question"
        assert (await client.jetstream().publish(work.SUBMIT.subject, b"{}", timeout=WAIT_S)).seq == 1
        assert (await node.jetstream().publish(work.COMPLETED.subject, b"{}", timeout=WAIT_S)).seq == 2
        for nc in (services, client, node):
            await nc.close()


async def _answered(asker: Client, subject: str) -> bytes:
    """The answer, once the servers have told each other of the subscription."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return (await asker.request(subject, b"question", timeout=WAIT_S)).data
            except nats.errors.NoRespondersError:
                await asyncio.sleep(0.05)


async def _free_ports(count: int) -> list[int]:
    held = [await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0) for _ in range(count)]
    ports = [server.sockets[0].getsockname()[1] for server in held]
    for server in held:
        server.close()
        await server.wait_closed()
    return ports


def _as(url: str, login: str) -> str:
    return url.replace("://", f"://{login}@")


def exported(text: str) -> dict[str, str]:
    """Shell exports as a mapping."""
    return dict(line.removeprefix("export ").split("=", 1) for line in text.splitlines())


def not_permitted(home: Path) -> list[str]:
    """What the server refused any service of a mesh."""
    logs = [path.read_text() for path in (home / "logs").glob("*.log")]
    return [line for text in logs for line in text.splitlines() if "not permitted" in line]


def pid_of(folder: Path) -> int:
    """The process that :func:`bare_server` started for *folder*."""
    return int(next((folder / "ports").glob("*.ports")).stem.rpartition("_")[2])
