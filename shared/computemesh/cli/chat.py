"""``chat``: a conversation with a model of the mesh, in the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import click

from computemesh.cli import common, complete
from computemesh.cli.common import Failure, NoMesh, err, escape, print_json, printable
from computemesh.contracts.services import GATEWAY

if TYPE_CHECKING:  # Only those who chat wait for an HTTP client to load.
    from computemesh.cli.chat_client import Answer, Chat, Gateway

URL_NAME: Final = "GATEWAY_URL"
"""Where `computemesh env` says that the gateway is; then its token stands in `COMPUTEMESH_TOKEN`."""

COMMANDS: Final = {
    "/clear": "forget what was said; the system prompt stays",
    "/system TEXT": "set the system prompt; without a text, show it",
    "/model NAME": "go on with another model; without a name, show it",
    "/help": "this",
    "/exit": "end; so does Ctrl-D",
}


@dataclass
class Conversation:
    """What was said so far, and how it is to go on. Pure."""

    model: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    system: str = ""
    said: Chat = field(default_factory=list[dict[str, str]])

    def messages(self, prompt: str) -> Chat:
        """What is asked next."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.said, {"role": "user", "content": prompt}]

    def took(self, prompt: str, text: str) -> None:
        """An answer came, perhaps not all of it. Where nothing came, nothing was asked."""
        if text:
            self.said += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]

    def command(self, line: str) -> str:
        """Does what a line that begins with a slash says; gives what is to be shown.

        Raises:
            EOFError: it ends the conversation.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/clear":
                self.said = []
                return "Forgotten."
            case "/system":
                self.system = rest or self.system
                return f"System prompt: {self.system or 'none'}"
            case "/model":
                self.model = rest or self.model
                return f"Model: {self.model}"
            case "/help":
                return "\n".join(f"{command:14} {about}" for command, about in COMMANDS.items())
            case "/exit" | "/quit" | "/bye":
                raise EOFError
            case _:
                return f"No such command: {name}. There are {', '.join(c.partition(' ')[0] for c in COMMANDS)}."


@click.command()
@click.argument("model", required=False, default="", shell_complete=complete.models)
@click.argument("prompt", nargs=-1)
@click.option("--system", default="", help="System prompt: how the model is to answer.")
@click.option("--max-tokens", type=click.IntRange(1), help="Bound on each answer.")
@click.option("--temperature", type=click.FloatRange(0, 10), help="0 for the likeliest words, more for surprises.")
@click.option("--url", default="", help="Of the gateway; left out, that of this machine's mesh, or $GATEWAY_URL.")
@click.option("--key", default="", envvar="COMPUTEMESH_API_KEY", help="API key; left out, the mesh's own token.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document: text, usage, and how fast it was.")
def chat(
    model: str,
    prompt: tuple[str, ...],
    system: str,
    max_tokens: int | None,
    temperature: float | None,
    url: str,
    key: str,
    as_json: bool,
) -> None:
    """Chat with a model of the mesh, through the gateway.

    \b
      computemesh chat                                          with the only model there is
      computemesh chat smollm2-135m-instruct                    a conversation; /help in it, Ctrl-D ends it
      computemesh chat smollm2-135m-instruct Name a colour.     one answer
      git diff | computemesh chat smollm2-135m-instruct --system "Write a commit message."

    Ctrl-C stops an answer and not the conversation. How fast it was is told on standard error, if that is a terminal.
    Exit status: 0 it went well, 1 the answer broke off, 2 refused, 3 no gateway.
    """
    text = " ".join(prompt)
    piped = not text and not sys.stdin.isatty()
    if as_json and not text and not piped:
        raise click.UsageError("--json goes with a prompt: a conversation is for people")
    gateway = _gateway(url, key)
    options = {"max_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in options.items() if value is not None}
    talk = Conversation(_model(gateway, model), options, system)
    if piped and not (text := sys.stdin.read().strip()):
        raise Failure("there is no prompt", hint="give it as an argument, or on standard input", field="prompt")
    if not text:
        _converse(gateway, talk)
        return
    answer = common.run(_answer(gateway, talk, text, quiet=as_json))
    if as_json:
        print_json(answer.document())
    else:
        _tell_speed(answer)


def _gateway(url: str, key: str) -> Gateway:
    """Where to ask. The mesh's token goes to the mesh's own gateway only."""
    from computemesh.cli.chat_client import Gateway

    if url:
        return Gateway(_base(url), key)
    if told := os.environ.get(URL_NAME, ""):
        return Gateway(_base(told), key or os.environ.get("COMPUTEMESH_TOKEN", ""))
    status = common.mesh_status()
    if status.joined:
        raise Failure(
            "this machine joined the mesh as a node: it has no gateway",
            hint="name that of the mesh with --url and --key",
            code="wrong_role",
        )
    for service in status.services:
        if service.name == GATEWAY.name and service.http:
            return Gateway(service.http, key or status.token)
    raise NoMesh("the gateway of this mesh does not run", hint="`computemesh doctor` looks for the cause")


def _base(url: str) -> str:
    """The address without the path that clients of OpenAI's interface are given."""
    return url.rstrip("/").removesuffix("/v1")


