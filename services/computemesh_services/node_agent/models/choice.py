"""Which file of a repository is the model. Pure: names in, names out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Final

from computemesh.modelsource import PART

PREFERRED: Final = (
    *("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL", "MXFP4", "MXFP4_MOE", "NVFP4"),
    *("Q6_K", "Q8_0", "Q5_0", "Q5_1", "Q3_K_L", "Q3_K_M", "IQ3_M", "Q3_K_S", "IQ3_S", "IQ3_XS", "IQ3_XXS"),
    *("BF16", "F16", "Q2_K", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "F32"),
)
"""Quantisations, the best first: small enough to be fast, large enough to lose little. Others come last."""

NAMED_MAX: Final = 8
"""Files that a refusal names."""

_TYPE: Final = re.compile(
    r"(?:^|[.\-_])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]{1,3}){0,3}|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|F16|F32))$", re.IGNORECASE
)
_NO_MODEL: Final = re.compile(r"(?:^|[.\-_/])(?:mmproj|imatrix)", re.IGNORECASE)


class NoChoice(Exception):
    """No file is the model, or several could be; the message names them."""


def choose(names: Iterable[str], quantisation: str = "") -> list[str]:
    """The files of one model among all files of a repository, the first part first.

    Raises:
        NoChoice: none fits, or more than one does equally.
    """
    models = grouped(names)
    if not models:
        raise NoChoice("no GGUF file in it")
    by_type: dict[str, list[Sequence[str]]] = {}
    for files in models:
        by_type.setdefault(type_of(files[0]), []).append(files)
    fitting = _fitting(by_type, quantisation.upper()) if quantisation else _best(by_type)
    if not fitting:
        raise NoChoice(f"no file in it is {quantisation}; there is: {_listed(sorted(filter(None, by_type)))}")
    if len(fitting) > 1:
        raise NoChoice(f"several files in it could be meant, name one: {_listed(files[0] for files in fitting)}")
    return list(fitting[0])


def file_and_parts(names: Iterable[str], file: str) -> list[str]:
    """*file* with the other parts of the same model, of all files of a repository.

    Raises:
        NoChoice: it is not among them, or parts are missing.
    """
    names = list(names)
    if file not in names:
        there_is = _listed(name for name in sorted(names) if name.lower().endswith(".gguf"))
        raise NoChoice(f"no file {file} in it; there is: {there_is}")
    stem, part = _split(file)
    if part is None:
        return [file]
    whole = sorted(name for name in names if _split(name)[0] == stem and _split(name)[1] is not None)
    if [_split(name)[1] for name in whole] != _parts_of(file):
        raise NoChoice(f"of {file} only {len(whole)} of {len(_parts_of(file))} parts are there")
    return whole


def grouped(names: Iterable[str]) -> list[list[str]]:
    """The models among files: each a file, or all parts of one; what lacks parts, and what is no model, is left out."""
    names = sorted(name for name in names if name.lower().endswith(".gguf") and not _NO_MODEL.search(name))
    found: dict[str, list[str]] = {}
    for name in names:
        stem, part = _split(name)
        found.setdefault(stem if part is not None else name, []).append(name)
    return [files for files in found.values() if [_split(name)[1] for name in files] in ([None], _parts_of(files[0]))]


def type_of(name: str) -> str:
    """The quantisation in a file's name, or else in that of its folder; empty when neither has one."""
    path = PurePosixPath(_split(name)[0])
    for text in (path.name, path.parent.name):
        if found := _TYPE.search(text):
            return found[1].upper()
    return ""


def _fitting(by_type: dict[str, list[Sequence[str]]], wanted: str) -> list[Sequence[str]]:
    return by_type.get(wanted) or by_type.get(f"UD-{wanted}") or []


def _best(by_type: dict[str, list[Sequence[str]]]) -> list[Sequence[str]]:
    def rank(name: str) -> tuple[int, bool, str]:
        plain = name.removeprefix("UD-")
        place = PREFERRED.index(plain) if plain in PREFERRED else len(PREFERRED) + (not plain)
        return place, name != plain, name

    return by_type[min(by_type, key=rank)]


def _split(name: str) -> tuple[str, int | None]:
    """A file's path without ``.gguf`` and without its part, and the number of that."""
    stem = re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE)
    part = PART.search(stem)
    return (stem[: part.start()], int(part[1])) if part else (stem, None)


def _parts_of(name: str) -> list[int]:
    part = PART.search(re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE))
    return list(range(1, int(part[2]) + 1)) if part else []


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - NAMED_MAX} more" if len(listed) > NAMED_MAX else ""
    return (", ".join(listed[:NAMED_MAX]) or "none") + more
