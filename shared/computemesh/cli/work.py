"""``submit`` and ``work``: what is to be done, and what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import click
import msgspec
from msgspec.structs import replace
from rich.console import Group, RenderableType
from rich.text import Text

from computemesh import mloc, trace, yamltext
from computemesh.bus import Bus
from computemesh.cli import common, complete, intake, outputs, tables, watch
from computemesh.cli.common import (
    EXIT_WORK_FAILED,
    Failure,
    ago,
    coloured,
    err,
    is_list,
    is_mapping,
    out,
    print_json,
    state_cell,
    table,
)
from computemesh.cli.waiting import Follower, all_well
from computemesh.contracts import nodes, work
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.work import (
    FINAL,
    NodeVerdict,
    WorkCancel,
    WorkExplanation,
    WorkGet,
    WorkItem,
    WorkList,
    WorkRecord,
    WorkState,
)
from computemesh.ids import new_id

AT_ONCE: Final = 32
"""Items that are submitted at the same time."""

LIST_MAX: Final = 1000
"""Items asked for in one page of a list."""

VERDICT_COLUMNS: Final = (
    tables.Column(title="node"),
    tables.Column(title="verdict"),
    tables.Column(title="score", right=True, rank=1),
    tables.Column(title="why"),
)


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
    A task of MLOC (`apiVersion`, `kind`, `spec`) is an item, too. Options given here count for all items. A
    payload that is too large for a message goes to the object store first.

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
        items = [_item(yamltext.Document({"work_type": "inference", "payload": payload}), extra, "")]
    else:
        assert file is not None
        items = read_items(file, extra)
    records = common.run(_submit(items, wait=wait, timeout_s=timeout, whole=not as_json and not sys.stdout.isatty()))
    if as_json:
        print_json(records if len(records) > 1 else records[0])
    elif wait:
        for record in records:
            _print_outcome(record)
    else:
        for record in records:
            out.print(f"{record.work_id} {coloured(record.state)}")
    if not all_well(records):
        common.bail(EXIT_WORK_FAILED)


def read_items(file: str, extra: Mapping[str, Any]) -> list[WorkItem]:
    """The items of a JSON or YAML file, or of one with MLOC's tasks.

    Args:
        extra: fields of an item that count for all of them.
    """
    found: list[WorkItem] = []
    for where, document in intake.documents(intake.read_bytes(file), file):
        if is_mapping(document.value) and mloc.is_task(document.value):
            found.append(_task(document, extra, where))
        elif is_list(document.value):
            found += [_item(document, extra, where, f"[{at}]") for at in range(len(document.value))]
        else:
            found.append(_item(document, extra, where))
    if not found:
        raise Failure(f"{file}: no work item in it", code="bad_file")
    return found


def _task(document: yamltext.Document, extra: Mapping[str, Any], where: str) -> WorkItem:
    item = mloc.item_of(document)
    if isinstance(item, Refused):
        raise common.refusal(item, where=f"{where}: ")
    return _with_id(replace(item, **extra))


def _item(document: yamltext.Document, extra: Mapping[str, Any], where: str, at: str = "") -> WorkItem:
    """The item that a document is, or a list in it has at a place such as ``[0]``."""
    fields = document.value[int(at[1:-1])] if at else document.value
    if not is_mapping(fields):
        raise Failure(
            f"{where}: {at + ': ' if at else ''}a work item is a mapping of fields", field=at, code="bad_file"
        )
    if mloc.is_task(fields):
        return _task(yamltext.Document(fields), extra, where)

    def placed(path: str) -> yamltext.Place | None:
        return document.place(".".join(filter(None, [at, path])))

    return _with_id(intake.message({**fields, **extra}, WorkItem, where, placed))


def _with_id(item: WorkItem) -> WorkItem:
    return item if item.work_id else replace(item, work_id=new_id("w"))


async def _submit(items: list[WorkItem], *, wait: bool, timeout_s: float | None, whole: bool) -> list[WorkRecord]:
    async with common.connected() as bus:
        if not wait:
            return await _submit_all(bus, items)
        follower = Follower([item.work_id or "" for item in items])
        await follower.subscribe(bus)
        submitting = asyncio.create_task(_submit_all(bus, items, follower.on_record))
        waiting = asyncio.create_task(follower.wait(bus, timeout_s, live=sys.stderr.isatty()))
        try:
            with follower.left_open():
                await asyncio.wait({submitting, waiting}, return_when=asyncio.FIRST_COMPLETED)
                if submitting.done():
                    submitting.result()
                records = await waiting
        finally:
            submitting.cancel()
            waiting.cancel()
            await asyncio.gather(submitting, waiting, return_exceptions=True)
        if not whole:
            return records
        return [replace(record, result=await outputs.whole_result(bus, record)) for record in records]


async def _submit_all(
    bus: Bus, items: list[WorkItem], on_taken: Callable[[WorkRecord], None] = lambda _: None
) -> list[WorkRecord]:
    """What became of each. The first refusal ends the command."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(item: WorkItem) -> WorkRecord:
        async with room:
            sendable = await outputs.sendable(bus, item)
            record = await common.ask(bus, work.REQUEST, sendable, acting=True)
            on_taken(record)
            return record

    tasks = [asyncio.create_task(one(item)) for item in items]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def submit_and_wait(bus: Bus, item: WorkItem, *, timeout_s: float | None, live: bool = True) -> WorkRecord:
    """Submits an item and follows it to its end, with a progress line on the terminal.

    Args:
        live: show that line, or say why it waits; not where other output would run through it.

    Raises:
        Failure: refused, or not finished in time.
    """
    item = _with_id(item)
    follower = Follower([item.work_id or ""])
    await follower.subscribe(bus)
    follower.on_record(await common.ask(bus, work.REQUEST, await outputs.sendable(bus, item), acting=True))
    (record,) = await follower.wait(bus, timeout_s, live=sys.stderr.isatty(), quiet=not live)
    return record


