"""``up``, ``down``, ``status`` and ``env``: the mesh on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import psutil

from computemesh.bus import Bus, BusError, Where
from computemesh.cli import access, common, engine_views, running, work
from computemesh.cli.common import (
    Failure,
    NoMesh,
    WorkFailure,
    ago,
    coloured,
    err,
    out,
    print_json,
    state_cell,
    table,
)
from computemesh.cli.engine_views import EngineRow
from computemesh.cli.nodes import every_node
from computemesh.cli.services import SERVICES
from computemesh.config import nats_urls, node_of, told_node_id
from computemesh.contracts import nodes
from computemesh.contracts import work as work_contracts
from computemesh.contracts.base import Role
from computemesh.contracts.nodes import NodeView
from computemesh.contracts.services import NODE_REGISTRY, PEER_AGENT, WORK_MARSHALLER
from computemesh.ids import token_from
from computemesh.nats_server import LOOPBACK, BadCredentialsError, Credentials, add_node
from computemesh.paths import Home, home, private_folder, write_private
from computemesh.supervisor import MeshStatus, ServiceStatus, Supervisor, is_running, read_status

NATS_PORT: Final = 4222

SEEN_S: Final = 10.0
"""How long the first work item waits for a node. Services say that they are ready once they have announced theirs."""

NODE_S: Final = 120.0
"""How long the first work item may take: the engine loads its model meanwhile."""

COUNTS_S: Final = 3.0
"""How long `status` waits for each answer of the mesh: it must be of use while the mesh is in trouble."""

REAP_S: Final = 10.0
"""How long what a supervisor left behind may take to end."""

PROMPT: Final = "In one sentence: what is a mesh network?"


@click.command()
@click.option("--detach", "-d", is_flag=True, help="Run in the background; return when everything is ready.")
@click.option("--demo/--no-demo", default=True, show_default=True, help="Run one work item when the mesh is ready.")
@click.option("--nats-port", type=click.IntRange(0, 65_535), default=None, help="Port of the embedded NATS server.")
@click.option(
    "--nats-host",
    default=LOOPBACK,
    show_default=True,
    metavar="ADDRESS",
    help="Where the embedded NATS server listens. Other machines need more than loopback; there is no encryption.",
)
@click.option(
    "--ports",
    type=click.Choice(["standard", "any"]),
    default="standard",
    show_default=True,
    help="HTTP ports of the services: the documented ones, or any that are free.",
)
@running.models_option
@running.agent_config_option
@running.hardware_option
@click.option("--quiet", "-q", is_flag=True, help="In the foreground: no log lines.")
@click.option("--json", "as_json", is_flag=True, help="With --detach: print the mesh as JSON once it is ready.")
def up(
    detach: bool,
    demo: bool,
    nats_port: int | None,
    nats_host: str,
    ports: running.Ports,
    models: str,
    agent_config: Path | None,
    hardware: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Start a whole mesh on this machine.

    Starts an embedded NATS server (unless NATS_URL, or COMPUTEMESH_NATS_URL_<ROLE> for each role, names
    one) and every service, each a process of its own, and keeps them running until `computemesh down` or
    Ctrl-C.

    \b
      computemesh up                              in the foreground, with one readable log
      computemesh up --detach                     in the background
      computemesh up --models ~/models --ports any

    All it keeps lies in one folder, COMPUTEMESH_HOME or else ~/.local/state/computemesh; another folder is
    another mesh. Exit status: 0 it ran, 1 the first work item failed, 2 it could not start.
    """
    if as_json and not detach:
        raise click.UsageError("--json goes with --detach: in the foreground the output is a log")
    place = home()
    if (status := read_status(place)) is not None:
        if as_json:
            print_json({**document(status, place), "first_work_item": None})
            return
        out.print(f"The mesh is running already (pid {status.pid}, up {ago(status.started_at)}).\n")
        show_addresses(status)
        return
    running.tell_services(models=models, hardware=hardware, agent_config=agent_config)
    if not detach:
        common.run(_up(place, nats_port, nats_host, ports, demo=demo, quiet=quiet))
        return
    began_s = time.monotonic()
    words = ["up", "--no-demo", "--ports", ports, "--nats-host", nats_host]
    words += ["--nats-port", str(nats_port)] if nats_port is not None else []
    status = running.in_background(place, words, what="the mesh")
    if as_json:
        record = common.run(_demo(live=False, say=False)) if demo else None
        print_json({**document(status, place), "first_work_item": record})
        return
    out.print(f"[bold green]The mesh is up[/] after {time.monotonic() - began_s:.1f} s.\n")
    running.say_made_up()
    show_addresses(status)
    if demo:
        common.run(_demo())
    show_next_steps()


