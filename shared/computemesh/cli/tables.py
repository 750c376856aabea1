"""Tables for people: in columns that fit the terminal, without folded lines."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
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
    least: int | None = None
    """Where there is no room it is cut to this many characters, before any other column is left out."""


def fit(columns: Sequence[Column], needs: Sequence[int], width: int) -> dict[int, int]:
    """Which columns there is room for, and how wide each may be.

    Args:
        needs: how wide each column is with all that stands in it.
    """
    widths = dict(enumerate(needs))
    if _total(widths) > width:
        widths = {n: min(wide, columns[n].least or wide) for n, wide in widths.items()}
    while _total(widths) > width:
        worst = max(widths, key=lambda n: (columns[n].rank, n))
        if not columns[worst].rank:
            break
        del widths[worst]
    spare = width - _total(widths)
    for number in widths:  # What was cut gets what is left over, from the left.
        more = max(0, min(spare, needs[number] - widths[number]))
        widths[number] += more
        spare -= more
    return widths


def _total(widths: Mapping[int, int]) -> int:
    return sum(widths.values()) + GAP * (len(widths) - 1)


def clean(cell: Cell) -> Text:
    """*cell* on one line, and without what would steer the terminal; such a one loses its colours, too."""
    if isinstance(cell, str):
        return Text(one_line(cell))
    plain = one_line(cell.plain)
    return cell if plain == cell.plain else Text(plain)


def grid(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int) -> Table:
    """A table at most *width* wide; columns without room are left out, and what is still too long is cut."""
    cleaned = [[clean(cell) for cell in row] for row in rows]
    needs = [max([len(column.title), *(row[n].cell_len for row in cleaned)]) for n, column in enumerate(columns)]
    kept = fit(columns, needs, width)
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for number, wide in kept.items():
        made.add_column(
            columns[number].title,
            justify="right" if columns[number].right else "left",
            no_wrap=True,
            overflow="ellipsis",
            max_width=wide,
        )
    for row in cleaned:
        made.add_row(*(row[number] for number in kept))
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
