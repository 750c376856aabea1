"""``python -m computemesh.nanoctrl``, as a person or a script uses it.

Goal: what it says is so, whatever was killed, hangs, or was left by another one; and it never touches a process that is
not its own. Method: commands as processes, each test in a runtime folder of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import pytest

from computemesh.contracts.base import Role
from computemesh.nanoctrl import NanoCtrlClient
from computemesh.nats_server import NatsServer
from computemesh.testing.cli import until
from tests.bench.servers import nats_server

ENGINE = {"role": "prefill", "world_size": 1, "num_blocks": 1, "host": "h", "port": 1, "peer_addrs": ["h:1"]}

START = ("start", "--port", "0", "--wait", "60")


class Commands:
    """Commands with one runtime folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def environment(self, **changes: str) -> dict[str, str]:
        names = ("NATS_URL", "NANOCTRL_", "XDG_RUNTIME_DIR", "COMPUTEMESH_HOME", "COMPUTEMESH_TOKEN")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        return {**inherited, "NANOCTRL_RUNTIME_DIR": str(self.folder), **changes}

    def begin(self, *words: str, **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "computemesh.nanoctrl", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(**changes),
        )

    def run(self, *words: str, expect: int = 0, **changes: str) -> str:
        """What a command that must end with this status says, on standard output or, if it fails, error."""
        process = self.begin(*words, **changes)
        said, trouble = process.communicate(timeout=120)
        assert process.returncode == expect, f"{words}: {process.returncode}\n{said}\n{trouble}"
        assert "Traceback" not in trouble
        return said or trouble

    def json(self, *words: str, expect: int = 0, **changes: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(*words, "--json", expect=expect, **changes))
        return found

    def processes(self) -> list[psutil.Process]:
        """Every process with this runtime folder in its environment."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                here = process.environ().get("NANOCTRL_RUNTIME_DIR") == str(self.folder)
                if here and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def service(self) -> psutil.Process:
        """That of the control plane itself."""
        return next(process for process in self.processes() if "computemesh_services" in " ".join(process.cmdline()))


def mesh_command(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """`computemesh` on the mesh that a control plane is."""
    command = [sys.executable, "-m", "computemesh.cli", *words]
    environment = {name: value for name, value in os.environ.items() if "NATS_URL" not in name}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=90, env={**environment, **changes}, check=False
    )


@pytest.fixture
def commands(tmp_path: Path) -> Generator[Commands]:
    """A runtime folder in which nothing runs."""
    found = Commands(tmp_path / "run")
    yield found
    for process in found.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_it_starts_serves_tells_how_it_is_and_stops(commands: Commands) -> None:
    """With what NanoCtrl's own says by its exit statuses, and with files for its user alone."""
    assert "not running" in commands.run("status", expect=1)
    told = commands.json(*START)
    assert told["was_running"] is False
    found = commands.json("status")
    assert (found["healthy"], found["pid"], found["address"]) == (True, told["pid"], told["address"])
    with NanoCtrlClient(told["address"]) as client:
        assert client.register("e", ENGINE)
        assert client.heartbeat() == "ok"
    assert (commands.folder / "nanoctrl.pid").read_text().strip() == str(told["pid"])
    assert json.loads((commands.folder / "nanoctrl.meta.json").read_text())["address"] == told["address"]
    for path in [commands.folder, *commands.folder.rglob("*")]:
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0 or (path.parent != commands.folder), path
    assert "has ended" in commands.run("stop")
    assert commands.processes() == []
    assert not (commands.folder / "nanoctrl.pid").exists()
    commands.run("status", expect=1)
    assert "not running" in commands.run("stop")


def test_a_second_start_finds_the_first_one(commands: Commands) -> None:
    """However near in time: there is one process, and both commands say which."""
    one, other = commands.begin(*START, "--json"), commands.begin(*START, "--json")
    told = [json.loads(process.communicate(timeout=120)[0]) for process in (one, other)]
    assert [process.returncode for process in (one, other)] == [0, 0]
    assert told[0]["pid"] == told[1]["pid"]
    assert sorted(found["was_running"] for found in told) == [False, True]
    third = commands.json(*START)
    assert (third["pid"], third["was_running"]) == (told[0]["pid"], True)


def test_what_another_one_left_is_not_believed(commands: Commands) -> None:
    """A pid that is another program's by now is neither taken for the control plane nor ended."""
    commands.json(*START)
    for process in commands.processes():
        process.kill()
    until(lambda: not commands.processes(), "the killed ones to be gone")
    other = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=-1)
    try:
        for path in (commands.folder / "nanoctrl.pid", commands.folder / "nanoctrl.meta.json"):
            path.write_text(str(other.pid) if path.suffix == ".pid" else json.dumps({"pid": other.pid}))
        mesh = commands.folder / "mesh" / "run" / "mesh.json"
        kept = json.loads(mesh.read_text())
        services = [{**service, "pid": other.pid} for service in kept["services"]]
        mesh.write_text(json.dumps({**kept, "pid": other.pid, "services": services}))
        commands.run("status", expect=1)
        assert "not running" in commands.run("stop")
        assert other.poll() is None
        assert commands.json(*START)["pid"] != other.pid
        commands.run("stop")
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()


