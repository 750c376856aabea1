"""``nodes``: who is in the mesh, what they can do, and who may join it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click
import msgspec
from rich.console import RenderableType
from rich.text import Text

from computemesh.bus import Bus, BusError
from computemesh.cli import access, common, complete, node_views, tables, watch
from computemesh.cli.common import out, print_json
from computemesh.cli.sizes import Size
from computemesh.contracts import nodes, resources
from computemesh.contracts.base import Message, Refused, Request, Role, convert
from computemesh.contracts.nodes import (
    NodeDrain,
    NodeDrained,
    NodeForget,
    NodeGet,
    NodeList,
    NodeSort,
    NodesQuery,
    NodeState,
    NodeUndrain,
    NodeView,
    StatsAsk,
)
from computemesh.contracts.resources import Inventory, InventoryGet
from computemesh.hardware import Platform, Tier

T = TypeVar("T")
Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

PAGE: Final = 1000
"""Nodes that are asked for at a time."""

EVENTS: Final = (nodes.ANNOUNCE, nodes.LOST)
"""What changes what is shown."""

INVENTORY_S: Final = 2.0
"""How long a node's own detector may take: `nodes show` is of use without it."""


class UpperChoice(click.Choice[str]):
    """A choice in any case, shown as it stands on the wire."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        return str(choice).upper()


class Label(click.ParamType[tuple[str, str]]):
    """``NAME=VALUE``."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        name, equals, wanted = str(value).partition("=")
        if not name or not equals:
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name, wanted


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which nodes, and in which order."""
    for option in reversed((
        click.option("--online", "online_only", is_flag=True, help="Only nodes that are online."),
        click.option(
            "--state", "states", multiple=True, type=click.Choice([s.value for s in NodeState]),
            help="Only nodes in this state; may be given more than once.",
        ),
        click.option("--drained/--not-drained", default=None, help="Only nodes that are drained, or that are not."),
        click.option("--gpu", "requires_gpu", is_flag=True, help="Only nodes with a GPU."),
        click.option("--min-tier", type=UpperChoice([t.value for t in Tier]), help="At least this tier, in any case."),
        click.option("--platform", type=UpperChoice([p.value for p in Platform]), help="Only this platform."),
        click.option("--min-gpus", type=click.IntRange(0), default=0, help="At least so many such GPUs."),
        click.option("--min-vram", "min_vram_mb", type=Size(), default=0, help="A GPU with at least so much memory."),
        click.option("--min-free-vram", "min_vram_free_mb", type=Size(), default=0, help="A GPU with so much unused."),
        click.option(
            "--min-cc", "min_compute_capability", default="", metavar="X.Y", help="At least this compute capability."
        ),
        click.option("--min-ram", "min_memory_mb", type=Size(), default=0, help="At least so much memory."),
        click.option("--min-free-ram", "min_memory_available_mb", type=Size(), default=0, help="So much of it free."),
        click.option("--free-slots", "min_free_slots", type=click.IntRange(0), default=0, help="So many free slots."),
        click.option("--label", "labels", multiple=True, type=Label(), help="Only nodes with this label."),
        click.option("--work-type", default="", help="They take this work.", shell_complete=complete.work_types),
        click.option(
            "--model", "model_name", default="", help="They serve this model.", shell_complete=complete.models
        ),
        click.option(
            "--loaded", "loaded_model", default="", metavar="MODEL", help="They have this model in memory.",
            shell_complete=complete.models,
        ),
        click.option(
            "--sort", type=click.Choice([s.value for s in NodeSort]), default="node_id", show_default=True,
            help="What to order them by; equals by id.",
        ),
        click.option("--desc", "descending", is_flag=True, help="The largest first."),
        click.option("--limit", type=click.IntRange(1), help="At most so many; left out, all."),
    )):  # fmt: skip
        command = option(command)
    return command


@click.group(name="nodes", cls=common.Ordered, invoke_without_command=True)
@_filters
@watch.watch_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def nodes_group(
    context: click.Context, /, limit: int | None, watching: bool, interval: float, as_json: bool, **filters: Any
) -> None:
    """List the nodes of the mesh; show, drain or forget one; invite one, or revoke it.

    \b
      computemesh nodes --min-free-vram 40GiB --sort vram_free --desc
      computemesh nodes --watch
      computemesh nodes drain gpu-7 --reason "new power supply"

    A terminal that is too narrow gets fewer columns; `nodes show NODE` and --json have everything.
    """
    if context.invoked_subcommand is not None:
        return
    query = _query(filters)

    async def fetch(bus: Bus, lines: int | None) -> NodeList:
        return await every_node(bus, query, min(x for x in (limit, lines, 1 << 62) if x))

    def draw(found: NodeList, width: int, lines: int | None) -> RenderableType:
        if not found.nodes:
            return "No nodes." if query == NodesQuery() else "No such nodes."
        return node_views.table(found, width=width, lines=lines, now=time.time())

    view = watch.View(fetch=fetch, draw=draw, events=EVENTS)
    watch.present(view, watching=watching, interval_s=interval, as_json=as_json)


def _query(filters: dict[str, Any]) -> NodesQuery:
    """What the options ask for; what they cannot check the contract does."""
    fields = {name: value for name, value in filters.items() if value is not None}
    fields["labels"] = dict(fields["labels"])
    query = convert(fields, NodesQuery)
    if isinstance(query, Refused):
        raise common.refusal(query)
    return query


async def every_node(
    bus: Bus, query: NodesQuery, limit: int = 1 << 62, *, timeout_s: float = common.ANSWER_S
) -> NodeList:
    """All the nodes that match, or the first *limit*, page by page, for each of which *timeout_s* is waited."""
    first = msgspec.structs.replace(query, limit=min(limit, PAGE))
    found = await common.ask(bus, nodes.QUERY, first, timeout_s=timeout_s)
    listed = list(found.nodes)
    while found.next and len(listed) < limit:
        page = msgspec.structs.replace(query, limit=min(limit - len(listed), PAGE), after=found.next)
        found = await common.ask(bus, nodes.QUERY, page, timeout_s=timeout_s)
        listed += found.nodes
    return NodeList(nodes=listed, count=max(found.count, len(listed)))


# --- one node ----------------------------------------------------------------------------------------------------


@nodes_group.command()
@click.argument("node_id", type=access.NodeName(), shell_complete=complete.node_ids)
@watch.watch_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(node_id: str, watching: bool, interval: float, as_json: bool) -> None:
    """Show all about one node: its hardware, its GPUs and how they are linked, and who uses them.

    The links are written as `nvidia-smi topo` does: NV4 is four NVLinks, PIX one PCIe switch, SYS across
    sockets.
    """

    async def fetch(bus: Bus, _lines: int | None) -> NodePage:
        node = await common.ask(bus, nodes.GET, NodeGet(node_id=node_id))
        return NodePage(node=node, inventory=await _inventory(bus, node))

    def draw(found: NodePage, width: int, _lines: int | None) -> RenderableType:
        return node_views.page(found.node, found.inventory, width=width, now=time.time())

    view = watch.View(fetch=fetch, draw=draw, events=EVENTS)
    watch.present(view, watching=watching, interval_s=interval, as_json=as_json)


class NodePage(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the registry knows it, and its hardware as its own detector reads it now, if that answers."""

    node: NodeView
    inventory: Inventory | None


