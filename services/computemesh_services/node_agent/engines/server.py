"""A llama.cpp server as a supervised child process.

    starting --> ready --> restarting --> ready ...      it crashed after it had served, or hung and was killed
        |                      |
        +------> failed <------+                         it never served, or crashes over and over
    and idle, from every state, by ``stop``

It listens on a free port of 127.0.0.1. The program is the one that was configured, else ``llama-server`` where it is
on PATH, else the server in the ``xllamacpp`` wheel.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import os
import random
import shutil
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Final

import msgspec
import urllib3

from computemesh import log as logs
from computemesh.contracts.nodes import EngineState
from computemesh.ids import token_from
from computemesh.process import dies_with_parent, end, signal_group
from computemesh_services.node_agent.engines.device import DeviceRef
from computemesh_services.node_agent.engines.options import EngineOptions, ModelOptions, why_refused
from computemesh_services.node_agent.engines.orphans import MARK, Marks
from computemesh_services.node_agent.engines.place import EngineError

HOST: Final = "127.0.0.1"

PROBE_FIRST_S: Final = 0.05
"""Between the first two looks at a server that starts; the interval grows from there."""

PROBE_TIMEOUT_S: Final = 2.0

LOOK_TIMEOUT_S: Final = 5.0
LOOK_INTERVAL_S: Final = 5.0
"""Bounds on a look at a server that serves, and on the time between two."""

LOOKS_MISSED_MIN: Final = 3
"""A server that hangs has left so many looks in a row unanswered, however short the time it is given."""

LISTENS_S: Final = 0.02
"""The event loop stands still for so long, at most; on this machine a connection takes a fraction of a millisecond."""

LOG_BYTES_MAX: Final = 16 * 1024 * 1024
"""A log longer than this is set aside when its server starts, in place of the one set aside before."""

LOG_LINES_SHOWN: Final = 5
LOG_TAIL_BYTES: Final = 8192

_SETTLED: Final = frozenset({EngineState.READY, EngineState.FAILED, EngineState.IDLE})

_http: Final = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(total=PROBE_TIMEOUT_S))
_log = logs.get("engines")


def launcher(program: str = "") -> list[str]:
    """The command that starts a llama.cpp server here.

    Args:
        program: the one to use, as a path or a name on PATH; left out, whatever is installed.

    Raises:
        EngineError: there is no such program, or nothing is installed.
    """
    if program:
        found = shutil.which(Path(program).expanduser())
        if found is None:
            reason = f"COMPUTEMESH_LLAMA_SERVER={program!r}: no such program, or it may not be run"
            raise EngineError(reason, code="no_engine")
        return [found]
    if binary := shutil.which("llama-server"):
        return [binary]
    if importlib.util.find_spec("xllamacpp"):
        return [sys.executable, "-P", "-m", "computemesh_services.node_agent.engines.xllamacpp_server"]
    raise EngineError("no llama.cpp: install computemesh[llama] or put llama-server on PATH", code="no_engine")


def arguments(
    model: ModelOptions, path: Path, port: int, *, device: DeviceRef | None = None, options: EngineOptions
) -> list[str]:
    """What a server is started with; both kinds understand it.

    Raises:
        EngineError: one of the model's own arguments is up to the agent.
    """
    context_tokens = model.ctx_size or options.context_tokens
    threads = model.threads or (device.threads if device else 0) or options.threads
    words = [
        *("-m", str(path), "--alias", model.name, "--host", HOST, "--port", str(port)),
        *("-c", str(context_tokens * options.parallel), "-np", str(options.parallel)),
        *("-t", str(threads), "--metrics"),
    ]
    chosen = {
        "-tb": model.threads_batch,
        "-b": model.batch_size,
        "-ub": model.ubatch_size,
        # Metal, for one, cannot be hidden from an engine that is to stay on CPUs.
        "-ngl": 0 if device and device.backend == "cpu" else model.gpu_layers,
        "-mg": model.main_gpu,
        "-ts": ",".join(f"{part:g}" for part in model.tensor_split) or None,
        "-fa": model.flash_attn,
    }
    for flag, value in chosen.items():
        if value is not None:
            words += [flag, str(value)]
    if model.embeddings:
        words.append("--embeddings")
    for name, given in model.server_args.items():
        if refused := why_refused(name, given):
            raise EngineError(f"the engine for '{model.name}' is not started: {refused}")
        if given is not False:
            words += [f"--{name}"] if given is True else [f"--{name}", str(given)]
    return words


def restart_delay_s(crashes: int, options: EngineOptions, *, chance: float) -> float:
    """Before restart number *crashes*: doubles up to a bound, half of it by *chance* (0 to 1)."""
    whole = min(options.restart_delay_s_max, options.restart_delay_s * 2.0 ** min(crashes - 1, 30))
    return whole * (0.5 + 0.5 * chance)


def log_path(log_dir: Path, device: str) -> Path:
    """Where the engines of a device print."""
    return log_dir / f"engine-{token_from(device)}.log"


class LlamaServer:
    """One server for one model on one device. ``start`` it once; after ``stop`` it is of no further use.

    Args:
        path: the model's file.
        log_dir: gets ``engine-<device>.log``, the server's own output.
        marks: where it is written down while it runs.
        on_change: called in the event loop whenever :attr:`state` has changed.
    """

    def __init__(
        self,
        model: ModelOptions,
        path: Path,
        device: DeviceRef,
        *,
        log_dir: Path,
        marks: Marks,
        options: EngineOptions,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self.state = EngineState.STARTING
        self.port = 0
        self.restarts = 0
        """After crashes."""
        self.error: EngineError | None = None
        """Why it failed."""
        self._path = path
        self._device = device
        self._options = options
        self._marks = marks
        self._log_path = log_path(log_dir, device.id)
        self._log_from = 0
        self._on_change = on_change
        self._changed = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._process: Process | None = None

    @property
    def base_url(self) -> str:
        """Where it serves; the same after a restart, if nobody has taken the port meanwhile."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The server's process, which is also its process group; None while there is none."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Begins to start the server; :meth:`ready` waits for it."""
        assert self._supervisor is None, "start is called once"
        self._supervisor = asyncio.create_task(self._supervise(), name=f"engine {self._device.id}")

    async def ready(self) -> None:
        """Waits until it serves, through restarts.

        Raises:
            EngineError: it failed or was stopped; with the last lines of its log.
        """
        while self.state not in _SETTLED:
            self._changed.clear()
            await self._changed.wait()
        if self.state is not EngineState.READY:
            raise self.error or EngineError(f"the engine for '{self.model.name}' was stopped")

    async def stop(self) -> None:
        """Ends the server's process group. May be repeated."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        self._enter(EngineState.IDLE)

    async def _supervise(self) -> None:
        try:
            await self._keep_up()
        except EngineError as error:
            self.error = error
            _log.error("engine failed", device=self._device.id, model=self.model.name, reason=error.reason)
            self._enter(EngineState.FAILED)

    async def _keep_up(self) -> None:
        """Starts, watches and restarts, until cancelled or too many crashes."""
        loop = asyncio.get_running_loop()
        crashes = 0
        while True:
            served_s = 0.0
            async with self._running() as process:
                try:
                    await self._until_serving(process)
                    served_at = loop.time()
                    self._enter(EngineState.READY)
                    served_s = await self._until_ended(process) - served_at
                except EngineError:
                    if self.state is EngineState.STARTING or crashes >= self._options.restarts_max:
                        raise
                    self.port = 0  # Perhaps somebody else has it now.
            if served_s >= self._options.stable_s:
                crashes = 0
            crashes += 1
            self._enter(EngineState.RESTARTING)
            await self._pause_after(crashes, process.returncode)
            self.restarts += 1

    async def _pause_after(self, crashes: int, returncode: int | None) -> None:
        if crashes > self._options.restarts_max:
            raise self._failure(f"crashed {crashes} times in a row (the last exit status was {returncode})")
        delay_s = restart_delay_s(crashes, self._options, chance=random.random())  # noqa: S311 - jitter.
        _log.warning(
            "engine crashed",
            device=self._device.id,
            model=self.model.name,
            returncode=returncode,
            restart_in_s=round(delay_s, 2),
        )
        await asyncio.sleep(delay_s)

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncGenerator[Process, None]:
        """A server process, and nothing of it afterwards."""
        self.port = self.port or free_port()
        command = [
            *launcher(self._options.program),
            *arguments(self.model, self._path, self.port, device=self._device, options=self._options),
        ]
        async with self._marked() as mark:
            try:
                process = await self._spawn(command, mark)
            except OSError as error:
                raise EngineError(f"cannot start {command[0]}: {error}") from error
            self._process = process
            try:
                yield process
            finally:
                await end(process, grace_s=self._options.stop_grace_s)
                self._process = None

    @contextlib.asynccontextmanager
    async def _marked(self) -> AsyncGenerator[str, None]:
        try:
            mark = self._marks.new(self._device.id)
        except OSError as error:
            raise EngineError(f"cannot write down what is started: {error}") from error
        try:
            yield mark
        finally:
            await asyncio.to_thread(self._marks.drop, mark)

    async def _spawn(self, command: list[str], mark: str) -> Process:
        log = _open_log(self._log_path)
        try:
            self._log_from = os.fstat(log).st_size
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._device.environment, MARK: mark},
                start_new_session=True,
                preexec_fn=_born(self._device.cpus),
            )
        finally:
            os.close(log)

    async def _until_serving(self, process: Process) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._options.start_max_s
        interval_s = min(PROBE_FIRST_S, self._options.probe_interval_s)
        exited = asyncio.create_task(process.wait())
        try:
            while not await asyncio.to_thread(serves, self.base_url, self.model.name):
                await asyncio.wait({exited}, timeout=interval_s)
                if exited.done():
                    raise self._failure(f"ended with status {process.returncode} before it served")
                if loop.time() > deadline:
                    raise self._failure(f"did not serve within {self._options.start_max_s:g} s")
                interval_s = min(self._options.probe_interval_s, interval_s * 1.5)
        finally:
            exited.cancel()

    async def _until_ended(self, process: Process) -> float:
        """Waits for the end of a server that serves; one that hangs is killed. Gives the time until which it was well,
        on the loop's clock."""
        watch = asyncio.create_task(self._kill_when_hung(process), name=f"watch of engine {self._device.id}")
        try:
            await process.wait()
            return watch.result() if watch.done() else asyncio.get_running_loop().time()
        finally:
            watch.cancel()

    async def _kill_when_hung(self, process: Process) -> float:
        """Gives the time of the first of the looks that stayed without an answer, on the loop's clock."""
        hung_s = self._options.hung_s
        if not hung_s:
            await asyncio.Future[None]()  # Until it is cancelled.
        loop = asyncio.get_running_loop()
        timeout_s = min(LOOK_TIMEOUT_S, max(0.5, hung_s / 6))
        well_until = loop.time()
        missed = 0
        while missed < LOOKS_MISSED_MIN or loop.time() - well_until < hung_s:
            await asyncio.sleep(min(LOOK_INTERVAL_S, hung_s / 10))
            if not missed:
                well_until = loop.time()
            missed = 0 if await asyncio.to_thread(answers, self.base_url, timeout_s) else missed + 1
        _log.error(
            "engine hangs, and is killed",
            device=self._device.id,
            model=self.model.name,
            unanswered_s=round(loop.time() - well_until, 1),
        )
        if process.returncode is None:
            signal_group(process.pid, signal.SIGKILL)
        return well_until

    def _failure(self, what: str) -> EngineError:
        lines = _last_lines(self._log_path, self._log_from)
        return EngineError(f"the engine for '{self.model.name}' {what}; last lines of its log: {lines or 'none'}")

    def _enter(self, state: EngineState) -> None:
        if state is self.state:
            return
        self.state = state
        self._changed.set()
        if self._on_change:
            self._on_change()


