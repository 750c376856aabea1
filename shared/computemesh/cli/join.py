"""``join``: this machine as a node of a mesh that runs elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import click
import msgspec
import urllib3

from computemesh.addresses import login_of, servers_of, with_login
from computemesh.bus import Bus, BusError, NotAdmitted, Unreachable, Where
from computemesh.cli import access, common, mesh, running
from computemesh.cli.common import CONNECT_S, Failure, NoMesh, ago, err, out, print_json
from computemesh.cli.services import SERVICES
from computemesh.config import ConfigError, nats_url, node_of, told_node_id
from computemesh.contracts import nodes
from computemesh.contracts.base import Role
from computemesh.contracts.nodes import NodeGet, NodeView
from computemesh.contracts.permissions import identity
from computemesh.paths import Home, home, private_folder, write_private
from computemesh.supervisor import MeshStatus, ServiceStatus, Supervisor, read_status

LISTED_S: Final = 10.0
"""How long the registry may take to list a node that announced itself."""

LOOK_AGAIN_S: Final = 0.5
"""Pause between two looks whether the server is there."""

INVITATION_BYTES_MAX: Final = 64 * 1024

SCHEMES: Final = ("nats", "tls")


class Invitation(msgspec.Struct, frozen=True, kw_only=True):
    """Which mesh, and as which node; kept in ``joined.json``."""

    nats_url: str
    """With the node's user and password, where the server has users."""
    node_id: str = ""
    """Empty when neither the invitation nor the address names one."""

    def __repr__(self) -> str:
        """Shows no password."""
        return "Invitation(...)"


# --- invitations -------------------------------------------------------------------------------------------------

_HOST: Final = re.compile(r"[A-Za-z0-9_.:%-]+")
_EXPORT: Final = re.compile(r"(?m)^\s*(?:export\s+)?(NATS_URL|COMPUTEMESH_NODE_ID)=(.*)$")


def read_invitation(text: str, where: str) -> Invitation:
    """What ``nodes invite`` printed, as shell exports or as JSON, or only the address.

    Args:
        where: where the text comes from, for messages.

    Raises:
        Failure: it is nothing of these. The message holds nothing of the text, which may be a password.
    """
    text = text.strip()
    values: dict[str, Any] = {}
    if text.startswith("{"):
        with contextlib.suppress(ValueError):
            values = msgspec.json.decode(text, type=dict[str, Any])
    elif found := _EXPORT.findall(text):
        with contextlib.suppress(ValueError):
            values = {name: (shlex.split(value) or [""])[0] for name, value in found}
    elif len(text.split()) == 1:
        values = {"NATS_URL": text}
    url, node_id = values.get("NATS_URL"), values.get("COMPUTEMESH_NODE_ID", "")
    if not isinstance(url, str) or not isinstance(node_id, str) or not url:
        raise Failure(
            f"{where}: no invitation in it",
            hint="it is what `computemesh nodes invite NAME` prints on the mesh's machine",
            field="invitation", code="bad_invitation",
        )  # fmt: skip
    return checked(url, node_id, where)


def checked(url: str, node_id: str, where: str) -> Invitation:
    """An invitation whose address is one of a NATS server, and of a node if it names a user.

    Raises:
        Failure: it is not.
    """

    def bad(reason: str, hint: str = "") -> Failure:
        return Failure(f"{where}: {reason}", hint=hint, field="invitation", code="bad_invitation")

    servers = [_server(server) for server in servers_of(url)]
    if not servers or not all(servers):
        raise bad(
            "no address of a NATS server",
            "write nats://HOST:PORT, or give the file with what `computemesh nodes invite NAME` printed",
        )
    user, _, password = login_of(url).partition(":")
    who = identity(user)
    if user and (who is None or who.role is not Role.NODE):
        raise bad(f"{user!r} is no user of a node", "`computemesh nodes invite NAME` on the mesh's machine makes one")
    address = ",".join(servers)
    return Invitation(
        nats_url=with_login(address, f"{user}:{password}") if user else address,
        node_id=who.node_id if who else node_id,
    )


