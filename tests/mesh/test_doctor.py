"""`doctor`: what it finds and says to do, on a mesh that is well, is not, or is not there.

Method: commands as processes; what is wrong is made so.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest

from computemesh.contracts.base import Role
from computemesh.testing import running_server
from computemesh.testing.cli import Cli, until
from tests.mesh.findings import examined, pid_of, url_of

# pyright: reportUnknownMemberType=false


def test_the_doctor_finds_a_mesh_that_is_well_well(mesh: Cli) -> None:
    """Each thing it looked at has its line. This mesh has no model, which is a warning."""
    found = examined(mesh)
    assert not [about for level, about in found if level == "problem"]
    for about in ("home", "python", "disk", "supervisor", "nats", "jetstream", "streams", "answers", "http", "leases",
                  "clocks", "work", "nats-server", "node-registry", "work-marshaller", "node-agent"):  # fmt: skip
        assert ("ok", about) in found, about
    assert ("warning", "models") in found
    text = mesh.ok("doctor")
    assert "0 problems" in text


def test_the_doctor_says_what_to_do_where_nothing_runs(cli: Cli) -> None:
    """And makes no home."""
    found = examined(cli)
    assert "computemesh up" in found["problem", "supervisor"]["todo"]
    assert "no connection to NATS" in found["skipped", "not seen"]["text"]
    assert not cli.home.exists()


def test_the_doctor_finds_a_halted_service(mesh: Cli) -> None:
    """By its process, by its silence on the bus and over HTTP; and says how to let it go on."""
    pid = pid_of(mesh, "node-registry")
    os.kill(pid, signal.SIGSTOP)
    try:
        done = mesh.run("doctor")
        found = examined(mesh)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert found["problem", "node-registry"]
    assert f"kill -CONT {pid}" in done.stdout
    assert "does not answer on the bus" in done.stdout
    assert "/readyz: no answer" in done.stdout
    until(lambda: ("ok", "leases") in examined(mesh), "the registry to act again")


async def test_the_doctor_finds_denied_subjects_and_wrong_credentials_in_the_log(mesh: Cli) -> None:
    """Who tried what, and what to do instead."""

    async def ignore(_: Exception) -> None:
        pass

    client = await nats.connect(url_of(mesh, Role.CLIENT), name="curious", error_cb=ignore)
    await client.publish("$KV.compute-work.x", b"1")
    await client.flush()
    await client.close()
    wrong = url_of(mesh, Role.OBSERVER).replace("observer:", "observer:x")
    with pytest.raises(nats.errors.Error):
        await nats.connect(wrong, allow_reconnect=False, error_cb=ignore)
    text = mesh.run("doctor").stdout
    assert "client (curious) may not publish to $KV.compute-work.x" in text
    assert "only services reach JetStream" in text
    assert "wrong credentials for user 'observer'" in text


def test_the_doctor_finds_streams_that_are_not_as_they_should_be(cli: Cli) -> None:
    """Full, changed or deleted. What it says to do helps."""
    cli.up()

    def ask(verb: str, body: Any = "") -> dict[str, Any]:
        question = json.dumps(body) if body else ""
        answer: dict[str, Any] = cli.json("call", "--raw", f"$JS.API.STREAM.{verb}", question, "--role", "services")
        assert "error" not in answer
        return answer

    def finding(level: str, stream: str) -> dict[str, str]:
        found = examined(cli)
        assert ("ok", "streams") not in found
        return found[level, stream]

    def do_as_told(told: dict[str, str]) -> None:
        assert "computemesh up" in told["todo"]
        cli.ok("down")
        cli.up()
        assert ("ok", "streams") in examined(cli)

    was = ask("INFO.KV_compute-nodes")
    ask("UPDATE.KV_compute-nodes", was["config"] | {"max_bytes": was["state"]["bytes"] + 10})
    # A full stream differs from its declaration too, and of one level and subject the last finding is kept.
    assert "% full" in finding("problem", "KV_compute-nodes")["text"]
    ask("UPDATE.KV_compute-nodes", was["config"])

    ask("UPDATE.COMPUTE_WORK", ask("INFO.COMPUTE_WORK")["config"] | {"max_msg_size": 1000})
    told = finding("warning", "COMPUTE_WORK")
    assert "as declared: max_msg_size" in told["text"]
    do_as_told(told)

    ask("DELETE.COMPUTE_WORK")
    told = finding("problem", "COMPUTE_WORK")
    assert "missing" in told["text"]
    do_as_told(told)


async def test_the_doctor_looks_at_a_server_that_nats_url_names(cli: Cli, tmp_path: Path) -> None:
    """Whether it is there, whether it takes the credentials, and what runs there."""
    async with running_server(tmp_path / "external") as server:
        bare = examined(cli, NATS_URL=server.url(Role.SERVICES))
        assert bare["problem", "COMPUTE_WORK"]["text"].startswith("it is missing")
        assert bare["problem", "work-marshaller"]
        assert (
            "does not answer on the bus" in bare["problem", "node-registry"]["text"] or bare["problem", "node-registry"]
        )
        weak = examined(cli, NATS_URL=server.url(Role.CLIENT))
        assert "credentials of the role services" in weak["skipped", "not seen"]["text"] or ("ok", "nats") in weak
        wrong = examined(cli, NATS_URL=server.url(Role.CLIENT).replace("client:", "client:x"))
        assert "refuses the credentials of client" in wrong["problem", "nats"]["text"]
        assert "NATS_URL" in wrong["problem", "nats"]["todo"]
        assert ("problem", "supervisor") not in wrong
        port = server.port
    gone = examined(cli, NATS_URL=f"nats://client:x@127.0.0.1:{port}")
    assert "nothing listens" in gone["problem", "nats"]["text"]


def test_the_doctor_sees_all_of_the_home_mesh_when_nats_url_is_that_of_its_client(mesh: Cli) -> None:
    """As after `eval "$(computemesh env)"`."""
    found = examined(mesh, NATS_URL=url_of(mesh, Role.CLIENT))
    assert ("ok", "streams") in found
    assert ("ok", "supervisor") in found
