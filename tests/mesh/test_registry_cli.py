"""``registry`` and ``peers``: what the control plane knows, as people and scripts ask for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Generator
from typing import Any, Final

import pytest

from computemesh.ids import new_id
from computemesh.nanoctrl import NanoCtrlClient
from computemesh.testing.cli import Cli, until

ENGINE: Final[dict[str, Any]] = {
    "role": "decode",
    "world_size": 8,
    "num_blocks": 15_000,
    "host": "10.0.0.2",
    "port": 6001,
    "peer_addrs": ["10.0.0.2:5000"],
    "model_path": "/models/qwen",
}


@pytest.fixture(scope="module")
def address(mesh: Cli) -> str:
    """Where the control plane is."""
    services = mesh.json("status")["services"]
    return str(next(service["http"] for service in services if service["name"] == "control-plane"))


@pytest.fixture
def scope() -> str:
    """One that no other test has."""
    return new_id("s")


@pytest.fixture
def register(address: str, scope: str) -> Generator[Callable[..., NanoCtrlClient]]:
    """Registers an engine in the scope of the test."""
    made: list[NanoCtrlClient] = []

    def one(engine_id: str, **more: Any) -> NanoCtrlClient:
        client = NanoCtrlClient(address, scope)
        assert client.register(engine_id, {**ENGINE, **more})
        made.append(client)
        return client

    yield one
    for client in made:
        client.stop()


# --- engines -----------------------------------------------------------------------------------------------------


def test_what_is_registered_is_listed(mesh: Cli, scope: str, register: Callable[..., NanoCtrlClient]) -> None:
    """In its scope alone, filtered, for people and for programs."""
    register("prefill-0", role="prefill")
    register("decode-0")
    table = mesh.ok("registry", "list", "--scope", scope)
    assert "10.0.0.2:6001" in table
    assert f"2 in the scope {scope}" in table
    assert "15,000" in table
    found = mesh.json("registry", "list", "--kind", "prefill", NANOCTRL_SCOPE=scope)
    assert [(engine["engine_id"], engine["role"]) for engine in found["engines"]] == [("prefill-0", "prefill")]
    assert "Nothing like that is registered" in mesh.ok("registry", "list", "--scope", scope, "--type", "router")
    assert "Nothing is registered in the scope s-none" in mesh.ok("registry", "list", "--scope", "s-none")


def test_one_is_shown_whole_and_can_be_removed(mesh: Cli, scope: str, register: Callable[..., NanoCtrlClient]) -> None:
    """Once; then it is not there any more."""
    client = register("decode-0")
    shown = mesh.ok("registry", "get", "decode-0", "--scope", scope)
    for told in ("10.0.0.2:6001", "/models/qwen", "10.0.0.2:5000", "15,000", "tcp://10.0.0.2:6001"):
        assert told in shown
    assert mesh.json("registry", "get", "decode-0", "--scope", scope)["world_size"] == 8
    assert "no longer" in mesh.ok("registry", "remove", "decode-0", "--scope", scope)
    assert "was not" in mesh.ok("registry", "remove", "decode-0", "--scope", scope)
    assert client.heartbeat() == "not_found"
    assert mesh.refuses(2, "registry", "get", "decode-0", "--scope", scope)["code"] == "not_found"


def test_changes_are_told_since_a_revision(mesh: Cli, scope: str, register: Callable[..., NanoCtrlClient]) -> None:
    """In their order, and no others."""
    client = register("decode-0")
    until(lambda: len(told_changes(mesh, scope)) == 1, "the engine to be told")
    register("decode-0", port=6002)
    until(lambda: len(told_changes(mesh, scope)) == 2, "the change to be told")
    client.unregister()
    until(lambda: len(told_changes(mesh, scope)) == 3, "the end to be told")
    told = told_changes(mesh, scope)
    assert [change["change"] for change in told] == ["added", "changed", "removed"]
    later = mesh.ok("registry", "changes", "--scope", scope, "--since", str(told[1]["revision"]))
    assert len(later.splitlines()) == 1
    assert "removed" in later
    assert "decode-0" in later


def test_changes_are_followed_and_none_is_missed(
    mesh: Cli, address: str, scope: str, register: Callable[..., NanoCtrlClient]
) -> None:
    """Also when the NATS server was away meanwhile; Ctrl-C ends it well."""
    register("decode-0")
    follower = mesh.start("registry", "changes", "--scope", scope, "--follow", "--json")
    assert follower.stdout is not None
    try:
        assert next_change(follower) == ("added", "decode-0")
        register("decode-1")
        assert next_change(follower) == ("added", "decode-1")
        services = mesh.json("status")["services"]
        server = next(service for service in services if service["name"] == "nats-server")
        os.kill(server["pid"], signal.SIGKILL)
        client = NanoCtrlClient(address, scope)
        until(lambda: client.register("decode-2", ENGINE), "the control plane to take an engine again")
        assert next_change(follower) == ("added", "decode-2")
        follower.send_signal(signal.SIGINT)
        assert follower.wait(30) == 0
    finally:
        follower.kill()
        follower.communicate()


def told_changes(mesh: Cli, scope: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in mesh.ok("registry", "changes", "--scope", scope, "--json").splitlines()]


def next_change(process: subprocess.Popen[str]) -> tuple[str, str]:
    assert process.stdout is not None
    found = json.loads(process.stdout.readline())
    return found["change"], found["engine_id"]


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("registry", "list", "--scope", "a b"), "scope"),
        (("registry", "get", "*"), "engine_id"),
        (("registry", "remove", "a", "--type", "*"), "entity_type"),
        (("peers", "--scope", "*"), "scope"),
        (("peers", "memory", "a b"), "alias"),
        (("peers", "connect", "a", "b c"), "target_peers[0]"),
    ],
)
def test_a_name_that_can_be_none_is_refused_by_field(mesh: Cli, words: tuple[str, ...], field: str) -> None:
    """No pattern reaches what is another scope's."""
    assert mesh.refuses(2, *words)["field"] == field


