"""``events``: what is said on the bus, as it is said."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final

import click
import msgspec
from rich.text import Text

from computemesh.bus import Bus
from computemesh.cli import common, complete, subjects
from computemesh.cli.common import STATE_COLOURS, Failure, err, is_list, is_mapping, one_line
from computemesh.contracts import gpus, nodes, peers, resources, work
from computemesh.contracts.base import Refused, Role, decode, too_deep
from computemesh.contracts.catalog import events as all_events

ROUTINE: Final = (nodes.HEARTBEAT, resources.LOAD)
"""Sent every few seconds by every node: left out unless they are asked for."""

SHOWN: Final[Mapping[type[Any], tuple[str, ...]]] = {
    nodes.NodeAnnouncement: ("node_id", "hostname", "delivery", "work_types", "models", "slots", "gpus"),
    nodes.NodeRefused: ("node_id", "hostname", "code", "field", "reason"),
    nodes.NodeHeartbeat: ("node_id", "running", "accepting", "loaded_models", "cpu_percent"),
    gpus.GpuReserved: ("reservation_id", "node_id", "owner", "total_mb", "gpus", "timeout_seconds", "work_id"),
    gpus.GpuReleased: ("reservation_id", "node_id", "owner", "total_mb", "gpus", "work_id", "reason"),
    gpus.GpuPressure: ("node_id", "kind", "index", "level", "was", "oom_in_s", "reason"),
    peers.PeerChanged: ("scope", "alias", "node_id", "change", "revision"),
    peers.Transferred: ("transfer_id", "node_id", "scope", "alias", "peer", "kind", "ok", "bytes", "code", "reason"),
    resources.Inventory: ("node_id", "tier", "gpus", "warnings"),
    work.WorkItem: ("work_id", "work_type", "model_name", "priority", "owner"),
    work.WorkRecord: ("work_id", "state", "work_type", "model_name", "node_id", "attempt", "error"),
    work.Assignment: ("work_id", "node_id", "attempt", "work_type", "model_name"),
    work.WorkCompleted: ("work_id", "node_id", "attempt"),
    work.WorkFailed: ("work_id", "node_id", "attempt", "code", "fault", "error"),
    work.WorkRejected: ("work_id", "subject", "field", "reason"),
}
"""The fields that a line shows, by payload; of other payloads, all that have a value."""

VALUE_LENGTH_MAX: Final = 120
"""A longer value is cut in a line; ``--json`` has all of it."""


@dataclass(frozen=True, kw_only=True)
class Heard:
    """One message, and what it is."""

    subject: str
    at: float
    """Unix seconds when it came."""
    headers: Mapping[str, str]
    payload: Any
    """As JSON values; text when it is no JSON."""
    message: Any = None
    """The payload as its contract has it; None outside the contracts, and for what does not decode."""
    problem: Refused | None = None


def read(subject: str, data: bytes, headers: Mapping[str, str] | None, at: float) -> Heard:
    """What came on *subject*. Anybody may have sent anything; nothing raises."""
    event = subjects.event_of(subject)
    message = decode(data, event.payload) if event else None
    problem = message if isinstance(message, Refused) else None
    return Heard(
        subject=subject,
        at=at,
        headers=dict(headers or {}),
        payload=_values(data),
        message=None if problem else message,
        problem=problem,
    )


def _values(data: bytes) -> Any:
    """The JSON values in *data*, or its text when it is no JSON."""
    try:
        if data and not too_deep(data):
            return msgspec.json.decode(data)
    except (ValueError, RecursionError):
        pass
    return data.decode("utf-8", "replace")


def as_json(heard: Heard) -> bytes:
    """One line for programs."""
    line: dict[str, Any] = {
        "time": datetime.fromtimestamp(heard.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "subject": heard.subject,
        "headers": heard.headers,
        "payload": heard.payload,
    }
    if heard.problem is not None:
        line["problem"] = {name: getattr(heard.problem, name) for name in ("code", "reason", "field")}
    return msgspec.json.encode(line)


Piece = tuple[str, str]
"""A piece of a line, and its style."""


def as_text(heard: Heard) -> list[Piece]:
    """One line for people: when, what, and the fields that matter."""
    event = subjects.event_of(heard.subject) if heard.message is not None else None
    what = subjects.short(event.subject if event else heard.subject)
    clock = time.strftime("%H:%M:%S", time.localtime(heard.at)) + f".{int(heard.at * 1000) % 1000:03}"
    line = [(clock, "dim"), (f"  {what:18}  ", STATE_COLOURS.get(what.rpartition(".")[2], "bold"))]
    if heard.problem is not None:
        where = f"{heard.problem.field}: " if heard.problem.field else ""
        reason = one_line(f"not readable: {where}{heard.problem.reason}")
        return [*line, (reason, "red"), (f"  {_cut(_compact(heard.payload))}", "")]
    if heard.message is None:
        return [*line, (_cut(_compact(heard.payload)), "")]
    for number, (name, value) in enumerate(_fields(heard.message)):
        blank = " " if number else ""
        if name == "state":
            line.append((f"{blank}{value}", STATE_COLOURS.get(value, "")))
        elif number == 0 and name.endswith("_id"):
            line.append((value, ""))
        else:
            line += [(f"{blank}{name}=", "dim"), (value, "")]
    return line


def plain(line: Sequence[Piece]) -> str:
    return "".join(text for text, _ in line)


def _fields(message: Any) -> list[tuple[str, str]]:
    """The fields of a payload worth showing: those of :data:`SHOWN` or all, but none that has its default value."""
    kind: type[msgspec.Struct] = message.__class__
    kinds = _kinds(kind)
    found: list[tuple[str, str]] = []
    for name in SHOWN.get(kind, tuple(kinds)):
        value = getattr(message, name)
        if kinds[name].required or value != _default(kinds[name]):
            found.append((name, _cut(_value(value))))
    return found


@cache
def _kinds(kind: type[msgspec.Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    return {field.name: field for field in msgspec.structs.fields(kind)}


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _value(value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if is_list(value):
        return ",".join(map(str, value)) if all(isinstance(item, str) for item in value) else str(len(value))
    if isinstance(value, work.WorkError):
        return f"{value.reason} ({value.code})"
    return _compact(value)


def _compact(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()


def _cut(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= VALUE_LENGTH_MAX else f"{line[: VALUE_LENGTH_MAX - 1]}…"


# --- filters -------------------------------------------------------------------------------------------------


def matches(heard: Heard, wanted: Mapping[str, str]) -> bool:
    """Whether every field in *wanted*, a path such as ``error.code``, has that value, written as in JSON."""
    return all(_at(heard.payload, path) == value for path, value in wanted.items())


def _at(payload: Any, path: str) -> str | None:
    value = payload
    for name in path.split("."):
        if not is_mapping(value) or name not in value:
            return None
        value = value[name]
    return _compact(value)


def to_hear(names: Sequence[str], role: Role = Role.OBSERVER, *, heartbeats: bool) -> list[str]:
    """The subjects behind what was typed; nothing typed is every event that *role* may hear.

    Raises:
        Failure: nothing is called that.
    """
    routine = {subjects.pattern(event) for event in ROUTINE}
    if not names:
        heard = [subjects.pattern(event) for event in all_events() if role in event.read_by]
        return [subject for subject in heard if heartbeats or subject not in routine]
    found: list[str] = []
    for name in names:
        try:
            covered = subjects.find_events(name)
        except LookupError:
            raise unknown(name) from None
        named = len(covered) == 1
        found += [subject for subject in covered if named or heartbeats or subject not in routine]
    return list(dict.fromkeys(found))


def unknown(name: str) -> Failure:
    known = subjects.conversations() + [subjects.short(event.subject) for event in all_events()]
    near = subjects.near(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return Failure(f"{name}: no such event or conversation", hint=hint, field="subject", code="unknown_subject")


# --- the command ---------------------------------------------------------------------------------------------


@click.command()
@click.argument("names", nargs=-1, metavar="[SUBJECT]...", shell_complete=complete.event_names)
@click.option("--work-id", help="Only what names this item.", shell_complete=complete.work_ids)
@click.option("--node-id", help="Only what names this node.", shell_complete=complete.node_ids)
@click.option("--where", "conditions", multiple=True, metavar="FIELD=VALUE", help="Only where a field has this value.")
@click.option("--heartbeats", is_flag=True, help="Also what nodes send every few seconds: heartbeats and load.")
@click.option("--count", "-n", type=click.IntRange(1), help="End after this many.")
@click.option("--for", "for_s", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="End after this long.")
@click.option("--json", "json_lines", is_flag=True, help="Print a JSON object a line.")
def events(
    names: tuple[str, ...],
    work_id: str | None,
    node_id: str | None,
    conditions: tuple[str, ...],
    heartbeats: bool,
    count: int | None,
    for_s: float | None,
    json_lines: bool,
) -> None:
    """Show events as they happen, until Ctrl-C.

    SUBJECT is a conversation (`work`, `nodes`, `resources`), an event (`work.state`), one event of one item
    (`work.state.w-1`), or any subject of NATS, wildcards too. Left out, it is every event of the mesh but
    heartbeats.

    \b
      computemesh events work                        what happens to work
      computemesh events --work-id w-1 --json        one item, for programs
      computemesh events work.state --where state=failed
      computemesh events work.completed -n 1 --for 60 && echo "one was done"

    Exit status: 0; 1 when --count messages did not come within --for seconds; 2 and 3 as everywhere.
    """
    wanted = dict(map(_condition, conditions))
    wanted |= {name: value for name, value in (("work_id", work_id), ("node_id", node_id)) if value}
    heard_subjects = to_hear(names, common.bus_address(Role.OBSERVER).role, heartbeats=heartbeats)
    tail = Tail(wanted, count=count, json_lines=json_lines)
    common.run(_follow(tail, heard_subjects, for_s))
    if count is not None and tail.shown < count and for_s is not None and not tail.told_to_end:
        common.bail(common.EXIT_WORK_FAILED)


def _condition(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.BadParameter(f"{text!r} is not FIELD=VALUE", param_hint="'--where'")
    return name, value


class Tail:
    """Prints what is heard and wanted, and knows when it is enough."""

    def __init__(self, wanted: Mapping[str, str], *, count: int | None, json_lines: bool) -> None:
        self.shown = 0
        self.ended = asyncio.Event()
        self.told_to_end = False
        self._wanted = wanted
        self._count = count
        self._json_lines = json_lines

    def end(self) -> None:
        """A person, or whoever read the output, has had enough."""
        self.told_to_end = True
        self.ended.set()

    async def on_message(self, message: Any) -> None:
        if self.ended.is_set():
            return
        heard = read(message.subject, message.data, message.headers, time.time())
        if not matches(heard, self._wanted):
            return
        try:
            self._print(heard)
        except BrokenPipeError:
            self.end()
            return
        self.shown += 1
        if self.shown == self._count:
            self.ended.set()

    def _print(self, heard: Heard) -> None:
        if self._json_lines:
            sys.stdout.buffer.write(as_json(heard) + b"\n")
        elif sys.stdout.isatty():
            common.out.print(Text.assemble(*as_text(heard)), soft_wrap=True)
        else:
            sys.stdout.write(plain(as_text(heard)) + "\n")
        sys.stdout.flush()

    def note(self, text: str, **more: Any) -> None:
        """Says on standard error how it stands with the bus."""
        if self._json_lines:
            click.echo(msgspec.json.encode({"notice": text, **more}), err=True)
        else:
            shown = "".join(f" {' '.join(value)}" for value in more.values())
            err.print(f"[dim]{common.escape(text + shown)}[/]")


async def _follow(tail: Tail, heard_subjects: list[str], for_s: float | None) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, tail.end)
    denied: list[str] = []
    async with common.connected(Role.OBSERVER, on_denied=denied.append) as bus:
        for subject in heard_subjects:
            await bus.listen(subject, tail.on_message)
        await bus.flush()
        if denied:
            raise _denied(bus, heard_subjects, denied)
        tail.note("listening:", subjects=heard_subjects)
        if for_s is not None:
            loop.call_later(for_s, tail.ended.set)
        await common.first_of(tail.ended.wait(), _watch_bus(bus, tail.note), _watch_reader(tail))


def _denied(bus: Bus, heard_subjects: list[str], denied: list[str]) -> Failure:
    words = " ".join(denied).lower()
    subject = next((s for s in heard_subjects if f'"{s.lower()}"' in words), heard_subjects[0])
    return Failure(
        f"{subject}: the role {bus.where.role} may not hear this",
        hint="`computemesh events` without a subject shows all that it may hear",
        field="subject",
        code="denied",
    )


async def _watch_bus(bus: Bus, note: Callable[[str], None]) -> None:
    """Tells when the server goes and comes back: what was said meanwhile was not heard."""
    while True:
        await bus.interrupted.wait()
        note("NATS is gone; waiting for it")
        await bus.connected.wait()
        note("NATS is back; what was said meanwhile was not heard")


async def _watch_reader(tail: Tail) -> None:
    await common.reader_gone()
    tail.end()
