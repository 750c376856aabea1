"""The examples of peers, run as they stand, on a mesh with a peer-agent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from computemesh.testing import RunningMesh, running_mesh

EXAMPLES: Final = Path(__file__).parents[2] / "docs" / "examples" / "peers"
ADDRESS: Final = "http://127.0.0.1:3000"
"""Of the control plane, as the example of NanoCtrl's users has it."""
WAIT_S: Final = 60.0

SEED: Final = """\
import torch
from dlslime import start_peer_agent

scope = "peeragent-api-demo"

initiator = start_peer_agent(nanoctrl_url="http://127.0.0.1:3000", scope=scope)
target = start_peer_agent(nanoctrl_url="http://127.0.0.1:3000", scope=scope)

initiator_conn = initiator.connect_to(target.alias, ib_port=1, qp_num=1)
target_conn = target.connect_to(initiator.alias, ib_port=1, qp_num=1)
initiator_conn.wait()
target_conn.wait()

local = torch.zeros([16], device="cpu", dtype=torch.uint8)
remote = torch.ones([16], device="cpu", dtype=torch.uint8)

initiator.register_memory_region("kv", local.data_ptr(), 0, local.numel())
target.register_memory_region("kv", remote.data_ptr(), 0, remote.numel())

future = initiator.read(target.alias, [("kv", 8, 0, 8)])
future.wait()

initiator.shutdown()
target.shutdown()
"""
"""The minimal example of DLSlime's documentation, to the letter."""


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncGenerator[RunningMesh]:
    async with running_mesh(tmp_path, ("control-plane", "peer-agent")) as running:
        yield running


def environment(mesh: RunningMesh) -> dict[str, str]:
    return {**os.environ, "COMPUTEMESH_HOME": str(mesh.home.root)}


def run(mesh: RunningMesh, *command: str) -> str:
    """What a program prints that must go well."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=EXAMPLES,
        env=environment(mesh),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


@contextmanager
def serving(mesh: RunningMesh, *command: str) -> Generator[None]:
    """A program that says when it is ready, and is ended with the block."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=EXAMPLES, env=environment(mesh), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() in ("serving\n", "keeping\n")
        yield
    finally:
        process.kill()
        process.communicate()


def test_the_minimal_example_reads_eight_bytes(mesh: RunningMesh) -> None:
    """Eight of the target's ones behind eight of the initiator's zeros; only the port of the address is another."""
    text = (EXAMPLES / "minimal_read.py").read_text()
    assert ADDRESS in text
    said = run(mesh, "-c", text.replace(ADDRESS, mesh.http("control-plane")))
    assert said.endswith(f"{[0] * 8 + [1] * 8}\n"), said


def test_the_minimal_example_of_dlslime_runs_with_another_import_and_address(mesh: RunningMesh) -> None:
    """Without a network interface for RDMA, without which DLSlime's own library cannot run it."""
    pytest.importorskip("torch")
    text = SEED.replace("from dlslime import", "from computemesh.peer import")
    text = text.replace(ADDRESS, mesh.http("control-plane")) + "print(local.tolist())\n"
    # torch warns when it is without numpy.
    assert run(mesh, "-W", "ignore", "-c", text) == f"{[0] * 8 + [1] * 8}\n"


def test_the_minimal_example_is_that_of_dlslime_but_for_torch() -> None:
    """Line by line; what differs is the import, what makes the tensors and says where they are, and what is printed."""
    ours = (EXAMPLES / "minimal_read.py").read_text().splitlines()
    theirs = SEED.splitlines()
    differ = [line for line in theirs if line and line not in ours]
    assert differ == [
        "import torch",
        "from dlslime import start_peer_agent",
        'local = torch.zeros([16], device="cpu", dtype=torch.uint8)',
        'remote = torch.ones([16], device="cpu", dtype=torch.uint8)',
        'initiator.register_memory_region("kv", local.data_ptr(), 0, local.numel())',
        'target.register_memory_region("kv", remote.data_ptr(), 0, remote.numel())',
    ]


def test_every_process_gets_the_part_of_every_other(mesh: RunningMesh) -> None:
    """Three processes that read from each other, all at once."""
    said = run(mesh, "several_agents.py", "3")
    assert sorted(said.splitlines()) == [f"worker-{number} has [0, 1, 2]" for number in range(3)]


def test_a_call_between_peers_gets_its_answer_or_its_error(mesh: RunningMesh) -> None:
    """Also a second caller, after the first one has gone."""
    with serving(mesh, "rpc.py", "serve"):
        for _ in range(2):
            assert run(mesh, "rpc.py") == "2 + 3 = 5\nrefused: KeyError: 'divide'\n"


def test_a_cache_never_hands_out_a_block_that_was_replaced(mesh: RunningMesh) -> None:
    """Neither one whose place another has taken, nor one of an earlier registration of the memory."""
    with serving(mesh, "cache_client.py", "keep"):
        said = run(mesh, "cache_client.py")
    assert said.splitlines() == [
        "prompt-1: 65536 bytes of 1",
        "prompt-2: not there",
        "prompt-1: what was known of it is bad_checksum",
        "prompt-1: bytes of 2",
        "prompt-1: what was known of it is stale_epoch",
        "prompt-1: None",
    ]
