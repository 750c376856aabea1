"""Brings a model into the store: whole and checked, or not at all.

A model is a folder with its files (or links to them) and a record of what they are. It is made under another name,
``<folder>.partial``, and renamed when everything in it is right: nobody ever sees half a model. What broke off stays
under that name, and is gone on with; what turns out wrong is removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from computemesh.gguf import Gguf, GgufError, read_all
from computemesh.ids import token_from
from computemesh.paths import private_folder
from computemesh_services.node_agent.models.checking import check
from computemesh_services.node_agent.models.source import FetchError, Source, SourceFile

RECORD: Final = "model.json"
PARTIAL: Final = ".partial"
LOCK: Final = ".lock"

RESERVE_BYTES: Final = 256 * 1024 * 1024
"""What stays free of the disk, which others need as well."""

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Note = Callable[[int, int], None]
"""Told how many bytes of a model are there, of how many. Raises ``Stopped`` when nobody wants the rest."""


class RecordedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a model in the store."""

    name: str
    size: int
    sha256: str
    changed_ns: int = 0
    """Of what a link leads to: when that is another time, it may be another file."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the store knows of a model in it."""

    source: str
    files: list[RecordedFile]


def folder_name(model: str, location: str) -> str:
    """The folder of a model from a source, in the store. Another source is another folder."""
    return f"{token_from(model)}-{sha256(location.encode()).hexdigest()[:12]}"


def present(folder: Path, expected_sha256: str = "") -> list[Path]:
    """The files of the model in *folder*, the first part first; empty when it is not there as it was recorded."""
    try:
        record = msgspec.json.decode((folder / RECORD).read_bytes(), type=Record)
        paths = [folder / file.name for file in record.files if "/" not in file.name]
        if len(paths) != len(record.files) or not all(map(_is_as_recorded, paths, record.files)):
            return []
    except (OSError, ValueError, msgspec.MsgspecError):
        return []
    if expected_sha256 and [file.sha256 for file in record.files] != [expected_sha256]:
        return []
    return paths


def used_bytes(store: Path, *, but: Path | None = None) -> int:
    """What the models in the store take, linked ones and begun ones too, without the folder *but*."""
    total = 0
    for folder in store.iterdir() if store.is_dir() else ():
        if folder != but and folder.is_dir():
            for file in folder.iterdir():
                try:
                    total += file.stat().st_size
                except OSError:
                    continue
    return total


