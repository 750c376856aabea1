"""Real servers and processes for tests, this project's and those of programs built on it."""

from computemesh.testing.server import running_server

__all__ = ["running_server"]
