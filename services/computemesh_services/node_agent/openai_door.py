"""OpenAI's interface to the engines of this machine: the same way in as over the bus, without the bus."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from msgspec.structs import replace
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from computemesh import log, openai
from computemesh.answers import Answer, AnswerFailed
from computemesh.contracts.base import Message, Refused, encode
from computemesh.contracts.infer import InferAsk, Path
from computemesh.contracts.nodes import EngineState, EngineUse, ModelCard
from computemesh.contracts.openai import EVENTS, Model, ModelGet, Models, ModelsGet, routes_of
from computemesh.contracts.services import NODE_AGENT
from computemesh.edge import Extra, api_error, declared, read_body, read_question
from computemesh.edge.streams import Stream, while_here
from computemesh.ids import new_id

BODY_BYTES_MAX: Final = 8 * 1024 * 1024
"""Of a request: as much as a message of the mesh's own NATS server holds, and so as much as the gateway takes."""

AGAIN_S: Final = (0.1, 0.5)
"""Pauses before a request is given again to an engine that was lost before it answered."""

_BROKE_OFF: Final = Refused(
    code="engine_failed", reason="the engine's answer ended before its end mark", status=502, retry="later"
)

_ENDING: Final = openai.error_event(
    Refused(code="unavailable", reason="the node is ending", status=503, retry="elsewhere")
)

_log = log.get("openai")


class Engines(Protocol):
    """What there is to ask."""

    def model_cards(self) -> Sequence[ModelCard]: ...

    def uses(self) -> Sequence[EngineUse]: ...


class Inference(Protocol):
    """Who asks the engines."""

    async def open(self, ask: InferAsk) -> Answer | Refused: ...


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """An answer that came as one."""

    status: int
    text: str


class OpenAiDoor:
    """The routes of ``contracts.openai`` on a node agent's edge."""

    def __init__(self, node_id: str, engines: Engines, inference: Inference) -> None:
        self._node_id = node_id
        self._engines = engines
        self._inference = inference
        self._since_s = int(time.time())

    def routes(self) -> list[Extra]:
        handlers: dict[str, Callable[[Request], Any]] = {
            "/v1/models": self.on_models,
            "/v1/models/{model}": self.on_model,
            **{path: partial(self.on_ask, path) for path in openai.KINDS},
        }
        return [declared(route, handlers[route.http.path]) for route in routes_of(NODE_AGENT)]

    # --- models ------------------------------------------------------------------------------------------------

    async def on_models(self, request: Request) -> Response:
        asked = await read_question(request, ModelsGet)
        return _said(asked if isinstance(asked, Refused) else Models(data=self._models()))

    async def on_model(self, request: Request) -> Response:
        asked = await read_question(request, ModelGet)
        if isinstance(asked, Refused):
            return _said(asked)
        found = next((model for model in self._models() if model.id == asked.model), None)
        reason = f"no model '{asked.model}' on this node; there is: {', '.join(self._names()) or 'none'}"
        return _said(found or Refused(code="unknown_model", field="model", reason=reason, status=404))

    def _names(self) -> list[str]:
        return sorted(card.name for card in self._engines.model_cards())

    def _models(self) -> list[Model]:
        loaded = {use.model for use in self._engines.uses() if use.state is EngineState.READY}
        return [
            Model(
                id=card.name,
                created=self._since_s,
                nodes=[self._node_id],
                loaded=card.name in loaded,
                context_tokens=card.context_tokens,
                embeddings=card.embeddings,
            )
            for card in self._engines.model_cards()
        ]

    # --- requests ----------------------------------------------------------------------------------------------

    async def on_ask(self, path: Path, request: Request) -> Response:
        stream = new_id("i")
        named = {"x-request-id": stream, "x-computemesh-node": self._node_id}
        body = await read_body(request, bytes_max=BODY_BYTES_MAX)
        question = body if isinstance(body, Refused) else openai.read(path, body)
        if isinstance(question, Refused):
            response = api_error(question)
            response.headers.update(named)
            return response
        ask = InferAsk(stream=stream, model=question.model, path=path, body=question.body)
        try:
            begun = await while_here(request.receive, self._begin(ask, question))
        except ClientDisconnect:
            _log.info("the caller has gone", request=ask.stream, model=ask.model)
            return Response(status_code=499)  # Nobody reads it.
        match begun:
            case Refused():
                response = api_error(_here(begun))
            case _Whole(status=200):
                response = Response(begun.text, media_type="application/json")
            case _Whole():
                response = api_error(openai.complaint(begun.status, begun.text))
            case _:
                named["x-computemesh-device"] = begun.device
                return Stream(
                    _pieces(begun, question), media_type=EVENTS, headers=named, close=begun.aclose, farewell=_ENDING
                )
        response.headers.update(named)
        return response

    async def _open(self, ask: InferAsk) -> Answer | Refused:
        """The answer, also when the engine that was to give it dies before it begins: the next one may."""
        for pause_s in AGAIN_S:
            answer = await self._inference.open(ask)
            if not (isinstance(answer, Refused) and answer.code == "engine_lost"):
                return answer
            await asyncio.sleep(pause_s)  # By then it is known that the engine is gone, and the next try waits for it.
        return await self._inference.open(ask)

    async def _begin(self, ask: InferAsk, question: openai.Question) -> Answer | _Whole | Refused:
        """The answer once it has begun, if it streams, else all of it."""
        answer = await self._open(ask)
        if isinstance(answer, Refused):
            return answer
        if answer.status == 200 and question.stream:
            return answer
        async with contextlib.aclosing(answer):
            try:
                return _Whole(status=answer.status, text="".join([text async for text in answer]))
            except AnswerFailed as failure:
                return failure.refused


async def _pieces(answer: Answer, question: openai.Question) -> AsyncGenerator[str, None]:
    """What the caller gets of an answer that streams. One that breaks off ends with an error and without its mark."""
    reader = openai.Reader(keep_usage=question.include_usage)
    try:
        async for text in answer:
            if kept := reader.take(text):
                yield kept
    except AnswerFailed as failure:
        yield openai.error_event(failure.refused)
        return
    if not reader.done:
        yield openai.error_event(_BROKE_OFF)


def _here(told: Refused) -> Refused:
    """A refusal of the engines as this edge's own: there is no elsewhere for a model that this node does not have."""
    return replace(told, field="model", retry="never") if told.code == "unknown_model" else told


def _said(found: Message) -> Response:
    return api_error(found) if isinstance(found, Refused) else Response(encode(found), media_type="application/json")
