"""``models``: what the mesh can serve, where it is, and what is in a model's file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click
from rich.console import RenderableType
from rich.text import Text

from computemesh.bus import Bus
from computemesh.cli import access, common, complete, model_views, tables, watch
from computemesh.cli.common import Failure, out, print_json
from computemesh.cli.model_views import ModelList
from computemesh.cli.nodes import every_node
from computemesh.contracts import nodes
from computemesh.contracts.nodes import NodesQuery
from computemesh.gguf import GgufError, read_all
from computemesh.models import parts
from computemesh.modelsource import model_name

EVENTS: Final = (nodes.ANNOUNCE, nodes.LOST)
"""What changes what is shown."""


@click.group(name="models", cls=common.Ordered, invoke_without_command=True)
@click.option("--node", "node_id", type=access.NodeName(), help="Only of this node.", shell_complete=complete.node_ids)
@watch.watch_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def models_group(context: click.Context, node_id: str | None, watching: bool, interval: float, as_json: bool) -> None:
    """List the models that the nodes serve: where each is, where it is in memory, and how far one is that is fetched.

    \b
      computemesh models --watch
      computemesh models inspect ~/models/a.gguf
    """
    if context.invoked_subcommand is not None:
        return

    async def fetch(bus: Bus, _lines: int | None) -> ModelList:
        found = await every_node(bus, NodesQuery())
        rows = model_views.models_of(found.nodes, node_id=node_id or "")
        return ModelList(models=rows, count=len(rows))

    def draw(found: ModelList, width: int, lines: int | None) -> RenderableType:
        if not found.models:
            return "No models. A node serves those that `computemesh up --models` names."
        return model_views.table(found, width=width, lines=lines)

    view = watch.View(fetch=fetch, draw=draw, events=EVENTS)
    watch.present(view, watching=watching, interval_s=interval, as_json=as_json)


@models_group.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(file: Path, as_json: bool) -> None:
    """Say what a GGUF file says of the model in it.

    Of a model in several files name the first one. Exit status: 0 it is whole, 2 it is no GGUF file that can be used.
    """
    try:
        head = read_all(parts(file) or [file])
    except GgufError as error:
        raise Failure(f"{file}: {error}") from None
    found = model_views.model_file(str(file), model_name(file.name), head)
    if as_json:
        print_json(found)
    else:
        for name, value in model_views.facts(found).items():
            out.print(Text(f"{name:<15}", "bold") + tables.clean(value), soft_wrap=True)