async def _up(
    place: Home, nats_port: int | None, nats_host: str, ports: running.Ports, *, demo: bool, quiet: bool
) -> None:
    started_s = time.monotonic()
    private_folder(place.root)
    external = nats_urls()
    me = node_id(place, external.get(Role.NODE, ""))
    on_line = running.log_to_terminal(place, quiet=quiet)
    supervisor = Supervisor(
        place,
        running.on_ports(SERVICES, ports),
        token=credentials(place, me).token,
        node_id=me,
        nats_urls=external,
        nats_port=nats_port if nats_port is not None else _default_port(place),
        nats_host=nats_host,
        on_line=on_line,
        on_status=running.show_status,
    )

    async def ready() -> None:
        status = supervisor.status()
        failed = running.show_failed(status)
        out.print(f"\n[bold green]The mesh is up[/] after {time.monotonic() - started_s:.1f} s.\n")
        running.say_made_up()
        show_addresses(status)
        if demo and not failed and sys.stdout.isatty():
            await _demo(live=False)
            show_next_steps()

    await running.in_foreground(supervisor, ready)
    out.print("The mesh is down.")


def _default_port(place: Home) -> int:
    """The usual port when it is free; else, or when this mesh had another before, any."""
    if (place.nats / "port").exists():
        return 0
    return NATS_PORT if running.is_free(NATS_PORT) else 0


def credentials(place: Home, node_id: str) -> Credentials:
    """Those of a home, made when absent, with a user for this node."""
    try:
        return add_node(place.credentials, node_id)
    except BadCredentialsError as error:
        raise Failure(str(error), code="bad_credentials") from None


def node_id(place: Home, nats_url: str = "") -> str:
    """This machine's name in the mesh: its host name and four random letters, made once.

    An external NATS server that knows each node by a user of its own decides the name.
    """
    told = told_node_id()
    if named := node_of(nats_url, token_from(told) if told else ""):
        return named
    import secrets
    import socket

    try:
        return place.node_id_file.read_text().strip()
    except FileNotFoundError:
        made = f"{token_from(socket.gethostname())[:50]}-{secrets.token_hex(2)}"
        write_private(place.node_id_file, made + "\n")
        return made


# --- the first work item --------------------------------------------------------------------------------------------


async def _demo(*, live: bool = True, say: bool = True) -> work_contracts.WorkRecord | None:
    """One work item from submission to the model's answer; None when no node serves a model.

    Args:
        live: show its progress on the terminal.
        say: print what happens.
    """
    tell: Callable[[str], None] = out.print if say else lambda _: None
    async with common.connected() as bus:
        with err.status("Waiting for a node that serves a model …"):
            model = await _first_model(bus)
        if model is None:
            tell("\nNo node serves a model: see `computemesh doctor`, or try `computemesh up --models FILE.gguf`.\n")
            return None
        if not model:
            tell(
                "\nNo model is here yet: `computemesh models --watch` shows how far those are that are being fetched.\n"
            )
            return None
        tell(f"\n[bold]The first work item[/], published to {work_contracts.SUBMIT.subject}:\n")
        tell(f"  model   {model}\n  prompt  {PROMPT}")
        item = work_contracts.WorkItem(
            work_type="inference", model_name=model, payload={"prompt": PROMPT, "max_tokens": 64}
        )
        record = await work.submit_and_wait(bus, item, timeout_s=NODE_S, live=live)
        tell(f"  answer  [bold]{common.escape(work.answer_text(record)).strip()}[/]")
        took_s = (record.finished_at or 0.0) - record.submitted_at
        tell(f"\n  {record.work_id} {coloured(record.state)} on {record.node_id} after {took_s:.1f} s\n")
        if record.state is not work_contracts.WorkState.COMPLETED:
            raise WorkFailure(f"the first work item ended as {record.state}", hint=f"see {home().logs}")
        return record


async def _first_model(bus: Bus) -> str | None:
    """The first model that a direct node has and that writes texts; waits for a node, but for no model: then it is
    empty. None when no node offers any."""
    deadline_s = time.monotonic() + SEEN_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(BusError):
            found = await common.ask(bus, nodes.QUERY, nodes.NodesQuery(online_only=True, work_type="inference"))
            ready = [node for node in found.nodes if node.delivery == "direct"]
            if ready:
                return next(_ready_models(ready), "" if any(node.models for node in ready) else None)
        await asyncio.sleep(0.1)
    return None