def _server(address: str) -> str:
    """One server without its login, the port spelled out; empty when it is none."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or 4222
    except ValueError:
        return ""
    if parts.scheme not in SCHEMES or not host or not _HOST.fullmatch(host) or parts.path not in ("", "/"):
        return ""
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _given(source: str | None, place: Home) -> Invitation:
    """The invitation: from the command line, a file, standard input, the environment, or as it was last time."""
    if source == "-":
        return read_invitation(sys.stdin.read(INVITATION_BYTES_MAX), "standard input")
    if source is not None:
        file = Path(source).expanduser()
        if file.is_file():
            with file.open(encoding="utf-8", errors="replace") as text:
                return read_invitation(text.read(INVITATION_BYTES_MAX), source)
        if "://" not in source and (os.sep in source or "." in source) and ":" not in source:
            raise Failure(f"{source}: no such file", field="invitation", code="bad_invitation")
        given = checked(source, "", "the address")
        if ":" in login_of(given.nats_url):
            err.print(
                "[yellow]The password is on the command line, where others on this machine can read it.[/] "
                "A file, or - for standard input, keeps it private."
            )
        return given
    if url := nats_url(Role.NODE):
        return checked(url, "", "NATS_URL")
    try:
        return msgspec.json.decode(place.joined.read_bytes(), type=Invitation)
    except FileNotFoundError:
        raise Failure(
            "which mesh? give the file with what `computemesh nodes invite NAME` printed on its machine",
            hint="or its address; or set NATS_URL", field="invitation", code="no_invitation",
        ) from None  # fmt: skip
    except ValueError as error:
        raise Failure(f"{place.joined}: {error}", hint="join with the invitation again", code="bad_file") from None


# --- the command -------------------------------------------------------------------------------------------------


@click.command()
@click.argument("invitation", required=False, metavar="[FILE|URL|-]")
@click.option("--detach", "-d", is_flag=True, help="Run in the background; return once the mesh lists this node.")
@click.option(
    "--node-id", type=access.NodeName(), help="This machine's name; decided by the invitation where there are users."
)
@click.option(
    "--ports",
    type=click.Choice(["standard", "any"]),
    help="HTTP ports: the documented ones, or any; left out, the documented ones that are free.",
)
@running.models_option
@running.agent_config_option
@running.hardware_option
@click.option("--quiet", "-q", is_flag=True, help="In the foreground: no log lines.")
@click.option("--json", "as_json", is_flag=True, help="With --detach: print the node as JSON once it has joined.")
def join(
    invitation: str | None,
    detach: bool,
    node_id: str | None,
    ports: running.Ports | None,
    models: str,
    agent_config: Path | None,
    hardware: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make this machine a node of a mesh that runs elsewhere.

    Takes what `computemesh nodes invite NAME` printed on the mesh's machine: in a FILE, or on standard input
    (`-`), or only the URL in it, or NATS_URL. Left out, it is the mesh that this machine joined last. Runs
    the resource-detector, the node-agent and the peer-agent until `computemesh down` or Ctrl-C, and waits
    for a server that is away. No port of this machine need be open to others.

    \b
      computemesh nodes invite gpu-7 > gpu-7.env       on the mesh's machine
      computemesh join gpu-7.env --detach              here
      ssh mesh computemesh nodes invite gpu-7 | computemesh join - --detach

    All it keeps lies in COMPUTEMESH_HOME, the invitation too; a second node on one machine needs a second
    home. Exit status: 0 it ran, 2 refused, 3 no server, or it refuses the credentials.
    """
    if as_json and not detach:
        raise click.UsageError("--json goes with --detach: in the foreground the output is a log")
    place = home()
    if (status := read_status(place)) is not None:
        _already(status, place, invitation)
        if as_json:
            print_json(mesh.document(status, place))
        return
    given = _given(invitation, place)
    private_folder(place.root)
    given = msgspec.structs.replace(given, node_id=_node_id(given, node_id, place))
    common.run(_admitted(given))
    write_private(place.joined, msgspec.json.encode(given).decode())
    running.tell_services(models=models, hardware=hardware, agent_config=agent_config)
    if not detach:
        common.run(_join(place, given, ports or "free", quiet=quiet))
        return
    words = ["join", *(("--ports", ports) if ports else ())]
    # What was saved is what counts now.
    for name in [name for name in os.environ if "NATS_URL" in name]:
        del os.environ[name]
    status = running.in_background(place, words, what="the node")
    record = common.run(_confirm_from_outside(place, given, status))
    if as_json:
        print_json({**mesh.document(status, place), "node": record})
    else:
        _show(given, record, status)


