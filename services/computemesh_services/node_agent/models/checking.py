"""Whether a file is what it should be."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from computemesh_services.node_agent.models.source import FetchError, Progress, SourceFile

CHUNK_BYTES: Final = 4 * 1024 * 1024


def sha256_of(path: Path, progress: Progress) -> str:
    """The checksum of a file, in lower case. *progress* is told its size all along.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress(size)
    return digest.hexdigest()


def check(path: Path, expected: SourceFile, progress: Progress) -> str:
    """The checksum of the file at *path*, which is the one that is *expected*, if there is any.

    Raises:
        FetchError: it is another file; with both sizes or sums.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size != expected.size:
        raise FetchError(f"{expected.name} has {size} bytes, not {expected.size}")
    found = sha256_of(path, progress)
    if expected.sha256 and found != expected.sha256:
        raise FetchError(f"{expected.name} has the SHA-256 checksum {found}, not {expected.sha256}", lasting=True)
    return found
