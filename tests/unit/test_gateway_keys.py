"""Keys at the gateway's door: whose they are, what each may ask, and what becomes of one that changes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from starlette.requests import Request

from computemesh import openai
from computemesh.bus import Bus, Where
from computemesh.contracts import keys
from computemesh.contracts.base import Role
from computemesh.contracts.keys import KeyRecord
from computemesh.openai import Question, Usage
from computemesh_services.gateway.admission import Anyone, Denied, Permit
from computemesh_services.gateway.config import GatewayConfig
from computemesh_services.gateway.keys import Doorkeeper, KeyHolder, KeyRing
from computemesh_services.gateway.limits import Over

TOKEN = "the-token-of-the-mesh"


def record(name: str, key: str = "", **limits: Any) -> KeyRecord:
    return KeyRecord(name=name, digest=keys.digest(key or f"key of {name}"), created_at=1.0, **limits)


def question(model: str = "m", chars: int = 400, tokens_max: int | None = 100) -> Question:
    body = {"messages": [{"role": "user", "content": "x" * chars}]}
    return Question(
        path="/v1/chat/completions", model=model, body=body, stream=False, include_usage=False, tokens_max=tokens_max
    )


def holder(ring: KeyRing, of: KeyRecord, now_s: float = 0.0) -> KeyHolder:
    return KeyHolder(of, ring.meter(of, now_s), lambda: now_s)


def permitted(holder: KeyHolder, asked: Question) -> Permit:
    told = holder.admit(asked)
    assert not isinstance(told, Denied), told
    return told


def denied(holder: KeyHolder, asked: Question) -> Denied:
    told = holder.admit(asked)
    assert isinstance(told, Denied), told
    return told


def left(holder: KeyHolder) -> int:
    """Tokens that a key has left, by what the next request is told. That one costs nothing."""
    permit = permitted(holder, question(chars=0, tokens_max=0))
    permit.end(None, answered=False)
    return int(permit.headers["x-ratelimit-remaining-tokens"])


# --- keys --------------------------------------------------------------------------------------------------------


def test_a_key_is_found_by_what_it_is_and_never_by_its_digest() -> None:
    """Whoever read the store, or the list, has nothing that opens a door."""
    ring = KeyRing()
    ring.replace([record("a"), record("b")])
    found = ring.find("key of b")
    assert found is not None
    assert found.name == "b"
    for shown in ("", "a", "key of c", record("a").digest):
        assert ring.find(shown) is None


def test_keys_are_random_and_recognisable() -> None:
    """256 bits, with a beginning that programs which look for secrets know; the digest is that of SHA-256."""
    made = {keys.new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("sk-cm-") and len(key) == 6 + 43 for key in made)
    assert all(keys.is_digest(keys.digest(key)) for key in made)
    assert keys.digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert not any(keys.is_digest(text) for text in ("", "x" * 64, "A" * 64, "a" * 63, "a" * 65, "a" * 63 + "\n"))


@pytest.mark.parametrize(
    ("prompt", "n", "answers"),
    [
        (["a"] * 40, 2, 80),
        ("aaaa", 3, 3),
        ([[1], [2]], 1, 2),
        ([1, 2, 3], 2, 2),
        (["a", 7], 1, 1),
        ("a", 1, 1),
    ],
)
@pytest.mark.parametrize("usage", [Usage(prompt_tokens=1, completion_tokens=1), None])
def test_a_key_pays_for_every_answer_it_asks_for(usage: Usage | None, prompt: Any, n: int, answers: int) -> None:
    """An engine counts one of them; more than a minute's worth is owed. Of one answer its count holds."""
    body = {"model": "m", "prompt": prompt, "max_tokens": 8, "n": n}
    asked = openai.read("/v1/completions", msgspec.json.encode(body))
    assert isinstance(asked, Question)
    assert asked.answers == answers
    mine = record("a", tokens_per_minute=60)
    meter = KeyRing().meter(mine, 0.0)
    permit = permitted(KeyHolder(mine, meter, lambda: 0.0), asked)
    permit.end(usage, answered=True)
    several = -(-openai.prompt_chars(asked) // 4) + 8 * answers
    spent = several if answers > 1 or usage is None else 2
    over = meter.admit(60, 0.0)
    assert isinstance(over, Over)
    assert over.wait_s == pytest.approx(spent)


def test_a_key_keeps_what_it_has_spent_until_it_changes() -> None:
    """The list is read every few seconds, and other keys come and go."""
    ring = KeyRing()
    mine = record("a", requests_per_minute=1)
    ring.replace([mine])
    permitted(holder(ring, mine), question())
    ring.replace([mine, record("b")])
    denied(holder(ring, mine), question())
    ring.replace([record("b")])
    assert ring.find("key of a") is None
    ring.replace([mine])
    permitted(holder(ring, mine), question())
    anew = record("a", requests_per_minute=2)
    ring.replace([anew])
    for _ in range(2):
        permitted(holder(ring, anew), question())
    denied(holder(ring, anew), question())


def test_a_key_for_some_models_sees_no_others() -> None:
    """In lists, and when it asks; the refusal names the field."""
    ring = KeyRing()
    mine, all_models = holder(ring, record("a", models=["m", "n"])), holder(ring, record("b"))
    assert [model for model in ("m", "n", "o") if mine.sees(model)] == ["m", "n"]
    assert all_models.sees("o")
    refused = denied(mine, question("o")).refused
    assert (refused.code, refused.status, refused.field, refused.retry) == ("model_not_allowed", 403, "model", "never")
    assert permitted(mine, question("n")).key == "a"


def test_a_limit_that_is_reached_is_told_with_when_to_ask_again() -> None:
    """429, how long to wait, and what is left in OpenAI's headers, of requests that are let in too."""
    ring = KeyRing()
    mine = holder(ring, record("a", requests_per_minute=2, tokens_per_minute=1000))
    assert permitted(mine, question()).headers["x-ratelimit-remaining-requests"] == "1"
    assert permitted(mine, question()).headers["x-ratelimit-remaining-tokens"] == "600"
    told = denied(mine, question())
    assert (told.refused.code, told.refused.status, told.refused.retry) == ("rate_limit_exceeded", 429, "later")
    assert told.refused.retry_after_s == 30.0
    assert told.headers["x-ratelimit-remaining-requests"] == "0"


@pytest.mark.parametrize(
    ("usage", "answered", "spent"),
    [
        (Usage(prompt_tokens=30, completion_tokens=12), True, 42),
        (None, True, 200),
        (None, False, 0),
        (Usage(prompt_tokens=300, completion_tokens=300), True, 600),
    ],
    ids=["the engine's count", "no count: the estimate", "refused: nothing", "more than was estimated"],
)
def test_a_key_pays_for_what_its_request_used(usage: Usage | None, answered: bool, spent: int) -> None:
    """400 characters and a bound of 100 tokens are estimated at 200 until then."""
    mine = holder(KeyRing(), record("a", tokens_per_minute=1000))
    permit = permitted(mine, question())
    assert permit.headers["x-ratelimit-remaining-tokens"] == "800"
    permit.end(usage, answered=answered)
    assert left(mine) == 1000 - spent


def test_requests_at_the_same_time_are_counted_until_they_end() -> None:
    """However they end."""
    mine = holder(KeyRing(), record("a", concurrent=2))
    first, _second = permitted(mine, question()), permitted(mine, question())
    assert denied(mine, question()).refused.retry_after_s == 1.0
    first.end(None, answered=False)
    permitted(mine, question())
    denied(mine, question())


# --- the door ----------------------------------------------------------------------------------------------------


def doorkeeper(*records: KeyRecord, known: bool = True, **config: Any) -> Doorkeeper:
    """One that was told of these keys; nothing is asked on its bus."""
    bus = Bus(Where(url="nats://127.0.0.1:1", role=Role.CLIENT, name="test"))
    door = Doorkeeper(bus, GatewayConfig(token=TOKEN, **config))
    if known:
        door.learn(records)
    return door


def showing(**headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "GET", "path": "/v1/models", "headers": raw, "query_string": b""})


