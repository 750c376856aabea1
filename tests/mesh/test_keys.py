"""API keys on a mesh: made on the command line's subjects, known to every gateway within a moment, and kept through
whatever is killed.

Goal: who has no key gets nothing, who has one gets what its limits allow, and nobody is locked out because a service is
away. Method: registries and gateways as processes, requests as any program sends them, keys as the command line makes
them. The engine is of the test.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import httpx
import openai
import pytest
import pytest_asyncio

from computemesh.bus import Bucket, BusError, TimedOut
from computemesh.contracts import keys, storage
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.keys import KeyCreate, KeyList, KeyRecord, KeyRevoke, KeyRevoked, KeysList
from computemesh.testing import RunningMesh, running_mesh, until
from tests.mesh.engine_node import EngineNode

pytestmark = pytest.mark.asyncio(loop_scope="module")

GATEWAYS: Final = ("gateway", "gateway-2")
CHAT: Final = "/v1/chat/completions"
MODEL: Final = "tiny"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[RunningMesh]:
    """Two registries and two gateways."""
    services, copies = ("node-registry", "gateway"), {"node-registry": 2, "gateway": 2}
    async with running_mesh(tmp_path_factory.mktemp("keys"), services, copies=copies) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def engine(mesh: RunningMesh) -> AsyncGenerator[EngineNode]:
    """What answers, known to both gateways."""
    node = EngineNode(await mesh.bus(Role.NODE, "engine"), "engine", [MODEL, "other"])
    await node.join()
    for name in GATEWAYS:
        async with asyncio.timeout(30):
            while not (await models(mesh, name, mesh.credentials.token)).json()["data"]:
                await asyncio.sleep(0.02)
    yield node
    await node.leave()


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def no_keys_are_left(mesh: RunningMesh) -> AsyncGenerator[None]:
    """Each test begins with an open door."""
    yield
    bus = await mesh.bus(Role.SERVICES)
    found = await bus.ask(keys.LIST, KeysList())
    assert isinstance(found, KeyList)
    for record in found.keys:
        await bus.ask(keys.REVOKE, KeyRevoke(name=record.name))
    for name in GATEWAYS:
        await answers(mesh, name, "", 200)


async def created(mesh: RunningMesh, name: str, **limits: Any) -> str:
    """A new key."""
    key = keys.new_key()
    bus = await mesh.bus(Role.SERVICES)
    answer = await bus.ask(keys.CREATE, KeyCreate(name=name, digest=keys.digest(key), **limits))
    assert isinstance(answer, KeyRecord), answer
    return key


async def revoked(mesh: RunningMesh, name: str) -> KeyRevoked:
    answer = await (await mesh.bus(Role.SERVICES)).ask(keys.REVOKE, KeyRevoke(name=name))
    assert isinstance(answer, KeyRevoked), answer
    return answer


async def asked(mesh: RunningMesh, key: str, gateway: str = "gateway", **body: Any) -> httpx.Response:
    """The answer to a question that is shown with a key; none when it is empty."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4, **body}
    async with httpx.AsyncClient(base_url=mesh.http(gateway), timeout=30) as client:
        return await client.post(CHAT, json=body, headers=headers)


async def models(mesh: RunningMesh, gateway: str, key: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=mesh.http(gateway), timeout=30) as client:
        return await client.get("/v1/models", headers=headers)


async def answers(mesh: RunningMesh, gateway: str, key: str, status: int) -> None:
    """Waits until a gateway answers a key so."""
    async with asyncio.timeout(30):
        while (await models(mesh, gateway, key)).status_code != status:
            await asyncio.sleep(0.02)


