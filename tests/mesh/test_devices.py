"""Goal: the agent announces the devices that its machine's tools tell of, whatever state these are in, keeps its
engines to them, and serves the models that its file names.

Method: real agents. In place of the platforms' tools, first on PATH, are small programs that print what was recorded; a
llama-server among them says what it was built for, and is the real engine otherwise.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from computemesh.contracts import nodes
from computemesh.contracts.base import Role
from computemesh.contracts.nodes import EngineCard, NodeGet, NodeView
from computemesh.models import embedded_files
from computemesh.testing import RunningMesh, running_mesh, until

SERVICES: Final = ("node-registry", "node-agent")
RECORDED: Final = Path(__file__).parents[1] / "unit" / "recorded"
ENGINE: Final = f"{shlex.quote(sys.executable)} -P -m computemesh_services.node_agent.engines.xllamacpp_server"


def prints(name: str, *, status: int = 0) -> str:
    """A program that prints what was recorded."""
    return f"cat {shlex.quote(str(RECORDED / name))}; exit {status}"


@asynccontextmanager
async def machine(folder: Path, tools: Mapping[str, str], **settings: str) -> AsyncGenerator[RunningMesh]:
    """An agent on a machine where *tools* are installed."""
    path = folder / "tools"
    path.mkdir()
    for name, body in tools.items():
        (path / name).write_text(f"#!/bin/sh\n{body}\n")
        (path / name).chmod(0o755)
    environment = {"PATH": f"{path}:{os.environ['PATH']}", **settings}
    async with running_mesh(folder, SERVICES, environment=environment) as mesh:
        yield mesh


async def announced(mesh: RunningMesh) -> NodeView:
    """What the node said of itself."""
    bus = await mesh.bus(Role.SERVICES)
    async with asyncio.timeout(60):
        while not isinstance(answer := await bus.ask(nodes.GET, NodeGet(node_id="n1")), NodeView):
            await asyncio.sleep(0.02)
    return answer


def brief(cards: list[EngineCard]) -> list[tuple[str, str, str]]:
    return [(card.device, card.backend, card.name) for card in cards]


@pytest.mark.model
async def test_gpus_are_announced_and_an_engine_sees_its_own_alone(tmp_path: Path) -> None:
    born = tmp_path / "born-with"
    llama_server = (
        f'[ "$1" = --list-devices ] && {{ {prints("llama-server/cuda.txt")}; }}\n'
        f'echo "$CUDA_VISIBLE_DEVICES $HIP_VISIBLE_DEVICES <$GGML_VK_VISIBLE_DEVICES>" >{shlex.quote(str(born))}\n'
        f'exec {ENGINE} "$@"'
    )
    tools = {"nvidia-smi": prints("nvidia-smi/query-2x4090.csv"), "llama-server": llama_server}
    async with machine(tmp_path, tools) as mesh:
        node = await announced(mesh)
        assert brief(node.engines) == [
            ("gpu:0", "cuda", "NVIDIA GeForce RTX 4090"),
            ("gpu:1", "cuda", "NVIDIA GeForce RTX 4090"),
        ]
        assert node.models
        await until(born.exists, what="an engine")
        assert born.read_text() == "GPU-2d3bfb2c-0b2b-9a3c-1f0e-4f2d5f6f7a01 -1 <>\n"


@pytest.mark.model
async def test_a_machine_whose_tools_fail_serves_from_its_cpus_and_says_why(tmp_path: Path) -> None:
    """Neither a driver that does not match its library nor a report that is none costs the agent its start."""
    tools = {
        "nvidia-smi": prints("nvidia-smi/mismatch.txt", status=18),
        "amd-smi": "echo Traceback >&2; exit 1",
        "rocm-smi": prints("rocm-smi/no-data.txt"),
        "xpu-smi": "echo '{'",
        "vulkaninfo": prints("vulkaninfo/summary-llvmpipe-1.3.239.txt"),
    }
    async with machine(tmp_path, tools) as mesh:
        assert [card.device for card in (await announced(mesh)).engines] == ["cpu:0"]
        said = [line for line in mesh.lines if '"devices"' in line]
        for reason in ("Driver/library version mismatch", "amd-smi ended with status 1: Traceback", "no JSON but"):
            assert any(reason in line for line in said), reason


async def test_a_backend_that_finds_nothing_leaves_the_node_without_engines(tmp_path: Path) -> None:
    async with machine(tmp_path, {"nvidia-smi": "exit 9"}, COMPUTEMESH_BACKEND="cuda") as mesh:
        node = await announced(mesh)
        assert node.engines == []
        assert "inference" not in node.work_types
        assert any("backend cuda has no devices" in line for line in mesh.lines)


@pytest.mark.model
async def test_a_file_says_which_models_are_served_and_how_the_cpus_are_split(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").symlink_to(embedded_files()[0])
    count = min(2, len(os.sched_getaffinity(0)))
    (tmp_path / "agent.yaml").write_text(
        f"node_id: n7\nbackend: cpu\ncpu_devices: {count}\nlabels: {{zone: a}}\n"
        "models: [{model_id: tiny, path: tiny.gguf, alias: chat, ctx_size: 512, threads: 1, roles: [chat]}]\n"
    )
    async with machine(tmp_path, {}, COMPUTEMESH_CONFIG=str(tmp_path / "agent.yaml")) as mesh:
        node = await announced(mesh)
        assert [card.device for card in node.engines] == [f"cpu:{number}" for number in range(count)]
        assert set(node.models) == {"tiny", "chat"}
        assert node.labels == {"zone": "a"}
        counted = [line for line in mesh.lines if "the environment counts before the file" in line]
        assert any('"node_id"' in line and "COMPUTEMESH_NODE_ID" in line for line in counted)


def test_an_agent_with_a_file_that_cannot_be_does_not_start(tmp_path: Path) -> None:
    """With the exit status by which a supervisor knows that it is of no use to try again."""
    (tmp_path / "agent.yaml").write_text("node_id: n1\nmodles: []\n")
    command = [sys.executable, "-m", "computemesh_services.node_agent", "--config", str(tmp_path / "agent.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78
    said = f"node-agent: {tmp_path}/agent.yaml: modles: unknown key (line 2, column 1); did you mean models?\n"
    assert (done.stdout, done.stderr) == ("", said)
