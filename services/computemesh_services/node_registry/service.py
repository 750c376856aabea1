"""The shell around the roster and the fleet: what nodes say comes in; records, events and answers go out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, cast

from prometheus_client import Counter as Total
from prometheus_client import Gauge

from computemesh import log
from computemesh.bus import Bucket, Bus, BusError, Conflict, MicroService, Mirror, Writer, lease
from computemesh.contracts import nodes, storage
from computemesh.contracts.base import MESSAGE_BYTES_MAX, AnyBound, Message, Refused, decode, serve
from computemesh.contracts.nodes import (
    Discover,
    NodeAlive,
    NodeAnnouncement,
    NodeBrief,
    NodeBriefs,
    NodeDrain,
    NodeDrained,
    NodeForget,
    NodeForgotten,
    NodeGet,
    NodeHeartbeat,
    NodeList,
    NodeMarked,
    NodeRecord,
    NodeRefused,
    NodesCleaned,
    NodesCleanup,
    NodesQuery,
    NodesStats,
    NodeState,
    NodeUndrain,
    NodeView,
    Session,
    StatsAsk,
)
from computemesh.contracts.services import NODE_REGISTRY
from computemesh.edge import Extra
from computemesh.ids import Id
from computemesh.lifecycle import Spawn
from computemesh_services.node_registry import roster
from computemesh_services.node_registry.config import RegistryConfig
from computemesh_services.node_registry.fleet import Fleet, Known, Page
from computemesh_services.node_registry.keys import Keys
from computemesh_services.node_registry.losses import Losses
from computemesh_services.node_registry.rolemesh_door import RoleMeshDoor

SWEEPS: Final = 5
"""Looks at everyone's silence per time of patience, and one a second at least."""

ECHO_S: Final = 1.0
"""When the server takes longer to answer, silence is the bus's fault."""

ASK_S: Final = 0.5
"""How long unknown nodes are collected before they are asked to announce themselves."""

ASK_AGAIN_S: Final = 10.0
"""How often one node is asked, and one agent is told that it is refused."""

ASKED_MAX: Final = 1000
"""Nodes in one question."""

RECORD_BYTES_MAX: Final = 256 * 1024
"""What is kept of a node; a larger announcement is refused."""

ANSWER_BYTES_MAX: Final = MESSAGE_BYTES_MAX - 16 * 1024
"""Nodes in one answer, as JSON; the rest is for what stands around them."""

STRIDE: Final = 250
"""Nodes that are encoded before others get their turn."""

FORGET_LOOK_S: Final = 60.0
FORGET_AT_ONCE: Final = 1000
MARKER_S: Final = 3600
"""How long a forgotten node leaves a marker in the store."""

NEWS_MAX: Final = 8
"""Nodes whose changes are logged one by one; more of them at the same time get one line."""

Step = Callable[[NodeRecord | None], NodeRecord | None]

_log = log.get("service")

NODES = Gauge("computemesh_nodes", "Nodes by state.", ["state"])
HEARTBEATS = Total("computemesh_node_heartbeats_total", "Heartbeats heard.")
LOSSES = Total("computemesh_nodes_lost_total", "Losses told by this replica.")


