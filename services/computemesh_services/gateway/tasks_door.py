"""``/api/v1/tasks``: tasks go in as work items, and come out as tasks."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from computemesh import mloc, objects, yamltext
from computemesh.bus import Bus, BusError, micro
from computemesh.contracts import tasks, work
from computemesh.contracts.base import Refused, encode
from computemesh.contracts.tasks import STATUS, Task, TaskCancel, TaskGet, TaskList, TaskLogs, TaskSubmitted
from computemesh.contracts.work import (
    FINAL,
    INLINE_BYTES_MAX,
    LOG_WAIT_S_MAX,
    TASK_TEXT,
    Member,
    ObjectRef,
    WorkCancel,
    WorkGet,
    WorkItem,
    WorkList,
    WorkLogs,
    WorkLogsGet,
    WorkRecord,
    WorkState,
    WorkSummary,
)
from computemesh.edge import Extra, declared, media_type, parse_object, problem, read_body, read_question
from computemesh.ids import new_id
from computemesh.yamltext import Document
from computemesh_services.gateway import views
from computemesh_services.gateway.asking import answer, ask, guarded, route

PLACED_S: Final = 1.0
"""How long the answer to a submission waits for a node to get the task. What waits longer than a quarter of a second is
recorded as pending, which ends the wait."""

ASIDE_BYTES: Final = 16 * 1024
"""Longer texts are read beside the event loop, so that others get their turn."""

AT_ONCE: Final = 16
"""Tasks that are asked for at the same time for a list."""

KEY: Final = "idempotency-key"
KEY_CHARS_MAX: Final = 255


class TasksDoor:
    """Asks the work-marshaller."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def routes(self) -> list[Extra]:
        return [
            declared(tasks.SUBMIT, self.on_submit),
            declared(tasks.LIST, self.on_list),
            route(tasks.GET, TaskGet, self.on_get),
            declared(tasks.RESULT, self.on_result),
            declared(tasks.LOGS, self.on_logs),
            route(tasks.CANCEL, TaskCancel, self.on_cancel),
            route(tasks.DELETE, TaskCancel, self.on_cancel),
        ]

    # --- in ----------------------------------------------------------------------------------------------------------

    async def on_submit(self, request: Request) -> Response:
        document = await _read_task(request)
        if isinstance(document, Refused):
            return problem(document)
        item = mloc.item_of(document)
        if isinstance(item, Refused):
            return problem(item)
        keyed = _keyed(item, request.headers.get(KEY, ""))
        if isinstance(keyed, Refused):
            return problem(keyed)
        patient = "respond-async" not in request.headers.get("prefer", "").lower()
        return answer(await guarded(request, self._submit(keyed, document, patient=patient)))

    async def _submit(self, item: WorkItem, document: Document, *, patient: bool) -> TaskSubmitted | Refused:
        item = await self._slim(item)
        if (size := len(encode(item))) > INLINE_BYTES_MAX:
            reason = f"the text of the task is too large: {size} bytes in a message, {INLINE_BYTES_MAX} are allowed"
            return Refused(code="too_large", reason=reason, status=413)
        assert item.work_id is not None
        moved = asyncio.Event()
        latest: list[WorkRecord] = []

        async def on_state(record: WorkRecord) -> None:
            latest.append(record)
            moved.set()

        heard = await self._bus.subscribe(work.STATE, on_state, target=item.work_id)
        try:
            record = await ask(self._bus, work.REQUEST, item)
            if isinstance(record, Refused):
                return mloc.told_in_its_words(record, document)
            if record.annotations.get(TASK_TEXT) != item.annotations.get(TASK_TEXT):
                return _other_task(item.work_id)
            if patient and record.state is WorkState.PENDING:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(moved.wait(), PLACED_S)
        finally:
            await self._bus.forget(heard)
        record = latest[-1] if latest else record
        return views.submitted(record, await self._why(record) if patient else "")

    async def _slim(self, item: WorkItem) -> WorkItem:
        """The item, its payload in the object store when the two do not fit into a message.

        Raises:
            ObjectError: the store did not take it.
        """
        if len(encode(item)) <= INLINE_BYTES_MAX:
            return item
        ref = await objects.upload(objects.put_on(self._bus), encode(item.payload))
        return replace(item, payload={}, payload_object=ref)

    async def _why(self, record: WorkRecord) -> str:
        """Why an item waits; empty when it does not."""
        if record.state not in (WorkState.PENDING, WorkState.RETRYING):
            return ""
        with contextlib.suppress(BusError):
            told = await self._bus.ask(work.EXPLAIN, WorkGet(work_id=record.work_id))
            if not isinstance(told, Refused):
                return told.summary
        return ""

    # --- out ---------------------------------------------------------------------------------------------------------

    async def on_list(self, request: Request) -> Response:
        asked = await read_question(request, TaskList)
        if isinstance(asked, Refused):
            return problem(asked)
        found = await guarded(request, self._list(asked))
        if isinstance(found, Refused):
            return problem(found)
        listed, after = found
        response = answer(listed)
        if after:
            following = request.url.include_query_params(after=after)
            response.headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
        return response

    async def _list(self, asked: TaskList) -> tuple[list[Task], str] | Refused:
        """A page, and where the next one begins; empty when there is none."""
        states = [state for state, status in STATUS.items() if status is asked.status]
        page = await ask(self._bus, work.LIST, WorkList(states=states, limit=asked.limit, after=asked.after))
        if isinstance(page, Refused):
            return page
        if not asked.full:
            return [views.line(item) for item in page.items], page.next
        gate = asyncio.Semaphore(AT_ONCE)

        async def full(item: WorkSummary) -> Task:
            async with gate:
                record = await ask(self._bus, work.GET, WorkGet(work_id=item.work_id))
            # It may have been forgotten meanwhile.
            return views.line(item) if isinstance(record, Refused) else await _shown(record)

        return await asyncio.gather(*(full(item) for item in page.items)), page.next

    async def on_get(self, asked: TaskGet) -> Task | Refused:
        record = await ask(self._bus, work.GET, WorkGet(work_id=asked.task_id))
        return _in_its_words(record) if isinstance(record, Refused) else await _shown(record, await self._why(record))

    async def on_cancel(self, asked: TaskCancel) -> Task | Refused:
        record = await ask(self._bus, work.CANCEL, WorkCancel(work_id=asked.task_id, reason=asked.reason))
        return _in_its_words(record) if isinstance(record, Refused) else await _shown(record)

    # --- what came of it ---------------------------------------------------------------------------------------------

    async def on_result(self, request: Request) -> Response:
        asked = await read_question(request, TaskGet)
        if isinstance(asked, Refused):
            return problem(asked)
        found = await guarded(request, self._result(asked))
        if not isinstance(found, ObjectRef):
            return answer(found)
        parts = objects.parts(objects.get_on(self._bus), found)
        first = await guarded(request, anext(parts, b""))
        if isinstance(first, Refused):
            return problem(first)
        return StreamingResponse(_from(first, parts), media_type="application/json")

    async def _result(self, asked: TaskGet) -> Any:
        """The result, where it is when it is large, or why there is none."""
        record = await ask(self._bus, work.GET, WorkGet(work_id=asked.task_id))
        if isinstance(record, Refused):
            return _in_its_words(record)
        if record.state not in FINAL:
            status = STATUS[record.state]
            return Refused(code="not_finished", reason=f"the task is {status}", status=409, retry="later")
        if record.state is not WorkState.COMPLETED:
            return Refused(code="no_result", reason=views.why_not(record) or "there is none", status=409)
        if not record.members:
            return record.result_object or record.result
        pairs = zip(record.members, record.result, strict=True)
        return views.together([await self._whole(member, result) for member, result in pairs])

    async def _whole(self, member: Member, result: Any) -> Any:
        """The result of a replica, wherever it is."""
        if member.result_object is None:
            return result
        data = await objects.download(objects.get_on(self._bus), member.result_object)
        return msgspec.json.decode(data)

    async def on_logs(self, request: Request) -> Response:
        asked = await read_question(request, TaskLogs)
        if isinstance(asked, Refused):
            return problem(asked)
        first = await guarded(request, self._logs(asked))
        if isinstance(first, Refused) or "text/plain" not in request.headers.get("accept", ""):
            return answer(first)
        return StreamingResponse(self._text(asked, first), media_type="text/plain; charset=utf-8")

    async def _logs(self, asked: TaskLogs) -> WorkLogs | Refused:
        wanted = WorkLogsGet(
            work_id=asked.task_id,
            replica=asked.replica,
            attempt=asked.attempt,
            offset=asked.offset,
            limit=asked.limit,
            wait_s=asked.wait_s,
        )
        found = await ask(self._bus, work.LOGS, wanted)
        return _in_its_words(found) if isinstance(found, Refused) else found

    async def _text(self, asked: TaskLogs, part: WorkLogs) -> AsyncIterator[str]:
        """All parts from this one on: to the end so far, or to that of the attempt."""
        while True:
            yield part.text
            if part.complete or (not part.text and not asked.follow):
                return
            wait_s = LOG_WAIT_S_MAX if asked.follow else 0.0
            # The attempt stays the same, also when another one starts.
            following = replace(asked, offset=part.next, attempt=part.attempt, wait_s=wait_s)
            found = await micro.guarded("logs", self._logs(following))
            if not isinstance(found, WorkLogs):
                return
            part = found


