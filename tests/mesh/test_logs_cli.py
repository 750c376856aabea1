"""`logs`: what services of this machine have logged, and what engines print, as a person at the prompt sees it.

Method: commands as processes, on a mesh of their own. The engine's log is answered on the bus by a node of the test,
as the contract has it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from computemesh.bus import Bus, MicroService, Where
from computemesh.contracts import infer
from computemesh.contracts.base import Refused, Role, serve
from computemesh.contracts.infer import EngineLog, EngineLogGet
from computemesh.testing import until as awaited
from computemesh.testing.cli import WAIT_S, Cli, until


class Following:
    """A command that goes on printing."""

    def __init__(self, cli: Cli, *words: str) -> None:
        self.process = cli.start(*words)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def says(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(WAIT_S)


def documents(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_all_services_are_shown_in_the_order_of_time_or_some(mesh: Cli) -> None:
    """With the name in front when there are several; the server is one of them."""
    found = documents(mesh.ok("logs", "-n", "1000", "--json"))
    assert {"nats-server", "node-registry", "gateway", "node-agent"} <= {entry["source"] for entry in found}
    assert len(found) == len({json.dumps(entry) for entry in found})
    text = mesh.ok("logs", "nats", "gateway", "-n", "1000")
    assert re.search(r"^[\d:.]{12} nats-server Server is ready$", text, re.MULTILINE)
    assert re.search(r"^[\d:.]{12} gateway     serving  http=http://", text, re.MULTILINE)
    assert not re.search("node-registry", text)
    assert re.fullmatch(r"[\d:.]{12} ready\n", mesh.ok("logs", "gateway", "-n", "1"))
    clocks = [line[:12] for line in mesh.ok("logs", "-n", "1000").splitlines() if re.match(r"[\d:.]{12} ", line)]
    assert clocks == sorted(clocks)


def test_entries_are_chosen_by_level_and_by_age(mesh: Cli) -> None:
    """Those of at least that level; those that are not older."""
    found = documents(mesh.ok("logs", "--level", "warning", "-n", "1000", "--json"))
    assert {entry["level"] for entry in found} <= {"warning", "error", "critical"}
    assert any("Plaintext passwords" in entry["event"] for entry in found)
    assert mesh.ok("logs", "--since", "2100-01-01") == ""
    everything = mesh.ok("logs", "--since", "1h")
    assert everything.count("Starting nats-server") == 1
    assert len(mesh.ok("logs", "--since", "1h", "-n", "2").splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("nobody",), 2, "there are nats-server"),
        (("engine",), 2, "NODE/DEVICE"),
        (("engine", "a.b/cpu:0"), 2, "NODE/DEVICE"),
        (("engine", "nowhere/cpu:0"), 2, "no node 'nowhere' answers"),
        (("engine", "n/cpu:0", "--since", "1m"), 2, "--since"),
        (("--since", "lately"), 2, "no time"),
    ],
)
def test_what_there_is_not_is_said(mesh: Cli, words: tuple[str, ...], status: int, said: str) -> None:
    """With what there is."""
    told = mesh.refuses(status, "logs", *words)
    assert said in told["error"] + told["hint"]


def test_without_a_mesh_there_are_no_logs_and_after_one_they_stay(tmp_path: Path) -> None:
    """A mesh that does not start is when they are needed."""
    cli = Cli(tmp_path / "home")
    assert cli.refuses(3, "logs")["code"] == "no_mesh"
    try:
        cli.up()
        cli.ok("down")
        assert "stopped" in cli.ok("logs", "node-registry")
    finally:
        cli.end()


def test_what_is_logged_is_followed_also_by_the_supervisor(mesh: Cli) -> None:
    """A service that is killed: the supervisor says so, and the next life is heard. Ctrl-C is a good end."""
    following = Following(mesh, "logs", "-f", "-n", "0")
    status = json.loads((mesh.home / "run" / "mesh.json").read_text())
    pid = next(service["pid"] for service in status["services"] if service["name"] == "gateway")
    names = (f"k{number}" for number in itertools.count())
    until(lambda: mesh.ok("keys", "create", next(names)) and following.says("key created"), "an entry")
    os.kill(pid, signal.SIGKILL)
    until(lambda: following.says("a service died"), "the supervisor to be heard")
    until(lambda: re.search(r" gateway +ready", "".join(following.lines)), "the gateway's next life")
    assert following.end() == 0
    assert following.says("supervisor")
    assert "a service died" in mesh.ok("logs", "supervisor")
    assert not any("Starting nats-server" in line for line in following.lines), "only what is new"


def test_a_log_is_followed_until_nobody_reads_it(mesh: Cli) -> None:
    """`logs -f | head -1` ends."""
    process = mesh.start("logs", "-f")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(WAIT_S) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


async def test_what_an_engine_prints_is_shown_and_followed_on_any_node(mesh: Cli) -> None:
    """The last lines, then what comes; one that was begun anew from its beginning. Nothing in it steers a terminal."""
    printed = "".join(f"line {number}\n" for number in range(50))
    asked: list[EngineLogGet] = []

    async def on_log(ask: EngineLogGet) -> EngineLog | Refused:
        asked.append(ask)
        if ask.device != "cpu:0":
            return Refused(code="not_found", reason=f"no engine {ask.device!r}", field="device", status=404)
        start = len(printed) - 100 if ask.offset is None else ask.offset if ask.offset <= len(printed) else 0
        return EngineLog(node_id="far", device="cpu:0", text=printed[start:], offset=start, next=len(printed))

    url = mesh.json("nodes", "invite", "far")["NATS_URL"]
    bus = Bus(Where(url=url, role=Role.NODE, name="far"))
    await bus.connect(timeout_s=5.0)
    try:
        micro = MicroService(bus, name="node-agent", description="An engine's log.", metadata={})
        await micro.start([serve(infer.LOG, on_log, target="far")])
        await bus.flush()
        assert (await _ok(mesh, "logs", "engine", "far/cpu:0", "-n", "2")) == "line 48\nline 49\n"
        (part,) = documents(await _ok(mesh, "logs", "engine", "far/cpu:0", "-n", "1", "--json"))
        assert (part["node_id"], part["device"], part["text"]) == ("far", "cpu:0", "line 49\n")
        told = await _run(mesh, "logs", "engine", "far/gpu:9", "--json")
        assert json.loads(told.stderr)["code"] == "not_found"
        following = Following(mesh, "logs", "engine", "far/cpu:0", "-f", "-n", "1")
        await awaited(lambda: following.says("line 49"), what="the last line")
        printed += "more\n"
        await awaited(lambda: following.says("more"), what="what came then")
        printed = "anew\n"
        await awaited(lambda: following.says("anew"), what="the log that was begun anew")
        assert following.lines == ["line 49\n", "more\n", "anew\n"]
        assert following.end() == 0
        assert any(ask.wait_s > 0 for ask in asked)
    finally:
        await bus.close()


async def _run(mesh: Cli, *words: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(mesh.run, *words)


async def _ok(mesh: Cli, *words: str) -> str:
    return await asyncio.to_thread(mesh.ok, *words)
