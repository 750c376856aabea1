"""``submit`` and ``work``: what is to be done, and what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import Any, Final

import click
import msgspec
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from computemesh import trace
from computemesh.bus import Bus, BusError
from computemesh.cli import common, complete, intake
from computemesh.cli.common import (
    EXIT_WORK_FAILED,
    Failure,
    WorkFailure,
    ago,
    coloured,
    err,
    out,
    print_json,
    state_cell,
    table,
)
from computemesh.contracts import work
from computemesh.contracts.base import Refused, convert
from computemesh.contracts.work import (
    FINAL,
    WorkCancel,
    WorkGet,
    WorkItem,
    WorkList,
    WorkProgress,
    WorkRecord,
    WorkState,
)
from computemesh.ids import new_id

LOOK_AGAIN_S: Final = 5.0
"""How often a waiting command asks for the state, in case it missed the event."""


@click.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--prompt", "-p", help="Ask a model: work of type inference with this prompt.")
@click.option(
    "--model", "-m", default="", help="Model name; left out, any a node offers.", shell_complete=complete.models
)
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer, with --prompt.")
@click.option("--priority", type=click.IntRange(0, work.PRIORITY_MAX), help="0 to 9; 9 goes first.")
@click.option("--work-id", help="Idempotency key: the same id is one item, however often it is submitted.")
@click.option("--wait", "-w", is_flag=True, help="Show progress and print the result.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=None, help="Give up waiting after seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
def submit(
    file: str | None,
    prompt: str | None,
    model: str,
    max_tokens: int | None,
    priority: int | None,
    work_id: str | None,
    wait: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Submit work: from a JSON or YAML FILE (`-` for standard input), or with --prompt.

    \b
      computemesh submit --prompt "Name three uses of a mesh." --wait
      computemesh submit task.yaml
      echo '{"work_type": "inference", "payload": {"prompt": "Hi"}}' | computemesh submit -

    A YAML file may hold several items; `computemesh call work.request --schema` shows the fields of an item.
    Options given here count for all items.

    Exit status: 0 all went well, 1 an item failed, 2 refused, 3 no mesh.
    """
    if (file is None) == (prompt is None):
        raise click.UsageError("give a FILE or --prompt")
    extra = {key: value for key, value in (("priority", priority), ("work_id", work_id)) if value is not None}
    if model:
        extra["model_name"] = model
    if prompt is not None:
        payload: dict[str, Any] = {"prompt": prompt}
        if max_tokens:
            payload["max_tokens"] = max_tokens
        items = [_item({"work_type": "inference", "payload": payload, **extra}, "")]
    else:
        assert file is not None
        items = [_item({**fields, **extra}, where) for where, fields in read_items(file)]
    records = common.run(_submit(items, wait=wait, timeout_s=timeout))
    if as_json:
        print_json(records if len(records) > 1 else records[0])
    elif wait:
        for record in records:
            _print_outcome(record)
    else:
        for record in records:
            out.print(f"{record.work_id} {coloured(record.state)}")
    if any(record.state in FINAL and record.state is not WorkState.COMPLETED for record in records):
        common.bail(EXIT_WORK_FAILED)


def read_items(file: str) -> list[tuple[str, dict[str, Any]]]:
    """The items of a JSON or YAML file, each with where it stands."""
    found: list[tuple[str, dict[str, Any]]] = []
    for where, document in intake.documents(intake.read_bytes(file), file):
        items: list[Any] = list(document) if isinstance(document, list) else [document]  # pyright: ignore[reportUnknownArgumentType]
        for item in items:
            try:
                found.append((where, msgspec.convert(item, dict[str, Any])))
            except msgspec.ValidationError as error:
                raise Failure(f"{where}: a work item is a mapping: {error}", code="bad_file") from None
    if not found:
        raise Failure(f"{file}: no work item in it", code="bad_file")
    return found


def _item(fields: dict[str, Any], where: str) -> WorkItem:
    item = intake.message(fields, WorkItem, where)
    return item if item.work_id else msgspec.structs.replace(item, work_id=new_id("w"))


