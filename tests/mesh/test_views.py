"""`nodes`: lists, pages and operations on a mesh with simulated nodes, and views that stay up to date.

Method: commands as processes, on terminals of their own where that matters. Nodes are announced over the bus by
whoever the test says they are: a list shows what was announced. Each wait is for a condition.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import nats
import pytest
from nats.aio.client import Client

from computemesh.contracts.base import Role
from computemesh.contracts.nodes import (
    ANNOUNCE,
    HEARTBEAT,
    EngineCard,
    EngineState,
    EngineUse,
    NodeAnnouncement,
    NodeHeartbeat,
)
from computemesh.hardware import Gpu, GpuLink, GpuUse, LinkKind
from computemesh.testing.cli import WAIT_S, Cli, until

# nats-py is typed in part only.
# pyright: reportUnknownMemberType=false

MANY: Final = 1100
"""More nodes than are asked for at a time."""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Generator[Cli]:
    """A mesh that waits for nodes as long as the tests need: those that they announce send no heartbeats."""
    shared = Cli(tmp_path_factory.mktemp("mesh") / "home")
    try:
        shared.up(COMPUTEMESH_SUSPECT_AFTER_S="900", COMPUTEMESH_LOST_AFTER_S="1000")
        yield shared
    finally:
        shared.end()


@asynccontextmanager
async def speaking(mesh: Cli) -> AsyncGenerator[Client]:
    """A connection as the mesh's own node, which may speak for any in what it publishes."""
    status = json.loads((mesh.home / "run" / "mesh.json").read_text())
    nc = await nats.connect(status["nats_urls"][Role.NODE.value])
    try:
        yield nc
        await nc.flush()
    finally:
        await nc.close()


async def announce(nc: Client, *nodes: NodeAnnouncement) -> None:
    for node in nodes:
        await nc.publish(ANNOUNCE.subject, msgspec.json.encode(node))
    await nc.flush()


def names(mesh: Cli, *words: str) -> list[str]:
    return [node["node_id"] for node in mesh.json("nodes", *words)["nodes"]]


def h100(count: int) -> list[Gpu]:
    return [
        Gpu(index=n, name="NVIDIA H100 80GB HBM3", uuid=f"GPU-{n}", vram_total_mb=81559, compute_capability="9.0")
        for n in range(count)
    ]


# --- lists -------------------------------------------------------------------------------------------------------


