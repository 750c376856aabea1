"""``python -m computemesh.nanoctrl``: a control plane on this machine, started and stopped as NanoCtrl's own is."""

from __future__ import annotations

import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click
import psutil

from computemesh.bus import Bus, Unreachable, Where
from computemesh.cli import common, mesh, running
from computemesh.cli.common import Failure, err, out, print_json
from computemesh.cli.program import Program
from computemesh.cli.services import SERVICES
from computemesh.contracts.base import Role
from computemesh.contracts.services import CONTROL_PLANE
from computemesh.nanoctrl import NanoCtrlClient, NanoCtrlError, runtime
from computemesh.nanoctrl.runtime import Folder, Meta
from computemesh.nats_server import LOOPBACK
from computemesh.paths import private_folder
from computemesh.supervisor import MeshStatus, ServiceSpec, Supervisor, is_running, read_status

WAIT_S: Final = 8.0
"""How long a start, and a stop, may take."""

EXIT_NOT_RUNNING: Final = 1
EXIT_UNHEALTHY: Final = 2

LOOK_S: Final = 0.05

CONNECT_S: Final = 2.0
"""How long a NATS server is waited for that a control plane did not reach."""

FORCED_S: Final = 1.0
"""How long what was forced may take to end by itself, once its supervisor is gone."""

ANYWHERE: Final = {"0.0.0.0": LOOPBACK, "::": "[::1]"}  # noqa: S104
"""Where a server that listens everywhere is asked from here."""


class NotDone(Failure):
    """It did not start, or did not end."""

    exit_code = EXIT_NOT_RUNNING


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """A control plane on this machine, started and stopped as NanoCtrl's.

    It is a mesh of one service, with a NATS server of its own unless NANOCTRL_REDIS_URL or --nats-url names one. A
    whole mesh (`computemesh up`) has a control plane already, on the same port.

    What runs is noted in NANOCTRL_RUNTIME_DIR, else in `nanoctrl` under XDG_RUNTIME_DIR or the folder for temporary
    files; another folder is another control plane. NANOCTRL_RUST_LOG is its log level.
    """


def _server_options(command: Any) -> Any:
    for option in reversed((
        click.option("--host", default=LOOPBACK, show_default=True, metavar="ADDRESS",
                     help="Where it listens. Beyond loopback its clients must show a token: see `token`."),
        click.option("--port", type=click.IntRange(0, 65_535), default=CONTROL_PLANE.port, show_default=True,
                     help="Where it listens; 0 takes any free port."),
        click.option("--nats-url", "--redis-url", "nats_url", default="", metavar="URL",
                     help="The NATS server to use, as nats://host:port; left out, one of its own. NANOCTRL_REDIS_URL "
                          "counts before it."),
        click.option("--no-token", is_flag=True,
                     help="Beyond loopback too, demand no token: only in a network that is closed itself."),
    )):  # fmt: skip
        command = option(command)
    return command


# --- in the foreground -------------------------------------------------------------------------------------------


@main.command()
@_server_options
def server(host: str, port: int, nats_url: str, no_token: bool) -> None:
    """Run it in the foreground, until Ctrl-C."""
    common.run(_serve(runtime.folder(), host, port, runtime.bus_url(nats_url), no_token=no_token))


async def _serve(folder: Folder, host: str, port: int, nats_url: str, *, no_token: bool) -> None:
    place = folder.home
    private_folder(place.root)
    me = mesh.node_id(place)
    supervisor = Supervisor(
        place,
        [_spec(host, port, no_token=no_token)],
        token=_token(folder),
        node_id=me,
        nats_urls={Role.SERVICES: nats_url} if nats_url else None,
        on_line=running.log_to_terminal(place, quiet=False),
        on_status=running.show_status,
    )

    async def ready() -> None:
        if not running.show_failed(supervisor.status()):
            out.print(f"listening on {_address(supervisor.status())}")

    await running.in_foreground(supervisor, ready)


def _spec(host: str, port: int, *, no_token: bool) -> ServiceSpec:
    found = next(spec for spec in SERVICES if spec.name == CONTROL_PLANE.name)
    told = {"COMPUTEMESH_HTTP_HOST": host}
    if level := runtime.log_level():
        told["COMPUTEMESH_LOG_LEVEL"] = level
    if no_token:
        told |= {"COMPUTEMESH_TOKEN": "", "COMPUTEMESH_ALLOW_OPEN": "true"}
    return replace(found, port=port, environment={**found.environment, **told})


def _token(folder: Folder) -> str:
    place = folder.home
    private_folder(place.root)
    made = mesh.credentials(place, mesh.node_id(place))  # The NATS server reads them, whatever the token is.
    return os.environ.get("COMPUTEMESH_TOKEN") or made.token


