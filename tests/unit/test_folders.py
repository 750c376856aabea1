"""The folders of items are deleted when they are old, and nothing else ever is."""

from __future__ import annotations

import os
from pathlib import Path

from computemesh_services.node_agent import folders

OLD, LIMIT, NEW = 1_000.0, 2_000.0, 3_000.0


def a_folder(root: Path, name: str, *written: tuple[str, float], at: float = OLD) -> Path:
    """An item's folder with files written at these times, itself changed at *at*."""
    folder = root / name
    folders.claim(folder)
    for path, when in ((folders.MARKER, OLD), *written):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).touch()
        os.utime(folder / path, (when, when))
    for inside in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        os.utime(inside, (at, at))
    return folder


def test_old_folders_of_items_go_and_young_ones_stay(tmp_path: Path) -> None:
    """The latest thing written anywhere in it counts."""
    a_folder(tmp_path, "old", ("log.txt", OLD), ("deep/file", OLD))
    a_folder(tmp_path, "young", at=NEW)
    a_folder(tmp_path, "log", ("log.txt", NEW))
    a_folder(tmp_path, "deep", ("deep/file", NEW))
    assert folders.prune(tmp_path, LIMIT, ()) == ["old"]
    assert {path.name for path in tmp_path.iterdir()} == {"young", "log", "deep"}


def test_the_folder_of_what_runs_stays_whatever_its_age(tmp_path: Path) -> None:
    """A long run may write nothing for weeks."""
    a_folder(tmp_path, "w-1")
    assert folders.prune(tmp_path, LIMIT, {"w-1"}) == []
    assert folders.prune(tmp_path, LIMIT, {"w-2"}) == ["w-1"]


def test_what_was_not_made_here_stays(tmp_path: Path) -> None:
    """Results may be put where other things are."""
    others = tmp_path / "thesis"
    others.mkdir()
    (others / "log.txt").touch()
    (tmp_path / "file").touch()
    for path in (others / "log.txt", others, tmp_path / "file"):
        os.utime(path, (OLD, OLD))
    assert folders.prune(tmp_path, LIMIT, ()) == []
    assert (others / "log.txt").exists()
    assert (tmp_path / "file").exists()


def test_a_link_in_a_folder_is_not_followed(tmp_path: Path) -> None:
    """Neither is what it leads to deleted, nor does a broken one keep the folder."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    folder = a_folder(tmp_path / "work", "w-1")
    (folder / "there").symlink_to(kept)
    (folder / "nowhere").symlink_to(tmp_path / "missing")
    for path in (folder / "there", folder / "nowhere"):
        os.utime(path, (OLD, OLD), follow_symlinks=False)
    os.utime(folder, (OLD, OLD))
    assert folders.prune(tmp_path / "work", LIMIT, ()) == ["w-1"]
    assert (kept / "file").exists()


def test_a_place_that_is_not_there_yet_has_nothing_to_delete(tmp_path: Path) -> None:
    """Before the first item."""
    assert folders.prune(tmp_path / "none", LIMIT, ()) == []
