"""What the doctor concludes from facts.

Goal: every trouble it knows gives its finding, with something to do, and a healthy mesh gives none.
Method: the facts of a healthy mesh, and each trouble as one change to them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Final

import pytest
from msgspec import structs

from computemesh.cli.doctor import checks, logs
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
from computemesh.contracts.nodes import NodeState, NodeView
from computemesh.contracts.work import Blacklisted, WorkError, WorkState, WorkSummary
from computemesh.findings import Finding, Level, warning

NOW: Final = 1_000_000.0
MIB: Final = 1024 * 1024
SERVICES: Final = ("node-registry", "work-marshaller", "node-agent")


def process(name: str, **changes: Any) -> Process:
    """A process that is well."""
    return replace(Process(name=name, pid=7, since=NOW - 7200, alive="running", http="http://h"), **changes)


def supervision(**changes: Any) -> Supervision:
    """A supervisor that is well, and keeps what is well."""
    well = Supervision(
        running=True,
        pid=5,
        alive="running",
        version="1",
        started_at=NOW - 7200,
        node_id="n1",
        processes=[process(name) for name in ("nats-server", *SERVICES)],
    )
    return replace(well, **changes)


def stream(**changes: Any) -> Stream:
    return replace(Stream(name="COMPUTE_WORK", owner="work-marshaller", bytes=1, bytes_max=100 * MIB), **changes)


def node(node_id: str = "n1", **changes: Any) -> NodeView:
    """A node that is online."""
    return structs.replace(NodeView(node_id=node_id, monitored=True, last_seen=NOW - 3, changed_at=NOW - 60), **changes)


def item(state: WorkState, **changes: Any) -> WorkSummary:
    """An item that was submitted just now."""
    return structs.replace(
        WorkSummary(work_id="w1", state=state, work_type="inference", submitted_at=NOW - 5), **changes
    )


def listed(**changes: Any) -> Blacklisted:
    """A node on which items keep failing."""
    return structs.replace(
        Blacklisted(
            node_id="n2",
            work_type="inference",
            model_name="llama",
            failures=3,
            since=NOW - 30,
            until=NOW,
            reason="no CUDA",
        ),
        **changes,
    )


HEALTHY: Final = Facts(
    now=NOW,
    version="1",
    home=File(path="/h", mode=0o700),
    secrets=[File(path="/h/credentials.json")],
    supervision=supervision(),
    logins=[Login(role=role, address="nats://h", outcome="ok") for role in ("services", "client")],
    store=Store(enabled=True, used_bytes=5),
    streams=[stream()],
    answers=[Answer(name=name, instance=f"{name}-n1", version="1") for name in SERVICES],
    edges=[Edge(service=name, url="http://h", status=200) for name in SERVICES],
    leases={"node-registry": "a", "work-marshaller": "b"},
    clocks=[Clock(whose="the NATS server", ahead_s=0.01, within_s=0.02)],
    nodes=[node()],
    work=Work(counts={"pending": 1, "dead": 0}, oldest=item(WorkState.PENDING)),
    disk=Disk(path="/", total_bytes=10**12, free_bytes=10**11),
    python=(3, 11, 7),
    packages=[Package(name="click", least="8.1", found="8.5.1")],
    open_files_max=65536,
)


def troubles(facts: Facts) -> list[Finding]:
    """What is not well. Each names what to do."""
    found = [finding for finding in checks.examine(facts) if finding.level in (Level.WARNING, Level.PROBLEM)]
    assert all(finding.text and finding.todo for finding in found)
    return found


def test_a_healthy_mesh_has_no_trouble_and_every_check_says_so() -> None:
    """Else a new check could be silent for ever."""
    assert troubles(HEALTHY) == []
    silent = [check.__name__ for check in checks.CHECKS if not list(check(HEALTHY))]
    assert silent == ["machine", "ports", "blacklist", "violations", "complaints", "unseen"]


def with_process(**changes: Any) -> dict[str, Any]:
    """The marshaller in trouble."""
    kept = [
        process("nats-server"),
        process("node-registry"),
        process("work-marshaller", **changes),
        process("node-agent"),
    ]
    return {"supervision": supervision(processes=kept)}


def with_stream(**changes: Any) -> dict[str, Any]:
    return {"streams": [stream(**changes)]}


def with_login(outcome: str) -> dict[str, Any]:
    return {"logins": [Login(role="client", address="nats://h", outcome=outcome)]}  # type: ignore[arg-type]  # as parametrised


REASON: Final = WorkError(reason="no such file")

TROUBLES: Final[list[tuple[str, dict[str, Any], Level, str, str]]] = [
    ("open home", {"home": File(path="/h", mode=0o755)}, Level.PROBLEM, "home", "/h is open to other users (mode 755)"),
    ("open secret", {"secrets": [File(path="/h/c", mode=0o640)]}, Level.PROBLEM, "home", "mode 640"),
    ("foreign home", {"home": File(path="/h", owned=False)}, Level.WARNING, "home", "another user"),
    ("spoilt credentials", {"secrets": [File(path="/h/c", problem="it holds no credentials")]}, Level.PROBLEM,
     "credentials", "it holds no credentials"),
    ("unreadable credentials", {"secrets": [File(path="/h/c", readable=False, problem="permission denied")]},
     Level.PROBLEM, "credentials", "permission denied"),
    ("old python", {"python": (3, 10, 1)}, Level.PROBLEM, "python", "3.10.1 is too old"),
    ("old package", {"packages": [Package(name="click", least="8.10", found="8.9.9")]}, Level.PROBLEM, "python",
     "click 8.9.9 is older than 8.10"),
    ("no package", {"packages": [Package(name="click", least="8", found="")]}, Level.PROBLEM, "python",
     "click is not installed"),
    ("disk nearly full", {"disk": Disk(path="/", total_bytes=10**12, free_bytes=10**8)}, Level.PROBLEM, "disk",
     "nearly full"),
    ("disk getting full", {"disk": Disk(path="/", total_bytes=10**12, free_bytes=10**9)}, Level.WARNING, "disk",
     "getting full"),
    ("few open files", {"open_files_max": 256}, Level.WARNING, "open files", "may have 256"),
    ("open files used up", with_process(open_files=900, open_files_max=1000), Level.PROBLEM, "open files",
     "work-marshaller has 900 open, of 1000"),
    ("the machine", {"machine": [warning("models", "no model", "give one")]}, Level.WARNING, "models", "no model"),
    ("unreadable lock", {"supervision": Supervision(running=False, unreadable="/h/run/lock: permission denied")},
     Level.PROBLEM, "supervisor", "permission denied"),
    ("no mesh", {"supervision": Supervision(running=False), "logins": []}, Level.PROBLEM, "supervisor", "no mesh runs"),
    ("no status", {"supervision": Supervision(running=True)}, Level.PROBLEM, "supervisor", "left no status"),
    ("halted supervisor", {"supervision": supervision(alive="stopped")}, Level.PROBLEM, "supervisor", "halted"),
    ("old supervisor", {"supervision": supervision(version="0")}, Level.WARNING, "supervisor", "version 0"),
    ("failed", with_process(state="failed", reason="wrong configuration"), Level.PROBLEM, "work-marshaller",
     "wrong configuration"),
    ("waiting", with_process(state="waiting", restarts=1, reason="was killed by SIGKILL"), Level.PROBLEM,
     "work-marshaller", "crash loop: started again once, last because it was killed by SIGKILL"),
    ("looping", with_process(restarts=3, since=NOW - 5), Level.PROBLEM, "work-marshaller", "crash loop"),
    ("restarted", with_process(restarts=3, since=NOW - 600), Level.WARNING, "work-marshaller",
     "started again 3 times, last 10 min ago"),
    ("gone", with_process(alive="gone"), Level.PROBLEM, "work-marshaller", "is gone"),
    ("halted", with_process(alive="stopped"), Level.PROBLEM, "work-marshaller", "halted"),
    ("starting", with_process(state="starting"), Level.WARNING, "work-marshaller", "starting"),
    ("waiting for something", with_process(state="starting", unready="no space left"), Level.PROBLEM,
     "work-marshaller", "not ready for 2 h: no space left"),
    ("denied", with_login("denied"), Level.PROBLEM, "nats", "refuses the credentials of client"),
    ("silent", with_login("silent"), Level.PROBLEM, "nats", "does not answer client"),
    ("refused", with_login("refused"), Level.PROBLEM, "nats", "nothing listens at nats://h"),
    ("left server", {"supervision": Supervision(running=False), "external": False}, Level.WARNING, "nats",
     "answers although no supervisor runs"),
    ("no jetstream", {"store": Store(enabled=False, problem="not enabled for account")}, Level.PROBLEM, "jetstream",
     "not enabled for account"),
    ("account nearly full", {"store": Store(enabled=True, used_bytes=96, bytes_max=100)}, Level.PROBLEM, "jetstream",
     "limit is near"),
    ("missing stream", with_stream(missing=True), Level.PROBLEM, "COMPUTE_WORK", "missing"),
    ("drift", with_stream(differs=["max_bytes"]), Level.WARNING, "COMPUTE_WORK", "not as declared: max_bytes"),
    ("filling", with_stream(bytes=81 * MIB), Level.WARNING, "COMPUTE_WORK", "81% full: 81.0 MiB of 100 MiB"),
    ("full", with_stream(bytes=99 * MIB), Level.PROBLEM, "COMPUTE_WORK", "99% full"),
    ("replica behind", with_stream(replicas=3, behind=["n2"]), Level.WARNING, "COMPUTE_WORK", "n2"),
    ("leaderless", with_stream(replicas=3, leaderless=True), Level.PROBLEM, "COMPUTE_WORK", "no leader"),
    ("one silent", {"answers": HEALTHY.answers[1:] if HEALTHY.answers else []}, Level.PROBLEM, "node-registry",
     "does not answer on the bus"),
    ("another version", {"answers": [Answer(name=name, instance="x", version="2") for name in SERVICES]},
     Level.WARNING, "node-registry", "is version 2, this command is 1"),
    ("edge not ready", {"edges": [Edge(service="node-agent", url="http://h", status=503, reason="draining")]},
     Level.PROBLEM, "node-agent", "503, draining"),
    ("edge silent", {"edges": [Edge(service="node-agent", url="http://h", reason="no answer in 2 s")]},
     Level.PROBLEM, "node-agent", "no answer in 2 s"),
    ("nobody acts", {"leases": {"node-registry": "a"}}, Level.PROBLEM, "work-marshaller", "nobody holds its lease"),
    ("clock ahead", {"clocks": [Clock(whose="x", ahead_s=2.5, within_s=0.1)]}, Level.WARNING, "clocks",
     "x is 2.5 s ahead of this machine"),
    ("clock far behind", {"clocks": [Clock(whose="x", ahead_s=-60, within_s=0.1)]}, Level.PROBLEM, "clocks", "behind"),
    ("no nodes", {"nodes": []}, Level.WARNING, "nodes", "none has announced itself"),
    ("no slots", {"nodes": [node(slots=0), node("n2", state=NodeState.LOST, changed_at=1.0)]}, Level.WARNING, "nodes",
     "of 1 online none takes work"),
    ("suspect", {"nodes": [node(), node("n2", state=NodeState.SUSPECT)]}, Level.WARNING, "n2", "silent for 3 s"),
    ("lost", {"nodes": [node(), node("n2", state=NodeState.LOST, last_seen=0.0)]}, Level.WARNING, "n2", "lost"),
    ("all lost long ago", {"nodes": [node(state=NodeState.LOST, changed_at=1.0)]}, Level.PROBLEM, "nodes",
     "none of 1 is online"),
    ("stuck", {"work": Work(counts={"pending": 4}, oldest=item(WorkState.PENDING, submitted_at=NOW - 300), why="no GPU")
               },
     Level.WARNING, "work", "4 wait, w1 for 5 min: no GPU"),
    ("retrying", {"work": Work(counts={"retrying": 2}, retrying=item(WorkState.RETRYING, error=REASON))},
     Level.WARNING, "work", "no such file"),
    ("dead", {"work": Work(counts={"dead": 2}, dead=item(WorkState.DEAD, changed_at=NOW - 60, error=REASON))},
     Level.WARNING, "work", "2 given up, the last 1 min ago: no such file"),
    ("blacklisted", {"work": Work(counts={}, blacklisted=[listed(until=NOW + 90)])},
     Level.WARNING, "blacklist", "llama until 13:48:10 UTC, in 2 min; the last that failed there: no CUDA"),
    ("tried again", {"work": Work(counts={}, blacklisted=[listed(until=NOW - 9, probing="w7")])},
     Level.WARNING, "blacklist", "n2 gets no inference with llama until w7, which is tried on it, goes well"),
    ("to be tried", {"work": Work(counts={}, blacklisted=[listed(until=NOW - 9)])},
     Level.WARNING, "blacklist", "n2 gets no inference with llama but the next item"),
    ("denied subject", {"violations": [Violation(who="client", verb="publish", subject="$KV.x", count=2, last_at=NOW)]},
     Level.WARNING, "permissions", "client may not publish to $KV.x: 2 times"),
    ("wrong password", {"violations": [Violation(who="node", verb="login", subject="", count=1, last_at=NOW)]},
     Level.WARNING, "permissions", "wrong credentials for user 'node'"),
    ("complaint", {"complaints": [Complaint(service="node-agent", event="ended by a defect", reason="KeyError: 'x'",
                                            count=3, last_at=NOW - 60, file="/h/l")]},
     Level.WARNING, "node-agent", "'ended by a defect': KeyError: 'x', 3 times, last 1 min ago"),
]  # fmt: skip


ALSO: Final = {
    "answers although no supervisor runs": {"supervisor"},
    "is version 2, this command is 1": set(SERVICES),
}
"""Findings that come with another."""


@pytest.mark.parametrize(
    ("changes", "level", "about", "says"), [row[1:] for row in TROUBLES], ids=[r[0] for r in TROUBLES]
)
def test_a_trouble_gives_its_finding(changes: dict[str, Any], level: Level, about: str, says: str) -> None:
    """And only that one, on an otherwise healthy mesh."""
    found = troubles(replace(HEALTHY, **changes))
    fitting = [finding for finding in found if finding.about == about and says in finding.text]
    assert fitting, found
    assert fitting[0].level is level
    assert {finding.about for finding in found} - {about} <= ALSO.get(says, set())


def test_where_no_mesh_runs_taken_ports_are_named() -> None:
    """Before `up` fails on them. While one runs they are its own."""
    taken = [Port(service="node-registry", port=8115, holder="nginx (process 9)")]
    idle = replace(HEALTHY, supervision=Supervision(running=False), ports=taken, logins=[])
    assert "8115, of node-registry, is taken by nginx (process 9)" in [finding.text for finding in troubles(idle)]
    assert troubles(replace(HEALTHY, ports=taken)) == []


def test_what_could_not_be_looked_at_is_said_once_for_each_reason() -> None:
    """And is no trouble by itself."""
    blind = replace(
        HEALTHY,
        store=None,
        streams=None,
        nodes=None,
        unseen={"JetStream": "no NATS", "streams": "no NATS", "nodes": "x"},
    )
    assert troubles(blind) == []
    said = [finding for finding in checks.examine(blind) if finding.level is Level.SKIPPED]
    assert [finding.text for finding in said] == ["JetStream, streams: no NATS", "nodes: x"]


def test_of_endless_denials_the_latest_are_shown_and_the_rest_counted() -> None:
    """A program in a loop must not hide everything else."""
    many = [Violation(who="client", verb="publish", subject=f"s{n}", count=1, last_at=NOW - n) for n in range(50)]
    found = [finding.text for finding in checks.violations(replace(HEALTHY, violations=many))]
    assert len(found) == checks.SHOWN_MAX + 1
    assert "s0" in found[0]
    assert f"{50 - checks.SHOWN_MAX} more" in found[-1]


def test_a_service_that_only_asks_is_not_missed_on_the_bus() -> None:
    """The gateway speaks HTTP; whether it is well stands at its process and its edge."""
    kept = [process("node-registry"), process("gateway")]
    answers = [Answer(name="node-registry", instance="a", version="1")]
    facts = replace(HEALTHY, supervision=supervision(processes=kept), answers=answers)
    assert [finding.text for finding in checks.answers(facts)] == ["node-registry: all answer, version 1"]


def test_replicas_of_a_service_answer_for_each_other() -> None:
    """`work-marshaller-2` is one more of the same."""
    kept = [process("work-marshaller"), process("work-marshaller-2")]
    answers = [Answer(name="work-marshaller", instance=name, version="1") for name in ("a", "b")]
    facts = replace(HEALTHY, supervision=supervision(processes=kept), answers=answers)
    assert [finding.text for finding in checks.answers(facts)] == ["work-marshaller × 2: all answer, version 1"]


@pytest.mark.parametrize(
    ("version", "than", "is_older"),
    [("8.1", "8.1", False), ("8.0.9", "8.1", True), ("2026.10.1", "2026.2", False), ("1.2.3rc1", "1.2.3", False)],
)
def test_versions_are_compared_by_their_numbers(version: str, than: str, is_older: bool) -> None:
    """Not as text, where 8.10 comes before 8.9."""
    assert checks.older(version, than) is is_older


def test_a_mesh_is_judged_by_the_services_that_it_is_meant_to_have() -> None:
    """A control plane by itself has no nodes, and nobody who acts for them."""
    alone = supervision(processes=[process("nats-server"), process("control-plane")])
    facts = replace(
        HEALTHY,
        supervision=alone,
        answers=[Answer(name="control-plane", instance="control-plane-n1", version="1")],
        leases={"control-plane": "control-plane-n1"},
        nodes=None,
        work=None,
    )
    assert troubles(facts) == []
    whole = troubles(replace(facts, supervision=supervision()))
    assert {finding.about for finding in whole if "lease" in finding.text} == {"node-registry", "work-marshaller"}
    joined = replace(alone, joined=True, processes=[process("node-agent")])
    assert joined.expects("node-registry"), "it runs elsewhere"


@pytest.mark.parametrize(
    ("subject", "todo"),
    [
        ("compute.peers.transfer.v1", "it ends with a node_id, as compute.peers.transfer.v1.<node_id>"),
        ("compute.peers.transfer.v1.n1", "connect that program in the role that may"),
        ("compute.work.assigned.v1", "connect that program in the role that may"),
    ],
)
def test_whoever_leaves_an_id_out_of_a_subject_is_told_so(subject: str, todo: str) -> None:
    denied = Violation(who="client", verb="publish", subject=subject, count=1, last_at=NOW)
    (found,) = troubles(replace(HEALTHY, violations=[denied]))
    assert todo in found.todo


# --- logs --------------------------------------------------------------------------------------------------------

PLAIN: Final = '127.0.0.1:1 - cid:30 - "v2.16.0:python3:plain" - "$G/user:client" - '
SERVER_LOG: Final = (
    "[1] 2026/11/21 06:50:15.544269 [INF] Server is ready",
    f'[1] 2026/11/21 06:50:16.852907 [ERR] {PLAIN}Publish Violation - Subject "$KV.compute-work.x"',
    f'[1] 2026/11/21 06:50:17.852907 [ERR] {PLAIN}Publish Violation - Subject "$KV.compute-work.x"',
    '[1] 2026/11/21 06:50:16.852930 [ERR] 1 - "$G/user:node" - Subscription Violation - Subject "compute.>", SID 1',
    '[1] 2026/11/21 06:50:17.058710 [ERR] 127.0.0.1:1 - cid:31 - authentication error - User "client"',
    "[1] 2026/11/21 06:50:17.058710 [ERR] something else",
    "not a line of the log",
)


def test_denials_are_read_from_the_servers_log_each_once() -> None:
    """Who, what, how often and when last."""
    found = logs.server_violations(SERVER_LOG, since=0)
    assert [(v.who, v.verb, v.subject, v.count, v.client) for v in found] == [
        ("client", "publish", "$KV.compute-work.x", 2, "plain"),
        ("node", "subscription", "compute.>", 1, ""),
        ("client", "login", "", 1, ""),
    ]
    assert found[0].last_at - found[1].last_at == pytest.approx(1.0, abs=0.001)
    assert logs.server_violations(SERVER_LOG, since=found[0].last_at + 60) == []


def log_line(**fields: str) -> str:
    return json.dumps(fields)


def test_denials_and_errors_are_read_from_a_services_log() -> None:
    """The rest of the log is no complaint, and a line that is none is skipped."""
    denied = 'nats: permissions violation for publish to "compute.x"'
    lines = [
        log_line(event="not permitted", level="error", at="2026-11-21T06:50:15Z", reason=denied),
        log_line(event="handler failed", level="error", at="2026-11-21T06:50:15Z", exception="Traceback\nKeyError: 1"),
        log_line(event="handler failed", level="error", at="2026-11-21T06:50:16Z", exception="Traceback\nKeyError: 2"),
        log_line(event="ready", level="info", at="2026-11-21T06:50:15Z"),
        "Segmentation fault",
        "[" * 10_000,
    ]
    violations, complaints = logs.service_log("node-agent", lines, since=0, file="f")
    assert [(v.who, v.verb, v.subject) for v in violations] == [("node-agent", "publish", "compute.x")]
    assert [(c.event, c.reason, c.count) for c in complaints] == [("handler failed", "KeyError: 2", 2)]
    assert logs.service_log("node-agent", lines, since=4e9, file="f") == ([], [])
