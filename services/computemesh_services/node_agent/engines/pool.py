"""The engines of a node: one llama.cpp server a device, and the lines of those who want a place on them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Final

from computemesh import log as logs
from computemesh.contracts.base import Refused
from computemesh.contracts.nodes import EngineCard, EngineState, EngineUse, ModelCard
from computemesh.executors import EngineAddress
from computemesh.models import parts
from computemesh_services.node_agent.engines import choice, rate
from computemesh_services.node_agent.engines.choice import DeviceView, EngineView, Hold, Load, No, Run, Waiting
from computemesh_services.node_agent.engines.device import DeviceMetrics, DeviceRef
from computemesh_services.node_agent.engines.options import EngineOptions, ModelOptions
from computemesh_services.node_agent.engines.orphans import Marks
from computemesh_services.node_agent.engines.place import EngineError, Place
from computemesh_services.node_agent.engines.server import LlamaServer, listens, log_path, restart_delay_s

PENDING_MAX: Final = 2

METER_S: Final = 2.0
"""How often an engine at work is asked how much it has put out."""

RETRY_S_MIN: Final = 1.0
RETRY_S_MAX: Final = 30.0

LOOK_S: Final = 0.05
"""Until it is seen again whether a server that closed its port is dead."""

LATER_S: Final = 5.0
"""When to ask again for a model that is being loaded or fetched."""

_log = logs.get("engines")


class _Waiter:
    """Somebody in the line of a device."""

    def __init__(self, model: str, since_s: float, *, work: bool) -> None:
        self.model = model
        self.work = work
        self.since_s = since_s
        self.view = Waiting(model=model, since_s=since_s, work=work)
        """It, as the decisions see it."""
        self.new = True
        """It has not waited yet."""
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class _Bar:
    """A model that failed on a device: it is not tried there again before *until_s*."""

    def __init__(self, error: EngineError, failures: int, until_s: float) -> None:
        self.error = error
        self.failures = failures
        self.until_s = until_s


class _StartError(EngineError):
    """The engine that was waited for has failed."""


class _Station:
    """A device, the server on it, those who use it and those who wait."""

    def __init__(self, device: DeviceRef) -> None:
        self.device = device
        self.server: LlamaServer | None = None
        self.model = ""
        """In memory, or about to be."""
        self.since_s = 0.0
        """When it became ready, or its start began."""
        self.line: list[_Waiter] = []
        self.running = 0
        self.works = 0
        self.used_at = 0
        self.changing: asyncio.Task[None] | None = None
        """Ends a server and starts another one."""
        self.draining = False
        self.told: tuple[EngineState, str] = (EngineState.IDLE, "")
        """Its state and model when others were last called because of them."""
        self.alarm: asyncio.TimerHandle | None = None
        """Looks again at what to do next."""
        self.idle: asyncio.TimerHandle | None = None
        """Ends a server that nobody uses."""
        self.bars: dict[str, _Bar] = {}
        self.restarts = 0
        """Of servers that are gone."""
        self.rate = rate.Rate()
        self.meter: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        return self.changing is None and self.server is not None and self.server.state is EngineState.READY

    @property
    def pending(self) -> int:
        return self.running + sum(not one.work for one in self.line)

    @property
    def quiet(self) -> bool:
        return not (self.running or self.works or self.line or self.changing)


class EnginePool:
    """Places on the engines of this node, for requests and for work items.

    A request takes a place by :meth:`admit`, a work item by :meth:`use`. Each joins the line of one device; which one,
    and whose turn it is, is decided in ``choice``.

    Args:
        models: what can be served.
        devices: where; each has one server at a time.
        marks: where running servers are written down.
        metrics: how the devices are doing, by their ids; called for each request, so it must be cheap.
        pending_max: requests that a device takes, those at work and those that wait.
        idle_s: after so long without use a server is ended; 0 = never.
        patience_s: how long those who need the model in memory may overtake one who needs another.
        locate: the file of a model, or why there is none yet; left out, the path in its options. Begins nothing.
        missing: told the name of a model that is needed and has no file yet; says in how many seconds it is worth
            asking again.
        on_change: called in the event loop when a device's state or model has changed.
        on_pending: called in the event loop when the number of requests of a device has changed.
    """

    def __init__(
        self,
        models: Iterable[ModelOptions],
        *,
        log_dir: Path,
        marks: Marks,
        devices: Iterable[DeviceRef] = (DeviceRef(id="cpu:0"),),
        metrics: Callable[[], Mapping[str, DeviceMetrics]] = dict,
        options: EngineOptions | None = None,
        pending_max: int = PENDING_MAX,
        idle_s: float = 0.0,
        patience_s: float = 5.0,
        locate: Callable[[ModelOptions], Path | Refused] | None = None,
        missing: Callable[[str], float] | None = None,
        on_change: Callable[[], None] | None = None,
        on_pending: Callable[[], None] | None = None,
    ) -> None:
        self.models: Mapping[str, ModelOptions] = {}
        """By name and by alias."""
        self._log_dir = log_dir
        self._marks = marks
        self._stations = {device.id: _Station(device) for device in devices}
        self._metrics = metrics
        self._options = options or EngineOptions()
        self._pending_max = pending_max
        self._idle_s = idle_s
        self._patience_s = patience_s
        self._locate = locate or _own_path
        self._missing = missing or _later
        self._on_change = on_change or _nothing
        self._on_pending = on_pending or _nothing
        self._uses = itertools.count(1)
        self._request_s = RETRY_S_MIN
        """How long requests take, lately."""
        self._sizes: dict[Path, int | None] = {}
        self._closed = False
        self.offer(models)

    # --- what there is -------------------------------------------------------------------------------------------

    def offer(self, models: Iterable[ModelOptions]) -> None:
        """Serves these models from now on. Who has a place, or waits for one, keeps it."""
        found: dict[str, ModelOptions] = {}
        for model in models:
            for name in filter(None, (model.name, model.alias)):
                if found.setdefault(name, model) is not model:
                    _log.warning("model", reason=f"two models are called '{name}'; {found[name].name} is used")
        self.models = found

    def equip(self, devices: Iterable[DeviceRef]) -> None:
        """Has these devices, and no others. Before anybody asks for a place."""
        assert all(at.quiet and at.server is None for at in self._stations.values()), "nobody has a place yet"
        self._stations = {device.id: _Station(device) for device in devices}

    @property
    def devices(self) -> list[DeviceRef]:
        return [at.device for at in self._stations.values()]

    def metrics(self) -> Mapping[str, DeviceMetrics]:
        """How the devices are doing, by their ids, as far as that is known."""
        return self._metrics()

    def loaded(self) -> list[str]:
        """Names of the models that an engine serves now."""
        served = {at.model for at in self._stations.values() if at.ready}
        return sorted(name for name, model in self.models.items() if model.name in served)

    def cards(self) -> list[EngineCard]:
        return [
            EngineCard(
                device=device.id,
                backend=device.backend,
                name=device.name[:200],
                slots=self._options.parallel,
                pending_max=self._pending_max,
            )
            for device in self.devices
        ]

    def model_cards(self) -> list[ModelCard]:
        return [self._model_card(name, model) for name, model in sorted(self.models.items())]

    def _model_card(self, name: str, model: ModelOptions) -> ModelCard:
        path = self._locate(model)
        return ModelCard(
            name=name,
            present=isinstance(path, Path),
            size_mb=self._size_mb(path) if isinstance(path, Path) else None,
            context_tokens=model.ctx_size or self._options.context_tokens,
            embeddings=model.embeddings,
            roles=list(model.roles),
        )

    def uses(self) -> list[EngineUse]:
        now_s = asyncio.get_running_loop().time()
        return [
            EngineUse(
                device=at.device.id,
                state=_state(at),
                model=at.model[:200],
                pending=at.pending,
                tokens_per_s=round(at.rate.per_s(now_s), 1),
                restarts=at.restarts + (at.server.restarts if at.server else 0),
            )
            for at in self._stations.values()
        ]

    def log_path(self, device: str) -> Path | None:
        """Where the engines of *device* print; None when there is no such device."""
        return log_path(self._log_dir, device) if device in self._stations else None

    def pids(self) -> dict[str, int]:
        """The processes of the servers that run, by device."""
        found = {name: at.server.pid for name, at in self._stations.items() if at.server}
        return {name: pid for name, pid in found.items() if pid is not None}

    # --- places --------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def admit(self, model: str, device: str = "") -> AsyncGenerator[Place, None]:
        """A place for one request, for as long as the block lasts. Waits for its turn, and for the model to be loaded.

        Args:
            device: the one that is wished for.

        Raises:
            EngineError: with one of the codes of ``place``; ``unavailable`` when the model is not loaded within the
                time for a start. The start goes on, for the next who asks.
        """
        wanted = self._known(model)
        began_s = asyncio.get_running_loop().time()
        async with self._place(wanted, wish=device) as at:
            yield Place(base_url=_url(at), model=wanted.name, device=at.device.id)
        took_s = asyncio.get_running_loop().time() - began_s
        self._request_s += 0.2 * (took_s - self._request_s)

    @contextlib.asynccontextmanager
    async def use(self, model: str) -> AsyncGenerator[EngineAddress, None]:
        """An engine that serves *model* to a work item, for as long as the block lasts. Waits without a bound.

        Raises:
            EngineError: the model is unknown, or its engine does not start.
        """
        wanted = self._known(model)
        async with self._place(wanted, work=True) as at:
            yield EngineAddress(base_url=_url(at), model=wanted.name)

    async def ensure_server(self, device: str, model: str) -> None:
        """Has *device* serve *model*, once its turn comes: others who use or await it go first.

        Raises:
            EngineError: the model is unknown, or its engine does not start.
        """
        async with self._place(self._known(model), work=True, only=self._stations[device]):
            pass

    async def close(self) -> None:
        """Ends every server, used or not; whoever waits is refused."""
        self._closed = True
        ending: list[asyncio.Task[None]] = []
        for at in self._stations.values():
            for timer in (at.alarm, at.idle):
                if timer:
                    timer.cancel()
            while at.line:
                at.line.pop().turn.set_exception(EngineError("the node agent is stopping", code="unavailable"))
            if at.meter:
                at.meter.cancel()
            ending.append(asyncio.create_task(self._end(at)))
        if ending:
            await asyncio.wait(ending)

    async def _end(self, at: _Station) -> None:
        if at.changing:
            await asyncio.wait({at.changing})
        if at.server:
            await at.server.stop()

    def _known(self, name: str) -> ModelOptions:
        if model := self.models.get(name):
            return model
        there_is = ", ".join(sorted(self.models)) or "none"
        raise EngineError(f"no model '{name}' on this node; there is: {there_is}", code="unknown_model")

    def _path(self, model: ModelOptions) -> Path:
        found = self._locate(model)
        if isinstance(found, Refused):
            raise EngineError(found.reason, code="unavailable", retry_after_s=self._missing(model.name))
        return found

    @contextlib.asynccontextmanager
    async def _place(
        self, model: ModelOptions, *, wish: str = "", work: bool = False, only: _Station | None = None
    ) -> AsyncGenerator[_Station, None]:
        at = await self._wait(model, wish=wish, work=work, only=only)
        try:
            yield at
        finally:
            self._leave(at, work=work)

    async def _wait(self, model: ModelOptions, *, wish: str, work: bool, only: _Station | None) -> _Station:
        """Waits in the lines of devices until the turn has come; a device where the model fails is left for
        another."""
        since_s = asyncio.get_running_loop().time()
        tried: set[str] = set()
        while True:
            if self._closed:
                raise EngineError("the node agent is stopping", code="unavailable")
            at = self._choose(model, wish=wish, work=work, only=only, tried=tried)
            waiter = _Waiter(model.name, since_s, work=work)
            self._join(at, waiter)
            try:
                await self._turn(at, waiter)
            except _StartError:
                tried.add(at.device.id)
            else:
                return at

    async def _turn(self, at: _Station, waiter: _Waiter) -> None:
        """Waits for the turn of *waiter*; its place in the line, or at work, is given up when that fails."""
        loop = asyncio.get_running_loop()
        until_s = waiter.since_s + self._options.startup_timeout_s
        try:
            while not waiter.turn.done():
                await asyncio.wait({waiter.turn}, timeout=None if waiter.work else until_s - loop.time())
                if at.ready and at.model == waiter.model:
                    until_s = loop.time() + self._options.startup_timeout_s  # It waits for others, not for a start.
                elif not (waiter.work or waiter.turn.done()):
                    raise self._late(at, waiter.model)
        except BaseException:
            if waiter.turn.done() and not waiter.turn.exception():
                self._leave(at, work=waiter.work)
            elif waiter in at.line:
                at.line.remove(waiter)
                self._on_pending()
                self._advance(at)
            raise
        waiter.turn.result()

    def _late(self, at: _Station, model: str) -> EngineError:
        what = "is being loaded" if at.model == model else f"waits until {at.model} is no longer in use"
        reason = f"'{model}' {what} on {at.device.id}; not ready within {self._options.startup_timeout_s:g} s"
        return EngineError(reason, code="unavailable", retry_after_s=LATER_S)

    def _choose(
        self, model: ModelOptions, *, wish: str, work: bool, only: _Station | None, tried: Collection[str]
    ) -> _Station:
        now_s = asyncio.get_running_loop().time()
        stations = [only] if only else list(self._stations.values())
        if not stations:
            raise EngineError("this node has no device for engines", code="no_engine")
        metrics = self._metrics()
        found = choice.choose(
            model.name,
            [self._view(at, model.name, metrics.get(at.device.id), now_s, tried) for at in stations],
            pending_max=None if work else self._pending_max,
            size_mb=self._size_mb(self._path(model)),
            wish=wish,
        )
        if isinstance(found, DeviceView):
            return self._stations[found.id]
        if found is No.BARRED:
            bar = min((at.bars[model.name] for at in stations), key=lambda bar: bar.until_s)
            later_s = max(RETRY_S_MIN, bar.until_s - now_s)
            raise EngineError(bar.error.reason, code=bar.error.code, retry_after_s=later_s)
        pending = ", ".join(f"{at.device.id} {at.pending}" for at in stations)
        raise EngineError(
            f"each device takes {self._pending_max} requests at a time, and has them: {pending}",
            code="too_many_requests",
            retry_after_s=min(RETRY_S_MAX, max(RETRY_S_MIN, self._request_s)),
        )

    def _view(
        self, at: _Station, model: str, metrics: DeviceMetrics | None, now_s: float, tried: Collection[str]
    ) -> DeviceView:
        bar = at.bars.get(model)
        return DeviceView(
            id=at.device.id,
            model=at.model,
            ready=at.ready,
            pending=at.pending,
            works=at.works + sum(one.work for one in at.line),
            total_mb=metrics.memory_total_mb if metrics else None,
            free_mb=metrics.memory_free_mb if metrics else None,
            used_at=at.used_at,
            barred=at.device.id in tried or (bar is not None and bar.until_s > now_s),
        )

    def _size_mb(self, path: Path) -> int | None:
        """Of a model's files, MiB; looked up once."""
        if path not in self._sizes:
            try:
                self._sizes[path] = sum(part.stat().st_size for part in parts(path)) // 2**20
            except OSError:
                return None
        return self._sizes[path]

    # --- what a device does --------------------------------------------------------------------------------------

    def _join(self, at: _Station, waiter: _Waiter) -> None:
        at.line.append(waiter)
        if at.idle:
            at.idle.cancel()
            at.idle = None
        self._on_pending()
        self._advance(at)
        waiter.new = False

    def _leave(self, at: _Station, *, work: bool) -> None:
        if work:
            at.works -= 1
        else:
            at.running -= 1
        at.used_at = next(self._uses)
        self._on_pending()
        self._advance(at)

    def _advance(self, at: _Station) -> None:
        """Does whatever is to be done next. Called whenever something about the device has changed."""
        loop = asyncio.get_running_loop()
        if at.alarm:
            at.alarm.cancel()
            at.alarm = None
        while not (self._closed or at.changing):
            move = choice.next_move(
                self._engine_view(at),
                [one.view for one in at.line],
                now_s=loop.time(),
                patience_s=self._patience_s,
            )
            match move:
                case Run(index):
                    if not (at.line[index].new or listens(_port(at))):
                        # Whoever was before it broke off because the server died; that will be known in a moment.
                        at.alarm = loop.call_later(LOOK_S, self._advance, at)
                        return
                    self._run(at, at.line.pop(index))
                case Load(model):
                    self._change(at, model)
                case Hold(until_s, draining):
                    if until_s is not None:
                        at.alarm = loop.call_at(until_s, self._advance, at)
                    at.draining = draining
                    self._tell(at)
                    self._maybe_idle(at)
                    return

    def _engine_view(self, at: _Station) -> EngineView:
        return EngineView(
            model=at.model,
            ready=at.ready,
            since_s=at.since_s,
            running=at.running,
            works=at.works,
            slots=self._options.parallel,
        )

    def _run(self, at: _Station, waiter: _Waiter) -> None:
        if waiter.work:
            at.works += 1
        else:
            at.running += 1
        at.used_at = next(self._uses)
        waiter.turn.set_result(None)
        if at.meter is None or at.meter.done():
            at.meter = asyncio.create_task(self._measure(at))

    def _maybe_idle(self, at: _Station) -> None:
        if self._idle_s > 0 and at.quiet and at.server and at.idle is None:
            at.idle = asyncio.get_running_loop().call_later(self._idle_s, self._idle_over, at)

    def _idle_over(self, at: _Station) -> None:
        at.idle = None
        if at.quiet and at.server:
            _log.info("engine ended", device=at.device.id, model=at.model, idle_s=self._idle_s)
            self._change(at, "")

    def _change(self, at: _Station, model: str) -> None:
        """Begins to replace what is loaded; an empty *model* loads nothing."""
        if at.idle:
            at.idle.cancel()
            at.idle = None
        at.model = model
        at.since_s = asyncio.get_running_loop().time()
        at.draining = False
        at.changing = asyncio.create_task(self._replace(at, model), name=f"change {at.device.id}")
        self._tell(at)

    async def _replace(self, at: _Station, model: str) -> None:
        """The memory of the old server is free before the new one begins."""
        if at.server:
            await at.server.stop()
            at.restarts += at.server.restarts
            at.server = None
        try:
            if model:
                at.server = self._new_server(at, model)
                at.server.start()
        except EngineError as error:
            self._failed(at, error)
        finally:
            at.changing = None
        self._tell(at)
        self._advance(at)

    def _new_server(self, at: _Station, name: str) -> LlamaServer:
        model = self._known(name)
        return LlamaServer(
            model,
            self._path(model),
            at.device,
            log_dir=self._log_dir,
            marks=self._marks,
            options=self._options,
            on_change=lambda: self._server_changed(at),
        )

    def _server_changed(self, at: _Station) -> None:
        if self._closed or at.server is None or at.changing:
            return
        if at.server.state is EngineState.READY:
            at.since_s = asyncio.get_running_loop().time()
            at.bars.pop(at.model, None)
            _log.info("engine ready", device=at.device.id, model=at.model)
        elif at.server.state is EngineState.FAILED:
            self._failed(at, at.server.error or EngineError("it failed"))
            self._change(at, "")
            return
        self._tell(at)
        self._advance(at)

    def _failed(self, at: _Station, error: EngineError) -> None:
        """Bars the model from the device for a while, and tells who waits for it."""
        failures = 1 + (at.bars[at.model].failures if at.model in at.bars else 0)
        pause_s = restart_delay_s(failures, self._options, chance=random.random())  # noqa: S311 - jitter.
        at.bars[at.model] = _Bar(error, failures, asyncio.get_running_loop().time() + pause_s)
        for one in [one for one in at.line if one.model == at.model]:
            at.line.remove(one)
            one.turn.set_exception(_StartError(error.reason, code=error.code))
        at.model = ""

    def _tell(self, at: _Station) -> None:
        now = (_state(at), at.model)
        if now != at.told:
            at.told = now
            self._on_change()

    async def _measure(self, at: _Station) -> None:
        """Follows what an engine puts out while it is at work."""
        loop = asyncio.get_running_loop()
        before: float | None = None
        pid: int | None = None
        while at.running or at.works:
            server = at.server
            if server is not None and at.ready:
                tokens = await asyncio.to_thread(rate.read_tokens, server.base_url)
                if tokens is not None and before is not None and pid == server.pid and tokens > before:
                    at.rate.add(tokens - before, loop.time())
                before, pid = tokens, server.pid
            await asyncio.sleep(METER_S)


def _state(at: _Station) -> EngineState:
    if at.draining:
        return EngineState.DRAINING
    if at.changing and at.model:
        return EngineState.STARTING
    if at.server:
        return EngineState.DRAINING if at.changing and at.server.state is EngineState.READY else at.server.state
    now_s = asyncio.get_running_loop().time()
    return EngineState.FAILED if any(bar.until_s > now_s for bar in at.bars.values()) else EngineState.IDLE


def _url(at: _Station) -> str:
    assert at.server is not None, "a turn comes only when a server is ready"
    return at.server.base_url


def _port(at: _Station) -> int:
    assert at.server is not None, "a turn comes only when a server is ready"
    return at.server.port


def _own_path(model: ModelOptions) -> Path | Refused:
    if model.path is not None:
        return model.path
    return Refused(code="unavailable", reason=f"the file of '{model.name}' is not on this node", status=503)


def _later(_model: str) -> float:
    return LATER_S


def _nothing() -> None:
    """For whoever does not want to be called."""
