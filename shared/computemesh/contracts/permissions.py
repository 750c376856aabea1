"""Who may say and hear what on the bus: subjects by role, derived from the contracts.

Everything not listed is denied. A role publishes what it sends or asks, subscribes to what it reads or
answers, and hears replies in an inbox of its own. Only services reach JetStream; everyone else stores by
publishing to a captured subject.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from computemesh.contracts.base import Role
from computemesh.contracts.catalog import events, requests

RESPONSES_MAX: Final = 1000
"""Replies that a role without leave to publish on inboxes may send to one request."""

RESPONSES_EXPIRE_S: Final = 600
"""How long after a request such a reply is let through."""

# Plain clients keep the prefix that every NATS library uses, so that an ordinary program works with nothing
# but NATS_URL. For that, no other role may hear `_INBOX.>`, and no other role's replies go there.
_INBOXES: Final = {
    Role.SERVICES: "_INBOX_services",
    Role.NODE: "_INBOX_node",
    Role.CLIENT: "_INBOX",
    Role.OBSERVER: "_INBOX_observer",
}

_SERVICE_DISCOVERY: Final = tuple(f"$SRV.{verb}{rest}" for verb in ("PING", "INFO", "STATS") for rest in ("", ".>"))
# $JS.FC answers the flow control of ordered consumers, KV watchers among them; without it they stall.
_JETSTREAM: Final = ("$JS.API.>", "$JS.ACK.>", "$JS.FC.>", "$KV.>", "$O.>")
_MICRO: Final = "$SRV.>"


@dataclass(frozen=True)
class Permissions:
    """What one role may do, in the terms of the NATS server."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    may_respond: bool
    """May answer a message it received, wherever its reply subject points, within bounds."""


def inbox_prefix(role: Role) -> str:
    """First token of the subjects on which *role* receives replies."""
    return _INBOXES[role]


def is_inbox(subject: str) -> bool:
    """Whether *subject* lies in some role's inbox.

    The server does not check where a request wants its answer. Services may write anywhere in the store, so
    they must answer only where this holds, or a client could have a reply written for it.
    """
    prefix, dot, rest = subject.partition(".")
    return bool(dot and rest) and prefix in _INBOXES.values()


def permissions(role: Role) -> Permissions:
    """What *role* may publish and subscribe to."""
    publish = _sent(role) | set(_SERVICE_DISCOVERY)
    subscribe = _heard(role) | {f"{inbox_prefix(role)}.>"}
    if role in (Role.SERVICES, Role.NODE):
        subscribe.add(_MICRO)
    if role is Role.SERVICES:
        publish -= set(_SERVICE_DISCOVERY)
        publish |= {*_JETSTREAM, _MICRO, *(f"{prefix}.>" for prefix in _INBOXES.values())}
    answers = any(request.answered_by is role for request in requests())
    return Permissions(
        publish=tuple(sorted(publish)),
        subscribe=tuple(sorted(subscribe)),
        may_respond=answers and role is not Role.SERVICES,
    )


def _sent(role: Role) -> set[str]:
    facts = {event.at("*" if event.target else "") for event in events() if role in event.sent_by}
    asked = {request.at("*" if request.target else "") for request in requests() if role in request.asked_by}
    return facts | asked


def _heard(role: Role) -> set[str]:
    facts = {event.at("*" if event.target else "") for event in events() if role in event.read_by}
    answered = {request.at("*" if request.target else "") for request in requests() if request.answered_by is role}
    return facts | answered
