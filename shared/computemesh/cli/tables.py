"""Tables for people: in columns that fit the terminal, without folded lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.table import Table
from rich.text import Text

from computemesh.cli import common
from computemesh.cli.common import Screen, one_line

WIDE: Final = 400
"""How wide output that is piped may be: it is never folded."""

GAP: Final = 2

Cell = str | Text
"""One place in a table; text is shown as it is, whatever stands in it."""


@dataclass(frozen=True, kw_only=True)
class Column:
    title: str
    right: bool = False
    rank: int = 0
    """What may be left out where there is no room: the highest rank first, 0 never."""


def fit(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int) -> list[int]:
    """Which columns there is room for."""
    needs = [
        max([len(column.title), *(clean(row[number]).cell_len for row in rows)])
        for number, column in enumerate(columns)
    ]
    kept = list(range(len(columns)))
    while sum(needs[n] for n in kept) + GAP * (len(kept) - 1) > width:
        worst = max(kept, key=lambda n: (columns[n].rank, n))
        if not columns[worst].rank:
            break
        kept.remove(worst)
    return kept


def clean(cell: Cell) -> Text:
    """*cell* on one line, and without what would steer the terminal; such a one loses its colours, too."""
    if isinstance(cell, str):
        return Text(one_line(cell))
    plain = one_line(cell.plain)
    return cell if plain == cell.plain else Text(plain)


def grid(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int) -> Table:
    """A table at most *width* wide; columns without room are left out, and what is still too long is cut."""
    kept = fit(columns, rows, width)
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for number in kept:
        column = columns[number]
        made.add_column(column.title, justify="right" if column.right else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        made.add_row(*(clean(row[number]) for number in kept))
    return made


def width_now() -> int:
    """How wide a table may be that is printed now."""
    return common.out.width if sys.stdout.isatty() else WIDE


def show(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
    """Prints a table."""
    put(grid(columns, rows, width_now()))


def put(view: object) -> None:
    """Prints what was made for :func:`width_now`."""
    Screen(highlight=False, width=width_now(), file=sys.stdout).print(view)


def folded(count: int, shown: int) -> str:
    """What stands under a table that does not have all."""
    return f"… {count - shown:,} more" if count > shown else ""
