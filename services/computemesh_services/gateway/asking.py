"""From a call over HTTP to a question on the bus, and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from computemesh.bus import Bus, NoResponder, TimedOut, micro
from computemesh.contracts.base import Message, Refused, Request, Route, encode
from computemesh.edge import Extra, declared, problem, read_question
from computemesh.objects import ObjectError

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

TAKE_OVER_S: Final = 15.0
"""How long a question waits for somebody to answer it: within this, another replica takes over from one that died."""

AGAIN_S: Final = 0.1


async def ask(bus: Bus, request: Request[Q, R], question: Q) -> R | Refused:
    """The answer, also when it takes a moment until somebody is there to give it. Asking twice must do no harm.

    Raises:
        BusError: nobody answers.
    """
    deadline_s = time.monotonic() + TAKE_OVER_S
    while True:
        try:
            return await bus.ask(request, question)
        except (NoResponder, TimedOut):  # Also asked of a replica that died before it answered.
            if time.monotonic() > deadline_s:
                raise
            await asyncio.sleep(AGAIN_S)


def route(contract: Route, kind: type[Q], handler: Callable[[Q], Awaitable[Any]]) -> Extra:
    """A route whose caller asks a *kind*, and gets what *handler* makes of it as JSON."""

    async def handle(request: HttpRequest) -> Response:
        asked = await read_question(request, kind)
        return answer(asked if isinstance(asked, Refused) else await guarded(request, handler(asked)))

    return declared(contract, handle)


async def guarded(request: HttpRequest, answering: Awaitable[Any]) -> Any:
    """What a handler found, or the refusal that stands for what went wrong."""

    async def told() -> Any:
        try:
            return await answering
        except ObjectError as error:
            return error.refused

    return await micro.guarded(request.url.path, told())


def answer(found: Any) -> Response:
    """What was found as JSON, or a refusal as a problem."""
    return problem(found) if isinstance(found, Refused) else Response(encode(found), media_type="application/json")