class _Claim(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Who says it, of what cannot be used otherwise."""

    node_id: Id
    session: Session = ""


class Seldom:
    """Lets each key pass once in a while."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._passed: dict[str, float] = {}

    def passes(self, key: str, now_s: float) -> bool:
        if now_s - self._passed.get(key, float("-inf")) < self._every_s:
            return False
        self._passed.pop(key, None)
        while self._passed and now_s - next(iter(self._passed.values())) >= self._every_s:
            del self._passed[next(iter(self._passed))]  # They stand in the order of their time.
        self._passed[key] = now_s
        return True


class NodeRegistry:
    """Answers who is here.

    Every replica hears everyone and answers from its own mirror of the bucket; the one that holds the lease
    writes what follows from announcements, heartbeats and silence. What somebody asks for is written by
    whoever was asked. Liveness is in memory: after a start every node gets its full patience again.
    """

    def __init__(self, bus: Bus, config: RegistryConfig, instance: str) -> None:
        self._bus = bus
        self._instance = instance
        self._patience = config.patience()
        self._forget_after_s = config.forget_after_s
        self._bucket = Bucket(bus, storage.NODES)
        self._mirror: Mirror[NodeRecord] = Mirror(bus, storage.NODES, self._on_record)
        self._writer = Writer(bus, storage.NODES, self._mirror)
        self._fleet = Fleet()
        self._keys = Keys(bus)
        self._losses = Losses(bus)
        self._deaf_s = 0.0
        """How long this process was halted; that much silence is not the nodes' own."""
        self._listens_since_s = self._now_s()
        self._connection = bus.interrupted
        """Stands for the connection that was looked at last."""
        self._started_at = time.time() - time.monotonic()
        self._heard_all: Callable[[], Awaitable[bool]] | None = None
        self._unknown: dict[str, NodeHeartbeat] = {}
        """Heartbeats of those who are to be asked to announce themselves."""
        self._asked = Seldom(ASK_AGAIN_S)
        self._refused = Seldom(ASK_AGAIN_S)
        self._news: list[NodeRecord] = []
        self._held: lease.Held | None = None
        self._draining = False

    def endpoints(self) -> list[AnyBound]:
        return [
            serve(nodes.REGISTER, self.on_register),
            serve(nodes.ALIVE, self.on_alive),
            serve(nodes.QUERY, self.on_query),
            serve(nodes.LIST, self.on_list),
            serve(nodes.DRAIN, self.on_drain),
            serve(nodes.UNDRAIN, self.on_undrain),
            serve(nodes.STATS, self.on_stats),
            serve(nodes.GET, self.on_get),
            serve(nodes.FORGET, self.on_forget),
            serve(nodes.CLEANUP, self.on_cleanup),
            *self._keys.endpoints(),
        ]

    def extras(self) -> list[Extra]:
        return RoleMeshDoor(self, stale_after_s=self._patience.suspect_after_s).routes()

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        await self._writer.start()
        spawn(self._mirror.follow())
        spawn(self._keys.follow())
        await self._bus.subscribe(nodes.ANNOUNCE, self.on_announce, garbled=self._on_garbled)
        await self._bus.subscribe(nodes.LOST, self._losses.on_lost)
        beats = await self._bus.subscribe(nodes.HEARTBEAT, self.on_heartbeat)
        self._heard_all = lambda: self._bus.caught_up(beats, within_s=self._patience.suspect_after_s / SWEEPS)
        spawn(self._act_forever())
        spawn(self._sweep_forever())
        spawn(self._ask_forever())

    async def drain(self) -> None:
        self._draining = True
        if self._held is not None:
            await self._held.release()
        await self._writer.stop()

    def health(self) -> Mapping[str, Any]:
        states = {str(state): self._fleet.states[state] for state in NodeState}
        return {"acting": self._acting, "nodes": len(self._fleet.nodes), **states}

    def unready(self) -> str:
        if not self._mirror.synced.is_set():
            return "reading the nodes"
        return "" if self._keys.known else "reading the keys"

    @property
    def _acting(self) -> bool:
        return self._held is not None and self._held.certain

    def _now_s(self) -> float:
        """Seconds in which nodes could be heard."""
        return time.monotonic() - self._deaf_s

    def _at(self) -> float:
        """Unix seconds by a clock that does not jump: for times that are compared with stored ones."""
        return self._started_at + time.monotonic()

    def _on_record(self, node_id: str, record: NodeRecord | None) -> None:
        known = self._fleet.get(node_id)
        before = known.record if known else None
        if record is None:
            self._fleet.drop(node_id)
            self._losses.noticed(node_id, None, 0)
            return
        fresh = self._mirror.synced.is_set()
        self._fleet.take(record, self._now_s(), time.time(), fresh=fresh)
        self._losses.noticed(node_id, record, self._mirror.entries[node_id].revision)
        if fresh and (before is None or (before.state, before.epoch) != (record.state, record.epoch)):
            self._news.append(record)

    # --- what nodes say ------------------------------------------------------------------------------------------

    async def on_announce(self, said: NodeAnnouncement) -> None:
        known = self._fleet.get(said.node_id)
        if refused := self._why_refused(known.record if known else None, said):
            await self._tell_refused(said, refused)
            return
        if known is not None:
            known.seen(self._now_s(), time.time())
        if self._acting:
            await self._writer.submit(said.node_id, lambda record: self._announced(record, said))

    def _announced(self, record: NodeRecord | None, said: NodeAnnouncement) -> NodeRecord | None:
        return record if roster.why_refused(record, said) else roster.announced(record, said, self._at())

    async def on_heartbeat(self, beat: NodeHeartbeat) -> None:
        HEARTBEATS.inc()
        known = self._fleet.get(beat.node_id)
        if known is None or not roster.of_this_life(known.record, beat):
            if self._acting and not beat.leaving:
                await self._on_stranger(known, beat)
            return
        await self._on_known(known, beat)

    async def _on_known(self, known: Known, beat: NodeHeartbeat) -> None:
        now = time.time()
        known.says(beat, self._now_s(), now)
        if roster.heard(known.record, beat, now) is not known.record and self._acting:
            await self._writer.submit(beat.node_id, _of_a_known_node(lambda record: roster.heard(record, beat, now)))

    async def _on_stranger(self, known: Known | None, beat: NodeHeartbeat) -> None:
        """Somebody is alive who did not announce itself, or whose announcement does not count."""
        said = NodeAnnouncement(node_id=beat.node_id, session=beat.session)
        if known is not None and (refused := self._why_refused(known.record, said)):
            await self._tell_refused(said, refused)
        elif beat.node_id in self._unknown or self._asked.passes(beat.node_id, time.monotonic()):
            self._unknown[beat.node_id] = beat

    def _is_strange(self, beat: NodeHeartbeat) -> bool:
        """Whether the sender is still not known; its announcement may have been on its way."""
        known = self._fleet.get(beat.node_id)
        return known is None or not roster.of_this_life(known.record, beat)

    def _why_refused(self, record: NodeRecord | None, said: NodeAnnouncement) -> Refused | None:
        if reason := roster.why_refused(record, said):
            return Refused(code="duplicate_node", field="node_id", reason=reason, status=409, retry="later")
        if reason := roster.too_large(said, RECORD_BYTES_MAX):
            return Refused(code="too_large", reason=reason, status=413)
        return None

    async def _tell_refused(self, said: NodeAnnouncement, refused: Refused) -> None:
        if not self._acting or not self._refused.passes(f"{said.node_id} {said.session}", time.monotonic()):
            return
        _log.warning("refused", node=said.node_id, hostname=said.hostname, reason=refused.reason)
        event = NodeRefused(
            node_id=said.node_id,
            session=said.session,
            machine_id=said.machine_id,
            hostname=said.hostname,
            code=refused.code,
            reason=refused.reason,
            field=refused.field,
        )
        await self._bus.publish(nodes.REFUSED, event)

    async def _on_garbled(self, data: bytes, refused: Refused) -> None:
        """Answers an announcement that is none, where it can be read whose it was meant to be."""
        whose = decode(data, _Claim)
        if isinstance(whose, _Claim):
            await self._tell_refused(NodeAnnouncement(node_id=whose.node_id, session=whose.session), refused)

    async def on_register(self, said: NodeAnnouncement) -> NodeRecord | Refused:
        """Any replica may write this one: the compare-and-set is the fence, and the caller waits for it."""
        refused: Refused | None = None

        def decide(record: NodeRecord | None) -> NodeRecord | None:
            nonlocal refused
            refused = self._why_refused(record, said)
            return record if refused else roster.registered(record, said, self._at())

        after = await self._writer.change(said.node_id, decide)
        if refused is not None:
            return refused
        assert after is not None
        _log.info("registered", node=said.node_id, tier=after.tier, delivery=after.delivery)
        return after

    async def on_alive(self, beat: NodeHeartbeat) -> NodeAlive | Refused:
        record = await self.record(beat.node_id)
        if record is None or not roster.of_this_life(record, beat):
            if record is not None and beat.session in record.retired and record.state is not NodeState.LOST:
                reason = f"another agent has the node id {beat.node_id!r}"
                return Refused(code="duplicate_node", field="session", reason=reason, status=409, retry="later")
            field = "node_id" if record is None else "session"
            which = f"node {beat.node_id!r}" if record is None else f"session {beat.session!r} of {beat.node_id!r}"
            reason = f"{which} is not known; announce yourself"
            return Refused(code="unknown_node", field=field, reason=reason, status=404)
        await self._bus.publish(nodes.HEARTBEAT, beat)
        return NodeAlive(node_id=record.node_id, state=record.state, epoch=record.epoch, drained=record.drained)

    # --- what others ask -----------------------------------------------------------------------------------------

    async def on_query(self, query: NodesQuery) -> NodeList | Refused:
        page = await self._page(query, Known.full)
        if isinstance(page, Refused):
            return page
        return NodeList(nodes=cast("list[NodeView]", page.taken), count=page.count, next=page.next)

    async def on_list(self, query: NodesQuery) -> NodeBriefs | Refused:
        page = await self._page(query, Known.brief)
        if isinstance(page, Refused):
            return page
        return NodeBriefs(nodes=cast("list[NodeBrief]", page.taken), count=page.count, next=page.next)

    async def _page(self, query: NodesQuery, encoded: Callable[[Known], bytes]) -> Page | Refused:
        page = self._fleet.page(query)
        if isinstance(page, Refused):
            return page
        while not page.fill(encoded, bytes_max=ANSWER_BYTES_MAX, nodes_max=STRIDE):  # noqa: ASYNC110
            await asyncio.sleep(0)  # Others get their turn.
        return page

    async def on_get(self, ask: NodeGet) -> NodeView | Refused:
        record = await self.record(ask.node_id)
        return self._view(record) if record else _no_node(ask.node_id)

    async def on_stats(self, _: StatsAsk) -> NodesStats | Refused:
        return self._fleet.stats()

    async def record(self, node_id: str) -> NodeRecord | None:
        """A node's record; one that another replica wrote just now too."""
        if known := self._fleet.get(node_id):
            return known.record
        entry = await self._bucket.get(node_id)
        return entry.value if entry else None

    def _view(self, record: NodeRecord) -> NodeView:
        known = self._fleet.get(record.node_id)
        return (known if known is not None else Known(record)).view()

    # --- what operators say --------------------------------------------------------------------------------------

    async def on_drain(self, ask: NodeDrain) -> NodeDrained | Refused:
        return await self._mark(ask.node_id, lambda record: roster.drained(record, ask.reason, self._at()))

    async def on_undrain(self, ask: NodeUndrain) -> NodeDrained | Refused:
        return await self._mark(ask.node_id, lambda record: roster.undrained(record, self._at()))

    async def _mark(self, node_id: str, mark: Callable[[NodeRecord], NodeRecord]) -> NodeDrained | Refused:
        changed = False

        def decide(record: NodeRecord | None) -> NodeRecord | None:
            nonlocal changed
            after = mark(record) if record else None
            changed = after is not record
            return after

        # What another replica wrote this moment counts: else an undrain could find nothing to undo.
        after = await self._writer.change(node_id, decide) if await self._reread(node_id) else None
        if after is None:
            return _no_node(node_id)
        _log.info("drained" if after.drained else "undrained", node=node_id, reason=after.drain_reason, changed=changed)
        # Also when nothing changed: who asks again may do so because somebody did not hear it.
        with contextlib.suppress(BusError):  # It is stored; who does not hear it finds it in the list.
            await self._bus.publish(nodes.MARKED, NodeMarked(node_id=node_id, drained=after.drained))
        return NodeDrained(node=self._view(after), changed=changed)

    async def _reread(self, node_id: str) -> bool:
        """Brings the mirror up to date about one node, and says whether there is such a node."""
        entry = await self._bucket.get(node_id)
        if entry is not None:
            self._mirror.wrote(node_id, entry.value, entry.revision)
        return entry is not None

    async def on_forget(self, ask: NodeForget) -> NodeForgotten | Refused:
        while True:
            entry = await self._bucket.get(ask.node_id)
            if entry is None:
                return _no_node(ask.node_id)
            if not ask.force and not roster.may_forget(entry.value):
                reason = f"{ask.node_id} is {entry.value.state}; it is forgotten once it is lost, or with `force`"
                return Refused(code="still_here", field="node_id", reason=reason, status=409)
            try:
                await self._forget(ask.node_id, entry.revision)
            except Conflict:
                continue
            return NodeForgotten(node_id=ask.node_id)

    async def on_cleanup(self, ask: NodesCleanup) -> NodesCleaned | Refused:
        at = self._at()
        return NodesCleaned(node_ids=await self._forget_all(lambda record: roster.may_clean(record, at, ask.silent_s)))

    async def _forget(self, node_id: str, revision: int) -> None:
        marker = await self._bucket.purge(node_id, last=revision, marker_ttl_s=MARKER_S)
        self._mirror.wrote(node_id, None, marker)
        _log.info("forgotten", node=node_id)

    # --- loops ---------------------------------------------------------------------------------------------------

    async def _act_forever(self) -> None:
        """Holds the lease whenever possible. Whoever starts to act asks everyone who they are."""
        while not self._draining:
            await self._bus.connected.wait()
            await self._mirror.synced.wait()
            held = await lease.acquire(self._bus, NODE_REGISTRY.name, self._instance, on_wait=lambda: None)
            try:
                await self._losses.take_over(self._mirror.entries)
                await self._bus.publish(nodes.DISCOVER, Discover())
            except BusError as error:
                _log.warning("cannot begin to act", reason=str(error))
                await held.release()
            self._held = held
            await held.lost.wait()

    async def _ask_forever(self) -> None:
        """Asks those who are alive and not known to announce themselves."""
        while True:
            await asyncio.sleep(ASK_S)
            beats, self._unknown = self._unknown, {}
            unknown = [node_id for node_id, beat in beats.items() if self._is_strange(beat)]
            for node_id in beats.keys() - set(unknown):  # Their announcements were on the way.
                known = self._fleet.get(node_id)
                if known is not None and known.beat is None:
                    await self._on_known(known, beats[node_id])
            for at in range(0, len(unknown), ASKED_MAX):
                try:
                    await self._bus.publish(nodes.DISCOVER, Discover(node_ids=unknown[at : at + ASKED_MAX]))
                except BusError as error:
                    _log.warning("cannot ask nodes to announce themselves", reason=str(error))

    async def _sweep_forever(self) -> None:
        """Notices silence. What was not heard because we were halted, or the bus was away, is not the nodes' fault."""
        pause_s = min(1.0, self._patience.suspect_after_s / SWEEPS)
        forget_s = time.monotonic()
        while True:
            asleep_s = time.monotonic()
            await asyncio.sleep(pause_s)
            halted_s = time.monotonic() - asleep_s - pause_s
            if halted_s > pause_s:
                self._deaf_s += halted_s
            if not await self._bus_delivers():
                self._listens_since_s = self._now_s()
            for state in NodeState:
                NODES.labels(state).set(self._fleet.states[state])
            self._log_news()
            if not self._acting:
                continue
            try:
                await self._sweep()
                LOSSES.inc(await self._losses.tell())
                if time.monotonic() - forget_s >= FORGET_LOOK_S:
                    forget_s = time.monotonic()
                    await self._forget_lost()
            except BusError as error:
                _log.warning("cannot sweep", reason=str(error))

    async def _bus_delivers(self) -> bool:
        """Whether the connection stood since the last time, and what goes through the server does so at once.

        A server that is halted, or a network that holds everything back, keeps the connection up; and when it goes
        on, what we send may be done before what nodes sent long ago is delivered.
        """
        connection, self._connection = self._connection, self._bus.interrupted
        if not self._bus.up or self._bus.interrupted is not connection:
            return False
        asked_s = time.monotonic()
        try:
            await self._bus.flush()
        except BusError:
            return False
        return time.monotonic() - asked_s < ECHO_S

    async def _sweep(self) -> None:
        if not self._silent() or self._heard_all is None or not await self._heard_all():
            return
        waits: list[asyncio.Task[NodeRecord | None]] = []
        for known, silent_s in self._silent():
            step = self._silencing(known.record, silent_s, known.seen_at)
            waits.append(asyncio.create_task(self._writer.change(known.record.node_id, step)))
        await asyncio.gather(*waits, return_exceptions=True)

    def _silent(self) -> list[tuple[Known, float]]:
        """Those whose silence makes a difference, and how long it lasts."""
        now_s = self._now_s()
        horizon_s = now_s - min(self._patience.suspect_after_s, self._patience.unmonitored_ttl_s)
        if self._listens_since_s > horizon_s:
            return []
        found: list[tuple[Known, float]] = []
        for known in self._fleet.nodes.values():
            if known.heard_s is not None and known.heard_s > horizon_s:
                continue
            silent_s = self._silent_s(known, now_s)
            if roster.state_after(known.record, silent_s, self._patience) is not known.record.state:
                found.append((known, silent_s))
        return found

    def _silent_s(self, known: Known, now_s: float) -> float:
        if known.record.monitored:
            return now_s - max(self._listens_since_s, known.heard_s or 0.0)
        if known.heard_s is not None:
            return now_s - known.heard_s
        # It was asked to announce itself when somebody began to act, and has time to.
        if now_s - self._listens_since_s < self._patience.lost_after_s:
            return 0.0
        return self._at() - known.record.last_seen

    def _silencing(self, judged: NodeRecord, silent_s: float, seen_at: float) -> Step:
        def step(latest: NodeRecord) -> NodeRecord:
            if not roster.same_life(latest, judged):
                return latest
            return roster.silent(latest, silent_s, self._at(), self._patience, seen_at=seen_at)

        return _of_a_known_node(step)

    async def _forget_lost(self) -> None:
        at = self._at()
        await self._forget_all(lambda record: roster.forgotten(record, at, self._forget_after_s))

    async def _forget_all(self, due: Callable[[NodeRecord], bool]) -> list[str]:
        """Forgets the nodes that are *due*, though not very many at once; gives their ids."""
        gone: list[str] = []
        for node_id in [key for key, entry in self._mirror.entries.items() if due(entry.value)][:FORGET_AT_ONCE]:
            entry = self._mirror.entries.get(node_id)
            if entry is None or not due(entry.value):
                continue
            try:
                await self._forget(node_id, entry.revision)
            except Conflict:
                continue  # It is back.
            gone.append(node_id)
        return gone

    def _log_news(self) -> None:
        news, self._news = self._news, []
        if not self._acting:
            return
        if len(news) <= NEWS_MAX:
            for record in news:
                _log.info("node", node=record.node_id, state=record.state, epoch=record.epoch)
        else:
            states = Counter(str(record.state) for record in news)
            _log.info("nodes", **states, first=news[0].node_id)


def _of_a_known_node(step: Callable[[NodeRecord], NodeRecord]) -> Step:
    return lambda record: step(record) if record is not None else None


def _no_node(node_id: str) -> Refused:
    return Refused(code="not_found", reason=f"no node {node_id!r}", field="node_id", status=404)
