"""``engines``: what the mesh has to run models on, and how busy it is."""

from __future__ import annotations

import click
from rich.console import RenderableType

from computemesh.bus import Bus
from computemesh.cli import access, complete, engine_views, watch
from computemesh.cli.engine_views import EngineList
from computemesh.cli.nodes import every_node
from computemesh.contracts import nodes
from computemesh.contracts.nodes import NodesQuery

EVENTS = (nodes.ANNOUNCE, nodes.LOST)
"""What changes what is shown."""


@click.command()
@click.option(
    "--model", default="", help="Only engines of nodes that serve this model.", shell_complete=complete.models
)
@click.option(
    "--node", "node_id", type=access.NodeName(), default=None, help="Only engines of this node.",
    shell_complete=complete.node_ids,
)  # fmt: skip
@watch.watch_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def engines(model: str, node_id: str | None, watching: bool, interval: float, as_json: bool) -> None:
    """List the inference engines of all nodes: what each has in memory, and how busy it is.

    An engine is a device of a node with a server for models on it. `idle` ones start with the first request.
    `computemesh logs engine NODE/DEVICE` shows what one prints.
    """

    async def fetch(bus: Bus, _lines: int | None) -> EngineList:
        found = await every_node(bus, NodesQuery())
        rows = engine_views.engines_of(found.nodes, model=model, node_id=node_id or "")
        return EngineList(engines=rows, count=len(rows))

    def draw(found: EngineList, width: int, lines: int | None) -> RenderableType:
        if not found.engines:
            return "No such engines." if model or node_id else "No engines."
        return engine_views.table(found, width=width, lines=lines)

    view = watch.View(fetch=fetch, draw=draw, events=EVENTS)
    watch.present(view, watching=watching, interval_s=interval, as_json=as_json)
