"""The shell around reigns: stands by for the lease, reigns, and answers questions about work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from computemesh import log
from computemesh.bus import Bucket, Bus, BusError, Conflict, MicroService, Mirror, NotStored, lease
from computemesh.bus.connection import ASK_TIMEOUT_S
from computemesh.bus.micro import Endpoint
from computemesh.contracts import storage, work
from computemesh.contracts.base import MESSAGE_BYTES_MAX, AnyBound, Refused, encode, serve
from computemesh.contracts.nodes import NodeRecord
from computemesh.contracts.services import WORK_MARSHALLER
from computemesh.contracts.work import (
    Blacklist,
    BlacklistGet,
    BlacklistPardon,
    WorkCancel,
    WorkExplanation,
    WorkGet,
    WorkItem,
    WorkItems,
    WorkList,
    WorkLogs,
    WorkLogsGet,
    WorkRecord,
    WorkResult,
)
from computemesh.edge import Extra
from computemesh.ids import new_id
from computemesh.lifecycle import Spawn
from computemesh_services.work_marshaller import listing, outputs, workitem
from computemesh_services.work_marshaller.blacklist import BlacklistPolicy
from computemesh_services.work_marshaller.config import MarshallerConfig
from computemesh_services.work_marshaller.edge import WorkEdge
from computemesh_services.work_marshaller.objects import Objects
from computemesh_services.work_marshaller.outputs import LogPlace
from computemesh_services.work_marshaller.reign import CHECKED_HEADER, Reign
from computemesh_services.work_marshaller.scheduler import Limits
from computemesh_services.work_marshaller.workitem import RetryPolicy

AGAIN_S: Final = 0.2
AGAIN_S_MAX: Final = 5.0
"""Pause before the next reign; doubled while they keep breaking off at once because the server refuses to store."""

LOG_LOOK_S: Final = 0.1
"""How often it is seen whether an attempt has begun, while somebody waits for its log."""

STEADY_S: Final = 10.0
"""A reign that lasted this long was no failure to start."""


def pause_s(before_s: float, lasted_s: float, *, refused: bool) -> float:
    """How long to wait before the next reign.

    Args:
        before_s: the pause before the one that ended.
        refused: the server would not store what it decided, and likely will not at once again. Any other end, such as
            a connection that broke, is no reason to wait: until the lease can be taken nothing is read.
    """
    return min(AGAIN_S_MAX, before_s * 2) if refused and lasted_s <= STEADY_S else AGAIN_S


_log = log.get("service")


class WorkMarshaller:
    """Decides what runs where until it is done.

    Any number may run. The one that holds the lease acts and answers; the others stand by and pass on what
    their HTTP edge is asked. Two that act at once do no harm: records are written by compare-and-set.
    """

    def __init__(self, bus: Bus, config: MarshallerConfig, instance: str) -> None:
        self._bus = bus
        self._config = config
        self._instance = instance
        self._bucket = Bucket(bus, storage.WORK)
        self._objects = Objects(bus)
        self._edge = WorkEdge(
            self._objects,
            payload_bytes_max=config.payload_bytes_max,
            on_request=self.on_request,
            on_result=self.on_result,
            on_logs=self.on_logs,
        )
        self._reign: Reign | None = None
        """The present reign, once it has caught up."""
        self._newest: Reign | None = None
        """The present reign, also while it recovers."""
        self._serving = False
        self._standing_by = False
        self._draining = asyncio.Event()
        self._ended = asyncio.Event()
        self._endpoints: list[Endpoint] = []
        self._nodes: Mirror[NodeRecord] = Mirror(bus, storage.NODES, self._on_node)
        self._limits = Limits(
            waiting_max=config.work_waiting_max,
            retry=RetryPolicy(retries_max=config.work_retry_max, delay_s=config.work_retry_delay),
            blacklist=BlacklistPolicy(after=config.work_blacklist_after, hold_s=config.work_blacklist_s),
        )

    def endpoints(self) -> list[AnyBound]:
        return [
            serve(work.REQUEST, self.on_request, acting=True),
            serve(work.GET, self.on_get, acting=True),
            serve(work.LIST, self.on_list, acting=True),
            serve(work.CANCEL, self.on_cancel, acting=True),
            serve(work.EXPLAIN, self.on_explain, acting=True),
            serve(work.BLACKLIST, self.on_blacklist, acting=True),
            serve(work.PARDON, self.on_pardon, acting=True),
            serve(work.RESULT, self.on_result, acting=True),
            serve(work.LOGS, self.on_logs, acting=True),
            *self._objects.endpoints(),
        ]

    def extras(self) -> list[Extra]:
        return self._edge.extras()

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        spawn(self._nodes.follow())
        spawn(self._reign_forever(micro))

    async def drain(self) -> None:
        """Stores all that is decided and gives the lease back."""
        self._draining.set()
        await self._ended.wait()

    def health(self) -> Mapping[str, Any]:
        reign = self._reign
        if reign is None:
            return {"acting": False}
        return {"acting": True, "waiting": reign.scheduler.waiting, "out": reign.scheduler.out}

    def unready(self) -> str:
        return "" if self._standing_by or self._serving else "recovering"

    # --- reigns ------------------------------------------------------------------------------------------------

    async def _reign_forever(self, micro: MicroService) -> None:
        waits_s = AGAIN_S
        try:
            while not self._draining.is_set():
                began_s = time.monotonic()
                held = await self._acquire()
                if held is None:
                    break
                try:
                    reason, refused = await self._reign_once(held, micro)
                except BusError as error:
                    reason, refused = str(error), isinstance(error, NotStored | Conflict)
                finally:
                    await held.release()
                _log.info("stepped down", reason=reason)
                if not self._draining.is_set():
                    waits_s = pause_s(waits_s, time.monotonic() - began_s, refused=refused)
                    await asyncio.sleep(waits_s)
        finally:
            self._ended.set()

    async def _acquire(self) -> lease.Held | None:
        """The lease, or None when told to end meanwhile."""
        await self._bus.connected.wait()
        acquiring = asyncio.create_task(
            lease.acquire(self._bus, WORK_MARSHALLER.name, self._instance, on_wait=self._stand_by)
        )
        draining = asyncio.create_task(self._draining.wait())
        await asyncio.wait({acquiring, draining}, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        self._standing_by = False
        if acquiring.done():
            return acquiring.result()
        acquiring.cancel()
        return None

    def _stand_by(self) -> None:
        if not self._standing_by:
            _log.info("standing by: another replica acts")
        self._standing_by = True

    async def _reign_once(self, held: lease.Held, micro: MicroService) -> tuple[str, bool]:
        """Why it ended, and whether that was because the server refused to store."""
        reign = Reign(self._bus, held, self._nodes, self._limits, keep_s=self._config.work_keep_s)
        self._newest = reign
        running = asyncio.create_task(reign.run(self._draining))
        caught_up = asyncio.create_task(reign.caught_up.wait())
        try:
            await asyncio.wait({running, caught_up}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                self._reign = reign
                acting = [bound for bound in self.endpoints() if bound.acting]
                self._endpoints = [await micro.add(bound, acts=lambda: held.certain) for bound in acting]
                await self._bus.flush()  # The server knows our endpoints before we say that we are ready.
                self._serving = True
            return await running, reign.refused
        finally:
            self._reign = self._newest = None
            self._serving = False
            caught_up.cancel()
            running.cancel()
            for endpoint in self._endpoints:
                await micro.remove(endpoint)
            self._endpoints = []

    def _on_node(self, node_id: str, node: NodeRecord | None) -> None:
        if self._newest is not None:
            self._newest.node_changed(node_id, node)

    # --- questions ---------------------------------------------------------------------------------------------

    async def on_request(self, item: WorkItem) -> WorkRecord | Refused:
        """Checks an item, stores it in the inbox, and answers with the item as it stands."""
        reign = self._reign
        if reign is None:
            return await self._bus.ask(work.REQUEST, item)
        if item.work_id is None:
            item = msgspec.structs.replace(item, work_id=new_id("w"))
        elif existing := await self._find(reign, item.work_id):
            return existing
        assert item.work_id is not None
        if refusal := reign.scheduler.refusal(item, time.time()) or await self._unmet(reign, item):
            return refusal
        if item.payload_object and (refusal := await self._objects.refusal(item.payload_object)):
            return refusal
        try:
            seq = await self._bus.store(work.SUBMIT, item, headers={CHECKED_HEADER: "1"})
        except NotStored as error:
            if len(encode(item)) > MESSAGE_BYTES_MAX:
                return Refused(
                    code="too_large",
                    reason=f"the item has {len(encode(item))} bytes, more than {MESSAGE_BYTES_MAX}",
                    status=413,
                )
            return Refused(code="not_stored", reason=str(error), status=503, retry="later")
        # Whoever asks for the item after our answer must find it.
        await reign.read_up_to(seq)
        known = reign.scheduler.records.get(item.work_id)
        return known or workitem.received(item, item.work_id, seq, time.time())

    async def _unmet(self, reign: Reign, item: WorkItem) -> Refused | None:
        """The refusal of an item that waits for one that there is not."""
        found = await asyncio.gather(*(self._find(reign, work_id) for work_id in item.after))
        for position, (work_id, record) in enumerate(zip(item.after, found, strict=True)):
            if record is None:
                return Refused(
                    code="unknown_dependency",
                    reason=f"there is no work item {work_id!r}; submit it first",
                    field=f"after[{position}]",
                )
        return None

    async def on_get(self, ask: WorkGet) -> WorkRecord | Refused:
        if self._reign is None:
            return await self._bus.ask(work.GET, ask)
        return await self._find(self._reign, ask.work_id) or _unknown(ask.work_id)

    async def on_list(self, ask: WorkList) -> WorkItems | Refused:
        if self._reign is None:
            return await self._bus.ask(work.LIST, ask)
        return listing.page(self._reign.scheduler.records.values(), ask)

    async def on_cancel(self, ask: WorkCancel) -> WorkRecord | Refused:
        reign = self._reign
        if reign is None:
            return await self._bus.ask(work.CANCEL, ask)
        record = await reign.cancel(ask.work_id, ask.reason) or await self._find(reign, ask.work_id)
        if record is None:
            return _unknown(ask.work_id)
        if workitem.is_final(record) and record.state is not work.WorkState.CANCELLED:
            return Refused(
                code="already_final",
                reason=f"{ask.work_id} is {record.state} and stays so",
                field="work_id",
                status=409,
            )
        return record

    async def on_explain(self, ask: WorkGet) -> WorkExplanation | Refused:
        reign = self._reign
        if reign is None:
            return await self._bus.ask(work.EXPLAIN, ask)
        record = await self._find(reign, ask.work_id)
        return reign.scheduler.explain(record, time.time()) if record else _unknown(ask.work_id)

    async def on_blacklist(self, ask: BlacklistGet) -> Blacklist | Refused:
        if self._reign is None:
            return await self._bus.ask(work.BLACKLIST, ask)
        return Blacklist(entries=self._reign.scheduler.blacklist.entries(ask.node_id))

    async def on_pardon(self, ask: BlacklistPardon) -> Blacklist | Refused:
        if self._reign is None:
            return await self._bus.ask(work.PARDON, ask)
        pardoned = await self._reign.pardon(ask.node_id, ask.work_type)
        if not pardoned:
            what = f" for {ask.work_type!r}" if ask.work_type else ""
            return Refused(
                code="not_blacklisted", reason=f"{ask.node_id} is not blacklisted{what}", field="node_id", status=404
            )
        return Blacklist(entries=pardoned)

    async def on_result(self, ask: WorkGet) -> WorkResult | Refused:
        reign = self._reign
        if reign is None:
            return await self._bus.ask(work.RESULT, ask)
        record = await self._find(reign, ask.work_id)
        return outputs.result_of(record) if record else _unknown(ask.work_id)

    async def on_logs(self, ask: WorkLogsGet) -> WorkLogs | Refused:
        """A part of a log: from the object store once it is there, else from the node. Before the first attempt there
        is nothing, for which one may wait as well."""
        until_s = time.monotonic() + ask.wait_s
        while True:
            reign = self._reign
            if reign is None:
                return await self._bus.ask(work.LOGS, ask, timeout_s=ask.wait_s + ASK_TIMEOUT_S)
            record = await self._find(reign, ask.work_id)
            if record is None:
                return _unknown(ask.work_id)
            place = outputs.log_place(record, ask)
            if isinstance(place, Refused):
                return place
            if place.attempt:
                return await self._log_part(ask, place)
            if place.ended or time.monotonic() >= until_s:
                return WorkLogs(work_id=ask.work_id, attempt=0, replica=ask.replica, complete=place.ended)
            await asyncio.sleep(LOG_LOOK_S)

    async def _log_part(self, ask: WorkLogsGet, place: LogPlace) -> WorkLogs | Refused:
        if place.object is not None:
            part = await self._objects.log_part(place.object, ask.offset, ask.limit)
            if part is not None:
                return msgspec.structs.replace(
                    part, work_id=ask.work_id, attempt=place.attempt, replica=ask.replica, node_id=place.node_id
                )
        asked = msgspec.structs.replace(ask, attempt=place.attempt)
        try:
            return await self._bus.ask(work.NODE_LOG, asked, target=place.node_id, timeout_s=ask.wait_s + ASK_TIMEOUT_S)
        except BusError as error:
            if not place.ended:
                raise
            reason = f"node {place.node_id}, where it was printed, does not answer, and nothing else keeps it: {error}"
            return Refused(code="no_log", reason=reason, status=404)

    async def _find(self, reign: Reign, work_id: str) -> WorkRecord | None:
        if (record := reign.scheduler.records.get(work_id)) and (settled := await reign.settled(record)):
            return settled
        return await reign.stored(work_id)


def _unknown(work_id: str) -> Refused:
    return Refused(code="not_found", reason=f"no work item {work_id!r}", field="work_id", status=404)