async def test_nodes_are_filtered_sorted_and_counted(mesh: Cli) -> None:
    """By what they have, by what they use now, and by what an operator says."""
    big = NodeAnnouncement(node_id="big", gpus=h100(8), labels={"zone": "a"}, slots=4)
    small = NodeAnnouncement(node_id="small", gpus=[Gpu(name="NVIDIA L4", uuid="GPU-l", vram_total_mb=23034)])
    async with speaking(mesh) as nc:
        await announce(nc, big, small, NodeAnnouncement(node_id="plain"))
        until(lambda: {"big", "small", "plain"} <= set(names(mesh)), "the nodes to be listed")
        used = [GpuUse(index=0, uuid="GPU-l", vram_used_mb=20000)]
        await nc.publish(HEARTBEAT.subject, msgspec.json.encode(NodeHeartbeat(node_id="small", gpus=used)))
        await nc.flush()
    until(lambda: names(mesh, "--gpu", "--min-free-vram", "4GiB") == ["big"], "the heartbeat to count")
    assert names(mesh, "--gpu", "--sort", "vram_total", "--desc") == ["big", "small"]
    assert names(mesh, "--gpu", "--sort", "vram_total", "--desc", "--limit", "1") == ["big"]
    assert names(mesh, "--label", "zone=a") == ["big"]
    assert names(mesh, "--min-gpus", "2", "--min-vram", "40GiB") == ["big"]
    assert names(mesh, "--min-cc", "9.0", "--min-tier", "ai_factory") == ["big"]
    assert "8× H100 80 GiB" in mesh.ok("nodes", "--gpu")
    assert mesh.ok("nodes", "--label", "zone=b").strip() == "No such nodes."

    assert "new power supply" in mesh.ok("nodes", "drain", "big", "--reason", "new power supply")
    assert names(mesh, "--drained") == ["big"]
    assert "big" not in names(mesh, "--not-drained")
    assert "drained: new power supply" in mesh.ok("nodes", "--drained")
    assert mesh.json("nodes", "undrain", "big")["changed"] is True
    assert "it was so before" in mesh.ok("nodes", "undrain", "big")
    assert mesh.json("nodes", "stats")["gpus"] >= 9
    assert "VRAM used" in mesh.ok("nodes", "stats")
    assert mesh.refuses(2, "nodes", "forget", "small")["code"] == "still_here"
    assert mesh.ok("nodes", "forget", "small", "--force") == "Node small is forgotten.\n"
    assert "small" not in names(mesh)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("--min-cc", "nine"), "min_compute_capability"),
        (("--min-vram", "-1"), "min_vram_mb"),
        (("--min-free-ram", "lots"), "min_memory_available_mb"),
        (("--label", "zone"), "labels"),
        (("--sort", "beauty"), "sort"),
        (("--min-tier", "BEST"), "min_tier"),
        (("show", "nobody"), "node_id"),
        (("show", "a.b"), "node_id"),
        (("drain", "nobody"), "node_id"),
        (("forget", "nobody"), "node_id"),
        (("drain", "x", "--reason", "y" * 501), "reason"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_its_field(mesh: Cli, words: tuple[str, ...], field: str) -> None:
    """By the option or by the mesh, in the same way."""
    assert mesh.refuses(2, "nodes", *words)["field"] == field


async def test_the_page_of_a_node_shows_its_gpus_and_links(mesh: Cli) -> None:
    """Of a node without a detector of ours, too."""
    links = [GpuLink(a=0, b=1, kind=LinkKind.NVLINK, lanes=18)]
    async with speaking(mesh) as nc:
        await announce(nc, NodeAnnouncement(node_id="paged", gpus=h100(2), gpu_links=links, hostname="rack-3"))
    until(lambda: "paged" in names(mesh), "the node to be listed")
    text = mesh.ok("nodes", "show", "paged")
    assert re.search(r"GPU0 +X +NV18", text), text
    assert "rack-3" in text
    found = mesh.json("nodes", "show", "paged")
    assert (found["node"]["node_id"], found["inventory"]) == ("paged", None)


async def test_all_nodes_are_listed_however_many_pages_they_take(mesh: Cli) -> None:
    """Each once."""
    async with speaking(mesh) as nc:
        await announce(nc, *(NodeAnnouncement(node_id=f"many-{number:04}") for number in range(MANY)))

    def listed() -> list[str]:
        return [name for name in names(mesh) if name.startswith("many-")]

    until(lambda: len(listed()) >= MANY, "all nodes to be listed")
    assert listed() == [f"many-{number:04}" for number in range(MANY)]
    assert len(mesh.ok("nodes").splitlines()) > MANY
    assert len(names(mesh, "--limit", "1005")) == 1005


async def test_engines_of_all_nodes_are_listed_with_what_heartbeats_say_of_them(mesh: Cli) -> None:
    """By node and by model, for people and for programs; `status` counts them."""
    cards = [EngineCard(device="gpu:0", backend="cuda", slots=4, pending_max=8), EngineCard(device="cpu:0")]
    busy = [EngineUse(device="gpu:0", state=EngineState.READY, model="tiny", pending=3, tokens_per_s=41.5)]
    before = mesh.json("status")["engines"]
    async with speaking(mesh) as nc:
        await announce(nc, NodeAnnouncement(node_id="engined", models=["tiny", "other"], engines=cards))
        await announce(nc, NodeAnnouncement(node_id="second", models=["other"], engines=[EngineCard(device="cpu:0")]))
        until(lambda: {"engined", "second"} <= set(names(mesh)), "the nodes to be listed")
        await nc.publish(HEARTBEAT.subject, msgspec.json.encode(NodeHeartbeat(node_id="engined", engines=busy)))
        await nc.flush()
    until(lambda: mesh.json("status")["engines"]["ready"] > before["ready"], "the heartbeat to count")
    assert mesh.json("status")["engines"]["count"] == before["count"] + 3
    assert re.search(r"^3 engines: .*1 ready", mesh.ok("status"), re.MULTILINE)
    assert re.search(
        r"^engined +gpu:0 +cuda +ready +tiny +3/8 +4 +41.5 +0 ", mesh.ok("engines", "--node", "engined"), re.MULTILINE
    )
    found = mesh.json("engines", "--model", "tiny")
    assert [(row["node_id"], row["device"], row["state"], row["told"]) for row in found["engines"]] == [
        ("engined", "gpu:0", "ready", True),
        ("engined", "cpu:0", "idle", False),
    ]
    assert [row["node_id"] for row in mesh.json("engines", "--node", "second")["engines"]] == ["second"]
    assert mesh.ok("engines", "--model", "none").strip() == "No such engines."
    assert mesh.json("engines", "--model", "none") == {"engines": [], "count": 0}


# --- views that stay up to date ----------------------------------------------------------------------------------


class Watching:
    """A command that keeps showing, one JSON document a line."""

    def __init__(self, cli: Cli, *words: str) -> None:
        self.process = cli.start(*words, "--watch", "--json")
        self.shown: list[dict[str, Any]] = []
        self.notices: list[str] = []
        for stream, take in ((self.process.stdout, self._document), (self.process.stderr, self.notices.append)):
            threading.Thread(target=self._read, args=(stream, take), daemon=True).start()
        until(lambda: self.shown, "something to be shown")

    def _document(self, line: str) -> None:
        self.shown.append(json.loads(line))

    @staticmethod
    def _read(stream: Any, take: Any) -> None:
        for line in stream:
            take(line)

    def ids(self) -> list[str]:
        return [node["node_id"] for node in self.shown[-1]["nodes"]]

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_view_follows_events_and_ends_cleanly(mesh: Cli, number: signal.Signals) -> None:
    """An announcement shows at once, whatever the interval; Ctrl-C is a good end."""
    watching = Watching(mesh, "nodes", "--interval", "3600", "--label", f"made={number}")
    assert watching.ids() == []
    async with speaking(mesh) as nc:
        await announce(nc, NodeAnnouncement(node_id=f"late-{number}", labels={"made": str(int(number))}))
        await announce(nc, NodeAnnouncement(node_id=f"late-{number}", labels={"made": str(number)}))
    until(lambda: watching.ids() == [f"late-{number}"], "the new node to be shown")
    assert watching.end(number) == 0
    assert watching.notices == []


def test_a_view_outlives_its_mesh(tmp_path: Path) -> None:
    """Killed or stopped and started again: it says so, and goes on by itself."""
    mesh = Cli(tmp_path / "home")
    try:
        mesh.up()
        watching = Watching(mesh, "nodes", "--interval", "0.2")
        status = json.loads((mesh.home / "run" / "mesh.json").read_text())
        server = next(service["pid"] for service in status["services"] if service["name"] == "nats-server")
        os.kill(server, signal.SIGKILL)
        until(lambda: any("answers again" in line for line in watching.notices), "it to go on after a kill")
        mesh.ok("down")
        until(lambda: [line for line in watching.notices if "waiting for it" in line][1:], "it to notice")
        before = len(watching.shown)
        mesh.up()
        until(lambda: len(watching.shown) > before, "it to go on after a restart")
        assert all(json.loads(line)["notice"] for line in watching.notices)
        assert watching.end() == 0
    finally:
        mesh.end()


def test_a_view_ends_when_nobody_reads_it_any_more(mesh: Cli) -> None:
    """Also while nothing changes: `nodes --watch | head` must not hang."""
    process = mesh.start("nodes", "--watch", "--interval", "3600")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(WAIT_S) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_view_of_nothing_is_refused_like_any_other(tmp_path: Path, mesh: Cli) -> None:
    """Without a mesh, or with a question that cannot be asked: at once, not for ever."""
    assert Cli(tmp_path / "nowhere").refuses(3, "nodes", "--watch")["code"] == "no_mesh"
    assert mesh.refuses(2, "nodes", "show", "nobody", "--watch")["code"] == "not_found"
    assert mesh.run("nodes", "--watch", "--interval", "0").returncode == 2


class Screen:
    """A command on a terminal of its own."""

    def __init__(self, cli: Cli, *words: str, columns: int, lines: int) -> None:
        primary, secondary = pty.openpty()
        fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.text = ""
        self._fd = primary
        self.process = subprocess.Popen(
            [sys.executable, "-m", "computemesh.cli", *words],
            stdin=secondary, stdout=secondary, stderr=secondary, env=cli.environment(TERM="xterm"),
        )  # fmt: skip
        os.close(secondary)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while data := os.read(self._fd, 65536):
                self.text += data.decode("utf-8", "replace")
        except OSError:  # The terminal of a process that has ended.
            return

    def frames(self) -> list[list[str]]:
        """What was on the screen, one time after the other, without colours."""
        drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", lambda found: "\f" if found[0] == "\x1b[H" else "", self.text)
        return [frame.replace("\r", "").splitlines() for frame in drawn.split("\f") if frame.strip()]


async def test_on_a_terminal_a_view_stays_in_its_place(mesh: Cli) -> None:
    """On a screen of its own that is left as it was found, and never wider or higher than there is room for."""
    async with speaking(mesh) as nc:
        await announce(nc, *(NodeAnnouncement(node_id=f"row-{number:02}", gpus=h100(8)) for number in range(20)))
    until(lambda: len([name for name in names(mesh) if name.startswith("row-")]) == 20, "the nodes to be listed")
    screen = Screen(mesh, "nodes", "--gpu", "--watch", "--interval", "0.2", columns=60, lines=10)
    until(lambda: len(screen.frames()) >= 3, "it to be drawn three times")
    screen.process.send_signal(signal.SIGINT)
    assert screen.process.wait(WAIT_S) == 0
    until(lambda: "\x1b[?1049l" in screen.text, "the screen to be left")
    assert screen.text.index("\x1b[?1049h") < screen.text.index("\x1b[?1049l")
    frame = screen.frames()[1]
    assert all(len(line) <= 60 for line in frame), frame
    assert len(frame) <= 10
    assert "Ctrl-C ends" in frame[0]
    assert any("more" in line for line in frame), frame
