"""One request can be followed through every process, and every process can be measured.

Method: a real mesh with an executor that tells its environment; the logs as the supervisor collects them;
``/metrics`` as Prometheus scrapes it, against the table in docs/observability.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import httpx
import nats
import pytest
from nats.aio.msg import Msg
from prometheus_client.parser import text_string_to_metric_families

from computemesh import trace
from computemesh.cli.services import SERVICES
from computemesh.contracts.base import Role
from computemesh.testing import RunningMesh, running_mesh, until

# pyright: reportUnknownMemberType=false

ALL: Final = tuple(spec.name for spec in SERVICES)
DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "observability.md"
SENDER: Final = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE_ID: Final = SENDER.split("-")[1]

EXECUTOR: Final = """
import os
from computemesh.executors import Executor

class Tell(Executor):
    def run(self, task, out_dir, progress):
        progress("looking")
        return {"variable": os.environ["TRACEPARENT"], "task": task.traceparent}
"""


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncGenerator[RunningMesh]:
    folder = tmp_path / "plugin"
    info = folder / "tell-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "tell_plugin.py").write_text(EXECUTOR)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tell\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[computemesh.executors]\ntell = tell_plugin:Tell\n")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    environment = {"PYTHONPATH": path, "COMPUTEMESH_MODELS": "/nowhere"}
    async with running_mesh(tmp_path, ALL, environment=environment) as running:
        yield running


class Heard:
    """State events of one item, with their headers."""

    def __init__(self) -> None:
        self.final: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.traces: set[str] = set()

    async def on_state(self, msg: Msg) -> None:
        self.traces.add((msg.headers or {}).get("traceparent", ""))
        record = json.loads(msg.data)
        if record["state"] in ("completed", "failed", "dead"):
            self.final.set_result(record)


def lines_about(mesh: RunningMesh, trace_id: str) -> dict[str, set[str]]:
    """The events in the logs that belong to a trace, by service."""
    found: dict[str, set[str]] = {}
    for line in mesh.lines:
        service, _, text = line.partition(" ")
        if trace_id in text:
            found.setdefault(service, set()).add(json.loads(text)["event"])
    return found


async def test_one_trace_leads_from_the_callers_request_to_the_executor(mesh: RunningMesh) -> None:
    """HTTP, the bus, the record, the node's log and the executor's environment have the caller's trace id."""
    nc = await nats.connect(mesh.url(Role.CLIENT))
    heard = Heard()
    await nc.subscribe("compute.work.state.v1.traced", cb=heard.on_state)
    await nc.flush()
    async with httpx.AsyncClient(base_url=mesh.http("work-marshaller")) as http:
        answer = await http.post(
            "/api/v1/work/submit", json={"work_id": "traced", "work_type": "tell"}, headers={"traceparent": SENDER}
        )
    assert answer.status_code == 202, answer.text
    assert answer.headers["traceresponse"].split("-")[1] == TRACE_ID
    record = await asyncio.wait_for(heard.final, 20)
    assert record["traceparent"].split("-")[1] == TRACE_ID
    assert {value.split("-")[1] for value in heard.traces} == {TRACE_ID}
    assert record["result"]["variable"] == record["result"]["task"]
    assert record["result"]["variable"].split("-")[1] == TRACE_ID
    await until(lambda: "ran" in lines_about(mesh, TRACE_ID).get("node-agent", ()), what="the node's log")
    assert {"running", "ran"} <= lines_about(mesh, TRACE_ID)["node-agent"]
    await nc.close()


async def test_an_item_without_a_trace_can_be_followed_all_the_same(mesh: RunningMesh) -> None:
    """Its trace follows from its id; the executor and the node's log agree on it, and no header is sent."""
    nc = await nats.connect(mesh.url(Role.CLIENT))
    heard = Heard()
    await nc.subscribe("compute.work.state.v1.plain", cb=heard.on_state)
    await nc.jetstream().publish("compute.work.submit.v1", b'{"work_id": "plain", "work_type": "tell"}')
    record = await asyncio.wait_for(heard.final, 20)
    expected = trace.of_work("plain")
    assert record["result"]["variable"] == expected.header
    assert heard.traces == {""}
    await until(lambda: "ran" in lines_about(mesh, expected.trace_id).get("node-agent", ()), what="the node's log")
    await nc.close()


async def test_what_is_rejected_is_logged_in_the_trace_of_its_sender(mesh: RunningMesh) -> None:
    """A bad item on the captured subject: its rejection in the marshaller's log leads back to the sender."""
    nc = await nats.connect(mesh.url(Role.CLIENT))
    await nc.jetstream().publish("compute.work.submit.v1", b'{"priority": 1}', headers={"traceparent": SENDER})
    await until(lambda: "rejected" in lines_about(mesh, TRACE_ID).get("work-marshaller", ()), what="the log line")
    await nc.close()


async def test_a_refusal_over_http_names_the_trace_to_look_for(mesh: RunningMesh) -> None:
    """Whoever reports a problem can name the log lines."""
    async with httpx.AsyncClient(base_url=mesh.http("work-marshaller")) as http:
        answer = await http.get("/api/v1/work/unknown", headers={"traceparent": SENDER})
        assert answer.status_code == 404
        assert answer.json()["trace_id"] == TRACE_ID
        other = await http.get("/api/v1/work/unknown", headers={"traceparent": "nonsense"})
        assert re.fullmatch("[0-9a-f]{32}", other.json()["trace_id"])


async def test_every_service_is_measured_as_documented(mesh: RunningMesh) -> None:
    """Each family of ``/metrics`` stands in the table of its service or of all, and each row is there to scrape."""
    documented: dict[str, set[str]] = {}
    for service, name in re.findall(r"^\| ([a-z-]+) \| `(\w+)` \|", DOCUMENT.read_text(), re.MULTILINE):
        documented.setdefault(service, set()).add(name)
    nc = await nats.connect(mesh.url(Role.CLIENT))
    heard = Heard()
    await nc.subscribe("compute.work.state.v1.counted", cb=heard.on_state)
    await nc.jetstream().publish("compute.work.submit.v1", b'{"work_id": "counted", "work_type": "tell"}')
    await asyncio.wait_for(heard.final, 20)
    async with httpx.AsyncClient() as http:
        for service in ALL:
            url = mesh.http(service)
            await http.get(f"{url}/healthz")
            text = (await http.get(f"{url}/metrics")).text
            families = {
                f"{f.name}_total" if f.type == "counter" else f.name for f in text_string_to_metric_families(text)
            }
            own = {name for name in families if not name.startswith(("python_", "process_"))}
            assert own == documented["all"] | documented.get(service, set()), service
            assert "process_resident_memory_bytes" in families
    await nc.close()


async def test_routes_are_measured_by_template_and_status(mesh: RunningMesh) -> None:
    """Ids in paths and unknown methods make no series of their own."""
    async with httpx.AsyncClient(base_url=mesh.http("work-marshaller")) as http:
        await http.get("/api/v1/work/one")
        await http.get("/api/v1/work/two")
        await http.get("/nowhere/at/all")
        await http.request("PROPFIND", "/api/v1/work")
        text = (await http.get("/metrics")).text
    counted = {
        (s.labels["http_request_method"], s.labels["http_route"], s.labels["http_response_status_code"]): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.name == "http_server_request_duration_seconds_count"
    }
    assert counted["GET", "/api/v1/work/{work_id}", "404"] == 2
    assert counted["GET", "", "404"] == 1
    assert sum(count for (method, *_), count in counted.items() if method == "_OTHER") == 1
    assert not any("one" in route or "PROPFIND" in method for method, route, _ in counted)
