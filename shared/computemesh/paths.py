"""Where a mesh keeps its files on a machine.

``COMPUTEMESH_HOME`` names the folder; left out, it is ``computemesh`` under ``$XDG_STATE_HOME``
(``~/.local/state``). The folder is 0700, whatever holds a secret is 0600.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """The files of one mesh on this machine."""

    root: Path

    @property
    def nats(self) -> Path:
        """The embedded NATS server: configuration, store, log."""
        return self.root / "nats"

    @property
    def credentials(self) -> Path:
        """Names and passwords of each role, and the HTTP token (0600)."""
        return self.root / "credentials.json"

    @property
    def run(self) -> Path:
        """What is running now: process ids and addresses."""
        return self.root / "run"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def work(self) -> Path:
        """Results and logs of the work this machine ran, a folder an item."""
        return self.root / "work"

    @property
    def models(self) -> Path:
        """Models that were fetched, a folder each."""
        return self.root / "models"

    @property
    def joined(self) -> Path:
        """The mesh that this machine joined as a node, with that node's password (0600)."""
        return self.root / "joined.json"

    @property
    def node_id_file(self) -> Path:
        return self.root / "node_id"


def home() -> Home:
    """The home this process was told to use."""
    named = os.environ.get("COMPUTEMESH_HOME")
    state = os.environ.get("XDG_STATE_HOME")
    base = Path(state) if state else Path.home() / ".local" / "state"
    return Home((Path(named) if named else base / "computemesh").expanduser().resolve())


def private_folder(path: Path) -> Path:
    """*path* as a folder that only its owner can enter, made when absent."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def write_private(path: Path, text: str) -> None:
    """Replaces *path* with a 0600 file holding *text*, in one step: no reader sees half of it."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    new.replace(path)