def _address(status: MeshStatus) -> str:
    """Where it listens, as it is reached from this machine; empty while it does not."""
    return reached_at(next((service.http for service in status.services if service.name == CONTROL_PLANE.name), ""))


# --- in the background -------------------------------------------------------------------------------------------


@main.command()
@_server_options
@click.option("--health-host", metavar="ADDRESS", help="Ask there whether it is well, instead of --host.")
@click.option("--health-port", type=click.IntRange(1, 65_535), help="The same for --port.")
@click.option("--log-file", type=click.Path(dir_okay=False, path_type=Path), help="Left out, in the runtime folder.")
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0, min_open=True), default=WAIT_S, show_default=True, metavar="SECONDS",
    help="How long it may take until it is well.",
)  # fmt: skip
@click.option("--bin", "binary", hidden=True, help="Not used: there is no binary to choose.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def start(
    host: str,
    port: int,
    nats_url: str,
    no_token: bool,
    health_host: str | None,
    health_port: int | None,
    log_file: Path | None,
    wait_s: float,
    binary: str | None,
    as_json: bool,
) -> None:
    """Start it in the background; returns once it is well.

    Exit status: 0 it runs, also when it did before; 1 it did not start; 2 wrong usage.
    """
    folder = runtime.folder()
    runtime.log_level()
    if url := runtime.bus_url(nats_url):  # Not on a command line, which others can read: there may be a password in it.
        os.environ["NANOCTRL_REDIS_URL"] = url
    if binary:
        common.notice("--bin is not used: the control plane is a part of computemesh")
    words = ["server", "--host", host, "--port", str(port), *(["--no-token"] if no_token else [])]
    health = f"http://{health_host or host}:{health_port or port}" if health_host or health_port else ""
    deadline_s = time.monotonic() + wait_s
    try:
        with folder.starting(wait_s):
            found = read_status(folder.home)
            if found is None:
                log = _writable(log_file.absolute()) if log_file else folder.log
                _started(folder, words, log, reached_at(health), deadline_s, url)
    except runtime.Busy:
        raise NotDone(f"another start has been under way for {wait_s:g} s") from None
    told = _document(folder)
    if as_json:
        print_json({**told, "was_running": found is not None})
        return
    out.print(f"The control plane {'is running already' if found else 'has started'} (pid {told['pid']}).")
    _print(told)
    if not found and not no_token and host not in (LOOPBACK, "localhost", "::1"):
        err.print(f"Its clients must show a token: export COMPUTEMESH_TOKEN=$({_command()} token)")


def _writable(log: Path) -> Path:
    try:
        os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise Failure(f"--log-file: {log}: {(error.strerror or str(error)).lower()}", field="--log-file") from None
    return log


async def _bus_problem(nats_url: str) -> str:
    """Why a NATS server cannot be used; empty when it can."""
    bus = Bus(Where(url=nats_url, role=Role.SERVICES, name="computemesh-nanoctrl"))
    try:
        await bus.connect(timeout_s=CONNECT_S, wait_for_server=False)
    except Unreachable as error:
        return str(error)
    finally:
        await bus.close()
    return ""


def _started(folder: Folder, words: list[str], log: Path, health: str, deadline_s: float, nats_url: str) -> None:
    """Starts it, and ends it again if it is not well in time."""

    def left_s() -> float:
        return max(LOOK_S, deadline_s - time.monotonic())

    place, module = folder.home, "computemesh.nanoctrl"
    try:
        status = running.in_background(
            place, words, what="the control plane", module=module, log_file=log, ready_s=left_s()
        )
    except Failure as failure:
        if nats_url and (problem := common.run(_bus_problem(nats_url))):
            raise NotDone(problem, hint="--nats-url, or NANOCTRL_REDIS_URL, names it") from None
        hint = "--port takes another one" if "another program has it" in failure.message else failure.hint
        raise NotDone(failure.message, hint=hint, code=failure.code) from None
    folder.note(
        Meta(
            pid=status.pid,
            address=_address(status),
            cmd=[sys.executable, "-m", module, *words],
            log=str(log),
            started_at=int(status.started_at),
            health=health,
        )
    )
    while reason := unwell(folder, status, ""):
        if time.monotonic() > deadline_s:
            _end(folder, WAIT_S, force=True)
            raise NotDone(f"it did not start: {reason}", hint=f"see {log}")
        time.sleep(LOOK_S)


def _document(folder: Folder) -> dict[str, Any]:
    """What is told of the one that runs, empty when none does."""
    status = read_status(folder.home)
    if status is None:
        return {"pid": 0, "address": "", "nats": "", "log": ""}
    meta = folder.noted(status.pid)
    return {
        "pid": status.pid,
        "address": _address(status),
        "nats": mesh.nats_address(status),
        "log": meta.log if meta else str(folder.home.logs),
    }