def _already(status: MeshStatus, place: Home, invitation: str | None) -> None:
    """Says that this home is taken, unless it is by the same node."""
    if not status.joined:
        raise Failure(
            f"a mesh of its own runs in {place.root}, and this machine is its node {status.node_id}",
            hint=f"for a node beside it: COMPUTEMESH_HOME={place.root}-2 computemesh join …",
            code="home_taken",
        )
    if invitation is not None and (given := _given(invitation, place)).nats_url != status.nats_urls[Role.NODE.value]:
        other = f" as {given.node_id}" if given.node_id else ""
        raise Failure(
            f"{place.root} runs node {status.node_id} of the mesh at {mesh.nats_address(status)} already",
            hint=f"`computemesh down` first; or beside it{other}: COMPUTEMESH_HOME={place.root}-2 computemesh join …",
            code="home_taken",
        )
    err.print(f"Node {status.node_id} runs already (pid {status.pid}, up {ago(status.started_at)}).")


def _node_id(given: Invitation, named: str | None, place: Home) -> str:
    """The node that this machine is: as the invitation says, else as told, else as it is called."""
    told = named or told_node_id() or given.node_id
    try:
        return node_of(given.nats_url, told) if told else mesh.node_id(place, given.nats_url)
    except ConfigError:
        who = identity(login_of(given.nats_url).partition(":")[0])
        raise Failure(
            f"the invitation is for node {who.node_id if who else ''}, not for {told}",
            hint=f"`computemesh nodes invite {told}` on the mesh's machine invites that one",
            field="node_id", code="wrong_node",
        ) from None  # fmt: skip


async def _admitted(given: Invitation) -> None:
    """Returns when the server takes the credentials, or is not there now.

    Raises:
        NoMesh: it refuses them.
    """
    bus = _bus(given)
    with contextlib.suppress(Unreachable):
        try:
            await bus.connect(timeout_s=CONNECT_S, wait_for_server=False)
        except NotAdmitted:
            raise _not_admitted(given) from None
        finally:
            await bus.close()


def _bus(given: Invitation) -> Bus:
    return Bus(Where(url=given.nats_url, role=Role.NODE, name=f"computemesh-join-{given.node_id}"))


def _not_admitted(given: Invitation) -> NoMesh:
    return NoMesh(
        f"the NATS server at {_bus(given).where.shown} refuses the credentials of node {given.node_id}",
        hint=f"was it revoked? on the mesh's machine `computemesh nodes invite {given.node_id}` prints new ones",
        code="not_admitted",
    )


# --- in the foreground -------------------------------------------------------------------------------------------


async def _join(place: Home, given: Invitation, ports: running.Ports, *, quiet: bool) -> None:
    on_line = running.log_to_terminal(place, quiet=quiet)
    node_plane = [spec for spec in SERVICES if spec.role is Role.NODE]
    supervisor = Supervisor(
        place,
        running.on_ports(node_plane, ports),
        token=secrets.token_urlsafe(24),
        node_id=given.node_id,
        nats_urls={Role.NODE: given.nats_url},
        on_line=on_line,
        on_status=running.show_status,
    )

    def tell(problem: str) -> None:
        supervisor.tell_problem(problem)
        if problem:
            err.print(f"[yellow]{common.escape(problem)}[/]; waiting for it")

    async def ready() -> None:
        running.show_failed(supervisor.status())
        record = await _confirm(bus, given, _agent(supervisor.status()))
        _show(given, record, supervisor.status())

    bus = _bus(given)
    try:
        await common.first_of(running.in_foreground(supervisor, ready), _watch(bus, given, tell))
    finally:
        await bus.close()
    out.print(f"Node {given.node_id} left the mesh.")


