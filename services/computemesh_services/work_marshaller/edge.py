"""HTTP routes for what is too large for a message, or does not end: the bus has no place for either."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from computemesh import log
from computemesh.bus import BusError, micro
from computemesh.contracts import work
from computemesh.contracts.base import Refused, decode, encode
from computemesh.contracts.base import Request as Contract
from computemesh.contracts.work import (
    INLINE_BYTES_MAX,
    LOG_WAIT_S_MAX,
    ObjectRef,
    WorkGet,
    WorkItem,
    WorkLogs,
    WorkLogsGet,
    WorkRecord,
    WorkResult,
)
from computemesh.edge import Extra, problem, question_of, read_body, read_question
from computemesh.objects import ObjectError, parts, result_pieces, upload
from computemesh_services.work_marshaller.objects import Objects

LARGE_AT_ONCE: Final = 4
"""Large submissions in memory at the same time; more wait."""

AGAIN_S: Final = 1.0
"""Pause before a log is asked for again that could not be read for the moment."""

AGAIN_MAX: Final = 60

_log = log.get("edge")


class WorkEdge:
    """Takes large payloads, and gives large results and whole logs.

    Args:
        payload_bytes_max: bound on a submission's body.
    """

    def __init__(
        self,
        objects: Objects,
        *,
        payload_bytes_max: int,
        on_request: Callable[[WorkItem], Awaitable[WorkRecord | Refused]],
        on_result: Callable[[WorkGet], Awaitable[WorkResult | Refused]],
        on_logs: Callable[[WorkLogsGet], Awaitable[WorkLogs | Refused]],
    ) -> None:
        self._objects = objects
        self._payload_bytes_max = payload_bytes_max
        self._on_request = on_request
        self._on_result = on_result
        self._on_logs = on_logs
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)

    def extras(self) -> list[Extra]:
        return [
            _at(work.REQUEST, self.submit),
            _at(work.RESULT, self.result),
            _at(work.LOGS, self.logs, accept="text/plain"),
        ]

    # --- submissions -------------------------------------------------------------------------------------------

    async def submit(self, request: Request) -> Response:
        """As the contract says; an item that is too large for a message has its payload stored first."""
        if int(request.headers.get("content-length") or INLINE_BYTES_MAX + 1) <= INLINE_BYTES_MAX:
            answer = await self._submit(request, await read_body(request))
        else:
            async with self._large:
                answer = await self._submit(request, await read_body(request, bytes_max=self._payload_bytes_max))
        if isinstance(answer, Refused):
            return problem(answer)
        return Response(encode(answer), work.REQUEST.http[0].status, media_type="application/json")

    async def _submit(self, request: Request, body: bytes | Refused) -> WorkRecord | Refused:
        if isinstance(body, Refused):
            return body
        if len(body) <= INLINE_BYTES_MAX:
            item = question_of(request, body, WorkItem)
            if isinstance(item, Refused):
                return item
            return await micro.guarded(work.REQUEST.subject, self._on_request(item))
        taken = await asyncio.to_thread(taken_apart, body)
        if isinstance(taken, Refused):
            return taken
        item, payload = taken
        return await micro.guarded(work.REQUEST.subject, self._submit_large(item, payload))

    async def _submit_large(self, item: WorkItem, payload: bytes) -> WorkRecord | Refused:
        try:
            ref = await upload(self._objects.on_put, payload)
        except ObjectError as error:
            return error.refused
        answer = await self._on_request(msgspec.structs.replace(item, payload_object=ref))
        if isinstance(answer, Refused) or answer.payload_object != ref:  # Or it was submitted before.
            await self._objects.remove(ref.object_id)
        return answer

    # --- results -----------------------------------------------------------------------------------------------

    async def result(self, request: Request) -> Response:
        """As the contract says; what is in the object store is put in its place as it is read."""
        question = await read_question(request, WorkGet)
        if isinstance(question, Refused):
            return problem(question)
        answer = await micro.guarded(work.RESULT.subject, self._on_result(question))
        if isinstance(answer, Refused):
            return problem(answer)
        pieces = answer_pieces(answer)
        for piece in pieces:
            if isinstance(piece, ObjectRef) and (refusal := await self._objects.refusal(piece)):
                reason = f"the result is not kept any more: {refusal.reason}"
                return problem(Refused(code="no_result", reason=reason, field="work_id", status=409))
        if isinstance(pieces[0], bytes) and len(pieces) == 1:
            return Response(pieces[0], media_type="application/json")
        length = sum(piece.size if isinstance(piece, ObjectRef) else len(piece) for piece in pieces)
        headers = {"Content-Length": str(length)}
        return StreamingResponse(self._streamed(pieces), 200, headers, media_type="application/json")

    async def _streamed(self, pieces: list[bytes | ObjectRef]) -> AsyncGenerator[bytes]:
        for piece in pieces:
            if not isinstance(piece, ObjectRef):
                yield piece
                continue
            async with aclosing(parts(self._objects.on_get, piece)) as found:
                async for data in found:
                    yield data

    # --- logs --------------------------------------------------------------------------------------------------

    async def logs(self, request: Request) -> Response:
        """What an attempt prints, as text, until it has ended."""
        question: WorkLogsGet | Refused = await read_question(request, WorkLogsGet)
        if isinstance(question, Refused):
            return problem(question)
        answer = await micro.guarded(work.LOGS.subject, self._on_logs(question))
        if isinstance(answer, Refused):
            return problem(answer)
        return StreamingResponse(self._followed(question, answer), media_type="text/plain; charset=utf-8")

    async def _followed(self, asked: WorkLogsGet, answer: WorkLogs) -> AsyncGenerator[str]:
        failures = 0
        while True:
            if answer.text:
                yield answer.text
            if answer.complete:
                return
            # The attempt that it began with, also when another follows.
            asked = msgspec.structs.replace(
                asked, offset=answer.next, attempt=answer.attempt or asked.attempt, wait_s=LOG_WAIT_S_MAX
            )
            while isinstance(found := await micro.guarded(work.LOGS.subject, self._on_logs(asked)), Refused):
                failures += 1
                if found.retry != "later" or failures > AGAIN_MAX:
                    raise BusError(f"the log of {asked.work_id} broke off: {found.reason}")
                await asyncio.sleep(AGAIN_S)
            failures, answer = 0, found


def taken_apart(body: bytes) -> tuple[WorkItem, bytes] | Refused:
    """An item that is too large for a message: without its payload, and the payload as the JSON it is."""
    fields = decode(body, _Fields)
    if isinstance(fields, Refused):
        return fields
    payload = bytes(fields.payload)
    rest: dict[str, Any] = {
        field.name: value
        for field in msgspec.structs.fields(fields)
        if field.name != "payload" and (value := getattr(fields, field.name)) is not msgspec.UNSET
    }
    if not payload.startswith(b"{"):
        return Refused(code="bad_message", reason="Expected 'object'", field="payload")
    data = msgspec.json.encode(rest)
    if len(data) > INLINE_BYTES_MAX:
        return Refused(
            code="too_large",
            reason=f"the item has {len(data)} bytes beside its payload, more than {INLINE_BYTES_MAX}",
            status=413,
        )
    item = decode(data, WorkItem)
    return item if isinstance(item, Refused) else (item, payload)


_Fields: Any = msgspec.defstruct(
    "_Fields",
    [
        (field.name, msgspec.Raw, msgspec.Raw(b"{}"))
        if field.name == "payload"
        else (field.name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET)
        for field in msgspec.structs.fields(WorkItem)
    ],
    kw_only=True,
    forbid_unknown_fields=WorkItem.__struct_config__.forbid_unknown_fields,
)
"""A work item, none of whose fields is looked into."""


def answer_pieces(answer: WorkResult) -> list[bytes | ObjectRef]:
    """The answer as JSON, with the results in place that are in the object store."""
    if answer.result_object is None and not answer.result_objects:
        return [encode(answer)]
    return [b'{"work_id":' + encode(answer.work_id) + b',"result":', *result_pieces(answer), b"}"]


def _at(contract: Contract[Any, Any], handler: Callable[[Request], Any], *, accept: str = "") -> Extra:
    (route,) = contract.http
    return Extra(method=route.method, path=route.path, handler=handler, accept=accept)
