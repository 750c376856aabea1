"""Running a supervisor for ``up`` and ``join``: in the foreground with one readable log, or in the background."""

from __future__ import annotations

import asyncio
import contextlib
import logging.handlers
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import click
import msgspec

from computemesh import gguf, log, modelsource
from computemesh.cli import common, log_lines
from computemesh.cli.common import EXIT_NO_MESH, Failure, NoMesh, coloured, err, out
from computemesh.models import find_models
from computemesh.nats_server import LOOPBACK, ServerError
from computemesh.paths import Home, private_folder
from computemesh.supervisor import (
    LOG_BYTES_MAX,
    LOG_FILES,
    HomeTaken,
    MeshStatus,
    ServiceSpec,
    ServiceStatus,
    Supervisor,
    read_status,
)

READY_S: Final = 60.0
"""How long a command that starts something in the background waits until it is ready."""

END_S: Final = 60.0
"""How long a supervisor may take to end."""

NAME_WIDTH: Final = 18
"""Of the names of services in a log on the terminal."""

SCRIPTED: Final = "scripted"
"""What the resource-detector calls hardware that is made up."""

Ports = Literal["standard", "free", "any"]
"""Which HTTP ports: the documented ones, those of them that are free and else any, or any."""


# --- what the services are told ----------------------------------------------------------------------------------


def hardware_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--hardware``, as ``up`` and ``join`` have it."""
    return click.option(
        "--hardware",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Announce the hardware in this JSON file instead of what is there: for demonstrations and tests.",
    )(command)


def models_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--models``, as ``up`` and ``join`` have it."""
    return click.option(
        "--models",
        default="",
        help="Models to serve: GGUF files, folders, hf:org/repo[:QUANT] and the like, separated by commas.",
        metavar="SOURCES",
    )(command)


def agent_config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--agent-config``, as ``up`` and ``join`` have it."""
    return click.option(
        "--agent-config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Settings and models of the node-agent, in YAML; the environment counts before it.",
    )(command)


def tell_services(*, models: str, hardware: Path | None, agent_config: Path | None) -> None:
    """Puts what was asked for on the command line where the services look: in the environment they inherit."""
    if agent_config is not None:
        os.environ["COMPUTEMESH_CONFIG"] = str(agent_config.resolve())
    if models:
        told = ",".join(_from_anywhere(part) for part in models.split(",") if part.strip())
        os.environ["COMPUTEMESH_MODELS"] = told
        for problem in _problems(told):
            err.print(f"[yellow]--models:[/] {common.escape(problem)}")
    if hardware is not None:
        os.environ["COMPUTEMESH_GPU_PROVIDER"] = SCRIPTED
        os.environ["COMPUTEMESH_SCRIPTED_HARDWARE"] = str(hardware.resolve())


def _from_anywhere(source: str) -> str:
    """*source* as the node agent can use it, which runs in another folder."""
    try:
        found = modelsource.parse(source)
    except modelsource.SourceError as error:
        raise Failure(str(error), field="--models") from None
    where = str(found.path.resolve()) if found.kind == "path" and found.path else found.location
    return where + modelsource.fragment(source)


def _problems(models: str) -> list[str]:
    """What is wrong with the files among *models*, with which the node runs all the same."""
    found = find_models(models)
    problems = [*found.warnings]
    for path in found.models.values():
        try:
            gguf.read(path)
        except gguf.GgufError as error:
            problems.append(f"{path}: {error}")
    return problems


def say_made_up() -> None:
    """Nobody must take hardware out of a file for real."""
    if os.environ.get("COMPUTEMESH_GPU_PROVIDER", "").lower() == SCRIPTED:
        file = os.environ.get("COMPUTEMESH_SCRIPTED_HARDWARE", "")
        err.print(f"[bold yellow]The hardware of this node is made up:[/] it is what {common.escape(file)} says.")


def on_ports(specs: Sequence[ServiceSpec], ports: Ports) -> list[ServiceSpec]:
    """The services on the ports that were asked for."""
    if ports == "standard":
        return list(specs)
    return [spec if ports == "free" and is_free(spec.port) else replace(spec, port=0) for spec in specs]


def is_free(port: int) -> bool:
    """Whether a port of this machine can be bound now."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


# --- in the foreground -------------------------------------------------------------------------------------------


def log_to_terminal(place: Home, *, quiet: bool) -> Callable[[str, bytes], None]:
    """Shows and keeps the supervisor's own log like that of its services; gives what shows theirs."""
    log.configure("supervisor", form="json", out=_Lines(place, quiet))  # type: ignore[arg-type]
    return (lambda _name, _line: None) if quiet else _show_line


async def in_foreground(supervisor: Supervisor, ready: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a supervisor until a signal, or until its server cannot be kept.

    Args:
        ready: what to do once all is ready.

    Raises:
        Failure: it cannot start; or what *ready* raised.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)

    async def run() -> None:
        await supervisor.start()
        await ready()
        await supervisor.failed()

    try:
        await common.first_of(run(), stop.wait())
        out.print("Stopping …")
    except (HomeTaken, ServerError) as error:
        raise Failure(str(error)) from None
    finally:
        await supervisor.stop()


