"""Writing decisions: what waits for one node is decided together and written by one compare-and-set.

A refusal is only given by a record that was the newest: one that a write proved to be, or that was read for it.
Two things concern more than one node's record. They are settled by marks, small keys beside the records, that
are written together with a record, all or none:

- ``claim.<reservation id>``: where a reservation whose id the caller chose was granted, so that asking again,
  of another replica even, cannot have it granted on two nodes. It expires, as nobody repeats a request so late.
- ``owner.<hash>``: the latest grant to an owner that has a quota. Whoever grants it more names the mark's
  revision, and counts by records at least as new.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

import msgspec
from prometheus_client import Counter

from computemesh import trace
from computemesh.bus import Bucket, Conflict, Mirror, TimedOut, Write
from computemesh.contracts.base import Refused
from computemesh.contracts.gpus import GpuGrant, GpuLedger, GpuReleased, GpuReservation, LedgerMark
from computemesh_services.gpu_orchestrator import ledger as ledgers
from computemesh_services.gpu_orchestrator.config import Quotas
from computemesh_services.gpu_orchestrator.ledger import Answer, Decided, NoRoom, Quota, Reserve, Want
from computemesh_services.gpu_orchestrator.room import Facts, live

GROUP_MAX: Final = 128
"""Requests of one write."""

PATIENCE_S: Final = 4.0
"""How long races may be lost in a row: less than callers wait for an answer."""

TOGETHER_MAX: Final = 16
"""Writes of several keys under way; the server bounds them."""

CLAIM_S: Final = 60
"""How long a claim stands."""

CAUGHT_UP_S: Final = 2.0
"""How long the mirror may take to show what is known to be stored."""

WRITES = Counter("computemesh_gpu_ledger_writes_total", "Records written, by what came of it.", ["outcome"])
_STORED = WRITES.labels("stored")
_LOST = WRITES.labels("lost_race")


class Elsewhere(msgspec.Struct, frozen=True, gc=False):
    """The id stands for a reservation on another node."""

    node_id: str


Outcome = Answer | Elsewhere

Tell = Callable[[GpuReservation | GpuReleased], Awaitable[None]]


@dataclass(slots=True)
class Waiting:
    """A request at a desk."""

    want: Want
    claims: bool
    since: int
    """Revision up to which the store was known when it was asked."""
    answer: asyncio.Future[Outcome]
    traceparent: str


@dataclass(slots=True)
class Known:
    """What was read of the marks that a group of requests needs."""

    claims: dict[str, int] = field(default_factory=dict[str, int])
    """Revision of a claim, by its key; 0 = there is none."""
    owners: dict[str, int] = field(default_factory=dict[str, int])
    """Revision of an owner's mark."""