async def _from(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for part in rest:
        yield part


async def _shown(record: WorkRecord, reason: str = "") -> Task:
    """An item as a task; its text is read for that."""
    if len(record.annotations.get(TASK_TEXT, "")) > ASIDE_BYTES:
        return await asyncio.to_thread(views.task, record, reason)
    return views.task(record, reason)


async def _read_task(request: Request) -> Document | Refused:
    """The task in a body: as YAML, as JSON, or as YAML in JSON."""
    body = await read_body(request, tasks.YAML)
    if isinstance(body, Refused):
        return body
    if not body:
        return Refused(code="bad_task", reason="there is no task in the body")
    text: bytes | str = body
    if media_type(request) == "application/json":
        fields = parse_object(body)
        if isinstance(fields, Refused):
            return fields
        if not isinstance(fields.get("yaml"), str):
            return Document(fields, body.decode())
        text = fields["yaml"]
    if len(text) > ASIDE_BYTES:
        return await asyncio.to_thread(yamltext.read, text)
    return yamltext.read(text)


def _keyed(item: WorkItem, key: str) -> WorkItem | Refused:
    """The item with an id: its own, that of the caller's key, or a fresh one.

    Not both: nothing would remember which of the two ids the key stands for.
    """
    if item.work_id is not None:
        if key:
            reason = "the task has an id of its own, metadata.id, which does the same; give one of the two"
            return Refused(code="bad_message", field=KEY, reason=reason)
        return item
    if len(key) > KEY_CHARS_MAX:
        return Refused(code="bad_message", field=KEY, reason=f"longer than {KEY_CHARS_MAX} characters")
    made = f"t-{hashlib.sha256(key.encode()).hexdigest()[:32]}" if key else new_id("t")
    return replace(item, work_id=made)


def _other_task(work_id: str) -> Refused:
    reason = f"the id {work_id}, or its Idempotency-Key, was used for another task"
    return Refused(code="other_task", field="metadata.id", reason=reason, status=409)


def _in_its_words(told: Refused) -> Refused:
    if told.code == "not_found":
        return Refused(code="not_found", field="task_id", reason="task not found", status=404)
    return replace(told, field="task_id") if told.field == "work_id" else told
