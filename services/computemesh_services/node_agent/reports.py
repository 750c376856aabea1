"""What comes to a node by reference and leaves it the same way: large payloads, results and logs, and reports."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec

from computemesh import log
from computemesh.bus import Bus, BusError
from computemesh.contracts import work
from computemesh.contracts.base import DEPTH_MAX, encode, too_deep
from computemesh.contracts.work import Assignment, ObjectRef, WorkCompleted, WorkFailed
from computemesh.executors.protocol import Broke, Done, Outcome
from computemesh.objects import ObjectError, download, get_on, put_on, upload

AGAIN_S: Final = 0.5
AGAIN_S_MAX: Final = 5.0
"""Pause between attempts to store a report; doubled while it cannot be."""

RESULT_INLINE_MAX: Final = 900 * 1024
"""Bound on a result, as JSON, in a report itself; the replicas of an item share it, as one record holds them all."""

ENVELOPE_BYTES: Final = 64 * 1024
"""Room in a message beside the result."""

_log = log.get("reports")


class PayloadError(Exception):
    """A payload that cannot be had; *broke* says why."""

    def __init__(self, broke: Broke) -> None:
        super().__init__(broke.reason)
        self.broke = broke


async def payload_of(bus: Bus, asked: Assignment) -> dict[str, Any]:
    """The payload of an assignment, from the object store when it is there. Its values then stay JSON.

    Raises:
        PayloadError: it is not there, or it is no JSON object.
    """
    if asked.payload_object is None:
        return asked.payload
    try:
        data = await download(get_on(bus), asked.payload_object)
    except (ObjectError, BusError) as error:
        reason = f"the payload cannot be read from the object store: {error}"
        raise PayloadError(Broke(reason=reason, code="no_payload", fault="mesh")) from error
    if await asyncio.to_thread(too_deep, data):
        reason = f"payload: nested deeper than {DEPTH_MAX} levels"
        raise PayloadError(Broke(reason=reason, code="bad_payload", fault="work"))
    try:
        data.decode()
        return msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except ValueError as error:
        reason = f"payload: not a JSON object: {error}"
        raise PayloadError(Broke(reason=reason[:1000], code="bad_payload", fault="work")) from error


async def report(bus: Bus, asked: Assignment, outcome: Outcome, log_object: ObjectRef | None) -> None:
    """Stores the report, however long the bus is away or a store is full. Twice does no harm."""
    message_id = f"{asked.work_id}.{asked.attempt}.{'done' if isinstance(outcome, Done) else 'broke'}"
    if asked.replica:
        message_id += f".{asked.replica}"
    said: WorkCompleted | WorkFailed | None = None
    pause_s = AGAIN_S
    while True:
        try:
            if said is None:
                said = await _composed(bus, asked, outcome, log_object)
            if isinstance(said, WorkCompleted):
                await bus.store(work.COMPLETED, said, message_id=message_id)
            else:
                await bus.store(work.FAILED, said, message_id=message_id)
            return
        except (BusError, ObjectError) as error:
            _log.warning("cannot report yet", work_id=asked.work_id, reason=str(error))
        await asyncio.sleep(pause_s)
        pause_s = min(AGAIN_S_MAX, pause_s * 2)


async def _composed(
    bus: Bus, asked: Assignment, outcome: Outcome, log_object: ObjectRef | None
) -> WorkCompleted | WorkFailed:
    """The report, its result in the object store if it is too large for a message."""
    if isinstance(outcome, Broke):
        return WorkFailed(
            work_id=asked.work_id,
            error=outcome.reason,
            code=outcome.code,
            fault=outcome.fault,
            log_object=log_object,
            attempt=asked.attempt,
            node_id=asked.node_id,
            replica=asked.replica,
        )
    done = WorkCompleted(
        work_id=asked.work_id,
        result=outcome.result,
        log_object=log_object,
        attempt=asked.attempt,
        node_id=asked.node_id,
        replica=asked.replica,
    )
    result = encode(outcome.result)
    if len(result) <= min(RESULT_INLINE_MAX // asked.replicas, bus.max_payload - ENVELOPE_BYTES):
        return done
    ref = await upload(put_on(bus), result)
    return msgspec.structs.replace(done, result=None, result_object=ref)
