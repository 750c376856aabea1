"""`up` and `down`: what they start and end, whatever ends them, and what outlives it.

Method: commands as processes, with a home of their own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import nats

from computemesh.testing.cli import Cli, until
from computemesh.testing.server import bare_server


def test_down_leaves_no_process_and_the_next_up_finds_the_work(cli: Cli) -> None:
    """What was submitted is still there, under the same addresses."""
    assert "The mesh is up" in cli.up()
    assert len(cli.processes()) >= 6
    cli.ok("submit", "--prompt", "x", "--work-id", "kept")
    url = cli.json("env")["NATS_URL"]
    assert cli.ok("down").strip().endswith("The mesh is down.")
    assert cli.processes() == []
    assert cli.ok("down").strip() == "No mesh is running here."
    cli.up()
    assert cli.json("env")["NATS_URL"] == url
    assert cli.json("work", "show", "kept")["state"] == "pending"
    assert f"Deleted {cli.home}" in cli.ok("down", "--purge")
    assert cli.processes() == []
    assert not cli.home.exists()


def test_down_where_nothing_ever_ran_says_so(cli: Cli) -> None:
    """And makes no home."""
    assert cli.ok("down").strip() == "No mesh is running here."
    assert not cli.home.exists()


def test_up_without_a_model_says_so_and_where_to_look(cli: Cli) -> None:
    """It does not wait for a node that will never come; the mesh is up for other work."""
    shown = cli.ok("up", "--detach", "--ports", "any", "--nats-port", "0")
    assert "No node serves a model: see `computemesh doctor`" in shown
    assert cli.json("status")["ready"]


def test_when_the_supervisor_is_killed_its_children_end_and_up_works_again(cli: Cli) -> None:
    """The kernel tells them; nobody has to clean up."""
    cli.up()
    cli.ok("submit", "--prompt", "x", "--work-id", "kept")
    supervisor = cli.json("status")["pid"]
    assert supervisor in {process.pid for process in cli.processes()}
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: not cli.processes(), "the children to end by themselves")
    assert "no mesh runs" in cli.fails(3, "status")
    cli.up()
    assert cli.json("work", "show", "kept")["state"] == "pending"


def test_in_the_foreground_a_signal_ends_everything(cli: Cli) -> None:
    """Status 0, with a last word."""
    process = subprocess.Popen(
        [sys.executable, "-m", "computemesh.cli", "up", "--ports", "any", "--nats-port", "0", "--quiet"],
        env=cli.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "files in" in line:
            break
    assert cli.json("status")["ready"]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert process.stdout.read().strip().endswith("The mesh is down.")
    process.stdout.close()
    assert cli.processes() == []


async def test_up_uses_the_server_that_nats_url_names(cli: Cli, tmp_path: Path) -> None:
    """No server of its own; what it keeps is kept there."""
    async with bare_server(tmp_path / "external") as url:
        assert "NATS (external)" in cli.up(NATS_URL=url)
        status = cli.json("status")
        assert (status["embedded"], status["ready"]) == (False, True)
        assert "nats-server" not in {service["name"] for service in status["services"]}
        assert not (cli.home / "nats").exists()
        assert cli.json("submit", "--prompt", "x", "--work-id", "external")["work_id"] == "external"
        assert cli.json("work", "show", "external", NATS_URL=url)["work_id"] == "external"
        cli.ok("down")
        assert cli.processes() == []
        await (await nats.connect(url)).close()  # pyright: ignore[reportUnknownMemberType]


def test_a_port_that_is_taken_is_named(cli: Cli) -> None:
    """The mesh does not come up halfway."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = cli.fails(2, "up", "--detach", "--no-demo", "--ports", "any", "--nats-port", str(port))
    assert str(port) in said
    assert cli.processes() == []
