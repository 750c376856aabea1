"""Real servers and processes for tests, this project's and those of programs built on it."""

from computemesh.testing.engine import FakeEngine, running_fake_engine
from computemesh.testing.mesh import RunningMesh, running_mesh, until
from computemesh.testing.node import DirectNode
from computemesh.testing.plugin import install_executor
from computemesh.testing.server import running_server

__all__ = [
    "DirectNode",
    "FakeEngine",
    "RunningMesh",
    "install_executor",
    "running_fake_engine",
    "running_mesh",
    "running_server",
    "until",
]
