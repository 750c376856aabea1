"""The bus side of inference: questions in, answers out in parts, and what askers say of them meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

from prometheus_client import Counter

from computemesh import log
from computemesh.answers import AnswerFailed
from computemesh.bus import Bus
from computemesh.contracts.base import AnyServed, Refused, SendPart, serve, serve_parts
from computemesh.contracts.infer import (
    ASK,
    CONTROL,
    QUIET_S,
    SILENT_S,
    InferAsk,
    InferControl,
    InferControlled,
    InferPart,
)
from computemesh_services.node_agent.infer.upstream import EngineAnswer, Inference

LOOK_S: Final = 1.0
"""How often it is seen which askers and which answers are silent."""

PARTS = Counter("computemesh_agent_parts_total", "Parts of answers that were sent over the bus.")
STOPPED = Counter(
    "computemesh_agent_streams_stopped_total", "Answers over the bus that were stopped, by cause.", ["cause"]
)

_log = log.get("infer")


class Door:
    """Answers of this node that are given over the bus.

    Args:
        node_id: this node.
        session: this life of the node.
    """

    def __init__(self, bus: Bus, inference: Inference, *, node_id: str, session: str) -> None:
        self._bus = bus
        self._inference = inference
        self._node_id = node_id
        self._session = session
        self._streams: dict[str, _Stream] = {}
        self._heard: dict[str, float] = {}
        """When each session that has streams was last heard of."""
        self._ending = False

    def endpoints(self) -> list[AnyServed]:
        """While this agent drains, answers go on and new requests are refused with a reason."""
        return [
            serve_parts(ASK, self.on_ask, target=self._node_id, acting=True, lasting=True),
            serve(CONTROL, self.on_control, target=self._node_id, acting=True, lasting=True),
        ]

    @property
    def streams(self) -> int:
        """How many answers are being given, or waited for."""
        return len(self._streams)

    async def watch(self) -> None:
        """Stops what nobody reads any more, and keeps alive what is only slow. Runs for ever."""
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._bus.interrupted.wait()
            if self._bus.interrupted.is_set():
                # Parts were lost, and where the others go the server may have forgotten.
                self._stop_all("connection", "the node's connection to NATS broke")
                await self._bus.connected.wait()
                continue
            now_s = loop.time()
            for stream in list(self._streams.values()):
                if stream.session and now_s - self._heard[stream.session] > SILENT_S:
                    stream.stop("silent", _stopped(f"nothing was heard of its asker for {SILENT_S:g} s"))
                elif now_s - stream.sent_s > QUIET_S:
                    await stream.send()
            in_use = {stream.session for stream in self._streams.values()}
            self._heard = {session: at_s for session, at_s in self._heard.items() if session in in_use}

    async def drain(self, finish_s: float) -> None:
        """Takes nothing new, and stops what has not ended after a while."""
        self._ending = True
        if self._streams:
            _log.info("finishing answers", open=len(self._streams), finish_s=finish_s)
            await asyncio.wait({stream.task for stream in self._streams.values()}, timeout=finish_s)
        left = {stream.task for stream in self._streams.values()}
        self._stop_all("ending", "the node is ending")
        if left:
            await asyncio.wait(left)

    async def on_ask(self, asked: InferAsk, send: SendPart[InferPart]) -> Refused | None:
        if self._ending:
            return Refused(code="unavailable", reason="the node is ending", status=503, retry="elsewhere")
        if asked.stream in self._streams:
            return Refused(code="duplicate_stream", reason=f"there is a stream '{asked.stream}' already", status=409)
        stream = self._streams[asked.stream] = _Stream(asked, send)
        self._hear(asked.session)
        try:
            refused = await self._answer(stream, asked)
        except asyncio.CancelledError:
            if stream.stopped is None:
                raise
            stream.task.uncancel()
            refused = stream.stopped
        finally:
            del self._streams[asked.stream]
            PARTS.inc(stream.parts)
        if refused is None or not stream.begun:
            return refused
        await stream.send(last=True, failed=refused)
        return None

    async def on_control(self, asked: InferControl) -> InferControlled | Refused:
        self._hear(asked.session)
        unknown: list[str] = []
        for name, taken in asked.taken.items():
            if stream := self._known(name, asked.session):
                stream.take(taken)
            else:
                unknown.append(name)
        for name in asked.cancel:
            if stream := self._known(name, asked.session):
                stream.stop("cancelled", _stopped("its asker does not want it any more"))
            else:
                unknown.append(name)
        return InferControlled(session=self._session, unknown=unknown)

    async def _answer(self, stream: _Stream, asked: InferAsk) -> Refused | None:
        answer = await self._inference.open(asked)
        if isinstance(answer, Refused):
            return answer
        try:
            async with contextlib.aclosing(answer):
                await self._pass_on(stream, answer)
        except AnswerFailed as failure:
            return failure.refused
        return None

    async def _pass_on(self, stream: _Stream, answer: EngineAnswer) -> None:
        begin: dict[str, Any] = {
            "status": answer.status,
            "content_type": answer.content_type,
            "device": answer.device,
        }
        async for text in answer:
            await stream.room_for(len(text))
            last = answer.at_end
            await stream.send(text=text, last=last, **begin)
            stream.begun = True
            if last:
                return
            begin = {}
        await stream.send(last=True, **begin)

    def _known(self, name: str, session: str) -> _Stream | None:
        stream = self._streams.get(name)
        return stream if stream is not None and stream.session == session else None

    def _hear(self, session: str) -> None:
        if session:
            self._heard[session] = asyncio.get_running_loop().time()

    def _stop_all(self, cause: str, why: str) -> None:
        for stream in list(self._streams.values()):
            stream.stop(cause, Refused(code="unavailable", reason=why, status=503, retry="elsewhere"))


class _Stream:
    """One answer on its way."""

    def __init__(self, asked: InferAsk, send: SendPart[InferPart]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task: Final[asyncio.Task[Any]] = task
        self.session: Final = asked.session
        self.stopped: Refused | None = None
        """Why it ends here, when it does not by itself."""
        self.sent_s = asyncio.get_running_loop().time()
        self.parts = 0
        self.begun = False
        """Something of the answer was sent."""
        self._send = send
        self._window: Final = asked.window
        self._sent = 0
        """Characters, from the beginning of the answer, as the following."""
        self._taken = 0
        self._room: asyncio.Event | None = None

    async def send(self, **fields: Any) -> None:
        part = InferPart(seq=self.parts, **fields)
        self.parts += 1
        self._sent += len(part.text)
        self.sent_s = asyncio.get_running_loop().time()
        await self._send(part)

    async def room_for(self, size: int) -> None:
        """Returns once so many characters may be sent. The engine waits meanwhile."""
        while self.session and self._sent + size - self._taken > self._window:
            self._room = asyncio.Event()
            await self._room.wait()

    def take(self, count: int) -> None:
        self._taken = max(self._taken, min(count, self._sent))
        if self._room is not None:
            self._room.set()

    def stop(self, cause: str, why: Refused) -> None:
        if self.stopped is None:
            self.stopped = why
            STOPPED.labels(cause).inc()
            self.task.cancel()


def _stopped(why: str) -> Refused:
    return Refused(code="cancelled", reason=why, status=499)
