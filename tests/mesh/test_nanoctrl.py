"""NanoCtrl's interface on a mesh: every path, status and field of it, its own client, and what it did worse.

Goal: programs written for NanoCtrl work unchanged, and none of its faults is here. Method: a control plane as a process
on a real server, asked over HTTP as NanoCtrl's clients ask; `nanoctrl` 0.0.5 as it is published.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import pytest_asyncio

from computemesh.contracts import engines, peers
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.engines import Engine, EngineGet
from computemesh.contracts.peers import Peer, PeerRegister, PeerUnregister
from computemesh.ids import new_id
from computemesh.testing import RunningMesh, running_mesh, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENGINE: Final[dict[str, Any]] = {
    "role": "prefill",
    "world_size": 8,
    "num_blocks": 15_000,
    "host": "10.0.0.2",
    "port": 6001,
    "peer_addrs": ["10.0.0.2:5000"],
}
PATHS: Final = {
    "/register_engine": {"engine_id": "e", **ENGINE},
    "/unregister_engine": {"engine_id": "e"},
    "/heartbeat_engine": {"engine_id": "e"},
    "/heartbeat_agent": {"entity_type": "agent", "entity_id": "a"},
    "/heartbeat": {"entity_type": "engine", "entity_id": "e"},
    "/get_engine_info": {"engine_id": "e"},
    "/list_engines": {},
    "/register": {"entity_id": "e", "kind": "k"},
    "/unregister": {"entity_id": "e"},
    "/get_entity_info": {"entity_id": "e"},
    "/list_entities": {},
    "/start_peer_agent": {"address": "127.0.0.1"},
    "/query": {},
    "/register_mr": {"agent_name": "a", "mr_name": "kv", "addr": 1, "length": 2, "rkey": 3},
    "/get_mr_info": {"src": "x", "dst": "a", "mr_name": "kv"},
    "/v1/desired_topology/a": {"target_peers": ["b"]},
    "/cleanup": {"agent_name": "a"},
    "/get_redis_address": {},
}
every_path = pytest.mark.parametrize("path", PATHS)


class Caller:
    """Asks in one scope."""

    def __init__(self, http: httpx.AsyncClient, scope: str) -> None:
        self.http = http
        self.scope = scope

    async def __call__(self, path: str, status: int = 200, **fields: Any) -> Any:
        answer = await self.http.post(path, json={"scope": self.scope, **fields})
        assert answer.status_code == status, answer.text
        return answer.json()

    async def names(self) -> list[str]:
        return [engine["id"] for engine in (await self("/list_engines"))["engines"]]

    async def aliases(self) -> list[str]:
        return [peer["name"] for peer in await self("/query")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[RunningMesh]:
    """One control plane."""
    async with running_mesh(tmp_path_factory.mktemp("nanoctrl"), ["control-plane"]) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def http(mesh: RunningMesh) -> AsyncGenerator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=mesh.http("control-plane")) as client:
        yield client


@pytest.fixture
def ask(http: httpx.AsyncClient) -> Caller:
    """In a scope that no other test has."""
    return Caller(http, new_id("s"))


# --- engines -------------------------------------------------------------------------------------------------------


async def test_an_engine_is_registered_found_listed_kept_and_forgotten(ask: Caller) -> None:
    """Every answer has the fields and texts of NanoCtrl, and the list the address that its document promises."""
    said = await ask("/register_engine", engine_id="prefill-0", **ENGINE, unknown_field=1)
    assert said == {"status": "ok", "message": "Engine prefill-0 registered successfully"}
    info = {
        "id": "prefill-0",
        **ENGINE,
        "p2p_host": "",
        "p2p_port": 0,
        "max_num_seqs": 0,
        "model_path": None,
        "zmq_address": "tcp://10.0.0.2:6001",
    }
    assert await ask("/get_engine_info", engine_id="prefill-0") == {"status": "ok", "engine_info": info}
    assert await ask("/list_engines") == {"status": "ok", "engines": [info]}
    good = {"status": "ok", "message": "Heartbeat successful for engine prefill-0"}
    assert await ask("/heartbeat_engine", engine_id="prefill-0") == good
    for path in ("/heartbeat_engine", "/heartbeat", "/heartbeat_agent"):
        assert await ask(path, entity_type="engine", entity_id="prefill-0") == good
    gone = {"status": "ok", "message": "Engine prefill-0 unregistered successfully"}
    assert await ask("/unregister_engine", engine_id="prefill-0") == gone
    assert await ask("/unregister_engine", engine_id="prefill-0") == gone
    assert await ask("/get_engine_info", engine_id="prefill-0") == {"status": "not_found", "engine_info": None}
    assert await ask("/heartbeat_engine", engine_id="prefill-0") == {
        "status": "not_found",
        "message": "engine prefill-0 not found. Please register first.",
    }
    assert await ask("/list_engines") == {"status": "ok", "engines": []}


async def test_what_is_registered_again_is_replaced(ask: Caller) -> None:
    await ask("/register_engine", engine_id="e", **ENGINE)
    newer: dict[str, Any] = {**ENGINE, "port": 7000, "model_path": "/m", "max_num_seqs": 4}
    await ask("/register_engine", engine_id="e", **newer)
    found = (await ask("/get_engine_info", engine_id="e"))["engine_info"]
    assert (found["port"], found["model_path"], found["max_num_seqs"]) == (7000, "/m", 4)


async def test_an_engine_without_peers_need_not_say_so(ask: Caller) -> None:
    """NanoCtrl demands `peer_addrs`, which its document does not."""
    await ask(
        "/register_engine", engine_id="e", **{name: value for name, value in ENGINE.items() if name != "peer_addrs"}
    )
    assert (await ask("/get_engine_info", engine_id="e"))["engine_info"]["peer_addrs"] == []


@pytest.mark.parametrize("scope", ["", None])
async def test_no_scope_is_a_scope_of_its_own(ask: Caller, scope: str | None) -> None:
    """Left out, empty or null; it is not that of everybody."""
    name = new_id("e")
    await ask("/register_engine", engine_id=name, **ENGINE)
    nowhere = Caller(ask.http, "")
    assert name not in await nowhere.names()
    await nowhere("/register_engine", engine_id=name, **ENGINE, scope=scope)
    assert name in await nowhere.names()
    answer = await ask.http.post("/list_engines", json={})
    assert name in [engine["id"] for engine in answer.json()["engines"]]


# --- what NanoCtrl takes, and should not ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("role", "banana"),
        ("role", 1),
        ("port", 65_536),
        ("port", -1),
        ("port", "6001"),
        ("p2p_port", 99_999),
        ("world_size", -1),
        ("world_size", 2**32),
        ("num_blocks", 1.5),
        ("engine_id", ""),
        ("engine_id", "a b"),
        ("engine_id", "*"),
        ("engine_id", "x" * 129),
        ("host", None),
        ("peer_addrs", "10.0.0.2:5000"),
        ("scope", "*"),
        ("scope", "s*"),
        ("scope", "-s"),
    ],
)
async def test_a_field_that_does_not_fit_is_named(ask: Caller, field: str, value: Any) -> None:
    """By the status of NanoCtrl, which takes most of these."""
    body = {"scope": ask.scope, "engine_id": "e", **ENGINE, field: value}
    answer = await ask.http.post("/register_engine", json=body)
    said = answer.json()
    assert (answer.status_code, said["status"], said["field"]) == (422, "error", field)
    assert said["message"].startswith(f"Failed to deserialize the JSON body into the target type: {field}: ")


@pytest.mark.parametrize("field", ["engine_id", "role", "world_size", "num_blocks", "host", "port"])
async def test_a_field_that_is_missing_is_named(ask: Caller, field: str) -> None:
    body = {name: value for name, value in {"engine_id": "e", **ENGINE}.items() if name != field}
    answer = await ask.http.post("/register_engine", json=body)
    assert (answer.status_code, answer.json()["field"]) == (422, field)


@every_path
async def test_no_path_takes_a_pattern_for_a_scope(http: httpx.AsyncClient, path: str) -> None:
    """In NanoCtrl `*` lists the engines of everybody, and a heartbeat reaches what it keeps for itself."""
    if path == "/get_redis_address":
        return  # It knows no scope.
    for scope in ("*", "my-sess*", "?", "[a-z]", "a b", "a\n", "a>", "$KV"):
        answer = await http.post(path, json={**PATHS[path], "scope": scope})
        assert (answer.status_code, answer.json()["field"]) == (422, "scope"), scope


async def test_scopes_do_not_see_count_or_change_each_other(ask: Caller) -> None:
    """Nor do scopes and ids whose texts run together."""
    other = Caller(ask.http, f"{ask.scope}:engine")
    await ask("/register_engine", engine_id="engine:b", **ENGINE)
    await other("/register_engine", engine_id="b", **{**ENGINE, "port": 1})
    await ask("/start_peer_agent", address="127.0.0.1")
    assert (await ask.names(), await other.names(), await other.aliases()) == (["engine:b"], ["b"], [])
    assert (await other("/start_peer_agent", address="127.0.0.1"))["name"] == "agent-1"
    assert (await other("/heartbeat", entity_type="engine", entity_id="engine:b"))["status"] == "not_found"
    await other("/unregister_engine", engine_id="engine:b")
    await other("/cleanup", agent_name="agent-9")
    assert (await ask.names(), await ask.aliases()) == (["engine:b"], ["agent-1"])
    assert (await ask("/heartbeat", entity_type="nano_meta", entity_id="engine_revision"))["status"] == "not_found"


# --- bodies that are none, and methods -------------------------------------------------------------------------------


@every_path
async def test_what_is_no_message_is_refused_with_the_statuses_of_nanoctrl(http: httpx.AsyncClient, path: str) -> None:
    """And always in one shape."""

    async def refused(status: int, **request: Any) -> None:
        answer = await http.post(path, **request)
        said = answer.json()
        assert (answer.status_code, said["status"]) == (status, "error"), answer.text
        assert said["message"]
        assert said["code"]

    json_header = {"content-type": "application/json"}
    for body in (b"", b"{", b"{'a': 1}", b'{"a": NaN}', b"\xff", b'{"a":' + b"[" * 100 + b"]" * 100 + b"}"):
        await refused(400, content=body, headers=json_header)
    for body in (b"[]", b"1", b"null", b'"x"'):
        await refused(422, content=body, headers=json_header)
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        await refused(415, content=b"{}", headers={"content-type": kind} if kind else {})
    await refused(413, content=b'{"a": "' + b"x" * 2**20 + b'"}', headers=json_header)


@every_path
async def test_a_body_that_is_empty_is_called_so(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.post(path, content=b"", headers={"content-type": "application/json"})
    assert answer.json()["message"] == "Failed to parse the request body as JSON: the body is empty"


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("/register_engine", {"engine_id": "e", **ENGINE, "host": "a b"}, "host: a host is a name or an address"),
        ("/register_mr", {"agent_name": "a", "mr_name": "\n", "addr": 1, "length": 2, "rkey": 3},
         "mr_name: the name of a region has no control characters"),
    ],
)  # fmt: skip
async def test_what_may_stand_in_a_field_is_said_in_words(
    ask: Caller, path: str, fields: dict[str, Any], words: str
) -> None:
    said = await ask(path, 422, **fields)
    assert words in said["message"]
    assert "regex" not in said["message"]


@every_path
async def test_another_method_is_refused_and_the_right_one_named(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(path)
    assert (answer.status_code, answer.headers["allow"], answer.json()["status"]) == (405, "POST", "error")


async def test_an_unknown_path_is_not_found(http: httpx.AsyncClient) -> None:
    assert (await http.post("/nothing", json={})).status_code == 404
    assert (await http.post("/v1/desired_topology", json={})).status_code == 404


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        ("/heartbeat", {"entity_id": "e"}, "entity_type"),
        ("/heartbeat", {"entity_type": "engine"}, "entity_id"),
        ("/heartbeat_engine", {}, "engine_id"),
        ("/register", {"entity_id": "e"}, "kind"),
        ("/register", {"entity_id": "e", "kind": ""}, "kind"),
        ("/register", {"entity_id": "e", "kind": "prefill", "entity_type": "engine"}, "entity_type"),
        ("/register", {"entity_id": "e", "kind": "x", "entity_type": "agent"}, "entity_type"),
        ("/start_peer_agent", {}, "address"),
        ("/start_peer_agent", {"address": "h", "alias": "a*"}, "alias"),
        ("/start_peer_agent", {"address": "h", "ib_port": 256}, "ib_port"),
        ("/register_mr", {"agent_name": "a", "mr_name": "kv", "addr": -1, "length": 2, "rkey": 3}, "addr"),
        ("/register_mr", {"agent_name": "a", "mr_name": "kv", "addr": 1, "length": 2, "rkey": 2**32}, "rkey"),
        ("/register_mr", {"agent_name": "a", "mr_name": "kv", "addr": 2**64, "length": 2, "rkey": 3}, "addr"),
        ("/register_engine", {"engine_id": "e", **ENGINE, "host": "a b"}, "host"),
        ("/register_engine", {"engine_id": "e", **ENGINE, "p2p_host": "tcp://h"}, "p2p_host"),
        ("/v1/desired_topology/a", {"target_peers": "b"}, "target_peers"),
        ("/v1/desired_topology/a%2A", {"target_peers": []}, "agent"),
    ],
)
async def test_the_other_bodies_are_checked_as_well(ask: Caller, path: str, fields: dict[str, Any], field: str) -> None:
    said = await ask(path, 422, **fields)
    assert said["field"] == field, said


# --- entities --------------------------------------------------------------------------------------------------------


async def test_entities_of_the_second_generation_are_kept_as_they_said(ask: Caller) -> None:
    """With whatever endpoint, metadata and resource; of the type `service` where none is said."""
    said = await ask("/register", entity_id="e1", kind="encoder", endpoint={"port": 1}, metadata={"a": [1]}, resource=3)
    assert said == {"status": "ok", "message": "Entity service:e1 registered successfully"}
    await ask("/register", entity_type="router", entity_id="e1", kind="r", endpoint="tcp://h:1")
    await ask("/register_engine", engine_id="e1", **ENGINE)
    info = {
        "id": "e1",
        "entity_id": "e1",
        "entity_type": "service",
        "kind": "encoder",
        "endpoint": {"port": 1},
        "metadata": {"a": [1]},
        "resource": 3,
    }
    assert await ask("/get_entity_info", entity_id="e1") == {"status": "ok", "entity_info": info}
    assert await ask("/list_entities", entity_type="service") == {"status": "ok", "entities": [info]}
    types = [entity["entity_type"] for entity in (await ask("/list_entities"))["entities"]]
    assert types == ["engine", "router", "service"]
    assert [entity["id"] for entity in (await ask("/list_entities", kind="prefill"))["entities"]] == ["e1"]
    beat = await ask("/heartbeat", entity_type="router", entity_id="e1")
    assert beat == {"status": "ok", "message": "Heartbeat successful for router e1"}
    for _ in range(2):
        gone = await ask("/unregister", entity_id="e1")
        assert gone == {"status": "ok", "message": "Entity service:e1 unregistered successfully"}
    assert await ask("/get_entity_info", entity_id="e1") == {"status": "not_found", "entity_info": None}
    assert await ask.names() == ["e1"]


async def test_entities_are_listed_in_one_scope_though_no_type_is_named(ask: Caller) -> None:
    """dlslime-ctrl lists those of every scope then."""
    await Caller(ask.http, new_id("s"))("/register", entity_id="e1", kind="k")
    assert await ask("/list_entities") == {"status": "ok", "entities": []}


# --- peer agents -----------------------------------------------------------------------------------------------------


async def test_a_peer_agent_is_started_queried_and_cleaned_up(ask: Caller) -> None:
    """With the fields of both generations, and an alias that is found where none was named."""
    nics = {"nics": [{"name": "mlx5_0"}]}
    said = await ask("/start_peer_agent", address="127.0.0.1:1", device="mlx5_0", link_type="RoCE", resource=nics)
    assert (said["status"], said["name"], said["resource"]) == ("ok", "agent-1", nics)
    plain = await ask("/start_peer_agent", address="127.0.0.1:2", name_prefix="worker", ib_port=2)
    assert (plain["name"], "resource" in plain) == ("worker-2", False)
    assert (await ask("/query"))[1] == {
        "name": "worker-2",
        "device": "",
        "ib_port": 2,
        "link_type": "",
        "address": "127.0.0.1:2",
        "resource": None,
        "memory_keys": [],
    }
    assert (await ask("/query"))[0]["resource"] == nics
    await ask("/register_mr", agent_name="agent-1", mr_name="kv", addr=1, length=2, rkey=3)
    entity = {
        "id": "agent-1",
        "entity_id": "agent-1",
        "entity_type": "agent",
        "kind": "peer_agent",
        "endpoint": {"address": "127.0.0.1:1", "device": "mlx5_0", "ib_port": 1, "link_type": "RoCE"},
        "metadata": {"memory_keys": ["kv"]},
        "resource": nics,
    }
    named: dict[str, Any] = {"entity_type": "agent", "entity_id": "agent-1"}
    assert await ask("/get_entity_info", **named) == {"status": "ok", "entity_info": entity}
    assert (await ask("/list_entities", entity_type="agent"))["entities"][0] == entity
    assert (await ask("/query"))[0]["memory_keys"] == ["kv"], "a list that was made before is made anew"
    await ask("/register", entity_type="router", entity_id="r", kind="r")
    everything = (await ask("/list_entities"))["entities"]
    assert [one["id"] for one in everything] == ["r", "agent-1", "worker-2"]
    beat = await ask("/heartbeat", **named)
    assert beat == {"status": "ok", "message": "Heartbeat successful for agent agent-1"}
    assert await ask("/cleanup", agent_name="agent-1") == {"status": "ok", "message": "Cleaned up agent: agent-1"}
    assert await ask("/cleanup", agent_name="agent-1") == {"status": "ok", "message": "Cleaned up agent: agent-1"}
    assert (await ask("/heartbeat_agent", **named))["status"] == "not_found"
    assert await ask("/get_entity_info", **named) == {"status": "not_found", "entity_info": None}
    assert [one["id"] for one in (await ask("/list_entities"))["entities"]] == ["r", "worker-2"]
    assert (await ask("/start_peer_agent", address="127.0.0.1"))["name"] == "agent-3"
    assert await ask.aliases() == ["agent-3", "worker-2"]


async def test_a_found_alias_is_never_one_that_somebody_named(ask: Caller) -> None:
    await ask("/start_peer_agent", address="h", alias="agent-1")
    assert (await ask("/start_peer_agent", address="h"))["name"] == "agent-2"


async def test_peers_that_start_together_get_an_alias_each(ask: Caller) -> None:
    said = await asyncio.gather(*(ask("/start_peer_agent", address="h") for _ in range(20)))
    assert len({one["name"] for one in said}) == 20


async def test_a_taken_alias_is_refused_and_who_was_refused_cannot_clean_up_its_owner(ask: Caller) -> None:
    """nanoctrl 0.0.3 overwrites the other agent; DLSlime's agent, refused by 0.1.x, then cleans it up when it ends."""
    await ask("/start_peer_agent", address="h", alias="mine")
    await ask("/register_mr", agent_name="mine", mr_name="kv", addr=1, length=2, rkey=3)
    said = await ask("/start_peer_agent", 409, address="other", alias="mine")
    assert (said["status"], said["message"]) == ("error", "Peer agent alias 'mine' already exists in this scope")
    assert "stays" in (await ask("/cleanup", agent_name="mine"))["message"]
    assert [(peer["address"], peer["memory_keys"]) for peer in await ask("/query")] == [("h", ["kv"])]
    assert await ask("/cleanup", agent_name="mine") == {"status": "ok", "message": "Cleaned up agent: mine"}
    assert await ask.aliases() == []


