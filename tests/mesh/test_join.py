"""Machines that join a mesh: invited, joined, restarted, revoked, and left, each with a home of its own.

Method: commands as processes, as in ``test_cli.py``; the machines are one, and each home stands for one. What
goes wrong is made to go wrong, and each wait is for a condition.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import threading
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any, Final

import pytest

from computemesh.testing import install_executor
from computemesh.testing.cli import WAIT_S, Cli, until

ECHO: Final = """
from computemesh.executors import Executor

class Plugin(Executor):
    def run(self, task, out_dir, progress):
        return {"node": task.payload}
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Something for nodes to run, since a node that can run nothing gets no work."""
    return install_executor(tmp_path_factory.mktemp("plugin"), "echo", ECHO)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, plugin: dict[str, str]) -> Generator[Cli]:
    """The mesh that nodes join."""
    shared = Cli(tmp_path_factory.mktemp("joined") / "home")
    try:
        shared.up(**plugin)
        yield shared
    finally:
        shared.end()


class Machine(Cli):
    """A machine with something to run, in place of one elsewhere."""

    def __init__(self, home: Path, plugin: dict[str, str]) -> None:
        super().__init__(home)
        self._plugin = plugin

    def environment(self, **changes: str) -> dict[str, str]:
        return super().environment(**self._plugin, **changes)


@pytest.fixture
def machines(tmp_path: Path, plugin: dict[str, str]) -> Generator[list[Machine]]:
    """Two machines that have joined nothing yet."""
    both = [Machine(tmp_path / name, plugin) for name in ("first", "second")]
    yield both
    for machine in both:
        machine.end()


def invitation(mesh: Cli, node_id: str, folder: Path) -> str:
    """A file with what `nodes invite` prints."""
    file = folder / f"{node_id}.env"
    file.write_text(mesh.ok("nodes", "invite", node_id))
    return str(file)


def listed(mesh: Cli) -> dict[str, dict[str, Any]]:
    return {node["node_id"]: node for node in mesh.json("nodes")["nodes"]}


class Lines:
    """What a process writes, line by line, as it comes."""

    def __init__(self, stream: IO[str] | None) -> None:
        assert stream is not None
        self.text = ""
        self._stream = stream
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._stream:
            self.text += line

    def wait(self, words: str) -> None:
        until(lambda: words in self.text, f"{words!r} in {self.text!r}")


def test_machines_join_with_what_invite_printed_and_run_work(
    mesh: Cli, machines: list[Machine], tmp_path: Path
) -> None:
    """Two of them on one machine, on ports that are free; each leaves by `down` and comes back by `join`."""
    for number, machine in enumerate(machines):
        said = machine.ok("join", invitation(mesh, f"worker-{number}", tmp_path), "--detach")
        assert f"as node worker-{number}, CPU_ONLY" in said
    nodes = listed(mesh)
    assert [nodes[f"worker-{number}"]["state"] for number in (0, 1)] == ["online", "online"]
    item = {"work_type": "echo", "requirements": {"node_id": "worker-1"}, "payload": {"x": 1}}
    assert mesh.json("submit", "-", "--wait", stdin=json.dumps(item))["node_id"] == "worker-1"

    first = machines[0]
    status = first.json("status")
    assert (status["joined"], status["node_id"], status["embedded"]) == (True, "worker-0", False)
    assert {service["name"] for service in status["services"]} == {"resource-detector", "node-agent", "peer-agent"}
    assert "worker-0" in first.ok("status")
    before = nodes["worker-0"]["session"]
    assert "worker-0 left the mesh" in first.ok("down")
    assert first.processes() == []
    assert "`computemesh join` joins the same mesh again" in first.fails(3, "status")
    first.ok("join", "--detach")
    assert listed(mesh)["worker-0"]["session"] != before


def test_a_joined_machine_may_do_what_a_node_may_and_says_so_of_the_rest(
    mesh: Cli, machines: list[Machine], tmp_path: Path
) -> None:
    """It sees the mesh, and can neither submit work nor let others in. The doctor finds it well."""
    machine = machines[0]
    machine.ok("join", invitation(mesh, "watcher", tmp_path), "--detach")
    assert "watcher" in listed(machine)
    assert machine.json("work", "list")["items"] is not None
    for words in (("submit", "--prompt", "x"), ("nodes", "invite", "other"), ("nodes", "revoke", "watcher"), ("env",),
                  ("nodes", "drain", "watcher")):  # fmt: skip
        assert machine.refuses(2, *words)["code"] == "wrong_role", words
    assert machine.json("env", "--role", "node")["NATS_URL"].startswith("nats://node-watcher:")
    report = machine.json("doctor")
    assert report["ok"], report
    assert "a mesh of its own runs" in mesh.fails(2, "join")


def test_no_password_is_on_a_command_line_or_open_to_others(mesh: Cli, machines: list[Machine], tmp_path: Path) -> None:
    """Not of the processes that stay; an address that is typed with its password is used, with a warning."""
    url = mesh.json("nodes", "invite", "secret-7")["NATS_URL"]
    password = url.split("@")[0].rpartition(":")[2]
    machine = machines[0]
    done = machine.run("join", url, "--detach")
    assert done.returncode == 0, done.stderr
    assert "The password is on the command line" in done.stderr
    assert password not in done.stdout + done.stderr
    lines = [" ".join(process.cmdline()) for process in machine.processes()]
    assert len(lines) >= 3
    assert not [line for line in lines if password in line]
    holders = [path for path in machine.home.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]
    assert "joined.json" in {path.name for path in holders}
    assert not [path for path in holders if stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert not [path for path in holders if path.suffix == ".log"]


def test_a_machine_waits_for_a_server_that_is_away_and_says_so(
    plugin: dict[str, str], machines: list[Machine], tmp_path: Path
) -> None:
    """At its start and later; it is a node again when the server is back. In the foreground until Ctrl-C."""
    mesh = Cli(tmp_path / "mesh")
    try:
        mesh.up(**plugin)
        file = invitation(mesh, "patient", tmp_path)
        mesh.ok("down")
        process = machines[0].start("join", file, "--quiet")
        out, err = Lines(process.stdout), Lines(process.stderr)
        err.wait("waiting for it")
        assert "no NATS server at" in err.text
        assert "no NATS server at" in json.loads((machines[0].home / "run" / "mesh.json").read_text())["problem"]
        mesh.up(**plugin)
        out.wait("as node patient")
        assert listed(mesh)["patient"]["state"] == "online"
        status = json.loads((mesh.home / "run" / "mesh.json").read_text())
        server = next(service["pid"] for service in status["services"] if service["name"] == "nats-server")
        os.kill(server, signal.SIGKILL)
        err.wait("is back")
        until(lambda: machines[0].run("status").returncode == 0, "the node to see the mesh again")
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0
        out.wait("patient left the mesh")
    finally:
        mesh.end()


def test_a_revoked_machine_is_told_and_does_not_come_back(mesh: Cli, machines: list[Machine], tmp_path: Path) -> None:
    """Until it is invited again, with another password."""
    machine, file = machines[0], invitation(mesh, "thief", tmp_path)
    machine.ok("join", file, "--detach")
    mesh.ok("nodes", "revoke", "thief")
    until(lambda: machine.run("status").returncode == 3, "the node to be closed out")
    assert "was this node revoked?" in machine.fails(3, "nodes")
    until(lambda: "revoked" in (machine.home / "logs" / "up.log").read_text(), "its log to say so")
    problem = next(f for f in json.loads(machine.run("doctor", "--json").stdout)["findings"] if f["about"] == "nats")
    assert "was thief revoked?" in problem["todo"]
    machine.ok("down")
    told = machine.refuses(3, "join", "--detach")
    assert told["code"] == "not_admitted"
    assert "nodes invite thief" in told["hint"]
    machine.ok("join", invitation(mesh, "thief", tmp_path), "--detach")


def test_a_name_belongs_to_one_machine(mesh: Cli, machines: list[Machine], tmp_path: Path) -> None:
    """The one that has it keeps it; the other is told, and leaves nothing running."""
    file = invitation(mesh, "only-one", tmp_path)
    first, second = machines
    first.ok("join", file, "--detach", COMPUTEMESH_MACHINE_ID="here", COMPUTEMESH_HEARTBEAT_INTERVAL_S="0.5")
    until(lambda: listed(mesh)["only-one"]["monitored"], "its heartbeats to be heard")
    before = listed(mesh)["only-one"]
    told = second.refuses(2, "join", file, "--detach", COMPUTEMESH_MACHINE_ID="elsewhere")
    assert (told["field"], told["code"]) == ("node_id", "node_id_taken")
    assert second.processes() == []
    after = listed(mesh)["only-one"]
    assert (after["session"], after["epoch"], after["state"]) == (before["session"], before["epoch"], "online")


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        ((), "which mesh?", "no_invitation"),
        (("/no/such/file",), "no such file", "bad_invitation"),
        (("http://h",), "no address of a NATS server", "bad_invitation"),
        (("nats://client:0123456789abcdef@h",), "no user of a node", "bad_invitation"),
        (("-",), "standard input: no invitation in it", "bad_invitation"),
    ],
    ids=["nothing", "no file", "no scheme of ours", "not a node", "empty"],
)
def test_what_leads_to_no_mesh_is_refused(
    machines: list[Machine], words: tuple[str, ...], says: str, code: str
) -> None:
    """Before anything is started or kept."""
    told = machines[0].refuses(2, "join", *words, "--detach")
    assert says in told["error"]
    assert (told["field"], told["code"]) == ("invitation", code)
    assert not (machines[0].home / "joined.json").exists()


def test_an_invitation_for_one_node_makes_no_other(mesh: Cli, machines: list[Machine], tmp_path: Path) -> None:
    """And a home that runs a node runs no second one."""
    file = invitation(mesh, "only-me", tmp_path)
    told = machines[0].refuses(2, "join", file, "--node-id", "someone-else", "--detach")
    assert (told["field"], told["code"]) == ("node_id", "wrong_node")
    machines[0].ok("join", file, "--detach")
    assert machines[0].json("join", file, "--detach")["node_id"] == "only-me"
    told = machines[0].refuses(2, "join", invitation(mesh, "not-me", tmp_path), "--detach")
    assert told["code"] == "home_taken"
    assert re.search(r"COMPUTEMESH_HOME=\S+ computemesh join", told["hint"])
