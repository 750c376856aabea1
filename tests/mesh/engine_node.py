"""A node with an engine, in the hands of a test: on the bus one like any other, and it answers what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Collection
from typing import Any, Final

from computemesh import trace
from computemesh.bus import Bus, BusError, MicroService
from computemesh.contracts import infer, nodes
from computemesh.contracts.base import Refused, SendPart, serve, serve_parts
from computemesh.contracts.infer import InferAsk, InferControl, InferControlled, InferPart
from computemesh.contracts.nodes import (
    EngineCard,
    EngineState,
    EngineUse,
    ModelCard,
    NodeAnnouncement,
    NodeHeartbeat,
)
from computemesh.ids import new_id
from computemesh.openai import DONE
from computemesh.tasks import end_all

BEAT_S: Final = 0.2
DEVICE: Final = "gpu:0"


class EngineNode:
    """Answers with ``max_tokens`` tokens that are numbered: ``n1:0 n1:1 …``.

    Args:
        bus: connected as this node.
        embeddings: whether it says that its models give them; None to say nothing.
    """

    def __init__(
        self,
        bus: Bus,
        node_id: str,
        models: Collection[str],
        *,
        slots: int = 64,
        pending_max: int = 1000,
        embeddings: bool | None = None,
    ) -> None:
        self.node_id: Final = node_id
        self.session = new_id("s")
        self.asked: list[InferAsk] = []
        """Every request that arrived, in order."""
        self.traces: list[str] = []
        """The trace of each."""
        self.cancelled: list[str] = []
        """Streams that somebody did not want any more."""
        self.open: dict[str, asyncio.Task[Any]] = {}
        self.refuses: Refused | None = None
        """What it answers instead, while this is set."""
        self.breaks: tuple[int, Refused] | None = None
        """After how many tokens an answer breaks off, and why."""
        self.status = 200
        self.complaint = ""
        """With another status: the body."""
        self.device = DEVICE
        """What its answers say they come from."""
        self.go = asyncio.Event()
        """While it is not set, answers stop before the token :attr:`stops_at`."""
        self.go.set()
        self.stops_at = 0
        self.accepting = True
        self.full = False
        """It tells that its engine has all it takes."""
        self._bus = bus
        self._models = models
        self._cards = [] if embeddings is None else [ModelCard(name=name, embeddings=embeddings) for name in models]
        self._card = EngineCard(device=DEVICE, slots=slots, pending_max=pending_max)
        self._micro: MicroService | None = None
        self._beating: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Listens, registers, and sends heartbeats from now on."""
        await self.listen()
        announcement = NodeAnnouncement(
            node_id=self.node_id,
            session=self.session,
            slots=0,
            models=list(self._models),
            model_cards=self._cards,
            engines=[self._card],
        )
        answer = await self._bus.ask(nodes.REGISTER, announcement)
        assert not isinstance(answer, Refused), answer
        await self._bus.publish(nodes.ANNOUNCE, announcement)
        self._beating = asyncio.create_task(self._beat_forever())

    async def listen(self) -> None:
        self._micro = MicroService(self._bus, name=self.node_id, description="a node of a test", metadata={})
        await self._micro.add(serve_parts(infer.ASK, self._on_ask, target=self.node_id))
        await self._micro.add(serve(infer.CONTROL, self._on_control, target=self.node_id))
        await self._bus.flush()

    async def vanish(self) -> None:
        """Answers nothing any more, and says nothing of it, as a machine that lost its power."""
        if self._beating is not None:
            await end_all([self._beating])
        assert self._micro is not None
        self.go.clear()
        # Without their tasks, endpoints drain at once.
        await end_all(self.open.values())
        await self._micro.drain()
        await self._bus.flush()

    async def leave(self) -> None:
        """Ends in good order."""
        await self._beat(leaving=True)
        self.go.set()
        await self.vanish()

    async def tell(self) -> None:
        """Sends a heartbeat now."""
        await self._beat()
        await self._bus.flush()

    # --- what it hears -----------------------------------------------------------------------------------------------

    async def _on_ask(self, asked: InferAsk, send: SendPart[InferPart]) -> Refused | None:
        self.asked.append(asked)
        here = trace.current()
        self.traces.append(here.trace_id if here else "")
        if self.refuses is not None:
            return self.refuses
        task = asyncio.current_task()
        assert task is not None
        self.open[asked.stream] = task
        try:
            return await self._answer(asked, send)
        except asyncio.CancelledError:
            if asked.stream not in self.cancelled:
                raise
            task.uncancel()
            return Refused(code="cancelled", reason="not wanted any more", status=499)
        finally:
            del self.open[asked.stream]

    async def _answer(self, asked: InferAsk, send: SendPart[InferPart]) -> Refused | None:
        texts = self._texts(asked)
        kind = "text/event-stream" if asked.body.get("stream") and self.status == 200 else "application/json"
        for at, text in enumerate(texts):
            if at == self.stops_at:
                await self.go.wait()
            if self.breaks is not None and at == self.breaks[0]:
                if not at:
                    return self.breaks[1]
                await send(InferPart(seq=at, last=True, failed=self.breaks[1]))
                return None
            first: dict[str, Any] = (
                {"status": self.status, "content_type": kind, "device": self.device} if not at else {}
            )
            await send(InferPart(seq=at, text=text, last=at == len(texts) - 1, **first))
        return None

    def _texts(self, asked: InferAsk) -> list[str]:
        """The answer, in parts."""
        if self.status != 200:
            return [self.complaint]
        body = asked.body
        made = [f"{self.node_id}:{at} " for at in range(body.get("max_tokens", 4))]
        usage = {"prompt_tokens": 7, "completion_tokens": len(made), "total_tokens": 7 + len(made)}
        head = {"id": asked.stream, "object": "chat.completion", "created": 1, "model": asked.model}
        if asked.path == "/v1/embeddings":
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
            return [json.dumps({"object": "list", "model": asked.model, "data": data, "usage": usage})]
        chat = asked.path == "/v1/chat/completions"
        if not body.get("stream"):
            said: dict[str, Any] = {"message": {"role": "assistant", "content": "".join(made)}}
            choice = {"index": 0, "finish_reason": "stop", **(said if chat else {"text": "".join(made)})}
            text = json.dumps({**head, "choices": [choice], "usage": usage})
            return [text[:10], text[10:]]
        deltas = [{"delta": {"content": token}} if chat else {"text": token} for token in made]
        chunks = [{"index": 0, "finish_reason": None, **delta} for delta in deltas]
        chunks.append({"index": 0, "finish_reason": "stop", **({"delta": {}} if chat else {"text": ""})})
        events: list[dict[str, Any]] = [
            {**head, "object": "chat.completion.chunk", "choices": [chunk]} for chunk in chunks
        ]
        # As the node agent sees to it that engines tell, whatever the client asked.
        events.append({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        return [*(f"data: {json.dumps(event)}\n\n" for event in events), DONE]

    async def _on_control(self, asked: InferControl) -> InferControlled | Refused:
        for name in asked.cancel:
            self.cancelled.append(name)
            if task := self.open.get(name):
                task.cancel()
        unknown = [name for name in [*asked.taken, *asked.cancel] if name not in self.open]
        return InferControlled(session=self.session, unknown=unknown)

    # --- what it says ------------------------------------------------------------------------------------------------

    async def _beat_forever(self) -> None:
        while True:
            with contextlib.suppress(BusError):
                await self._beat()
            await asyncio.sleep(BEAT_S)

    async def _beat(self, *, leaving: bool = False) -> None:
        pending = self._card.pending_max if self.full else len(self.open)
        use = EngineUse(device=DEVICE, state=EngineState.READY, model=next(iter(self._models)), pending=pending)
        beat = NodeHeartbeat(
            node_id=self.node_id,
            session=self.session,
            engines=[use],
            accepting=self.accepting,
            leaving=leaving,
        )
        await self._bus.publish(nodes.HEARTBEAT, beat)
