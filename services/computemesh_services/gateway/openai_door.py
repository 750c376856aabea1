"""``/v1``: OpenAI's interface, answered by the engines of all nodes."""

from __future__ import annotations

import asyncio
import time
from typing import Final, cast

from starlette.requests import Request
from starlette.responses import Response

from computemesh import openai
from computemesh.bus import Bus
from computemesh.contracts.base import Refused
from computemesh.contracts.infer import Path
from computemesh.contracts.openai import Models, OutOfReach, routes_of
from computemesh.contracts.services import GATEWAY
from computemesh.edge import Extra, api_error, as_json, declared, read_body
from computemesh.ids import new_id
from computemesh.openai import Question
from computemesh_services.gateway.admission import Denied, Entry, Open, Permit
from computemesh_services.gateway.engines import Engines
from computemesh_services.gateway.exchange import Asker, Exchange
from computemesh_services.gateway.places import Places

AROUND_BYTES: Final = 4096
"""Room in a message for what surrounds a body."""


class OpenAIDoor:
    """Passes requests on to engines.

    Args:
        queue_timeout_s: how long a request waits for an engine.
        entry: who may come in, and ask what.
    """

    def __init__(
        self,
        bus: Bus,
        engines: Engines,
        places: Places,
        asker: Asker,
        *,
        queue_timeout_s: float,
        entry: Entry | None = None,
    ) -> None:
        self.engines: Final = engines
        self.places: Final = places
        self.asker: Final = asker
        self.queue_timeout_s: Final = queue_timeout_s
        self._bus = bus
        self._entry = entry or Open()
        self._open: set[Exchange] = set()

    def routes(self) -> list[Extra]:
        found = {route.name: route for route in routes_of(GATEWAY)}
        model = found["get_model"]
        return [
            declared(found["list_models"], self.on_models),
            # Names of models may have a slash.
            Extra(method="GET", path="/v1/models/{model:path}", handler=self.on_model, route=model),
            declared(found["create_chat_completion"], self.on_ask),
            declared(found["create_completion"], self.on_ask),
            declared(found["create_embedding"], self.on_ask),
        ]

    async def on_models(self, request: Request) -> Response:
        caller = await self._entry.enter(request)
        if isinstance(caller, Denied):
            return _denied(caller)
        here, away = self.engines.models(now=time.monotonic())
        seen = [model for model in here if caller.sees(model.id)]
        return as_json(Models(data=seen, rolemesh=OutOfReach(unavailable_models=[*filter(caller.sees, away)])))

    async def on_model(self, request: Request) -> Response:
        caller = await self._entry.enter(request)
        if isinstance(caller, Denied):
            return _denied(caller)
        name = request.path_params["model"]
        here, away = self.engines.models(now=time.monotonic())
        found = {model.id: model for model in here if caller.sees(model.id)}
        if name in found:
            return as_json(found[name])
        if name in away and caller.sees(name):
            reason = f"the nodes that serve model {name!r} are away, or take nothing new"
            return api_error(Refused(code="unavailable", reason=reason, status=503, retry="later"))
        reason = f"no node serves model {name!r}"
        return api_error(Refused(code="model_not_found", field="model", reason=reason, status=404))

    async def on_ask(self, request: Request) -> Response:
        began_s = time.perf_counter()
        request_id = new_id("r")
        told = await self._admitted(request)
        if isinstance(told, Denied):
            return _denied(told, request_id)
        asked, permit = told
        exchange = Exchange(self, asked, permit, request_id=request_id, began_s=began_s)
        self._open.add(exchange)
        exchange.ended.add_done_callback(lambda _: self._open.discard(exchange))
        return exchange

    async def _admitted(self, request: Request) -> tuple[Question, Permit] | Denied:
        """What is asked, once it is sure that it may be. Of a stranger no body is read."""
        caller = await self._entry.enter(request)
        if isinstance(caller, Denied):
            return caller
        body = await read_body(request, bytes_max=self._bus.max_payload - AROUND_BYTES)
        asked = body if isinstance(body, Refused) else openai.read(cast("Path", request.url.path), body)
        if isinstance(asked, Refused):
            return Denied(asked)
        if caller.sees(asked.model) and self.engines.embeds(asked.model) is (not asked.embeds):
            here, _ = self.engines.models(now=time.monotonic())
            able = [model.id for model in here if self.engines.embeds(model.id) is asked.embeds]
            return Denied(openai.wrong_kind(asked, filter(caller.sees, able)))
        permit = caller.admit(asked)
        return permit if isinstance(permit, Denied) else (asked, permit)

    async def drain(self) -> None:
        """Returns once all that the edge gave up has been told so."""
        while self._open:
            await asyncio.wait([exchange.ended for exchange in self._open])


def _denied(denied: Denied, request_id: str = "") -> Response:
    answer = api_error(denied.refused)
    answer.headers.update(denied.headers)
    if request_id:
        answer.headers["x-request-id"] = request_id
    return answer