def error(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error, which must be in OpenAI's shape."""
    said: dict[str, Any] = answer.json()["error"]
    assert (answer.status_code, said["code"]) == (status, code), said
    assert set(said) == {"message", "type", "param", "code"}
    return said


# --- who comes in ------------------------------------------------------------------------------------------------


async def test_the_first_key_closes_every_gateway_and_the_last_one_opens_them(mesh: RunningMesh) -> None:
    """Within a moment of being created or revoked; the mesh's token opens always."""
    assert (await asked(mesh, "")).status_code == 200
    key = await created(mesh, "alice")
    for name in GATEWAYS:
        await answers(mesh, name, "", 401)
        assert (await asked(mesh, key, name)).status_code == 200
        assert (await asked(mesh, mesh.credentials.token, name)).status_code == 200
        error(await asked(mesh, "sk-cm-wrong", name), 401, "invalid_api_key")
    second = await created(mesh, "bob")
    assert (await revoked(mesh, "alice")).left == 1
    for name in GATEWAYS:
        await answers(mesh, name, key, 401)
        await answers(mesh, name, second, 200)
    assert (await revoked(mesh, "bob")).left == 0
    for name in GATEWAYS:
        await answers(mesh, name, "", 200)


async def test_all_of_the_interface_needs_the_key_and_nothing_else_does(mesh: RunningMesh) -> None:
    """Every path below /v1/; tasks, workers and health stay as they were."""
    await created(mesh, "alice")
    await answers(mesh, "gateway", "", 401)
    async with httpx.AsyncClient(base_url=mesh.http("gateway")) as client:
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", f"/v1/models/{MODEL}"),
            ("POST", CHAT),
            ("POST", "/v1/completions"),
            ("POST", "/v1/embeddings"),
        ):
            answer = await client.request(method, path, json={} if method == "POST" else None)
            error(answer, 401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/healthz", "/workers", "/metrics"):
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/healthz")).json()["keys"] == 1


async def test_the_official_client_understands_what_keys_are_refused(mesh: RunningMesh) -> None:
    """By its own exceptions; and how long to wait."""
    key = await created(mesh, "alice", requests_per_minute=2, models=[MODEL])
    await answers(mesh, "gateway", "", 401)
    base_url = f"{mesh.http('gateway')}/v1"

    async def ask(client: openai.AsyncOpenAI, model: str = MODEL) -> Any:
        return await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hello?"}], max_tokens=4
        )

    async with (
        openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client,
        openai.AsyncOpenAI(base_url=base_url, api_key="wrong", max_retries=0) as stranger,
    ):
        with pytest.raises(openai.AuthenticationError):
            await ask(stranger)
        with pytest.raises(openai.PermissionDeniedError) as refused:
            await ask(client, "other")
        assert refused.value.param == "model"
        assert [model.id async for model in client.models.list()] == [MODEL]
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")
        for _ in range(2):
            assert (await ask(client)).choices[0].message.content
        with pytest.raises(openai.RateLimitError) as limited:
            await ask(client)
        assert limited.value.code == "rate_limit_exceeded"
        assert 1 <= int(limited.value.response.headers["retry-after"]) <= 30
        assert limited.value.response.headers["x-ratelimit-remaining-requests"] == "0"


async def test_a_key_pays_for_the_tokens_that_its_engine_counted(mesh: RunningMesh) -> None:
    """Whole or streamed, whether or not the client asked for the usage; nothing for what was refused."""
    per_minute = 3000
    key = await created(mesh, "alice", tokens_per_minute=per_minute)
    await answers(mesh, "gateway", "", 401)

    async def left(**body: Any) -> int:
        """Before a request: what is told has its estimate taken, of which two are for the six characters."""
        answer = await asked(mesh, key, **body)
        return int(answer.headers["x-ratelimit-remaining-tokens"]) + 2 + int(body["max_tokens"])

    began_s = time.monotonic()
    before = await left(max_tokens=1000)
    assert before == per_minute
    between = await left(max_tokens=500, stream=True)
    error(await asked(mesh, key, model="none"), 404, "model_not_found")
    after = await left(max_tokens=1)
    came_back = (time.monotonic() - began_s) * per_minute / 60 + 1
    assert before - 1007 <= between <= before - 1007 + came_back
    assert between - 507 <= after <= between - 507 + came_back


