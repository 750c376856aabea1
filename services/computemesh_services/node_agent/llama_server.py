"""llama.cpp servers as supervised child processes, and the pool that shares them among runs.

    starting --> ready --> restarting --> ready ...      it crashed after it had served
        |          |            |
        +------> failed <-------+                        it never served, or crashes over and over
    and stopped, from every state, by ``stop``

Servers listen on a free port of 127.0.0.1. ``llama-server`` is used when it is on PATH, else the server in
the ``xllamacpp`` wheel.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import os
import random
import shutil
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec
import psutil
import urllib3

from computemesh import log as logs
from computemesh.executors import EngineAddress
from computemesh.ids import token_from
from computemesh.process import dies_with_parent, end

HOST: Final = "127.0.0.1"

PROBE_INTERVAL_S_MAX: Final = 1.0
"""Bound on the growing interval between two looks at a server that starts."""

PROBE_TIMEOUT_S: Final = 2.0

LOG_BYTES_MAX: Final = 16 * 1024 * 1024
"""A log longer than this is set aside when its server starts, in place of the one set aside before."""

LOG_LINES_SHOWN: Final = 5

_http: Final = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(total=PROBE_TIMEOUT_S))
_log = logs.get("engines")


class EngineError(Exception):
    """No engine for this model, now.

    Args:
        code: ``unknown_model``, ``no_engine`` (nothing installed) or ``engine_failed``.
    """

    def __init__(self, reason: str, *, code: str = "engine_failed") -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


_SETTLED: Final = frozenset({EngineState.READY, EngineState.FAILED, EngineState.STOPPED})
_GONE: Final = frozenset({EngineState.FAILED, EngineState.STOPPED})


def default_threads() -> int:
    """Physical cores, but never all the logical CPUs of a machine that has several: the agent needs one."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or usable
    return max(1, min(physical, usable - 1))


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How servers are started and watched."""

    context_tokens: int = 4096
    """Of one request, prompt and answer together."""
    parallel: int = 2
    """Requests served at a time; more of them queue in the server."""
    threads: int = field(default_factory=default_threads)
    gpu_layers: int | None = None
    """Left out, llama.cpp decides."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Added to this process's own, such as ``CUDA_VISIBLE_DEVICES``."""
    startup_timeout_s: float = 120.0
    probe_interval_s: float = 0.1
    restarts_max: int = 5
    """Crashes in a row, each within :attr:`stable_s` of serving, before a server counts as failed."""
    restart_delay_s: float = 0.5
    """Before the first restart; doubles each time."""
    restart_delay_s_max: float = 30.0
    stable_s: float = 60.0
    stop_grace_s: float = 5.0


def launcher() -> list[str]:
    """The command that starts a llama.cpp server here.

    Raises:
        EngineError: nothing to start is installed.
    """
    binary = shutil.which("llama-server")
    if binary:
        return [binary]
    if importlib.util.find_spec("xllamacpp"):
        return [sys.executable, "-P", "-m", "computemesh_services.node_agent.xllamacpp_server"]
    raise EngineError("no llama.cpp: install computemesh[llama] or put llama-server on PATH", code="no_engine")


def arguments(name: str, path: Path, port: int, options: EngineOptions) -> list[str]:
    """Arguments that both servers understand."""
    chosen = [] if options.gpu_layers is None else ["-ngl", str(options.gpu_layers)]
    return [
        *("-m", str(path), "--alias", name, "--host", HOST, "--port", str(port)),
        *("-c", str(options.context_tokens * options.parallel), "-np", str(options.parallel)),
        *("-t", str(options.threads), "--metrics"),
        *chosen,
    ]


def restart_delay_s(crashes: int, options: EngineOptions, *, chance: float) -> float:
    """Before restart number *crashes*: doubles up to a bound, half of it by *chance* (0 to 1)."""
    whole = min(options.restart_delay_s_max, options.restart_delay_s * 2.0 ** min(crashes - 1, 30))
    return whole * (0.5 + 0.5 * chance)