async def test_memory_is_found_by_agent_and_name_and_goes_with_the_agent(ask: Caller) -> None:
    """Also of an agent that is not there yet, as NanoCtrl has it, for as long as an agent lives without a heartbeat."""
    large = {"addr": 2**63 - 1, "length": 2**40, "rkey": 2**32 - 1}
    assert await ask("/register_mr", agent_name="a", mr_name="kv", **large) == {"status": "ok"}
    assert await ask("/get_mr_info", src="b", dst="a", mr_name="kv") == {"mr_info": {**large, "lkey": 0}}
    assert await ask("/get_mr_info", src="b", dst="a", mr_name="other") == {"mr_info": None}
    assert await ask("/get_mr_info", src="b", dst="nobody", mr_name="kv") == {"mr_info": None}
    await ask("/register_mr", agent_name="a", mr_name="kv", addr=1, length=2, rkey=3, lkey=4)
    said = await ask("/get_mr_info", src="b", dst="a", mr_name="kv")
    assert said == {"mr_info": {"addr": 1, "length": 2, "rkey": 3, "lkey": 4}}
    await ask("/cleanup", agent_name="a")
    assert await ask("/get_mr_info", src="b", dst="a", mr_name="kv") == {"mr_info": None}


async def test_a_desired_topology_is_kept_and_a_symmetric_one_reaches_its_targets(ask: Caller) -> None:
    """Whether they are there or not; nobody stays named by an agent that is gone."""

    async def targets(alias: str) -> list[str]:
        answer = await ask.http.get("/v1/peers/topology", params={"scope": ask.scope, "alias": alias})
        found: list[str] = answer.json()["target_peers"]
        return found

    assert await ask("/v1/desired_topology/b", target_peers=["x"]) == {"status": "ok"}
    await ask("/v1/desired_topology/a", target_peers=["b", "c"], symmetric=True, min_bw="100Gbps")
    assert (await targets("a"), await targets("b"), await targets("c")) == (["b", "c"], ["x", "a"], ["a"])
    await ask("/cleanup", agent_name="a")
    assert (await targets("a"), await targets("b"), await targets("c")) == ([], ["x"], [])


