"""The doctor's judgement: each check turns facts into findings. Pure; the order here is the order shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Final

from computemesh.cli.doctor.facts import Edge, Facts, File, Login, Process, Stream, Violation
from computemesh.contracts.catalog import on_the_bus, targeted
from computemesh.contracts.nodes import NodeState, NodeView
from computemesh.contracts.work import Blacklisted
from computemesh.findings import Finding, ok, problem, skipped, warning

Check = Callable[[Facts], Iterator[Finding]]

MIB: Final = 1024 * 1024

FILLED_WARNING: Final = 0.8
FILLED_PROBLEM: Final = 0.95
"""Share of a limit in use from which there is a warning, or a problem."""

DISK_WARNING_BYTES: Final = 2048 * MIB
DISK_PROBLEM_BYTES: Final = 512 * MIB

SKEW_WARNING_S: Final = 1.0
SKEW_PROBLEM_S: Final = 30.0
NODE_SKEW_S: Final = 3.0
"""For nodes, whose heartbeats take a while to arrive on a busy mesh."""
"""Clocks further apart spoil the ages and times that are shown, and the latter also retries and expiry."""

STUCK_S: Final = 60.0
"""An item that waits longer is worth a look."""

RECENT_S: Final = 3600.0
"""What happened longer ago is history."""

LOOPING: Final = 3
"""Restarts from which a service that fell over within the last minute is in a crash loop."""

LOOP_S: Final = 60.0

OPEN_FILES_MIN: Final = 1024
"""Each node, client and engine is a connection, and so an open file."""

CONTROL_PLANE: Final = ("node-registry", "work-marshaller")
"""The services that act under a lease."""

SHOWN_MAX: Final = 10
"""Of what may be endless, such as denied subjects, so many are shown."""

PYTHON_MIN: Final = (3, 11)


def examine(facts: Facts) -> list[Finding]:
    """All findings, in the order of the checks."""
    return [finding for check in CHECKS for finding in check(facts)]


# --- this machine --------------------------------------------------------------------------------------------


def home(facts: Facts) -> Iterator[Finding]:
    """The home folder and the files with secrets are there, ours, and private."""
    place = facts.home
    if not place.exists:
        if not facts.external:
            yield ok("home", f"{place.path} is not there: no mesh ran here yet")
        return
    faults = [fault for file in (place, *facts.secrets) if (fault := _not_private(file)) is not None]
    yield from faults
    for file in facts.secrets:
        if file.problem and file.readable:
            yield problem(
                "credentials", f"{file.path}: {file.problem}",
                "stop the mesh and remove the file: new ones are made at the next `computemesh up`",
            )  # fmt: skip
        elif file.problem:
            yield problem("credentials", f"{file.path}: {file.problem}", f"chmod 600 {file.path}, as its owner")
    if not faults:
        yield ok("home", f"{place.path}, open to its owner only")


def _not_private(file: File) -> Finding | None:
    if not file.exists:
        return None
    if not file.owned:
        return warning(
            "home", f"{file.path} belongs to another user", "run this as the user who started the mesh"
        )  # fmt: skip
    if file.mode & 0o077:
        wanted = f"{file.mode & 0o700:o}"
        return problem(
            "home", f"{file.path} is open to other users (mode {file.mode:o}), and holds or leads to passwords",
            f"chmod {wanted} {file.path}; if others use this machine, renew the passwords: `computemesh down`, "
            "remove credentials.json, `computemesh up`",
        )  # fmt: skip
    return None


def python(facts: Facts) -> Iterator[Finding]:
    """Python and what we depend on are new enough."""
    faults = False
    shown = ".".join(map(str, facts.python))
    if facts.python < PYTHON_MIN:
        faults = True
        yield problem("python", f"Python {shown} is too old", f"install {'.'.join(map(str, PYTHON_MIN))} or newer")
    for package in facts.packages:
        if not package.found or older(package.found, package.least):
            faults = True
            how = f"{package.found} is older than {package.least}" if package.found else "is not installed"
            yield problem("python", f"{package.name} {how}", f"pip install '{package.name}>={package.least}'")
    if not faults:
        yield ok("python", f"Python {shown}, computemesh {facts.version}, {len(facts.packages)} dependencies")


def older(version: str, than: str) -> bool:
    """Whether a version comes before another, by its numbers."""
    numbers, least = ([int(part) for part in re.findall(r"\d+", text)] for text in (version, than))
    return numbers[: len(least)] < least


def disk(facts: Facts) -> Iterator[Finding]:
    """There is room for the store, logs and results."""
    if facts.disk is None:
        return
    free, text = facts.disk.free_bytes, f"{size(facts.disk.free_bytes)} free of {size(facts.disk.total_bytes)}"
    todo = f"make room on the disk of {facts.disk.path}; the mesh's own share: du -sh {facts.home.path}/*"
    if free < DISK_PROBLEM_BYTES:
        yield problem("disk", f"nearly full: {text}", todo)
    elif free < DISK_WARNING_BYTES:
        yield warning("disk", f"getting full: {text}", todo)
    else:
        yield ok("disk", text)


def open_files(facts: Facts) -> Iterator[Finding]:
    """Nobody runs out of file descriptors soon."""
    near = [p for p in facts.supervision.processes if _used(p.open_files, p.open_files_max) >= FILLED_WARNING]
    raise_it = "raise it with `ulimit -n 65536` before `computemesh up`, or LimitNOFILE= in its unit"
    for process in near:
        yield problem(
            "open files", f"{process.name} has {process.open_files} open, of {process.open_files_max}", raise_it
        )  # fmt: skip
    if near:
        return
    if 0 < facts.open_files_max < OPEN_FILES_MIN:
        yield warning("open files", f"a process may have {facts.open_files_max}", raise_it)
    elif facts.open_files_max:
        yield ok("open files", f"a process may have {facts.open_files_max}")


def machine(facts: Facts) -> Iterator[Finding]:
    """What the services say about this machine: models, engines, drivers."""
    yield from facts.machine


# --- what runs -----------------------------------------------------------------------------------------------


def supervisor(facts: Facts) -> Iterator[Finding]:
    """A supervisor runs on this home, and answers for what we run."""
    found = facts.supervision
    if found.unreadable:
        yield problem("supervisor", found.unreadable, "run this as the user who started the mesh")
    elif not found.running:
        if facts.external:
            return
        yield problem("supervisor", f"no mesh runs in {facts.home.path}", "start one with `computemesh up`")
    elif not found.pid:
        yield problem(
            "supervisor", "it runs, but left no status", "wait a moment; if it stays so, end it and `computemesh up`"
        )  # fmt: skip
    elif found.alive == "stopped":
        yield problem("supervisor", f"process {found.pid} is halted by a signal", f"kill -CONT {found.pid}")
    elif found.version != facts.version:
        yield warning(
            "supervisor", f"it is version {found.version}, this command is {facts.version}",
            "computemesh down && computemesh up",
        )  # fmt: skip
    else:
        yield ok("supervisor", f"process {found.pid}, up {age(facts.now - found.started_at)}, node {found.node_id}")


def processes(facts: Facts) -> Iterator[Finding]:
    """Every process the supervisor keeps is there and stays there."""
    for process in facts.supervision.processes:
        yield _process(process, facts)


def _process(process: Process, facts: Facts) -> Finding:
    log = f"{facts.home.path}/" + ("nats/nats-server.log" if process.name == "nats-server" else "logs/")
    log = log if log.endswith(".log") else f"{log}{process.name}.log"
    ago = facts.now - process.since
    if process.state == "failed":
        return problem(process.name, process.reason or "it failed", f"see {log}; then `computemesh down` and `up`")
    if process.state == "waiting" or (process.restarts >= LOOPING and ago < LOOP_S):
        why = f", last because it {process.reason}" if process.reason else ""
        return problem(process.name, f"crash loop: started again {times(process.restarts)}{why}", f"see {log}")
    if process.alive == "gone":
        return problem(process.name, f"process {process.pid} is gone", f"it is started again in a moment; else {log}")
    if process.alive == "stopped":
        return problem(process.name, f"process {process.pid} is halted by a signal", f"kill -CONT {process.pid}")
    if process.state != "ready" and process.unready:
        return problem(process.name, f"not ready for {age(ago)}: {process.unready}", f"mend that; else see {log}")
    if process.state != "ready":
        return warning(process.name, f"{process.state} for {age(ago)}", f"wait a moment; if it stays so, see {log}")
    if process.restarts and ago < RECENT_S:
        return warning(process.name, f"was started again {times(process.restarts)}, last {age(ago)} ago", f"see {log}")
    return ok(process.name, f"process {process.pid}, ready for {age(ago)}")


def ports(facts: Facts) -> Iterator[Finding]:
    """Before a mesh runs: the documented ports are free."""
    if facts.supervision.running or facts.supervision.unreadable:
        return
    taken = [port for port in facts.ports if port.holder]
    for port in taken:
        yield warning(
            "ports", f"{port.port}, of {port.service}, is taken by {port.holder}",
            "end that program, or start with `computemesh up --ports any`",
        )  # fmt: skip
    if facts.ports and not taken:
        yield ok("ports", f"{', '.join(str(port.port) for port in facts.ports)} are free")


# --- the bus -------------------------------------------------------------------------------------------------


def logins(facts: Facts) -> Iterator[Finding]:
    """The NATS server is there and takes the credentials of each role."""
    by_outcome: dict[str, list[Login]] = {}
    for login in facts.logins:
        by_outcome.setdefault(login.outcome, []).append(login)
    yield from (_login_fault(outcome, found, facts) for outcome, found in by_outcome.items() if outcome != "ok")
    good = by_outcome.get("ok", [])
    if not good:
        return
    if not (facts.supervision.running or facts.supervision.unreadable or facts.external):
        yield warning(
            "nats", f"{good[0].address} answers although no supervisor runs",
            "`computemesh down` ends what a killed supervisor left; then `computemesh up`",
        )  # fmt: skip
    else:
        slowest_ms = max(login.took_s for login in good) * 1000
        yield ok("nats", f"{good[0].address} takes the credentials of {_roles(good)}; login {slowest_ms:.0f} ms")


def _login_fault(outcome: str, found: list[Login], facts: Facts) -> Finding:
    address, roles = found[0].address, _roles(found)
    if outcome == "denied":
        todo = "is NATS_URL an old one? else the server has other credentials than this home: restart the mesh"
        if facts.external:
            todo = "check the user and the password in NATS_URL"
        elif facts.supervision.joined:
            me = facts.supervision.node_id
            todo = (
                f"was {me} revoked? let it in again by `computemesh nodes invite {me}` on the mesh's machine, and join"
            )
        return problem("nats", f"{address} refuses the credentials of {roles}", todo)
    if outcome == "silent":
        return problem(
            "nats", f"{address} does not answer {roles} ({found[0].words or 'nothing came'})",
            "is its process halted, the machine overloaded, or something else listening there?",
        )  # fmt: skip
    todo = "check NATS_URL and that server" if facts.external else "see nats/nats-server.log in the home"
    if facts.supervision.joined:
        todo = "does that server run, and can it be reached from here?"
    return problem("nats", f"nothing listens at {address}", todo)


def _roles(logins: list[Login]) -> str:
    return ", ".join(login.role for login in logins)


def store(facts: Facts) -> Iterator[Finding]:
    """JetStream is on and has room."""
    if facts.store is None:
        return
    found = facts.store
    if not found.enabled:
        yield problem(
            "jetstream", found.problem or "it is not enabled",
            "enable it on that server (`jetstream {}` in its configuration) for the account of this mesh",
        )  # fmt: skip
        return
    used = _used(found.used_bytes, found.bytes_max)
    text = f"{size(found.used_bytes)} stored" + (f" of {size(found.bytes_max)}" if found.bytes_max > 0 else "")
    if used >= FILLED_WARNING:
        make = problem if used >= FILLED_PROBLEM else warning
        yield make("jetstream", f"the account's limit is near: {text}", "raise max_file of the account on that server")
    else:
        yield ok("jetstream", text)


def streams(facts: Facts) -> Iterator[Finding]:
    """Every stream and bucket is there, as declared, with room, and replicated as told."""
    if facts.streams is None:
        return
    faults = [finding for stream in facts.streams for finding in _stream(stream)]
    yield from faults
    if not faults:
        yield ok("streams", f"{', '.join(stream.name for stream in facts.streams)}: present, as declared")


def _stream(stream: Stream) -> Iterator[Finding]:
    renew = "services set up what differs at their start: computemesh down && computemesh up"
    if stream.missing:
        yield problem(stream.name, "it is missing; what it held is gone", renew)
        return
    if stream.leaderless:
        yield problem(stream.name, "it has no leader", "see to the NATS servers: a majority of its replicas must run")
    if stream.differs:
        yield warning(stream.name, f"not as declared: {', '.join(stream.differs)}", renew)
    if stream.behind:
        yield warning(
            stream.name, f"replicas behind or offline: {', '.join(stream.behind)}", "see to those NATS servers"
        )  # fmt: skip
    used = _used(stream.bytes, stream.bytes_max)
    if used >= FILLED_WARNING:
        make = problem if used >= FILLED_PROBLEM else warning
        text = f"{used:.0%} full: {size(stream.bytes)} of {size(stream.bytes_max)} in {stream.messages} messages"
        yield make(stream.name, text, _make_room(stream))


def _make_room(stream: Stream) -> str:
    if stream.name == "KV_compute-work":
        return "finished items stay too long: lower COMPUTEMESH_WORK_KEEP_S of the work-marshaller and restart it"
    return f"find out who writes so much: `computemesh events`; it belongs to {stream.owner}"


def answers(facts: Facts) -> Iterator[Finding]:
    """Every service that should run answers on the bus, with our version."""
    if facts.answers is None:
        return
    expected = [p.name for p in facts.supervision.processes] or list(CONTROL_PLANE)
    heard = {answer.name for answer in facts.answers}
    names = dict.fromkeys(re.sub(r"-\d+$", "", name) for name in expected)
    missing = [name for name in names if name in on_the_bus() and name not in heard]
    for name in missing:
        yield problem(
            name, "does not answer on the bus", "look at its line above and at its log; is it halted or overloaded?"
        )  # fmt: skip
    others = [answer for answer in facts.answers if answer.version != facts.version]
    for answer in others:
        yield warning(
            answer.name, f"{answer.instance} is version {answer.version}, this command is {facts.version}",
            "bring all to one version: computemesh down && computemesh up",
        )  # fmt: skip
    if not missing and not others:
        counts = [f"{name} × {count}" if (count := _count(name, facts)) > 1 else name for name in sorted(heard)]
        yield ok("answers", f"{', '.join(counts)}: all answer, version {facts.version}")


def _count(name: str, facts: Facts) -> int:
    return sum(answer.name == name for answer in facts.answers or ())


def edges(facts: Facts) -> Iterator[Finding]:
    """Every service says over HTTP that it is ready."""
    good = [edge for edge in facts.edges if edge.status == 200]
    yield from (_edge(edge) for edge in facts.edges if edge.status != 200)
    if good and len(good) == len(facts.edges):
        yield ok("http", f"{len(good)} edges say that they are ready")


def _edge(edge: Edge) -> Finding:
    if edge.status == 0:
        return problem(edge.service, f"{edge.url}/readyz: {edge.reason}", "is its process halted or overloaded?")
    return problem(
        edge.service, f"{edge.url}/readyz: {edge.status}, {edge.reason or 'no reason given'}",
        f"wait a moment; if it stays so, see {edge.url}/healthz and the log of {edge.service}",
    )  # fmt: skip


def leases(facts: Facts) -> Iterator[Finding]:
    """Somebody acts for each service of the control plane."""
    if facts.leases is None:
        return
    meant = [service for service in CONTROL_PLANE if facts.supervision.expects(service)]
    free = [service for service in meant if service not in facts.leases]
    for service in free:
        yield problem(
            service, "nobody holds its lease, so nobody acts",
            "a lease is taken within seconds: try again; if it stays free, see the log of that service",
        )  # fmt: skip
    if not free and facts.leases:
        yield ok("leases", ", ".join(f"{service}: {holder}" for service, holder in sorted(facts.leases.items())))


def clocks(facts: Facts) -> Iterator[Finding]:
    """The clocks that can be compared with ours agree."""
    far = [clock for clock in facts.clocks if abs(clock.ahead_s) - clock.within_s > SKEW_WARNING_S]
    for clock in far:
        make = problem if abs(clock.ahead_s) - clock.within_s > SKEW_PROBLEM_S else warning
        where = "ahead of" if clock.ahead_s > 0 else "behind"
        yield make("clocks", f"{clock.whose} is {abs(clock.ahead_s):.1f} s {where} this machine", "run NTP on both")
    if facts.clocks and not far:
        yield ok("clocks", "; ".join(f"{c.whose} within {max(abs(c.ahead_s), c.within_s):.3f} s" for c in facts.clocks))


# --- nodes and work ------------------------------------------------------------------------------------------


def nodes(facts: Facts) -> Iterator[Finding]:
    """There are nodes, and they are alive."""
    if facts.nodes is None:
        return
    if not facts.nodes:
        yield warning(
            "nodes", "none has announced itself, so no work can run",
            "give this one a model (`computemesh up --models FILE.gguf`), or start agents elsewhere",
        )  # fmt: skip
        return
    for node in facts.nodes:
        if node.state is NodeState.SUSPECT:
            yield warning(
                node.node_id, f"silent for {_silent(node, facts)}: gets no new work", f"see to {node.hostname or 'it'}"
            )
        elif node.state is NodeState.LOST and facts.now - node.changed_at < RECENT_S:
            yield warning(
                node.node_id, f"lost, silent for {_silent(node, facts)}: its work was given to others",
                f"is {node.hostname or 'that machine'} up, and its node-agent running with the address of this bus?",
            )  # fmt: skip
        elif node.clock_skew_s is not None and abs(node.clock_skew_s) > NODE_SKEW_S:
            where = "ahead of" if node.clock_skew_s > 0 else "behind"
            yield warning(
                node.node_id, f"its clock is {abs(node.clock_skew_s):.1f} s {where} the registry's", "run NTP on both"
            )  # fmt: skip
    online = sum(node.state is NodeState.ONLINE for node in facts.nodes)
    lost = sum(node.state is NodeState.LOST for node in facts.nodes)
    if not online:
        yield problem("nodes", f"none of {len(facts.nodes)} is online, so no work can run", "see to the nodes above")
    elif not any(node.slots for node in facts.nodes if node.state is NodeState.ONLINE):
        yield warning(
            "nodes", f"of {online} online none takes work",
            "give one a model (`computemesh up --models FILE.gguf`) or an executor; its log says what it lacks",
        )  # fmt: skip
    else:
        yield ok("nodes", f"{online} of {len(facts.nodes)} online" + (f", {lost} lost" if lost else ""))


def _silent(node: NodeView, facts: Facts) -> str:
    return age(facts.now - node.last_seen) if node.last_seen else "longer than anybody here remembers"


def work(facts: Facts) -> Iterator[Finding]:
    """No item waits for what will not come, and none was given up."""
    if facts.work is None:
        return
    found = facts.work
    faults = False
    if found.oldest is not None and (waits_s := facts.now - found.oldest.submitted_at) > STUCK_S:
        faults = True
        yield warning(
            "work", f"{found.counts['pending']} wait, {found.oldest.work_id} for {age(waits_s)}: {found.why}",
            f"computemesh work show {found.oldest.work_id}",
        )  # fmt: skip
    if found.retrying is not None:
        faults = True
        why = found.retrying.error.reason if found.retrying.error else "no reason was given"
        yield warning(
            "work", f"{found.counts['retrying']} wait to be tried again, {found.retrying.work_id} because: {why}",
            f"computemesh work show {found.retrying.work_id}",
        )  # fmt: skip
    if found.dead is not None and facts.now - found.dead.changed_at < RECENT_S:
        faults = True
        why = found.dead.error.reason if found.dead.error else "no reason was given"
        last = f"the last {age(facts.now - found.dead.changed_at)} ago"
        yield warning(
            "work", f"{found.counts['dead']} given up, {last}: {why}", "computemesh work list --status dead"
        )  # fmt: skip
    if not faults:
        counts = ", ".join(f"{count} {state}" for state, count in found.counts.items() if count)
        yield ok("work", counts or "none")


def blacklist(facts: Facts) -> Iterator[Finding]:
    """Every node gets the work it is made for."""
    listed = facts.work.blacklisted if facts.work is not None else ()
    for one in listed[:SHOWN_MAX]:
        yield warning("blacklist", _blacklisted(one, facts.now), f"computemesh work pardon {one.node_id}")
    if more := listed[SHOWN_MAX:]:
        yield warning("blacklist", f"{len(more)} more nodes and kinds of work", "computemesh work blacklist")


def _blacklisted(one: Blacklisted, now: float) -> str:
    kind = one.work_type + (f" with {one.model_name}" if one.model_name else "")
    if one.probing:
        until = f"until {one.probing}, which is tried on it, goes well"
    elif one.until > now:
        clock = f"{datetime.fromtimestamp(one.until, UTC):%H:%M:%S} UTC"
        until = f"until {clock}, in {age(one.until - now)}"
    else:
        until = "but the next item, which is tried on it"
    return f"{one.node_id} gets no {kind} {until}; the last that failed there: {one.reason}"


# --- what was logged -----------------------------------------------------------------------------------------


def violations(facts: Facts) -> Iterator[Finding]:
    """Nobody tries what their role may not do."""
    latest = sorted(facts.violations, key=lambda violation: violation.last_at, reverse=True)
    for violation in latest[:SHOWN_MAX]:
        yield warning("permissions", _violated(violation, facts.now), _allow(violation))
    if more := latest[SHOWN_MAX:]:
        yield warning("permissions", f"{len(more)} more users and subjects were denied", "see nats/nats-server.log")


def _violated(violation: Violation, now: float) -> str:
    often = f"{times(violation.count)}, last {age(now - violation.last_at)} ago"
    client = f" ({violation.client})" if violation.client else ""
    if violation.verb == "login":
        return f"wrong credentials for user {violation.who!r}{client}, {often}"
    verb = "publish to" if violation.verb == "publish" else "hear"
    return f"{violation.who}{client} may not {verb} {violation.subject}: {often}"


def _allow(violation: Violation) -> str:
    if violation.verb == "login":
        return "give that program what `computemesh env` prints now"
    if violation.subject.startswith(("$JS.", "$KV.", "$O.")):
        return (
            "only services reach JetStream: submit by publishing to compute.work.submit.v1, read compute.work.state.v1"
        )
    if violation.subject.startswith("_INBOX"):
        return "set the inbox prefix of that program's NATS library to NATS_INBOX_PREFIX of `computemesh env`"
    if missing := targeted().get(violation.subject):
        return f"the subject is not complete: it ends with a {missing}, as {violation.subject}.<{missing}>"
    return "connect that program in the role that may: see docs/reference/permissions.md and `computemesh env --role`"


def complaints(facts: Facts) -> Iterator[Finding]:
    """No service logs errors."""
    for complaint in facts.complaints:
        when = f"{times(complaint.count)}, last {age(facts.now - complaint.last_at)} ago"
        reason = f": {complaint.reason}" if complaint.reason else ""
        yield warning(complaint.service, f"logged {complaint.event!r}{reason}, {when}", f"see {complaint.file}")


def unseen(facts: Facts) -> Iterator[Finding]:
    """What could not be looked at, and why."""
    by_reason: dict[str, list[str]] = {}
    for part, reason in facts.unseen.items():
        by_reason.setdefault(reason, []).append(part)
    for reason, parts in by_reason.items():
        yield skipped("not seen", f"{', '.join(parts)}: {reason}")


# --- words ---------------------------------------------------------------------------------------------------


def _used(part: int, whole: int) -> float:
    return part / whole if whole > 0 else 0.0


def size(count: int) -> str:
    """Bytes for people, as 1.5 GiB."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def age(seconds: float) -> str:
    """A duration for people, as 3 h."""
    for length, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


CHECKS: Final[tuple[Check, ...]] = (
    home,
    python,
    disk,
    open_files,
    machine,
    supervisor,
    processes,
    ports,
    logins,
    store,
    streams,
    answers,
    edges,
    leases,
    clocks,
    nodes,
    work,
    blacklist,
    violations,
    complaints,
    unseen,
)