async def test_without_keys_loopback_is_open_and_other_addresses_are_not() -> None:
    """Nor loopback where a token is demanded there. Programs that show any key all the same are let in."""
    for request in (showing(), showing(authorization="Bearer none")):
        assert isinstance(await doorkeeper().enter(request), Anyone)
        for door in (doorkeeper(http_host="10.0.0.1"), doorkeeper(orchestrator_token="t")):
            told = await door.enter(request)
            assert isinstance(told, Denied)
            assert told.refused.status == 401
    assert isinstance(await doorkeeper(orchestrator_token="t").enter(showing(authorization="Bearer t")), Anyone)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic key of a"},
        {"authorization": "key of a"},
        {"x_api_key": "wrong"},
        {"authorization": "Bearer key of old"},
        {"authorization": f"Bearer {record('a').digest}"},
    ],
)
async def test_with_a_key_nobody_comes_in_who_shows_none_that_is_known(headers: dict[str, str]) -> None:
    """401, with a reason; also for one that has expired."""
    told = await doorkeeper(record("a"), record("old", expires_at=5.0)).enter(showing(**headers))
    assert isinstance(told, Denied)
    assert told.refused.status == 401
    assert told.refused.code in ("no_token", "bad_token")
    assert "key of" not in told.refused.reason


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer key of a"},
        {"authorization": "bearer  key of a "},
        {"x_api_key": "key of a"},
        {"authorization": "Bearer none", "x_api_key": "key of a"},
    ],
)
async def test_a_key_may_be_shown_in_either_header(headers: dict[str, str]) -> None:
    """Also beside a made-up one, which many clients insist on sending."""
    caller = await doorkeeper(record("a", models=["m"])).enter(showing(**headers))
    assert isinstance(caller, KeyHolder)
    assert not caller.sees("n")


async def test_the_token_of_the_mesh_is_a_key_without_limits() -> None:
    """Also before any key is known, so that an operator is never locked out."""
    for door in (doorkeeper(record("a", models=["m"])), doorkeeper(known=False)):
        for headers in ({"authorization": f"Bearer {TOKEN}"}, {"x_api_key": TOKEN}):
            assert isinstance(await door.enter(showing(**headers)), Anyone)


async def test_before_the_keys_are_known_nobody_else_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that begins while the registry is away must not be open for that."""
    monkeypatch.setattr("computemesh_services.gateway.keys.KNOWN_S", 0.01)
    for headers in ({}, {"authorization": "Bearer key of a"}):
        told = await doorkeeper(known=False).enter(showing(**headers))
        assert isinstance(told, Denied)
        assert (told.refused.code, told.refused.status, told.refused.retry) == ("unavailable", 503, "later")
