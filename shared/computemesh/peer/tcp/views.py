"""Lists of views for the kernel, the first one last, so that what is done is cut off at no cost."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Final

VIEWS_MAX: Final = 512
"""Given to the kernel at once; it takes 1024."""
NOW: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
"""What cannot be had at once is not waited for."""


def advance(views: list[memoryview], count: int) -> None:
    """Cuts off the first `count` bytes; the first view is the last one of the list."""
    while views:
        size = len(views[-1])
        if count < size:
            if count:
                views[-1] = views[-1][count:]
            return
        count -= size
        views.pop()


def upto(views: Sequence[memoryview], limit: int) -> list[memoryview]:
    """The first `limit` bytes of these, the first view first."""
    taken: list[memoryview] = []
    for view in views:
        if len(view) >= limit:
            taken.append(view[:limit])
            break
        taken.append(view)
        limit -= len(view)
    return taken
