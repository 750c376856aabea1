"""The core: what to say. Plain functions over plain data, without a clock, a bus or a log."""

from __future__ import annotations

from typing import Final

from computemesh.contracts.base import Refused
from computemesh.contracts.greetings import Greet, Greeting, Language

HELLO: Final[dict[Language, str]] = {"en": "Hello", "de": "Guten Tag", "fr": "Bonjour"}


def greet(asked: Greet, *, said: int, said_max: int) -> Greeting | Refused:
    """The greeting after *said* others, or why there is none."""
    if said >= said_max:
        return Refused(code="tired", reason=f"{said} of {said_max} greetings are said", status=429, retry="elsewhere")
    return Greeting(text=f"{HELLO[asked.language]}, {asked.name}!", number=said + 1)
