"""Gathers what the doctor judges. Whatever is missing, silent or forbidden becomes a fact too; nothing raises.

Everything is asked at the same time and with short timeouts, so that an examination ends within seconds also
when nothing answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import re
import resource
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
import psutil
import urllib3

from computemesh import __version__
from computemesh.addresses import login_of, without_login
from computemesh.bus import Bucket, Bus, BusError, NotAdmitted, Unreachable, Where, survey
from computemesh.bus.provision import drift
from computemesh.cli.doctor import logs
from computemesh.cli.doctor.facts import (
    Answer,
    Clock,
    Complaint,
    Disk,
    Edge,
    Facts,
    File,
    Login,
    Package,
    Port,
    Process,
    Store,
    Stream,
    Supervision,
    Violation,
    Work,
)
from computemesh.cli.services import CHECKS, SERVICES
from computemesh.contracts import nodes, storage, work
from computemesh.contracts.base import Message, Refused, Request, Role, ServiceCard
from computemesh.contracts.catalog import on_the_bus
from computemesh.contracts.nodes import NodeView
from computemesh.contracts.permissions import identity
from computemesh.contracts.services import NODE_REGISTRY, WORK_MARSHALLER
from computemesh.contracts.work import WorkList, WorkState
from computemesh.findings import Finding, skipped
from computemesh.nats_server import Credentials
from computemesh.paths import Home
from computemesh.supervisor import MeshStatus, ServiceStatus, is_running, read_status

ANSWER_S: Final = 2.0
"""How long anything that was asked may take."""

PROGRAM_S: Final = 20.0
"""How long a service's own examination of this machine may take: drivers are slow to load."""

LOG_BYTES: Final = 512 * 1024
"""How much of the end of each log is read."""

LOG_S: Final = 86_400.0
"""What was logged longer ago is history."""

HOST: Final = "127.0.0.1"

T = TypeVar("T")
Alive = Literal["running", "stopped", "gone", "unknown"]


async def gather(place: Home) -> Facts:
    """Everything there is to know about the mesh of *place*, or of ``NATS_URL``."""
    supervision, status = _supervision(place)
    named = os.environ.get("NATS_URL", "")
    external = bool(named) and (status is None or not _same_server(named, status))
    if external:
        # The mesh of this home, if one runs, is not the one that was asked about.
        supervision, status = Supervision(running=False), None
    local = asyncio.create_task(asyncio.to_thread(_local, place, supervision))
    machine = asyncio.create_task(_machine(supervision))
    edges = asyncio.create_task(_edges(supervision.processes))
    facts = await _bus_facts(
        Facts(
            now=time.time(),
            version=__version__,
            external=external,
            home=File(path=str(place.root)),
            supervision=supervision,
        ),
        _urls(place, status, named),
    )
    return replace(facts, edges=await edges, machine=await machine, **(await local))


# --- this machine --------------------------------------------------------------------------------------------


def _local(place: Home, supervision: Supervision) -> dict[str, Any]:
    violations, complaints = _logs(place, supervision)
    return {
        "home": _file(place.root),
        "secrets": _secrets(place),
        "ports": [] if supervision.running else [_port(spec.name, spec.port) for spec in SERVICES if spec.port],
        "disk": _disk(place.root),
        "python": sys.version_info[:3],
        "packages": list(_packages()),
        "open_files_max": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "violations": violations,
        "complaints": complaints,
    }


def _file(path: Path) -> File:
    try:
        found = path.stat()
    except FileNotFoundError:
        return File(path=str(path), exists=False)
    except OSError as error:
        return File(path=str(path), owned=False, problem=_words(error))
    owned = found.st_uid == os.getuid() or os.getuid() == 0
    return File(path=str(path), mode=found.st_mode & 0o777, owned=owned)


def _secrets(place: Home) -> list[File]:
    others = [_file(path) for path in (place.run / "mesh.json", place.nats / "nats-server.conf")]
    return [file for file in (_credentials_file(place), *others) if file.exists]


