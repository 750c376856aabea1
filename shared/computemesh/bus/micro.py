"""Request endpoints that speak the NATS micro protocol (ADR-32), so ``$SRV.PING/INFO/STATS`` just work.

``nats.micro`` of nats-py handles one request at a time, drops those that wait when it stops, and counts
time wrongly once handlers run concurrently; hence an implementation of our own. Requests of one endpoint
run concurrently up to a bound, and draining answers what is in hand and what is waiting.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from computemesh import __version__, log, trace
from computemesh.bus.connection import Bus, sender_of
from computemesh.bus.errors import BusError, NotStored
from computemesh.bus.metrics import CALLS, SYSTEM
from computemesh.contracts.base import AnyBound, AnyInParts, AnyServed, InParts, Message, Refused, Role, decode, encode
from computemesh.contracts.permissions import is_inbox
from computemesh.ids import new_id

R = TypeVar("R")

_log = log.get("micro")


class EndpointInfo(Message, frozen=True, kw_only=True):
    name: str
    subject: str
    queue_group: str
    metadata: dict[str, str] = {}


class ServiceInfo(Message, frozen=True, kw_only=True):
    """What ``$SRV.INFO`` answers."""

    type: str = "io.nats.micro.v1.info_response"
    name: str
    id: str
    version: str
    description: str = ""
    metadata: dict[str, str] = {}
    endpoints: list[EndpointInfo] = []


class Endpoint(ABC):
    """One subject, its handler and its counters."""

    def __init__(self, bus: Bus, bound: AnyServed, group: str) -> None:
        self.name: Final = bound.contract.subject.removeprefix("compute.").replace(".", "-")
        self.subject: Final = bound.subject
        self.group: Final = group
        self.requests = 0
        self.errors = 0
        self.spent_ns = 0
        self.last_error = ""
        self._bus = bus
        self._contract = bound.contract
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscription: Subscription | None = None

    @abstractmethod
    async def start(self) -> None:
        """Takes requests from now on."""

    async def drain(self) -> None:
        """Takes no new request, answers those in hand and those waiting."""
        if self._subscription is not None:
            await self._bus.drain(self._subscription)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _wants_answer(self, message: Msg) -> bool:
        if message.reply or self._contract.answered_by is not Role.NODE:
            return True
        # A node can have an answer to a question of its own delivered here, in the place of a question;
        # but an answer wants no answer.
        _log.warning("ignored what asks for no answer", subject=message.subject)
        return False

    def _begin(self, answering: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(answering)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _count(self, answer: Message | None, began_ns: int) -> None:
        took_ns = time.perf_counter_ns() - began_ns
        self.requests += 1
        self.spent_ns += took_ns
        status = str(answer.status) if isinstance(answer, Refused) else "OK"
        CALLS.labels(SYSTEM, self._contract.subject, status).observe(took_ns / 1e9)
        if isinstance(answer, Refused):
            self.errors += 1
            self.last_error = f"{answer.status}:{answer.reason}"

    def stats(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "subject": self.subject,
            "queue_group": self.group,
            "num_requests": self.requests,
            "num_errors": self.errors,
            "last_error": self.last_error,
            "processing_time": self.spent_ns,
            "average_processing_time": self.spent_ns // max(1, self.requests),
        }


class SingleEndpoint(Endpoint):
    """Gives one answer to each request."""

    def __init__(self, bus: Bus, bound: AnyBound, group: str, acts: Callable[[], bool] | None = None) -> None:
        super().__init__(bus, bound, group)
        self._bound = bound
        self._acts = acts
        self._slots = asyncio.Semaphore(bound.at_once)

    async def start(self) -> None:
        self._subscription = await self._bus.listen(self.subject, self._on_message, queue=self.group)

    async def _on_message(self, message: Msg) -> None:
        if not self._wants_answer(message) or (self._acts is not None and not self._acts()):
            return
        await self._slots.acquire()
        self._begin(self._answer(message))

    async def _answer(self, message: Msg) -> None:
        if sender := trace.parse(sender_of(message.headers)):
            trace.enter(sender.child())
        began_ns = time.perf_counter_ns()
        try:
            answer = await call(self._bound, message.data)
            data = encode(answer)
            if len(data) > self._bus.max_payload:
                answer = Refused(code="too_large", reason=f"the answer has {len(data)} bytes", status=413)
                data = encode(answer)
            await self._bus.respond(message, data, headers=_error_headers(answer))
        except BusError as error:
            _log.warning("could not answer", subject=message.subject, reason=str(error))
            return
        finally:
            self._slots.release()
        self._count(answer, began_ns)


class PartsEndpoint(Endpoint):
    """Answers each request in parts, any number of requests at the same time: how many is for the handler to bound."""

    def __init__(self, bus: Bus, bound: AnyInParts, group: str) -> None:
        super().__init__(bus, bound, group)
        self._bound = bound

    async def start(self) -> None:
        self._subscription = await self._bus.listen(self.subject, self._on_message, queue=self.group, inline=True)

    async def _on_message(self, message: Msg) -> None:
        if self._wants_answer(message):
            self._begin(self._answer(message))

    async def _answer(self, message: Msg) -> None:
        reply, bus = message.reply, self._bus
        if not is_inbox(reply):
            _log.warning("not answered: the reply subject is no inbox", subject=message.subject, reply=reply)
            return
        if sender := trace.parse(sender_of(message.headers)):
            trace.enter(sender.child())

        async def send(part: Message) -> None:
            await bus.send(reply, encode(part))

        began_ns = time.perf_counter_ns()
        asked = decode(message.data, self._contract.takes)
        refusal = asked if isinstance(asked, Refused) else await guarded(self.subject, self._bound.handler(asked, send))
        try:
            if refusal is not None:
                await bus.send(reply, encode(refusal), headers=_error_headers(refusal))
            await bus.send(reply, b"")
        except BusError as error:
            _log.warning("could not answer to the end", subject=message.subject, reason=str(error))
        self._count(refusal, began_ns)


async def call(bound: AnyBound, data: bytes) -> Message:
    """The reply to a request's bytes. The bus and the HTTP edge both end here or in :func:`run`."""
    question = decode(data, bound.contract.takes)
    return question if isinstance(question, Refused) else await run(bound, question)


