"""``gpus``: GPU memory of the mesh, who has it, and reserving some of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import click
import msgspec
from rich.console import RenderableType

from computemesh.bus import Bus, BusError, TimedOut
from computemesh.cli import access, common, complete, gpu_views, tables, watch
from computemesh.cli.common import Failure, err, out, print_json
from computemesh.cli.nodes import Label, UpperChoice
from computemesh.cli.sizes import Size
from computemesh.contracts import gpus, nodes
from computemesh.contracts.base import Message, Refused, convert
from computemesh.contracts.gpus import (
    GpuCanFit,
    GpuList,
    GpuRelease,
    GpuRenew,
    GpuReservation,
    GpuReservations,
    GpuReserve,
    GpuStates,
    GpuStatesQuery,
)
from computemesh.contracts.nodes import NodeGet
from computemesh.hardware import Platform, Tier
from computemesh.ids import new_id, token_from
from computemesh.paths import home
from computemesh.process import dies_with_parent
from computemesh.supervisor import read_status

T = TypeVar("T")
M = TypeVar("M", bound=Message)

EXIT_NO: Final = common.EXIT_WORK_FAILED
"""``gpus fit``: it does not."""

ASKED_AGAIN: Final = 3
"""An answer may be lost: under the same id it is safe to ask again."""

RENEW_SHARE: Final = 3.0
"""A reservation that is held is renewed so many times before it would end."""

RENEW_AGAIN_S: Final = 1.0

STATES_PAGE: Final = 1000
LIST_PAGE: Final = 1000

EVENTS: Final = (gpus.RESERVED, gpus.RELEASED, gpus.PRESSURE)
"""What changes what is shown."""


class Indices(click.ParamType[list[int]]):
    """GPUs by index: ``0,1``."""

    name = "indices"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if not isinstance(value, str):
            return list(value)
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isdecimal() for part in parts):
            self.fail(f"{value!r} is no list of GPUs: write indices, as in 0,1", param, ctx)
        return [int(part) for part in parts]


def _needs(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what is needed."""
    for option in reversed((
        click.option("--mb", "required_mb", type=Size(), required=True, metavar="SIZE",
                     help="Memory of each GPU: MiB, or with a unit, as in 24GiB."),
        click.option("--gpus", "gpu_indices", type=Indices(), metavar="0,1", help="Exactly these GPUs of a node."),
        click.option("--count", "gpu_count", type=click.IntRange(1), help="So many GPUs of one node; left out, 1."),
        click.option("--node", "node_id", type=access.NodeName(), help="Only this node.",
                     shell_complete=complete.node_ids),
        click.option("--nvlink", "prefer_nvlink", is_flag=True, help="Of several GPUs, rather those NVLink joins."),
        click.option("--require-nvlink", is_flag=True, help="Only GPUs that NVLink (or Infinity Fabric) joins."),
        click.option("--min-tier", type=UpperChoice([t.value for t in Tier]), help="Only nodes of this tier or above."),
        click.option("--platform", type=UpperChoice([p.value for p in Platform]), help="Only this platform."),
        click.option("--min-cc", "min_compute_capability", metavar="X.Y", help="At least this compute capability."),
        click.option("--min-vram", "min_vram_mb", type=Size(), help="Only GPUs with so much memory in all."),
        click.option("--label", "labels", multiple=True, type=Label(), help="Only nodes with this label."),
        click.option("--owner", help="For whom, where owners have quotas.", shell_complete=complete.owners),
    )):  # fmt: skip
        command = option(command)
    return command


def _question(fields: Mapping[str, Any], kind: type[M]) -> M:
    """What the options ask for; what they cannot check the contract does."""
    given = {name: value for name, value in fields.items() if value is not None}
    if "labels" in given:
        given["labels"] = dict(given["labels"])
    question = convert(given, kind)
    if isinstance(question, Refused):
        raise common.refusal(question)
    return question


