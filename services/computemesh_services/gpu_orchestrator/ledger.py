"""What becomes of a node's record. Pure: (record, facts, requests, now) -> (record, answers), time in Unix seconds.

    reserve --> granted --renew--> granted --> released | expired | owner_gone | work_ended

Requests that wait for the same node are decided together, in the order they came, and written at once. What has
run out is dropped first, so a record never needs to be tidied before it is decided upon. A decision is taken
again, on a newer record, whenever its write was lost; the id of a reservation makes that harmless, and a caller
who asks again, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from computemesh.contracts.base import Refused
from computemesh.contracts.gpus import (
    EndReason,
    GpuCanFit,
    GpuFit,
    GpuGrant,
    GpuLedger,
    GpuReleased,
    GpuReservation,
    GpuReserve,
    GpuShare,
    GpuVerdict,
    WhyNot,
)
from computemesh.contracts.nodes import NodeRecord, NodeState
from computemesh_services.gpu_orchestrator.room import (
    Facts,
    Pick,
    Refusals,
    Room,
    count_of,
    key_of,
    live,
    pick,
    room_of,
)

SHOWN_MAX: Final = 5
"""GPUs of which a refusal says why not, in words; `can-fit` has more."""


class Quota(msgspec.Struct, frozen=True, gc=False):
    """What an owner may have on all nodes together."""

    limit_mb: int
    elsewhere_mb: int
    """What it has on other nodes."""


class Reserve(msgspec.Struct, frozen=True, gc=False):
    """A request to reserve, with its id and its time settled."""

    ask: GpuReserve
    reservation_id: str
    timeout_s: float
    quota: Quota | None = None


class Renew(msgspec.Struct, frozen=True, gc=False):
    reservation_id: str
    timeout_s: float | None
    """None = as long as before."""
    pids: list[int] | None


class End(msgspec.Struct, frozen=True, gc=False):
    """Ends these reservations, as far as they stand; answered with the last of them, or with None."""

    ids: frozenset[str]
    reason: EndReason


class Tidy(msgspec.Struct, frozen=True, gc=False):
    """Drops what has run out, and nothing else."""


Want = Reserve | Renew | End | Tidy


class NoRoom(msgspec.Struct, frozen=True, gc=False):
    """The node cannot give it now."""

    room: Room


Answer = GpuReservation | GpuReleased | Refused | NoRoom | None


class Decided(msgspec.Struct, frozen=True, gc=False):
    """What to write, what to answer to each request, and which reservations ended."""

    ledger: GpuLedger
    answers: list[Answer]
    ended: list[GpuReleased]


def empty(node_id: str) -> GpuLedger:
    """The record of a node of which nothing was ever reserved."""
    return GpuLedger(node_id=node_id)


def decide(
    ledger: GpuLedger, facts: Facts | None, wants: Sequence[Want], now: float, *, headroom_mb: int = 0
) -> Decided:
    """Takes requests in their order. The same record when none of them changes it."""
    now = max(now, ledger.changed_at)  # The clocks of two writers differ; the time of a record never goes back.
    ledger, ended = _without(ledger, lambda grant: grant.expires_at <= now, EndReason.EXPIRED, now)
    answers: list[Answer] = []
    for want in wants:
        answer: Answer = None
        match want:
            case Reserve():
                ledger, answer = _reserve(ledger, facts, want, now, headroom_mb)
            case Renew():
                ledger, answer = _renew(ledger, want, now)
            case End(ids, reason):
                ledger, gone = _end(ledger, ids, reason, now)
                ended += gone
                answer = gone[-1] if gone else None
            case Tidy():
                pass
        answers.append(answer)
    return Decided(ledger, answers, ended)


def find(ledger: GpuLedger, reservation_id: str, now: float) -> GpuGrant | None:
    """A reservation that stands."""
    return next((grant for grant in live(ledger, now) if grant.reservation_id == reservation_id), None)


# --- the decisions -------------------------------------------------------------------------------------------------


def _reserve(
    ledger: GpuLedger, facts: Facts | None, want: Reserve, now: float, headroom_mb: int
) -> tuple[GpuLedger, Answer]:
    ask = want.ask
    if (present := find(ledger, want.reservation_id, now)) is not None:
        return ledger, shown(present) if _same_terms(present, ask) else _conflict(present)
    if facts is None:
        return ledger, Refused(code="not_found", reason="the node is gone", field="node_id", status=404)
    if ask.session and ask.session != facts.node.session:
        return ledger, _wrong_session(facts.node, ask)
    if refusal := over_quota(want, ledger, now):
        return ledger, refusal
    room = room_of(ledger, facts, now, headroom_mb=headroom_mb)
    chosen = pick(room, ask)
    if chosen is None:
        return ledger, NoRoom(room)
    grant = _granted(want, chosen, facts, now)
    return _with(ledger, room, chosen, grant, now), shown(grant)


def _granted(want: Reserve, chosen: Pick, facts: Facts, now: float) -> GpuGrant:
    ask = want.ask
    return GpuGrant(
        reservation_id=want.reservation_id,
        node_id=chosen.node_id,
        owner=ask.owner,
        required_mb=ask.required_mb,
        total_mb=ask.required_mb * len(chosen.spots),
        gpus=shares_of(chosen, ask),
        granted_at=now,
        expires_at=now + want.timeout_s,
        timeout_seconds=want.timeout_s,
        session=ask.session,
        work_id=ask.work_id,
        pids=ask.pids,
        node_revision=facts.revision,
    )


def shares_of(chosen: Pick, ask: GpuCanFit) -> list[GpuShare]:
    """What a request gets of each GPU."""
    return [GpuShare(index=spot.gpu.index, uuid=spot.gpu.uuid, mb=ask.required_mb) for spot in chosen.spots]


def _with(ledger: GpuLedger, room: Room, chosen: Pick, grant: GpuGrant, now: float) -> GpuLedger:
    """The record with one more grant. What others use at this moment is noted, lower values also of other GPUs."""
    taken = {spot.key for spot in chosen.spots}
    baselines: dict[str, int] = {}
    for spot in room.spots:
        if spot.key in taken:
            baselines[spot.key] = spot.external_mb
        elif spot.holders:
            baselines[spot.key] = min(spot.external_mb, ledger.baselines.get(spot.key, spot.external_mb))
    return msgspec.structs.replace(ledger, grants=[*ledger.grants, grant], baselines=baselines, changed_at=now)


def _renew(ledger: GpuLedger, want: Renew, now: float) -> tuple[GpuLedger, Answer]:
    present = find(ledger, want.reservation_id, now)
    if present is None:
        return ledger, None
    timeout_s = want.timeout_s or present.timeout_seconds
    renewed = msgspec.structs.replace(
        present,
        expires_at=now + timeout_s,
        timeout_seconds=timeout_s,
        pids=present.pids if want.pids is None else want.pids,
    )
    grants = [renewed if grant is present else grant for grant in ledger.grants]
    return msgspec.structs.replace(ledger, grants=grants, changed_at=now), shown(renewed)


def _end(ledger: GpuLedger, ids: frozenset[str], reason: EndReason, now: float) -> tuple[GpuLedger, list[GpuReleased]]:
    return _without(ledger, lambda grant: grant.reservation_id in ids, reason, now)


def _without(
    ledger: GpuLedger, goes: Callable[[GpuGrant], bool], reason: EndReason, now: float
) -> tuple[GpuLedger, list[GpuReleased]]:
    ended = [grant for grant in ledger.grants if goes(grant)]
    if not ended:
        return ledger, []
    left = [grant for grant in ledger.grants if not goes(grant)]
    held = {key_of(share.uuid, share.index) for grant in left for share in grant.gpus}
    baselines = {key: mb for key, mb in ledger.baselines.items() if key in held}
    after = msgspec.structs.replace(ledger, grants=left, baselines=baselines, changed_at=now)
    return after, [_released(grant, reason, now) for grant in ended]


def _released(grant: GpuGrant, reason: EndReason, now: float) -> GpuReleased:
    return GpuReleased(
        reservation_id=grant.reservation_id,
        node_id=grant.node_id,
        owner=grant.owner,
        total_mb=grant.total_mb,
        gpus=grant.gpus,
        work_id=grant.work_id,
        reason=reason,
        released_at=now,
    )


def shown(grant: GpuGrant) -> GpuReservation:
    """A reservation as callers see it."""
    return GpuReservation(**{name: getattr(grant, name) for name in GpuReservation.__struct_fields__})


# --- whose, and what is bound to what --------------------------------------------------------------------------------


def _same_terms(grant: GpuGrant, ask: GpuReserve) -> bool:
    """Whether a request asks for what was granted under its id. How long is not among the terms: a reservation
    that was renewed is still the same."""
    indices = [share.index for share in grant.gpus]
    return (
        grant.required_mb == ask.required_mb
        and len(indices) == count_of(ask)
        and (not ask.gpu_indices or sorted(indices) == sorted(ask.gpu_indices))
        and ask.node_id in (None, grant.node_id)
        and grant.owner == ask.owner
        and grant.session == ask.session
        and grant.work_id == ask.work_id
    )


def _conflict(grant: GpuGrant) -> Refused:
    count = len(grant.gpus)
    return Refused(
        code="conflict",
        reason=f"{grant.reservation_id} stands for {grant.required_mb} MiB of {count} "
        f"GPU{'s' * (count > 1)} on {grant.node_id} for {grant.owner or 'no owner'}, with other terms than these",
        field="reservation_id",
        status=409,
    )


def ended_meanwhile(reservation_id: str) -> Refused:
    """The refusal of a request that was overtaken by another under the same id."""
    return Refused(
        code="conflict",
        reason=f"{reservation_id} was granted to another request and has ended since this one was sent",
        field="reservation_id",
        status=409,
    )


def _wrong_session(node: NodeRecord, ask: GpuReserve) -> Refused:
    return Refused(
        code="wrong_session",
        reason=f"the session of {node.node_id} is {node.session or 'not told'}, not {ask.session}",
        field="session",
        status=409,
    )


def over_quota(want: Reserve, ledger: GpuLedger, now: float) -> Refused | None:
    """The refusal, if the owner would have more than it may; *ledger* is the node's it would get it on."""
    if want.quota is None:
        return None
    here = sum(grant.total_mb for grant in live(ledger, now) if grant.owner == want.ask.owner)
    return quota_refusal(want.ask, want.quota.limit_mb, want.quota.elsewhere_mb + here)