class LlamaServer:
    """One server for one model. ``start`` it once; after ``stop`` it is of no further use.

    Args:
        log_dir: gets ``engine-<name>.log``, the server's own output.
        on_change: called in the event loop whenever :attr:`state` has changed.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        log_dir: Path,
        options: EngineOptions | None = None,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.state = EngineState.STARTING
        self.port = 0
        self._path = path
        self._options = options or EngineOptions()
        self._log_path = log_dir / f"engine-{token_from(name)}.log"
        self._on_change = on_change
        self._changed = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._process: Process | None = None
        self._error: EngineError | None = None

    @property
    def base_url(self) -> str:
        """Where it serves. The same after a restart."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The server's process, which is also its process group; None while there is none."""
        return self._process.pid if self._process else None

    @property
    def log_path(self) -> Path:
        return self._log_path

    def start(self) -> None:
        """Begins to start the server; :meth:`ready` waits for it."""
        assert self._supervisor is None, "start is called once"
        self._supervisor = asyncio.create_task(self._supervise(), name=f"engine {self.name}")

    async def ready(self) -> None:
        """Waits until it serves, through restarts.

        Raises:
            EngineError: it failed or was stopped; with the last lines of its log.
        """
        while self.state not in _SETTLED:
            self._changed.clear()
            await self._changed.wait()
        if self.state is not EngineState.READY:
            raise self._error or EngineError(f"the engine for '{self.name}' was stopped")

    async def stop(self) -> None:
        """Ends the server's process group. May be repeated."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        self._enter(EngineState.STOPPED)

    async def _supervise(self) -> None:
        try:
            await self._keep_up()
        except EngineError as error:
            self._error = error
            _log.error("engine failed", model=self.name, reason=error.reason)
            self._enter(EngineState.FAILED)

    async def _keep_up(self) -> None:
        """Starts, watches and restarts, until cancelled or too many crashes."""
        loop = asyncio.get_running_loop()
        crashes = 0
        while True:
            served_at: float | None = None
            async with self._running() as process:
                try:
                    await self._until_serving(process)
                    served_at = loop.time()
                    self._enter(EngineState.READY)
                    await process.wait()
                except EngineError:
                    if self.state is EngineState.STARTING or crashes >= self._options.restarts_max:
                        raise
            if served_at is not None and loop.time() - served_at >= self._options.stable_s:
                crashes = 0
            crashes += 1
            self._enter(EngineState.RESTARTING)
            await self._pause_after(crashes, process.returncode)

    async def _pause_after(self, crashes: int, returncode: int | None) -> None:
        if crashes > self._options.restarts_max:
            raise self._failure(f"crashed {crashes} times in a row (the last exit status was {returncode})")
        delay_s = restart_delay_s(crashes, self._options, chance=random.random())  # noqa: S311 - jitter.
        _log.warning("engine crashed", model=self.name, returncode=returncode, restart_in_s=round(delay_s, 2))
        await asyncio.sleep(delay_s)

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncGenerator[Process, None]:
        """A server process, and nothing of it afterwards."""
        self.port = self.port or free_port()
        command = [*launcher(), *arguments(self.name, self._path, self.port, self._options)]
        try:
            process = await self._spawn(command)
        except OSError as error:
            raise EngineError(f"cannot start {command[0]}: {error}") from error
        self._process = process
        try:
            yield process
        finally:
            await end(process, grace_s=self._options.stop_grace_s)
            self._process = None

    async def _spawn(self, command: list[str]) -> Process:
        log = _open_log(self._log_path)
        try:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._options.environment},
                start_new_session=True,
                preexec_fn=dies_with_parent(signal.SIGKILL),
            )
        finally:
            os.close(log)

    async def _until_serving(self, process: Process) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._options.startup_timeout_s
        interval_s = self._options.probe_interval_s
        exited = asyncio.create_task(process.wait())
        try:
            while not await asyncio.to_thread(serves, self.base_url, self.name):
                await asyncio.wait({exited}, timeout=interval_s)
                if exited.done():
                    raise self._failure(f"ended with status {process.returncode} before it served")
                if loop.time() > deadline:
                    raise self._failure(f"did not serve within {self._options.startup_timeout_s:g} s")
                interval_s = min(PROBE_INTERVAL_S_MAX, interval_s * 1.5)
        finally:
            exited.cancel()

    def _failure(self, what: str) -> EngineError:
        lines = _last_lines(self._log_path)
        return EngineError(f"the engine for '{self.name}' {what}; last lines of its log: {lines or 'none'}")

    def _enter(self, state: EngineState) -> None:
        if state is self.state:
            return
        self.state = state
        self._changed.set()
        if self._on_change:
            self._on_change()


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


class _ModelCard(msgspec.Struct):
    id: str = ""


class _ModelList(msgspec.Struct):
    data: list[_ModelCard] = []


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


def _open_log(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.replace(path.with_suffix(".log.1"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _last_lines(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return " | ".join([line.strip() for line in lines if line.strip()][-LOG_LINES_SHOWN:])


class _Slot:
    """An engine in the pool, and who uses it."""

    def __init__(self, engine: LlamaServer) -> None:
        self.engine = engine
        self.users = 0
        self.used_last = 0
        self.leaving = False


class EnginePool:
    """Engines by model, at most *engines_max* at a time, shared by any number of users.

    A model that is not loaded takes the place of the idle one that was used longest ago, and waits while
    none is idle. New users of a loaded model go first, until someone has waited for *patience_s*.

    Args:
        on_change: called in the event loop when :meth:`loaded` may have changed.
    """

    def __init__(
        self,
        models: Mapping[str, Path],
        *,
        log_dir: Path,
        engines_max: int = 1,
        options: EngineOptions | None = None,
        patience_s: float = 30.0,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        assert engines_max >= 1
        self.models = dict(models)
        self._log_dir = log_dir
        self._engines_max = engines_max
        self._options = options or EngineOptions()
        self._patience_s = patience_s
        self._on_change = on_change
        self._slots: dict[str, _Slot] = {}
        self._turns = itertools.count(1)  # Orders events; the loop's clock stands still within a millisecond.
        self._waiting: dict[int, float] = {}
        self._moved = asyncio.Event()
        self._retiring: set[asyncio.Task[None]] = set()
        self._closed = False

    def loaded(self) -> list[str]:
        """Models that an engine serves now."""
        return sorted(name for name, slot in self._slots.items() if slot.engine.state is EngineState.READY)

    @contextlib.asynccontextmanager
    async def use(self, model: str) -> AsyncGenerator[EngineAddress, None]:
        """An engine that serves *model*, for as long as the block lasts.

        Raises:
            EngineError: the model is unknown, or its engine does not start.
        """
        if model not in self.models:
            there_is = ", ".join(sorted(self.models)) or "none"
            raise EngineError(f"no model '{model}' on this node; there is: {there_is}", code="unknown_model")
        slot = await self._take(model)
        try:
            await slot.engine.ready()
            yield EngineAddress(base_url=slot.engine.base_url, model=model)
        finally:
            self._give_back(slot)

    async def close(self) -> None:
        """Stops every engine, used or not."""
        self._closed = True
        for slot in list(self._slots.values()):
            self._retire(slot)
        self._moved.set()
        while self._retiring:
            await asyncio.wait(self._retiring)

    async def _take(self, model: str) -> _Slot:
        turn = next(self._turns)
        since = asyncio.get_running_loop().time()
        try:
            while not self._closed:
                slot = self._place_for(model, turn)
                if slot is not None:
                    slot.users += 1
                    return slot
                self._waiting[turn] = since
                self._moved.clear()
                await self._moved.wait()
        finally:
            self._waiting.pop(turn, None)
        raise EngineError("the node agent is stopping")

    def _place_for(self, model: str, turn: int) -> _Slot | None:
        """A slot to use now. When there is none, it has done what will lead to one."""
        slot = self._slots.get(model)
        if slot is not None:
            if slot.engine.state in _GONE:
                self._retire(slot)
            return slot if not slot.leaving and self._may_join(turn) else None
        if len(self._slots) < self._engines_max:
            return self._load(model)
        idle = [slot for slot in self._slots.values() if slot.users == 0]
        if idle:
            self._retire(min(idle, key=lambda slot: slot.used_last))
        return None

    def _may_join(self, turn: int) -> bool:
        """Whether nobody has waited so long that whoever came later must stand behind."""
        first = min(self._waiting, default=turn)
        return turn <= first or asyncio.get_running_loop().time() - self._waiting[first] < self._patience_s

    def _load(self, model: str) -> _Slot:
        engine = LlamaServer(
            model,
            self.models[model],
            log_dir=self._log_dir,
            options=self._options,
            on_change=self._on_engine_change,
        )
        slot = self._slots[model] = _Slot(engine)
        engine.start()
        return slot

    def _give_back(self, slot: _Slot) -> None:
        slot.users -= 1
        slot.used_last = next(self._turns)
        if slot.users == 0 and slot.engine.state in _GONE:
            self._retire(slot)
        self._moved.set()

    def _retire(self, slot: _Slot) -> None:
        """Stops an engine; its place is free only once the process is gone."""
        if slot.leaving:
            return
        slot.leaving = True
        task = asyncio.create_task(self._stop(slot))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _stop(self, slot: _Slot) -> None:
        await slot.engine.stop()
        self._slots.pop(slot.engine.name, None)
        self._on_engine_change()

    def _on_engine_change(self) -> None:
        self._moved.set()
        if self._on_change:
            self._on_change()
