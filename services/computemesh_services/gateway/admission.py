"""Who may ask what, before an engine is looked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from starlette.requests import Request

from computemesh.contracts.base import Refused
from computemesh.openai import Question, Usage


@dataclass(frozen=True)
class Denied:
    """Somebody who is not let in."""

    refused: Refused
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """For the answer: what is left of the caller's limits."""


class Permit(Protocol):
    """A request that was let in, until it ends."""

    @property
    def key(self) -> str:
        """Name of the key it is booked on; empty when it is on none."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """For the answer: what is left of the caller's limits."""
        ...

    def end(self, usage: Usage | None, *, answered: bool) -> None:
        """The request has ended. Called once.

        Args:
            usage: of tokens, as far as it is known.
            answered: whether an engine worked on it; else it cost no tokens.
        """
        ...


class Caller(Protocol):
    """Somebody who was let in."""

    def sees(self, model: str) -> bool:
        """Whether a model is for this caller."""
        ...

    def admit(self, asked: Question) -> Permit | Denied:
        """Lets a request of this caller through, if its limits allow it."""
        ...


class Entry(Protocol):
    """Where callers come in."""

    async def enter(self, request: Request) -> Caller | Denied:
        """Who asks, or why not to answer."""
        ...


class Free:
    """A permit that nothing is booked on."""

    key = ""
    headers: Mapping[str, str] = {}

    def end(self, usage: Usage | None, *, answered: bool) -> None:
        pass


class Anyone:
    """A caller without limits."""

    def sees(self, model: str) -> bool:
        return True

    def admit(self, asked: Question) -> Permit | Denied:
        return Free()


class Open:
    """Lets all in that the edge let in."""

    async def enter(self, request: Request) -> Caller | Denied:
        return Anyone()
