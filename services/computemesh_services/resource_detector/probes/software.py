"""Inference engines and models that are on this machine, whether or not anything runs.

Nothing heavy is imported: the version of a Python package is in its metadata.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from computemesh import models
from computemesh.contracts.resources import EngineFound, ModelFound

BYTES_PER_MB: Final = 1024 * 1024

PACKAGES: Final = ("vllm", "sglang", "xllamacpp", "llama-cpp-python")
"""Python packages that are engines."""

PROGRAM: Final = "llama-server"
PROGRAM_S: Final = 10.0
"""How long it may take to say its version."""

LISTED_MAX: Final = 1000
"""Models that are told of."""

_VERSION: Final = re.compile(r"^version: (\S+)", re.MULTILINE)


def read_engines(*, packages: Iterable[str] = PACKAGES, path: str | None = None) -> list[EngineFound]:
    """The engines that are installed beside this program, or on the PATH."""
    found: list[EngineFound] = []
    for name in packages:
        try:
            found.append(EngineFound(name=name, version=version(name)))
        except PackageNotFoundError:
            continue
    if program := shutil.which(PROGRAM, path=path):
        found.append(EngineFound(name=PROGRAM, version=_program_version(program, Path(program).stat().st_mtime_ns)))
    return found


@lru_cache(maxsize=8)
def _program_version(program: str, _changed_ns: int) -> str:
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, errors="replace", timeout=PROGRAM_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    said = _VERSION.search(done.stderr + done.stdout)
    return said[1] if said else ""


def read_models(config: str, *, hub: Path | None = None) -> list[ModelFound]:
    """The models that *config* names (as ``COMPUTEMESH_MODELS`` does; empty = the embedded one), and those in the
    cache of the Hugging Face Hub."""
    files = models.find_models(config).models
    gguf = [ModelFound(name=name, form="gguf", size_mb=_size_mb(models.parts(path))) for name, path in files.items()]
    return [*gguf, *_in_hub(hub_folder(os.environ) if hub is None else hub)][:LISTED_MAX]


def hub_folder(environ: Mapping[str, str]) -> Path:
    """Where the Hugging Face Hub's own library keeps what it downloaded."""
    if folder := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environ.get("HF_HOME") or f"{cache}/huggingface").expanduser() / "hub"


def _in_hub(hub: Path) -> list[ModelFound]:
    found: list[ModelFound] = []
    for folder in sorted(hub.glob("models--*")):
        if any((folder / "snapshots").glob("*/*")):
            size_mb = _size_mb(path for path in (folder / "blobs").glob("*") if path.suffix != ".incomplete")
            name = "/".join(folder.name.split("--", 2)[1:])
            found.append(ModelFound(name=name, form="huggingface", size_mb=size_mb))
    return found


def _size_mb(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except OSError:
            continue
    return total // BYTES_PER_MB
