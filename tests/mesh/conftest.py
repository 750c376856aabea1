"""Meshes as the command line starts them."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from computemesh.testing.cli import Cli


@pytest.fixture
def cli(tmp_path: Path) -> Generator[Cli]:
    """A home without a mesh."""
    fresh = Cli(tmp_path / "home")
    yield fresh
    fresh.end()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Generator[Cli]:
    """A home with a mesh that the tests of a file share, each leaving it as it was. Its own node has nothing to run."""
    shared = Cli(tmp_path_factory.mktemp("mesh") / "home")
    try:
        shared.up()
        yield shared
    finally:
        shared.end()
