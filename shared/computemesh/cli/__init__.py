"""The ``computemesh`` command."""

from __future__ import annotations

import click

from computemesh import __version__
from computemesh.cli import (
    access,
    call,
    chat,
    completion,
    doctor,
    engines,
    events,
    gpus,
    join,
    keys,
    logs,
    mesh,
    models,
    nodes,
    peers,
    registry,
    work,
)
from computemesh.cli.program import Program


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="computemesh")
def main() -> None:
    """LLM work across your GPU and CPU machines, over NATS.

    `computemesh up` starts a mesh, `computemesh join` adds a machine to it, `computemesh submit --prompt …
    --wait` gives it work.
    Commands find the mesh of this machine by themselves; set NATS_URL to use another one.

    Every command that prints takes --json; then an error is JSON too, on standard error. Exit status:
    0 it went well, 1 the work or the mesh did not, 2 refused or wrong usage, 3 no mesh.
    """


for _command in (
    mesh.up,
    join.join,
    mesh.down,
    mesh.status,
    doctor.doctor,
    mesh.env,
    access.nats_config,
    nodes.nodes_group,
    gpus.gpus_group,
    engines.engines,
    models.models_group,
    chat.chat,
    keys.keys_group,
    registry.registry_group,
    peers.peers_group,
    work.submit,
    work.work_group,
    events.events,
    call.call,
    logs.logs,
    completion.completion,
):
    main.add_command(_command)
