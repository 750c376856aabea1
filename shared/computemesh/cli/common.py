"""What all commands share: finding the mesh, talking to it, printing, and failing well."""

from __future__ import annotations

import asyncio
import os
import re
import select
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn, TypeGuard, TypeVar

import click
import msgspec
import uvloop
from rich import markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from computemesh import trace
from computemesh.bus import Bus, BusError, NoResponder, NotAdmitted, Unreachable, Where
from computemesh.config import ConfigError, nats_url
from computemesh.contracts.base import Message, Refused, Request, Role
from computemesh.paths import home
from computemesh.supervisor import MeshStatus, read_status

EXIT_WORK_FAILED: Final = 1
EXIT_REFUSED: Final = 2
EXIT_NO_MESH: Final = 3

CONNECT_S: Final = 3.0
ANSWER_S: Final = 10.0
"""How long a command waits for a connection, and for an answer."""

ACTING_S: Final = 6.0
"""How long a question waits for a replica that acts: the next takes over within five seconds."""

ACTING_LOOK_S: Final = 0.2

LOOK_S: Final = 0.25
"""How often it is seen whether anybody still reads our output."""

T = TypeVar("T")
Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)


class Screen(Console):
    """A console that leaves it to the program what to do when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


out = Screen(highlight=False, soft_wrap=True)
err = Screen(stderr=True, highlight=False, soft_wrap=True)


class Ordered(click.Group):
    """A group that lists its commands in the order they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class Failure(click.ClickException):
    """A failure with an exit status and, where there is one, what to do next.

    Args:
        field: path of the field at fault, when it is one.
        code: for programs, ``snake_case``; a refusal of the mesh keeps its own.
    """

    exit_code = EXIT_REFUSED
    code = "failed"

    def __init__(self, message: str, *, hint: str = "", field: str = "", code: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.field = field
        self.code = code or self.code

    def show(self, file: Any = None) -> None:
        hint = f"; {self.hint}" if self.hint else ""
        err.print(f"[bold red]error:[/] {escape(self.message + hint)}")


class WorkFailure(Failure):
    """The command did its part, the work did not end well."""

    exit_code = EXIT_WORK_FAILED
    code = "work_failed"


class NoMesh(Failure):
    """There is no mesh, or it does not answer."""

    exit_code = EXIT_NO_MESH
    code = "no_mesh"


def tell(error: click.ClickException, *, as_json: bool) -> None:
    """Says on standard error what went wrong: a line for people, or one JSON object."""
    if not as_json:
        error.show()
        return
    told = {"error": error.format_message(), "field": "", "code": "usage", "hint": "", "trace_id": ""}
    if isinstance(error, Failure):
        told |= {"field": error.field, "code": error.code, "hint": error.hint}
        if here := trace.current():  # The services' logs have it too.
            told["trace_id"] = here.trace_id
    elif isinstance(error, click.UsageError) and error.ctx is not None:
        told["hint"] = f"see `{error.ctx.command_path} --help`"
        if isinstance(error, click.BadParameter) and error.param is not None:
            told["field"] = error.param.name or ""
    click.echo(msgspec.json.encode(told), err=True)


_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escape(text: str) -> str:
    """*text* so that rich prints it as it is, and that nothing in it can steer the terminal."""
    return markup.escape(printable(text))


def one_line(text: str) -> str:
    """*text* for a place where a line break would look like a new entry."""
    return printable(" ".join(text.splitlines()))


def printable(text: str) -> str:
    """*text* with its control characters spelt out: what others sent must not steer our terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def mesh_status() -> MeshStatus:
    """The mesh that runs from this home."""
    place = home()
    status = read_status(place)
    if status is None and place.joined.exists():
        raise NoMesh(f"nothing runs in {place.root}", hint="`computemesh join` joins the same mesh again")
    if status is None:
        raise no_mesh(f"no mesh runs in {place.root}")
    return status


def no_mesh(reason: str) -> Failure:
    return NoMesh(reason, hint="start one with `computemesh up`, or set NATS_URL to one that runs")


def bus_address(role: Role) -> Where:
    """Where the mesh's bus is: ``NATS_URL`` if set, else the mesh that runs from this home.

    A machine that joined a mesh reaches it as its node only, whatever *role* is.
    """
    url = nats_url(role)
    if not url:
        status = mesh_status()
        role = Role.NODE if status.joined else role
        url = status.nats_urls[role.value]
    return Where(url=url, role=role, name="computemesh-cli")


def only_a_node(reason: str) -> Failure:
    """What a machine that joined a mesh cannot do."""
    return Failure(
        f"this machine joined the mesh as a node: it {reason}",
        hint="on the mesh's own machine `computemesh env` prints what a client needs",
        code="wrong_role",
    )


@asynccontextmanager
async def connected(role: Role = Role.CLIENT, *, on_denied: Callable[[str], None] | None = None) -> AsyncGenerator[Bus]:
    """A connection for one command.

    Args:
        on_denied: takes the server's words when it denies a subject.
    """
    bus = Bus(bus_address(role), on_denied=on_denied)
    try:
        # A server of our own that is gone is being started again; one that NATS_URL names may never come.
        await bus.connect(timeout_s=CONNECT_S, wait_for_server=not os.environ.get("NATS_URL"))
        yield bus
    except NotAdmitted as error:
        hint = "check the user and the password in NATS_URL"
        if bus.where.role is Role.NODE and not os.environ.get("NATS_URL"):
            hint = "was this node revoked? `computemesh nodes invite NAME` on the mesh's machine lets it in again"
        raise NoMesh(str(error), hint=hint, code="not_admitted") from None
    except Unreachable as error:
        raise no_mesh(str(error)) from None
    except NoResponder as error:
        raise silent(f"the mesh does not answer: {error}") from None
    except BusError as error:
        raise silent(str(error)) from None
    finally:
        await bus.close()


def silent(reason: str) -> NoMesh:
    return NoMesh(reason, hint="`computemesh doctor` looks for the cause", code="no_answer")


async def ask(
    bus: Bus,
    request: Request[Q, R],
    question: Q,
    *,
    timeout_s: float = ANSWER_S,
    acting: bool = False,
    **failures: type[Failure],
) -> R:
    """The answer; a refusal ends the command.

    Args:
        acting: only the replica that acts answers: while there is none, wait a little for the next.
        failures: by the code of a refusal, what ends the command instead.
    """
    if bus.where.role is Role.NODE and Role.NODE not in request.asked_by:
        raise only_a_node(f"may not ask {request.subject}")
    answer: R | Refused
    if acting:
        answer = await _acting(bus, request, question, timeout_s)
    else:
        answer = await bus.ask(request, question, timeout_s=timeout_s)
    if isinstance(answer, Refused):
        raise refusal(answer, kind=failures.get(answer.code, Failure))
    return answer


async def _acting(bus: Bus, request: Request[Q, R], question: Q, timeout_s: float) -> R | Refused:
    until_s = time.monotonic() + ACTING_S
    told = False
    while True:
        try:
            return await bus.ask(request, question, timeout_s=timeout_s)
        except NoResponder:
            if time.monotonic() > until_s:
                raise
        if not told:
            notice(f"no {request.service.name} acts at the moment; waiting for one")
            told = True
        await asyncio.sleep(ACTING_LOOK_S)


def notice(text: str) -> None:
    """Says something beside what the command prints, on standard error: a line, or an object where errors are JSON."""
    context = click.get_current_context(silent=True)
    if context is not None and context.params.get("as_json"):
        click.echo(msgspec.json.encode({"notice": text}), err=True)
    else:
        err.print(f"[dim]{escape(text)}[/]")


def refusal(answer: Refused, *, where: str = "", kind: type[Failure] = Failure) -> Failure:
    """A refusal as the failure of this command; *where* stands in front."""
    told = answer.reason.startswith((f"{answer.field}:", f"Missing required field: {answer.field}"))
    field = "" if told or not answer.field else f"{answer.field}: "
    hint = "try again in a moment" if answer.retry == "later" else ""
    return kind(f"{where}{field}{answer.reason}", hint=hint, field=answer.field, code=answer.code)


def run(command: Coroutine[Any, Any, T]) -> T:
    """Runs an asynchronous command, in a trace of its own."""
    trace.enter(trace.begin())
    try:
        return uvloop.run(command)
    except ConfigError as error:
        raise Failure(str(error)) from None


def once(asking: Callable[[Bus], Coroutine[Any, Any, T]], role: Role = Role.CLIENT) -> T:
    """What *asking* gives, over a connection of its own."""

    async def fetch() -> T:
        async with connected(role) as bus:
            return await asking(bus)

    return run(fetch())


def print_json(value: Any) -> None:
    """Machine-readable output, one document."""
    text = msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode()
    click.echo(text)


Cell = str | Text
"""One place in a table; text is shown as it is, whatever stands in it."""


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, right: Sequence[str] = ()) -> None:
    """A plain table; columns in *right* are aligned to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=column != columns[-1])
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(one_line(cell)) for cell in row))
    (out if sys.stdout.isatty() else _wide()).print(made)


