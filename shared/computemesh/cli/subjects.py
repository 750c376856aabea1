"""Names of subjects as people type them: ``work``, ``work.state``, ``compute.work.state.v1.w-1``, ``compute.>``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

from computemesh.contracts.base import Event, Request
from computemesh.contracts.catalog import CONVERSATIONS, events, requests

Contract = Event[Any] | Request[Any, Any]

_VERSION: Final = re.compile(r"\.v\d+(?=\.|$)")


def short(subject: str) -> str:
    """A subject without what all have in common: ``compute.work.state.v1.w-1`` is ``work.state.w-1``."""
    return _VERSION.sub("", subject.removeprefix("compute."), count=1)


def conversations() -> list[str]:
    """The names of the conversations, such as ``work``."""
    return [module.__name__.rpartition(".")[2] for module in CONVERSATIONS]


def pattern(contract: Contract) -> str:
    """The subject of a contract, for every target."""
    return contract.at("*" if contract.target else "")


def find_events(name: str) -> list[str]:
    """The subjects to hear for a name: of a conversation, of one event, or a subject with or without wildcards.

    A wildcard stands for the events of the contracts that it covers, since nobody may hear more than those. What
    covers none is a subject outside the contracts and stays as it is, if it looks like one.

    Raises:
        LookupError: nothing is called that.
    """
    if name in conversations():
        return [pattern(event) for event in events() if short(event.subject).split(".")[0] == name]
    covered = [pattern(event) for event in events() if covers(name, pattern(event))]
    if covered:
        return covered
    for event in events():
        if name in (event.subject, short(event.subject)):
            return [pattern(event)]
        for base in (event.subject, short(event.subject)):
            if event.target and name.startswith(f"{base}."):
                return [f"{event.subject}.{name.removeprefix(f'{base}.')}"]
    ours = short(name).split(".")[0] in conversations()
    if ours or not is_subject(name) or not re.search(r"[.>*]", name):
        raise LookupError(name)
    return [name]


def find_request(name: str) -> tuple[Request[Any, Any], str] | None:
    """The request of that name and the target in it, which may be empty. The longest name counts: `infer.control` is no
    target of `infer`."""
    named = [(base, request) for request in requests() for base in (request.subject, short(request.subject))]
    for base, request in sorted(named, key=lambda entry: len(entry[0]), reverse=True):
        if name == base:
            return request, ""
        if request.target and name.startswith(f"{base}."):
            return request, name.removeprefix(f"{base}.")
    return None


@lru_cache(maxsize=4096)
def event_of(subject: str) -> Event[Any] | None:
    """The event that travels on a subject."""
    return next((event for event in events() if covers(pattern(event), subject)), None)


def covers(wide: str, subject: str) -> bool:
    """Whether *wide*, with its wildcards, covers all that *subject* stands for."""
    wides, parts = wide.split("."), subject.split(".")
    for number, part in enumerate(wides):
        if part == ">":
            return number == len(wides) - 1 and len(parts) > number
        if number >= len(parts) or (part != parts[number] and (part != "*" or parts[number] == ">")):
            return False
    return len(wides) == len(parts)


def is_subject(text: str) -> bool:
    """Whether the server would take *text* as a subject."""
    tokens = text.split(".")
    return all(tokens) and not re.search(r"\s", text) and ">" not in tokens[:-1] and text.isprintable()


def near(name: str, names: Iterable[str]) -> list[str]:
    """Those of *names* that *name* may be meant for, nearest first."""
    known, name = list(names), short(name)
    found = difflib.get_close_matches(name, known, 3, cutoff=0.6)
    last = name.rpartition(".")[2]
    return found or [other for other in known if last and last in other][:3]
