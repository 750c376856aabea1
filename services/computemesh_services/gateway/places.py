"""Requests and the engines they get: at once, or in the order in which they came."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from computemesh.contracts.base import Refused
from computemesh_services.gateway import routing
from computemesh_services.gateway.engines import Engines, Spot
from computemesh_services.gateway.routing import Choice

LOOK_AGAIN_S: Final = 0.5
"""How often those that wait are tried when nothing was heard: a report of full engines may be out of date."""


@dataclass(eq=False, kw_only=True, slots=True)
class Wish:
    """A request that needs an engine."""

    model: str
    prefix: bytes
    failed: set[Spot] = field(default_factory=set[Spot])
    """Engines that it is not given again."""


@dataclass(eq=False, slots=True)
class _Waiter:
    wish: Wish
    given: asyncio.Future[Choice | Refused]


class Places:
    """Gives engines to requests. A place that was taken is counted until it is released.

    Nothing here awaits between looking at the engines and taking one, so no place is given twice.

    Args:
        queue_max: requests that may wait for one model.
    """

    def __init__(self, engines: Engines, *, queue_max: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._engines = engines
        self._queue_max = queue_max
        self._clock = clock
        self._waiting: dict[str, deque[_Waiter]] = {}

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def take(self, wish: Wish, *, again: bool = False) -> Choice | Refused | asyncio.Future[Choice | Refused]:
        """An engine, the reason why there is none, or what will become one or the other.

        A future that is cancelled has left the queue; if it has a place by then, its owner has to release it.

        Args:
            again: it had its turn, so it goes before those that wait.
        """
        line = self._waiting.get(wish.model)
        if again or not line:
            found = self._find(wish)
            if found is not None:
                return found
        if line is None:
            line = self._waiting.setdefault(wish.model, deque())
        if len(line) >= self._queue_max:
            reason = f"{len(line)} requests for model {wish.model!r} wait already"
            return Refused(code="too_many_requests", field="", reason=reason, status=429, retry="later")
        waiter = _Waiter(wish, asyncio.get_running_loop().create_future())
        if again:
            line.appendleft(waiter)
        else:
            line.append(waiter)
        return waiter.given

    def release(self, choice: Choice, model: str) -> None:
        """The engine has the request no more."""
        self._engines.ended(choice.spot, model)
        self.serve()

    def in_vain(self, model: str, waited_s: float) -> Refused:
        """What is said to a request that has waited long enough."""
        if self._engines.standing(model, now=self._clock()) == "silent":
            reason = f"the nodes that serve model {model!r} do not answer, and were not heard of in {waited_s:.0f} s"
            return Refused(code="unavailable", reason=reason, status=503, retry="later")
        reason = f"every engine for model {model!r} is busy, and none fell free in {waited_s:.0f} s"
        return Refused(code="too_many_requests", reason=reason, status=429, retry="later")

    def serve(self) -> None:
        """Gives those that wait what there is now. Called whenever that may have changed."""
        for model, line in list(self._waiting.items()):
            while line:
                if line[0].given.done():  # It was given up.
                    line.popleft()
                    continue
                found = self._find(line[0].wish)
                if found is None:
                    break
                line.popleft().given.set_result(found)
            if not line:
                del self._waiting[model]

    async def serve_forever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            self.serve()

    def _find(self, wish: Wish) -> Choice | Refused | None:
        """An engine, now taken; why there can be none; None to wait."""
        now = self._clock()
        candidates = self._engines.candidates(wish.model, now=now)
        if choice := routing.choose(candidates, wish.prefix, wish.failed):
            self._engines.began(choice.spot, wish.model)
            return choice
        return None if candidates else self._none(wish, now)

    def _none(self, wish: Wish, now: float) -> Refused:
        match self._engines.standing(wish.model, now=now):
            case "unknown":
                here = ", ".join(model.id for model in self._engines.models(now=now)[0]) or "none"
                reason = f"no node serves model {wish.model!r}; models that can be asked: {here}"
                return Refused(code="model_not_found", field="model", reason=reason, status=404)
            case "unsure":
                reason = "which models there are is not known yet: no node-registry has answered"
            case _:
                reason = f"the nodes that serve model {wish.model!r} are away, or take nothing new"
        return Refused(code="unavailable", reason=reason, status=503, retry="later")