def _credentials_file(place: Home) -> File:
    file = _file(place.credentials)
    try:
        _credentials(place)
    except OSError as error:
        return replace(file, readable=False, problem=_words(error))
    except ValueError as error:
        return replace(file, problem=f"it holds no credentials ({error})")
    return file


def _credentials(place: Home) -> Credentials:
    """The credentials of this home. Unlike the server, this makes none."""
    return msgspec.json.decode(place.credentials.read_bytes(), type=Credentials)


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _port(service: str, port: int) -> Port:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return Port(service=service, port=port, holder=_holder(port))
    return Port(service=service, port=port)


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return "another program"


def _disk(path: Path) -> Disk | None:
    """The disk that holds *path*, or would."""
    there = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    try:
        usage = psutil.disk_usage(str(there))
    except OSError:
        return None
    return Disk(path=str(there), total_bytes=usage.total, free_bytes=usage.free)


_NEEDED: Final = re.compile(r"^([A-Za-z0-9_.-]+)>=([0-9.]+)$")


def _packages() -> Iterator[Package]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("computemesh") or []:
            if (needed := _NEEDED.match(line)) is not None:
                yield Package(name=needed[1], least=needed[2], found=_version(needed[1]))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


async def _machine(supervision: Supervision) -> Sequence[Finding]:
    """What the services' own programs find on this machine."""
    meant = [module for module in CHECKS if supervision.expects(_service_of(module))]
    found = await asyncio.gather(*(_program(module, supervision) for module in meant))
    return [finding for findings in found for finding in findings]


async def _program(module: str, supervision: Supervision) -> list[Finding]:
    """Runs one of them as the service itself runs: with its settings, if it does."""
    name = _service_of(module)
    pid = next((process.pid for process in supervision.processes if process.name == name), 0)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=_environment(pid)
    )
    try:
        said, complained = await asyncio.wait_for(process.communicate(), PROGRAM_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        return [skipped(name, f"{module} did not end within {PROGRAM_S:g} s")]
    try:
        return msgspec.json.decode(said, type=list[Finding])
    except ValueError:
        words = complained.decode("utf-8", "replace").strip().splitlines()
        return [skipped(name, f"{module}: {words[-1] if words else 'it said nothing'}")]


def _service_of(module: str) -> str:
    return module.rpartition(".")[0].rpartition(".")[2].replace("_", "-")


def _environment(pid: int) -> dict[str, str]:
    own = dict(os.environ)
    with contextlib.suppress(psutil.Error, OSError):
        if pid:
            own |= {
                name: text for name, text in psutil.Process(pid).environ().items() if name.startswith("COMPUTEMESH_")
            }
    return own


# --- processes and logs --------------------------------------------------------------------------------------


def _supervision(place: Home) -> tuple[Supervision, MeshStatus | None]:
    try:
        running = is_running(place)
        status = read_status(place)
    except OSError as error:
        return Supervision(running=False, unreadable=f"{error.filename or place.run}: {_words(error)}"), None
    if status is None:
        return Supervision(running=running), None
    return (
        Supervision(
            running=running,
            pid=status.pid,
            alive=_alive(status.pid),
            version=status.version,
            started_at=status.started_at,
            embedded=status.embedded,
            joined=status.joined,
            node_id=status.node_id,
            processes=[_process(service) for service in status.services],
        ),
        status,
    )


def _alive(pid: int) -> Alive:
    if not pid:
        return "unknown"
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"
    except psutil.Error:
        return "unknown"
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return "gone"
    return "stopped" if status == psutil.STATUS_STOPPED else "running"


def _process(service: ServiceStatus) -> Process:
    opened, opened_max = 0, 0
    with contextlib.suppress(psutil.Error, AttributeError):  # Not every system tells limits of other processes.
        if service.pid:
            process = psutil.Process(service.pid)
            opened, opened_max = process.num_fds(), process.rlimit(psutil.RLIMIT_NOFILE)[0]
    return Process(
        name=service.name,
        state=service.state,
        pid=service.pid,
        restarts=service.restarts,
        since=service.since,
        reason=service.reason,
        unready=service.unready,
        http=service.http,
        alive=_alive(service.pid),
        open_files=opened,
        open_files_max=opened_max,
    )


def _logs(place: Home, supervision: Supervision) -> tuple[list[Violation], list[Complaint]]:
    """What the logs complain about since the mesh started, or for a day."""
    if not supervision.running:
        return [], []
    since = max(supervision.started_at, time.time() - LOG_S)
    violations = logs.server_violations(_tail(place.nats / "nats-server.log"), since=since)
    complaints: list[Complaint] = []
    for process in supervision.processes:
        file = place.logs / f"{process.name}.log"
        denied, complained = logs.service_log(process.name, _tail(file), since=since, file=str(file))
        violations += denied
        complaints += complained
    return violations, complaints


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []


async def _edges(processes: Sequence[Process]) -> list[Edge]:
    asked = [asyncio.to_thread(_readyz, p.name, p.http) for p in processes if p.http and p.state == "ready"]
    return list(await asyncio.gather(*asked))


def _readyz(service: str, url: str) -> Edge:
    try:
        with urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(total=ANSWER_S)) as http:
            reply = http.request("GET", f"{url}/readyz")
    except urllib3.exceptions.TimeoutError:
        return Edge(service=service, url=url, reason=f"no answer in {ANSWER_S:g} s")
    except urllib3.exceptions.HTTPError as error:
        return Edge(service=service, url=url, reason=str(error).rpartition(": ")[2])
    try:
        reason = str(msgspec.json.decode(reply.data, type=dict[str, Any]).get("reason", ""))
    except ValueError:
        reason = "not an answer of ours: another program listens there"
    return Edge(service=service, url=url, status=reply.status, reason=reason)


