"""The folders of items: where executors leave their files, and how long these stay."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Final

from computemesh.paths import private_folder

MARKER: Final = ".computemesh"
"""File in each folder that was made here. Others may keep folders of their own in the same place."""


def claim(folder: Path) -> None:
    """Makes *folder* an item's, if it is not yet, for its owner alone.

    Raises:
        OSError: it cannot be made.
    """
    private_folder(folder)
    (folder / MARKER).touch()


def prune(root: Path, older_than: float, in_use: Collection[str]) -> list[str]:
    """Deletes the folders of items in which nothing was written since *older_than*, Unix seconds; gives their names.

    Args:
        in_use: names of folders that stay whatever their age: an attempt may run for long and write nothing.
    """
    gone: list[str] = []
    for folder in root.iterdir() if root.exists() else ():
        if folder.name in in_use or not (folder / MARKER).exists():
            continue
        with contextlib.suppress(OSError):
            if not _written_since(folder, older_than):
                shutil.rmtree(folder)
                gone.append(folder.name)
    return gone


def _written_since(folder: Path, moment: float) -> bool:
    for inside, _, names in os.walk(folder):
        here = Path(inside)
        if any(path.lstat().st_mtime >= moment for path in (here, *(here / name for name in names))):
            return True
    return False
