"""The life of a service process: configure, connect, start, ready, drain, stopped.

Crash-only: a background task that raises ends the process, and the supervisor starts it again. SIGTERM and
SIGINT drain, in this order:

1. not ready any more; the HTTP edge takes no new connection, the endpoints no new request;
2. what is in hand is finished and what was waiting is answered;
3. the service drains: finishes or hands back its own work, stores what must be stored;
4. everything sent is flushed, the connection closed, exit status 0.

Past ``drain_timeout_s`` the rest is abandoned with exit status 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar, cast

import msgspec
import uvloop
from prometheus_client import Gauge, disable_created_metrics

from computemesh import __version__, log
from computemesh.bus import Bus, BusError, MicroService, Unreachable, Where, metrics
from computemesh.bus.provision import provision
from computemesh.config import ConfigError, ServiceConfig, load
from computemesh.contracts.base import AnyServed, Role, ServiceCard
from computemesh.edge import Edge, Extra, application
from computemesh.edge.http import Doors
from computemesh.process import EXIT_CONFIG, EXIT_DEFECT
from computemesh.tasks import end_all

Spawn = Callable[[Coroutine[Any, Any, None]], None]
"""Starts a background task of the service. If it raises, the process ends."""

C = TypeVar("C", bound=ServiceConfig)

GC_THRESHOLDS: Final = (50_000, 20, 100)
"""Young objects between two collections, and so on. Messages are freed by counting references, so collecting
as often as Python does by default costs a fifth of the time under load and finds nothing."""

PROVISION_S: Final = (0.5, 4.0)
"""The first pause before streams and buckets are tried again, which doubles, and the longest."""

UNREADY_S: Final = 2.0
"""From when on the supervisor is told what a service waits for until it is ready."""

_UP = Gauge("computemesh_service_info", "Which service this process is.", ["service", "version", "instance"])
_log = log.get("lifecycle")


class Service(Protocol):
    """What a service is, to the lifecycle."""

    def endpoints(self) -> Sequence[AnyServed]:
        """The requests it answers, on the bus and over HTTP. Called once, before :meth:`start`."""
        ...

    def extras(self) -> list[Extra]:
        """Hand-written HTTP routes."""
        ...

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        """Subscribe and start the loops. Requests are served once this returned.

        Args:
            micro: where the acting replica adds, and later removes, the endpoints marked ``acting``.
        """
        ...

    async def drain(self) -> None:
        """Finish or hand back what is in hand. The bus is still there."""
        ...

    def health(self) -> Mapping[str, Any]:
        """Facts for ``/healthz``; a non-empty ``problem`` means failing."""
        ...

    def unready(self) -> str:
        """Why it cannot serve now; empty when it can."""
        ...


def run(
    card: ServiceCard,
    config_kind: type[C],
    make: Callable[[Bus, C, Callable[[], str]], Service],
    *,
    told: Mapping[str, Any] | None = None,
) -> None:
    """Runs a service until it is told to end, and exits the process.

    Args:
        make: builds the service from the bus, its configuration, and a function that gives the URL of its
            HTTP edge.
        told: what a file says of its configuration, as :func:`computemesh.config.load` takes it.
    """
    try:
        config = load(config_kind, told=told)
    except ConfigError as error:
        sys.stderr.write(f"{card.name}: {error}\n")
        sys.exit(EXIT_CONFIG)
    log.configure(card.name, level=config.log_level, form=config.log_format)
    disable_created_metrics()  # type: ignore[no-untyped-call]  # A second series for each counter; nobody reads it.
    gc.freeze()  # What was imported stays.
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        status = uvloop.run(_live(card, config, make))
    except ConfigError as error:
        _log.error("cannot start", reason=str(error))
        status = EXIT_CONFIG
    except BaseExceptionGroup as group:
        for leaf in _leaves(group):
            _log.error("ended by a defect", exc_info=leaf)
        status = EXIT_DEFECT
    sys.exit(status)


async def _live(card: ServiceCard, config: C, make: Callable[[Bus, C, Callable[[], str]], Service]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    instance = config.instance or f"{card.name}-{socket.gethostname()}-{os.getpid()}"
    _UP.labels(card.name, __version__, instance).set(1)
    edge = Edge(config)
    tell = _Supervisor(config.ready_fd)
    defects: asyncio.Queue[BaseException] = asyncio.Queue()
    bus = Bus(Where(url=config.nats_url, role=card.role, name=instance), on_defect=defects.put_nowait)
    metrics.expose(lambda: bus.stats, lambda: bus.up)
    try:
        if not await _connect(bus, card.role, config, stop, tell):
            return 0
        service = make(bus, config, lambda: edge.url)
        return await _serve(card, instance, config, bus, edge, service, stop, defects, tell)
    finally:
        edge.stop()
        await bus.close()


async def _connect(bus: Bus, role: Role, config: ServiceConfig, stop: asyncio.Event, tell: _Supervisor) -> bool:
    """Connects and provisions; False when told to end before that was done."""

    async def connect() -> None:
        try:
            await bus.connect()
        except Unreachable as error:  # Not for want of a server, for which it waits: the URL is none.
            raise ConfigError(f"NATS_URL: {error}") from None
        pause_s, told = PROVISION_S[0], ""
        while role is Role.SERVICES:
            try:
                await provision(bus, replicas=config.replicas)
                return
            except BusError as error:
                if (reason := str(error)) != told:
                    _log.warning("cannot set up streams and buckets yet", reason=reason)
                    tell.unready(f"cannot set up streams and buckets: {reason}")
                told = reason
                await asyncio.sleep(pause_s)
                pause_s = min(PROVISION_S[1], 2 * pause_s)

    connecting = asyncio.create_task(connect())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({connecting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not connecting.done():
        connecting.cancel()
        return False
    connecting.result()
    return True


async def _serve(
    card: ServiceCard,
    instance: str,
    config: ServiceConfig,
    bus: Bus,
    edge: Edge,
    service: Service,
    stop: asyncio.Event,
    defects: asyncio.Queue[BaseException],
    tell: _Supervisor,
) -> int:
    status = 0
    started_s = time.monotonic()
    draining = False

    def unready() -> str:
        if draining:
            return "draining"
        return "no connection to NATS" if not bus.up else service.unready()

    def health() -> Mapping[str, Any]:
        facts = dict(service.health())
        facts["uptime_s"] = round(time.monotonic() - started_s, 1)
        facts["nats"] = "connected" if bus.up else "reconnecting"
        facts["problem"] = "no connection to NATS" if not bus.up else facts.get("problem", "")
        return facts

    bounds = service.endpoints()
    app = application(config, Doors(card=card, health=health, unready=unready), bounds, service.extras())
    micro = MicroService(
        bus,
        name=card.name,
        description=card.about,
        metadata={"http": edge.url, "instance": instance, "pid": str(os.getpid())},
    )
    async with asyncio.TaskGroup() as group:
        background: list[asyncio.Task[None]] = []
        try:
            await service.start(lambda coroutine: background.append(group.create_task(coroutine)), micro)
            if bounds:  # What answers nothing on the bus is no service there.
                await micro.start([bound for bound in bounds if not bound.acting])
            await bus.flush()  # The server has our subscriptions before we say that we are ready.
            http = group.create_task(edge.serve(app))
            background.append(group.create_task(_say_ready(tell, edge, unready)))
            background.append(group.create_task(_end_on_defect(defects)))
            _log.info("serving", http=edge.url, instance=instance)
            await stop.wait()
            draining = True
            _log.info("draining")
            try:
                async with asyncio.timeout(config.drain_timeout_s):
                    edge.stop()
                    await micro.drain()
                    await http
                    await service.drain()
                    with contextlib.suppress(BusError):
                        await bus.flush()
            except TimeoutError:
                _log.error("could not finish in time", drain_timeout_s=config.drain_timeout_s)
                status = 1
                http.cancel()
        finally:  # The group cancels a task only once when something fails, and once may not be enough.
            await end_all(background)
    _log.info("stopped")
    return status


async def _end_on_defect(defects: asyncio.Queue[BaseException]) -> None:
    """Ends the process when a message handler met a defect. A bus that is away is not one."""
    while True:
        error = await defects.get()
        if not isinstance(error, BusError):
            raise error
        _log.warning("could not handle a message", reason=str(error))


class _Supervisor:
    """The pipe to the supervisor, if there is one: a line with each reason why the service is not ready, and a last one
    once it is."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def unready(self, reason: str) -> None:
        self._write({"unready": reason})

    def ready(self, http: str) -> None:
        self._write({"http": http})
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def _write(self, line: dict[str, str]) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.write(self._descriptor, msgspec.json.encode(line) + b"\n")


async def _say_ready(tell: _Supervisor, edge: Edge, unready: Callable[[], str]) -> None:
    """Tells the supervisor once the service can serve, and what that waits for when it takes long."""
    began_s, told = time.monotonic(), ""
    while reason := unready():
        _log.debug("not ready", reason=reason)
        if reason != told and time.monotonic() - began_s > UNREADY_S:
            tell.unready(reason)
            told = reason
        await asyncio.sleep(0.02)
    _log.info("ready")
    tell.ready(edge.url)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The single exceptions inside nested groups."""
    found: list[BaseException] = []
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            found += _leaves(cast("BaseExceptionGroup[BaseException]", error))
        else:
            found.append(error)
    return found