# --- the bus -------------------------------------------------------------------------------------------------


def _same_server(url: str, status: MeshStatus) -> bool:
    """Whether *url* leads to the server of this home's mesh, as after ``eval "$(computemesh env)"``."""
    return without_login(url) in {without_login(known) for known in status.nats_urls.values() if known}


def _urls(place: Home, status: MeshStatus | None, named: str) -> dict[Role, str]:
    """Where the bus is, by role; a URL that stands for all is tried once, as the role its user has."""
    found = {Role(role): url for role, url in status.nats_urls.items() if url} if status else {}
    if named:
        user = login_of(named).partition(":")[0]
        # A server that knows no users lets everybody do everything.
        anyone = Role.CLIENT if user else Role.SERVICES
        found[who.role if (who := identity(user)) else anyone] = named
    once = {url: role for role, url in reversed(found.items())}
    return {role: url for url, role in reversed(once.items())} or _left_behind(place)


def _left_behind(place: Home) -> dict[Role, str]:
    """A server that a killed supervisor may have left."""
    try:
        credentials = _credentials(place)
        port = int((place.nats / "port").read_text())
        with socket.create_connection((HOST, port), timeout=ANSWER_S):
            pass
    except (OSError, ValueError):
        return {}
    me = next(iter(credentials.nodes), "")
    roles = [role for role in Role if role is not Role.NODE or me]
    return {r: f"nats://{credentials.login(r, me if r is Role.NODE else '')}@{HOST}:{port}" for r in roles}


async def _bus_facts(facts: Facts, urls: Mapping[Role, str]) -> Facts:
    """Adds to *facts* what the bus and whoever is on it tell."""
    buses: dict[Role, Bus] = {}
    try:
        logins = await asyncio.gather(*(_login(role, url, buses) for role, url in urls.items()))
        facts = replace(facts, logins=logins)
        look = _Look(facts, buses)
        return await look.all()
    finally:
        for bus in buses.values():
            await bus.close()


