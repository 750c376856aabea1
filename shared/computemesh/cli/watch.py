"""``--watch``: a view that stays up to date, in place on a terminal, one after the other anywhere else.

A view is asked for again every few seconds, and soon after an event that may have changed it. It outlives the mesh:
while nobody answers it says since when, and goes on once somebody does.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import click
import msgspec
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from computemesh.bus import Bus
from computemesh.cli import common, tables
from computemesh.cli.common import NoMesh, Screen, one_line
from computemesh.cli.tables import WIDE
from computemesh.contracts.base import Event, Role

INTERVAL_S: Final = 2.0

PAUSE_S: Final = 0.25
"""Events that come thick and fast renew a view no more often than this."""

LOOK_AGAIN_S: Final = 0.5
"""Pause between two attempts to reach a mesh that is away."""

HEAD_LINES: Final = 2
"""The line above a view, and an empty one."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class View(Generic[T]):
    """What is watched."""

    fetch: Callable[[Bus, int | None], Coroutine[Any, Any, T]]
    """Asks the mesh. Takes how many lines can be shown; None when that does not matter."""
    draw: Callable[[T, int, int | None], RenderableType]
    """Takes the answer, the width, and how many lines there are; None when that does not matter."""
    events: Sequence[Event[Any]] = ()
    """What may change it."""
    role: Role = Role.OBSERVER


def watch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--watch`` and ``--interval``."""
    interval = click.option(
        "--interval",
        type=click.FloatRange(0.1, 3600),
        default=INTERVAL_S,
        show_default=True,
        metavar="SECONDS",
        help="With --watch: how often to look, besides after events.",
    )
    watch_ = click.option(
        "--watch", "-w", "watching", is_flag=True, help="Keep showing it, until Ctrl-C; with --json a document a line."
    )
    return watch_(interval(command))


def present(view: View[T], *, watching: bool, interval_s: float, as_json: bool) -> None:
    """Shows a view once, or keeps showing it."""
    if watching:
        run(view, interval_s=interval_s, as_json=as_json)
        return
    found = common.once(lambda bus: view.fetch(bus, None))
    if as_json:
        common.print_json(found)
    else:
        tables.put(view.draw(found, tables.width_now(), None))


def run(view: View[T], *, interval_s: float, as_json: bool) -> None:
    """Watches until Ctrl-C, or until nobody reads the output.

    Raises:
        Failure: it could not be shown even once.
    """
    in_place = sys.stdout.isatty() and not as_json
    painter = _Terminal(view, interval_s) if in_place else _Painter(view, as_json=as_json)
    try:
        common.run(_watch(view, painter, interval_s))
    finally:
        painter.close()


async def _watch(view: View[T], painter: _Painter[T], interval_s: float) -> None:
    stop, resized = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGWINCH, resized.set)
    await common.first_of(_renew(view, painter, interval_s, resized), stop.wait(), common.reader_gone())


async def _renew(view: View[T], painter: _Painter[T], interval_s: float, changed: asyncio.Event) -> None:
    while True:
        try:
            async with common.connected(view.role) as bus:
                await _follow(bus, view, painter, interval_s, changed)
        except NoMesh as failure:
            if not painter.shown:
                raise
            painter.away(failure.message)
        await asyncio.sleep(LOOK_AGAIN_S)


async def _follow(bus: Bus, view: View[T], painter: _Painter[T], interval_s: float, changed: asyncio.Event) -> None:
    """Shows the view as it changes; returns when the connection breaks."""

    async def on_event(_: Any) -> None:
        changed.set()

    for event in view.events:
        await bus.listen(event.at("*" if event.target else ""), on_event)
    await bus.flush()
    broke = bus.interrupted
    while not broke.is_set():
        changed.clear()
        painter.paint(await view.fetch(bus, painter.lines))
        await asyncio.sleep(min(PAUSE_S, interval_s))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(common.first_of(changed.wait(), broke.wait()), interval_s)
    raise common.no_mesh(f"no connection to {bus.where.shown}")


# --- where it is shown -------------------------------------------------------------------------------------------


class _Painter(Generic[T]):
    """Shows each answer; the base for what is no terminal."""

    lines: int | None = None
    """How many lines of a view can be shown."""

    def __init__(self, view: View[T], *, as_json: bool) -> None:
        self.shown = False
        self._view = view
        self._as_json = as_json
        self._away = False

    def paint(self, answer: T) -> None:
        if self._away:
            self._note("the mesh answers again")
        self._away, self.shown = False, True
        if self._as_json:
            sys.stdout.buffer.write(msgspec.json.encode(answer, enc_hook=str) + b"\n")
        else:
            console = Screen(highlight=False, width=WIDE, file=sys.stdout)
            console.print(Text(clock(time.time())), self._view.draw(answer, WIDE, None), "", sep="\n")
        sys.stdout.flush()

    def away(self, reason: str) -> None:
        """The mesh does not answer."""
        if not self._away:
            self._note(f"{reason}; waiting for it")
        self._away = True

    def close(self) -> None:
        """Leaves the output as it was found."""

    def _note(self, text: str) -> None:
        if self._as_json:
            click.echo(msgspec.json.encode({"notice": text}), err=True)
        else:
            common.err.print(f"[dim]{common.escape(text)}[/]")


class _Terminal(_Painter[T]):
    """Shows each answer in the place of the one before."""

    def __init__(self, view: View[T], interval_s: float) -> None:
        super().__init__(view, as_json=False)
        self._live = Live(console=Screen(highlight=False), screen=True, auto_refresh=False, vertical_overflow="crop")
        self._interval_s = interval_s
        self._answer: T | None = None
        self._since = ""

    @property
    def lines(self) -> int:  # type: ignore[override]
        return max(1, self._live.console.height - HEAD_LINES)

    def paint(self, answer: T) -> None:
        self.shown = True
        self._answer, self._since = answer, ""
        self._draw(Text(f"{clock(time.time())}  every {self._interval_s:g} s and on events; Ctrl-C ends", "dim"))

    def away(self, reason: str) -> None:
        self._since = self._since or clock(time.time())
        words = f"{clock(time.time())}  away since {self._since}: {one_line(reason)}; waiting for it"
        self._draw(Text(words, "bold yellow"))

    def close(self) -> None:
        self._live.stop()

    def _draw(self, head: Text) -> None:
        assert self._answer is not None
        self._live.start()  # Not before there is something: an error must not flash by on another screen.
        head.truncate(self._live.console.width, overflow="ellipsis")
        view = self._view.draw(self._answer, self._live.console.width, self.lines)
        self._live.update(Group(head, "", view), refresh=True)


def clock(at: float) -> str:
    """A time of day."""
    return time.strftime("%H:%M:%S", time.localtime(at))
