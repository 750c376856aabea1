"""One request for inference, from the wish for an engine to the last byte of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Coroutine
from typing import Any, Final, Protocol

from msgspec.structs import replace
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from computemesh import log, openai
from computemesh.answers import Answer, AnswerFailed
from computemesh.contracts.base import Refused
from computemesh.contracts.infer import InferAsk
from computemesh.contracts.openai import EVENTS
from computemesh.edge import api_error
from computemesh.openai import Question, Reader, Usage
from computemesh.tasks import end_all
from computemesh_services.gateway import measures, routing
from computemesh_services.gateway.admission import Permit
from computemesh_services.gateway.engines import REPORT_S, Engines
from computemesh_services.gateway.places import Places, Wish
from computemesh_services.gateway.routing import Choice, Rank

ALIVE_EVERY_S: Final = 10.0
"""How often a client that streams is told that its request still waits, so that nothing between us gives up."""

WAITING: Final = ": waiting\n\n"
"""A comment, which clients of server-sent events skip."""

FAULTY_S: Final = 2.0
"""For how long others go before a node whose engine could not answer."""

COMPLAINT_CHARS_MAX: Final = 64 * 1024

_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]")

_log = log.get("openai")


class Asker(Protocol):
    """What asks engines: :class:`computemesh.infer_client.InferClient`."""

    async def open(self, node_id: str, ask: InferAsk) -> Answer | Refused: ...


class Mesh(Protocol):
    """What an exchange needs of the gateway."""

    @property
    def engines(self) -> Engines: ...

    @property
    def places(self) -> Places: ...

    @property
    def asker(self) -> Asker: ...

    @property
    def queue_timeout_s(self) -> float: ...


class Exchange(Response):
    """Answers one request.

    A client that goes away ends it, and with it the work of the engine.

    Args:
        request_id: names it in the answer, the log and on the bus.
        began_s: when it came, by :func:`time.perf_counter`.
    """

    def __init__(self, mesh: Mesh, asked: Question, permit: Permit, *, request_id: str, began_s: float) -> None:
        self._mesh = mesh
        self._asked = asked
        self._permit = permit
        self._request_id = request_id
        self._began_s = began_s
        self._wish = Wish(model=asked.model, prefix=routing.prefix_of(asked) or request_id.encode())
        self._tries = 0
        self._choice: Choice | None = None
        self._device = ""
        self._started = False
        """The status and the headers are out."""
        self._passed = False
        """A piece of the answer is out."""
        self._finished = False
        self._status = 0
        self._error = ""
        self._waited_s = 0.0
        self._first_s = 0.0
        self._last_s = 0.0
        self._reader = Reader(keep_usage=asked.include_usage)
        self._usage: Usage | None = None
        self._finish_reason = ""
        self.ended: Final[asyncio.Future[None]] = asyncio.get_running_loop().create_future()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send: Send = send
        answering = asyncio.create_task(self._answer())
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self._status, self._error = 499, "cancelled"
        except asyncio.CancelledError:
            # The edge ends, and its time to drain is over. What can still be said is said.
            await end_all([answering])
            if not self._finished:
                reason = "the gateway ends, and the answer was not whole in time"
                await self._refuse(Refused(code="unavailable", reason=reason, status=503, retry="later"))
        finally:
            await end_all([answering, gone])
            refused = self._error not in ("", "cancelled") and not self._passed
            self._permit.end(self._usage or self._reader.usage, answered=not refused)
            self._note()
            self.ended.set_result(None)
        if not answering.cancelled() and (error := answering.exception()):
            raise error

    # --- the engines -------------------------------------------------------------------------------------------------

    async def _answer(self) -> None:
        failures = 0
        again = False
        deadline_s = time.monotonic() + self._mesh.queue_timeout_s
        while True:
            choice = await self._placed(again=again, deadline_s=deadline_s)
            if isinstance(choice, Refused):
                await self._refuse(choice)
                return
            self._choice = choice
            _log.debug("chosen", node=choice.spot.node_id, device=choice.spot.device, why=choice.why)
            with measures.REQUESTS.labels("running").track_inprogress():
                try:
                    if choice.rank is Rank.FAILED_IT:
                        # None is left but those that failed it, and they may need a moment.
                        await asyncio.sleep(routing.pause_s(failures))
                    told = await self._try(choice)
                finally:
                    self._mesh.places.release(choice, self._asked.model)
            if told is None:
                return
            failures += told.code != "too_many_requests"
            what = routing.after(told, begun=self._passed, failures=failures)
            if what == "tell":
                await self._refuse(told)
                return
            self._note_failure(choice, told)
            again = True

    def _note_failure(self, choice: Choice, told: Refused) -> None:
        """So that this request, and those behind it, are not given the same engine again."""
        engines, node_id, now = self._mesh.engines, choice.spot.node_id, time.monotonic()
        if told.code == "too_many_requests":
            engines.was_full(node_id, until=now + REPORT_S)
        elif told.code == "node_lost":
            engines.unanswered(node_id)
        else:
            self._wish.failed.add(choice.spot)
            engines.was_faulty(node_id, until=now + FAULTY_S)
        measures.RETRIES.labels(measures.error_type(told.code)).inc()
        facts = {"request_id": self._request_id, "node": node_id, "code": told.code, "reason": told.reason}
        _log.info("asking another engine", **facts)

    async def _placed(self, *, again: bool, deadline_s: float) -> Choice | Refused:
        """An engine, perhaps after a wait."""
        places, model = self._mesh.places, self._asked.model
        given = places.take(self._wish, again=again)
        if not isinstance(given, asyncio.Future):
            return given
        began_s = time.monotonic()
        try:
            with measures.REQUESTS.labels("waiting").track_inprogress():
                await self._patiently(given, deadline_s)
        except BaseException:
            if not given.cancel() and isinstance(choice := given.result(), Choice):
                places.release(choice, model)
            raise
        finally:
            self._waited_s += time.monotonic() - began_s
        if given.cancel():
            return places.in_vain(model, self._waited_s)
        return given.result()

    async def _patiently(self, awaited: asyncio.Future[Any], deadline_s: float = float("inf")) -> None:
        """Waits, and lets a client that streams know that it does."""
        while not awaited.done() and (left_s := deadline_s - time.monotonic()) > 0:
            await asyncio.wait({awaited}, timeout=min(left_s, ALIVE_EVERY_S))
            if not awaited.done() and self._asked.stream and time.monotonic() < deadline_s:
                await self._pass(WAITING)

    async def _try(self, choice: Choice) -> Refused | None:
        """Asks one engine; None when the client has its answer."""
        asked = self._asked
        ask = InferAsk(
            stream=f"{self._request_id}-{self._tries}",
            model=asked.model,
            path=asked.path,
            body=asked.body,
            device=choice.spot.device,
        )
        self._tries += 1
        answer = await self._opened(self._mesh.asker.open(choice.spot.node_id, ask))
        if isinstance(answer, Refused):
            return answer
        async with contextlib.aclosing(answer):
            self._device = answer.device or choice.spot.device
            try:
                if answer.status != 200:
                    return await _complaint(answer)
                await (self._stream(answer) if asked.stream else self._whole(answer))
            except AnswerFailed as failed:
                return failed.refused
        return None

    async def _opened(self, opening: Coroutine[Any, Any, Answer | Refused]) -> Answer | Refused:
        if not self._asked.stream:
            return await opening
        task = asyncio.create_task(opening)
        try:
            await self._patiently(task)
        finally:
            if not task.done():
                await end_all([task])
        return task.result()

    # --- the client --------------------------------------------------------------------------------------------------

    async def _stream(self, answer: Answer) -> None:
        take, clock = self._reader.take, time.perf_counter
        async for text in answer:
            self._last_s = clock()
            if kept := take(text):
                if not self._passed:
                    self._first_s, self._passed = self._last_s, True
                await self._pass(kept)
        self._usage, self._finish_reason = self._reader.usage, self._reader.finish_reason
        await self._end()

    async def _whole(self, answer: Answer) -> None:
        text = "".join([piece async for piece in answer])
        self._usage, self._finish_reason = openai.usage_of(text)
        await self._start(200, answer.content_type or "application/json", {})
        await self._end(text)

    async def _pass(self, text: str) -> None:
        if not self._started:
            await self._start(200, EVENTS, {"cache-control": "no-cache", "x-accel-buffering": "no"})
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def _refuse(self, told: Refused) -> None:
        if not 400 <= told.status <= 599:  # A node may say anything.
            told = replace(told, status=502)
        self._error = told.code
        if self._started:
            _log.warning("an answer broke off", request_id=self._request_id, code=told.code, reason=told.reason)
            await self._end(openai.error_event(told))
            return
        refusal = api_error(told)
        await self._start(refusal.status_code, "application/json", dict(refusal.headers))
        await self._end(bytes(refusal.body).decode())

    async def _start(self, status: int, content_type: str, more: dict[str, str]) -> None:
        headers = {"content-type": content_type, "x-request-id": self._request_id, **self._permit.headers, **more}
        if self._choice is not None:
            headers["x-computemesh-node"] = self._choice.spot.node_id
            headers["x-computemesh-device"] = self._device or self._choice.spot.device
        # Names of devices, and media types, are what a node says: they must not become headers of their own.
        raw = [(name.lower().encode(), _UNPRINTABLE.sub("?", value).encode()) for name, value in headers.items()]
        self._started, self._status = True, status
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _end(self, text: str = "") -> None:
        self._finished = True
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": False})

    # --- what it leaves behind ---------------------------------------------------------------------------------------

    def _note(self) -> None:
        ended_s = time.perf_counter()
        known = self._choice is not None
        labels = (measures.OPERATIONS[self._asked.path], self._asked.model if known else "")
        usage = self._usage or self._reader.usage
        error = self._error or ("" if self._finished else "cancelled")
        duration_s = ended_s - self._began_s
        facts: dict[str, Any] = {"key": self._permit.key} if self._permit.key else {}
        measures.DURATION.labels(*labels, measures.error_type(error)).observe(duration_s)
        if self._first_s:
            facts["ttft_ms"] = round((self._first_s - self._began_s) * 1e3, 1)
            measures.FIRST_TOKEN.labels(*labels).observe(self._first_s - self._began_s)
            made = usage.completion_tokens if usage else self._reader.events
            if made > 1 and not error:
                measures.PER_TOKEN.labels(*labels).observe((self._last_s - self._first_s) / (made - 1))
        if usage:
            facts["tokens_in"], facts["tokens_out"] = usage.prompt_tokens, usage.completion_tokens
            measures.TOKENS.labels(*labels, "input").observe(usage.prompt_tokens)
            measures.TOKENS.labels(*labels, "output").observe(usage.completion_tokens)
        if self._choice is not None:
            facts["node"], facts["device"] = self._choice.spot.node_id, self._device or self._choice.spot.device
        if self._waited_s:
            facts["waited_ms"] = round(self._waited_s * 1e3)
        if error:
            facts["error"] = error
        _log.info(
            "answered",
            request_id=self._request_id,
            model=self._asked.model,
            status=self._status,
            stream=self._asked.stream,
            duration_ms=round(duration_s * 1e3),
            finish_reason=self._finish_reason,
            tries=self._tries,
            **facts,
        )


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _complaint(answer: Answer) -> Refused:
    """What an engine answered with another status than 200."""
    text = ""
    async for piece in answer:
        if len(text) < COMPLAINT_CHARS_MAX:
            text += piece
    told = openai.complaint(answer.status if 400 <= answer.status <= 599 else 500, text)
    match answer.status:
        case 429:
            return replace(told, code="too_many_requests")
        case 502 | 503 | 504:  # It is not ready, which is nothing the client did.
            return replace(told, code="unavailable", retry="elsewhere")
        case _:
            return told