async def _inventory(bus: Bus, node: NodeView) -> Inventory | None:
    try:
        found = await bus.ask(resources.INVENTORY, InventoryGet(), target=node.node_id, timeout_s=INVENTORY_S)
    except BusError:  # A plain node has no detector, and a lost one does not answer.
        return None
    if not isinstance(found, Inventory) or found.machine_id not in ("", node.machine_id):
        return None  # Another machine answers in the node's name.
    return found


@nodes_group.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def stats(as_json: bool) -> None:
    """Show the mesh in numbers."""
    found = common.once(lambda bus: common.ask(bus, nodes.STATS, StatsAsk()))
    if as_json:
        print_json(found)
    else:
        tables.put(node_views.stats(found))


# --- what operators do -------------------------------------------------------------------------------------------


@nodes_group.command()
@click.argument("node_id", type=access.NodeName(), shell_complete=complete.node_ids)
@click.option("--reason", default="", help="Why; others see it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def drain(node_id: str, reason: str, as_json: bool) -> None:
    """Give a node no new work until `undrain`, also when it comes back; what runs there goes on."""
    _print_drained(_operate(nodes.DRAIN, {"node_id": node_id, "reason": reason}, NodeDrain), as_json=as_json)


@nodes_group.command()
@click.argument("node_id", type=access.NodeName(), shell_complete=complete.node_ids)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def undrain(node_id: str, as_json: bool) -> None:
    """Give a drained node work again."""
    _print_drained(_operate(nodes.UNDRAIN, {"node_id": node_id}, NodeUndrain), as_json=as_json)


@nodes_group.command()
@click.argument("node_id", type=access.NodeName(), shell_complete=complete.node_ids)
@click.option("--force", is_flag=True, help="Also one that is here; if its agent runs, it comes back as a new node.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def forget(node_id: str, force: bool, as_json: bool) -> None:
    """Remove a node that is gone for good from the list. `revoke` is what takes its leave to connect away."""
    answer = _operate(nodes.FORGET, {"node_id": node_id, "force": force}, NodeForget)
    if as_json:
        print_json(answer)
    else:
        out.print(f"Node {answer.node_id} is forgotten.")


def _operate(request: Request[Q, R], fields: dict[str, Any], kind: type[Q]) -> R:
    """Asks what only the mesh's own machine may; a refusal ends the command."""
    question = convert(fields, kind)
    if isinstance(question, Refused):
        raise common.refusal(question)
    return common.once(lambda bus: common.ask(bus, request, question), Role.SERVICES)


def _print_drained(answer: NodeDrained, *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    node = answer.node
    how = Text(f"{node.node_id} ").append(node_views.state(node))
    if not answer.changed:
        how.append("; it was so before")
    out.print(how)


nodes_group.add_command(access.invite)
nodes_group.add_command(access.revoke)