async def test_an_alias_with_a_slash_has_a_topology_as_any_other(ask: Caller) -> None:
    """It comes encoded in the path, as NanoCtrl's clients send it."""
    assert await ask("/v1/desired_topology/rack-1%2Fa", target_peers=["b"]) == {"status": "ok"}
    answer = await ask.http.get("/v1/peers/topology", params={"scope": ask.scope, "alias": "rack-1/a"})
    assert answer.json()["target_peers"] == ["b"]


async def test_more_of_a_peer_than_is_kept_is_too_large_and_not_to_be_tried_again(ask: Caller) -> None:
    said = await ask("/start_peer_agent", 413, address="h", alias="a", resource={"nics": "x" * 600_000})
    assert (said["code"], said["field"]) == ("too_large", "resource")


async def test_a_peer_of_a_peer_agent_is_listed_and_not_for_others_to_drop(mesh: RunningMesh, ask: Caller) -> None:
    """It has an instance, which NanoCtrl's bodies cannot show."""
    bus = await mesh.bus(Role.NODE)
    peer = await bus.ask(peers.REGISTER, PeerRegister(scope=ask.scope, alias="p", instance="i1", node_id="n1"))
    assert isinstance(peer, Peer)
    assert await ask.aliases() == ["p"]
    assert (await ask("/cleanup", 409, agent_name="p"))["code"] == "not_yours"
    memory = {"agent_name": "p", "mr_name": "kv", "addr": 1, "length": 2, "rkey": 3}
    assert (await ask("/register_mr", 409, **memory))["code"] == "not_yours"
    assert (await ask("/start_peer_agent", 409, address="h", alias="p"))["code"] == "alias_taken"
    other = await bus.ask(peers.UNREGISTER, PeerUnregister(scope=ask.scope, alias="p", instance="i2"))
    assert isinstance(other, Refused)
    assert await ask.aliases() == ["p"]


