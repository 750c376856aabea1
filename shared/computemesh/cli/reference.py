"""The page about the command line, written from its own help.

``make docs`` writes it to ``docs/cli.md``; a test fails when it is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from computemesh.cli import main as program

WIDTH: Final = 100

NOTE: Final = "<!-- Written by `make docs` from the help of the commands; edit there. -->\n\n"

INTRODUCTION: Final = """# The command line

What `computemesh --help` and `computemesh COMMAND --help` say, on one page.

Answers go to standard output, everything else to standard error. With `--json` an answer is one JSON document
(`events`: one a line), and an error is one JSON object on standard error:

```json
{"error": "priority: Expected 'int' <= 9", "field": "priority", "code": "bad_message", "hint": ""}
```

| exit status | |
|---|---|
| 0 | it went well |
| 1 | the command did its part, the work or the mesh did not: an item failed, `doctor` found a problem |
| 2 | refused, or wrong usage; the message names the field |
| 3 | no mesh runs, or it does not answer |
| 130 | ended by Ctrl-C |

"""


def page() -> str:
    """The whole page."""
    sections = [
        f"## {path}\n\n```\n{_help(command, path)}\n```\n" for path, command in _commands(program, "computemesh")
    ]
    return NOTE + INTRODUCTION + "\n".join(sections)


def _commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            inner = command.get_command(click.Context(command), name)
            assert inner is not None, name
            yield from _commands(inner, f"{path} {name}")


def _help(command: click.Command, path: str) -> str:
    settings = {"help_option_names": ["-h", "--help"], "terminal_width": WIDTH, "max_content_width": WIDTH}
    context = click.Context(command, info_name=path, **settings)  # type: ignore[arg-type]
    text = command.get_help(context)
    return "\n".join(line.rstrip() for line in text.splitlines())


def main() -> None:
    Path(sys.argv[1]).write_text(page())


if __name__ == "__main__":
    main()
