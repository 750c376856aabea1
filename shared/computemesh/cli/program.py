"""The group that all commands hang on: it keeps their order and tells every failure in one way.

With ``--json`` a failure is one JSON object on standard error, else a line for people. Nothing but a
command's answer is ever written to standard output.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from computemesh import log
from computemesh.cli import common
from computemesh.cli.common import Failure

EXIT_INTERRUPTED: Final = 130
"""As shells have it for a program that Ctrl-C ended."""


class Program(common.Ordered):
    """The whole command line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would make an error of it.
            _forget_output()
            ctx.exit(0)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
        _write_whole()
        # Libraries warn in the log; a command tells by itself what the user must know.
        log.configure("computemesh", level="error", form="text", out=sys.stderr)
        try:
            status = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
            sys.stdout.flush()
        except click.Abort:
            sys.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            _forget_output()
            sys.exit(0)
        except (click.ClickException, PermissionError) as error:
            failure = denied(error) if isinstance(error, PermissionError) else error
            common.tell(failure, as_json="--json" in words)
            sys.exit(failure.exit_code)
        sys.exit(status if isinstance(status, int) else 0)


def _write_whole() -> None:
    """Makes sure that all of a long answer is written.

    A pipe may take a part of it only. With PYTHONUNBUFFERED, which container images like to set, Python has no
    buffer for the rest, and drops it without a word.
    """
    if isinstance(sys.stdout.buffer, io.RawIOBase):
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(sys.stdout.buffer),
            encoding=sys.stdout.encoding,
            errors=sys.stdout.errors,
            line_buffering=True,
        )


def denied(error: PermissionError) -> Failure:
    """A file that this user may not touch."""
    named = f"{error.filename}: " if error.filename else ""
    hint = "run this as the user who started the mesh" if error.filename else ""
    return Failure(f"{named}{(error.strerror or 'permission denied').lower()}", hint=hint, code="permission_denied")


def _forget_output() -> None:
    """Whoever read our output has gone: what is still buffered has nowhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