def fetch(source: Source, folder: Path, note: Note, *, sha256: str = "", bytes_max: int = 0) -> list[Path]:
    """Makes *folder* from *source*. Blocks.

    Args:
        note: told of progress.
        sha256: of the model's one file, if whoever wants it knows.
        bytes_max: how large all models beside *folder* may be with this one; 0 = any size.

    Returns:
        The model's files, the first part first.

    Raises:
        FetchError: it cannot be had, is not what it should be, or has no room.
        Stopped: *note* said so.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    total = 0
    try:
        files = _expected(source, sha256)
        total = sum(file.size for file in files)
        note(0, total)
        private_folder(partial)
        with _alone(partial):
            if found := present(folder, sha256):  # Another process of this machine was faster.
                shutil.rmtree(partial)
                return found
            _make_room(partial, folder, files, total, bytes_max)
            return _fill(source, files, partial, folder, note)
    except OSError as error:
        if error.errno in _FULL:
            shutil.rmtree(partial, ignore_errors=True)
            reason = f"no space left in {partial.parent} for {_gib(total)}: what there was of it is removed"
            raise FetchError(reason) from error
        what = f"{error.filename}: " if error.filename else ""
        raise FetchError(f"{source.name}: {what}{(error.strerror or str(error)).lower()}") from error


def _expected(source: Source, wanted: str) -> list[SourceFile]:
    """What the source promises, held against what is *wanted* of it."""
    files = list(source.locate())
    names = [file.name for file in files]
    if not files or len(set(names)) != len(names):
        raise FetchError(f"{source.name}: its files are {', '.join(names) or 'none'}", lasting=True)
    for name in names:
        if "/" in name or name.startswith(".") or not name.lower().endswith(".gguf"):
            raise FetchError(f"{source.name}: {name!r} is no name of a GGUF file", lasting=True)
    if not wanted:
        return files
    if len(files) > 1:
        raise FetchError(f"{source.name}: has {len(files)} parts, so one checksum says nothing of it", lasting=True)
    if files[0].sha256 and files[0].sha256 != wanted:
        told = f"has the SHA-256 checksum {files[0].sha256}, not {wanted}"
        raise FetchError(f"{source.name}: {names[0]} {told}", lasting=True)
    return [replace(files[0], sha256=wanted)]


def _make_room(partial: Path, folder: Path, files: Sequence[SourceFile], total: int, bytes_max: int) -> None:
    """Sees that there is some; removes only what an earlier try left here that is no part of the model any more."""
    names = {file.name for file in files}
    for path in partial.iterdir():
        if path.name not in names and path.name != LOCK:
            path.unlink()
    store = partial.parent
    used = used_bytes(store, but=partial)
    if folder.is_dir():  # What is there is not as it was recorded, and is replaced.
        used -= sum(path.stat().st_size for path in folder.iterdir() if path.exists())
    if bytes_max and used + total > bytes_max:
        todo = f"remove one from {store}, or let it hold more (COMPUTEMESH_MODELS_MAX_GB)"
        have = f"the models here take {_gib(used)} of the {_gib(bytes_max)} they may take"
        raise FetchError(f"{have}, so there is no room for {_gib(total)}: {todo}", lasting=True)
    begun = sum(path.stat().st_size for path in partial.iterdir() if not path.is_symlink())
    free = shutil.disk_usage(partial).free
    if total - begun + RESERVE_BYTES > free:
        raise FetchError(f"{_gib(free)} are free in {store}, and {_gib(total - begun + RESERVE_BYTES)} are needed")


def _fill(source: Source, files: Sequence[SourceFile], partial: Path, folder: Path, note: Note) -> list[Path]:
    recorded: list[RecordedFile] = []
    total = sum(file.size for file in files)
    done = 0
    for file in files:
        target = partial / file.name
        before = done

        def progress(count: int, before: int = before) -> None:
            note(before + count, total)

        if target.is_symlink():
            target.unlink()
        found = source.fetch(file, partial, progress)
        try:
            digest = check(found, file, progress)
        except FetchError:
            target.unlink(missing_ok=True)
            raise
        if found == target:
            _sync(target)
        else:
            target.unlink(missing_ok=True)
            target.symlink_to(found)
        recorded.append(_recorded(target, digest))
        done += file.size
    paths = [partial / file.name for file in files]
    try:
        _why_no_model(read_all(paths))
    except GgufError as error:
        for path in paths:
            path.unlink()
        raise FetchError(f"{source.name}: {error}", lasting=True) from None
    record = partial / RECORD
    record.write_bytes(msgspec.json.encode(Record(source=source.name, files=recorded)))
    _sync(record)
    if folder.is_dir():
        shutil.rmtree(folder)
    (partial / LOCK).unlink()
    partial.rename(folder)
    _sync(folder.parent)
    return [folder / path.name for path in paths]


def _why_no_model(head: Gguf) -> None:
    if head.kind != "model" or not head.architecture:
        raise GgufError(f"not a model, but {head.kind}" if head.kind != "model" else "does not say its architecture")


def _recorded(path: Path, digest: str) -> RecordedFile:
    told = path.stat()
    changed_ns = told.st_mtime_ns if path.is_symlink() else 0
    return RecordedFile(name=path.name, size=told.st_size, sha256=digest, changed_ns=changed_ns)


def _is_as_recorded(path: Path, file: RecordedFile) -> bool:
    told = path.stat()
    return told.st_size == file.size and (not path.is_symlink() or told.st_mtime_ns == file.changed_ns)


@contextmanager
def _alone(partial: Path) -> Generator[None, None, None]:
    """Nobody else works in *partial*.

    Raises:
        FetchError: somebody does.
    """
    with (partial / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FetchError("another process of this machine is fetching it") from None
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