async def _login(role: Role, url: str, buses: dict[Role, Bus]) -> Login:
    """Connects as *role*; when that went well, the connection is left in *buses*."""
    bus = Bus(Where(url=url, role=role, name="computemesh-doctor"), on_denied=lambda _: None)
    began_s = time.monotonic()
    outcome: Literal["ok", "refused", "denied", "silent"] = "ok"
    words = ""
    try:
        await bus.connect(timeout_s=ANSWER_S, wait_for_server=False)
        await asyncio.wait_for(bus.flush(), ANSWER_S)
        buses[role] = bus
    except NotAdmitted as error:
        outcome, words = "denied", str(error)
    except Unreachable as error:
        words = str(error)
        outcome = "refused" if "refused" in words.lower() else "silent"
    except (BusError, TimeoutError):
        outcome, words = "silent", f"connected, then nothing for {ANSWER_S:g} s"
    if outcome != "ok":
        await bus.close()
    took_s = time.monotonic() - began_s
    return Login(role=role, address=bus.where.shown, outcome=outcome, words=words.rpartition(": ")[2], took_s=took_s)


class _Look:
    """Asks all that can be asked over the connections there are."""

    def __init__(self, facts: Facts, buses: Mapping[Role, Bus]) -> None:
        self._facts = facts
        self._unseen: dict[str, str] = {}
        self._services = buses.get(Role.SERVICES)
        # Any role may ask these; the weakest that is there shows what others see.
        self._any = next(
            (buses[role] for role in (Role.OBSERVER, Role.CLIENT, Role.SERVICES, Role.NODE) if role in buses), None
        )

    async def all(self) -> Facts:
        start = asyncio.ensure_future
        store = start(self._part("JetStream", self._services, _store))
        streams = start(self._part("streams", self._services, _streams))
        leases = start(self._part("leases", self._services, _leases))
        clocks = start(self._part("clocks", self._services, _clocks))
        # Nodes may not ask who is there.
        pings = self._any if self._any is None or self._any.where.role is not Role.NODE else None
        answers = start(self._part("answers", pings, self._answers))
        found = start(self._part("nodes", self._any, _nodes, of=NODE_REGISTRY))
        items = start(self._part("work", self._any, _work, of=WORK_MARSHALLER))
        return replace(
            self._facts,
            store=await store,
            streams=await streams,
            leases=await leases,
            clocks=await clocks or (),
            answers=await answers,
            nodes=await found,
            work=await items,
            unseen=self._unseen,
        )

    async def _part(
        self, name: str, bus: Bus | None, look: Callable[[Bus], Awaitable[T]], *, of: ServiceCard | None = None
    ) -> T | None:
        """What *look* sees; None when it cannot, and then :attr:`_unseen` says why; or when the mesh is not meant to
        have the service that is asked."""
        if of is not None and not self._facts.supervision.expects(of.name):
            return None
        if bus is None:
            good = any(login.outcome == "ok" for login in self._facts.logins)
            self._unseen[name] = "needs the credentials of the role services" if good else "no connection to NATS"
            return None
        try:
            return await asyncio.wait_for(look(bus), 2 * ANSWER_S)
        except BusError as error:
            self._unseen[name] = str(error)
        except TimeoutError:
            self._unseen[name] = f"no answer in {2 * ANSWER_S:g} s"
        except ValueError as error:
            self._unseen[name] = f"not readable: {error}"
        return None

    async def _answers(self, bus: Bus) -> list[Answer]:
        node_id = self._facts.supervision.node_id
        processes = self._facts.supervision.processes
        ready = [p.name for p in processes if p.state == "ready" and re.sub(r"-\d+$", "", p.name) in on_the_bus()]
        expected = {f"{name}-{node_id}"[:63] for name in ready}
        pongs = await survey.ping(bus, expected=expected, wait_s=ANSWER_S / 2)
        return [Answer(name=p.name, instance=p.metadata.get("instance", p.id), version=p.version) for p in pongs]


