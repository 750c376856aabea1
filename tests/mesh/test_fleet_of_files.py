"""A mesh of machines that are not there: `up`, several `join --hardware`, and what one sees and reserves of it.

Method: the files in ``docs/examples/hardware``, real services, and commands as processes.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import pytest

from computemesh.testing import install_executor
from computemesh.testing.cli import WAIT_S, Cli, until

HARDWARE: Final = Path(__file__).parents[2] / "docs" / "examples" / "hardware"

TIERS: Final = {"h100x8": "AI_FACTORY", "rtx4090x2": "GPU_PEER", "rtx4070": "GPU_INFRA"}
"""Files, and the tier that each belongs to."""

ECHO: Final = """
from computemesh.executors import Executor

class Plugin(Executor):
    def run(self, task, out_dir, progress):
        return {}
"""


class Fleet:
    """The mesh and its machines, each with a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plugin = install_executor(folder / "plugin", "echo", ECHO)
        self.mesh = Cli(folder / "mesh")
        self.machines: dict[str, Cli] = {}

    def join(self, name: str, *words: str, **changes: str) -> str:
        """Makes a machine a node."""
        file = self.folder / f"{name}.env"
        file.write_text(self.mesh.ok("nodes", "invite", name))
        self.machines[name] = Cli(self.folder / name)
        quick = {"COMPUTEMESH_LOAD_INTERVAL_S": "0.5", "COMPUTEMESH_HEARTBEAT_INTERVAL_S": "0.5"}
        done = self.machines[name].run("join", str(file), "--detach", *words, **self.plugin, **quick, **changes)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def end(self) -> None:
        for machine in [*self.machines.values(), self.mesh]:
            machine.end()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Generator[Fleet]:
    """H100, 4090, 4070 and CPU nodes in one mesh."""
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        made.mesh.up(**made.plugin)
        for name in TIERS:
            said = made.join(name, "--hardware", str(HARDWARE / f"{name}.json"))
            assert f"as node {name}, {TIERS[name]}" in said
            assert "The hardware of this node is made up" in said
        yield made
    finally:
        made.end()


def test_machines_of_every_tier_are_in_one_mesh(fleet: Fleet) -> None:
    """H100, 4090 and 4070 nodes by their files, and this machine as what it is."""
    own = fleet.mesh.json("status")["node_id"]
    found = {node["node_id"]: node for node in fleet.mesh.json("nodes")["nodes"]}
    assert {name: found[name]["tier"] for name in TIERS} == TIERS
    assert {found[name]["provider"] for name in TIERS} == {"scripted"}
    assert found[own]["provider"] != "scripted"
    if found[own]["provider"] == "none":  # As on a machine without a GPU.
        assert (found[own]["tier"], found[own]["gpus"]) == ("CPU_ONLY", [])
        assert "none on this machine" in fleet.mesh.run("doctor").stdout
    table = fleet.mesh.ok("nodes", "--sort", "tier", "--desc")
    assert "8× H100 80 GiB *" in table
    assert "2× RTX 4090 24 GiB *" in table
    assert "RTX 4070 12 GiB *" in table
    assert "* made-up hardware" in table
    assert re.search(r"GPU0 +X +NV\d+", fleet.mesh.ok("nodes", "show", "h100x8"))
    listed = [node["node_id"] for node in fleet.mesh.json("nodes", "--min-tier", "gpu_peer")["nodes"]]
    assert set(listed) - {own} == {"h100x8", "rtx4090x2"}


