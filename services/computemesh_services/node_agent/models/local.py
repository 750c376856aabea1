"""Files of this machine: linked into the store, after a look at their checksum."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from computemesh import models
from computemesh_services.node_agent.models.source import FetchError, Progress, SourceFile


@dataclass(frozen=True)
class LocalSource:
    """The model file at :attr:`path`, with its other parts."""

    path: Path
    name: str

    def locate(self) -> list[SourceFile]:
        return files_at(self.path)

    def fetch(self, file: SourceFile, into: Path, progress: Progress) -> Path:
        progress(file.size)
        return Path(file.location)


def files_at(path: Path) -> list[SourceFile]:
    """The model file at *path* and its other parts, with the sums that ``.sha256`` files beside them tell.

    Raises:
        FetchError: it is a folder, or a ``.sha256`` file has no checksum.
        OSError: there is none, or it cannot be read.
    """
    if path.is_dir():
        raise FetchError(f"{path} is a folder; name a file in it", lasting=True)
    return [
        SourceFile(name=part.name, size=part.stat().st_size, sha256=_sum_beside(part), location=str(part.absolute()))
        for part in models.parts(path) or [path]
    ]


def _sum_beside(path: Path) -> str:
    """What ``sha256sum FILE > FILE.sha256`` wrote, if anybody did."""
    beside = path.with_name(f"{path.name}.sha256")
    try:
        text = beside.read_text("utf-8", "replace")[:200]
    except OSError:
        return ""
    told = (text.split() or [""])[0].removeprefix("\\").lower()
    if len(told) != 64 or set(told) - set("0123456789abcdef"):
        raise FetchError(f"{beside}: no SHA-256 checksum in it", lasting=True)
    return told