async def _submit(items: list[WorkItem], *, wait: bool, timeout_s: float | None) -> list[WorkRecord]:
    async with common.connected() as bus:
        if not wait:
            return [await common.ask(bus, work.REQUEST, item) for item in items]
        return await asyncio.gather(*(submit_and_wait(bus, item, timeout_s=timeout_s) for item in items))


async def submit_and_wait(bus: Bus, item: WorkItem, *, timeout_s: float | None, live: bool = True) -> WorkRecord:
    """Submits an item and follows it to its end, with a progress line on the terminal.

    Args:
        live: show that line; not where other output would run through it.

    Raises:
        Failure: refused, or not finished in time.
    """
    work_id = item.work_id or new_id("w")
    item = msgspec.structs.replace(item, work_id=work_id)
    follower = Follower(work_id)
    await bus.subscribe(work.STATE, follower.on_state, target=work_id)
    await bus.subscribe(work.PROGRESS, follower.on_progress)
    await bus.flush()
    follower.on_record(await common.ask(bus, work.REQUEST, item))
    return await follower.wait(bus, timeout_s, live=live and sys.stderr.isatty())


class Follower:
    """Follows one item to its end."""

    def __init__(self, work_id: str) -> None:
        self._work_id = work_id
        self._record: WorkRecord | None = None
        self._done = asyncio.Event()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    async def on_state(self, record: WorkRecord) -> None:
        self.on_record(record)

    def on_record(self, record: WorkRecord) -> None:
        # The answer to the submission may come after the outcome of a quick item.
        if self._done.is_set():
            return
        self._record = record
        self._show(f"{record.state}" + (f" on {record.node_id}" if record.node_id else ""))
        if record.state in FINAL:
            self._done.set()

    async def on_progress(self, report: WorkProgress) -> None:
        if report.work_id == self._work_id:
            self._show(f"running on {report.node_id}  {report.message}", report.fraction)

    async def wait(self, bus: Bus, timeout_s: float | None, *, live: bool) -> WorkRecord:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn())
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        with Progress(*columns, console=err, transient=True, disable=not live) as self._progress:
            self._task = self._progress.add_task(f"{self._work_id} submitted", total=1.0)
            while not self._done.is_set():
                left_s = LOOK_AGAIN_S if until_s is None else min(LOOK_AGAIN_S, until_s - time.monotonic())
                if left_s <= 0:
                    raise WorkFailure(
                        f"{self._work_id} is not finished after {timeout_s:g} s",
                        hint=f"it goes on; see `computemesh work show {self._work_id}`",
                    )
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._done.wait(), left_s)
                    break
                await self._look(bus)
        assert self._record is not None
        return self._record

    async def _look(self, bus: Bus) -> None:
        with contextlib.suppress(BusError):
            answer = await bus.ask(work.GET, WorkGet(work_id=self._work_id))
            if isinstance(answer, WorkRecord):
                self.on_record(answer)
            if isinstance(answer, WorkRecord) and answer.state is WorkState.PENDING:
                why = await bus.ask(work.EXPLAIN, WorkGet(work_id=self._work_id))
                if isinstance(why, work.WorkExplanation):
                    self._show(f"pending: {why.summary}")

    def _show(self, text: str, fraction: float | None = None) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=common.escape(f"{self._work_id} {text}"))
            if fraction is not None:
                self._progress.update(self._task, completed=fraction)


def answer_text(record: WorkRecord) -> str:
    """What a person wants to see of an outcome: the model's words, or the result as JSON."""
    if record.state is not WorkState.COMPLETED:
        return record.error.reason if record.error else str(record.state)
    result: Any = record.result
    with contextlib.suppress(KeyError, TypeError):
        return "\n\n".join(str(item["output"]) for item in result["items"])
    return msgspec.json.format(msgspec.json.encode(result), indent=2).decode()


def print_answer(record: WorkRecord) -> None:
    """The answer as it is for programs, and without control characters for a terminal."""
    text = answer_text(record)
    click.echo(common.printable(text) if sys.stdout.isatty() else text)


