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
from computemesh_services.gateway.admission import Admit, anyone
from computemesh_services.gateway.engines import Engines
from computemesh_services.gateway.exchange import Asker, Exchange
from computemesh_services.gateway.places import Places

AROUND_BYTES: Final = 4096
"""Room in a message for what surrounds a body."""


class OpenAIDoor:
    """Passes requests on to engines.

    Args:
        queue_timeout_s: how long a request waits for an engine.
        admit: who may ask what.
    """

    def __init__(
        self,
        bus: Bus,
        engines: Engines,
        places: Places,
        asker: Asker,
        *,
        queue_timeout_s: float,
        admit: Admit = anyone,
    ) -> None:
        self.engines: Final = engines
        self.places: Final = places
        self.asker: Final = asker
        self.queue_timeout_s: Final = queue_timeout_s
        self._bus = bus
        self._admit = admit
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

    async def on_models(self, _: Request) -> Response:
        here, away = self.engines.models(now=time.monotonic())
        return as_json(Models(data=here, rolemesh=OutOfReach(unavailable_models=away)))

    async def on_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        here, away = self.engines.models(now=time.monotonic())
        for model in here:
            if model.id == name:
                return as_json(model)
        if name in away:
            reason = f"the nodes that serve model {name!r} are away, or take nothing new"
            return api_error(Refused(code="unavailable", reason=reason, status=503, retry="later"))
        reason = f"no node serves model {name!r}"
        return api_error(Refused(code="model_not_found", field="model", reason=reason, status=404))

    async def on_ask(self, request: Request) -> Response:
        began_s = time.perf_counter()
        request_id = new_id("r")
        path = cast("Path", request.url.path)
        body = await read_body(request, bytes_max=self._bus.max_payload - AROUND_BYTES)
        asked = body if isinstance(body, Refused) else openai.read(path, body)
        permit = asked if isinstance(asked, Refused) else self._admit(request, asked)
        if isinstance(asked, Refused) or isinstance(permit, Refused):
            told = asked if isinstance(asked, Refused) else permit
            assert isinstance(told, Refused)
            refusal = api_error(told)
            refusal.headers["x-request-id"] = request_id
            return refusal
        exchange = Exchange(self, asked, permit, request_id=request_id, began_s=began_s)
        self._open.add(exchange)
        exchange.ended.add_done_callback(lambda _: self._open.discard(exchange))
        return exchange

    async def drain(self) -> None:
        """Returns once all that the edge gave up has been told so."""
        while self._open:
            await asyncio.wait([exchange.ended for exchange in self._open])