# --- what there is -----------------------------------------------------------------------------------------------


@click.group(name="gpus", cls=common.Ordered, invoke_without_command=True)
@click.option("--node", "node_id", type=access.NodeName(), help="Only this node.", shell_complete=complete.node_ids)
@watch.watch_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def gpus_group(context: click.Context, node_id: str | None, watching: bool, interval: float, as_json: bool) -> None:
    """List the GPUs of the mesh: what is used, reserved and free, and by whom; reserve memory of some.

    \b
      computemesh gpus --watch
      computemesh gpus fit --mb 24GiB --count 2
      computemesh gpus reserve --mb 24GiB --count 2 -- python train.py

    Free is what can be reserved: what there is, less what is reserved, less what others use without.
    """
    if context.invoked_subcommand is not None:
        return

    async def fetch(bus: Bus, lines: int | None) -> GpuStates:
        return await every_state(bus, GpuStatesQuery(node_id=node_id), lines)

    def draw(found: GpuStates, width: int, lines: int | None) -> RenderableType:
        return gpu_views.table(found, width=width, lines=lines, now=time.time()) if found.nodes else "No GPUs."

    view = watch.View(fetch=fetch, draw=draw, events=EVENTS)
    watch.present(view, watching=watching, interval_s=interval, as_json=as_json)


async def every_state(bus: Bus, query: GpuStatesQuery, most: int | None = None) -> GpuStates:
    """All the nodes that match, page by page; with *most*, no more pages than are needed for so many."""
    ask = msgspec.structs.replace(query, limit=min(most or STATES_PAGE, STATES_PAGE))
    found = await common.ask(bus, gpus.STATES, ask)
    listed = list(found.nodes)
    while found.next and (most is None or len(listed) < most):
        found = await common.ask(bus, gpus.STATES, msgspec.structs.replace(ask, after=found.next))
        listed += found.nodes
    return msgspec.structs.replace(found, nodes=listed, next="")


@gpus_group.command()
@click.option("--owner", help="Only of this owner.", shell_complete=complete.owners)
@click.option("--node", "node_id", type=access.NodeName(), help="Only on this node.", shell_complete=complete.node_ids)
@watch.watch_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def reservations(owner: str | None, node_id: str | None, watching: bool, interval: float, as_json: bool) -> None:
    """List the reservations that stand."""
    query = _question({"owner": owner, "node_id": node_id}, GpuList)

    async def fetch(bus: Bus, lines: int | None) -> GpuReservations:
        ask = msgspec.structs.replace(query, limit=min(lines or LIST_PAGE, LIST_PAGE))
        found = await common.ask(bus, gpus.LIST, ask)
        listed = list(found.reservations)
        while found.next and (lines is None or len(listed) < lines):
            found = await common.ask(bus, gpus.LIST, msgspec.structs.replace(ask, after=found.next))
            listed += found.reservations
        return GpuReservations(reservations=listed, count=max(found.count, len(listed)))

    def draw(found: GpuReservations, width: int, lines: int | None) -> RenderableType:
        if not found.reservations:
            return "No reservations."
        return gpu_views.reservations(found, width=width, lines=lines, now=time.time())

    view = watch.View(fetch=fetch, draw=draw, events=EVENTS)
    watch.present(view, watching=watching, interval_s=interval, as_json=as_json)


@gpus_group.command()
@_needs
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fit(as_json: bool, **fields: Any) -> None:
    """Say whether memory could be reserved now, where, and why not of each GPU that comes close.

    Exit status: 0 yes, 1 no.
    """
    question = _question(fields, GpuCanFit)
    found = common.once(lambda bus: common.ask(bus, gpus.CAN_FIT, question))
    if as_json:
        print_json(found)
    else:
        tables.put(gpu_views.fit(found, width=tables.width_now()))
    if not found.can_fit:
        common.bail(EXIT_NO)


# --- reserving ---------------------------------------------------------------------------------------------------