class _Lines:
    """A stream for the supervisor's own log."""

    def __init__(self, place: Home, quiet: bool) -> None:
        self._quiet = quiet
        self._file = logging.handlers.RotatingFileHandler(
            private_folder(place.logs) / "supervisor.log", maxBytes=LOG_BYTES_MAX, backupCount=LOG_FILES
        )

    def write(self, text: str) -> int:
        if text.strip():
            self._file.emit(logging.makeLogRecord({"msg": text.rstrip("\n")}))
            if not self._quiet:
                _show_line("supervisor", text.encode())
        return len(text)

    def flush(self) -> None:
        sys.stdout.flush()

    def isatty(self) -> bool:
        return False


def _show_line(name: str, line: bytes) -> None:
    """A service's log line for people: time, service, level, event, then the fields."""
    text = line.decode("utf-8", "replace").rstrip()
    entry = log_lines.parse(name, text) or log_lines.Entry(source=name, event=text, fields={})
    click.echo("".join(piece for piece, _ in log_lines.as_text(entry, now=time.time(), width=NAME_WIDTH)).rstrip())


def show_status(status: ServiceStatus) -> None:
    """Says when a service is in trouble."""
    if status.state in ("waiting", "failed"):
        err.print(f"{status.name}: {coloured(status.state)} {common.escape(status.reason)}")
    elif status.unready:
        err.print(f"{status.name}: not ready yet: {common.escape(status.unready)}")


def show_failed(status: MeshStatus) -> bool:
    """Says which services failed; whether any did."""
    failed = [service for service in status.services if service.state == "failed"]
    for service in failed:
        err.print(f"[bold red]{service.name} failed:[/] {common.escape(service.reason)}")
    return bool(failed)


# --- in the background -------------------------------------------------------------------------------------------


def in_background(
    place: Home,
    words: Sequence[str],
    *,
    what: str,
    module: str = "computemesh.cli",
    log_file: Path | None = None,
    ready_s: float = READY_S,
) -> MeshStatus:
    """Runs one of our own commands in the background until everything it starts is ready.

    Args:
        what: what is started, for messages.
        module: whose command it is.
        log_file: what it writes goes there; left out, to ``up.log`` among the logs.
        ready_s: how long it may take.

    Raises:
        Failure: it did not start, in the words of whatever failed.
    """
    private_folder(place.root)
    private_folder(place.logs)
    log_file = log_file or place.logs / "up.log"
    if log_file.exists() and log_file.stat().st_size > LOG_BYTES_MAX:
        log_file.replace(log_file.with_name(f"{log_file.name}.1"))
    with os.fdopen(os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab") as sink:
        offset = sink.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with err.status(f"Starting {what} …") as shown:
            return _wait_ready(place, process, log_file, offset, what, ready_s, shown.update)
    except BaseException:
        _end_process(process)
        raise


def _wait_ready(
    place: Home,
    process: subprocess.Popen[bytes],
    log_file: Path,
    offset: int,
    what: str,
    ready_s: float,
    show: Callable[[str], None],
) -> MeshStatus:
    deadline_s = time.monotonic() + ready_s
    problem = waiting = ""
    while time.monotonic() < deadline_s:
        status = read_status(place)
        if status is not None and status.pid == process.pid:
            broken = [service for service in status.services if service.state == "failed"]
            if broken:
                reasons = "; ".join(_last_words(place, service) for service in broken)
                raise Failure(f"{what} did not start: {reasons}", hint=_hint(broken, place))
            if status.ready:
                return status
            if status.problem and not problem:
                err.print(f"{common.escape(status.problem)}; waiting for it")
            problem = status.problem
            waiting = _waited_for(status)
            show(f"Starting {what} … {common.escape(problem or 'waiting for ' + (waiting or 'the services'))}")
        if (left := process.poll()) is not None:
            said = log_file.read_bytes()[offset:].decode("utf-8", "replace").strip().splitlines()
            errors = [line.removeprefix("error:").strip() for line in said if line.startswith("error:")]
            kind = NoMesh if left == EXIT_NO_MESH else Failure
            raise kind(
                f"{what} did not start: {' '.join(errors) or ' '.join(said[-3:])}", hint=f"all of it: {log_file}"
            )
        time.sleep(0.05)
    if problem:
        raise NoMesh(
            f"{problem}, and did not change in {ready_s:.3g} s", hint="is it running, and reachable from here?"
        )
    why = f": {waiting}" if waiting else ""
    raise Failure(f"{what} was not ready after {ready_s:.3g} s{why}", hint=f"see {log_file}")


def _waited_for(status: MeshStatus) -> str:
    """The services that are not ready, and why, where they say so."""
    found = [service for service in status.services if service.state != "ready"]
    return ", ".join(f"{one.name} ({one.unready})" if one.unready else one.name for one in found)


def _hint(broken: list[ServiceStatus], place: Home) -> str:
    if any("another program has it" in _last_words(place, service) for service in broken):
        return "`--ports any` takes ports that are free; or is it another mesh of yours?"
    return f"see the logs in {place.logs}"


def _last_words(place: Home, service: ServiceStatus) -> str:
    """What a service that failed said last."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        line = (place.logs / f"{service.name}.log").read_text().strip().splitlines()[-1]
        try:
            return f"{service.name}: {msgspec.json.decode(line, type=dict[str, Any]).get('reason') or line}"
        except ValueError:
            return line
    return f"{service.name}: {service.reason}"


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    process.kill()