async def test_requests_at_the_same_time_are_limited_until_they_end(mesh: RunningMesh, engine: EngineNode) -> None:
    """A client that goes away makes room."""
    key = await created(mesh, "alice", concurrent=1)
    await answers(mesh, "gateway", "", 401)
    engine.stops_at = 1
    engine.go.clear()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "?"}], "max_tokens": 5, "stream": True}
    headers = {"authorization": f"Bearer {key}"}
    async with (
        httpx.AsyncClient(base_url=mesh.http("gateway"), timeout=30) as client,
        client.stream("POST", CHAT, json=body, headers=headers) as stream,
    ):
        await anext(stream.aiter_bytes())
        error(await asked(mesh, key), 429, "rate_limit_exceeded")
    engine.go.set()
    await answers(mesh, "gateway", key, 200)


async def test_a_key_that_has_expired_opens_nothing(mesh: RunningMesh) -> None:
    """From that moment on, without anybody doing anything."""
    key = await created(mesh, "alice", expires_at=time.time() + 2.0)
    await answers(mesh, "gateway", "", 401)
    assert (await asked(mesh, key)).status_code == 200
    await answers(mesh, "gateway", key, 401)
    assert "expired" in error(await asked(mesh, key), 401, "invalid_api_key")["message"]


# --- what is away ------------------------------------------------------------------------------------------------


async def test_known_keys_are_served_while_the_registries_are_away_and_strangers_are_not(mesh: RunningMesh) -> None:
    """And what was revoked meanwhile is noticed once they are back."""
    key = await created(mesh, "alice")
    await answers(mesh, "gateway", key, 200)
    await answers(mesh, "gateway", "", 401)
    registries = [service.name for service in mesh.supervisor.services if service.spec.name == "node-registry"]
    for name in registries:
        mesh.kill(name, signal.SIGSTOP)
    try:
        assert (await asked(mesh, key)).status_code == 200
        assert (await asked(mesh, "")).status_code == 401
    finally:
        for name in registries:
            mesh.kill(name, signal.SIGCONT)


async def test_a_gateway_that_begins_without_the_registries_is_not_open(mesh: RunningMesh) -> None:
    """It says that it does not know yet, and lets the mesh's token in."""
    await created(mesh, "alice")
    await answers(mesh, "gateway-2", "", 401)
    registries = [service.name for service in mesh.supervisor.services if service.spec.name == "node-registry"]
    for name in registries:
        mesh.kill(name, signal.SIGSTOP)
    try:
        old = mesh.pid("gateway-2")
        mesh.kill("gateway-2")
        await until(lambda: mesh.pid("gateway-2") not in (0, old), what="the gateway's next life")
        await until(lambda: mesh.service("gateway-2").status.state == "ready", what="it to be ready")
        error(await asked(mesh, "", "gateway-2"), 503, "unavailable")
        assert (await models(mesh, "gateway-2", mesh.credentials.token)).status_code == 200
    finally:
        for name in registries:
            mesh.kill(name, signal.SIGCONT)
    await answers(mesh, "gateway-2", "", 401)


# --- what is stored ----------------------------------------------------------------------------------------------


async def test_a_key_is_neither_stored_nor_listed_and_only_operators_make_one(mesh: RunningMesh) -> None:
    """Its digest is; the store's owner is the registry."""
    key = await created(mesh, "alice", models=[MODEL])
    services, client = await mesh.bus(Role.SERVICES), await mesh.bus(Role.CLIENT)
    entry = await Bucket(services, storage.KEYS).get("alice")
    assert entry is not None
    assert entry.value.digest == keys.digest(key)
    found = await client.ask(keys.LIST, KeysList())
    assert isinstance(found, KeyList)
    assert found.keys == [entry.value]
    assert key not in "".join(mesh.lines)
    with pytest.raises(TimedOut):  # The server takes it from no client.
        await client.ask(keys.CREATE, KeyCreate(name="x", digest="0" * 64), timeout_s=1.0)
    with pytest.raises(TimedOut):
        await client.ask(keys.REVOKE, KeyRevoke(name="alice"), timeout_s=1.0)
    assert isinstance(await client.ask(keys.LIST, KeysList()), KeyList)


