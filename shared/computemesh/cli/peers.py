"""``peers``: processes that let others read and write their memory, and whom they are to be connected to."""

from __future__ import annotations

import time
from typing import Final

import click
import msgspec
from click.core import ParameterSource
from rich.console import Group, RenderableType
from rich.text import Text

from computemesh.bus import Bus
from computemesh.cli import common, complete, tables, watch
from computemesh.cli.common import out, print_json
from computemesh.cli.registry import question, scope_option
from computemesh.cli.sizes import byte_size
from computemesh.cli.tables import Cell, Column, grid
from computemesh.contracts import peers
from computemesh.contracts.base import Role
from computemesh.contracts.peers import (
    PEERS_PAGE_MAX,
    MemoryList,
    Peer,
    PeerMemory,
    Peers,
    PeersList,
    TopologyGet,
    TopologyPut,
)

COLUMNS: Final = (
    Column(title="peer", least=16),
    Column(title="node"),
    Column(title="address", rank=3, least=12),
    Column(title="interface", rank=2),
    Column(title="memory", least=12),
    Column(title="seen", rank=1),
)

NAMED_MAX: Final = 3
"""Regions of a peer that a list names; a model has one for each of its layers."""

MEMORY_COLUMNS: Final = (
    Column(title="region", least=16),
    Column(title="size", right=True),
    Column(title="epoch", right=True, rank=2),
    Column(title="transports", rank=1),
)


@click.group(name="peers", cls=common.Ordered, invoke_without_command=True)
@scope_option
@watch.watch_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def peers_group(context: click.Context, scope: str, watching: bool, interval: float, as_json: bool) -> None:
    """List the peer agents of a scope; see what memory one offers; say whom one is to be connected to.

    \b
      computemesh peers --scope my-session --watch
      computemesh peers memory worker-a
      computemesh peers connect worker-a worker-b worker-c

    `computemesh events peers` shows how they come and go.
    """
    if context.invoked_subcommand is not None:
        if context.get_parameter_source("scope") is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--scope goes behind `{context.invoked_subcommand}`")
        return
    ask: PeersList = question({"scope": scope}, PeersList)

    async def fetch(bus: Bus, lines: int | None) -> Peers:
        return await every_peer(bus, ask, lines)

    def draw(found: Peers, width: int, lines: int | None) -> RenderableType:
        where = f"in the scope {scope}" if scope else "in the scope without a name"
        if not found.peers:
            return Text(f"No peers {where}.")
        shown = found.peers if lines is None else found.peers[: max(1, lines - 3)]
        more = "more, " if found.next or len(shown) < len(found.peers) else ""
        note = Text(f"{more}{len(found.peers):,} {where}, revision {found.revision}", "dim")
        return Group(grid(COLUMNS, [row(peer, time.time()) for peer in shown], width), note)

    view = watch.View(fetch=fetch, draw=draw, events=(peers.CHANGED,))
    watch.present(view, watching=watching, interval_s=interval, as_json=as_json)


async def every_peer(bus: Bus, query: PeersList, most: int | None = None) -> Peers:
    """All of a scope, page by page; with *most*, no more pages than are needed for so many."""
    ask = msgspec.structs.replace(query, limit=min(most or PEERS_PAGE_MAX, PEERS_PAGE_MAX))
    found = await common.ask(bus, peers.LIST, ask)
    listed, after = list(found.peers), found.next
    while after and (most is None or len(listed) < most):
        page = await common.ask(bus, peers.LIST, msgspec.structs.replace(ask, after=after))
        listed, after = listed + page.peers, page.next
    return msgspec.structs.replace(found, peers=listed, next=after)


def row(peer: Peer, now: float) -> tuple[Cell, ...]:
    """A peer in a line."""
    interface = f"{peer.device}:{peer.ib_port}" if peer.device else ""
    return (
        peer.alias,
        peer.node_id or "-",
        peer.address or "-",
        f"{interface} {peer.link_type}".strip() or "-",
        memory_cell(peer.memory_keys),
        f"{common.lasting(now - peer.seen_at)} ago",
    )


def memory_cell(names: list[str]) -> str:
    """The names of regions; of many, how many there are and the first."""
    if len(names) <= NAMED_MAX:
        return ", ".join(names) or "-"
    return f"{len(names)}: {', '.join(names[: NAMED_MAX - 1])}, …"


@peers_group.command()
@click.argument("alias", shell_complete=complete.peers)
@scope_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def memory(alias: str, scope: str, as_json: bool) -> None:
    """List the memory regions that a peer offers."""
    ask = question({"alias": alias, "scope": scope}, MemoryList)
    found = common.once(lambda bus: common.ask(bus, peers.MEMORY_LIST, ask), Role.OBSERVER)
    if as_json:
        print_json(found)
    elif not found.memories:
        out.print(f"{common.escape(alias)} offers no memory.")
    else:
        tables.show(MEMORY_COLUMNS, [memory_row(region) for region in found.memories])


def memory_row(region: PeerMemory) -> tuple[Cell, ...]:
    """A region in a line."""
    return region.name, byte_size(region.length), str(region.epoch), ", ".join(region.transports) or "-"


@peers_group.command()
@click.argument("alias", shell_complete=complete.peers)
@scope_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def topology(alias: str, scope: str, as_json: bool) -> None:
    """Show whom a peer is to be connected to."""
    ask = question({"alias": alias, "scope": scope}, TopologyGet)
    found = common.once(lambda bus: common.ask(bus, peers.TOPOLOGY_GET, ask), Role.OBSERVER)
    if as_json:
        print_json(found)
        return
    if not found.target_peers:
        out.print(f"{common.escape(alias)} is to be connected to nobody in particular.")
        return
    for target in found.target_peers:
        out.print(common.escape(target))


@peers_group.command()
@click.argument("alias", shell_complete=complete.peers)
@click.argument("targets", nargs=-1, metavar="[PEER]...", shell_complete=complete.peers)
@scope_option
@click.option("--min-bw", metavar="BANDWIDTH", help="What each connection shall have at least, as 100Gbps.")
@click.option("--symmetric", is_flag=True, help="Say the same of each of them, towards this one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def connect(
    alias: str, targets: tuple[str, ...], scope: str, min_bw: str | None, symmetric: bool, as_json: bool
) -> None:
    """Say whom a peer is to be connected to, from now on and again after a failure; without any PEER, nobody.

    It takes the place of what was said before. Neither need be there yet.
    """
    told = {"alias": alias, "scope": scope, "target_peers": list(targets), "min_bw": min_bw, "symmetric": symmetric}
    ask = question(told, TopologyPut)
    found = common.once(lambda bus: common.ask(bus, peers.TOPOLOGY_PUT, ask))
    if as_json:
        print_json(found)
    else:
        if alias in targets:
            common.notice(f"{alias} is not connected to itself")
        named = ", ".join(found.target_peers) or "nobody"
        out.print(f"{common.escape(alias)} is to be connected to {common.escape(named)}.")