def test_hardware_changes_with_its_file(fleet: Fleet) -> None:
    """A GPU more in the file is a GPU more in the mesh, while the node runs."""
    file = fleet.folder / "growing.json"
    hardware = json.loads((HARDWARE / "rtx4070.json").read_text())
    file.write_text(json.dumps(hardware))
    fleet.join("growing", "--hardware", str(file), COMPUTEMESH_INVENTORY_INTERVAL_S="0.5")
    hardware["gpus"][0]["count"] = 3
    file.write_text(json.dumps(hardware))

    def gpus() -> int:
        return len(fleet.mesh.json("nodes", "show", "growing")["node"]["gpus"])

    until(lambda: gpus() == 3, "the new GPUs to be announced")
    fleet.machines["growing"].ok("down")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"platform": "CUDA", "gpus": [{"vram_total_mb": -1}]}', "gpus[0].vram_total_mb"),
        ('{"platform": "QUANTUM"}', "platform"),
        ("{}", "platform"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_its_field(fleet: Fleet, text: str, field: str) -> None:
    """By `up` and by `join` alike; nothing of them keeps running."""
    file = fleet.folder / "bad.json"
    file.write_text(text)
    cli = Cli(fleet.folder / "refused")
    done = cli.run("up", "--detach", "--ports", "any", "--nats-port", "0", "--no-demo", "--hardware", str(file))
    assert done.returncode == 2, done.stdout
    assert field in done.stderr
    assert "Traceback" not in done.stderr
    assert cli.processes() == []
    assert cli.run("join", "nats://h", "--hardware", "/no/such/file").returncode == 2


# --- GPU memory --------------------------------------------------------------------------------------------------


def free_mb(fleet: Fleet, name: str) -> list[int]:
    """What can be reserved of each GPU of a node."""
    (node,) = fleet.mesh.json("gpus", "--node", name)["nodes"]
    return [gpu["free_mb"] for gpu in node["gpus"]]


def reservations(fleet: Fleet) -> dict[str, dict[str, Any]]:
    return {one["reservation_id"]: one for one in fleet.mesh.json("gpus", "reservations")["reservations"]}


def test_memory_is_reserved_renewed_and_released_by_hand(fleet: Fleet) -> None:
    """All of it or none; the same id is the same reservation."""
    before = free_mb(fleet, "rtx4070")
    words = ("gpus", "reserve", "--mb", "4GiB", "--node", "rtx4070", "--owner", "alice", "--timeout", "600")
    made = fleet.mesh.json(*words)
    assert (made["required_mb"], made["node_id"], made["timeout_seconds"]) == (4096, "rtx4070", 600)
    again = fleet.mesh.json(*words, "--id", made["reservation_id"])
    assert again["reservation_id"] == made["reservation_id"]
    assert free_mb(fleet, "rtx4070") == [before[0] - 4096]
    assert "alice 4 GiB" in fleet.mesh.ok("gpus", "--node", "rtx4070")
    assert made["reservation_id"] in fleet.mesh.ok("gpus", "reservations", "--owner", "alice")
    later = fleet.mesh.json("gpus", "renew", made["reservation_id"], "--timeout", "1200")
    assert later["expires_at"] > made["expires_at"]
    assert fleet.mesh.ok("gpus", "release", made["reservation_id"]) == f"{made['reservation_id']} is released.\n"
    assert free_mb(fleet, "rtx4070") == before
    assert fleet.mesh.refuses(2, "gpus", "release", made["reservation_id"])["code"] == "not_found"


def test_what_does_not_fit_is_explained_gpu_by_gpu(fleet: Fleet) -> None:
    """By `fit` with a table and status 1; `reserve` is refused and leads there."""
    yes = fleet.mesh.json("gpus", "fit", "--mb", "60GiB", "--count", "4", "--require-nvlink")
    assert (yes["can_fit"], yes["node_id"], len(yes["gpus"])) == (True, "h100x8", 4)
    assert "of h100x8" in fleet.mesh.ok("gpus", "fit", "--mb", "60GiB", "--count", "4")
    done = fleet.mesh.run("gpus", "fit", "--mb", "23GiB", "--count", "2", "--node", "rtx4090x2")
    assert done.returncode == 1
    assert done.stdout.startswith("no: ")
    assert re.search(r"^rtx4090x2 +0 ", done.stdout, re.MULTILINE)
    told = fleet.mesh.refuses(2, "gpus", "reserve", "--mb", "23GiB", "--count", "2", "--node", "rtx4090x2")
    assert told["code"] == "no_room"
    assert "gpus fit" in told["hint"]


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("fit", "--mb", "0"), "required_mb"),
        (("fit", "--mb", "x"), "required_mb"),
        (("fit", "--mb", "1", "--gpus", "0,x"), "gpu_indices"),
        (("reserve", "--mb", "1", "--timeout", "0"), "timeout_seconds"),
        (("reserve", "--mb", "1", "--timeout", "nan"), "timeout_seconds"),
        (("reserve", "--mb", "1", "--timeout", "31536000"), "timeout_seconds"),
        (("reserve", "--mb", "1", "--id", "a.b"), "reservation_id"),
        (("renew", "nothing"), "reservation_id"),
    ],
)
def test_what_cannot_be_reserved_is_refused_by_its_field(fleet: Fleet, words: tuple[str, ...], field: str) -> None:
    """Before the mesh is asked, or by it."""
    assert fleet.mesh.refuses(2, "gpus", *words)["field"] == field


