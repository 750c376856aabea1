"""What all commands share: finding the mesh, talking to it, printing, and failing well."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import urlsplit

import click
import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from computemesh.bus import Bus, BusError, NoResponder, Unreachable, Where
from computemesh.config import ConfigError
from computemesh.contracts.base import Message, Refused, Request, Role
from computemesh.paths import home
from computemesh.supervisor import MeshStatus, read_status

EXIT_WORK_FAILED: Final = 1
EXIT_REFUSED: Final = 2
EXIT_NO_MESH: Final = 3

CONNECT_S: Final = 3.0

T = TypeVar("T")
Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Failure(click.ClickException):
    """A failure with an exit status and, where there is one, what to do next."""

    exit_code = EXIT_REFUSED

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def show(self, file: Any = None) -> None:
        hint = f"; {self.hint}" if self.hint else ""
        err.print(f"[bold red]error:[/] {escape(self.message + hint)}")


class WorkFailure(Failure):
    """The command did its part, the work did not end well."""

    exit_code = EXIT_WORK_FAILED


class NoMesh(Failure):
    """There is no mesh, or it does not answer."""

    exit_code = EXIT_NO_MESH


def escape(text: str) -> str:
    """*text* so that rich prints it as it is."""
    return text.replace("[", "\\[")


def mesh_status() -> MeshStatus:
    """The mesh that runs from this home."""
    status = read_status(home())
    if status is None:
        raise no_mesh(f"no mesh runs in {home().root}")
    return status


def no_mesh(reason: str) -> Failure:
    return NoMesh(reason, hint="start one with `computemesh up`, or set NATS_URL to one that runs")


def bus_address(role: Role) -> Where:
    """Where the mesh's bus is: ``NATS_URL`` if set, else the mesh that runs from this home."""
    url = os.environ.get("NATS_URL") or mesh_status().nats_urls[role.value]
    user = urlsplit(url).username or ""
    # The credentials decide the inbox, so they decide the role.
    known = Role(user) if user in set(Role) else role
    return Where(url=url, role=known, name="computemesh-cli")


@asynccontextmanager
async def connected(role: Role = Role.CLIENT) -> AsyncGenerator[Bus]:
    """A connection for one command."""
    bus = Bus(bus_address(role))
    try:
        await bus.connect(timeout_s=CONNECT_S)
        yield bus
    except Unreachable as error:
        raise no_mesh(str(error)) from None
    except NoResponder as error:
        raise NoMesh(f"the mesh does not answer: {error}", hint="see `computemesh status`") from None
    except BusError as error:
        raise NoMesh(str(error), hint="see `computemesh status`") from None
    finally:
        await bus.close()


async def ask(bus: Bus, request: Request[Q, R], question: Q) -> R:
    """The answer; a refusal ends the command."""
    answer = await bus.ask(request, question, timeout_s=10.0)
    if isinstance(answer, Refused):
        raise refusal(answer)
    return answer


def refusal(answer: Refused) -> Failure:
    field = f"{answer.field}: " if answer.field else ""
    hint = "try again in a moment" if answer.retry == "later" else ""
    return Failure(f"{field}{answer.reason}", hint=hint)


def run(command: Coroutine[Any, Any, T]) -> T:
    """Runs an asynchronous command."""
    try:
        return uvloop.run(command)
    except ConfigError as error:
        raise Failure(str(error)) from None


def print_json(value: Any) -> None:
    """Machine-readable output, one document."""
    text = msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode()
    click.echo(text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A plain table; columns in *right* are aligned to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=column != columns[-1])
    for row in rows:
        made.add_row(*row)
    (out if sys.stdout.isatty() else _wide()).print(made)


def _wide() -> Console:
    """Piped output is never folded."""
    return Console(highlight=False, soft_wrap=True, width=400, file=sys.stdout)


def ago(at: float) -> str:
    """How long ago a Unix time was, roughly."""
    if not at:
        return "-"
    seconds = max(0.0, time.time() - at)
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


STATE_COLOURS: Final[Mapping[str, str]] = {
    "ready": "green", "online": "green", "completed": "green",
    "running": "cyan", "assigned": "cyan", "starting": "yellow", "pending": "yellow", "retrying": "yellow",
    "suspect": "yellow", "waiting": "yellow", "failed": "red", "dead": "red", "lost": "red",
    "cancelled": "magenta", "stopped": "dim",
}  # fmt: skip


def coloured(state: str) -> str:
    return f"[{STATE_COLOURS.get(state, 'default')}]{state}[/]"


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
