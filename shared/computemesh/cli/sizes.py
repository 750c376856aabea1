"""Sizes of memory, as people write and read them."""

from __future__ import annotations

import re
from typing import Final

import click

_MIB: Final = {"": 1.0, "m": 1.0, "mb": 1.0, "mib": 1.0, "g": 1024.0, "gb": 1024.0, "gib": 1024.0,
               "t": 1024.0**2, "tb": 1024.0**2, "tib": 1024.0**2}  # fmt: skip
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")

MIB_MAX: Final = 2**40


class Size(click.ParamType[int]):
    """An amount of memory in MiB, written as ``24576``, ``24GiB`` or ``1.5T``. A GB is taken for a GiB."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(str(value))
        if found is None or found[2].lower() not in _MIB or float(found[1]) > MIB_MAX:
            self.fail(f"{value!r} is no size: write 24576 (MiB), 24GiB or 1.5TiB", param, ctx)
        mib = round(float(found[1]) * _MIB[found[2].lower()])
        if mib > MIB_MAX:
            self.fail(f"{value!r} is more than any machine has", param, ctx)
        return mib


def size(mib: float) -> str:
    """MiB for people: ``512 MiB``, ``24 GiB``, ``1.5 TiB``."""
    if mib < 1024:
        return f"{mib:.0f} MiB"
    return f"{number(mib / 1024)} GiB" if mib < 1024**2 else f"{number(mib / 1024**2)} TiB"


def byte_size(count: int) -> str:
    """Bytes for people: ``640 B``, ``64 KiB``, and above as :func:`size`."""
    if count < 1024:
        return f"{count} B"
    return f"{number(count / 1024)} KiB" if count < 1024**2 else size(count / 1024**2)


def number(value: float) -> str:
    """A number with one decimal where that says something."""
    return f"{value:.0f}" if value >= 100 or abs(value - round(value)) < 0.05 else f"{value:.1f}"


def share(part: int, whole: int) -> str:
    """Two sizes, in the same unit where that says something: ``12.3/80 GiB``, ``285 MiB/1.5 TiB``."""
    for unit, least in (("TiB", 1024**2), ("GiB", 1024)):
        if whole >= least:
            used = number(part / least)
            return f"{size(part)}/{size(whole)}" if part and used == "0" else f"{used}/{number(whole / least)} {unit}"
    return f"{part}/{whole} MiB"