def quota_refusal(ask: GpuCanFit, limit_mb: int, has_mb: int) -> Refused | None:
    """The refusal, if an owner that has *has_mb* would have more than it may."""
    wants = ask.required_mb * count_of(ask)
    if has_mb + wants <= limit_mb:
        return None
    return Refused(
        code="quota_exceeded",
        reason=f"{ask.owner or 'no owner'} has {has_mb} of {limit_mb} MiB and would need {wants} more",
        field="owner",
        status=429,
        retry="later" if wants <= limit_mb else "never",
    )


def owner_gone(grant: GpuGrant, node: NodeRecord | None, revision: int) -> bool:
    """Whether the life of the node that a reservation is bound to has ended.

    Args:
        node: the node's present record; None when it was removed.
        revision: of that record, or of its removal. A record no newer than the one that the grant was decided by
            tells nothing: it may be an older view of the same node.
    """
    if not grant.session or revision <= grant.node_revision:
        return False
    return node is None or node.state is NodeState.LOST or node.session != grant.session


# --- words ---------------------------------------------------------------------------------------------------------


def fits(ask: GpuCanFit, chosen: Pick) -> GpuFit:
    return GpuFit(
        can_fit=True,
        required_mb=ask.required_mb,
        total_mb=ask.required_mb * len(chosen.spots),
        node_id=chosen.node_id,
        gpus=shares_of(chosen, ask),
    )