def _model(gateway: Gateway, named: str) -> str:
    """The model to chat with: one that there is, or the only one."""
    from computemesh.cli.chat_client import listed

    models = common.run(gateway.models())
    if not named and len(models) == 1:
        return models[0]
    hint = listed(models)
    if not models:
        hint += "; `computemesh up --models FILE.gguf` serves one, `computemesh engines` shows what runs"
    if not named:
        raise Failure("name a model" if models else "no model can be asked", hint=hint, field="model")
    if named not in models:
        raise Failure(f"no model {named!r} can be asked", hint=hint, field="model", code="model_not_found")
    return named


# --- one answer --------------------------------------------------------------------------------------------------


async def _answer(gateway: Gateway, talk: Conversation, prompt: str, *, quiet: bool = False) -> Answer:
    """Asks, and prints the answer as it comes."""
    from computemesh.cli.chat_client import Answer

    answer = Answer(talk.model)
    printer = _Printer(quiet=quiet)
    try:
        async with aclosing(gateway.ask(talk.messages(prompt), talk.options, answer)) as pieces:
            async for piece in pieces:
                printer.print(piece.text, piece.thought)
    finally:
        talk.took(prompt, answer.text)
        printer.end()
    return answer


class _Printer:
    """Prints an answer: on a terminal harmless, into a pipe as it is."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._on_terminal = sys.stdout.isatty()
        self._line_is_open = False
        self._thinking = False

    def print(self, text: str, thought: str) -> None:
        if self._quiet:
            return
        if thought and self._on_terminal:  # What a model says to itself is no part of its answer.
            self._thinking = True
            self._write(click.style(printable(thought), dim=True), thought)
        if text:
            if self._thinking:
                self._thinking = False
                self._write("\n\n", "\n")
            self._write(printable(text) if self._on_terminal else text, text)

    def _write(self, shown: str, meant: str) -> None:
        sys.stdout.write(shown)
        sys.stdout.flush()
        self._line_is_open = not meant.endswith("\n")

    def end(self) -> None:
        """The cursor stands at the beginning of a line."""
        if self._line_is_open:
            with contextlib.suppress(BrokenPipeError):  # Who has gone needs no end.
                self._write("\n", "\n")


def _tell_speed(answer: Answer) -> None:
    if sys.stderr.isatty() and (said := answer.summary()):
        err.print(f"[dim]{escape(said)}[/]")


# --- a conversation ----------------------------------------------------------------------------------------------


def _converse(gateway: Gateway, talk: Conversation) -> None:
    """Asks and answers until Ctrl-D."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # With it, input() has history and editing.
    err.print(f"[dim]{escape(talk.model)}; /help shows the commands, Ctrl-D ends[/]")
    while True:
        try:
            line = _read("> ")
        except KeyboardInterrupt:
            err.print("\n[dim]Ctrl-D ends[/]")
            continue
        except EOFError:
            err.print()
            return
        if line.startswith("/"):
            try:
                err.print(escape(talk.command(line)))
            except EOFError:
                return
        elif line.strip():
            _turn(gateway, talk, line)


def _read(prompt: str) -> str:
    """A line, and those that follow while each ends with a backslash.

    Raises:
        EOFError: there is none.
    """
    line = _input(prompt)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + _input(". ")
    return line


def _input(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    sys.stderr.write(prompt)  # The answers go elsewhere, and nothing else does.
    sys.stderr.flush()
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line.rstrip("\n")


def _turn(gateway: Gateway, talk: Conversation, prompt: str) -> None:
    """One question and its answer. What goes wrong is told, and the conversation goes on."""
    try:
        answer = common.run(_stoppable(lambda: _answer(gateway, talk, prompt)))
    except Failure as failure:
        common.tell(failure, as_json=False)
        return
    if answer is None:
        err.print("[dim]stopped[/]")
    else:
        _tell_speed(answer)


async def _stoppable(begin: Callable[[], Any]) -> Answer | None:
    """What comes of it; None when Ctrl-C stopped it."""
    task: asyncio.Task[Answer] = asyncio.ensure_future(begin())
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        task.cancel()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        return await task
    except asyncio.CancelledError:
        if not stopped:
            raise
        return None
    finally:
        loop.remove_signal_handler(signal.SIGINT)