def test_a_killed_one_leaves_nothing_that_runs(commands: Commands) -> None:
    """Its service and its server end with it, and the next one starts from what was stored."""
    first = commands.json(*START)
    with NanoCtrlClient(first["address"]) as client:
        assert client.register("e", ENGINE)
        os.kill(first["pid"], signal.SIGKILL)
        until(lambda: not commands.processes(), "all of it to be gone")
        commands.run("status", expect=1)
        second = commands.json(*START)
        assert second["was_running"] is False
        assert [engine["id"] for engine in NanoCtrlClient(second["address"]).list_engines()] == ["e"]


def test_one_that_hangs_is_unwell_and_ends_only_by_force(commands: Commands) -> None:
    """Nothing of it is left then."""
    started = commands.json(*START)
    service = commands.service()
    service.suspend()
    found = commands.json("status", expect=2)
    assert (found["healthy"], found["pid"]) == (False, started["pid"])
    assert found["problem"]
    os.kill(started["pid"], signal.SIGSTOP)
    assert "--force" in commands.run("stop", "--timeout", "0.3", expect=1)
    assert commands.json("stop", "--timeout", "0.3", "--force") == {"was_running": True, "killed": True}
    assert commands.processes() == []
    commands.run("status", expect=1)


def test_another_address_can_be_asked(commands: Commands) -> None:
    """Whether something runs here is told all the same."""
    commands.run("status", "--address", "127.0.0.1:1", expect=1)
    started = commands.json(*START)
    commands.run("status", "--address", "127.0.0.1:1", expect=2)
    assert commands.json("status", "--address", started["address"])["healthy"]
    assert "address" in commands.run("status", "--address", "http://", expect=2)