def _print(told: dict[str, Any]) -> None:
    for name in ("address", "nats", "log"):
        out.print(f"{name + ':':9}{common.escape(str(told[name])) or '-'}")


def reached_at(address: str) -> str:
    """An address as it is reached from this machine."""
    for everywhere, here in ANYWHERE.items():
        bracketed = f"[{everywhere}]" if ":" in everywhere else everywhere
        address = address.replace(f"//{bracketed}:", f"//{here}:", 1)
    return address


def unwell(folder: Folder, status: MeshStatus | None, address: str) -> str:
    """Why a control plane is not well; empty when it is.

    Args:
        address: which; left out, the one that runs.
    """
    token = None  # Ours is for our own alone.
    if not address and status is not None:
        meta, token = folder.noted(status.pid), _token(folder)
        address = (meta.health if meta else "") or _address(status)
    if not address:
        return "it does not listen"
    try:
        with NanoCtrlClient(address, token=token) as client:
            client.check_connection()
    except ValueError as error:
        raise Failure(str(error), field="address") from None
    except NanoCtrlError as error:
        return str(error)
    return ""


@main.command()
@click.option("--address", default="", metavar="HOST:PORT", help="Ask there whether it is well; left out, where it is.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(address: str, as_json: bool) -> None:
    """Whether it runs, and is well.

    Exit status: 0 it runs and is well, 1 it does not run, 2 it runs and is not well.
    """
    folder = runtime.folder()
    found = read_status(folder.home)
    reason = unwell(folder, found, address) if found or address else ""
    told = _document(folder)
    told["address"] = address or told["address"]
    if as_json:
        print_json({**told, "healthy": bool(found or address) and not reason, "problem": reason})
    else:
        if found is None:
            out.print("The control plane is not running.")
        else:
            out.print(f"The control plane runs (pid {found.pid}, up {common.ago(found.started_at)}).")
            _print(told)
        if found or address:
            out.print(f"health:  {common.escape(reason) or 'ok'}")
    if found is None:
        common.bail(EXIT_NOT_RUNNING)
    if reason:
        common.bail(EXIT_UNHEALTHY)


@main.command()
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(0, min_open=True), default=WAIT_S, show_default=True,
    metavar="SECONDS", help="How long it may take.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Kill what takes longer.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def stop(timeout_s: float, force: bool, as_json: bool) -> None:
    """Stop it. Requests in hand are answered first.

    Exit status: 0 it does not run, also when it did not before; 1 it has not ended in time.
    """
    folder = runtime.folder()
    was_running = is_running(folder.home)
    killed = _end(folder, timeout_s, force=force)
    if as_json:
        print_json({"was_running": was_running, "killed": killed})
    elif not was_running:
        out.print("The control plane is not running.")
    else:
        out.print("The control plane was killed." if killed else "The control plane has ended.")


def _end(folder: Folder, within_s: float, *, force: bool) -> bool:
    """Ends it, and what one before it may have left; whether it was killed for that.

    Raises:
        NotDone: it has not ended in time, and it was not asked for to be killed.
    """
    killed = is_running(folder.home) and not _ended(folder, within_s)
    if killed:
        if not force:
            raise NotDone(f"it has not ended in {within_s:g} s", hint="--force kills it")
        if (left := read_status(folder.home)) is not None:
            _signal(left.pid, "kill")
    mesh.reap(folder.home, grace_s=FORCED_S if killed else mesh.REAP_S)
    folder.forget()
    return killed


def _ended(folder: Folder, within_s: float) -> bool:
    """Tells it to end, as soon as it says who it is; whether it has."""
    deadline_s = time.monotonic() + within_s
    told = 0
    while is_running(folder.home) or (told and mesh.is_alive(told)):
        if time.monotonic() > deadline_s:
            return False
        found = read_status(folder.home)
        if found is not None and found.pid != told:
            told = found.pid
            _signal(told, "terminate")
        time.sleep(LOOK_S)
    return True


def _signal(pid: int, how: str) -> None:
    try:
        process = psutil.Process(pid)
        process.kill() if how == "kill" else process.terminate()
    except psutil.NoSuchProcess:
        return


@main.command()
def token() -> None:
    """Print the token that clients must show.

    They find it in COMPUTEMESH_TOKEN. On loopback none is demanded.
    """
    click.echo(_token(runtime.folder()))


def _command() -> str:
    return shlex.join([Path(sys.executable).name, "-m", "computemesh.nanoctrl"])


if __name__ == "__main__":
    main(prog_name="python -m computemesh.nanoctrl")
