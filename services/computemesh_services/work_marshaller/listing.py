"""A page of the list of items: as many as one message holds. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from computemesh.contracts.base import Refused, encode
from computemesh.contracts.work import WorkItems, WorkList, WorkRecord, WorkSummary
from computemesh_services.work_marshaller.workitem import summary

PAGE_BYTES_MAX: Final = 512 * 1024
"""Bound on the items of one page, as JSON."""

REASON_CHARS_MAX: Final = 300
"""How much of an error stands in a list."""


def page(records: Iterable[WorkRecord], ask: WorkList) -> WorkItems | Refused:
    """The newest items that match, from where the page before ended. New items do not shift the pages that follow."""
    after = _read(ask.after) if ask.after else None
    if ask.after and after is None:
        return Refused(code="bad_message", reason=f"{ask.after!r} is no `next` of an answer", field="after")
    found = [record for record in records if _matches(record, ask)]
    behind = [record for record in found if after is None or _place(record) < after]
    items: list[WorkSummary] = []
    size = 0
    for record in heapq.nlargest(ask.limit, behind, key=_place):
        item = _line(record)
        size += len(encode(item))
        if items and size > PAGE_BYTES_MAX:
            break
        items.append(item)
        last = record
    more = len(behind) > len(items)
    return WorkItems(items=items, count=len(found), next=_written(last) if items and more else "")  # pyright: ignore[reportPossiblyUnboundVariable]


def _matches(record: WorkRecord, ask: WorkList) -> bool:
    return (
        ask.status in (None, record.state)
        and (not ask.states or record.state in ask.states)
        and (ask.owner is None or ask.owner == record.owner)
        and (not ask.work_type or ask.work_type == record.work_type)
        and (not ask.node_id or ask.node_id in (record.node_id, *(member.node_id for member in record.members)))
    )


def _line(record: WorkRecord) -> WorkSummary:
    line = summary(record)
    if line.error is not None and len(line.error.reason) > REASON_CHARS_MAX:
        return replace(line, error=replace(line.error, reason=line.error.reason[:REASON_CHARS_MAX] + "…"))
    return line


def _place(record: WorkRecord) -> tuple[int, str]:
    return record.inbox_seq, record.work_id


def _written(record: WorkRecord) -> str:
    return f"{record.inbox_seq}.{record.work_id}"


def _read(after: str) -> tuple[int, str] | None:
    seq, dot, work_id = after.partition(".")
    return (int(seq), work_id) if dot and seq.isascii() and seq.isdigit() else None
