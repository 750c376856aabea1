"""A node that has to fetch its model: what it says meanwhile, and what happens to work.

Method: real services, and a real node agent that fetches from a server that speaks the hub's interface (``hub.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from computemesh.contracts import nodes, work
from computemesh.contracts.base import Role
from computemesh.contracts.nodes import NodeGet, NodeView
from computemesh.models import embedded_files
from computemesh.testing import RunningMesh, running_mesh
from computemesh.testing.cli import Cli
from computemesh.testing.cli import until as wait_until
from computemesh.testing.ggufs import a_gguf
from tests.mesh.hub import Hub, running_hub

SERVICES = ("node-registry", "work-marshaller", "node-agent")


@pytest.fixture
def hub() -> Generator[Hub, None, None]:
    """Has the real model, and gives nothing yet."""
    (path,) = embedded_files()
    repos = {"org/small-GGUF": {"small-Q4_1.gguf": path.read_bytes()}}
    with running_hub(Hub(repos=repos, piece=2**20, down=503)) as hub:
        yield hub


def settings(hub: Hub, folder: Path) -> dict[str, str]:
    return {
        "COMPUTEMESH_MODELS": "hf:org/small-GGUF",
        "COMPUTEMESH_HEARTBEAT_INTERVAL_S": "0.5",
        "COMPUTEMESH_CONTEXT_TOKENS": "1024",
        "COMPUTEMESH_ENGINE_THREADS": "1",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": "",
    }


async def node(mesh: RunningMesh) -> NodeView:
    found = await (await mesh.bus(Role.CLIENT)).ask(nodes.GET, NodeGet(node_id="n1"))
    assert isinstance(found, NodeView), found
    return found


@pytest.mark.model
async def test_work_for_a_model_that_is_not_there_waits_until_it_is_fetched(hub: Hub, tmp_path: Path) -> None:
    """The node names the model from the beginning, says why it is not there and how far it is, and announces it when it
    is whole."""
    async with running_mesh(tmp_path, SERVICES, environment=settings(hub, tmp_path)) as mesh:
        async with asyncio.timeout(30):
            while not ((view := await node(mesh)).fetches and view.fetches[0].problem):
                await asyncio.sleep(0.1)
        assert view.models == ["small"]
        assert [(card.name, card.present) for card in view.model_cards] == [("small", False)]
        assert f"{hub.url} answers 503" in view.fetches[0].problem
        hub.down = 0
        item = work.WorkItem(work_type="inference", payload={"prompt": "Name a colour.", "max_tokens": 4})
        sent = await mesh.submit(item)
        done = await mesh.record(sent.work_id)
        assert done.state is work.WorkState.COMPLETED, done.error
        view = await node(mesh)
        (card,) = view.model_cards
        assert (card.present, card.size_mb, card.context_tokens) == (True, 93, 1024)
        assert len(hub.downloads()) == 1

    # In its next life it has the model, and needs no hub.
    hub.down = 503
    async with running_mesh(tmp_path, SERVICES, environment=settings(hub, tmp_path)) as mesh:
        done = await mesh.record((await mesh.submit(item)).work_id)
        assert done.state is work.WorkState.COMPLETED, done.error


def test_a_mesh_whose_model_cannot_be_had_starts_and_says_why(tmp_path: Path) -> None:
    """On the command line: `up` does not wait for it, and `models` tells the reason. A wrong source is refused."""
    cli = Cli(tmp_path / "home")
    try:
        told = cli.refuses(2, "up", "--detach", "--models", "https://h/m.gguf")
        assert "needs its checksum" in told["error"]
        assert told["field"] == "--models"
        up = ("up", "--detach", "--ports", "any", "--nats-port", "0", "--models", "org/none")
        assert "No model is here yet" in cli.ok(*up, HF_ENDPOINT="http://127.0.0.1:1", HF_HOME=str(tmp_path / "hf"))
        listed: list[Any] = []

        def problem() -> str:
            listed[:] = cli.json("models")["models"]
            fetch = listed[0]["places"][0]["fetch"] if listed else None
            return str(fetch["problem"]) if fetch else ""

        wait_until(problem, what="the reason in a heartbeat")
        assert [model["name"] for model in listed] == ["none"]
        assert "http://127.0.0.1:1 cannot be reached" in problem()
        assert "none" in cli.ok("models")
    finally:
        cli.end()


def test_a_file_is_inspected_without_a_mesh(tmp_path: Path) -> None:
    """And what is none is refused with the reason."""
    cli = Cli(tmp_path / "home")
    (tmp_path / "m-Q4_0.gguf").write_bytes(a_gguf())
    (tmp_path / "no.gguf").write_text("no")
    found = cli.json("models", "inspect", str(tmp_path / "m-Q4_0.gguf"))
    assert (found["served_as"], found["parameters"], found["context_tokens"]) == ("m", 1024, 2048)
    assert "context        2,048 tokens" in cli.ok("models", "inspect", str(tmp_path / "m-Q4_0.gguf"))
    assert "not a GGUF file" in cli.refuses(2, "models", "inspect", str(tmp_path / "no.gguf"))["error"]