def test_a_command_has_its_memory_for_as_long_as_it_runs(fleet: Fleet) -> None:
    """It is told which GPUs, its status is ours, and the reservation outlives its timeout but not the command."""
    machine = fleet.machines["h100x8"]
    script = 'echo "$COMPUTEMESH_RESERVATION_ID $CUDA_VISIBLE_DEVICES"; exit 7'
    words = ("gpus", "reserve", "--mb", "8GiB", "--count", "2", "--timeout", "1.5", "--", "sh", "-c", script)
    process = machine.start(*words)
    assert process.stdout is not None
    reservation_id, visible = process.stdout.readline().split()
    assert process.wait(WAIT_S) == 7
    node = fleet.mesh.json("nodes", "show", "h100x8")["node"]
    assert set(visible.split(",")) <= {gpu["uuid"] for gpu in node["gpus"]}
    assert len(visible.split(",")) == 2
    assert reservation_id not in reservations(fleet)

    holding = machine.start(
        "gpus", "reserve", "--mb", "8GiB", "--node", "h100x8", "--timeout", "1.5", "--hold", "--json"
    )
    assert holding.stdout is not None
    made: dict[str, Any] = {}
    text = ""
    while not made:
        text += holding.stdout.readline()
        if text.rstrip().endswith("\n}"):
            made = json.loads(text)
    until(
        lambda: reservations(fleet).get(made["reservation_id"], {}).get("expires_at", 0) > made["expires_at"] + 1.5,
        "the reservation to be renewed",
    )
    holding.send_signal(signal.SIGINT)
    assert holding.wait(WAIT_S) == 0
    assert made["reservation_id"] not in reservations(fleet)


def test_a_command_that_is_told_to_end_gives_its_memory_back(fleet: Fleet) -> None:
    """The signal reaches the command."""
    machine = fleet.machines["rtx4090x2"]
    process = machine.start("gpus", "reserve", "--mb", "1GiB", "--", "sh", "-c", "echo started; exec sleep 600")
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    (reservation_id,) = [name for name, one in reservations(fleet).items() if one["node_id"] == "rtx4090x2"]
    process.terminate()
    assert process.wait(WAIT_S) == 128 + signal.SIGTERM
    assert reservation_id not in reservations(fleet)


def test_a_command_that_is_none_gives_its_memory_back_and_says_so(fleet: Fleet) -> None:
    """And where this machine is no node, a command needs a place for its memory."""
    told = fleet.machines["rtx4070"].run("gpus", "reserve", "--mb", "1GiB", "--", "/no/such/program")
    assert told.returncode == 2
    assert "/no/such/program: no such file" in told.stderr
    assert not [one for one in reservations(fleet).values() if one["node_id"] == "rtx4070"]
    nowhere = Cli(fleet.folder / "nowhere")
    url = fleet.mesh.json("env")["NATS_URL"]
    assert nowhere.fails(2, "gpus", "reserve", "--mb", "1", "--", "true", NATS_URL=url).count("is no node") == 1


def test_the_view_of_gpus_follows_reservations(fleet: Fleet) -> None:
    """At once, whatever the interval."""
    process = fleet.mesh.start("gpus", "--node", "rtx4070", "--watch", "--interval", "3600", "--json")
    assert process.stdout is not None
    before = json.loads(process.stdout.readline())
    made = fleet.mesh.json("gpus", "reserve", "--mb", "1024", "--node", "rtx4070")
    held = 0
    while held != before["reserved_mb"] + 1024:
        held = json.loads(process.stdout.readline())["reserved_mb"]
    fleet.mesh.ok("gpus", "release", made["reservation_id"])
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_S) == 0


def test_ids_of_reservations_are_completed(fleet: Fleet) -> None:
    """As those of nodes and work are."""
    made = fleet.mesh.json("gpus", "reserve", "--mb", "1024", "--node", "rtx4070", "--id", "completed-1")
    program = "from computemesh.cli import main; main(prog_name='computemesh')"
    typed = {"COMP_WORDS": "computemesh gpus release compl", "COMP_CWORD": "3"}
    environment = fleet.mesh.environment(_COMPUTEMESH_COMPLETE="bash_complete", **typed)

    def offered() -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    # It gives up after a moment, so as not to keep anybody waiting; a busy machine may need another try.
    until(lambda: made["reservation_id"] in offered(), "the id to be offered")
    fleet.mesh.ok("gpus", "release", "completed-1")