# --- the rest --------------------------------------------------------------------------------------------------------


async def test_the_bus_is_where_redis_was(mesh: RunningMesh, ask: Caller) -> None:
    """Without the login: who is told this is anybody."""
    address = (await ask("/get_redis_address"))["redis_address"]
    assert mesh.supervisor.server is not None
    assert address == f"nats://127.0.0.1:{mesh.supervisor.server.port}"
    assert (await ask("/start_peer_agent", address="127.0.0.1"))["redis_address"] == address


async def test_other_machines_are_told_the_public_address(tmp_path: Path) -> None:
    """Those on this one, which call by loopback, the local one."""
    told = {"REDIS_PUBLIC_ADDRESS": "bus.example:4222"}
    far, near = ("10.0.0.9:1", "10.0.0.9", "gpu-box"), ("127.0.0.1:1", "localhost", "[::1]:1", "::1")
    async with (
        running_mesh(tmp_path, ["control-plane"], environment=told) as mesh,
        httpx.AsyncClient(base_url=mesh.http("control-plane")) as http,
    ):
        ask = Caller(http, "s")
        assert (await ask("/get_redis_address"))["redis_address"] == "nats://bus.example:4222"
        for address in (*far, *near):
            bus = (await ask("/start_peer_agent", address=address))["redis_address"]
            assert (bus == "nats://bus.example:4222") is (address in far), address