def answer_text(record: WorkRecord) -> str:
    """What a person wants to see of an outcome: the model's words, or the result as JSON."""
    if record.state is not WorkState.COMPLETED:
        return record.error.reason if record.error else str(record.state)
    result: Any = record.result
    if result is None and record.result_object is not None:
        return f"{record.result_object.size:,} bytes of JSON: `computemesh work result {record.work_id} -o FILE`"
    with contextlib.suppress(KeyError, TypeError):
        shares: list[Any] = list(result or []) if record.replicas > 1 else [result]
        return "\n\n".join(str(item["output"]) for share in shares for item in share["items"])
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


def _list_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which items are listed."""
    options = (
        click.option("--status", type=click.Choice([state.value for state in WorkState]), help="Only in this state."),
        click.option("--type", "work_type", help="Only of this type.", shell_complete=complete.work_types),
        click.option("--owner", help="Only for this owner."),
        click.option("--node", "node_id", help="Only on this node.", shell_complete=complete.node_ids),
        click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most this many."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(name="work", cls=common.Ordered, invoke_without_command=True)
@_list_options
@click.pass_context
def work_group(context: click.Context, /, limit: int, as_json: bool, **filters: Any) -> None:
    """List work items; look at one, its log and its result; cancel it; see what is blacklisted."""
    if context.invoked_subcommand is None:
        _list(filters, limit, as_json=as_json)


@work_group.command(name="list")
@_list_options
def list_items(limit: int, as_json: bool, **filters: Any) -> None:
    """List work items, the newest first."""
    _list(filters, limit, as_json=as_json)


def _list(filters: Mapping[str, Any], limit: int, *, as_json: bool) -> None:
    asked = outputs.checked({**filters, "limit": min(limit, LIST_MAX)}, WorkList)
    found = common.once(lambda bus: every_item(bus, asked, limit))
    if as_json:
        print_json(found)
        return
    if not found.items:
        out.print("No work items." if not any(filters.values()) else "No such work items.")
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


async def every_item(bus: Bus, asked: WorkList, limit: int) -> work.WorkItems:
    """The items that match, from as many pages as it takes."""
    items: list[work.WorkSummary] = []
    while True:
        page = await common.ask(bus, work.LIST, asked, acting=True)
        items += page.items
        if not page.next or len(items) >= limit:
            return replace(page, items=items[:limit])
        asked = replace(asked, after=page.next, limit=min(LIST_MAX, limit - len(items)))


@work_group.command()
@click.argument("work_id", shell_complete=complete.work_ids)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(work_id: str, as_json: bool) -> None:
    """Show one item: its story and its result; while it is not finished, also why it waits."""

    ask = _get(work_id)

    async def fetch() -> tuple[WorkRecord, work.WorkExplanation]:
        async with common.connected() as bus:
            record = await common.ask(bus, work.GET, ask, acting=True)
            return record, await common.ask(bus, work.EXPLAIN, ask, acting=True)

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
            out.print(f"  {verdict.node_id}: {common.escape(_reasons(verdict))}")
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
            return await common.ask(bus, work.CANCEL, ask, acting=True)

    record = common.run(fetch())
    if as_json:
        print_json(record)
    else:
        out.print(f"{record.work_id} {coloured(record.state)}")


@work_group.command()
@click.argument("work_id", shell_complete=complete.work_ids)
@watch.watch_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(work_id: str, watching: bool, interval: float, as_json: bool) -> None:
    """Show why an item is where it is: what each node is to it, and why."""
    ask = _get(work_id)

    async def fetch(bus: Bus, _: int | None) -> WorkExplanation:
        return await common.ask(bus, work.EXPLAIN, ask, acting=True)

    view = watch.View(fetch=fetch, draw=_explained, events=(work.STATE, nodes.LOST))
    watch.present(view, watching=watching, interval_s=interval, as_json=as_json)


def _explained(found: WorkExplanation, width: int, lines: int | None) -> RenderableType:
    head = Text.assemble(f"{found.work_id}  ", state_cell(found.state), f"  {common.one_line(found.summary)}")
    if not found.nodes:
        return head
    shown = found.nodes if lines is None else found.nodes[: max(1, lines - 4)]
    rows = [
        (one.node_id, _verdict(one), f"{one.score:.2f}" if one.fits else "-", "; ".join(one.reasons)) for one in shown
    ]
    made = tables.grid(VERDICT_COLUMNS, rows, width)
    return Group(head, "", made, *filter(None, [tables.folded(len(found.nodes), len(shown))]))


def _reasons(one: NodeVerdict) -> str:
    reasons = "; ".join(one.reasons)
    return f"fits: {reasons}" if one.fits else reasons


def _verdict(one: NodeVerdict) -> Text:
    if one.fits:
        return Text("fits", "green")
    return Text("not now", "yellow") if one.may_change else Text("never", "red")


@work_group.command()
@click.argument("work_ids", nargs=-1, required=True, shell_complete=complete.work_ids)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), help="Give up waiting after seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
def wait(work_ids: tuple[str, ...], timeout: float | None, as_json: bool) -> None:
    """Wait until items have ended, and say how.

    Exit status: 0 all completed, 1 one did not, or not in time.
    """
    asks = [_get(work_id) for work_id in dict.fromkeys(work_ids)]

    async def follow() -> list[WorkRecord]:
        async with common.connected() as bus:
            follower = Follower([ask.work_id for ask in asks])
            await follower.subscribe(bus)
            for ask in asks:
                follower.on_record(await common.ask(bus, work.GET, ask, acting=True))
            with follower.left_open():
                return await follower.wait(bus, timeout, live=sys.stderr.isatty())

    records = common.run(follow())
    if as_json:
        print_json(records if len(records) > 1 else records[0])
    else:
        for record in records:
            why = f"  {common.escape(record.error.reason)}" if record.error and not all_well([record]) else ""
            out.print(f"{record.work_id} {coloured(record.state)}{why}")
    if not all_well(records):
        common.bail(EXIT_WORK_FAILED)


work_group.add_command(outputs.logs)
work_group.add_command(outputs.result)


@work_group.command()
@click.option("--node", "node_id", help="Only of this node.", shell_complete=complete.node_ids)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def blacklist(node_id: str | None, as_json: bool) -> None:
    """List the nodes that get no work of some type for a while, as it kept failing there."""
    ask = outputs.checked({"node_id": node_id}, work.BlacklistGet)
    found = common.once(lambda bus: common.ask(bus, work.BLACKLIST, ask, acting=True))
    if as_json:
        print_json(found)
    elif not found.entries:
        out.print("Nothing is blacklisted.")
    else:
        _print_blacklist(found)


@work_group.command()
@click.argument("node_id", shell_complete=complete.node_ids)
@click.option("--type", "work_type", default="", help="Only for this type of work.", shell_complete=complete.work_types)
@click.option("--json", "as_json", is_flag=True, help="Print what was on the list.")
def pardon(node_id: str, work_type: str, as_json: bool) -> None:
    """Give a blacklisted node work again at once."""
    ask = outputs.checked({"node_id": node_id, "work_type": work_type}, work.BlacklistPardon)
    found = common.once(lambda bus: common.ask(bus, work.PARDON, ask, acting=True), Role.SERVICES)
    if as_json:
        print_json(found)
    else:
        for entry in found.entries:
            out.print(f"{entry.node_id} gets {common.escape(entry.work_type)} work again")


def _print_blacklist(found: work.Blacklist) -> None:
    now = time.time()
    rows = [
        (one.node_id, one.work_type, str(one.failures), ago(one.since), _until(one, now), one.reason)
        for one in found.entries
    ]
    table(["node", "type", "failures", "since", "tried again", "last error"], rows, right=["failures", "since"])


def _until(one: work.Blacklisted, now: float) -> str:
    if one.probing:
        return f"now, with {one.probing}"
    return f"in {common.lasting(one.until - now)}" if one.until > now else "with the next item"


def _get(work_id: str) -> WorkGet:
    """A checked question: an id that is none is refused before anything is asked."""
    asked: WorkGet = outputs.checked({"work_id": work_id}, WorkGet)
    return asked
