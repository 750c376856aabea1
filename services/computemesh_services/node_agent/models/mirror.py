"""A mirror on a share: its files are copied, for shares are slow, and go away."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from computemesh_services.node_agent.models.local import files_at
from computemesh_services.node_agent.models.source import Progress, SourceFile

CHUNK_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True)
class MirrorSource:
    """The model file at :attr:`path` of a mounted share, with its other parts."""

    path: Path
    name: str

    def locate(self) -> list[SourceFile]:
        return files_at(self.path)

    def fetch(self, file: SourceFile, into: Path, progress: Progress) -> Path:
        target = into / file.name
        done = 0
        with Path(file.location).open("rb") as origin, target.open("wb") as copy:
            while chunk := origin.read(CHUNK_BYTES):
                copy.write(chunk)
                done += len(chunk)
                progress(done)
        return target