class Desks:
    """One desk per node, while there is something to decide for it.

    Args:
        facts: what is known of a node now; None when it is gone.
        tell: publishes that a reservation began or ended.
    """

    def __init__(
        self,
        bucket: Bucket[GpuLedger],
        mirror: Mirror[GpuLedger],
        facts: Callable[[str], Facts | None],
        tell: Tell,
        *,
        quotas: Quotas,
        headroom_mb: int,
    ) -> None:
        self._bucket = bucket
        self._mirror = mirror
        self._facts = facts
        self._tell = tell
        self._quotas = quotas
        self._headroom_mb = headroom_mb
        self._waiting: dict[str, list[Waiting]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._absent: dict[str, int] = {}
        """Revision of the marker of a record that was removed."""
        self._owner_marks: dict[str, int] = {}
        self._one_owner = asyncio.Lock()
        self._together = asyncio.Semaphore(TOGETHER_MAX)

    async def since(self) -> int:
        """Up to which revision the store is known: what is marked behind it happened since.

        Raises:
            BusError: the store is away.
        """
        return self._mirror.seen if self._mirror.synced.is_set() else await self._bucket.newest()

    async def put(self, node_id: str, want: Want, *, claims: bool = False, since: int = 0) -> Outcome:
        """Has a request decided and written, with whatever else waits for the node.

        Args:
            claims: its id must not stand on any other node.
            since: with *claims*, what :meth:`since` said when the request came.

        Raises:
            BusError: it may have been written or not.
        """
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        waiting = Waiting(want, claims, since, answer, trace.to_send())
        if (queue := self._waiting.get(node_id)) is not None:
            queue.append(waiting)
        else:
            self._waiting[node_id] = [waiting]
            task = asyncio.create_task(self._work(node_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await answer

    async def drain(self) -> None:
        """Returns when nothing waits any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def elsewhere_mb(self, owner: str, node_id: str, now: float) -> int:
        """What an owner has on other nodes than this one."""
        return sum(
            grant.total_mb
            for other, entry in self._mirror.entries.items()
            if other != node_id
            for grant in live(entry.value, now)
            if grant.owner == owner
        )

    async def catch_up(self) -> None:
        """Returns once the mirror shows every record that is stored by now.

        Raises:
            BusError: the store is away, or the mirror does not follow.
        """
        await self._reach(await self._bucket.newest())

    async def _reach(self, revision: int) -> None:
        try:
            async with asyncio.timeout(CAUGHT_UP_S):
                await self._mirror.reach(revision)
        except TimeoutError:
            raise TimedOut(f"{self._bucket.spec.name}: revision {revision} was not read in {CAUGHT_UP_S:g} s") from None

    # --- a desk ------------------------------------------------------------------------------------------------------

    async def _work(self, node_id: str) -> None:
        queue = self._waiting[node_id]
        while queue:
            group, queue[:] = queue[:GROUP_MAX], queue[GROUP_MAX:]
            try:
                if any(self._limited(one.want) is not None for one in group):
                    async with self._one_owner:
                        await self._settle(node_id, group)
                else:
                    await self._settle(node_id, group)
            except Exception as error:  # Whoever waits must hear of it; there they are handled or a defect.
                for one in group:
                    if not one.answer.done():
                        one.answer.set_exception(error)
        del self._waiting[node_id]

    async def _settle(self, node_id: str, group: list[Waiting]) -> None:
        """Decides and writes until the write stands."""
        known = Known()
        read_now = caught_up = False
        lost = 0
        until_s = time.monotonic() + PATIENCE_S
        while group:
            await self._read_owners(group, known)
            before = self._mirror.get(node_id) or ledgers.empty(node_id)
            decided = self._decide(before, node_id, group)
            if not caught_up and any(map(_is_over_quota, decided.answers)):
                await self.catch_up()  # The owner may have given something back elsewhere.
                caught_up = True
                continue
            if decided.ledger is before:
                if read_now or not any(map(_is_no, decided.answers)):
                    self._answer(group, decided)
                    return
                await self._read(node_id)
                read_now = True
                continue
            try:
                await self._write(node_id, group, before, decided, known)
            except Conflict:
                _LOST.inc()
                lost += 1
                if time.monotonic() > until_s:
                    break
                await asyncio.sleep(random.uniform(0, min(0.1, 0.002 * lost)))  # noqa: S311
                await self._read(node_id)
                self._owner_marks.clear()
                known.owners.clear()
                await self._read_claims(node_id, group, known)
                read_now = True
                continue
            _STORED.inc()
            await self._told(group, before, decided)
            self._answer(group, decided)
            return
        busy = Refused(
            code="busy", reason=f"{node_id}: others wrote first {lost} times in a row", status=503, retry="later"
        )
        for one in group:
            _give(one, busy)

    def _decide(self, before: GpuLedger, node_id: str, group: list[Waiting]) -> Decided:
        now = time.time()
        wants = [self._with_quota(one.want, node_id, now) for one in group]
        return ledgers.decide(before, self._facts(node_id), wants, now, headroom_mb=self._headroom_mb)

    def _with_quota(self, want: Want, node_id: str, now: float) -> Want:
        limit = self._limited(want)
        if limit is None or not isinstance(want, Reserve):
            return want
        elsewhere = self.elsewhere_mb(want.ask.owner, node_id, now)
        return msgspec.structs.replace(want, quota=Quota(limit, elsewhere))

    def _limited(self, want: Want) -> int | None:
        return self._quotas.limit_mb(want.ask.owner) if isinstance(want, Reserve) else None

    def _answer(self, group: list[Waiting], decided: Decided) -> None:
        for one, answer in zip(group, decided.answers, strict=True):
            _give(one, answer)

    # --- the store ---------------------------------------------------------------------------------------------------

    async def _read(self, node_id: str) -> None:
        """The record as it is stored now, into the mirror."""
        entry, revision = await self._bucket.read(node_id)
        if entry is not None:
            self._mirror.wrote(node_id, entry.value, entry.revision)
        else:
            self._absent[node_id] = revision

    async def _write(
        self, node_id: str, group: list[Waiting], before: GpuLedger, decided: Decided, known: Known
    ) -> None:
        entry = self._mirror.entries.get(node_id)
        last = entry.revision if entry else self._absent.get(node_id, 0)
        granted = {grant.reservation_id for grant in _new(before, decided)}
        reserves = [
            (one, one.want) for one in group if isinstance(one.want, Reserve) and one.want.reservation_id in granted
        ]
        claims = sorted({_claim(want.reservation_id) for one, want in reserves if one.claims})
        owners = sorted({want.ask.owner for _, want in reserves if self._limited(want) is not None})
        marks = len(claims) + len(owners)
        if marks == 0:
            revision = await self._bucket.update(node_id, decided.ledger, last=last)
        else:
            writes = [
                Write(key=key, value=_mark(node_id, marks - at), last=known.claims.get(key, 0), ttl_s=CLAIM_S)
                for at, key in enumerate(claims)
            ]
            writes += [
                Write(key=_owner(owner), value=_mark(node_id, marks - at), last=known.owners[owner])
                for at, owner in enumerate(owners, len(claims))
            ]
            async with self._together:
                revision = await self._bucket.update_together(
                    [*writes, Write(key=node_id, value=decided.ledger, last=last)]
                )
            for at, owner in enumerate(owners, len(claims)):
                self._owner_marks[owner] = revision - (marks - at)
        self._mirror.wrote(node_id, decided.ledger, revision)

    async def _read_owners(self, group: list[Waiting], known: Known) -> None:
        """The marks of the owners with quotas, and every grant made up to them."""
        for one in group:
            if not isinstance(one.want, Reserve) or self._limited(one.want) is None:
                continue
            owner = one.want.ask.owner
            if owner in known.owners:
                continue
            if owner in self._owner_marks:
                known.owners[owner] = self._owner_marks[owner]
                continue
            mark = await self._bucket.read_other(_owner(owner), LedgerMark)
            if mark is not None:
                await self._reach(mark.revision + mark.value.behind)
            known.owners[owner] = self._owner_marks[owner] = mark.revision if mark else 0

    async def _read_claims(self, node_id: str, group: list[Waiting], known: Known) -> None:
        """Sends those away whose id stands elsewhere, or had its time since they asked, and learns which claims are
        only left over."""
        for one in list(group):
            if not one.claims or not isinstance(one.want, Reserve):
                continue
            key = _claim(one.want.reservation_id)
            mark = await self._bucket.read_other(key, LedgerMark)
            known.claims[key] = mark.revision if mark else 0
            if mark is None:
                continue
            if mark.value.node_id != node_id:
                await self._reach(mark.revision + mark.value.behind)
            else:
                await self._read(node_id)  # It may have been written since the record was read.
            there = self._mirror.get(mark.value.node_id)
            if there is not None and ledgers.find(there, one.want.reservation_id, time.time()):
                if mark.value.node_id != node_id:
                    group.remove(one)
                    _give(one, Elsewhere(mark.value.node_id))
            elif mark.revision > one.since:
                # Asked twice at once: the other was granted, heard and released. Nobody would release this one.
                group.remove(one)
                _give(one, ledgers.ended_meanwhile(one.want.reservation_id))

    async def _told(self, group: list[Waiting], before: GpuLedger, decided: Decided) -> None:
        """Publishes what began and what ended, each within the trace of who asked for it."""
        asked = {one.want.reservation_id: one for one in group if isinstance(one.want, Reserve)}
        for grant in _new(before, decided):
            if one := asked.get(grant.reservation_id):
                with trace.within(one.traceparent):
                    await self._tell(ledgers.shown(grant))
        for released in decided.ended:
            with trace.within(_asker(group, released)):
                await self._tell(released)


def _give(one: Waiting, answer: Outcome) -> None:
    if not one.answer.done():  # Whoever waited may have gone.
        one.answer.set_result(answer)


def _new(before: GpuLedger, decided: Decided) -> list[GpuGrant]:
    """What was granted; perhaps under an id that stood before and ran out."""
    old = {(grant.reservation_id, grant.granted_at) for grant in before.grants}
    return [grant for grant in decided.ledger.grants if (grant.reservation_id, grant.granted_at) not in old]


def _asker(group: list[Waiting], released: GpuReleased) -> str:
    for one in group:
        if isinstance(one.want, ledgers.End) and released.reservation_id in one.want.ids:
            return one.traceparent
    return ""


def _is_no(answer: Answer) -> bool:
    return answer is None or isinstance(answer, NoRoom | Refused)


def _is_over_quota(answer: Answer) -> bool:
    return isinstance(answer, Refused) and answer.code == "quota_exceeded"


def _mark(node_id: str, behind: int) -> LedgerMark:
    return LedgerMark(node_id=node_id, behind=behind)


def _claim(reservation_id: str) -> str:
    return f"claim.{reservation_id}"


def _owner(owner: str) -> str:
    return f"owner.{blake2b(owner.encode(), digest_size=12).hexdigest()}"