async def _store(bus: Bus) -> Store:
    try:
        info = await survey.account(bus)
    except BusError as error:
        return Store(enabled=False, problem=f"it does not answer: {error}")
    if info.error is not None:
        return Store(enabled=False, problem=info.error.description)
    return Store(
        enabled=True, used_bytes=info.storage, bytes_max=info.limits.max_storage, reserved_bytes=info.reserved_storage
    )


async def _streams(bus: Bus) -> list[Stream]:
    differs = await drift(bus)
    declared = [(stream.name, stream.owner) for stream in storage.STREAMS]
    declared += [(bucket.stream, bucket.owner) for bucket in (*storage.BUCKETS, *storage.OBJECT_BUCKETS)]
    return [await _stream(bus, name, owner, differs.get(name, [])) for name, owner in declared]


async def _stream(bus: Bus, name: str, owner: str, differs: list[str]) -> Stream:
    info = await survey.stream(bus, name)
    if info is None:
        return Stream(name=name, owner=owner, missing=True)
    replicas = int(info.config.get("num_replicas", 1))
    return Stream(
        name=name,
        owner=owner,
        bytes=info.state.bytes,
        bytes_max=int(info.config.get("max_bytes", -1)),
        messages=info.state.messages,
        # How many replicas are wanted is known to the services only, from their configuration.
        differs=[setting for setting in differs if setting != "num_replicas"],
        replicas=replicas,
        behind=[replica.name for replica in info.cluster.replicas if replica.offline or not replica.current],
        leaderless=replicas > 1 and not info.cluster.leader,
    )


async def _leases(bus: Bus) -> dict[str, str]:
    held = await Bucket(bus, storage.LEASES).load()
    return {service: entry.value.holder for service, entry in held.items()}


async def _clocks(bus: Bus) -> list[Clock]:
    compared = await survey.clock_ahead_s(bus, storage.WORK_INBOX.name)
    return [Clock(whose="the NATS server", ahead_s=compared[0], within_s=compared[1])] if compared else []


async def _nodes(bus: Bus) -> list[NodeView]:
    found: list[NodeView] = []
    after = ""
    while True:
        page: nodes.NodeList = await _ask(bus, nodes.QUERY, nodes.NodesQuery(limit=10_000, after=after))
        found += page.nodes
        if not (after := page.next):
            return found


async def _work(bus: Bus) -> Work:
    counts: dict[str, int] = {}
    newest: dict[WorkState, work.WorkSummary | None] = {}
    for state in WorkState:
        found: work.WorkItems = await _ask(bus, work.LIST, WorkList(status=state, limit=1))
        counts[state.value] = found.count
        newest[state] = found.items[0] if found.items else None
    oldest, why = None, ""
    if counts[WorkState.PENDING]:
        waiting: work.WorkItems = await _ask(bus, work.LIST, WorkList(status=WorkState.PENDING, limit=10_000))
        oldest = min(waiting.items, key=lambda item: item.submitted_at, default=None)
    if oldest is not None:
        with contextlib.suppress(BusError):  # It may have left meanwhile.
            explained: work.WorkExplanation = await _ask(bus, work.EXPLAIN, work.WorkGet(work_id=oldest.work_id))
            why = explained.summary
    listed: work.Blacklist = await _ask(bus, work.BLACKLIST, work.BlacklistGet())
    return Work(
        counts=counts,
        oldest=oldest,
        why=why,
        retrying=newest[WorkState.RETRYING],
        dead=newest[WorkState.DEAD],
        blacklisted=listed.entries,
    )


async def _ask(bus: Bus, request: Request[Any, Any], question: Message) -> Any:
    answer = await bus.ask(request, question, timeout_s=ANSWER_S)
    if isinstance(answer, Refused):
        raise BusError(answer.reason)
    return answer
