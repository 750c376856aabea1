"""A second node of a mesh, as far as peers are concerned: its peer-agent, as a process that a test may kill."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from computemesh.peer.signals import SOCKET_NAME
from computemesh.testing import RunningMesh, until

WAIT_S = 30.0


def start(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "computemesh_services.peer_agent"], env=environment)


@asynccontextmanager
async def another_node(
    mesh: RunningMesh, folder: Path, **settings: str
) -> AsyncGenerator[tuple[Path, subprocess.Popen[bytes]]]:
    """The peer-agent of node n2: its socket, and the process. Entered again with the same folder, its next life."""
    home = folder / "n2"
    path = home / "run" / SOCKET_NAME
    path.unlink(missing_ok=True)  # Of a life that was killed.
    environment = {
        **os.environ,
        "NATS_URL": await mesh.invite("n2"),
        "COMPUTEMESH_NODE_ID": "n2",
        "COMPUTEMESH_HOME": str(home),
        "COMPUTEMESH_STRICT": "true",
        **settings,
    }
    process = start(environment)
    try:
        await until(path.exists, what="the second peer-agent listens")
        yield path, process
    finally:
        process.terminate()
        process.wait(WAIT_S)
