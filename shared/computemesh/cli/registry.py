"""``registry``: engines and other services that registered with the control plane, in whatever program they run."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import click
import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from computemesh.bus import Bus
from computemesh.cli import common, complete, watch
from computemesh.cli.common import err, out, print_json
from computemesh.cli.tables import Cell, Column, folded, grid
from computemesh.contracts import engines
from computemesh.contracts.base import Refused, Role, convert
from computemesh.contracts.engines import (
    ENGINE,
    PAGE_MAX,
    ChangesGet,
    Engine,
    EngineChange,
    EngineGet,
    Engines,
    EnginesList,
    EngineUnregister,
)

COLUMNS: Final = (
    Column(title="id", least=16),
    Column(title="type", rank=4),
    Column(title="kind"),
    Column(title="address", least=16),
    Column(title="GPUs", right=True, rank=3),
    Column(title="blocks", right=True, rank=2),
    Column(title="model", rank=5, least=16),
    Column(title="seen", rank=1),
)

CHANGE_COLOURS: Final = {"added": "green", "changed": "cyan", "removed": "magenta", "expired": "red"}

LOOK_S: Final = 5.0
"""How often it is asked what changed where no event told of it."""


def scope_option(command: Any) -> Any:
    """``--scope``, as all that asks the control plane has it."""
    return click.option(
        "--scope", default="", envvar="NANOCTRL_SCOPE", show_envvar=True, metavar="SCOPE",
        help="In this scope; left out, in the one without a name.",
    )(command)  # fmt: skip


def question(fields: dict[str, Any], kind: type[Any]) -> Any:
    """What is asked; what the options cannot check the contract does."""
    asked = convert({name: value for name, value in fields.items() if value is not None}, kind)
    if isinstance(asked, Refused):
        raise common.refusal(asked)
    return asked


def _type_option(command: Any) -> Any:
    return click.option("--type", "entity_type", default=ENGINE, show_default=True, help="What it is.")(command)


@click.group(name="registry", cls=common.Ordered)
def registry_group() -> None:
    """What is registered with the control plane: engines by name, wherever they run, until they fall silent.

    \b
      computemesh registry list --scope my-session --watch
      computemesh registry get prefill-0
      computemesh registry changes --follow --json

    The engines that the nodes of this mesh run are those of `computemesh engines`.
    """


# --- what there is -----------------------------------------------------------------------------------------------


@registry_group.command(name="list")
@scope_option
@click.option("--type", "entity_type", help="Only these: `engine`, or what others registered as.")
@click.option("--kind", help="Only these: of engines prefill, decode or hybrid.")
@watch.watch_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_registered(
    scope: str, entity_type: str | None, kind: str | None, watching: bool, interval: float, as_json: bool
) -> None:
    """List what is registered in a scope."""
    ask: EnginesList = question({"scope": scope, "entity_type": entity_type, "kind": kind}, EnginesList)

    async def fetch(bus: Bus, lines: int | None) -> Engines:
        return await every_engine(bus, ask, lines)

    def draw(found: Engines, width: int, lines: int | None) -> RenderableType:
        where = f"in the scope {scope}" if scope else "in the scope without a name"
        if not found.engines:
            return Text(f"Nothing {'like that ' if entity_type or kind else ''}is registered {where}.")
        shown = found.engines if lines is None else found.engines[: max(1, lines - 3)]
        rows = [row(engine, time.time()) for engine in shown]
        notes = (folded(found.count, len(shown)), f"{found.count:,} {where}, revision {found.revision}")
        return Group(grid(COLUMNS, rows, width), Text("; ".join(filter(None, notes)), "dim"))

    view = watch.View(fetch=fetch, draw=draw, events=(engines.CHANGED,))
    watch.present(view, watching=watching, interval_s=interval, as_json=as_json)


async def every_engine(bus: Bus, query: EnginesList, most: int | None = None) -> Engines:
    """All that match, page by page; with *most*, no more pages than are needed for so many."""
    ask = msgspec.structs.replace(query, limit=min(most or PAGE_MAX, PAGE_MAX))
    found = await common.ask(bus, engines.LIST, ask)
    listed, after = list(found.engines), found.next
    while after and (most is None or len(listed) < most):
        page = await common.ask(bus, engines.LIST, msgspec.structs.replace(ask, after=after))
        listed, after = listed + page.engines, page.next
    return msgspec.structs.replace(found, engines=listed, next="")


def row(engine: Engine, now: float) -> tuple[Cell, ...]:
    """An entity in a line."""
    is_engine = engine.entity_type == ENGINE
    return (
        engine.engine_id,
        engine.entity_type,
        engine.role or engine.kind or "-",
        _address(engine),
        str(engine.world_size) if is_engine else "-",
        f"{engine.num_blocks:,}" if engine.num_blocks else "-",
        engine.model_path or "-",
        f"{common.lasting(now - engine.seen_at)} ago",
    )


def _address(engine: Engine) -> str:
    if engine.host:
        return f"{engine.host}:{engine.port}" if engine.port else engine.host
    if isinstance(engine.endpoint, str):
        return engine.endpoint
    return msgspec.json.encode(engine.endpoint).decode() if engine.endpoint is not None else "-"


@registry_group.command()
@click.argument("engine_id", metavar="ID", shell_complete=complete.registered)
@scope_option
@_type_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def get(engine_id: str, scope: str, entity_type: str, as_json: bool) -> None:
    """Show all that is registered of one."""
    ask = question({"engine_id": engine_id, "scope": scope, "entity_type": entity_type}, EngineGet)
    found = common.once(lambda bus: common.ask(bus, engines.GET, ask), Role.OBSERVER)
    if as_json:
        print_json(found)
        return
    for name, value in fields(found, time.time()):
        out.print(f"{name + ':':14}{common.escape(common.one_line(value))}")


def fields(engine: Engine, now: float) -> list[tuple[str, str]]:
    """What is known of an entity, for people; what was not told is left out."""
    told = [
        ("id", engine.engine_id),
        ("scope", engine.scope or "(without a name)"),
        ("type", engine.entity_type),
        ("kind", engine.role or engine.kind),
        ("address", _address(engine)),
        ("zmq address", engine.zmq_address),
        ("peers", ", ".join(engine.peer_addrs)),
        ("p2p address", f"{engine.p2p_host}:{engine.p2p_port}" if engine.p2p_host else ""),
        ("model", engine.model_path or ""),
    ]
    if engine.entity_type == ENGINE:
        told += [("GPUs", str(engine.world_size)), ("blocks", f"{engine.num_blocks:,}")]
        told += [("sequences", f"{engine.max_num_seqs:,}" if engine.max_num_seqs else "")]
    told += [("metadata", _compact(engine.metadata)), ("resource", _compact(engine.resource))]
    told += [("registered", f"{common.lasting(now - engine.registered_at)} ago")]
    told += [("seen", f"{common.lasting(now - engine.seen_at)} ago")]
    return [(name, value) for name, value in told if value and value != "-"]


def _compact(value: Any) -> str:
    return msgspec.json.encode(value).decode() if value not in (None, {}, []) else ""


# --- what changed ------------------------------------------------------------------------------------------------


@registry_group.command()
@scope_option
@click.option("--since", type=click.IntRange(0), default=0, metavar="REVISION", help="Only what came after this.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what changes from now on, until Ctrl-C.")
@click.option("--json", "json_lines", is_flag=True, help="Print a JSON object a line.")
def changes(scope: str, since: int, follow: bool, json_lines: bool) -> None:
    """Show what changed in a scope: what was added, changed, removed, or expired.

    Each change has a revision. Who goes on with --since misses nothing, however long it was away, as long as the
    control plane still knows all that came after; where it does not, a notice says so, and what is registered now
    comes first, as added.
    """
    ask: ChangesGet = question({"scope": scope, "since": since}, ChangesGet)
    printer = _Printer(json_lines)
    with contextlib.suppress(BrokenPipeError):
        common.run(_follow(ask, printer) if follow else _once(ask, printer))


class _Printer:
    def __init__(self, json_lines: bool) -> None:
        self._json_lines = json_lines

    def show(self, found: Sequence[EngineChange]) -> None:
        for change in found:
            if self._json_lines:
                sys.stdout.buffer.write(msgspec.json.encode(change) + b"\n")
            elif sys.stdout.isatty():
                common.out.print(Text.assemble(*line(change)), soft_wrap=True)
            else:
                sys.stdout.write("".join(text for text, _ in line(change)) + "\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        if self._json_lines:
            click.echo(msgspec.json.encode({"notice": text}), err=True)
        else:
            err.print(f"[dim]{common.escape(text)}[/]")


def line(change: EngineChange) -> list[tuple[str, str]]:
    """A change in a line, in pieces with their styles."""
    clock = time.strftime("%H:%M:%S", time.localtime(change.at))
    kind = change.entity_type if change.entity_type != ENGINE else ""
    name = f"{kind}/{change.engine_id}" if kind else change.engine_id
    shown = [(clock, "dim"), (f"  {change.revision:8}", ""), (f"  {change.change:8}", CHANGE_COLOURS[change.change])]
    shown.append((f"  {common.one_line(name)}", "bold"))
    if change.engine is not None:
        engine = change.engine
        more = [engine.role or engine.kind, _address(engine), engine.model_path or ""]
        shown.append((f"  {common.one_line(' '.join(word for word in more if word and word != '-'))}", ""))
    return shown


async def _once(ask: ChangesGet, printer: _Printer) -> None:
    async with common.connected(Role.OBSERVER) as bus:
        await _catch_up(bus, ask, printer)


async def _catch_up(bus: Bus, ask: ChangesGet, printer: _Printer) -> int:
    """Shows all that is known since; gives the revision to go on from."""
    since = ask.since
    while True:
        found = await common.ask(bus, engines.CHANGES, msgspec.structs.replace(ask, since=since))
        if found.reset:
            printer.note(f"not all that changed since {since} is known any more; first, what is registered now")
            listed = await every_engine(bus, EnginesList(scope=ask.scope))
            printer.show([_as_added(engine, listed.revision) for engine in listed.engines])
            since = listed.revision
            continue
        printer.show(found.changes)
        since = found.revision
        if not found.more:
            return since


def _as_added(engine: Engine, revision: int) -> EngineChange:
    return EngineChange(
        revision=revision,
        previous=revision,
        change="added",
        scope=engine.scope,
        entity_type=engine.entity_type,
        engine_id=engine.engine_id,
        engine=engine,
        source=0,
        at=engine.registered_at,
    )


async def _follow(ask: ChangesGet, printer: _Printer) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await common.first_of(_follow_on(ask, printer), stop.wait(), common.reader_gone())


async def _follow_on(ask: ChangesGet, printer: _Printer) -> None:
    """Asks whenever an event says that something changed, and now and then without; so what it shows is whole, also
    after the connection broke."""
    since, away = ask.since, False
    while True:
        try:
            async with common.connected(Role.OBSERVER) as bus:
                changed = asyncio.Event()

                async def on_change(said: EngineChange, changed: asyncio.Event = changed) -> None:
                    if said.scope == ask.scope:
                        changed.set()

                await bus.subscribe(engines.CHANGED, on_change, target="*")
                await bus.flush()
                while True:
                    changed.clear()
                    since = await _catch_up(bus, msgspec.structs.replace(ask, since=since), printer)
                    if away:
                        printer.note("the mesh answers again")
                        away = False
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(changed.wait(), LOOK_S)
        except common.NoMesh as failure:
            if not away:
                printer.note(f"{failure.message}; waiting for it")
            away = True
        await asyncio.sleep(watch.LOOK_AGAIN_S)


# --- removing ----------------------------------------------------------------------------------------------------


@registry_group.command()
@click.argument("engine_id", metavar="ID", shell_complete=complete.registered)
@scope_option
@_type_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def remove(engine_id: str, scope: str, entity_type: str, as_json: bool) -> None:
    """Forget one: what is gone and was not unregistered. One that is alive registers again."""
    ask = question({"engine_id": engine_id, "scope": scope, "entity_type": entity_type}, EngineUnregister)
    answer = common.once(lambda bus: common.ask(bus, engines.UNREGISTER, ask))
    if as_json:
        print_json(answer)
    elif answer.found:
        out.print(f"{common.escape(engine_id)} is no longer registered.")
    else:
        out.print(f"{common.escape(engine_id)} was not registered.")