async def test_names_and_keys_are_taken_once_and_a_repeated_question_is_answered_again(mesh: RunningMesh) -> None:
    """The answer to the first may have been lost; another question of that name is another key."""
    bus = await mesh.bus(Role.SERVICES)
    ask = KeyCreate(name="alice", digest="a" * 64, requests_per_minute=5)
    first = await bus.ask(keys.CREATE, ask)
    assert isinstance(first, KeyRecord)
    assert await bus.ask(keys.CREATE, ask) == first
    for other, field in (
        (KeyCreate(name="alice", digest="b" * 64, requests_per_minute=5), "name"),
        (KeyCreate(name="alice", digest="a" * 64), "name"),
        (KeyCreate(name="bob", digest="a" * 64), "name"),
    ):
        refused = await until_refused(mesh, other)
        assert (refused.code, refused.status, refused.field) == ("exists", 409, field)
    refused = await until_refused(mesh, KeyCreate(name="bob", digest="A" * 64))
    assert (refused.code, refused.field) == ("bad_digest", "digest")
    unknown = await bus.ask(keys.REVOKE, KeyRevoke(name="nobody"))
    assert isinstance(unknown, Refused)
    assert (unknown.code, unknown.status, unknown.field) == ("not_found", 404, "name")


async def until_refused(mesh: RunningMesh, ask: KeyCreate) -> Refused:
    """The refusal, also of a replica that learns a moment later what another stored."""
    bus = await mesh.bus(Role.SERVICES)
    answer = await bus.ask(keys.CREATE, ask)
    assert isinstance(answer, Refused), answer
    return answer


async def test_keys_outlive_the_server_and_the_registries(mesh: RunningMesh) -> None:
    """They are in the store; page by page they are the same again."""
    names = sorted(f"k{number:02}" for number in range(25))
    made = {name: await created(mesh, name, requests_per_minute=number + 1) for number, name in enumerate(names)}
    mesh.kill("nats-server")
    for service in mesh.supervisor.services:
        if service.spec.name == "node-registry":
            mesh.kill(service.name)
    for name in GATEWAYS:
        await answers(mesh, name, "sk-cm-wrong", 401)
    found: list[KeyRecord] = []
    after = ""
    async with asyncio.timeout(30):
        while True:
            try:
                page = await (await mesh.bus(Role.CLIENT)).ask(keys.LIST, KeysList(limit=10, after=after))
            except BusError:
                await asyncio.sleep(0.1)
                continue
            assert isinstance(page, KeyList)
            found += page.keys
            after = page.next
            if not after:
                break
    assert [record.name for record in found] == names
    assert [record.digest for record in found] == [keys.digest(made[name]) for name in names]
    await answers(mesh, "gateway", made["k24"], 200)


async def test_the_page_that_follows_begins_where_the_one_before_ended(mesh: RunningMesh, tmp_path: Path) -> None:
    """However large the keys are."""
    from computemesh_services.node_registry.keys import page

    records = [
        KeyRecord(name=f"n{number:03}", digest="0" * 64, created_at=1.0, models=["m" * 100] * (number % 7))
        for number in range(100)
    ]
    for bytes_max in (1, 2000, 10_000_000):
        seen: list[str] = []
        ask = KeysList(limit=40)
        while True:
            answer = page(records[::-1], ask, bytes_max=bytes_max)
            assert answer.count == 100
            assert 1 <= len(answer.keys) <= 40
            seen += [record.name for record in answer.keys]
            if not answer.next:
                break
            ask = KeysList(limit=40, after=answer.next)
        assert seen == [record.name for record in records]
