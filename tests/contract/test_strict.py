"""Fields that no contract declares: ignored in production, refused in tests.

A newer peer may say more than we know, so production must go on; in a test it is a misspelt field or a contract that
was not declared. Which of the two a process does is fixed when it starts, so the lenient half runs in processes of its
own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import nats
import pytest

from computemesh.contracts import nodes
from computemesh.contracts.base import STRICT, Refused, Role, convert, decode
from computemesh.contracts.nodes import NodeAnnouncement, NodeRecord
from computemesh.contracts.permissions import inbox_prefix
from computemesh.testing import running_mesh
from computemesh.testing.golden import file_name, payload_types

# pyright: reportUnknownMemberType=false

GOLDEN: Final = Path(__file__).parent / "golden"
MORE: Final[dict[str, Any]] = {"a_field_of_tomorrow": {"x": [1, {}]}}
ANNOUNCEMENT: Final[dict[str, Any]] = {"node_id": "n9", "gpus": [{"name": "card", **MORE}], **MORE}

every_kind = pytest.mark.parametrize("kind", payload_types(), ids=lambda kind: kind.__name__)


def golden(kind: type[Any]) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode((GOLDEN / file_name(kind)).read_bytes())
    return found


# --- in tests -------------------------------------------------------------------------------------------------------


def test_tests_are_strict() -> None:
    """Else every other test would let a misspelt field pass."""
    assert STRICT


@every_kind
def test_in_tests_an_unknown_field_is_refused_by_name(kind: type[Any]) -> None:
    """From bytes, and from values that were parsed before."""
    for answer in (decode(msgspec.json.encode(golden(kind) | MORE), kind), convert(golden(kind) | MORE, kind)):
        assert isinstance(answer, Refused)
        assert (answer.code, answer.field) == ("bad_message", "a_field_of_tomorrow")


def test_in_tests_an_unknown_field_inside_another_is_refused_by_its_path() -> None:
    """A part of a message is no more lenient than the whole."""
    answer = decode(json.dumps({"node_id": "n9", "gpus": [{"name": "card", **MORE}]}).encode(), NodeAnnouncement)
    assert isinstance(answer, Refused)
    assert answer.field == "gpus[0].a_field_of_tomorrow"


async def test_services_under_test_refuse_an_unknown_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP and on the bus, also where the testing program itself is lenient."""
    monkeypatch.delenv("COMPUTEMESH_STRICT")
    async with running_mesh(tmp_path, ("node-registry",)) as mesh:
        async with httpx.AsyncClient(base_url=mesh.http("node-registry")) as http:
            answer = await http.post("/api/v1/nodes/register", json={"node_id": "n9", **MORE})
        assert (answer.status_code, answer.json()["field"]) == (400, "a_field_of_tomorrow")
        connection = await nats.connect(mesh.url(Role.SERVICES), inbox_prefix=inbox_prefix(Role.SERVICES))
        reply = await connection.request(nodes.REGISTER.subject, json.dumps(ANNOUNCEMENT).encode(), timeout=10)
        assert json.loads(reply.data)["code"] == "bad_message"
        await connection.close()


# --- in production --------------------------------------------------------------------------------------------------

LENIENT: Final = """
import sys, msgspec
from pathlib import Path
from computemesh.contracts.base import STRICT, decode, convert
from computemesh.testing.golden import file_name, payload_types

assert not STRICT
for kind in payload_types():
    known = Path(sys.argv[1], file_name(kind)).read_bytes()
    more = msgspec.json.decode(known) | msgspec.json.decode(sys.argv[2])
    message = decode(known, kind)
    assert isinstance(message, kind), message
    assert decode(msgspec.json.encode(more), kind) == message == convert(more, kind)
    print(kind.__name__)
"""


@pytest.mark.parametrize("setting", [None, "", "false", "0"])
def test_in_production_unknown_fields_are_ignored(setting: str | None) -> None:
    """In every payload: a newer peer may say more than we know. That is how it is when nothing is set."""
    environment = {name: value for name, value in os.environ.items() if name != "COMPUTEMESH_STRICT"}
    if setting is not None:
        environment["COMPUTEMESH_STRICT"] = setting
    ran = subprocess.run(
        [sys.executable, "-c", LENIENT, str(GOLDEN), json.dumps(MORE)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [kind.__name__ for kind in payload_types()]


async def test_services_in_production_ignore_an_unknown_field(tmp_path: Path) -> None:
    """Over HTTP and on the bus, at the top and inside; what they know of the message counts."""
    async with running_mesh(tmp_path, ("node-registry",), environment={"COMPUTEMESH_STRICT": ""}) as mesh:
        async with httpx.AsyncClient(base_url=mesh.http("node-registry")) as http:
            answer = await http.post("/api/v1/nodes/register", json=ANNOUNCEMENT)
        assert answer.status_code == 200
        connection = await nats.connect(mesh.url(Role.SERVICES), inbox_prefix=inbox_prefix(Role.SERVICES))
        reply = await connection.request(nodes.REGISTER.subject, json.dumps(ANNOUNCEMENT).encode(), timeout=10)
        await connection.close()
    for data in (answer.content, reply.data):
        record = decode(data, NodeRecord)
        assert isinstance(record, NodeRecord)
        assert [gpu.name for gpu in record.gpus] == ["card"]
