"""What a source of models is. A node that gives models to its peers would be one more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Progress = Callable[[int], None]
"""Told how many bytes of a file are there. Raises :class:`Stopped` when nobody wants the rest."""


class FetchError(Exception):
    """A model cannot be had, now.

    Args:
        lasting: the same will happen again until somebody changes something.
        status: of the HTTP answer that says no; 0 when it is not that.
    """

    def __init__(self, reason: str, *, lasting: bool = False, status: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting
        self.status = status


class Stopped(Exception):
    """The agent ends; what is there of the file stays, for the next time."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of a model, as its source tells of it before it is fetched."""

    name: str
    """What it is called in the store."""
    size: int
    """Bytes."""
    sha256: str = ""
    """In lower case; empty when the source does not know it."""
    location: str = ""
    """Where the source has it; nobody else's business."""


class Source(Protocol):
    """Where a model comes from. Its methods block, and are called in a thread of their own."""

    @property
    def name(self) -> str:
        """As in :attr:`~computemesh.modelsource.ModelSource.location`."""
        ...

    def locate(self) -> Sequence[SourceFile]:
        """The files of the model, the first part first.

        Raises:
            FetchError: there is no such model, or the source cannot be reached.
            OSError: a file of this machine cannot be read.
        """
        ...

    def fetch(self, file: SourceFile, into: Path, progress: Progress) -> Path:
        """One of these files, whole. What is in *into* already may be used.

        Returns:
            ``into / file.name``, or another path where it lies already and stays.

        Raises:
            FetchError: it cannot be had.
            Stopped: *progress* said so.
            OSError: it cannot be read or written here.
        """
        ...