def does_not_fit(ask: GpuCanFit, refused: Refused, against: Refusals) -> GpuFit:
    return GpuFit(
        can_fit=False,
        required_mb=ask.required_mb,
        total_mb=ask.required_mb * count_of(ask),
        reason=refused.reason,
        why_not=against.closest,
        counts={str(code): count for code, count in against.counts.items()},
    )


def refusal(ask: GpuCanFit, against: Refusals) -> Refused:
    """Why no node can give it, in words: the GPUs that come closest, and how many others there are."""
    count = count_of(ask)
    what = f"{ask.required_mb} MiB" + (f" of each of {count} GPUs" if count > 1 else "")
    where = ask.node_id or "any node"
    closest = against.closest[:SHOWN_MAX]
    lines = [f"{verdict.node_id}/{verdict.index}: {verdict.reason}" for verdict in closest]
    others = against.counts.total() - len(closest)
    if others > 0:
        lines.append(f"{others} more; of all {against.counts.total()}, by reason: {_counted(against)}")
    text = f"{what} cannot be had on {where}. " + (". ".join(lines) if lines else "There is no GPU.")
    if against.may_change:
        return Refused(code="no_room", reason=text, status=409, retry="later")
    return Refused(code="impossible", reason=text, field=_fault(ask, closest), status=422)


def _counted(against: Refusals) -> str:
    return ", ".join(f"{count} {code}" for code, count in against.counts.most_common())


def _fault(ask: GpuCanFit, closest: Iterable[GpuVerdict]) -> str:
    """The field that asks for what there is not."""
    if ask.gpu_indices and any(verdict.code in (WhyNot.ABSENT, WhyNot.TOO_FEW) for verdict in closest):
        return "gpu_indices"
    return next((_FIELDS[verdict.code] for verdict in closest if verdict.code in _FIELDS), "")


_FIELDS: Final = {
    WhyNot.ABSENT: "gpu_indices",
    WhyNot.TOO_SMALL: "required_mb",
    WhyNot.TOO_FEW: "gpu_count",
    WhyNot.UNLINKED: "require_nvlink",
}