def test_a_scope_in_front_of_a_subcommand_is_not_overlooked(mesh: Cli) -> None:
    """It would be asked in another scope than the one that was meant."""
    assert "--scope goes behind `memory`" in mesh.refuses(2, "peers", "--scope", "s", "memory", "a")["error"]


# --- peers -------------------------------------------------------------------------------------------------------


def test_peers_are_listed_with_their_memory(mesh: Cli, address: str, scope: str) -> None:
    """For people and for programs."""
    with NanoCtrlClient(address, scope) as client:
        told: dict[str, Any] = {"device": "mlx5_0", "ib_port": 1, "link_type": "RoCE", "address": "10.0.0.2:5000"}
        name = client.register_peer(alias=None, name_prefix="worker", **told)["name"]
        table = mesh.ok("peers", "--scope", scope)
        assert name in table
        assert "mlx5_0:1 RoCE" in table
        assert [peer["alias"] for peer in mesh.json("peers", "--scope", scope)["peers"]] == [name]
        assert "offers no memory" in mesh.ok("peers", "memory", name, "--scope", scope)
        client.cleanup_peer(name)
    assert "No peers in the scope" in mesh.ok("peers", "--scope", scope)
    assert mesh.refuses(2, "peers", "memory", name, "--scope", scope)["code"] == "not_found"


def test_whom_a_peer_is_to_be_connected_to_is_said_and_shown(mesh: Cli, scope: str) -> None:
    """Before it is there, too; without a name it is nobody."""
    assert "nobody" in mesh.ok("peers", "topology", "worker-a", "--scope", scope)
    mesh.ok("peers", "connect", "worker-a", "worker-b", "worker-c", "--symmetric", "--scope", scope)
    assert mesh.ok("peers", "topology", "worker-a", "--scope", scope).split() == ["worker-b", "worker-c"]
    assert mesh.json("peers", "topology", "worker-b", "--scope", scope)["target_peers"] == ["worker-a"]
    assert "nobody" in mesh.ok("peers", "connect", "worker-a", "--scope", scope)
    assert mesh.json("peers", "topology", "worker-a", "--scope", scope)["target_peers"] == []