def _ready_models(found: Iterable[NodeView]) -> Iterator[str]:
    for node in found:
        not_now = {card.name for card in node.model_cards if card.embeddings or not card.present}
        yield from (model for model in node.models if model not in not_now)


def document(status: MeshStatus, place: Home) -> dict[str, Any]:
    """What programs are told of the mesh on this machine. It holds no secret."""
    return {
        "version": status.version,
        "ready": status.ready,
        "pid": status.pid,
        "started_at": status.started_at,
        "home": str(place.root),
        "node_id": status.node_id,
        "embedded": status.embedded,
        "joined": status.joined,
        "nats_url": nats_address(status),
        "services": status.services,
    }


def nats_address(status: MeshStatus) -> str:
    """Where the bus is, without credentials."""
    return Where(url=next(iter(status.nats_urls.values())), role=Role.NODE, name="").shown


def show_addresses(status: MeshStatus) -> None:
    """Where everything is."""
    bus = "embedded" if status.embedded else "of the mesh" if status.joined else "external"
    rows = [(f"NATS ({bus})", nats_address(status))]
    rows += [(service.name, service.http) for service in status.services if service.http]
    table(["service", "address"], rows)
    out.print(f"\nnode {status.node_id}, files in {home().root}")


def show_next_steps() -> None:
    name = command()
    out.print(
        "\n[bold]Try next[/]\n"
        f"  {name} submit --prompt 'Name three uses of a mesh.' --wait\n"
        f"  {name} nodes | {name} work list | {name} status\n"
        f'  eval "$({name} env)"     NATS_URL and addresses for any program\n'
        f"  {name} down              stop everything"
    )


def command() -> str:
    """How to call this program from where the user is."""
    me = Path(sys.argv[0]).resolve()
    on_path = shutil.which("computemesh")
    if me.name != "computemesh" or (on_path and Path(on_path).resolve() == me):
        return "computemesh"
    return str(me.relative_to(Path.cwd())) if me.is_relative_to(Path.cwd()) else str(me)


# --- down, status, env ---------------------------------------------------------------------------------------