async def run(bound: AnyBound, question: Any) -> Message:
    """The handler's answer. A defect in it is logged with its trace and answered without one."""
    return await guarded(bound.subject, bound.handler(question))


async def guarded(subject: str, answering: Awaitable[R]) -> R | Refused:
    """An answer, or the refusal that stands for what went wrong."""
    try:
        return await answering
    except BusError as error:
        _log.warning("no answer from the bus", subject=subject, reason=str(error))
        code = "full" if isinstance(error, NotStored) and error.full else "unavailable"
        return Refused(code=code, reason=str(error), status=503, retry="later")
    except Exception:
        _log.exception("handler failed", subject=subject)
        return Refused(code="internal", reason="the service failed on this request; its log says why", status=500)


def _error_headers(answer: Message) -> dict[str, str] | None:
    if not isinstance(answer, Refused):
        return None
    # Headers are one line each and not UTF-8 everywhere; the body has the full text.
    reason = answer.reason.encode("ascii", "replace").decode()
    return {"Nats-Service-Error": reason[:500], "Nats-Service-Error-Code": str(answer.status)}


class MicroService:
    """The endpoints of one process, discoverable by anyone with ``$SRV.INFO``."""

    def __init__(self, bus: Bus, *, name: str, description: str, metadata: dict[str, str]) -> None:
        self.id: Final = new_id("s")
        self.name: Final = name
        self._bus = bus
        self._description = description
        self._metadata = metadata
        self._endpoints: list[Endpoint] = []
        self._lasting: list[Endpoint] = []
        self._control: list[Subscription] = []
        self._started = datetime.now(UTC)

    async def start(self, bounds: Iterable[AnyServed]) -> None:
        for bound in bounds:
            await self.add(bound)
        for verb, reply in (("PING", self._ping), ("INFO", self.info), ("STATS", self._stats)):
            for subject in (f"$SRV.{verb}", f"$SRV.{verb}.{self.name}", f"$SRV.{verb}.{self.name}.{self.id}"):
                self._control.append(await self._listen(subject, reply))

    async def add(self, bound: AnyServed, *, acts: Callable[[], bool] | None = None) -> Endpoint:
        """Serves one more request, at once.

        Args:
            acts: whether this replica still is the one that acts; while it is not, requests are left to the one that
                is. So every replica that thinks it acts hears each request, and one that was halted keeps none from
                its successor, as it would in a queue group.

        One that is lasting goes on while the others drain; whoever added it removes it.
        """
        endpoint: Endpoint
        if isinstance(bound, InParts):
            assert acts is None
            endpoint = PartsEndpoint(self._bus, bound, self.name)
        else:
            endpoint = SingleEndpoint(self._bus, bound, self.name if acts is None else "", acts)
        await endpoint.start()
        (self._lasting if bound.lasting else self._endpoints).append(endpoint)
        return endpoint

    async def remove(self, endpoint: Endpoint) -> None:
        """Stops serving a request after answering what waits."""
        await endpoint.drain()
        (self._lasting if endpoint in self._lasting else self._endpoints).remove(endpoint)

    async def drain(self) -> None:
        await asyncio.gather(*(endpoint.drain() for endpoint in self._endpoints))
        for subscription in self._control:
            await self._bus.forget(subscription)

    async def _listen(self, subject: str, reply: Any) -> Subscription:
        async def on_message(message: Msg) -> None:
            await self._bus.respond(message, msgspec.json.encode(reply()))

        return await self._bus.listen(subject, on_message)

    def _identity(self, kind: str) -> dict[str, Any]:
        return {
            "type": f"io.nats.micro.v1.{kind}_response",
            "name": self.name,
            "id": self.id,
            "version": __version__,
            "metadata": self._metadata,
        }

    def _ping(self) -> dict[str, Any]:
        return self._identity("ping")

    def info(self) -> ServiceInfo:
        return ServiceInfo(
            name=self.name,
            id=self.id,
            version=__version__,
            description=self._description,
            metadata=self._metadata,
            endpoints=[
                EndpointInfo(name=e.name, subject=e.subject, queue_group=e.group)
                for e in (*self._endpoints, *self._lasting)
            ],
        )

    def _stats(self) -> dict[str, Any]:
        started = self._started.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return self._identity("stats") | {
            "started": started,
            "endpoints": [endpoint.stats() for endpoint in (*self._endpoints, *self._lasting)],
        }