def test_a_port_that_is_taken_is_said(commands: Commands, tmp_path: Path) -> None:
    """With what to do, and nothing is left."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = commands.run("start", "--port", port, "--wait", "60", expect=1)
    assert "cannot be bound" in said
    assert "another program has it" in said
    assert "--port" in said
    until(lambda: not commands.processes(), "all of it to be gone")


def test_an_address_that_this_machine_has_not_is_said(commands: Commands) -> None:
    """And no other port is recommended, nor another program blamed."""
    said = commands.run("start", "--host", "192.0.2.1", "--port", "0", "--wait", "60", expect=1)
    assert "cannot be bound" in said
    assert "another program" not in said
    assert "--port" not in said


def test_a_token_in_the_environment_is_that_of_its_clients(commands: Commands) -> None:
    """As a shell has it in which `computemesh env` was evaluated."""
    told = commands.json(*START, COMPUTEMESH_TOKEN="a-token-of-mine")
    assert commands.json("status", COMPUTEMESH_TOKEN="a-token-of-mine")["healthy"]
    assert NanoCtrlClient(told["address"]).register("e", ENGINE)


def test_one_that_is_not_well_in_time_is_ended_again(commands: Commands) -> None:
    """Else the next start would find it running."""
    commands.run(*START, "--health-port", "1", "--wait", "4", expect=1)
    assert commands.processes() == []
    commands.run("status", expect=1)


def test_the_commands_of_a_mesh_find_one_that_is_well_well(commands: Commands) -> None:
    """Though it has neither nodes nor work."""
    commands.run(*START)
    place = str(commands.folder / "mesh")
    told = json.loads(mesh_command("status", "--json", COMPUTEMESH_HOME=place).stdout)
    assert (told["ready"], told["problem"], told["nodes"]) == (True, "", None)
    shown = mesh_command("status", COMPUTEMESH_HOME=place)
    assert (shown.returncode, shown.stderr) == (0, "")
    found = json.loads(mesh_command("doctor", "--json", COMPUTEMESH_HOME=place).stdout)["findings"]
    troubles = [finding for finding in found if finding["level"] in ("warning", "problem")]
    assert [finding for finding in troubles if finding["about"] not in ("disk", "open files")] == []
    assert [finding for finding in found if finding["about"] == "not seen"] == []


async def test_a_store_that_is_too_small_is_named_while_it_starts_and_when_it_has_not(
    commands: Commands, tmp_path: Path
) -> None:
    """By the start itself, and meanwhile by `computemesh status` and `computemesh doctor`."""
    place, why = str(commands.folder / "mesh"), "insufficient storage resources available"
    server = NatsServer(tmp_path / "nats", tmp_path / "credentials.json", max_file_store_bytes=2**20)
    await server.start()
    try:
        url = server.url(Role.SERVICES)
        start = commands.begin("start", "--port", "0", "--wait", "30", "--nats-url", url)
        async with asyncio.timeout(25):
            while why not in (await asyncio.to_thread(mesh_command, "status", COMPUTEMESH_HOME=place)).stdout:
                await asyncio.sleep(0.1)
        done = await asyncio.to_thread(mesh_command, "doctor", "--json", COMPUTEMESH_HOME=place)
        found = json.loads(done.stdout)["findings"]
        assert any(one["about"] == "control-plane" and why in one["text"] for one in found), found
        _, trouble = await asyncio.to_thread(start.communicate, timeout=120)
        assert start.returncode == 1
        assert why in trouble
    finally:
        await server.stop()


async def test_a_nats_server_that_is_there_is_used(commands: Commands, tmp_path: Path) -> None:
    """What is registered lies there, and no other server is started. The environment counts before the command line."""
    async with nats_server(tmp_path / "nats") as (url, _):
        told = commands.json(*START, "--nats-url", "nats://127.0.0.1:1", NANOCTRL_REDIS_URL=url)
        assert told["nats"] == url
        assert not any("nats-server" in " ".join(process.cmdline()) for process in commands.processes())
        with NanoCtrlClient(told["address"]) as client:
            assert client.register("e", ENGINE)
            client._operations.registered = False  # pyright: ignore[reportPrivateUsage]
        commands.run("stop")
        again = commands.json(*START, "--redis-url", url)
        assert [engine["id"] for engine in NanoCtrlClient(again["address"]).list_engines()] == ["e"]


def test_a_nats_server_that_is_not_there_is_named(commands: Commands) -> None:
    """Without its password."""
    said = commands.run(
        "start", "--port", "0", "--wait", "3", "--nats-url", "nats://services:secret@127.0.0.1:1", expect=1
    )
    assert "nats://127.0.0.1:1" in said
    assert "--nats-url" in said
    assert "secret" not in said


def test_beyond_loopback_clients_show_a_token(commands: Commands) -> None:
    """Which a command prints; or none, where that was asked for."""
    told = commands.json(*START, "--host", "0.0.0.0")
    assert commands.json("status")["healthy"]
    token = commands.run("token").strip()
    assert NanoCtrlClient(told["address"], token="").register("e", ENGINE) is False
    assert NanoCtrlClient(told["address"], token=token).register("e", ENGINE) is True
    commands.run("stop")
    told = commands.json(*START, "--host", "0.0.0.0", "--no-token")
    assert NanoCtrlClient(told["address"], token="").register("e", ENGINE) is True


@pytest.mark.parametrize(
    ("words", "changes", "named"),
    [
        (("start",), {"NANOCTRL_REDIS_URL": "redis://:secret@h:6379"}, "NANOCTRL_REDIS_URL"),
        (("start", "--redis-url", "redis://:secret@h"), {}, "--nats-url"),
        (("start", "--nats-url", "h:4222"), {}, "--nats-url"),
        (("start", "--nats-url", "nats://"), {}, "--nats-url"),
        (("start",), {"NANOCTRL_RUST_LOG": "loud"}, "NANOCTRL_RUST_LOG"),
        (("start", "--port", "65536"), {}, "--port"),
        (("start", "--wait", "0"), {}, "--wait"),
        (("start", "--log-file", "/proc/no/such.log"), {}, "--log-file"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    commands: Commands, words: tuple[str, ...], changes: dict[str, str], named: str
) -> None:
    """Before anything is started; a password is not repeated."""
    said = commands.run(*words, expect=2, **changes)
    assert named in said
    assert "secret" not in said
    assert commands.processes() == []


def test_a_folder_that_others_can_write_to_is_refused(commands: Commands) -> None:
    """What lies there could be anybody's."""
    commands.folder.mkdir(mode=0o700)
    commands.folder.chmod(0o777)
    assert "NANOCTRL_RUNTIME_DIR" in commands.run("status", expect=2)
    commands.folder.chmod(0o755)
    commands.run("status", expect=1)


def test_the_log_is_where_it_was_asked_for_and_for_its_user_alone(commands: Commands, tmp_path: Path) -> None:
    """At the level that NanoCtrl's variable says."""
    log = tmp_path / "its.log"
    told = commands.json(*START, "--log-file", str(log), NANOCTRL_RUST_LOG="nanoctrl=debug,tower=warn")
    assert told["log"] == str(log)
    assert "not ready" in log.read_text(), "a line that is written at the level debug"
    assert "listening on" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
