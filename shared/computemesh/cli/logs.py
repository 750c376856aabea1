"""``logs``: what the services of this machine have logged, and what engines anywhere have printed."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem
from msgspec.structs import replace
from rich.text import Text

from computemesh.bus import Bus, BusError, NoResponder
from computemesh.cli import common, log_lines
from computemesh.cli.common import Failure, NoMesh
from computemesh.cli.log_files import LogFile
from computemesh.cli.log_lines import Entry
from computemesh.cli.times import Moment
from computemesh.contracts import infer, nodes
from computemesh.contracts.base import Refused, convert, encode
from computemesh.contracts.infer import LOG_WAIT_S_MAX, EngineLog, EngineLogGet
from computemesh.contracts.nodes import NodeGet
from computemesh.ids import is_token
from computemesh.paths import Home, home

LINES: Final = 100

LOOK_S: Final = 0.2
"""How often it is looked for new lines, and new files."""

AWAY_S_MAX: Final = 60.0
"""How long an engine's log that is followed may be out of reach before the command gives up."""

AGAIN_S: Final = 0.5

ENGINE: Final = "engine"
SERVER: Final = "nats-server"
ALIASES: Final = {"nats": SERVER}

COLOURS: Final = ("cyan", "green", "magenta", "blue", "yellow", "bright_cyan", "bright_green", "bright_magenta")


def sources(place: Home) -> dict[str, Path]:
    """The logs of a home, by the name of what wrote them."""
    found = {path.stem: path for path in sorted(place.logs.glob("*.log"))}
    # Beside them lie what `up` printed, which is the same once more, and what engines print.
    found = {name: path for name, path in found.items() if name != "up" and not name.startswith("engine-")}
    server = place.nats / "nats-server.log"
    return {SERVER: server, **found} if server.exists() else found


