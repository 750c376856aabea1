"""Greetings: a conversation to learn from.

anyone   --greet-->    greeter   answered Greeting
greeter  --greeted-->  anyone    somebody was greeted
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from computemesh.contracts.base import Event, Http, Message, Refusal, Request, Role
from computemesh.contracts.services import GREETER

Language = Literal["en", "de", "fr"]


class Greet(Message, frozen=True, kw_only=True):
    """Asks for a greeting."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    language: Language = "en"


class Greeting(Message, frozen=True, kw_only=True):
    text: str
    number: Annotated[int, msgspec.Meta(ge=1)]
    """How many this greeter has said, with this one."""


class Greeted(Message, frozen=True, kw_only=True):
    name: str
    number: int


GREET: Final = Request(
    subject="compute.greetings.greet.v1",
    takes=Greet,
    gives=Greeting,
    asked_by=frozenset({Role.CLIENT, Role.SERVICES}),
    service=GREETER,
    http=(Http(method="GET", path="/api/v1/greetings/{name}"),),
    refuses=(Refusal(code="tired", status=429, when="it has said as many as it may"),),
    example=Greet(name="Ada", language="fr"),
    about="A greeting, in one of three languages.",
)
GREETED: Final = Event(
    subject="compute.greetings.greeted.v1",
    payload=Greeted,
    sent_by=frozenset({Role.SERVICES}),
    read_by=frozenset(Role),
    about="Somebody was greeted.",
)