async def _watch(bus: Bus, given: Invitation, tell: Callable[[str], None]) -> None:
    """Connects, waiting for a server that is away, and tells when it goes later and when it comes back.

    Never returns.

    Raises:
        NoMesh: the credentials were refused before there was any connection.
    """
    where = bus.where.shown
    said = ""
    while True:
        try:
            await _try(given)
            break
        except NotAdmitted:
            raise _not_admitted(given) from None
        except Unreachable as error:
            if not said:
                said = str(error)
                tell(said)
        await asyncio.sleep(LOOK_AGAIN_S)
    tell("")
    await bus.connect()
    while True:
        await bus.interrupted.wait()
        said = ""
        while not bus.connected.is_set():
            problem = await _why_away(given, where)
            if problem and problem != said:
                tell(problem)
                said = problem
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(bus.connected.wait(), LOOK_AGAIN_S)
        if said:
            err.print(f"[green]The NATS server at {where} is back.[/]")
        tell("")


async def _try(given: Invitation) -> None:
    """Connects once, for a look."""
    probe = _bus(given)
    try:
        await probe.connect(timeout_s=CONNECT_S, wait_for_server=False)
    finally:
        await probe.close()


async def _why_away(given: Invitation, where: str) -> str:
    """Why there is no connection; empty when one can be had."""
    try:
        await _try(given)
    except NotAdmitted:
        return f"the NATS server at {where} refuses node {given.node_id} now: it was revoked"
    except Unreachable as error:
        return str(error)
    return ""


# --- is it in the mesh? ------------------------------------------------------------------------------------------


def _agent(status: MeshStatus) -> ServiceStatus | None:
    return next((service for service in status.services if service.name == "node-agent"), None)


async def _confirm_from_outside(place: Home, given: Invitation, status: MeshStatus) -> NodeView | None:
    """As :func:`_confirm`, for what runs in the background; a node that is not taken in is ended."""
    bus = _bus(given)
    try:
        await bus.connect(timeout_s=CONNECT_S)
        return await _confirm(bus, given, _agent(status))
    except BusError as error:
        err.print(f"[yellow]{common.escape(str(error))}[/]; the node runs, and waits for it")
        return None
    except Failure:
        mesh.stop(place, status)
        raise
    finally:
        await bus.close()


async def _confirm(bus: Bus, given: Invitation, agent: ServiceStatus | None) -> NodeView | None:
    """The node as the mesh lists it; None when it does not, and then it was said why.

    Raises:
        Failure: the mesh has another machine of that name.
    """
    deadline_s = time.monotonic() + LISTED_S
    facts: dict[str, Any] = {"work_types": ["not known yet"]}
    while facts.get("work_types") and time.monotonic() < deadline_s:
        facts = await asyncio.to_thread(_health, agent.http if agent else "")
        with contextlib.suppress(BusError):
            found = await bus.ask(nodes.GET, NodeGet(node_id=given.node_id))
            if isinstance(found, NodeView) and found.session == facts.get("session"):
                return found
        if facts.get("problem") and facts.get("nats") == "connected":
            raise Failure(
                f"{given.node_id} is not taken into the mesh: {facts['problem']}",
                hint="give this machine a name of its own: `computemesh nodes invite NAME` on the mesh's machine",
                field="node_id", code="node_id_taken",
            )  # fmt: skip
        await asyncio.sleep(0.1)
    if not facts.get("work_types"):
        err.print(
            "[yellow]This node has nothing it can run, so the mesh does not list it:[/] "
            "name models with --models; `computemesh doctor` says more."
        )
    else:
        err.print("[yellow]No node-registry lists this node yet;[/] it goes on announcing itself.")
    return None


def _health(url: str) -> dict[str, Any]:
    """What a service says of itself over HTTP; nothing when it does not answer."""
    with (
        contextlib.suppress(urllib3.exceptions.HTTPError, ValueError),
        urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(total=CONNECT_S)) as http,
    ):
        return msgspec.json.decode(http.request("GET", f"{url}/healthz").data, type=dict[str, Any])
    return {}


def _show(given: Invitation, record: NodeView | None, status: MeshStatus) -> None:
    what = f", {record.tier}" if record else ""
    out.print(f"\n[bold green]Joined[/] the mesh at {_bus(given).where.shown} as node {given.node_id}{what}.\n")
    running.say_made_up()
    mesh.show_addresses(status)
    out.print(f"\n{mesh.command()} status | {mesh.command()} down")