def _offer(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    names = [ENGINE, *sources(home())]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@click.command()
@click.argument("what", nargs=-1, shell_complete=_offer)
@click.option("--follow", "-f", is_flag=True, help="Go on with what is logged from now on, until Ctrl-C.")
@click.option(
    "--lines",
    "-n",
    type=click.IntRange(0),
    default=None,
    help=f"The last so many entries; left out, {LINES}, or all with --since.",
)  # fmt: skip
@click.option("--since", type=Moment(past=True), metavar="WHEN", help="Only since 10m, 2h … ago, or since a date.")
@click.option(
    "--level", type=click.Choice(list(log_lines.LEVELS), case_sensitive=False), default="debug",
    help="Only entries of this level, and of worse ones.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Each entry as it was logged, a JSON document a line.")
def logs(
    what: tuple[str, ...], follow: bool, lines: int | None, since: float | None, level: str, as_json: bool
) -> None:
    """Show what the services of this machine have logged, all of them in the order of time, or some.

    \b
      computemesh logs -f                          everything, from now on too
      computemesh logs gateway node-agent -n 20    two of them
      computemesh logs nats --level warning        the embedded NATS server
      computemesh logs --since 10m --level error
      computemesh logs engine gpu-7/gpu:0 -f       what an engine prints, on any node

    The files are kept when the mesh is down. What a work item has printed: `computemesh work logs`.
    """
    given = lines is not None
    lines = LINES if lines is None else lines
    if what[:1] == (ENGINE,):
        if since is not None or level != "debug":
            raise click.UsageError("--since and --level are for services: what engines print has neither")
        node_id, ask = _engine(what[1:])
        common.run(_until_stopped(_show_engine(node_id, ask, follow=follow, lines=lines, as_json=as_json)))
        return
    place, after = home(), since or 0.0
    names = [ALIASES.get(name, name) for name in what]
    _check(names, place)
    found = {name: LogFile(path) for name, path in sources(place).items() if not names or name in names}
    shown = _Shown(list(found), as_json=as_json)
    before = [log_lines.newest_first(name, log.before()) for name, log in found.items()]
    shown.print(log_lines.last(before, None if since is not None and not given else lines, level=level, since=after))
    if follow:
        keep = partial(log_lines.wanted, level=level, since=0.0)
        common.run(_until_stopped(_follow(place, names, found, shown, keep)))


def _check(names: Sequence[str], place: Home) -> None:
    """Ends the command when there are no such logs."""
    known = sources(place)
    if not known:
        raise NoMesh(f"no mesh has run in {place.root}", hint="`computemesh up` starts one")
    for name in names:
        if name not in known:
            hint = f"there are {', '.join(known)}, and `engine NODE/DEVICE`"
            raise Failure(f"no logs of {name!r}", hint=hint, field="what", code="not_found")


# --- services ----------------------------------------------------------------------------------------------------


class _Shown:
    """Prints entries, each source in a colour of its own."""

    def __init__(self, names: Sequence[str], *, as_json: bool) -> None:
        self._width = max(len(name) for name in names) if len(names) > 1 else 0
        self._as_json = as_json
        self._colours: dict[str, str] = {}
        for name in names:
            self._colour(name)

    def _colour(self, name: str) -> str:
        return self._colours.setdefault(name, COLOURS[len(self._colours) % len(COLOURS)])

    def print(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if self._as_json:
                sys.stdout.buffer.write(log_lines.as_json(entry) + b"\n")
                continue
            colour = self._colour(entry.source)
            pieces = log_lines.as_text(entry, now=time.time(), width=self._width, colour=colour)
            if sys.stdout.isatty():
                common.out.print(Text.assemble(*pieces), soft_wrap=True)
            else:
                sys.stdout.write("".join(text for text, _ in pieces) + "\n")
        sys.stdout.flush()


async def _follow(
    place: Home, names: Sequence[str], logs: dict[str, LogFile], shown: _Shown, keep: Callable[[Entry], bool]
) -> None:
    """Shows what is logged from now on, also by services that begin to; until Ctrl-C."""
    latest: dict[str, Entry] = {}
    while True:
        await asyncio.sleep(LOOK_S)
        for name, path in sources(place).items():
            if name not in logs and (not names or name in names):
                logs[name] = LogFile(path, from_start=True)
        entries: list[Entry] = []
        for name, log in logs.items():
            for entry in log_lines.oldest_first(name, log.after(), latest.get(name)):
                latest[name] = entry
                entries.append(entry)
        shown.print([entry for entry in sorted(entries, key=lambda entry: entry.at) if keep(entry)])


# --- engines -----------------------------------------------------------------------------------------------------


def _engine(words: Sequence[str]) -> tuple[str, EngineLogGet]:
    """The node, and what is asked of it."""
    node_id, slash, device = words[0].partition("/") if len(words) == 1 else ("", "", "")
    if not slash or not is_token(node_id):
        raise click.UsageError("name one engine as NODE/DEVICE; `computemesh engines` lists them")
    ask = convert({"device": device}, EngineLogGet)
    if isinstance(ask, Refused):
        raise common.refusal(ask)
    return node_id, ask


async def _show_engine(node_id: str, ask: EngineLogGet, *, follow: bool, lines: int, as_json: bool) -> None:
    begun = False
    async with common.connected() as bus:
        if bus.where.role not in infer.LOG.asked_by:
            raise common.only_a_node(f"may not ask {infer.LOG.subject}")
        while True:
            part = await _part(bus, node_id, ask, patient=follow and begun)
            if begun and part.offset != ask.offset:
                common.notice("the log was begun anew")
            _print_part(part if begun else replace(part, text=_last_lines(part.text, lines)), as_json=as_json)
            begun = True
            if not follow:
                return
            ask = replace(ask, offset=part.next, wait_s=LOG_WAIT_S_MAX)


def _last_lines(text: str, count: int) -> str:
    return "".join(text.splitlines(keepends=True)[-count:]) if count else ""


def _print_part(part: EngineLog, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.buffer.write(encode(part) + b"\n")
        sys.stdout.flush()
    elif part.text:
        click.echo(common.printable(part.text) if sys.stdout.isatty() else part.text, nl=False)


async def _part(bus: Bus, node_id: str, ask: EngineLogGet, *, patient: bool) -> EngineLog:
    """A part of a log; one that is followed is asked for again while its node is away."""
    until_s = time.monotonic() + AWAY_S_MAX
    while True:
        failure: Failure
        try:
            answer = await bus.ask(infer.LOG, ask, target=node_id, timeout_s=ask.wait_s + common.ANSWER_S)
            if isinstance(answer, EngineLog):
                return answer
            failure = common.refusal(answer)
            if answer.code == "not_found":
                failure.hint = await _engines_there(bus, node_id)
            if answer.retry != "later" and not patient:
                raise failure
        except NoResponder:
            failure = Failure(
                f"no node {node_id!r} answers", hint="`computemesh engines` lists those there are", code="not_found"
            )
        except BusError as error:
            failure = common.silent(str(error))
        if not patient or time.monotonic() > until_s:
            raise failure
        await asyncio.sleep(AGAIN_S)


async def _engines_there(bus: Bus, node_id: str) -> str:
    """Which engines the node has, as a hint."""
    found = await bus.ask(nodes.GET, NodeGet(node_id=node_id))
    devices = [] if isinstance(found, Refused) else [card.device for card in found.engines]
    return f"{node_id} has {', '.join(devices)}" if devices else f"{node_id} has no engines"


async def _until_stopped(showing: Coroutine[Any, Any, None]) -> None:
    """Runs until it ends, until Ctrl-C, or until nobody reads the output."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await common.first_of(showing, stop.wait(), common.reader_gone())
