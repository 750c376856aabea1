"""``completion``: what a shell needs to complete our words."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import get_completion_class

NAME: Final = "computemesh"

VARIABLE: Final = "_COMPUTEMESH_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options, ids and subjects.

    Ids, models and work types come from the mesh that runs, if one does. To have it in every new shell:

    \b
      bash   echo 'eval "$(computemesh completion bash)"' >> ~/.bashrc
      zsh    echo 'eval "$(computemesh completion zsh)"' >> ~/.zshrc    (after compinit)
      fish   computemesh completion fish > ~/.config/fish/completions/computemesh.fish

    bash must be 4.4 or newer.
    """
    kind = get_completion_class(shell)
    assert kind is not None, shell
    made = kind(context.find_root().command, {}, NAME, VARIABLE)
    # Not `source()`: in bash's case that looks for a bash to check, also when the output is for another machine.
    click.echo(made.source_template % made.source_vars())