async def test_its_front_door_says_that_it_runs_as_long_as_it_does(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """NanoCtrl says so as well while its Redis is away and nothing works."""
    answer = await http.get("/")
    assert answer.status_code == 200
    assert answer.text.splitlines()[0] == "NanoCtrl Server Running"


async def test_heartbeats_lists_and_questions_leave_no_log_line(mesh: RunningMesh, ask: Caller) -> None:
    """NanoCtrl writes two or three for each request; here a registration has one, and so has what ends it."""

    def about(word: str) -> int:
        return sum(f'"{ask.scope}"' in line and word in line for line in mesh.lines)

    await ask("/register_engine", engine_id="e", **ENGINE)
    before = len(mesh.lines)
    for _ in range(20):
        await ask("/heartbeat_engine", engine_id="e")
        await ask("/list_engines")
        await ask("/get_engine_info", engine_id="e")
    await ask("/unregister_engine", engine_id="e")
    await until(lambda: about('"unregistered"') == 1, what="the line about the end")
    assert about('"registered"') == 1
    assert len(mesh.lines) - before <= 2


async def test_a_registration_that_says_nothing_new_leaves_no_log_line(mesh: RunningMesh, ask: Caller) -> None:
    """Some programs register where others send a heartbeat."""

    def lines(word: str) -> int:
        return sum(f'"{ask.scope}"' in line and word in line for line in mesh.lines)

    for _ in range(5):
        await ask("/register_engine", engine_id="e", **ENGINE)
    await ask("/register_engine", engine_id="e", **{**ENGINE, "num_blocks": ENGINE["num_blocks"] + 1})
    await ask("/unregister_engine", engine_id="e")
    await until(lambda: lines('"unregistered"') == 1, what="the line about the end")
    assert lines('"registered"') == 2


async def test_what_came_by_one_door_is_found_by_the_other(mesh: RunningMesh, ask: Caller) -> None:
    await ask("/register_engine", engine_id="e", **ENGINE)
    bus = await mesh.bus()
    found = await bus.ask(engines.GET, EngineGet(scope=ask.scope, engine_id="e"))
    assert isinstance(found, Engine)
    assert (found.kind, found.zmq_address) == ("prefill", "tcp://10.0.0.2:6001")


# --- its own client --------------------------------------------------------------------------------------------------


async def test_the_published_client_registers_beats_finds_lists_and_stops(mesh: RunningMesh, ask: Caller) -> None:
    """`nanoctrl` 0.0.5 as it is on PyPI; its heartbeat thread notices that it was forgotten, and registers again."""
    nanoctrl = pytest.importorskip("nanoctrl", reason="published for Linux on x86_64 alone")
    address = mesh.http("control-plane").removeprefix("http://")
    client = nanoctrl.NanoCtrlClient(address, ask.scope)
    lost = threading.Event()

    def again() -> None:
        assert client.register("prefill-0", ENGINE)
        lost.set()

    def lives() -> None:
        client.check_connection()
        assert client.heartbeat() == "error"
        assert client.register("prefill-0", ENGINE)
        assert client.heartbeat() == "ok"
        assert client.get_engine_info("prefill-0")["zmq_address"] == "tcp://10.0.0.2:6001"
        assert client.get_engine_info("nobody") is None
        assert [engine["id"] for engine in client.list_engines()] == ["prefill-0"]
        assert "nats://127.0.0.1" in client.get_redis_url()
        client.start_heartbeat(interval=0.05, on_not_found=again)

    def ends() -> None:
        client.stop()
        client.stop()

    await asyncio.to_thread(lives)
    await ask("/unregister_engine", engine_id="prefill-0")
    await until(lost.is_set, what="the heartbeat thread registers again")
    assert await ask.names() == ["prefill-0"]
    await asyncio.to_thread(ends)
    assert (await ask.names(), client.heartbeat()) == ([], "not_found")


async def test_the_published_client_starts_finds_and_cleans_up_peers(mesh: RunningMesh, ask: Caller) -> None:
    nanoctrl = pytest.importorskip("nanoctrl", reason="published for Linux on x86_64 alone")
    client = nanoctrl.NanoCtrlClient(mesh.http("control-plane"), ask.scope)
    facts = {"device": "mlx5_0", "ib_port": 1, "link_type": "RoCE", "address": "127.0.0.1", "name_prefix": "agent"}

    def lives() -> None:
        first = client.register_peer(alias=None, **facts)
        client.register_peer(alias="b", **facts)
        with pytest.raises(httpx.HTTPStatusError, match="409"):
            client.register_peer(alias="b", **facts)
        assert first["name"] == "agent-1"
        assert first["redis_address"].startswith("nats://")
        assert client.heartbeat_peer("agent-1")["status"] == "ok"
        assert client.set_desired_topology("agent-1", target_peers=["b"], min_bw="1Gbps", symmetric=True) == {
            "status": "ok"
        }
        assert [peer["name"] for peer in client.query_peers()] == ["agent-1", "b"]
        assert client.cleanup_peer("agent-1")["message"] == "Cleaned up agent: agent-1"
        assert [peer["name"] for peer in client.query_peers()] == ["b"]

    await asyncio.to_thread(lives)


# --- beyond loopback -------------------------------------------------------------------------------------------------


async def test_beyond_loopback_its_paths_demand_the_token_of_the_mesh(tmp_path: Path) -> None:
    """NanoCtrl listens to everybody and knows no token. Ours refuses in NanoCtrl's shape."""
    async with running_mesh(tmp_path, ["control-plane"], environment={"COMPUTEMESH_HTTP_HOST": "0.0.0.0"}) as mesh:
        port = mesh.http("control-plane").rpartition(":")[2]
        async with httpx.AsyncClient(base_url=f"http://{socket.gethostbyname('localhost')}:{port}") as http:
            answer = await http.post("/list_engines", json={})
            assert (answer.status_code, answer.json()["status"], answer.json()["code"]) == (401, "error", "no_token")
            wrong = await http.post("/list_engines", json={}, headers={"authorization": "Bearer nonsense"})
            assert (wrong.status_code, wrong.json()["code"]) == (403, "bad_token")
            token = {"authorization": f"Bearer {mesh.credentials.token}"}
            assert (await http.post("/list_engines", json={}, headers=token)).json()["status"] == "ok"
            assert (await http.get("/")).status_code == 401