def _born(cpus: tuple[int, ...]) -> Callable[[], None]:
    """What a server's process does first: it asks to die with the agent, and keeps to its CPUs."""
    ask = dies_with_parent(signal.SIGKILL)

    def born() -> None:
        if ask is not None:
            ask()
        if cpus and sys.platform == "linux":
            os.sched_setaffinity(0, cpus)

    return born


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def listens(port: int) -> bool:
    """Whether somebody accepts connections there, as far as that shows within ``LISTENS_S``. A server that dies closes
    its port and its connections before anybody is told that it is dead."""
    with socket.socket() as probe:
        probe.settimeout(LISTENS_S)
        return probe.connect_ex((HOST, port)) not in (errno.ECONNREFUSED, errno.ECONNRESET)


class _Card(msgspec.Struct):
    id: str = ""


class _ModelList(msgspec.Struct):
    data: list[_Card] = []


def serves(base_url: str, name: str) -> bool:
    """Whether a server is up at *base_url* and serves *name*. Blocks, for a bounded time."""
    try:
        if _http.request("GET", f"{base_url}/health").status != 200:
            return False
        answer = _http.request("GET", f"{base_url}/v1/models")
        cards = msgspec.json.decode(answer.data, type=_ModelList).data
    except (urllib3.exceptions.HTTPError, ValueError):
        return False
    return answer.status == 200 and any(card.id == name for card in cards)


def answers(base_url: str, timeout_s: float) -> bool:
    """Whether a server at *base_url* gives any answer at all within *timeout_s*. Blocks for so long."""
    try:
        _http.request("GET", f"{base_url}/health", timeout=urllib3.Timeout(total=timeout_s))
    except urllib3.exceptions.HTTPError:
        return False
    return True


def _open_log(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.replace(path.with_suffix(".log.1"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _last_lines(path: Path, start: int) -> str:
    """The last lines printed since the log was *start* bytes long."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - LOG_TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return " | ".join([line.strip() for line in lines if line.strip()][-LOG_LINES_SHOWN:])