def _print_outcome(record: WorkRecord) -> None:
    if record.state is WorkState.COMPLETED:
        print_answer(record)
    else:
        err.print(f"[bold red]{record.work_id} {record.state}:[/] {common.escape(answer_text(record))}")


def _verdict(verdict: work.NodeVerdict) -> str:
    reasons = "; ".join(verdict.reasons)
    return f"fits: {reasons}" if verdict.fits else reasons


@click.group(name="work", cls=common.Ordered)
def work_group() -> None:
    """Look at work items and cancel them."""


@work_group.command(name="list")
@click.option("--status", type=click.Choice([state.value for state in WorkState]), help="Only items in this state.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most this many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_items(status: str | None, limit: int, as_json: bool) -> None:
    """List work items, the newest first."""

    async def fetch() -> work.WorkItems:
        async with common.connected() as bus:
            return await common.ask(bus, work.LIST, WorkList(status=WorkState(status) if status else None, limit=limit))

    found = common.run(fetch())
    if as_json:
        print_json(found)
        return
    if not found.items:
        out.print("No work items." if status is None else f"No {status} work items.")
        return
    rows = [
        (i.work_id, state_cell(i.state), i.work_type, i.model_name or "-", str(i.priority), str(i.attempt),
         i.node_id or "-", ago(i.submitted_at), i.error.reason[:80] if i.error else "")
        for i in found.items
    ]  # fmt: skip
    table(
        ["work id", "state", "type", "model", "prio", "attempt", "node", "age", "last error"],
        rows,
        right=["prio", "attempt", "age"],
    )
    if found.count > len(found.items):
        err.print(f"{found.count - len(found.items)} more; see --limit")


@work_group.command()
@click.argument("work_id", shell_complete=complete.work_ids)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(work_id: str, as_json: bool) -> None:
    """Show one item: its story and its result; while it is not finished, also why it waits."""

    ask = _get(work_id)

    async def fetch() -> tuple[WorkRecord, work.WorkExplanation]:
        async with common.connected() as bus:
            return await common.ask(bus, work.GET, ask), await common.ask(bus, work.EXPLAIN, ask)

    record, why = common.run(fetch())
    if as_json:
        print_json(record)
        return
    what = common.escape(f"{record.work_type} {record.model_name}".strip())
    out.print(f"{record.work_id}  {coloured(record.state)}  {what}")
    here = trace.parse(record.traceparent) or trace.of_work(record.work_id)
    out.print(f"[dim]trace {here.trace_id}: in the logs of all that had to do with it[/]")
    if record.state not in FINAL:
        out.print(common.escape(why.summary))
        for verdict in why.nodes:
            out.print(f"  {verdict.node_id}: {common.escape(_verdict(verdict))}")
    out.print()
    rows = [
        (f"{move.at - record.submitted_at:+.3f} s", state_cell(move.state), str(move.attempt or "-"),
         move.node_id or "-", move.reason)
        for move in record.story
    ]  # fmt: skip
    table(["when", "state", "attempt", "node", "why"], rows, right=["when", "attempt"])
    if record.state in FINAL:
        click.echo()
        print_answer(record)


@work_group.command()
@click.argument("work_id", shell_complete=complete.work_ids)
@click.option("--reason", default="", help="Why; kept in the item's story.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cancel(work_id: str, reason: str, as_json: bool) -> None:
    """Cancel an item and end what runs of it."""

    ask = WorkCancel(work_id=_get(work_id).work_id, reason=reason)

    async def fetch() -> WorkRecord:
        async with common.connected() as bus:
            return await common.ask(bus, work.CANCEL, ask)

    record = common.run(fetch())
    if as_json:
        print_json(record)
    else:
        out.print(f"{record.work_id} {coloured(record.state)}")


def _get(work_id: str) -> WorkGet:
    """A checked question: an id that is none is refused before anything is asked."""
    ask = convert({"work_id": work_id}, WorkGet)
    if isinstance(ask, Refused):
        raise common.refusal(ask)
    return ask