def _wide() -> Screen:
    """Piped output is never folded."""
    return Screen(highlight=False, soft_wrap=True, width=400, file=sys.stdout)


def ago(at: float) -> str:
    """How long ago a Unix time was, roughly."""
    return lasting(time.time() - at) if at else "-"


def lasting(seconds: float) -> str:
    """A duration, roughly: ``12s``, ``3m``, ``2h``, ``5d``."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


STATE_COLOURS: Final[Mapping[str, str]] = {
    "ready": "green", "online": "green", "completed": "green",
    "running": "cyan", "assigned": "cyan", "starting": "yellow", "pending": "yellow", "retrying": "yellow",
    "suspect": "yellow", "waiting": "yellow", "rejected": "red", "failed": "red", "dead": "red", "lost": "red",
    "restarting": "yellow", "draining": "magenta", "cancelled": "magenta", "stopped": "dim", "idle": "dim",
}  # fmt: skip


def coloured(state: str) -> str:
    """A state as rich's markup."""
    return f"[{STATE_COLOURS.get(state, 'default')}]{escape(state)}[/]"


def state_cell(state: str, more: str = "") -> Text:
    """A state for a table, with *more* behind it."""
    return Text(state, STATE_COLOURS.get(state, "default")) + Text(more, "default")


def bail(status: int) -> NoReturn:
    sys.exit(status)


async def first_of(*waits: Coroutine[Any, Any, Any]) -> None:
    """Returns when the first of these does, or raises what it raised; the others are cancelled and ended."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def reader_gone() -> None:
    """Returns when the program that reads our output has gone, also while there is nothing to print."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    while True:
        if any(happened & (select.POLLERR | select.POLLNVAL) for _, happened in poll.poll(0)):
            return
        await asyncio.sleep(LOOK_S)


async def unless(stop: Callable[[], bool], wait: Coroutine[Any, Any, T]) -> T | None:
    """What *wait* gives; None as soon as *stop* holds."""
    task = asyncio.ensure_future(wait)
    try:
        while not stop():
            done, _ = await asyncio.wait({task}, timeout=0.02)
            if done:
                return task.result()
        return None
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def is_mapping(value: Any) -> TypeGuard[dict[Any, Any]]:
    return isinstance(value, dict)
