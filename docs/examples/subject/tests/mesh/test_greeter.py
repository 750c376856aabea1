"""The greeter as a process on a real server: on the bus, over HTTP, and who may do what."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest

from computemesh.bus import TimedOut
from computemesh.contracts import greetings
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.greetings import Greet, Greeted, Greeting
from computemesh.testing import RunningMesh, running_mesh, until


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncGenerator[RunningMesh]:
    """A greeter that says two greetings."""
    async with running_mesh(tmp_path, ["greeter"], environment={"COMPUTEMESH_GREETINGS_MAX": "2"}) as running:
        yield running


async def test_a_greeting_is_answered_and_told_until_there_have_been_enough(mesh: RunningMesh) -> None:
    """A client asks, an observer hears of it, and the third is refused with the reason."""
    client, observer = await mesh.bus(Role.CLIENT), await mesh.bus(Role.OBSERVER)
    heard: list[Greeted] = []

    async def on_greeted(fact: Greeted) -> None:
        heard.append(fact)

    await observer.subscribe(greetings.GREETED, on_greeted)
    await observer.flush()
    assert await client.ask(greetings.GREET, Greet(name="Ada")) == Greeting(text="Hello, Ada!", number=1)
    german = Greet(name="Emmy", language="de")
    assert await client.ask(greetings.GREET, german) == Greeting(text="Guten Tag, Emmy!", number=2)
    await until(lambda: heard == [Greeted(name="Ada", number=1), Greeted(name="Emmy", number=2)], what="both events")
    third = await client.ask(greetings.GREET, Greet(name="Alan"))
    assert isinstance(third, Refused)
    assert (third.code, third.reason) == ("tired", "2 of 2 greetings are said")


async def test_http_says_the_same_and_names_the_field_of_a_bad_request(mesh: RunningMesh) -> None:
    """The route, its parameters and its place in the OpenAPI document come from the contract."""
    async with httpx.AsyncClient(base_url=mesh.http("greeter")) as http:
        good = await http.get("/api/v1/greetings/Ada", params={"language": "fr"})
        assert (good.status_code, good.json()) == (200, {"text": "Bonjour, Ada!", "number": 1})
        bad = await http.get("/api/v1/greetings/Ada", params={"language": "tlh"})
        assert (bad.status_code, bad.json()["code"], bad.json()["field"]) == (400, "bad_message", "language")
        document = (await http.get("/openapi.json")).json()
        assert "get" in document["paths"]["/api/v1/greetings/{name}"]


async def test_only_the_roles_of_the_contract_may_ask(mesh: RunningMesh) -> None:
    """A node is not among those who ask, so the server drops its request."""
    node = await mesh.bus(Role.NODE)
    with pytest.raises(TimedOut):
        await node.ask(greetings.GREET, Greet(name="Mallory"), timeout_s=0.5)
