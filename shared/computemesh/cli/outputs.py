"""``work result`` and ``work logs``: what an item gave, and what it printed."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from pathlib import Path
from typing import Any, BinaryIO, Final

import click
import msgspec
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from computemesh.bus import Bus, BusError
from computemesh.cli import common, complete
from computemesh.cli.common import Failure, WorkFailure, err, print_json
from computemesh.contracts import work
from computemesh.contracts.base import Refused, Role, convert, encode
from computemesh.contracts.work import (
    FINAL,
    INLINE_BYTES_MAX,
    LOG_WAIT_S_MAX,
    ObjectRef,
    WorkGet,
    WorkItem,
    WorkLogs,
    WorkLogsGet,
    WorkRecord,
    WorkResult,
)
from computemesh.objects import ObjectError, download, get_on, parts, put_on, result_pieces, upload

AWAY_S_MAX: Final = 60.0
"""How long a log that is followed may be out of reach before the command gives up."""

AGAIN_S: Final = 0.5
"""Pause before a log is asked for again that could not be read, or whose item has no new attempt yet."""


# --- results -------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("work_id", shell_complete=complete.work_ids)
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write it into this file."
)
@click.option("--json", "as_json", is_flag=True, help="Errors as JSON; the result always is.")
def result(work_id: str, output: Path | None, as_json: bool) -> None:
    """Print the result of an item that has completed, as JSON, whatever its size.

    Exit status: 0 here it is, 1 the item ended without one, 2 there is no such item or it has not ended.
    """
    ask = checked({"work_id": work_id}, WorkGet)
    common.run(_result(ask, output))


async def _result(ask: WorkGet, output: Path | None) -> None:
    async with common.connected() as bus:
        answer = await _answer(bus, ask)
        pieces = result_pieces(answer)
        if output is None and len(pieces) == 1 and isinstance(pieces[0], bytes):
            print_json(answer.result)
            return
        if output is None:
            await _write(bus, pieces, sys.stdout.buffer)
            sys.stdout.buffer.write(b"\n")
            sys.stdout.flush()
            return
        new = output.with_name(f".{output.name}.new")
        try:
            with new.open("wb") as file:
                await _write(bus, pieces, file)
            new.replace(output)
        except OSError as error:
            raise Failure(f"{output}: {(error.strerror or 'cannot be written').lower()}", field="output") from None
        finally:
            with contextlib.suppress(OSError):
                new.unlink()
        err.print(common.escape(f"{output}: {size_of(pieces):,} bytes"))


async def _answer(bus: Bus, ask: WorkGet) -> WorkResult:
    """The result; where there is none yet, the failure says why."""
    while True:
        try:
            return await common.ask(bus, work.RESULT, ask, acting=True, no_result=WorkFailure)
        except Failure as failure:
            if failure.code != "not_finished":
                raise
        why = await common.ask(bus, work.EXPLAIN, ask, acting=True)
        if why.state not in FINAL:
            raise Failure(
                f"{ask.work_id} is {why.state}: {why.summary}",
                hint=f"wait for it with `computemesh work wait {ask.work_id}`",
                field="work_id",
                code="not_finished",
            )


async def _write(bus: Bus, pieces: list[bytes | ObjectRef], file: BinaryIO) -> None:
    with transfer("result", size_of(pieces)) as (bars, bar):
        for piece in pieces:
            if not isinstance(piece, ObjectRef):
                file.write(piece)
                continue
            try:
                async with aclosing(parts(get_on(bus), piece)) as found:
                    async for data in found:
                        file.write(data)
                        bars.advance(bar, len(data))
            except ObjectError as error:
                raise common.refusal(error.refused) from None


def size_of(pieces: list[bytes | ObjectRef]) -> int:
    """Bytes of all pieces together."""
    return sum(piece.size if isinstance(piece, ObjectRef) else len(piece) for piece in pieces)


@contextlib.contextmanager
def transfer(what: str, size: int) -> Generator[tuple[Progress, TaskID]]:
    """A bar for bytes on their way, where a person looks."""
    columns = (TextColumn(what), BarColumn(24), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True, disable=not sys.stderr.isatty()) as bars:
        bar: TaskID = bars.add_task(what, total=size)
        yield bars, bar


async def whole_result(bus: Bus, record: WorkRecord) -> Any:
    """The result of a record, also one that is in the object store."""
    if record.result_object is None:
        return record.result
    with transfer(f"result of {record.work_id}", record.result_object.size) as (bars, bar):
        try:
            data = await download(
                get_on(bus), record.result_object, on_progress=lambda done, _: bars.update(bar, completed=done)
            )
        except ObjectError as error:
            raise common.refusal(error.refused) from None
    return msgspec.json.decode(data)


async def sendable(bus: Bus, item: WorkItem) -> WorkItem:
    """The item as it fits a message: a large payload goes to the object store first."""
    if len(encode(item)) <= INLINE_BYTES_MAX or item.payload_object is not None or not item.payload:
        return item
    payload = encode(item.payload)
    with transfer(f"payload of {item.work_id}", len(payload)) as (bars, bar):
        try:
            ref = await upload(put_on(bus), payload, on_progress=lambda done, _: bars.update(bar, completed=done))
        except ObjectError as error:
            raise common.refusal(error.refused) from None
    return msgspec.structs.replace(item, payload={}, payload_object=ref)


# --- logs ----------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("work_id", shell_complete=complete.work_ids)
@click.option("--follow", "-f", is_flag=True, help="Go on until the item has ended, through all its attempts.")
@click.option("--attempt", type=click.IntRange(1), help="Which attempt; left out, the latest.")
@click.option(
    "--replica", type=click.IntRange(0, work.REPLICAS_MAX - 1), default=0, show_default=True, help="Which replica."
)
@click.option("--json", "as_json", is_flag=True, help="Each part as a JSON document, a line each.")
def logs(work_id: str, follow: bool, attempt: int | None, replica: int, as_json: bool) -> None:
    """Print what an item has printed: the output of its latest attempt, while it runs and afterwards.

    Nothing in it can steer the terminal; a pipe gets it as it is. What services and engines print: `computemesh logs`.
    """
    ask = checked({"work_id": work_id, "replica": replica, "attempt": attempt}, WorkLogsGet)

    async def show() -> None:
        async with aclosing(_parts(ask, follow=follow)) as found:
            async for part in found:
                _print(part, as_json=as_json)

    common.run(common.first_of(show(), common.reader_gone()))


def _print(part: WorkLogs, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.buffer.write(encode(part) + b"\n")
        sys.stdout.flush()
    elif part.text:
        click.echo(common.printable(part.text) if sys.stdout.isatty() else part.text, nl=False)


async def _parts(ask: WorkLogsGet, *, follow: bool) -> AsyncGenerator[WorkLogs]:
    """The parts of a log; following it, those of all attempts from now on."""
    async with common.connected() as bus:
        if bus.where.role is Role.NODE:
            raise common.only_a_node(f"may not ask {work.LOGS.subject}")
        named = ask.attempt is not None
        while True:
            part = await _part(bus, ask, follow=follow)
            if part.attempt:  # The one it began with, also when another begins meanwhile.
                ask = msgspec.structs.replace(ask, attempt=part.attempt)
            if part.offset > ask.offset:
                common.notice(f"the first {part.offset:,} bytes are not kept")
            yield part
            ask = msgspec.structs.replace(ask, offset=part.next, wait_s=LOG_WAIT_S_MAX if follow else 0.0)
            if not part.complete:
                if follow or part.text:
                    continue
                return
            if not follow or named:
                return
            following = await _next_attempt(bus, ask)
            if following is None:
                return
            common.notice(f"attempt {following}:")
            ask = msgspec.structs.replace(ask, attempt=following, offset=0)


async def _part(bus: Bus, ask: WorkLogsGet, *, follow: bool) -> WorkLogs:
    """A part; one that is followed is asked for again while its node or the mesh is away."""
    until_s = time.monotonic() + AWAY_S_MAX
    while True:
        failure: Exception
        try:
            answer = await bus.ask(work.LOGS, ask, timeout_s=ask.wait_s + common.ANSWER_S)
            if isinstance(answer, WorkLogs):
                return answer
            failure = common.refusal(answer)
            if answer.retry != "later":
                raise failure
        except BusError as error:
            failure = error
        if time.monotonic() > (until_s if follow else until_s - AWAY_S_MAX + common.ACTING_S):
            raise failure
        await asyncio.sleep(AGAIN_S)


async def _next_attempt(bus: Bus, ask: WorkLogsGet) -> int | None:
    """The number of the attempt that follows the one that has ended, once there is one; None: the item has ended."""
    while True:
        record = await common.ask(bus, work.GET, WorkGet(work_id=ask.work_id), acting=True)
        if record.attempt > (ask.attempt or 0):
            return record.attempt
        if record.state in FINAL:
            return None
        await asyncio.sleep(AGAIN_S)


def checked(fields: dict[str, Any], kind: Any) -> Any:
    """A checked question: an id that is none is refused before anything is asked."""
    ask = convert({name: value for name, value in fields.items() if value is not None}, kind)
    if isinstance(ask, Refused):
        raise common.refusal(ask)
    return ask
