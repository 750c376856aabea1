"""The ``computemesh`` command."""

from __future__ import annotations

import click

from computemesh import __version__
from computemesh.cli import mesh, nodes, work


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="computemesh")
def main() -> None:
    """LLM work across your GPU and CPU machines, over NATS.

    `computemesh up` starts a mesh; `computemesh submit --prompt … --wait` gives it work.
    Commands find the mesh of this machine by themselves; set NATS_URL to use another one.
    """


for _command in (
    mesh.up,
    mesh.down,
    mesh.status,
    mesh.env,
    nodes.list_nodes,
    work.submit,
    work.work_group,
):
    main.add_command(_command)