@click.command()
@click.option("--purge", is_flag=True, help="Also delete everything the mesh kept: work, results, credentials, logs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def down(purge: bool, as_json: bool) -> None:
    """Stop the mesh on this machine, or leave the one it joined. Work in hand is handed back or finished first."""
    place = home()
    status = read_status(place)
    was_running = status is not None or is_running(place)
    if was_running:
        stop(place, status)
    else:
        reap(place)
    purged = purge and place.root.exists()
    if purged:
        shutil.rmtree(place.root)
    if as_json:
        print_json({"home": str(place.root), "was_running": was_running, "purged": purged})
        return
    if status is not None and status.joined:
        out.print(f"Node {status.node_id} left the mesh.")
    else:
        out.print("The mesh is down." if was_running else "No mesh is running here.")
    if purged:
        out.print(f"Deleted {place.root}.")


def stop(place: Home, status: MeshStatus | None) -> None:
    if status is None:
        raise Failure(f"something runs in {place.root}, but does not say under which pid", hint="wait and try again")
    with contextlib.suppress(ProcessLookupError):
        os.kill(status.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + status.stop_s
    with err.status("Stopping: work in hand is finished or handed back …"):
        # The supervisor gives up the home a moment before its process is gone.
        while (is_running(place) or is_alive(status.pid)) and time.monotonic() < deadline_s:
            time.sleep(0.05)
    if is_running(place):
        with contextlib.suppress(ProcessLookupError):
            os.kill(status.pid, signal.SIGKILL)
    reap(place)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only its parent has not waited for yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def reap(place: Home, *, grace_s: float = REAP_S) -> None:
    """Ends whatever a supervisor that was killed may have left behind; kills what is there after *grace_s*."""
    try:
        status = msgspec.json.decode((place.run / "mesh.json").read_bytes(), type=MeshStatus)
    except (OSError, ValueError):
        return
    left = [process for service in status.services if (process := _still_ours(service)) is not None]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(left, timeout=grace_s)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    (place.run / "mesh.json").unlink(missing_ok=True)


def _still_ours(service: ServiceStatus) -> psutil.Process | None:
    """The process of a service, if its pid was not given to another program since."""
    try:
        process = psutil.Process(service.pid) if service.pid else None
        if process is None:
            return None
        command = " ".join(process.cmdline())
    except psutil.Error:
        return None
    return process if "computemesh_services" in command or "nats-server" in command else None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(as_json: bool) -> None:
    """What runs on this machine, and how it is.

    Exit status: 0 all is ready, 1 something is not, 3 no mesh runs or it does not answer. `computemesh doctor`
    looks for causes.
    """
    found = common.mesh_status()
    whole = found.expects(NODE_REGISTRY.name) and found.expects(WORK_MARSHALLER.name)
    counts, engines, failure = common.run(_counts()) if whole else (UNKNOWN, [], None)
    if as_json:
        print_json({**document(found, home()), **counts, "problem": failure.message if failure else ""})
    else:
        mesh = f", of the mesh at {nats_address(found)}" if found.joined else ""
        out.print(f"computemesh {found.version}, up {ago(found.started_at)}, node {found.node_id}{mesh}\n")
        rows = [
            (
                s.name,
                state_cell(s.state),
                str(s.pid or "-"),
                str(s.restarts),
                ago(s.since),
                s.http or s.unready or s.reason or "-",
            )
            for s in found.services
        ]
        table(["service", "state", "pid", "restarts", "since", "address"], rows, right=["pid", "restarts"])
        if failure is not None:
            raise failure
        if whole:
            nodes_found, items = counts["nodes"], counts["work"]
            shown = [f"nodes: {nodes_found['count']}, {nodes_found['online']} online"]
            shown += [f"{state}: {count}" for state, count in items.items() if count or state in ("pending", "running")]
            out.print(f"\n{'; '.join(shown)}")
            out.print(engine_views.summary(engines))
    if failure is not None:
        common.bail(failure.exit_code)
    if not found.ready:
        common.bail(1)


UNKNOWN: Final[dict[str, Any]] = {"nodes": None, "engines": None, "work": None}
"""What is told where nobody answers, or where there is nobody to ask: a control plane by itself has no nodes."""

IN_HAND: Final = tuple(state for state in work_contracts.WorkState if state not in work_contracts.FINAL)


async def _counts() -> tuple[dict[str, Any], list[EngineRow], NoMesh | None]:
    """How many nodes, engines and unfinished items there are, and the engines; or why that is not known."""
    try:
        async with common.connected() as bus:
            found = await every_node(bus, nodes.NodesQuery(), timeout_s=COUNTS_S)
            questions = [work_contracts.WorkList(status=state, limit=1) for state in IN_HAND]
            listed = [await common.ask(bus, work_contracts.LIST, ask, timeout_s=COUNTS_S) for ask in questions]
    except NoMesh as failure:
        return UNKNOWN, [], failure
    online = sum(node.state is nodes.NodeState.ONLINE for node in found.nodes)
    engines = engine_views.engines_of(found.nodes)
    ready = sum(engine.accepting and engine.state is nodes.EngineState.READY for engine in engines)
    counts = {state.value: items.count for state, items in zip(IN_HAND, listed, strict=True)}
    told = {
        "nodes": {"count": found.count, "online": online},
        "engines": {"count": len(engines), "ready": ready},
        "work": counts,
    }
    return told, engines, None


@click.command()
@click.option(
    "--role",
    type=click.Choice([Role.CLIENT.value, Role.NODE.value, Role.OBSERVER.value]),
    default=Role.CLIENT.value,
    show_default=True,
    help="Whose credentials: to submit work, to be a node, or only to watch.",
)
@click.option("--node", "name", default="", help="With --role node: which one was invited; left out, this machine's.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(role: str, name: str, as_json: bool) -> None:
    """Print shell exports that let any program use this mesh: eval "$(computemesh env)"."""
    from computemesh.peer.socket import SOCKET_VARIABLE, socket_path

    found = common.mesh_status()
    if found.joined and role != Role.NODE:
        raise common.only_a_node(f"has no credentials of the role {role}")
    url = found.nats_urls[role]
    if found.joined and name and name != found.node_id:
        raise common.only_a_node(f"is {found.node_id} and no other")
    if name and not found.joined:
        url = access.node_url(found, name) if role == Role.NODE else access.not_a_node(role)
    values = {
        **access.exports(Where(url=url, role=Role(role), name="")),
        "COMPUTEMESH_TOKEN": found.token,
        "NODE_REGISTRY_NATS_URL": url,
    }
    for service in found.services:
        values |= dict.fromkeys(found.url_names.get(service.name, []), service.http)
        if service.name == PEER_AGENT.name:
            values[SOCKET_VARIABLE] = str(socket_path())
    access.print_exports(values, as_json=as_json)
