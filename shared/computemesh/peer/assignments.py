"""Assignments: which bytes go where, in the forms in which programs say it.

==========================================================================  =========================================
form                                                                        offsets
==========================================================================  =========================================
``(name, local_offset, remote_offset, length)``                             one name for both regions
``(local_name, remote_name, local_offset, remote_offset, length)``          local first
``(local_handle, remote_handle, remote_offset, local_offset, length)``      **remote first**
==========================================================================  =========================================

The form with handles has its offsets the other way round than those with names, as in DLSlime, from which programs
come. `local` is always this process and `remote` the peer, whether bytes are read or written. One assignment may stand
alone, or many in a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any, Final, NamedTuple, TypeAlias, cast

ASSIGNMENTS_MAX: Final = 65536
"""In one order."""

Named: TypeAlias = tuple[str, int, int, int]
TwoNamed: TypeAlias = tuple[str, str, int, int, int]
ByHandle: TypeAlias = tuple[int, int, int, int, int]
Assignment: TypeAlias = Named | TwoNamed | ByHandle
Assignments: TypeAlias = Assignment | Sequence[Assignment]


class Wanted(NamedTuple):
    """One range of bytes, here and there."""

    local: str | int
    """Name or handle of a region of this process."""
    remote: str | int
    """Name or handle of a region of the peer; a name exactly if `local` is one."""
    local_offset: int
    remote_offset: int
    length: int


def parse(assign: object) -> list[Wanted]:
    """The ranges that an assignment, or a list of them, stands for, in their order.

    Raises:
        TypeError: it has none of the forms.
        ValueError: a number is negative, or there are none or too many of them.
    """
    if isinstance(assign, (list, tuple)):
        items = cast(Sequence[Any], assign)
        if not items:
            raise ValueError("assign: it is empty; give at least one assignment")
        if isinstance(items[0], (str, int)):
            return [_one(items, "assign")]
        if len(items) > ASSIGNMENTS_MAX:
            raise ValueError(f"assign: {len(items)} assignments; at most {ASSIGNMENTS_MAX} go in one order")
        return [_one(item, f"assign[{number}]") for number, item in enumerate(items)]
    raise TypeError(f"assign: a tuple or a list of tuples is wanted, not {type(assign).__name__}")


def _one(item: Any, where: str) -> Wanted:
    if not isinstance(item, (list, tuple)):
        raise TypeError(f"{where}: a tuple is wanted, not {type(item).__name__}")
    parts = cast(Sequence[Any], item)
    match len(parts):
        case 4:
            name, local_offset, remote_offset, length = parts
            if not isinstance(name, str):
                raise TypeError(_forms(where))
            wanted = Wanted(name, name, *_numbers(where, local_offset, remote_offset, length))
        case 5 if isinstance(parts[0], str) and isinstance(parts[1], str):
            wanted = Wanted(parts[0], parts[1], *_numbers(where, parts[2], parts[3], parts[4]))
        case 5 if not isinstance(parts[0], str) and not isinstance(parts[1], str):
            local, remote = _number(where, "local_handle", parts[0]), _number(where, "remote_handle", parts[1])
            wanted = Wanted(local, remote, *_numbers(where, parts[3], parts[2], parts[4]))
        case _:
            raise TypeError(_forms(where))
    return wanted


def _numbers(where: str, local_offset: Any, remote_offset: Any, length: Any) -> tuple[int, int, int]:
    return (
        _number(where, "local_offset", local_offset),
        _number(where, "remote_offset", remote_offset),
        _number(where, "length", length),
    )


def _number(where: str, what: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{where}: {what} must be a whole number, not bool")
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{where}: {what} must be a whole number, not {type(value).__name__}") from None
    if number < 0:
        raise ValueError(f"{where}: {what} is {number}; it must not be negative")
    return number


def _forms(where: str) -> str:
    return (
        f"{where}: wanted is (name, local_offset, remote_offset, length), "
        "(local_name, remote_name, local_offset, remote_offset, length) or "
        "(local_handle, remote_handle, remote_offset, local_offset, length)"
    )
