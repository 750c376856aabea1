"""Who may ask what, before an engine is looked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from starlette.requests import Request

from computemesh.contracts.base import Refused
from computemesh.openai import Question, Usage


class Permit(Protocol):
    """A request that was let in, until it ends."""

    @property
    def headers(self) -> Mapping[str, str]:
        """For the answer: what is left of the caller's limits."""
        ...

    def end(self, usage: Usage | None) -> None:
        """The request has ended, with this use of tokens as far as it is known. Called once."""
        ...


class Free:
    """A permit that nothing is booked on."""

    headers: Mapping[str, str] = {}

    def end(self, usage: Usage | None) -> None:
        pass


Admit = Callable[[Request, Question], Refused | Permit]


def anyone(_request: Request, _asked: Question) -> Permit:
    """Lets all in that the edge let in."""
    return Free()