@gpus_group.command(context_settings={"allow_interspersed_args": False})
@_needs
@click.option("--timeout", "timeout_seconds", type=float, metavar="SECONDS", help="Ends then, unless renewed.")
@click.option("--id", "reservation_id", help="Its id; asking again under the same id is the same reservation.")
@click.option("--work-id", help="Ends with this work item.", shell_complete=complete.work_ids)
@click.option("--hold", is_flag=True, help="Keep it until Ctrl-C, renewing it, and release it then.")
@click.option("--json", "as_json", is_flag=True, help="Print the reservation as JSON.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
def reserve(command: tuple[str, ...], hold: bool, as_json: bool, **fields: Any) -> None:
    """Reserve GPU memory, all of it or none.

    With a COMMAND it is reserved on this machine, renewed while the command runs, and released at its end;
    the command finds its GPUs in CUDA_VISIBLE_DEVICES (or HIP_VISIBLE_DEVICES) and the reservation in
    COMPUTEMESH_RESERVATION_ID. Without one it ends after --timeout seconds (the mesh says how many when left
    out), unless it is renewed or released.

    \b
      computemesh gpus reserve --mb 24GiB --count 2 --nvlink -- python train.py
      computemesh gpus reserve --mb 8192 --node gpu-7 --gpus 0,1 --timeout 600

    Exit status: that of the COMMAND, if it ran; else 0, or 2 when it is refused.
    """
    if command and (hold or as_json):
        raise click.UsageError("--hold and --json go without a COMMAND")
    fields["reservation_id"] = fields["reservation_id"] or new_id("g")
    if command:
        fields["node_id"] = fields["node_id"] or _this_node()
    question = _question(fields, GpuReserve)
    if command or hold:
        common.bail(common.run(_hold(question, command, as_json=as_json)))
    granted = common.once(lambda bus: _reserve(bus, question))
    _print_granted(granted, as_json=as_json)


def _this_node() -> str:
    status = read_status(home())
    if status is None:
        raise Failure(
            "the command runs on this machine, which is no node of a mesh",
            hint="name with --node where the memory is to be reserved while it runs here",
            field="node_id", code="no_node",
        )  # fmt: skip
    return status.node_id


async def _reserve(bus: Bus, question: GpuReserve) -> GpuReservation:
    """The reservation; an answer that is lost is asked for again."""
    for last in (False,) * (ASKED_AGAIN - 1) + (True,):
        try:
            answer = await bus.ask(gpus.RESERVE, question, timeout_s=common.ANSWER_S)
        except TimedOut:
            if last:
                raise
            continue
        if not isinstance(answer, Refused):
            return answer
        failure = common.refusal(answer)
        if answer.code == "no_room":
            failure.hint = "`computemesh gpus fit` with the same options shows why not, GPU by GPU"
        raise failure
    raise AssertionError("unreachable")


def _print_granted(granted: GpuReservation, *, as_json: bool) -> None:
    if as_json:
        print_json(granted)
    else:
        tables.put(gpu_views.granted(granted, time.time()))


async def _hold(question: GpuReserve, command: Sequence[str], *, as_json: bool) -> int:
    """Reserves, and releases when the command has ended or a signal came; gives the exit status."""
    stop = asyncio.Event()
    async with common.connected() as bus:
        granted = await _reserve(bus, question)
        try:
            if not command:
                _print_granted(granted, as_json=as_json)
                _on_signals(stop.set)
                await common.first_of(stop.wait(), _renew_forever(bus, granted))
                return 0
            err.print(gpu_views.granted(granted, time.time()))
            environment = os.environ | visible(granted, await _platform(bus, granted.node_id), here=_is_here(granted))
            process = await _started(command, environment)
            _on_signals(lambda: _pass_on(process, signal.SIGTERM))
            renewing = asyncio.create_task(_renew_forever(bus, granted))
            status = await process.wait()
            renewing.cancel()
            return status if status >= 0 else 128 - status
        finally:
            await _release(bus, granted)


def visible(granted: GpuReservation, platform: Platform | None, *, here: bool) -> dict[str, str]:
    """What a command must know of its reservation: its id, and, when the GPUs are in this machine, which they are."""
    told = {"COMPUTEMESH_RESERVATION_ID": granted.reservation_id}
    if not here:
        return told
    by_index = ",".join(str(share.index) for share in granted.gpus)
    if platform is Platform.ROCM:
        return told | {"HIP_VISIBLE_DEVICES": by_index}
    if platform is Platform.METAL:
        return told
    # Indices follow the order that CUDA is told to count in; a uuid is the same for everybody.
    named = all(share.uuid for share in granted.gpus)
    by_uuid = ",".join(share.uuid for share in granted.gpus)
    return told | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": by_uuid if named else by_index}


def _is_here(granted: GpuReservation) -> bool:
    status = read_status(home())
    mine = status.node_id if status else token_from(told) if (told := os.environ.get("COMPUTEMESH_NODE_ID")) else ""
    return mine == granted.node_id


async def _platform(bus: Bus, node_id: str) -> Platform | None:
    with contextlib.suppress(BusError):
        answer = await bus.ask(nodes.GET, NodeGet(node_id=node_id))
        return None if isinstance(answer, Refused) else answer.platform
    return None


async def _started(command: Sequence[str], environment: Mapping[str, str]) -> Process:
    try:
        return await asyncio.create_subprocess_exec(
            *command, env=dict(environment), preexec_fn=dies_with_parent(signal.SIGTERM)
        )
    except OSError as error:
        raise Failure(f"{command[0]}: {(error.strerror or str(error)).lower()}", code="bad_command") from None


def _on_signals(told: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, told)


def _pass_on(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


async def _renew_forever(bus: Bus, granted: GpuReservation) -> None:
    """Keeps a reservation. While nobody answers it asks again; what ended all the same is told once."""
    pause_s = granted.timeout_seconds / RENEW_SHARE
    while True:
        await asyncio.sleep(pause_s)
        try:
            answer = await bus.ask(gpus.RENEW, GpuRenew(reservation_id=granted.reservation_id))
        except BusError:
            pause_s = min(RENEW_AGAIN_S, granted.timeout_seconds / RENEW_SHARE)
            continue
        pause_s = granted.timeout_seconds / RENEW_SHARE
        if isinstance(answer, Refused) and answer.code == "not_found":
            err.print(f"[bold red]The reservation {granted.reservation_id} has ended:[/] its memory may be given away.")
            await asyncio.Event().wait()


async def _release(bus: Bus, granted: GpuReservation) -> None:
    """Gives it back. What cannot be given back now ends by itself."""
    with contextlib.suppress(BusError):
        await bus.ask(gpus.RELEASE, GpuRelease(reservation_id=granted.reservation_id))


@gpus_group.command()
@click.argument("reservation_id", shell_complete=complete.reservation_ids)
@click.option("--timeout", "timeout_seconds", type=float, metavar="SECONDS", help="From now; left out, as before.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def renew(reservation_id: str, timeout_seconds: float | None, as_json: bool) -> None:
    """Let a reservation end later."""
    question = _question({"reservation_id": reservation_id, "timeout_seconds": timeout_seconds}, GpuRenew)
    _print_granted(common.once(lambda bus: common.ask(bus, gpus.RENEW, question)), as_json=as_json)


@gpus_group.command()
@click.argument("reservation_id", shell_complete=complete.reservation_ids)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def release(reservation_id: str, as_json: bool) -> None:
    """End a reservation."""
    question = _question({"reservation_id": reservation_id}, GpuRelease)
    ended = common.once(lambda bus: common.ask(bus, gpus.RELEASE, question))
    if as_json:
        print_json(ended)
    else:
        out.print(f"{ended.reservation_id} is released.")
